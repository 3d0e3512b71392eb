/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The instant of a session (docs/decisions/0002-freeze.md), and how long the guest's I/O stood still for it. */
#include "backup/steps.h"
#include "qmp/commands.h"

#include <errno.h>

void session_set_drives(struct session *s, enum names_kind kind)
{
    char name[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        names_make(name, s->rig.id, kind, i);
        calls_add(&s->rig.calls, "qom-set", qmp_args_qom_set_drive(s->disks[i].disk->qom_path, name), QMP_NO_FD, i,
                  NULL);
    }
}

static int on_frozen(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct session *s = session_of_calls(c);

    s->frozen_at_ms = unix_time_ms();
    s->pause_us = (uv_hrtime() - s->cut_ns) / 1000;
    return 0;
}

/* One blockdev-reopen over all disks: the instant of the session. */
int step_freeze_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    struct json_object *args = qmp_args_reopen();
    char cut[NAMES_SIZE], cbw[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        qmp_args_reopen_raw(args, names_make(cut, s->rig.id, NAMES_CUT, i), names_make(cbw, s->rig.id, NAMES_CBW, i));
    s->cut_ns = uv_hrtime();
    calls_add(&s->rig.calls, "blockdev-reopen", args, QMP_NO_FD, 0, on_frozen);
    return rig_wait(&s->rig, f);
}

/* The devices go straight to the cbw nodes: one layer less in the guest's way. */
int step_settle_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    char cut[NAMES_SIZE];

    session_set_drives(s, NAMES_CBW);
    for (unsigned i = 0; i < s->rig.ndisks; i++)
        calls_add(&s->rig.calls, "blockdev-del",
                  qmp_args_strings("node-name", names_make(cut, s->rig.id, NAMES_CUT, i), NULL), QMP_NO_FD, i, NULL);
    session_drop_live_exports(s);
    return rig_wait(&s->rig, f);
}
