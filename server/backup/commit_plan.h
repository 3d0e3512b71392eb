/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * commit_plan: which layers a block commit is about, and what has to happen to each checkpoint's record so that the
 * base never says less than the truth (docs/decisions/0007-commit.md). Made from answers of QEMU; no I/O, no waiting.
 * Embedded in its owner; any one thread.
 */
#ifndef QPULL_BACKUP_COMMIT_PLAN_H
#define QPULL_BACKUP_COMMIT_PLAN_H

#include "backup/disks.h"

/* Longer chains are not QEMU's; this bounds what is believed. */
#define CHAIN_MAX_LAYERS 200

/* The images of one disk, the live one first. Filters are seen through. */
struct chain {
    struct json_object *named, *graph; /* owned: counts on the answers */
    size_t nlayers;
    struct json_object *layers[CHAIN_MAX_LAYERS]; /* borrowed from named */
    const char *const *dead; /* borrowed, set by the owner: checkpoints that were deleted; their records are nobody's */
    size_t ndead;
};

/* root: the disk's node, or any node above its live image. Both answers are counted, not taken. -EPROTO, -E2BIG. */
int chain_init(struct chain *c, struct json_object *named, struct json_object *graph, const char *root,
               struct failure *f);
void chain_done(struct chain *c); /* also if zeroed */

const char *chain_node(const struct chain *c, size_t layer); /* its node name */
const char *chain_file(const struct chain *c, size_t layer); /* its file name, as QEMU knows it; "" if it has none */
uint64_t chain_size(const struct chain *c, size_t layer);    /* bytes the guest sees */
bool chain_is_read_only(const struct chain *c, size_t layer);
/* By node name, else by file name. -ENOENT, -ENOTUNIQ (two images have that file name). */
int chain_find(const struct chain *c, const char *what, size_t *ret_layer, struct failure *f);
/* The id of a block job at work on a layer of the chain, not counting `except`; NULL: none. */
const char *chain_job(const struct chain *c, const char *except);

/* What happens to one checkpoint's record. */
enum commit_action {
    COMMIT_LEAVE, /* nothing: it is right without our help */
    COMMIT_MERGE, /* the base has a record, which sees the job's writes; those of the committed layers are merged in */
    COMMIT_MAKE,  /* the base gets one, with what the committed layers' records say */
    /*
     * The base gets one that does not record. The committed layers hold the deepest record, an unusable one; a usable
     * one that stays above would pass for the whole once they are gone.
     */
    COMMIT_HUSK,
    COMMIT_DROP, /* the base keeps no bitmaps: it is given up, and what stays of it in the live image is removed */
};

struct commit_record {
    char *name; /* owned: the checkpoint's */
    enum commit_action action;
    enum reason reason; /* why it could not be used before */
    /*
     * MAKE: a committed layer lies above the deepest record, or has no usable one of this name: its allocation stood in
     * for it. The base's record must therefore see all that the job writes, from the first byte.
     */
    bool needs_marks;
    /*
     * MAKE, HUSK: an image that only reads, above top, holds a usable record. Should QEMU die just after the graph has
     * changed, that one would pass for the whole: the base's must be on disk before.
     */
    bool needs_store;
    bool stays_above, stays_below; /* layers that stay hold a record of this name, too */
    uint64_t granularity;          /* bytes: the finest of the parts */
    uint64_t least;                /* bytes that the merged record must at least claim */
    size_t nsources;
    const char **sources; /* owned array, names borrowed from the chain: nodes whose records are to be merged */
};

struct commit_plan {
    size_t top, base; /* layers of the chain; base > top */
    size_t nrecords;
    struct commit_record *records; /* owned */
};

/* Checks the records of all layers; -EBUSY: one is in use by somebody else. Zeroed before; done after. */
int commit_plan_make(struct commit_plan *p, const struct chain *c, size_t top, size_t base, struct failure *f);
void commit_plan_done(struct commit_plan *p);                                          /* also if zeroed */
struct commit_record *commit_plan_find(const struct commit_plan *p, const char *name); /* NULL: none */

#endif
