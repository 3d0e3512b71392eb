/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * map: what one metadata context says about a frozen disk, as a compact list of runs in memory. Written once from the
 * front to the back, then only read. Any one thread while it is written; read-only maps may be shared between threads.
 */
#ifndef QPULL_SOURCE_MAP_H
#define QPULL_SOURCE_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct map;
struct nbd_status; /* nbd/nbd.h, which cannot be included beside libnbd.h: both own the prefix nbd_ */

/* A run, or the part of it that was asked for. */
struct map_extent {
    uint64_t length; /* bytes */
    uint32_t flags;
};

int map_new(struct map **ret_map);
void map_free(struct map *m); /* NULL is fine */

/* Appends length bytes with these flags; equal neighbours become one run. -ENOMEM, -EINVAL (length 0, or past 2^63),
 * -E2BIG (flags past 32 bits). */
int map_append(struct map *m, uint64_t length, uint64_t flags);
/* The whole of a disk with one flag. */
int map_new_uniform(uint64_t length, uint64_t flags, struct map **ret_map);

uint64_t map_length(const struct map *m); /* bytes covered */
size_t map_nruns(const struct map *m);
size_t map_memory(const struct map *m); /* bytes of heap */
/* Bytes whose flags have any bit of mask. */
uint64_t map_count(const struct map *m, uint64_t mask);

/*
 * The runs of [offset, offset + length), clipped to it, into at most max extents. Returns how many (at least one when
 * the range is not empty and inside the map, and max > 0).
 */
size_t map_extents(const struct map *m, uint64_t offset, uint64_t length, struct map_extent *extents, size_t max);

/* The same runs as they are in the map, at most max (> 0), unclipped; borrowed until the map is freed. False: the range
 * is empty or behind the map's end. */
bool map_status(const struct map *m, uint64_t offset, uint64_t length, size_t max, struct nbd_status *status);

/*
 * A new map that equals m, but has the flags `value` wherever `mask` has any flag bit. The two must be of one length
 * (-EINVAL). Used where QEMU's own answer cannot be trusted for areas written since the freeze.
 */
int map_overlay(const struct map *m, const struct map *mask, uint64_t value, struct map **ret_map);

/* A new map that says 1 where m's flags, taken as a number from 1 to 64, are one of `numbers` (bit 0: the number 1),
 * else 0. */
int map_pick(const struct map *m, uint64_t numbers, struct map **ret_map);

#endif
