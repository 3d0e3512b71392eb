/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/late.h"

#include "qmp/commands.h"

#include <errno.h>

#define LATE_TIMEOUT_MS 5000u /* a command while our connections stand: a stuck QEMU may wait for them */

void late_start(struct session *s, const struct seq_step *steps, unsigned nsteps, const struct seq_ops *ops)
{
    struct rig_config config = {
        .loop = s->rig.loop,
        .qmp = s->rig.qmp,
        .id = s->rig.id,
        .ndisks = s->rig.ndisks,
        .timeout_ms = MIN(s->rig.timeout_ms, LATE_TIMEOUT_MS),
        .server_socket = s->rig.server_socket,
        .server_dir = s->rig.server_dir,
    };

    s->late_running = true;
    (void)rig_init(&s->late, &config, steps, nsteps, ops); /* only a timer: cannot fail */
    s->late.only_export = NAMES_LATE;
    seq_start(&s->late.seq);
}

void late_on_top(struct seq *q)
{
    seq_stop(q, false);
}

void late_on_failed(struct seq *q, const struct failure *why)
{
    (void)failure_copy(&session_of_late(q)->ask_failure, why);
    seq_stop(q, false);
}

/*
 * A QEMU that does not answer may wait, in a drain, for our own connections: they close before anything else, and what
 * the walk has made is undone with all else of the session.
 */
bool late_is_stuck(const struct session *s)
{
    return s->ask_failure.err == -ETIMEDOUT;
}

void late_add_export(struct session *s, unsigned disk)
{
    char access[NAMES_SIZE], late[NAMES_SIZE];
    struct qmp_bitmap b = {session_view(s, disk, access), names_make(late, s->rig.id, NAMES_LATE, disk)};

    calls_add(&s->late.calls, "block-export-add", qmp_args_export_add(late, b.node, late, false, &b, 1), QMP_NO_FD,
              disk, NULL);
}

void late_remove_bitmap(struct session *s, unsigned disk)
{
    char access[NAMES_SIZE], late[NAMES_SIZE];

    calls_add(&s->late.calls, "block-dirty-bitmap-remove",
              qmp_args_strings("node", session_view(s, disk, access), "name",
                               names_make(late, s->rig.id, NAMES_LATE, disk), NULL),
              QMP_NO_FD, disk, NULL);
}

void late_on_gone(struct calls *c, const struct failure *f)
{
    seq_done(&rig_of_calls(c)->seq, f && f->err != -EREMOTEIO ? f : NULL);
}

int late_no_exports(struct seq *q, struct failure *f)
{
    return late_is_stuck(session_of_late(q)) ? SEQ_DONE : rig_no_exports(q, f);
}

void session_late_next(struct session *s)
{
    if (!s->late_running && !s->stop_wanted && !s->failed && !maps_next(s))
        asks_next(s);
}
