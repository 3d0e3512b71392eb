/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * thaw: asks a guest agent to thaw its guest's file systems until it says that they are, or for so long. Used by the
 * watchdog, and by the daemon for what a dead one has left. Loop thread only; owned by itself from thaw_start() to its
 * callback.
 */
#ifndef QPULL_BACKUP_THAW_H
#define QPULL_BACKUP_THAW_H

#include "qmp/base.h"

#include <stdbool.h>
#include <uv.h>

#define THAW_TRY_MS 5000u  /* an agent that runs answers in ms, unless its hooks take time */
#define THAW_PAUSE_MS 500u /* between two tries, where the first one ended before its time */
#define THAW_LOST_TRIES 3u /* nobody listens at the socket: QEMU is gone, or gone for the moment */

struct thaw;

struct thaw_config {
    uv_loop_t *loop;
    const char *path; /* the agent's socket */
    int fd;           /* a connection to it, given if this succeeds; -1: none */
    unsigned total_ms;
    bool look_first; /* ask whether they are frozen at all before thawing */
};

/* f NULL: they are thawed. Else they may be frozen: -ENOENT, -ECONNREFUSED: there is no such QEMU any more. */
typedef void (*thaw_cb)(void *arg, const struct failure *f);

int thaw_start(const struct thaw_config *config, thaw_cb cb, void *arg, struct thaw **ret_thaw);
/* The callback does not come any more. */
void thaw_forget(struct thaw *t);

#endif
