/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The runner of step tables: what is called, in what order, and when not. Steps here only write down that they were called. */
#include "backup/seq.h"
#include "lib/loop.h"
#include "lib/test.h"

#include <errno.h>
#include <stdio.h>
#include <time.h>

#define MAX_STEPS 6
#define LOG_SIZE 4096
#define FOR_EVER 1000000 /* fails as often as it is called */

enum column { UP, DOWN, COMMIT, NCOLUMNS };

/* What a step function does. The log has "u2" for "up of step 2", and so on. */
struct plan {
    bool missing; /* NULL in the table */
    bool later;   /* answers from the loop; else at once */
    int err;      /* 0: well */
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

static struct world *world_of(struct seq *s)
{
    return container_of(s, struct world, seq);
}

static void stop(struct world *w, bool commit)
{
    w->inside = true;
    seq_stop(&w->seq, commit);
    w->inside = false;
}

static void happens(struct world *w, const char *fmt, ...) _printf_(2, 3);
static void happens(struct world *w, const char *fmt, ...)
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
            stop(w, w->commit[i]);
    }
}

/* -- steps --------------------------------------------------------------------------------------------------------- */

static void on_answer(uv_timer_t *t)
{
    struct world *w = container_of(t, struct world, answer);
    struct failure f = {0};

    if (w->answer_err)
        (void)failure_set(&f, w->answer_err, "later");
    seq_done(&w->seq, w->answer_err ? &f : NULL);
}

