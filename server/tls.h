/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * tls: TLS 1.2 and 1.3 under one connection, by gnutls: the handshake, bytes of the socket to plain bytes and back. It
 * knows nothing of NBD: server/conn_tls has NBD_OPT_STARTTLS. The loop thread neither shakes hands nor encrypts more
 * than TLS_INLINE at a time: workers do (server/workers), one at a time for each connection, so that bytes keep their
 * order. Requests are small and decrypted where they come.
 *
 * Memory (docs/decisions/0018-tls.md): sealed bytes that the socket has not taken are in boxes of at most TLS_PART, two
 * for a connection; past TLS_SEALED_TOTAL of all, one of TLS_PART_SHORT for each.
 *
 * All functions on the loop thread only, but for tls_creds_load(), any thread. A `struct tls` belongs to its
 * connection, which keeps it until tls_is_busy() is false and the socket is closed; credentials are counted, because a
 * handshake may outlive their replacement.
 */
#ifndef QPULL_TLS_H
#define QPULL_TLS_H

#include "qmp/base.h"
#include "workers.h"

#include <stdbool.h>
#include <uv.h>

#define TLS_IDENTITY_MAX 256 /* bytes, the 0 included; a longer name is replaced by its certificate's fingerprint */
#define TLS_NAMES_MAX 16u    /* of the alternative names of one certificate; more are not looked at */

/* -- credentials --------------------------------------------------------------------------------------------------- */
struct tls_creds;

/*
 * One of certs_dir (ca-cert.pem, server-cert.pem, server-key.pem, and ca-crl.pem if there is such a name) and psk_file
 * (lines of USER:HEXKEY) is not NULL. Reads files. ret_note: what is not an error, but people should know; or err 0.
 */
int tls_creds_load(const char *certs_dir, const char *psk_file, struct tls_creds **ret_creds, struct failure *ret_note,
                   struct failure *f);
struct tls_creds *tls_creds_ref(struct tls_creds *creds);
void tls_creds_unref(struct tls_creds *creds);          /* NULL is fine */
bool tls_creds_have_crl(const struct tls_creds *creds); /* a revocation list */
/* In words, for the log: "certificates in DIR, with a revocation list". */
const char *tls_creds_text(const struct tls_creds *creds);

/* -- what all connections share ------------------------------------------------------------------------------------ */
struct tls_box;

struct tls_server {
    struct workers *workers; /* owned */
    struct tls_creds *creds; /* one count: for handshakes that begin from now on */
    size_t sealed;           /* bytes in boxes of all connections */
    struct tls_box *spare;   /* owned: boxes for the next one */
    unsigned nspare;
    uint64_t nhandshakes, nfailed; /* ever: begun; that came to nothing */
};

/* creds is given when it succeeds. */
int tls_server_init(struct tls_server *s, uv_loop_t *loop, unsigned nthreads, struct tls_creds *creds);
void tls_server_set_creds(struct tls_server *s, struct tls_creds *creds); /* given */
void tls_server_trim(struct tls_server *s);                               /* frees what is spare */
/* With no connection left. cb is the last touch. */
void tls_server_close(struct tls_server *s, void (*cb)(void *arg), void *arg);

/* -- one connection ------------------------------------------------------------------------------------------------ */
struct tls;

/* Who the client has shown to be: for access rules, the log and the status. All can be printed; NULL: not told. */
struct tls_peer {
    char identity[TLS_IDENTITY_MAX]; /* "x509:CN=…" (RFC 4514), "x509:sha256:…", "psk:USER" */
    char *psk, *dn, *cn;             /* owned: the key's user; or the certificate's subject, and the only CN in it */
    char *names[TLS_NAMES_MAX];      /* owned: its alternative names: hosts, addresses, URIs, mail */
    size_t nnames;
    char session[96]; /* how: "(TLS1.3)-(ECDHE-…)-…" */
};

enum tls_state {
    TLS_HANDSHAKE, /* -> UP, FAILED */
    TLS_UP,        /* plain bytes go both ways -> FAILED */
    TLS_FAILED,    /* why is in tls_why(). Nothing goes in or out any more but an alert */
};

struct tls_ops {
    /* The batch of tls_write() is sealed and may be reused; not in TLS_FAILED, where it stays the caller's. */
    void (*taken)(void *arg);
    /* Something has changed: state, bytes to read, room to read to, nothing left to send. The last touch of its
     * callback. */
    void (*moved)(void *arg);
};

/* Begins the handshake. stream and server are borrowed for life; the stream's reading stays the caller's. */
int tls_new(struct tls_server *server, uv_stream_t *stream, const struct tls_ops *ops, void *arg, struct tls **ret_tls);
void tls_free(struct tls *t); /* NULL is fine. Not busy, and the stream is closed */

enum tls_state tls_state(const struct tls *t);
const struct failure *tls_why(const struct tls *t);   /* TLS_FAILED */
const struct tls_peer *tls_peer(const struct tls *t); /* from TLS_UP on */

/* Input: where bytes of the socket may be put (len 0: no room now), and that they, or the end of them, have come. */
uv_buf_t tls_room(struct tls *t);
void tls_received(struct tls *t, size_t n);
void tls_received_eof(struct tls *t);
/* Plain bytes; 0: no more will come; -EAGAIN: none now; else it has failed. */
ssize_t tls_read(struct tls *t, void *to, size_t size);

/* Output, TLS_UP only: one batch at a time; the array and what it points to are borrowed until ops->taken. */
void tls_write(struct tls *t, const uv_buf_t *bufs, unsigned nbufs);
void tls_bye(struct tls *t); /* the last that is sent; nothing unless TLS_UP and idle */
/* Something is on its way to the socket. */
bool tls_is_sending(const struct tls *t);
/* Bytes that the socket has taken, ever. */
uint64_t tls_progress(const struct tls *t);

/* No ops->taken any more, and nothing more is sent. */
void tls_stop(struct tls *t);
/* A worker has it. ops->moved comes when it is done. */
bool tls_is_busy(const struct tls *t);

#endif
