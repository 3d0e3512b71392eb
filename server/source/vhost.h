/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * source/vhost: frozen bytes through QEMU's vhost-user-blk export: we are the front end (the driver) of a virtio-blk
 * device whose data QEMU puts straight into memory that we share with it, without a socket in between. About a quarter
 * of the CPU in QEMU that NBD takes. It brings no maps, and it does not tell a broken snapshot from any other error:
 * that is what source/nbd is asked for.
 *
 * The export is not trusted: nothing that it writes to the shared memory is believed but the data itself, and it cannot
 * shrink the memory under us (sealed). It can change bytes after it has told of them: then a client gets what QEMU
 * wrote last, which is QEMU's to say. Loop thread only.
 *
 * It lends: a read that fits into a slot is answered with the slot.
 */
#ifndef QPULL_SOURCE_VHOST_H
#define QPULL_SOURCE_VHOST_H

#include "source/source.h"

#include <uv.h>

/* How much memory all sources together may share. Counted until the last loan of a source has ended. */
struct vhost_room {
    size_t limit, used; /* bytes */
};

struct source_vhost_config {
    int fd; /* a connected, non-blocking unix stream socket to the export; given to the source, also on failure */
    /* As in source/nbd.h: 0, or reads never cross a multiple of it (QEMU 7.0-7.2). */
    uint32_t cluster;
    struct vhost_room *room; /* borrowed until the memory is free again; NULL: no limit */
    unsigned timeout_ms;     /* to set up, and with no answer while reads are in flight; 0: 30000 */
};

/*
 * cb comes exactly once with the source (owned by the receiver) or a failure: -EPROTO (the export lacks something that
 * we need, or breaks the protocol), -ETIMEDOUT, -ECONNRESET, -ECANCELED. Negative: -EINVAL (a cluster that is no power
 * of two), -ENOMEM, -ENOSPC (no room), or why there is no shared memory.
 * The source's size is a multiple of 512 bytes: the end of a disk that is not has to be read otherwise.
 */
typedef void (*source_vhost_open_cb)(void *arg, struct source *s, const struct failure *f);
struct source_vhost_open;
int source_vhost_open(uv_loop_t *loop, const struct source_vhost_config *config, source_lost_cb on_lost,
                      source_vhost_open_cb cb, void *arg, struct source_vhost_open **ret_open);
void source_vhost_open_cancel(struct source_vhost_open *o);

#endif
