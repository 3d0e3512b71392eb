/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * sync: has the kernel write out what it holds back of a file or a block device, whoever wrote it: by a descriptor of
 * our own, past QEMU. Each on a thread of its own and not in libuv's pool, where storage that hangs would hold up all
 * other VMs; a thread that does not come back within the deadline is left to itself. Loop thread only.
 */
#ifndef QPULL_BACKUP_SYNC_H
#define QPULL_BACKUP_SYNC_H

#include <uv.h>

/* err: 0, -ETIMEDOUT, or why it cannot be opened (-ENOENT, -EACCES, -ENOTSUP: no file that is written to) or synced. */
typedef void (*sync_cb)(void *arg, int err);
/* cb comes once, later. path is copied. */
int sync_start(uv_loop_t *loop, const char *path, unsigned timeout_ms, sync_cb cb, void *arg);

#endif
