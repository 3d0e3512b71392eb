/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* rate: no more than so many bytes in the time that has passed, shared by turns, and no timer where nobody waits. */
#include "test.h"

#include "config.h"
#include "loop.h"
#include "rate.h"

#include <stdio.h>

#define RATE (4u << 20) /* bytes a second */
#define PIECE (256u << 10)

struct reader {
    struct rate_user user;
    uint64_t taken, wanted;
    unsigned nturns;
    bool lazy; /* takes no turn that it gets */
};

struct world {
    uv_loop_t loop;
    struct rate_set set;
    struct reader readers[3];
};

static void take(struct reader *r)
{
    while (r->taken < r->wanted && rate_may(&r->user)) {
        rate_spend(&r->user, PIECE);
        r->taken += PIECE;
    }
}

static void on_room(struct rate_user *u)
{
    struct reader *r = container_of(u, struct reader, user);

    r->nturns++;
    if (!r->lazy)
        take(r);
}

static int set_up(void **state)
{
    struct world *w = calloc(1, sizeof *w);

    loop_init(&w->loop);
    w->set.loop = &w->loop;
    for (size_t i = 0; i < ARRAY_SIZE(w->readers); i++)
        w->readers[i].user.on_room = on_room;
    *state = w;
    return 0;
}

static int tear_down(void **state)
{
    struct world *w = *state;

    for (size_t i = 0; i < ARRAY_SIZE(w->readers); i++)
        rate_leave(&w->readers[i].user);
    assert_null(w->set.buckets);
    loop_done(&w->loop);
    free(w);
    return 0;
}

static void join(struct world *w, unsigned i, const char *session, uint64_t rate, uint64_t wanted)
{
    assert_int_equal(rate_join(&w->set, &w->readers[i].user, session, rate), 0);
    w->readers[i].wanted = wanted;
}

static void without_a_limit_nobody_waits(void **state)
{
    struct world *w = *state;

    join(w, 0, "a", 0, 1u << 30);
    take(&w->readers[0]);
    assert_int_equal(w->readers[0].taken, 1u << 30);
    assert_int_equal(rate_piece(&w->readers[0].user), SIZE_MAX);
    assert_null(w->set.buckets);
}

/* The clock runs on while the loop is late: more may only come with more time. */
static void never_more_than_the_time_that_has_passed_allows(void **state)
{
    struct world *w = *state;
    struct reader *r = &w->readers[0];
    uint64_t before = uv_hrtime();
    double allowed;

    join(w, 0, "a", RATE, 2u << 20);
    take(r);
    assert_int_equal(r->taken, PIECE); /* the first at once, and it is owed then */
    while (r->taken < r->wanted) {
        (void)uv_run(&w->loop, UV_RUN_ONCE);
        allowed = PIECE + (double)RATE * (double)(uv_hrtime() - before) / 1e9;
        assert_true((double)r->taken <= allowed);
    }
    assert_true(uv_hrtime() - before >= UINT64_C(400000000)); /* 1.75 MiB past the first piece, at 4 a second */
}

static void two_connections_of_a_session_share_it_by_turns_and_another_session_has_its_own(void **state)
{
    struct world *w = *state;
    uint64_t a, b;

    join(w, 0, "a", RATE, 2u << 20);
    join(w, 1, "a", RATE, 2u << 20);
    join(w, 2, "b", RATE, PIECE);
    for (size_t i = 0; i < 3; i++)
        take(&w->readers[i]);
    assert_int_equal(w->readers[2].taken, PIECE); /* it does not wait for the others' debt */
    assert_int_equal(w->readers[1].taken, 0);
    while (w->readers[0].taken < w->readers[0].wanted && w->readers[1].taken < w->readers[1].wanted) {
        (void)uv_run(&w->loop, UV_RUN_ONCE);
        a = w->readers[0].taken;
        b = w->readers[1].taken;
        assert_true(MAX(a, b) - MIN(a, b) <= 2 * PIECE); /* the one that was alone at first is one ahead */
    }
}

static void the_timer_runs_only_while_somebody_waits(void **state)
{
    struct world *w = *state;

    join(w, 0, "a", RATE, PIECE);
    take(&w->readers[0]);
    assert_false(uv_loop_alive(&w->loop));
    w->readers[0].wanted += PIECE;
    take(&w->readers[0]);
    assert_true(uv_loop_alive(&w->loop));
    (void)uv_run(&w->loop, UV_RUN_DEFAULT); /* it ends by itself */
    assert_int_equal(w->readers[0].taken, 2 * PIECE);
}

static void who_forgets_gets_no_turn_and_one_who_takes_none_holds_nobody_up(void **state)
{
    struct world *w = *state;

    for (unsigned i = 0; i < 3; i++) {
        join(w, i, "a", RATE, 2 * PIECE);
        take(&w->readers[i]);
    }
    rate_forget(&w->readers[1].user);
    w->readers[0].lazy = true;
    (void)uv_run(&w->loop, UV_RUN_DEFAULT);
    assert_int_equal(w->readers[0].nturns, 1);
    assert_int_equal(w->readers[1].nturns, 0);
    assert_int_equal(w->readers[2].taken, 2 * PIECE);
}

static void a_piece_is_a_fraction_of_a_second_and_never_nothing(void **state)
{
    struct world *w = *state;

    join(w, 0, "a", CONFIG_RATE_LEAST, 0);
    assert_int_equal(rate_piece(&w->readers[0].user), CONN_BLOCK_PREFERRED);
    join(w, 0, "b", 1u << 20, 0);
    assert_int_equal(rate_piece(&w->readers[0].user), 64u << 10);
}

/* As much as a rate can be, and as long ago as can be. */
static void the_largest_rate_overflows_nothing(void **state)
{
    struct world *w = *state;

    join(w, 0, "a", CONFIG_SIZE_MAX, 64ull << 20);
    take(&w->readers[0]);
    (void)uv_run(&w->loop, UV_RUN_DEFAULT);
    assert_int_equal(w->readers[0].taken, 64ull << 20);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(without_a_limit_nobody_waits),
        TEST(never_more_than_the_time_that_has_passed_allows),
        TEST(two_connections_of_a_session_share_it_by_turns_and_another_session_has_its_own),
        TEST(the_timer_runs_only_while_somebody_waits),
        TEST(who_forgets_gets_no_turn_and_one_who_takes_none_holds_nobody_up),
        TEST(a_piece_is_a_fraction_of_a_second_and_never_nothing),
        TEST(the_largest_rate_overflows_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
