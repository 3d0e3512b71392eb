/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * fair: how clients share the daemon's one thread and QEMU's. A client is what the system says of its connections: a
 * process, or an address; it gets no more by having more connections. While there are several, requests are taken in
 * turns, FAIR_REQUESTS of each client in a turn of the loop. Of those who read from the same QEMU each may have so many
 * reads in flight as is its part of FAIR_READS. Who is alone is not held up.
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
    struct fair_vm *vms;         /* owned */
    size_t nclients, nreading;   /* all; those that read */
    uv_idle_t idle;              /* runs while requests wait for a turn */
    size_t nready;
};

enum fair_queue { FAIR_QUEUE_REQUESTS, FAIR_QUEUE_READS, FAIR_NQUEUES };

struct fair_member {
    /* Requests may be taken: at most FAIR_REQUESTS, then fair_queue() again. From the loop. */
    void (*on_requests)(struct fair_member *m);
    /* A read may begin. From within somebody's fair_read_done(). */
    void (*on_read)(struct fair_member *m);
    /* private */
    struct fair_client *client[FAIR_NQUEUES]; /* NULL: not in */
    struct fair_member *next[FAIR_NQUEUES], *prev[FAIR_NQUEUES];
    bool queued[FAIR_NQUEUES];
    size_t nreads; /* in flight */
};

int fair_init(struct fair *f, uv_loop_t *loop);
void fair_close(struct fair *f, uv_close_cb cb); /* no member is left */

int fair_join(struct fair *f, struct fair_member *m, const char *client); /* -ENOMEM */
/* It reads from this VM from now on, and has no read in flight; the name is copied. Without it reads are not counted.
 * -ENOMEM */
int fair_join_reads(struct fair *f, struct fair_member *m, const char *vm);
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
    return m->queued[FAIR_QUEUE_REQUESTS];
}

/* Whether one more read may begin; false: on_read comes. One that begins is told of by the next two. */
bool fair_may_read(struct fair_member *m);
void fair_read_begun(struct fair_member *m);
void fair_read_done(struct fair_member *m);
/* Bytes: this connection's part of `all`, while several clients read; of one that is alone, or not known, all of it. */
size_t fair_part(const struct fair_member *m, size_t all);

#endif
