/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * source/ahead: a source over another one, which reads ahead for a client that waits for each answer before it asks for
 * more: one read after the other, from the front to the back, perhaps with steps over what a map calls zero or clean.
 * What it has read ahead is right, whatever happens to the snapshot later, but it is not served any more when a read
 * has said that the snapshot is lost. Where reads come in another order, or several requests are in flight, it does
 * nothing and keeps nothing.
 *
 * It is no cache: bytes are kept until they are read once, or given back. Who wants to know whether the disk can still
 * be read asks the source below.
 *
 * Loop thread only. docs/decisions/0019-latency.md.
 */
#ifndef QPULL_SOURCE_AHEAD_H
#define QPULL_SOURCE_AHEAD_H

#include "source/map.h"
#include "source/source.h"

#include <stdbool.h>
#include <uv.h>

#define AHEAD_PIECE (256u << 10)        /* bytes of one read ahead, which ends where a multiple of this is */
#define AHEAD_PIECES 8u                 /* for one disk */
#define AHEAD_REQUEST (2u << 20)        /* bytes in flight that may be one request in pieces: what qemu-img asks for */
#define AHEAD_MERGED (2u * AHEAD_PIECE) /* bytes in flight past which neighbours among them become one request */
#define AHEAD_BEGIN 3u                  /* reads in order before it begins */
#define AHEAD_PATHS 2u

/* What all disks of a session may hold together. It outlives them. */
struct ahead_pool {
    size_t left; /* bytes */
};
#define AHEAD_POOL (2u * AHEAD_PIECES * AHEAD_PIECE)

/* below is given, unless this fails (-ENOMEM). */
int ahead_new(uv_loop_t *loop, struct ahead_pool *pool, struct source *below, struct source **ret_source);

/*
 * A way that a client may go: over the runs of the map (borrowed for life) where (flags & mask) == value, stepping over
 * others. The whole disk is always one. Past AHEAD_PATHS they are not looked at.
 */
void ahead_follow(struct source *s, const struct map *map, uint64_t mask, uint64_t value);

#endif
