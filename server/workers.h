/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * workers: a few threads for what takes long enough to hold the loop up (encryption, handshakes), in the order in which
 * it is handed over. Not for what may wait for others (files, sockets): that would hold up the next one.
 *
 * All functions on the loop thread only; run() on a worker, done() on the loop. A piece of work is embedded in whoever
 * wants it and belongs to the workers from workers_submit() until its done().
 */
#ifndef QPULL_WORKERS_H
#define QPULL_WORKERS_H

#include "qmp/base.h"

#include <uv.h>

struct work {
    void (*run)(struct work *w);  /* on a worker */
    void (*done)(struct work *w); /* on the loop; exactly once; w is the caller's again */
    struct work *next;            /* private */
};

struct workers;

/* nthreads >= 1 are started at once. */
int workers_new(uv_loop_t *loop, unsigned nthreads, struct workers **ret_workers);
void workers_submit(struct workers *ws, struct work *w);
/* What was submitted is done before; nothing may be submitted any more. cb is the last touch. */
void workers_close(struct workers *ws, void (*cb)(void *arg), void *arg);

/* How many there should be where nobody says it: as many as processors that we may use, at most `most`. */
unsigned workers_default(unsigned most);

#endif
