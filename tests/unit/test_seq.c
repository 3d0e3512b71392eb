/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The runner of step tables: what is called, in what order, and when not. Steps here only write down that they were
 * called. */
#include "seq_world.h"

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
        halt(&w, false);
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
        halt(&w, true);
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
        halt(&w, true);
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
    halt(&w, true);
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
    halt(&w, true);
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
    halt(&w, false);
    expect(&w, "d2 d1 d0 E");
    world_done(&w);
}

/* -- stop ---------------------------------------------------------------------------------------------------------- */

static void a_stop_before_the_start_ends_at_once(void **state)
{
    struct world w;

    world_init(&w, 2);
    world_begin(&w);
    halt(&w, true);
    assert_string_equal(w.log, "");
    halt(&w, false);
    expect(&w, "E");
    world_done(&w);
}

static void a_stop_right_after_the_start_begins_nothing(void **state)
{
    struct world w;

    world_init(&w, 2);
    world_begin(&w);
    start(&w);
    halt(&w, true);
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
        halt(&w, first);
        halt(&w, !first);
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
    halt(&w, false);
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
    halt(&w, false);
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
    halt(&w, false);
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
        halt(&w, false);
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
    halt(&w, true);
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
    halt(&w, false);
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
    halt(&w, false);
    expect(&w, "u0 u2 T d2 d0 E");
    assert_string_equal(described[1], "2/3 one");
    seq_describe(&w.seq, text, sizeof(text));
    assert_non_null(strstr(text, "ended"));
    world_done(&w);
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
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
