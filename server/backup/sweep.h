/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * sweep: finds what a dead daemon left in a QEMU, by name, and undoes it: session by session, each by walking the same
 * undo functions down from the far end. What does not carry our prefix is not touched, nor what carries the id of a
 * session that lives in another process (backup/alive): that is a failure. Run it only while no session of ours lives
 * in that QEMU, unless it is only to look. Loop thread only.
 */
#ifndef QPULL_BACKUP_SWEEP_H
#define QPULL_BACKUP_SWEEP_H

#include "backup/quiesce.h"
#include "qmp/client.h"

#include <stdbool.h>
#include <uv.h>

struct sweep_config {
    uv_loop_t *loop;
    struct qmp_client *qmp;
    const char *server_socket; /* as struct rig_config */
    int server_dir;
    unsigned timeout_ms;
    struct quiesce *quiesce; /* thaws what a dead daemon has frozen; NULL: nothing can have been */
    /* Nothing is undone; nsessions of the callback is how many there are, but for the one with the id `living` (may be
     * NULL). server_socket and server_dir are not used. */
    bool only_look;
    const char *living;
};

/* nsessions: whose leftovers were found. f NULL: all of them are gone. -EBUSY: what another process is at, stands. */
typedef void (*sweep_cb)(void *arg, unsigned nsessions, const struct failure *f);
/* cb comes once, later. config is borrowed for the call, what it points to until cb. */
int sweep_start(const struct sweep_config *config, sweep_cb cb, void *arg, struct failure *f);

#endif
