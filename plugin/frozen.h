/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * frozen: one disk of one freeze, as all connections of it see it: its size, its maps in the view that was asked for,
 * and how much of it has been handed out. It reads nothing itself.
 *
 * Reference counts and the set are the loop thread's. Maps do not change once it stands, so that any thread may look at
 * them while it holds a reference; what has been handed out has a lock of its own.
 */
#ifndef QPULL_PLUGIN_FROZEN_H
#define QPULL_PLUGIN_FROZEN_H

#include "covered.h"
#include "source/map.h"

#include <pthread.h>
#include <stdbool.h>

/* What base:allocation tells (map=). */
enum view {
    VIEW_ALLOCATION, /* what is allocated */
    VIEW_DIRTY,      /* clean areas are holes, dirty ones as they are: data, or zeroes that are no holes */
    VIEW_BOTH,       /* clean areas are holes, dirty ones are data whatever they hold: for who writes all data over */
    VIEW_COUNT
};
const char *view_name(enum view v);
int view_parse(const char *name, enum view *ret_view); /* -EINVAL */

#define FROZEN_SESSION_SIZE 32 /* bytes of a session's id, with the NUL */

struct frozen {
    char *disk;                        /* owned */
    char session[FROZEN_SESSION_SIZE]; /* of which freeze */
    uint64_t size;                     /* bytes */
    struct map *types;                 /* owned: nbdkit's extent types in the view */
    struct map *allocation;            /* owned: what reads as zeroes need not be read; NULL: types says it */
    struct map *dirty;                 /* owned: since the checkpoint; NULL: was not asked for */
    void *keeper;                      /* the maker's */
    pthread_mutex_t lock;              /* of what follows */
    struct covered covered;            /* handed out: read by clients, or told to be zero */
    bool failed;                       /* a read of it failed */
    bool map_written;
    /* loop thread */
    unsigned nrefs;
    struct frozen *next;
};

/* Maps are copied; dirty may be NULL with VIEW_ALLOCATION. -ENOMEM, -EINVAL: they are not as long as the disk. */
int frozen_new(const char *disk, const char *session, uint64_t size, enum view view, const struct map *allocation,
               const struct map *dirty, struct frozen **ret_frozen);
void frozen_free(struct frozen *f);

/* Types of [offset, offset + length), as frozen->types has them: at most max runs. Counts those that a client needs not
 * read as handed out, up to the end of the range. Any thread. */
struct frozen_run {
    uint64_t length;
    uint32_t type;
};
size_t frozen_tell(struct frozen *f, uint64_t offset, uint64_t length, struct frozen_run *runs, size_t max);
/* Whether the whole range reads as zeroes. */
bool frozen_is_zero(const struct frozen *f, uint64_t offset, uint64_t length);
void frozen_was_read(struct frozen *f, uint64_t offset, uint64_t length);
void frozen_read_failed(struct frozen *f);
/* Every byte of the disk was read, or told to be zero, and no read failed. */
bool frozen_is_whole(struct frozen *f);

/*
 * Writes the dirty map as JSON, as "nbdinfo --map=… --json" does, in one step for whoever looks: once, later calls do
 * nothing. Waits for the disk. Negative errno.
 */
int frozen_write_dirty_map(struct frozen *f, const char *path);

#endif
