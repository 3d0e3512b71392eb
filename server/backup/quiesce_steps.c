/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A session's steps around its cut for a guest whose file systems are to be clean on the frozen disks. Any engine's
 * table takes them: "ask guest agent" before anything is built; "mark guest" and "quiesce guest" right before the cut,
 * "thaw guest" and "unmark guest" right after it. Each does nothing where nothing is to be quiesced.
 */
#include "backup/quiesce.h"
#include "backup/steps.h"
#include "qmp/commands.h"

#include <errno.h>

static bool is_wanted(const struct session *s)
{
    return s->quiesce && quiesce_mode(s->quiesce) != QUIESCE_OFF && !s->not_quiesced.err;
}

/* It will not be: the session goes on without, or is refused. What the step says then. The agent is let go at once. */
static const struct failure *give_up(struct session *s, const struct failure *why)
{
    bool required = quiesce_mode(s->quiesce) == QUIESCE_REQUIRE;

    if (quiesce_is_thawed(s->quiesce))
        quiesce_release(s->quiesce);
    if (required)
        (void)failure_set(&s->not_quiesced, why->err, "the guest cannot be quiesced, which --quiesce=require wants: %s",
                          why->text);
    else
        (void)failure_copy(&s->not_quiesced, why);
    return required ? &s->not_quiesced : NULL;
}

static void given_up(struct session *s, const struct failure *why)
{
    seq_done(&s->rig.seq, give_up(s, why));
}

static int refused(struct session *s, const struct failure *why, struct failure *f)
{
    const struct failure *said = give_up(s, why);

    return said ? failure_copy(f, said) : SEQ_DONE;
}

/* -- the agent ----------------------------------------------------------------------------------------------------- */

static void on_prepared(void *arg, const struct failure *f)
{
    struct session *s = arg;

    if (f)
        given_up(s, f);
    else
        seq_done(&s->rig.seq, NULL);
}

int step_agent_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    struct failure why = {0};

    if (!is_wanted(s))
        return SEQ_DONE;
    return quiesce_prepare(s->quiesce, on_prepared, s, &why) < 0 ? refused(s, &why, f) : 0;
}

int step_agent_down(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    if (s->quiesce)
        quiesce_release(s->quiesce);
    return SEQ_DONE;
}

/* -- the mark ------------------------------------------------------------------------------------------------------ */

static void on_marked(struct calls *c, const struct failure *f)
{
    on_prepared(session_of_calls(c), f);
}

/* For a successor, should we and the watchdog die: it lives and dies with the QEMU whose guest it is about. */
int step_mark_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    struct failure why = {0};
    char mark[NAMES_SIZE];
    int r;

    if (!is_wanted(s))
        return SEQ_DONE;
    s->marked = true;
    calls_add(&s->rig.calls, "blockdev-add", qmp_args_blockdev_add_null(names_make(mark, s->rig.id, NAMES_QUIESCE, 0)),
              QMP_NO_FD, 0, NULL);
    r = calls_wait(&s->rig.calls, on_marked, &why);
    return r < 0 ? refused(s, &why, f) : r;
}

int step_mark_down(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    if (!s->marked)
        return SEQ_DONE;
    if (!quiesce_is_thawed(s->quiesce))
        return failure_set(
            f, -ENOTCONN, "file systems of the guest may still be frozen: thawing goes on, and its mark stays in QEMU");
    return rig_no_marks(q, f);
}

/* It stays until all is thawed; then the sweep removes it. */
int step_unmark_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    int r;

    if (!s->marked || !quiesce_is_thawed(s->quiesce))
        return SEQ_DONE;
    r = rig_no_marks(q, f);
    s->marked = r < 0;
    return r;
}

/* -- freeze and thaw ----------------------------------------------------------------------------------------------- */

static void on_late_thaw(void *arg, const struct failure *f)
{
    struct session *s = arg;

    seq_done(&s->rig.seq, quiesce_mode(s->quiesce) == QUIESCE_REQUIRE ? &s->not_quiesced : NULL);
}

/* The guest is not left waiting for the way down. */
static int thaw_again(struct session *s, const struct failure *why, struct failure *f)
{
    const struct failure *said = give_up(s, why);

    if (quiesce_thaw(s->quiesce, /* after_cut= */ false, on_late_thaw, s) == 0)
        return 0;
    return said ? failure_copy(f, said) : SEQ_DONE;
}

static void on_frozen(void *arg, const struct failure *why)
{
    struct session *s = arg;
    struct failure f = {0};

    if (!why)
        seq_done(&s->rig.seq, NULL);
    else if (thaw_again(s, why, &f) != 0)
        seq_done(&s->rig.seq, &f);
}

int step_quiesce_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    struct failure why = {0};

    if (!is_wanted(s))
        return SEQ_DONE;
    return quiesce_freeze(s->quiesce, on_frozen, s, &why) < 0 ? thaw_again(s, &why, f) : 0;
}

static void on_undone(void *arg, const struct failure *f)
{
    struct session *s = arg;

    seq_done(&s->rig.seq, f);
}

int step_quiesce_down(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    int r = s->quiesce ? quiesce_thaw(s->quiesce, /* after_cut= */ false, on_undone, s) : SEQ_DONE;

    /* What is handed over was told of when it was, and the mark tells of it again. */
    return r < 0 ? SEQ_DONE : r;
}

static const struct failure *judge(struct session *s)
{
    const struct failure *why = quiesce_why_not(s->quiesce);

    s->quiesced_ms = quiesce_ms(s->quiesce);
    s->quiesced = !why;
    return why ? give_up(s, why) : NULL;
}

static void on_thawed(void *arg, const struct failure *f)
{
    struct session *s = arg;

    seq_done(&s->rig.seq, judge(s));
}

/* Where nobody answers the thaw, the watchdog goes on with it, and so does the session, unless it must be quiesced. */
int step_thaw_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    const struct failure *said;

    if (!is_wanted(s))
        return SEQ_DONE;
    if (quiesce_thaw(s->quiesce, /* after_cut= */ true, on_thawed, s) == 0)
        return 0;
    said = judge(s);
    return said ? failure_copy(f, said) : SEQ_DONE;
}
