/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * fair: how clients share the daemon's one thread and QEMU's. A client is what the system says of its connections: a
 * process, or an address; it gets no more by having more connections. While there are several, requests are taken in
 * turns, FAIR_REQUESTS of each client in a turn of the loop, and each may have so many reads in flight as is its part
 * of FAIR_READS. Who is alone is not held up.
 *
 * Loop thread only. Owned by the set of connections; a member is embedded in each of them.
 */
#ifndef QPULL_FAIR_H
#define QPULL_FAIR_H

#include "qmp/base.h"

#include <stdbool.h>
#include <stddef.h>
#include <uv.h>

struct fair_client;
struct fair_member;

struct fair_list {
    struct fair_member *first, *last;
};

struct fair {
    /* private */
    struct fair_client *clients; /* owned */
    size_t nclients, nreading;   /* all; those with reads in flight or waiting */
    uv_idle_t idle;              /* runs while requests wait for a turn */
    size_t nready;
};

struct fair_member {
    /* Requests may be taken: at most FAIR_REQUESTS, then fair_queue() again. From the loop. */
    void (*on_requests)(struct fair_member *m);
    /* A read may begin. From within somebody's fair_read_done(). */
    void (*on_read)(struct fair_member *m);
    /* private */
    struct fair_client *client; /* NULL: not in */
    struct fair_member *next[2], *prev[2];
    bool queued[2];
    size_t nreads; /* in flight */
};

int fair_init(struct fair *f, uv_loop_t *loop);
void fair_close(struct fair *f, uv_close_cb cb); /* no member is left */

int fair_join(struct fair *f, struct fair_member *m, const char *client); /* -ENOMEM */
/* Also if not in. With no read in flight, and not from within a callback of anybody here. */
void fair_leave(struct fair_member *m);

/* Nobody else is there: requests need no turn. */
static inline bool fair_is_alone(const struct fair *f)
{
    return f->nclients <= 1;
}
void fair_queue(struct fair_member *m); /* on_requests comes in its turn; nothing if it is to come already */
static inline bool fair_is_queued(const struct fair_member *m)
{
    return m->queued[0];
}

/* Whether one more read may begin; false: on_read comes. One that begins is told of by the next two. */
bool fair_may_read(struct fair_member *m);
void fair_read_begun(struct fair_member *m);
void fair_read_done(struct fair_member *m);

#endif
