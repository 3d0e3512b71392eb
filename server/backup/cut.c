/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The instant of a session (docs/decisions/0002-freeze.md), and how long the guest stood still for it. Where QEMU
 * refuses blockdev-reopen the guest's CPUs are stopped instead, and only if it was us who stopped them they go on
 * again:
 *
 *   query-status -> mark -> [query-status, stop, query-status] -> [qom-set …, cont] -> mark away
 *
 * The mark is a node of ours. It stands in QEMU as long as the guest may be stopped by us, so that our undo
 * (rig_go_on) or, after our death, our successor's sweep knows. cont is in QEMU's queue before anything can fail.
 */
#include "backup/steps.h"
#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>

void session_set_drives(struct session *s, enum names_kind kind, calls_ret_cb on_ret)
{
    char name[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        names_make(name, s->rig.id, kind, i);
        calls_add(&s->rig.calls, "qom-set", qmp_args_qom_set_drive(s->disks[i].disk->qom_path, name), QMP_NO_FD, i,
                  on_ret);
    }
}

static unsigned max_pause_ms(const struct session *s)
{
    return s->max_pause_ms ? MIN(s->max_pause_ms, s->rig.timeout_ms) : s->rig.timeout_ms;
}

static uint64_t us_since_cut(const struct session *s)
{
    return (uv_hrtime() - s->cut.ns) / 1000;
}

static void cut_over(struct session *s, const struct failure *f)
{
    struct failure worded = {0};

    qmp_watch_remove(&s->cut.watch);
    s->rig.calls.timeout_ms = s->rig.timeout_ms;
    if (f && f->err == -ETIMEDOUT && s->cut.way == SESSION_STOPPED) {
        (void)failure_set(
            &worded, -EBUSY,
            "the guest's CPUs may stand still for the %u ms of --max-pause and no longer, then they go on "
            "and the session is given up: %s",
            max_pause_ms(s), f->text);
        f = &worded;
    }
    seq_done(&s->rig.seq, f);
}

/* Goes on with what was added to the calls; a failure to send them ends the step. */
static void cut_wait(struct session *s, calls_done_cb done)
{
    struct failure f = {0};

    if (calls_wait(&s->rig.calls, done, &f) < 0)
        cut_over(s, &f);
}

/* -- devices, one after the other ---------------------------------------------------------------------------------- */

static int on_mark_gone(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    rig_of_calls(c)->pause = PAUSE_NONE;
    return 0;
}

static void on_unmarked(struct calls *c, const struct failure *f)
{
    cut_over(session_of_calls(c), f);
}

static void remove_mark(struct session *s)
{
    char name[NAMES_SIZE];

    calls_add(&s->rig.calls, "blockdev-del",
              qmp_args_strings("node-name", names_make(name, s->rig.id, NAMES_PAUSED, 0), NULL), QMP_NO_FD, 0,
              on_mark_gone);
}

static void on_switched(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);
    struct failure mine = {0};

    if (f)
        (void)failure_copy(&mine, f);
    else if (s->cut.resumed || (s->cut.way == SESSION_WAS_STOPPED && s->cut.running))
        (void)failure_set(&mine, -ESTALE,
                          "somebody let the stopped guest go on while its disks were being frozen, and they were not "
                          "frozen at one instant; try again");
    if (mine.err || s->rig.pause == PAUSE_NONE) {
        cut_over(s, mine.err ? &mine : NULL);
        return;
    }
    s->rig.calls.timeout_ms = s->rig.timeout_ms;
    remove_mark(s);
    cut_wait(s, on_unmarked);
}

static int on_set(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct session *s = session_of_calls(c);

    if (++s->cut.nset == s->rig.ndisks)
        s->frozen_at_ms = unix_time_ms();
    return 0;
}

static int on_continued(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct session *s = session_of_calls(c);

    s->pause_us = us_since_cut(s);
    s->rig.pause = PAUSE_MARKED;
    return 0;
}

static int on_status_after(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    session_of_calls(c)->cut.running = qmp_get_bool(ret, "running");
    return 0;
}

/* The guest is stopped: to it, one device after the other is one instant. */
static void switch_devices(struct session *s)
{
    uint64_t gone_ms = us_since_cut(s) / 1000;
    unsigned max_ms = max_pause_ms(s);

    s->rig.calls.timeout_ms = s->cut.way != SESSION_STOPPED ? s->rig.timeout_ms
                              : gone_ms < max_ms            ? max_ms - (unsigned)gone_ms
                                                            : 1;
    if (s->cut.way == SESSION_WAS_STOPPED && s->rig.pause != PAUSE_NONE)
        remove_mark(s); /* before anything else: it is not us who stopped this guest */
    session_set_drives(s, NAMES_CBW, on_set);
    if (s->cut.way == SESSION_STOPPED)
        calls_add(&s->rig.calls, "cont", NULL, QMP_NO_FD, 0, on_continued);
    else
        calls_add(&s->rig.calls, "query-status", NULL, QMP_NO_FD, 0, on_status_after);
    cut_wait(s, on_switched);
}