static int run_step(struct seq *s, enum column column, struct failure *f)
{
    struct world *w = world_of(s);
    struct plan *p = &w->plans[column][s->at];
    int err = p->nfailures ? p->err : 0;

    assert_int_equal(f->err, 0);
    assert_false(uv_is_active((uv_handle_t *)&w->answer)); /* never two at a time */
    if (column == DOWN && w->down_failed_ns && !w->retried_ns)
        w->retried_ns = uv_hrtime();
    happens(w, "%c%u ", "udc"[column], s->at);
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

static int up(struct seq *s, struct failure *f)
{
    return run_step(s, UP, f);
}

static int down(struct seq *s, struct failure *f)
{
    return run_step(s, DOWN, f);
}

static int commit(struct seq *s, struct failure *f)
{
    return run_step(s, COMMIT, f);
}

static void on_top(struct seq *s)
{
    assert_int_equal(s->phase, SEQ_TOP);
    happens(world_of(s), "T ");
}

static void on_failed(struct seq *s, const struct failure *why)
{
    struct world *w = world_of(s);

    assert_true(why->err < 0);
    assert_true(*why->text);
    w->why = *why;
    w->nfailed++;
    happens(w, "F ");
}

static void on_end(struct seq *s, const struct failure *problems)
{
    struct world *w = world_of(s);

    assert_int_equal(s->phase, SEQ_END);
    happens(w, "E");
    w->problems = *problems;
    w->ended = true;
}

static void on_trace(struct seq *s, const char *text)
{
    assert_true(*text); /* comes from inside calls, too: it is for the log only */
}

static const struct seq_ops ops = {.on_top = on_top, .on_failed = on_failed, .on_end = on_end, .on_trace = on_trace};

/* -- the world ----------------------------------------------------------------------------------------------------- */

static void world_init(struct world *w, unsigned nsteps)
{
    static const char *const names[MAX_STEPS] = {"zero", "one", "two", "three", "four", "five"};

    memset(w, 0, sizeof(*w));
    loop_init(&w->loop);
    assert_int_equal(uv_timer_init(&w->loop, &w->answer), 0);
    w->nsteps = nsteps;
    for (unsigned i = 0; i < nsteps; i++)
        w->steps[i] = (struct seq_step){.name = names[i], .up = up, .down = down, .commit = commit};
}

/* After the plans are made. */
static void world_begin(struct world *w)
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

static void start(struct world *w)
{
    w->inside = true;
    seq_start(&w->seq);
    w->inside = false;
}

static void world_done(struct world *w)
{
    uv_close((uv_handle_t *)&w->answer, NULL);
    loop_done(&w->loop);
}

static bool is_at_rest(struct world *w)
{
    return w->ended || (w->seq.phase == SEQ_TOP && !w->seq.stopping);
}

/* Runs until it stands at the top or has ended, and looks at what happened. */
static void expect(struct world *w, const char *log)
{
    loop_until(&w->loop, is_at_rest(w));
    loop_turn(&w->loop, 3); /* nothing more follows */
    assert_string_equal(w->log, log);
}

static void plan(struct world *w, enum column column, unsigned step, bool later, int err, unsigned nfailures)
{
    w->plans[column][step] = (struct plan){.later = later, .err = err, .nfailures = nfailures};
}

static void all_later(struct world *w)
{
    for (unsigned c = 0; c < NCOLUMNS; c++) {
        for (unsigned i = 0; i < w->nsteps; i++)
            w->plans[c][i].later = true;
    }
}

/* -- up and down --------------------------------------------------------------------------------------------------- */

static void walks_up_to_the_top_and_rests_there(void **state)
{
    for (unsigned later = 0; later < 2; later++) {
        struct world w;

        world_init(&w, 3);
        if (later)
            all_later(&w);
        world_begin(&w);
        start(&w);
        assert_string_equal(w.log, "");
        expect(&w, "u0 u1 u2 T ");
        stop(&w, false);
        expect(&w, "u0 u1 u2 T d2 d1 d0 E");
        assert_int_equal(w.problems.err, 0);
        world_done(&w);
    }
}

static void commits_from_the_first_row_to_the_last_before_the_way_down(void **state)
{
    for (unsigned later = 0; later < 2; later++) {
        struct world w;

        world_init(&w, 3);
        if (later)
            all_later(&w);
        world_begin(&w);
        start(&w);
        expect(&w, "u0 u1 u2 T ");
        stop(&w, true);
        expect(&w, "u0 u1 u2 T c0 c1 c2 d2 d1 d0 E");
        assert_int_equal(w.problems.err, 0);
        world_done(&w);
    }
}

static void a_commit_that_fails_is_told_and_ends_the_committing(void **state)
{
    for (unsigned later = 0; later < 2; later++) {
        struct world w;

        world_init(&w, 3);
        plan(&w, COMMIT, 1, later, -EIO, 1);
        world_begin(&w);
        start(&w);
        expect(&w, "u0 u1 u2 T ");
        stop(&w, true);
        expect(&w, "u0 u1 u2 T c0 c1 d2 d1 d0 E");
        assert_int_equal(w.problems.err, -EIO);
        assert_int_equal(w.nfailed, 0);
        world_done(&w);
    }
}

static void functions_that_are_missing_are_passed_over(void **state)
{
    struct world w;

    world_init(&w, 3);
    w.plans[UP][0].missing = w.plans[UP][2].missing = true;
    w.plans[DOWN][1].missing = true;
    w.plans[COMMIT][0].missing = w.plans[COMMIT][1].missing = true;
    world_begin(&w);
    start(&w);
    expect(&w, "u1 T ");
    stop(&w, true);
    expect(&w, "u1 T c2 d2 d0 E");
    world_done(&w);
}

static void a_table_of_nothing_goes_up_and_down(void **state)
{
    struct world w;

    world_init(&w, 1);
    w.plans[UP][0].missing = w.plans[DOWN][0].missing = w.plans[COMMIT][0].missing = true;
    world_begin(&w);
    start(&w);
    expect(&w, "T ");
    stop(&w, true);
    expect(&w, "T E");
    world_done(&w);
}

static void a_step_that_fails_is_undone_itself(void **state)
{
    static const char *const logs[] = {"u0 F d0 E", "u0 u1 F d1 d0 E", "u0 u1 u2 F d2 d1 d0 E"};

    for (unsigned later = 0; later < 2; later++) {
        for (unsigned i = 0; i < ARRAY_SIZE(logs); i++) {
            struct world w;

            world_init(&w, 3);
            plan(&w, UP, i, later, -ENOSPC, FOR_EVER);
            world_begin(&w);
            start(&w);
            expect(&w, logs[i]); /* by itself: nobody stops it */
            assert_int_equal(w.why.err, -ENOSPC);
            assert_int_equal(w.problems.err, 0);
            world_done(&w);
        }
    }
}

static void leftovers_are_undone_from_the_far_end(void **state)
{
    struct world w;

    world_init(&w, 3);
    world_begin(&w);
    w.inside = true;
    seq_start_at_top(&w.seq);
    w.inside = false;
    loop_turn(&w.loop, 3);
    assert_string_equal(w.log, ""); /* not even on_top: nothing has gone up */
    stop(&w, false);
    expect(&w, "d2 d1 d0 E");
    world_done(&w);
}

/* -- stop ---------------------------------------------------------------------------------------------------------- */

static void a_stop_before_the_start_ends_at_once(void **state)
{
    struct world w;

    world_init(&w, 2);
    world_begin(&w);
    stop(&w, true);
    assert_string_equal(w.log, "");
    stop(&w, false);
    expect(&w, "E");
    world_done(&w);
}

static void a_stop_right_after_the_start_begins_nothing(void **state)
{
    struct world w;

    world_init(&w, 2);
    world_begin(&w);
    start(&w);
    stop(&w, true);
    expect(&w, "d0 E"); /* an undo more than needed is harmless, one step up is not */
    world_done(&w);
}

static void a_stop_on_the_way_up_waits_for_the_step_under_way(void **state)
{
    static const char *const logs[] = {"u0 d0 E", "u0 u1 d1 d0 E", "u0 u1 u2 d2 d1 d0 E"};

    for (unsigned twice = 0; twice < 2; twice++) {
        for (unsigned later = 0; later < 2; later++) {
            for (unsigned i = 0; i < ARRAY_SIZE(logs); i++) {
                struct world w;

                world_init(&w, 3);
                if (later)
                    all_later(&w);
                w.stop_at[0] = i + 1;
                w.stop_at[1] = twice ? i + 2 : 0;
                w.commit[0] = w.commit[1] = true; /* counts at the top only */
                world_begin(&w);
                start(&w);
                expect(&w, logs[i]);
                assert_int_equal(w.problems.err, 0);
                world_done(&w);
            }
        }
    }
}

static void a_step_that_fails_under_a_stop_is_undone_all_the_same(void **state)
{
    struct world w;

    world_init(&w, 3);
    plan(&w, UP, 1, true, -EIO, 1);
    w.stop_at[0] = 2;
    world_begin(&w);
    start(&w);
    expect(&w, "u0 u1 F d1 d0 E");
    world_done(&w);
}

static void a_stop_from_within_on_top_or_on_failed_is_heard(void **state)
{
    struct world w;

    world_init(&w, 2);
    w.stop_at[0] = 3; /* on_top */
    w.commit[0] = true;
    world_begin(&w);
    start(&w);
    expect(&w, "u0 u1 T c0 c1 d1 d0 E");
    world_done(&w);

    world_init(&w, 2);
    plan(&w, UP, 1, false, -EIO, 1);
    w.stop_at[0] = 3; /* on_failed */
    world_begin(&w);
    start(&w);
    expect(&w, "u0 u1 F d1 d0 E");
    world_done(&w);
}

static void the_first_of_two_stops_says_whether_to_commit(void **state)
{
    for (unsigned first = 0; first < 2; first++) {
        struct world w;

        world_init(&w, 2);
        world_begin(&w);
        start(&w);
        expect(&w, "u0 u1 T ");
        stop(&w, first);
        stop(&w, !first);
        expect(&w, first ? "u0 u1 T c0 c1 d1 d0 E" : "u0 u1 T d1 d0 E");
        world_done(&w);
    }
}

static void a_second_stop_at_any_later_time_changes_nothing(void **state)
{
    for (unsigned second = 4; second < 9; second++) { /* in each commit and each undo */
        struct world w;

        world_init(&w, 2);
        all_later(&w);
        w.stop_at[0] = 3;
        w.commit[0] = true;
        w.stop_at[1] = second;
        world_begin(&w);
        start(&w);
        expect(&w, "u0 u1 T c0 c1 d1 d0 E");
        world_done(&w);
    }
}

/* -- undo that fails ----------------------------------------------------------------------------------------------- */

static void an_undo_that_fails_is_tried_again_after_a_while(void **state)
{
    struct world w;

    world_init(&w, 2);
    plan(&w, DOWN, 1, true, -EBUSY, 2);
    world_begin(&w);
    start(&w);
    expect(&w, "u0 u1 T ");
    stop(&w, false);
    expect(&w, "u0 u1 T d1 d1 d1 d0 E");
    assert_int_equal(w.problems.err, 0); /* it went well in the end */
    assert_true(w.retried_ns - w.down_failed_ns >= (SEQ_UNDO_RETRY_MS - 1) * UINT64_C(1000000));
    world_done(&w);
}

static void an_undo_that_fails_for_good_is_named_and_the_walk_goes_on(void **state)
{
    struct world w;

    world_init(&w, 3);
    plan(&w, DOWN, 2, false, -EBUSY, FOR_EVER);
    plan(&w, DOWN, 0, false, -ENOTCONN, FOR_EVER);
    world_begin(&w);
    start(&w);
    expect(&w, "u0 u1 u2 T ");
    stop(&w, false);
    assert_int_equal(SEQ_UNDO_TRIES, 5);
    expect(&w, "u0 u1 u2 T d2 d2 d2 d2 d2 d1 d0 E");
    assert_int_equal(w.problems.err, -EBUSY); /* the first of them */
    assert_non_null(strstr(w.problems.text, "\"two\""));
    world_done(&w);
}

static void the_count_of_tries_begins_anew_for_each_step(void **state)
{
    struct world w;

    world_init(&w, 2);
    plan(&w, DOWN, 1, false, -EBUSY, SEQ_UNDO_TRIES - 1);
    plan(&w, DOWN, 0, false, -EBUSY, SEQ_UNDO_TRIES - 1);
    world_begin(&w);
    start(&w);
    expect(&w, "u0 u1 T ");
    stop(&w, false);
    expect(&w, "u0 u1 T d1 d1 d1 d1 d1 d0 d0 d0 d0 d0 E");
    assert_int_equal(w.problems.err, 0);
    world_done(&w);
}

static void without_a_connection_nothing_is_tried_again(void **state)
{
    for (unsigned later = 0; later < 2; later++) {
        struct world w;

        world_init(&w, 3);
        for (unsigned i = 0; i < 3; i++)
            plan(&w, DOWN, i, later, -ENOTCONN, FOR_EVER);
        world_begin(&w);
        start(&w);
        expect(&w, "u0 u1 u2 T ");
        stop(&w, false);
        expect(&w, "u0 u1 u2 T d2 d1 d0 E");
        assert_int_equal(w.problems.err, -ENOTCONN);
        assert_non_null(strstr(w.problems.text, "\"two\""));
        world_done(&w);
    }
}

static void a_commit_and_an_undo_that_fail_leave_the_first_word_to_the_commit(void **state)
{
    struct world w;

    world_init(&w, 2);
    plan(&w, COMMIT, 0, true, -EIO, 1);
    plan(&w, DOWN, 0, true, -ENOTCONN, 1);
    world_begin(&w);
    start(&w);
    expect(&w, "u0 u1 T ");
    stop(&w, true);
    expect(&w, "u0 u1 T c0 d1 d0 E");
    assert_int_equal(w.problems.err, -EIO);
    world_done(&w);
}

/* -- deadlines ----------------------------------------------------------------------------------------------------- */

static unsigned ndeadlines;

static void on_deadline(struct seq *s)
{
    struct failure f = {0};

    ndeadlines++;
    (void)failure_set(&f, -ETIMEDOUT, "too late");
    seq_done(s, &f);
}

static int waits_in_vain(struct seq *s, struct failure *f)
{
    happens(world_of(s), "w ");
    seq_deadline(s, 5, on_deadline);
    return 0;
}

static int answers_in_time(struct seq *s, struct failure *f)
{
    struct world *w = world_of(s);

    happens(w, "a ");
    w->answer_err = 0;
    seq_deadline(s, 20, on_deadline);
    (void)uv_timer_start(&w->answer, on_answer, 1, 0);
    return 0;
}

static void a_step_may_have_a_deadline(void **state)
{
    struct world w;

    ndeadlines = 0;
    world_init(&w, 2);
    w.steps[1].up = waits_in_vain;
    world_begin(&w);
    start(&w);
    expect(&w, "u0 w F d1 d0 E");
    assert_int_equal(w.why.err, -ETIMEDOUT);
    assert_int_equal(ndeadlines, 1);
    world_done(&w);
}

static void an_answer_in_time_calls_the_deadline_off(void **state)
{
    uint64_t end;
    struct world w;

    ndeadlines = 0;
    world_init(&w, 2);
    w.steps[0].up = answers_in_time;
    world_begin(&w);
    start(&w);
    expect(&w, "a u1 T ");
    for (end = uv_hrtime() + 40 * UINT64_C(1000000); uv_hrtime() < end;)
        loop_turn(&w.loop, 1);
    assert_int_equal(ndeadlines, 0);
    stop(&w, false);
    expect(&w, "a u1 T d1 d0 E");
    world_done(&w);
}

/* -- describe ------------------------------------------------------------------------------------------------------ */

static char described[2][64];

static int describes_itself(struct seq *s, struct failure *f)
{
    seq_describe(s, described[s->phase == SEQ_DOWN], sizeof(described[0]));
    return SEQ_DONE;
}

static void it_says_where_it_is(void **state)
{
    char text[64], tiny[4];
    struct world w;

    world_init(&w, 3);
    w.steps[1].up = w.steps[1].down = describes_itself;
    world_begin(&w);
    start(&w);
    expect(&w, "u0 u2 T ");
    assert_string_equal(described[0], "2/3 one");
    seq_describe(&w.seq, text, sizeof(text));
    assert_string_equal(text, "3/3 up");
    seq_describe(&w.seq, tiny, sizeof(tiny));
    assert_string_equal(tiny, "3/3");
    stop(&w, false);
    expect(&w, "u0 u2 T d2 d0 E");
    assert_string_equal(described[1], "2/3 one");
    seq_describe(&w.seq, text, sizeof(text));
    assert_non_null(strstr(text, "ended"));
    world_done(&w);
}

/* -- everything at random, against a model ------------------------------------------------------------------------- */

#define NROUNDS 3000

static uint64_t seed;

/* splitmix64 (Steele, Lea, Flood 2014) */
static unsigned random_below(unsigned n)
{
    uint64_t z = (seed += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (unsigned)((z ^ (z >> 31)) % n);
}

/* What the header promises, in the plainest words: no phases, no callbacks. */
struct model {
    const struct world *w;
    char log[LOG_SIZE];
    unsigned nevents;
    bool stopped, committing; /* the first stop's word */
    bool problem;
};

static void model_event(struct model *m, const char *fmt, ...) _printf_(2, 3);
static void model_event(struct model *m, const char *fmt, ...)
{
    size_t used = strlen(m->log);
    va_list ap;

    va_start(ap, fmt);
    (void)vsnprintf(m->log + used, sizeof(m->log) - used, fmt, ap);
    va_end(ap);
    m->nevents++;
    for (size_t i = 0; i < ARRAY_SIZE(m->w->stop_at); i++) {
        if (m->nevents != m->w->stop_at[i] || m->stopped)
            continue;
        m->stopped = true;
        m->committing = m->w->commit[i];
    }
}

static bool model_call(struct model *m, enum column column, unsigned i)
{
    const struct plan *p = &m->w->plans[column][i];

    if (p->missing)
        return true;
    model_event(m, "%c%u ", "udc"[column], i);
    return !(p->err && p->nfailures);
}

static void model_run(struct model *m)
{
    unsigned at = 0;

    for (; at < m->w->nsteps; at++) {
        bool well = model_call(m, UP, at);

        if (!well)
            model_event(m, "F ");
        if (!well || m->stopped)
            break;
    }
    if (at == m->w->nsteps) {
        model_event(m, "T ");
        if (!m->stopped) /* the test stops it there */
            m->committing = m->w->commit[0];
        for (unsigned i = 0; m->committing && i < m->w->nsteps; i++) {
            if (!model_call(m, COMMIT, i)) {
                m->problem = true;
                break;
            }
        }
        at--;
    }
    for (unsigned i = at + 1; i-- > 0;)
        m->problem |= !model_call(m, DOWN, i);
    model_event(m, "E");
}

static void plan_at_random(struct world *w)
{
    unsigned nfailures = random_below(3);

    for (unsigned c = 0; c < NCOLUMNS; c++) {
        for (unsigned i = 0; i < w->nsteps; i++)
            w->plans[c][i] = (struct plan){.missing = random_below(6) == 0, .later = random_below(2)};
    }
    while (nfailures-- > 0) {
        enum column c = (enum column)random_below(NCOLUMNS);

        /* Tries again take real time: undo fails here only in the way that is final. */
        w->plans[c][random_below(w->nsteps)].err = c == DOWN ? -ENOTCONN : -EIO;
    }
    for (unsigned c = 0; c < NCOLUMNS; c++) {
        for (unsigned i = 0; i < w->nsteps; i++)
            w->plans[c][i].nfailures = w->plans[c][i].err ? FOR_EVER : 0;
    }
    for (size_t i = 0; i < ARRAY_SIZE(w->stop_at); i++) {
        w->stop_at[i] = random_below(3) ? 1 + random_below(3 * w->nsteps + 2) : 0;
        w->commit[i] = random_below(2);
    }
}

static void everything_that_happens_is_what_the_model_says(void **state)
{
    const char *wish = getenv("QPULL_TEST_SEED");

    seed = wish ? strtoull(wish, NULL, 10) : (uint64_t)time(NULL);
    print_message("seed: QPULL_TEST_SEED=%llu\n", (unsigned long long)seed);
    for (unsigned round = 0; round < NROUNDS; round++) {
        struct model m = {0};
        struct world w;

        world_init(&w, 1 + random_below(MAX_STEPS));
        plan_at_random(&w);
        m.w = &w;
        model_run(&m);
        world_begin(&w);
        start(&w);
        loop_until(&w.loop, is_at_rest(&w));
        if (!w.ended)
            stop(&w, w.commit[0]);
        loop_until(&w.loop, w.ended);
        if (strcmp(w.log, m.log) != 0 || !w.problems.err != !m.problem)
            fail_msg("round %u: %s(problems: %d), the model: %s(%d)", round, w.log, w.problems.err, m.log, m.problem);
        world_done(&w);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(walks_up_to_the_top_and_rests_there),
        cmocka_unit_test(commits_from_the_first_row_to_the_last_before_the_way_down),
        cmocka_unit_test(a_commit_that_fails_is_told_and_ends_the_committing),
        cmocka_unit_test(functions_that_are_missing_are_passed_over),
        cmocka_unit_test(a_table_of_nothing_goes_up_and_down),
        cmocka_unit_test(a_step_that_fails_is_undone_itself),
        cmocka_unit_test(leftovers_are_undone_from_the_far_end),
        cmocka_unit_test(a_stop_before_the_start_ends_at_once),
        cmocka_unit_test(a_stop_right_after_the_start_begins_nothing),
        cmocka_unit_test(a_stop_on_the_way_up_waits_for_the_step_under_way),
        cmocka_unit_test(a_step_that_fails_under_a_stop_is_undone_all_the_same),
        cmocka_unit_test(a_stop_from_within_on_top_or_on_failed_is_heard),
        cmocka_unit_test(the_first_of_two_stops_says_whether_to_commit),
        cmocka_unit_test(a_second_stop_at_any_later_time_changes_nothing),
        cmocka_unit_test(an_undo_that_fails_is_tried_again_after_a_while),
        cmocka_unit_test(an_undo_that_fails_for_good_is_named_and_the_walk_goes_on),
        cmocka_unit_test(the_count_of_tries_begins_anew_for_each_step),
        cmocka_unit_test(without_a_connection_nothing_is_tried_again),
        cmocka_unit_test(a_commit_and_an_undo_that_fail_leave_the_first_word_to_the_commit),
        cmocka_unit_test(a_step_may_have_a_deadline),
        cmocka_unit_test(an_answer_in_time_calls_the_deadline_off),
        cmocka_unit_test(it_says_where_it_is),
        cmocka_unit_test(everything_that_happens_is_what_the_model_says),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
