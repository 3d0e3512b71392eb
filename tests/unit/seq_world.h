/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * seq_world: a sequence whose steps do what a plan says and only write down that they were called, for the tests of
 * backup/seq. Loop thread only; one for each run.
 */
#ifndef QPULL_TEST_SEQ_WORLD_H
#define QPULL_TEST_SEQ_WORLD_H

#include "backup/seq.h"
#include "lib/loop.h"
#include "lib/test.h"

#include <errno.h>
#include <stdio.h>

#define MAX_STEPS 6
#define LOG_SIZE 4096
#define FOR_EVER 1000000 /* fails as often as it is called */

enum column { UP, DOWN, COMMIT, NCOLUMNS };

/* What a step function does. The log has "u2" for "up of step 2", and so on. */
struct plan {
    bool missing;       /* NULL in the table */
    bool later;         /* answers from the loop; else at once */
    int err;            /* 0: well */
    unsigned nfailures; /* after so many calls it goes well */
};

struct world {
    uv_loop_t loop;
    struct seq seq;
    struct seq_step steps[MAX_STEPS];
    struct plan plans[NCOLUMNS][MAX_STEPS];
    unsigned nsteps;
    char log[LOG_SIZE];
    uv_timer_t answer; /* ends the step function under way */
    uv_timer_t tick;   /* a turn of the loop that has run its timers would wait for the next one */
    int answer_err;
    bool inside; /* a call of the test's into seq is in progress: no callback may come */
    bool ended;
    unsigned nfailed;
    struct failure why, problems;
    /* stop at the n-th thing that happens, counted from 1; 0: not */
    unsigned nevents, stop_at[2];
    bool commit[2];
    uint64_t down_failed_ns, retried_ns; /* of the undo that is tried again */
};

static inline struct world *world_of(struct seq *s)
{
    return container_of(s, struct world, seq);
}

static inline void halt(struct world *w, bool commit)
{
    w->inside = true;
    seq_stop(&w->seq, commit);
    w->inside = false;
}

static inline void happens(struct world *w, const char *fmt, ...) _printf_(2, 3);
static inline void happens(struct world *w, const char *fmt, ...)
{
    size_t used = strlen(w->log);
    va_list ap;

    assert_false(w->inside);
    assert_false(w->ended);
    va_start(ap, fmt);
    (void)vsnprintf(w->log + used, sizeof(w->log) - used, fmt, ap);
    va_end(ap);
    assert_true(strlen(w->log) < sizeof(w->log) - 16);
    w->nevents++;
    for (size_t i = 0; i < ARRAY_SIZE(w->stop_at); i++) {
        if (w->nevents == w->stop_at[i])
            halt(w, w->commit[i]);
    }
}

/* -- steps --------------------------------------------------------------------------------------------------------- */

static inline void on_answer(uv_timer_t *t)
{
    struct world *w = container_of(t, struct world, answer);
    struct failure f = {0};

    if (w->answer_err)
        (void)failure_set(&f, w->answer_err, "later");
    seq_done(&w->seq, w->answer_err ? &f : NULL);
}

static inline int run_step(struct seq *s, enum column column, struct failure *f)
{
    struct world *w = world_of(s);
    struct plan *p = &w->plans[column][s->at];
    int err = p->nfailures ? p->err : 0;

    assert_int_equal(f->err, 0);
    assert_false(uv_is_active((uv_handle_t *)&w->answer)); /* never two at a time */
    if (column == DOWN && w->down_failed_ns && !w->retried_ns)
        w->retried_ns = uv_hrtime();
    happens(w, "%c%u ", "udc"[column], s -> at);
    p->nfailures -= p->nfailures > 0;
    if (column == DOWN && err && !w->down_failed_ns)
        w->down_failed_ns = uv_hrtime();
    if (p->later) {
        w->answer_err = err;
        (void)uv_timer_start(&w->answer, on_answer, 0, 0);
        return 0;
    }
    if (err)
        return p->nfailures % 2 ? err : failure_set(f, err, "at once"); /* with a sentence, or without */
    return SEQ_DONE;
}

static inline int up(struct seq *s, struct failure *f)
{
    return run_step(s, UP, f);
}

static inline int down(struct seq *s, struct failure *f)
{
    return run_step(s, DOWN, f);
}

static inline int commit(struct seq *s, struct failure *f)
{
    return run_step(s, COMMIT, f);
}

static inline void on_top(struct seq *s)
{
    assert_int_equal(s->phase, SEQ_TOP);
    happens(world_of(s), "T ");
}

static inline void on_failed(struct seq *s, const struct failure *why)
{
    struct world *w = world_of(s);

    assert_true(why->err < 0);
    assert_true(*why->text);
    w->why = *why;
    w->nfailed++;
    happens(w, "F ");
}

static inline void on_end(struct seq *s, const struct failure *problems)
{
    struct world *w = world_of(s);

    assert_int_equal(s->phase, SEQ_END);
    happens(w, "E");
    w->problems = *problems;
    w->ended = true;
}

static inline void on_trace(struct seq *s, const char *text)
{
    assert_true(*text); /* comes from inside calls, too: it is for the log only */
}

static const struct seq_ops ops = {.on_top = on_top, .on_failed = on_failed, .on_end = on_end, .on_trace = on_trace};

static inline void on_tick(uv_timer_t *t)
{
    (void)t;
}

/* -- the world ----------------------------------------------------------------------------------------------------- */

static inline void world_init(struct world *w, unsigned nsteps)
{
    static const char *const names[MAX_STEPS] = {"zero", "one", "two", "three", "four", "five"};

    memset(w, 0, sizeof(*w));
    loop_init(&w->loop);
    assert_int_equal(uv_timer_init(&w->loop, &w->answer), 0);
    assert_int_equal(uv_timer_init(&w->loop, &w->tick), 0);
    assert_int_equal(uv_timer_start(&w->tick, on_tick, 1, 1), 0);
    w->nsteps = nsteps;
    for (unsigned i = 0; i < nsteps; i++)
        w->steps[i] = (struct seq_step){.name = names[i], .up = up, .down = down, .commit = commit};
}

/* After the plans are made. */
static inline void world_begin(struct world *w)
{
    for (unsigned i = 0; i < w->nsteps; i++) {
        if (w->plans[UP][i].missing)
            w->steps[i].up = NULL;
        if (w->plans[DOWN][i].missing)
            w->steps[i].down = NULL;
        if (w->plans[COMMIT][i].missing)
            w->steps[i].commit = NULL;
    }
    w->inside = true;
    assert_int_equal(seq_init(&w->seq, &w->loop, w->steps, w->nsteps, &ops), 0);
    w->inside = false;
    assert_int_equal(w->seq.phase, SEQ_IDLE);
}

static inline void start(struct world *w)
{
    w->inside = true;
    seq_start(&w->seq);
    w->inside = false;
}

static inline void world_done(struct world *w)
{
    uv_close((uv_handle_t *)&w->answer, NULL);
    uv_close((uv_handle_t *)&w->tick, NULL);
    loop_done(&w->loop);
}

static inline bool is_at_rest(struct world *w)
{
    return w->ended || (w->seq.phase == SEQ_TOP && !w->seq.stopping);
}

#endif
