/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* tls_internal: what tls.c (the connection) and tls_creds.c (files and identities) share. Not for anybody else. */
#ifndef QPULL_TLS_INTERNAL_H
#define QPULL_TLS_INTERNAL_H

#include "config.h"
#include "tls.h"

#include <gnutls/gnutls.h>

struct tls_key {
    char *user; /* owned */
    unsigned len;
    unsigned char bytes[64];
};

struct tls_creds {
    unsigned nrefs;                        /* the loop's */
    gnutls_certificate_credentials_t x509; /* owned: either … */
    gnutls_psk_server_credentials_t psk;   /* … or */
    gnutls_priority_t priority;            /* owned */
    struct tls_key *keys;                  /* owned: of psk; read-only once loaded */
    size_t nkeys;
    bool has_crl; /* x509 has a revocation list */
    char *text;   /* owned */
};

/* Sealed bytes on their way to the socket. */
struct tls_box {
    struct tls_box *next;
    uint8_t *data; /* owned */
    size_t at, len, size;
    size_t charged; /* what of size counts in tls_server.sealed */
};

enum tls_job { TLS_JOB_NONE, TLS_JOB_HANDSHAKE, TLS_JOB_SEAL };

struct tls {
    struct tls_server *server; /* borrowed */
    struct tls_creds *creds;   /* one count */
    uv_stream_t *stream;       /* borrowed */
    const struct tls_ops *ops;
    void *arg;
    gnutls_session_t session; /* a worker's while job is not NONE, like the fields marked (w) */
    gnutls_typed_vdata_st purpose;
    enum tls_state state;
    struct failure why;
    struct failure trouble; /* (w) what gnutls says; becomes why */
    struct tls_peer peer;   /* (w) until TLS_UP */
    bool stopped, bye_said;

    /* input: sealed; (w) in a handshake */
    uint8_t in[TLS_READ_BUFFER];
    size_t in_at, in_len;
    size_t barren; /* bytes that came since the last plain one */
    bool in_eof;

    struct work work;
    enum tls_job job;
    int result;          /* (w) gnutls' */
    struct tls_box *out; /* (w) owned: what gnutls pushes goes here; NULL: it makes one */

    /* the batch */
    const uv_buf_t *bufs; /* borrowed; NULL: none */
    unsigned nbufs, buf;  /* (w) all four */
    size_t buf_at;
    size_t left, part; /* bytes: not sealed yet; of them: to be sealed now */

    /* output */
    struct tls_box *queue, *writing; /* owned */
    uv_write_t write;
    uint64_t submitted; /* bytes given to libuv, ever */
};

/* tls_creds.c; gnutls' errors */
int tls_creds_apply(struct tls *t);
int tls_creds_identify(struct tls *t);

#endif
