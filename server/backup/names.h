/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * names: how everything that we make in a QEMU is called. All of it begins with "qpull-" and the id of its session, so
 * that leftovers of a dead daemon are found by name (backup/sweep) and nothing of others is ever touched. Any thread.
 */
#ifndef QPULL_BACKUP_NAMES_H
#define QPULL_BACKUP_NAMES_H

#include "qmp/base.h"

#include <stdbool.h>

#define NAMES_PREFIX "qpull-"
#define NAMES_ID_SIZE 9 /* eight hex digits and the NUL */
/* Of the NBD server's fd, whatever the session: only the next daemon can close one that nothing else in QEMU names. */
#define NAMES_ID_SERVER "00000000"
#define NAMES_SIZE 32            /* QEMU: a node name is at most 31 bytes (block.c, bdrv_assign_node_name) */
#define NAMES_MAX_DISKS 999      /* what the longest name still has room for, and a bound for what a sweep believes */
#define NAMES_CHECKPOINT_MAX 255 /* bytes; qcow2 allows 1023, NBD 4096 with the prefix of the context */

enum names_kind {
    NAMES_SCRATCH, /* file node over the scratch fd, and the fd's "opaque" tag */
    NAMES_CBW,     /* copy-before-write filter */
    NAMES_PRE,     /* raw node in the guest's path before the cut; carries the records up to the cut */
    NAMES_CUT,     /* raw node on top of pre, whose file child the cut replaces */
    NAMES_ACCESS,  /* snapshot-access node: the frozen view */
    NAMES_BASE,    /* self-test only: a small disk of our own */
    NAMES_EXPORT,  /* export of the frozen view; NBD clients call it by its node's name */
    NAMES_LAYER,   /* export of the live disk, for what its layers have allocated */
    NAMES_LIVE,    /* export of the live disk, through which it is flushed before the freeze */
    NAMES_LATE,    /* export and bitmap of a map that is read while the session is up */
    NAMES_SINCE,   /* bitmap: what changed since one checkpoint */
    NAMES_WRITTEN, /* bitmap on the cbw node: what the guest wrote since the freeze */
    NAMES_KEEP,    /* bitmap on the disk, for the blink of an eye in which a checkpoint is made */
    NAMES_SERVER,  /* name of the NBD server's fd (getfd) */
    NAMES_JOB,     /* block job */
    NAMES_QUIESCE, /* mark, a null-co node: the guest's file systems are being frozen through its agent */
    NAMES_PAUSED,  /* null-co node, a mark for our successor: it was us who paused this VM */
    NAMES_LOCK,    /* empty image over the cbw node (backup/lock), and the fd's "opaque" tag */
    NAMES_HOLD,    /* null-co node: the mark of a changed action (backup/hold); n says of what */
    NAMES_DISCARD, /* writable export of the frozen view, for what is given back */
    NAMES_VHOST,   /* vhost-user-blk export of the frozen view, and, as the server's, its socket's fd (getfd) */
    NAMES_NKINDS
};

/* Writes "qpull-ID-KINDn" and returns out. */
const char *names_make(char out[NAMES_SIZE], const char *id, enum names_kind kind, unsigned n);
/* A new random id. */
void names_new_id(char id[NAMES_ID_SIZE]);

bool names_is_ours(const char *name); /* NULL: no */
/* Takes such a name apart; false when it is not ours to the letter. */
bool names_parse(const char *name, char id[NAMES_ID_SIZE], enum names_kind *ret_kind, unsigned *ret_n);

/* A checkpoint's name as users may choose it: 1 to 255 bytes of UTF-8-safe text without '/', '@', control characters,
 * and not ours. */
int name_check(const char *name, struct failure *f);

#endif
