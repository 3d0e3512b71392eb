/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * reopen: image files that a qemu-storage-daemon of ours holds for reading become writable, and read-only again. Making
 * one read-only is what stores its bitmaps, and QEMU says here, not at its end, when it could not. Between the two a
 * kill -9 of that daemon leaves the image's records inconsistent, so there should be little between them.
 *
 * Embedded in whoever waits. Loop thread only.
 */
#ifndef QPULL_BACKUP_REOPEN_H
#define QPULL_BACKUP_REOPEN_H

#include "backup/calls.h"
#include "backup/disks.h"

struct reopen {
    /* Which disks are meant; asked in reopen_start(), where done[] still tells of the walk before. */
    bool (*wants)(const struct reopen *r, size_t disk);
    /* f NULL: all of them went well. done[i] tells for each. */
    void (*cb)(struct reopen *r, const struct failure *f);
    bool *done; /* owned until reopen_done(): one for each disk of the list, of the last walk */
    /* private */
    const struct disk_list *disks; /* borrowed */
    bool *wanted;                  /* owned */
    bool writable;
    struct calls calls;
    struct failure failure; /* of the last walk */
};

/* disks is borrowed until the last walk has ended; only disks that are tracked may be wanted. */
int reopen_init(struct reopen *r, struct qmp_client *qmp, const struct disk_list *disks, unsigned timeout_ms);
void reopen_done(struct reopen *r); /* also of one that was zeroed */
/* 0: cb comes later; SEQ_DONE: no disk was wanted; negative: the sentence is in f. */
int reopen_start(struct reopen *r, bool writable, struct failure *f);

#endif
