/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* certs: an authority, a server's and a client's certificate for fuzz_tls, as `qpull certs init` makes them. */
#ifndef QPULL_TEST_FUZZ_CERTS_H
#define QPULL_TEST_FUZZ_CERTS_H

/* In that folder, and clients/me below it. Without a word; ends the process where it fails. */
void certs_make(const char *folder);

#endif
