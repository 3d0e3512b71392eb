/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What clients of the plugin are told of a disk, and when a disk counts as handed out, against plain arrays. */
#include "frozen.h"

#include "qmp/base.h"

#include <errno.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define SIZE 500u /* units, and bytes */
#define ROUNDS 300

static unsigned seed;

static unsigned random_below(unsigned limit)
{
    return (unsigned)rand_r(&seed) % limit;
}

static struct map *random_map(unsigned flags[SIZE], unsigned kinds)
{
    struct map *m;

    assert_int_equal(map_new(&m), 0);
    for (unsigned at = 0; at < SIZE;) {
        unsigned wish = 1 + random_below(30), n = MIN(wish, SIZE - at), value = random_below(kinds);

        assert_int_equal(map_append(m, n, value), 0);
        while (n--)
            flags[at++] = value;
    }
    return m;
}

static unsigned expected(enum view view, unsigned allocation, unsigned dirty)
{
    if (view == VIEW_ALLOCATION)
        return allocation;
    if (!dirty)
        return 3;
    return view == VIEW_BOTH ? 0 : allocation & 2;
}

static void every_view_tells_what_it_says(void **state)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        unsigned allocation[SIZE], dirty[SIZE], at = random_below(SIZE), end = SIZE;
        struct map *a = random_map(allocation, 4), *d = random_map(dirty, 2);
        enum view view = random_below(VIEW_COUNT);
        struct frozen *f;

        assert_int_equal(frozen_new("vda", "s", SIZE, view, a, d, &f), 0);
        map_free(a);
        map_free(d);
        while (at < end) {
            struct frozen_run runs[7];
            size_t n = frozen_tell(f, at, end - at, runs, 1 + random_below(7));

            assert_true(n > 0);
            for (size_t i = 0; i < n; i++) {
                for (uint64_t k = 0; k < runs[i].length; k++, at++)
                    assert_int_equal(runs[i].type, expected(view, allocation[at], dirty[at]));
            }
        }
        for (unsigned i = 0; i < SIZE; i++)
            assert_int_equal(frozen_is_zero(f, i, 1), (allocation[i] & 2) != 0);
        frozen_free(f);
    }
}

static void maps_that_are_not_as_long_as_the_disk_are_refused(void **state)
{
    unsigned flags[SIZE];
    struct map *m = random_map(flags, 2);
    struct frozen *f;

    assert_int_equal(frozen_new("vda", "s", SIZE + 1, VIEW_ALLOCATION, m, NULL, &f), -EINVAL);
    assert_int_equal(frozen_new("vda", "s", SIZE + 1, VIEW_DIRTY, m, m, &f), -EINVAL);
    map_free(m);
}

static void a_disk_is_whole_when_every_byte_was_added(void **state)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        struct covered c = {0};
        bool has[SIZE] = {0};
        unsigned n = 0;

        while (n < SIZE) {
            unsigned from = random_below(SIZE), wish = random_below(60), length = MIN(wish, SIZE - from);

            assert_false(covered_whole(&c, SIZE));
            covered_add(&c, from, length);
            for (unsigned i = from; i < from + length; i++) {
                n += !has[i];
                has[i] = true;
            }
        }
        assert_true(covered_whole(&c, SIZE));
        assert_int_equal(c.nranges, 1);
        covered_done(&c);
    }
}

static void too_many_gaps_are_never_whole_and_cost_nothing(void **state)
{
    struct covered c = {0};

    for (uint64_t i = 0; i <= COVERED_MAX; i++)
        covered_add(&c, 2 * i, 1);
    assert_true(c.lost);
    assert_int_equal(c.nallocated, 0);
    covered_add(&c, 0, 4ull * COVERED_MAX);
    assert_false(covered_whole(&c, 4ull * COVERED_MAX));
    covered_done(&c);
}

static void what_is_told_and_read_makes_a_disk_whole_unless_a_read_failed(void **state)
{
    for (unsigned fails = 0; fails < 2; fails++) {
        struct frozen_run runs[4];
        struct frozen *f;
        struct map *m;

        assert_int_equal(map_new(&m), 0);
        assert_int_equal(map_append(m, 100, 0), 0);
        assert_int_equal(map_append(m, 50, 2), 0);
        assert_int_equal(frozen_new("vda", "s", 150, VIEW_ALLOCATION, m, NULL, &f), 0);
        map_free(m);
        frozen_was_read(f, 0, 100);
        assert_false(frozen_is_whole(f));
        assert_int_equal(frozen_tell(f, 0, 120, runs, 4), 2);
        assert_false(frozen_is_whole(f)); /* up to 120 only */
        assert_int_equal(frozen_tell(f, 100, 50, runs, 4), 1);
        if (fails)
            frozen_read_failed(f);
        assert_int_equal(frozen_is_whole(f), !fails);
        frozen_free(f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_view_tells_what_it_says),
        cmocka_unit_test(maps_that_are_not_as_long_as_the_disk_are_refused),
        cmocka_unit_test(a_disk_is_whole_when_every_byte_was_added),
        cmocka_unit_test(too_many_gaps_are_never_whole_and_cost_nothing),
        cmocka_unit_test(what_is_told_and_read_makes_a_disk_whole_unless_a_read_failed),
    };
    const char *given = getenv("QPULL_TEST_SEED");

    seed = given ? (unsigned)strtoul(given, NULL, 10) : (unsigned)time(NULL);
    (void)printf("QPULL_TEST_SEED=%u\n", seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
