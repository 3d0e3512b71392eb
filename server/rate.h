/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * rate: how fast one session may be read, by all its connections together: a token bucket for each session, and a queue
 * of those who wait for it, each of whom gets one piece in its turn. Who reads asks before each piece; nothing here
 * knows bytes, so nothing here can make one wrong.
 *
 * Loop thread only. The set is embedded in that of the connections; a user in each of them. A bucket lives while it has
 * users; its timer runs only while somebody waits.
 */
#ifndef QPULL_RATE_H
#define QPULL_RATE_H

#include "qmp/base.h"

#include <stdbool.h>
#include <uv.h>

struct rate_bucket;

struct rate_set {
    uv_loop_t *loop;             /* borrowed */
    struct rate_bucket *buckets; /* owned */
};

struct rate_user {
    /* There is room: rate_may() says yes, once. From the loop. */
    void (*on_room)(struct rate_user *u);
    /* private */
    struct rate_bucket *bucket; /* NULL: no limit */
    struct rate_user *next, *prev;
    bool queued;
};

/* From now on it reads that session, which may have so many bytes a second; 0: any. The name is copied. -ENOMEM */
int rate_join(struct rate_set *s, struct rate_user *u, const char *session, uint64_t bytes_per_s);
/* Also if not in. Not from within on_room. */
void rate_leave(struct rate_user *u);
/* It waits no more. Also if not in. */
void rate_forget(struct rate_user *u);

/* Whether a piece may be read now; false: on_room comes, later. */
bool rate_may(struct rate_user *u);
/* It is being read. What is more than there was is a debt of all. */
void rate_spend(struct rate_user *u, size_t length);
/* Bytes: no piece should be longer, so that none has to wait long for its turn. SIZE_MAX: as long as it likes. */
size_t rate_piece(const struct rate_user *u);

#endif