/* -- stopping the guest -------------------------------------------------------------------------------------------- */

static void on_stopped(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);
    struct failure mine = {0};

    if (f) {
        cut_over(s, f);
    } else if (strcmp(s->cut.status, "running") == 0) {
        (void)failure_set(&mine, -ESTALE,
                          "the guest was stopped to freeze its disks, and somebody let it go on; try again");
        cut_over(s, &mine);
    } else {
        if (!s->cut.running || !s->cut.stopped || strcmp(s->cut.status, "paused") != 0) {
            s->cut.way = SESSION_WAS_STOPPED; /* somebody was faster */
            s->rig.pause = PAUSE_MARKED;
        }
        switch_devices(s);
    }
}

static int on_status(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct session *s = session_of_calls(c);

    if (index == 0)
        s->cut.running = qmp_get_bool(ret, "running");
    (void)snprintf(s->cut.status, sizeof(s->cut.status), "%s", qmp_get_string(ret, "status") ?: "");
    return 0;
}

static void on_marked(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);

    if (f) {
        cut_over(s, f);
        return;
    }
    if (s->cut.stopped) {
        s->cut.way = SESSION_WAS_STOPPED;
        switch_devices(s);
        return;
    }
    s->rig.calls.timeout_ms = max_pause_ms(s);
    s->cut.way = SESSION_STOPPED;
    s->cut.ns = uv_hrtime();
    calls_add(&s->rig.calls, "query-status", NULL, QMP_NO_FD, 0, on_status);
    calls_add(&s->rig.calls, "stop", NULL, QMP_NO_FD, 0, NULL);
    calls_add(&s->rig.calls, "query-status", NULL, QMP_NO_FD, 1, on_status);
    cut_wait(s, on_stopped);
}

static void on_status_known(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);
    char name[NAMES_SIZE];

    if (f) {
        cut_over(s, f);
        return;
    }
    if (!s->cut.running) {
        s->cut.way = SESSION_WAS_STOPPED;
        switch_devices(s);
        return;
    }
    s->rig.pause = PAUSE_OURS;
    calls_add(&s->rig.calls, "blockdev-add", qmp_args_blockdev_add_null(names_make(name, s->rig.id, NAMES_PAUSED, 0)),
              QMP_NO_FD, 0, NULL);
    cut_wait(s, on_marked);
}

static void on_event(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    struct session *s = watch->arg;

    if (strcmp(event, "STOP") == 0) {
        s->cut.stopped = true;
        if (s->cut.way != SESSION_STOPPED && s->rig.pause == PAUSE_OURS)
            s->rig.pause = PAUSE_MARKED; /* by somebody else: we have not sent ours yet */
    }
    if (strcmp(event, "RESUME") == 0 && s->cut.nset < s->rig.ndisks)
        s->cut.resumed = s->cut.stopped || s->cut.way == SESSION_WAS_STOPPED;
}

/* -- all at once --------------------------------------------------------------------------------------------------- */

int session_on_frozen(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct session *s = session_of_calls(c);

    s->cut.way = s->engine == ENGINE_JOB ? SESSION_BY_JOBS : SESSION_REOPENED;
    s->frozen_at_ms = unix_time_ms();
    s->pause_us = us_since_cut(s);
    return 0;
}

static void on_reopened(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);

    if (!f || (f->err != -EREMOTEIO && f->err != -ENOSYS)) {
        rig_step_done(c, f);
        return;
    }
    s->cut.refusal = *f;
    qmp_watch_add(s->rig.qmp, &s->cut.watch, NULL, on_event, s);
    calls_add(c, "query-status", NULL, QMP_NO_FD, 0, on_status);
    cut_wait(s, on_status_known);
}

/* One blockdev-reopen over all disks: the instant of the session. */
int step_freeze_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    struct json_object *args = qmp_args_reopen();
    char cut[NAMES_SIZE], cbw[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        qmp_args_reopen_raw(args, names_make(cut, s->rig.id, NAMES_CUT, i), names_make(cbw, s->rig.id, NAMES_CBW, i));
    s->cut.ns = uv_hrtime();
    calls_add(&s->rig.calls, "blockdev-reopen", args, QMP_NO_FD, 0, session_on_frozen);
    return calls_wait(&s->rig.calls, on_reopened, f);
}

/* The devices go straight to the cbw nodes, unless they have: one layer less in the guest's way. */
int step_settle_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    char cut[NAMES_SIZE];

    if (s->cut.way == SESSION_REOPENED)
        session_set_drives(s, NAMES_CBW, NULL);
    for (unsigned i = 0; i < s->rig.ndisks; i++)
        calls_add(&s->rig.calls, "blockdev-del",
                  qmp_args_strings("node-name", names_make(cut, s->rig.id, NAMES_CUT, i), NULL), QMP_NO_FD, i, NULL);
    return rig_wait(&s->rig, f);
}
