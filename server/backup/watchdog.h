/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * watchdog: a small process that thaws a guest's file systems when we do not, because we are dead or hang. It is our
 * own program once more, started before the freeze; it holds one end of a pipe and the connection to the guest agent.
 *
 * Unlike other children of ours (server/child) it outlives us, kill -9 included: a session of its own, so that a
 * terminal's ^C is not for it, and SIGTERM is not heard, for systemd sends it to whatever a killed daemon has left. It
 * does not need to be told to end: every wait of its has a deadline.
 *
 *   it -> we   'R' ready; in the end its exit status: 0 nothing is frozen any more, 1 it gave up
 *   we -> it   'F' the freeze is about to be sent; SIGKILL: all is thawed, it is not needed any more
 *
 * It begins to thaw when the pipe ends after 'F', or freeze_ms after 'F', through the connection that it has got:
 * nobody can come in between, and a daemon that is stopped does not hold it up.
 *
 * Loop thread only. A watchdog is owned by the caller until its on_exit, watchdog_dismiss() or watchdog_abandon().
 */
#ifndef QPULL_BACKUP_WATCHDOG_H
#define QPULL_BACKUP_WATCHDOG_H

#include "qmp/base.h"

#include <stdbool.h>
#include <uv.h>

#define WATCHDOG_WORD "--thaw-watchdog" /* first argument of our own program; then the agent's socket, and times */
#define WATCHDOG_SELF "/proc/self/exe"

struct watchdog;

struct watchdog_config {
    uv_loop_t *loop;
    const char *program;         /* WATCHDOG_SELF, but for tests */
    const char *path;            /* the agent's socket */
    int agent_fd;                /* borrowed: the connection to it */
    unsigned freeze_ms, thaw_ms; /* from 'F' until it steps in; for all its tries together */
};

struct watchdog_ops {
    void (*on_ready)(void *arg); /* it watches; at most once */
    /* Its process is gone, and *w with it when this returns. thawed: nothing is frozen any more, by its word. */
    void (*on_exit)(void *arg, struct watchdog *w, bool thawed);
};

int watchdog_start(const struct watchdog_config *config, const struct watchdog_ops *ops, void *arg,
                   struct watchdog **ret_watchdog);
/* Before the freeze is sent; negative: it is not there any more, and nothing may be frozen. */
int watchdog_arm(struct watchdog *w);
void watchdog_dismiss(struct watchdog *w);   /* all is thawed; on_exit does not come any more */
void watchdog_hand_over(struct watchdog *w); /* it is to thaw, now; on_exit comes */
/* on_exit does not come any more, the process does what it has to do. */
void watchdog_abandon(struct watchdog *w);

/* The other side. Whether this process is one: then main() returns watchdog_main() before it does anything else. */
bool watchdog_is_one(int argc, char *const *argv);
int watchdog_main(int argc, char *const *argv);

#endif
