/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lineage_impl: the memory itself, for lineage.c (what it means) and lineage_file.c (how it is written). */
#ifndef QPULL_BACKUP_LINEAGE_IMPL_H
#define QPULL_BACKUP_LINEAGE_IMPL_H

#include "backup/lineage.h"

/* What was found out against a checkpoint; written by name. */
enum cause {
    CAUSE_NONE,
    CAUSE_RESIZED,
    CAUSE_LAYER_GONE,
    CAUSE_RECORD_GONE,
    CAUSE_REPLACED,
    CAUSE_SHRANK,
    CAUSE_REMADE,
    CAUSE_RETURNED,
    CAUSE_RESTORED,
    CAUSE_STOPPED,
    CAUSE_NCAUSES
};
const char *cause_name(enum cause c);

/* Why a checkpoint is not to be seen. */
enum absence {
    ABSENCE_NONE,    /* it is */
    ABSENCE_REMOVED, /* its layer is there without it */
    ABSENCE_AWAY,    /* its layer is not there */
};

struct past_image {
    char *file; /* owned */
    uint64_t dev, ino;
    int64_t born_ns;
};

/* A record that is whole by itself, together with what the layers above it have allocated. */
struct past_root {
    struct past_image at;
    uint64_t granularity, dirty;
    uint64_t written; /* dirty as it stands in the file */
    bool fill;        /* whole only with what its own layer has allocated */
    bool commit;      /* promised by a commit below the top: its layer is whole when that has ended */
    bool here;        /* in the QEMU that we have been connected to since then; not in the file */
};

/* The record as it was found, and what jobs promised; or the layers in which something is left of a buried one. */
#define ROOTS_MAX 16u

struct past {
    char *name;    /* owned: the checkpoint */
    uint64_t size; /* bytes of the disk when it was first seen; 0: to be learned */
    enum cause cause;
    enum absence absence;
    bool buried;    /* what is left of its record in the roots' files is nobody's */
    bool fill;      /* while it has no roots: the one that is learned will have this */
    uint64_t least; /* likewise: bytes that it marks at least, or it is not what was moved there */
    size_t nroots;
    struct past_root roots[ROOTS_MAX]; /* none: to be learned */
    bool seen;                         /* during a look */
};

/* An image that was forgotten is only not recognised any more. */
#define RETIRED_MAX 8u

struct past_disk {
    char *name;    /* owned */
    bool restored; /* said so; the next look holds it against all checkpoints that it finds */
    size_t nimages;
    struct past_image *images; /* owned: top first */
    size_t nretired;
    struct past_image retired[RETIRED_MAX]; /* they were above what was the top when the VM was last seen to run */
    size_t npasts;
    struct past *pasts; /* owned */
};

struct lineage {
    size_t ndisks;
    struct past_disk *disks; /* owned */
    bool dirty;
};

void past_image_done(struct past_image *i);
/* -ENOMEM */
int past_image_remember(struct past_image *p, const struct image *i);
bool past_image_is(const struct past_image *p, const struct image *i);
struct past_disk *lineage_find_disk(const struct lineage *l, const char *name);
int lineage_remember_images(struct lineage *l, struct past_disk *p, const struct disk *d);
void past_done(struct past *p);
/* One more, zeroed but for its name. NULL: out of memory. */
struct past_disk *lineage_add_disk(struct lineage *l, const char *name);
struct past *past_disk_add(struct past_disk *d, const char *name);
struct past *past_disk_find(const struct past_disk *d, const char *name); /* NULL: not there, d may be NULL, too */
void past_disk_drop(struct lineage *l, struct past_disk *d, struct past *p);
void past_drop_roots(struct past *p);

#endif
