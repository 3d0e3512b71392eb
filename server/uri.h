/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* uri: the NBD URIs by which an export can be had, one for each listener. Pure but for the host's name. */
#ifndef QPULL_URI_H
#define QPULL_URI_H

#include "server.h"

/* Owned by the caller; NULL: out of memory, or local is wanted and others can come to that listener, too. A client of
 * TLS has to add where its certificate or key is. */
char *uri_of(const struct server_config *config, const char *address /* listen_address() */, const char *export_name,
             bool local);

#endif
