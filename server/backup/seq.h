/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * seq: walks a table of steps up, and down again: for roll-back, for ordinary teardown, for a stop in mid-set-up and
 * (from the far end) for what a dead daemon left. It knows nothing of what the steps do.
 *
 *            +-- a step fails, or stop --------------------+
 *            |                                             v
 *   IDLE -> UP -> TOP -- stop(commit) --> COMMIT -------> DOWN -> END
 *                  +---- stop ------------------------------^
 *
 * Undo means "make it absent": it succeeds where there is nothing to remove, and it runs for the step that failed, too,
 * because a lost reply may have had its effect. An undo that fails is tried again a bounded number of times, is named,
 * and does not stop the walk.
 *
 * Embedded in its owner; loop thread only. The table is borrowed for the sequence's life.
 */
#ifndef QPULL_BACKUP_SEQ_H
#define QPULL_BACKUP_SEQ_H

#include "qmp/base.h"

#include <stdbool.h>
#include <uv.h>

struct seq;

#define SEQ_DONE 1 /* what a step function returns when there was nothing to wait for */

#define SEQ_UNDO_TRIES 5
#define SEQ_UNDO_RETRY_MS 200

/* Returns 0 and calls seq_done() exactly once, later, from the loop; SEQ_DONE; or negative, with the sentence in f. */
typedef int (*seq_step_fn)(struct seq *s, struct failure *f);

struct seq_step {
    const char *name;
    seq_step_fn up;   /* make it so; NULL: nothing to do */
    seq_step_fn down; /* make it absent; NULL: nothing to do */
    seq_step_fn
        commit; /* the pull ended well: runs before the way down, from the first row to the last; NULL: nothing to do */
};

enum seq_phase { SEQ_IDLE, SEQ_UP, SEQ_TOP, SEQ_COMMIT, SEQ_DOWN, SEQ_END };

struct seq_ops {
    void (*on_top)(struct seq *s);
    /* A step failed on the way up; the way down begins by itself. */
    void (*on_failed)(struct seq *s, const struct failure *why);
    /* The walk is over; the last touch. problems->err != 0: an undo or a commit failed for good (the first of them). */
    void (*on_end)(struct seq *s, const struct failure *problems);
    void (*on_trace)(struct seq *s, const char *text); /* may be NULL */
};

struct seq {
    const struct seq_step *steps;
    unsigned nsteps;
    const struct seq_ops *ops;
    enum seq_phase phase;
    unsigned at;  /* the step under way; at TOP: nsteps */
    bool waiting; /* a step function runs */
    bool stopping, committing;
    unsigned ntries;
    struct failure problems;
    uv_timer_t timer; /* begins a walk, tries an undo again, or is a step's deadline: never two of them at once */
    void (*on_deadline)(struct seq *s);
};

/* Does not start anything; on_end comes also for a sequence that never went up, once it is stopped. */
int seq_init(struct seq *s, uv_loop_t *loop, const struct seq_step *steps, unsigned nsteps, const struct seq_ops *ops);
void seq_start(struct seq *s);
/* Begins at the far end, as if every step had been made (for leftovers). */
void seq_start_at_top(struct seq *s);
/* At any time, and twice; the first call's commit counts, and only at the top. */
void seq_stop(struct seq *s, bool commit);
/* The step function under way has ended. f NULL: well. */
void seq_done(struct seq *s, const struct failure *f);

/* A deadline for the step function under way: cb comes once unless seq_done() comes before. */
void seq_deadline(struct seq *s, unsigned ms, void (*cb)(struct seq *s));

/* "7/12 add export" or "12/12 up". */
void seq_describe(const struct seq *s, char *buf, size_t size);

#endif
