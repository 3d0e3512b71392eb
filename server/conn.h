/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * conn: one NBD client's connection: the socket, the protocol machine (nbd/nbd), its part in a session (vm_stay), its
 * requests (pull), and the deadlines that keep a slow or silent client from costing anybody else. The set holds them
 * all.
 *
 * Loop thread only. A connection belongs to its set and is freed in its socket's close callback, nowhere else.
 *
 * TLS has one seam: conn_input() gets its bytes from conn_tls_input(), conn_output() hands its batches to tls_write(),
 * and all else sees plain bytes.
 */
#ifndef QPULL_CONN_H
#define QPULL_CONN_H

#include "budget.h"
#include "catalog.h"
#include "config.h"
#include "fair.h"
#include "rate.h"

#include <uv.h>

struct conn;
struct tls_server;
struct ticket_book;

struct conn_set {
    uv_loop_t *loop;                    /* borrowed */
    const struct server_config *config; /* borrowed */
    const struct catalog *catalog;      /* borrowed */
    struct tls_server *tls;             /* borrowed; NULL: TLS is off */
    struct ticket_book *tickets;        /* borrowed; NULL: there are none */
    const struct access *access;        /* borrowed; may be another one after any turn of the loop */
    struct budget budget;
    struct fair fair;
    struct rate_set rates;
    uv_timer_t tick;           /* runs while there is a connection */
    struct conn *first, *last; /* owned: in the order in which they came */
    size_t nconns;             /* those that talk */
    size_t nopen;              /* sockets: those that talk, and those that are closing */
    size_t head_bytes;         /* of all: unsent, but for payload */
    uint64_t next_id;
    uint64_t ntotal, nrefused, nevicted; /* ever */
    uint64_t complained_ms;              /* loop time of the last log line about a refusal */
    uint64_t nsilent;                    /* refusals since then */
    uint64_t limit_told_ms;              /* likewise, about one client's limit */
    uint64_t lines_ms;                   /* the second of lines about clients began */
    uint64_t nlines, nunsaid;            /* lines in it, and those that were left out */
    void (*on_closed)(void *arg);        /* private */
    void (*on_empty)(void *arg);         /* the last socket is closed; may be NULL */
    void *arg;
};

/* Who may do what stands in config, until the owner sets s->access. */
int conn_set_init(struct conn_set *s, uv_loop_t *loop, const struct server_config *config,
                  const struct catalog *catalog);
/* With no connection left. cb, with the arg of on_empty, is the last touch. */
void conn_set_close(struct conn_set *s, void (*cb)(void *arg));

/*
 * Takes the client that waits on a listening stream (UV_NAMED_PIPE or UV_TCP). With max-connections at hand, the one
 * that has been negotiating longest without being let in makes way; if there is none, the new one is closed at
 * once, because a client that was let to wait could hold others up for ever. -ENOMEM: the client still waits, and libuv
 * tells of no further one until it is taken.
 */
int conn_accept(struct conn_set *s, uv_stream_t *listener);

/* Each connection answers what is in flight with an error and hangs up; those in CONN_FLUSH_MS. */
void conn_set_fail(struct conn_set *s, const struct failure *why);
/* Closes what is left, without a word to the client. */
void conn_set_kill(struct conn_set *s, const struct failure *why);

/* For the control socket; the caller owns the answer: an array of objects. */
struct json_object *conn_set_to_json(struct conn_set *s);

#endif
