/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * source/nbd: frozen bytes and maps from QEMU's own private NBD export, through libnbd's asynchronous calls, driven by
 * the libuv loop: no thread, no blocking call. Loop thread only.
 *
 * A client of QEMU that does not read its replies freezes the guest at the next drain, in all QEMU versions, so: a
 * buffer exists before its request goes out, requests in flight are bounded, and replies are read whenever they come,
 * however slow our own clients are. All sockets are closed (source_close, map callback) before QEMU's graph is changed.
 */
#ifndef QPULL_SOURCE_NBD_H
#define QPULL_SOURCE_NBD_H

#include "source/map.h"
#include "source/source.h"

#include <stdbool.h>
#include <uv.h>

struct source_nbd_config {
    const char *socket_path; /* unix socket of QEMU's NBD server; may be /proc/self/fd/N of an unlinked one */
    const char *export_name;
    /*
     * 0: any. Else reads never cross a multiple of this (a power of two): QEMU 7.0-7.2 return live bytes through
     * snapshot-access for reads that cross from a copied into an uncopied cluster (64 KiB).
     */
    uint32_t cluster;
    unsigned timeout_ms; /* to connect, and for each reply; 0: 30000 */
};

/*
 * cb comes exactly once with the source (owned by the receiver) or a failure. config is borrowed for the call (a path
 * through a descriptor must go on standing where the server's backlog is full: then it is tried again). Negative, for
 * all functions here: -EINVAL (a path too long for a socket, a cluster that is no power of two), -ENOMEM.
 * Failures worth telling apart: -ENOENT (no socket, no export, no context), -ECONNREFUSED, -ETIMEDOUT, -ECANCELED.
 */
typedef void (*source_nbd_open_cb)(void *arg, struct source *s, const struct failure *f);
/* Cancel: *ret_open can be given to source_nbd_open_cancel() until cb has come; cb then comes, later, with -ECANCELED.
 */
struct source_nbd_open;
int source_nbd_open(uv_loop_t *loop, const struct source_nbd_config *config, source_lost_cb on_lost,
                    source_nbd_open_cb cb, void *arg, struct source_nbd_open **ret_open);
void source_nbd_open_cancel(struct source_nbd_open *o);

/*
 * Reads the whole map of one metadata context over a connection of its own (QEMU's server loses its place when one
 * context of several fails) and closes that connection before cb. The map covers the export's size exactly. A context
 * that the export does not have is -ENOENT, a disk too fragmented to keep a map of it (32 Mi runs) -EFBIG.
 */
typedef void (*source_nbd_map_cb)(void *arg, struct map *map /* given */, const struct failure *f);
struct source_nbd_map;
int source_nbd_map(uv_loop_t *loop, const struct source_nbd_config *config, const char *context, source_nbd_map_cb cb,
                   void *arg, struct source_nbd_map **ret_map);
void source_nbd_map_cancel(struct source_nbd_map *m);

/*
 * One write through a connection of its own, for the self-test of a QEMU on nodes that we made for it
 * (backup/selftest). Never used on a guest's disk. data is borrowed until cb.
 */
typedef void (*source_nbd_poke_cb)(void *arg, const struct failure *f);
struct source_nbd_poke;
int source_nbd_poke(uv_loop_t *loop, const struct source_nbd_config *config, uint64_t offset, const void *data,
                    size_t length, source_nbd_poke_cb cb, void *arg, struct source_nbd_poke **ret_poke);
void source_nbd_poke_cancel(struct source_nbd_poke *p);

/*
 * Has QEMU flush the export's node, also of an export for reading: what it holds back of an image that others of its
 * own write to. It cannot be cancelled; the deadlines of config end it.
 */
int source_nbd_flush(uv_loop_t *loop, const struct source_nbd_config *config, source_nbd_poke_cb cb, void *arg);

#endif
