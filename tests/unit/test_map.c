/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* map against a plain array of bytes: what a map says must be what the array holds, whatever is appended and asked. */
#include "nbd/nbd.h"
#include "qmp/base.h"
#include "source/map.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#include <cmocka.h>

#define ROUNDS 200
#define MODEL_MAX 4000 /* bytes */

/* Replays a failure: QPULL_TEST_SEED=… */
static unsigned seed;

static uint64_t random_below(uint64_t limit)
{
    static uint64_t state;

    if (state == 0)
        state = seed ? seed : 1;
    /* xorshift64, Marsaglia 2003 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return limit > 0 ? state % limit : 0;
}

/* A map, and the flags of every byte of it. */
struct model {
    struct map *map;
    uint32_t flags[MODEL_MAX];
    size_t length;
};

static void model_append(struct model *m, size_t length, uint32_t flags)
{
    assert_int_equal(map_append(m->map, length, flags), 0);
    for (size_t i = 0; i < length; i++)
        m->flags[m->length++] = flags;
}

static void model_fill(struct model *m, size_t length, unsigned kinds)
{
    m->length = 0;
    assert_int_equal(map_new(&m->map), 0);
    while (m->length < length) {
        /* All four billion flags are legal: have large ones, too. */
        uint32_t flags = (uint32_t)random_below(kinds) * (random_below(8) == 0 ? UINT32_MAX / kinds : 1);
        size_t most = 1 + random_below(60);

        model_append(m, 1 + random_below(MIN(length - m->length, most)), flags);
    }
}

static void check_range(const struct model *m, size_t offset, size_t length, size_t max)
{
    struct nbd_status status;
    struct map_extent extents[64];
    size_t n = map_extents(m->map, offset, length, extents, max);
    size_t end = MIN(m->length, offset + length), at = offset;

    assert_true(n <= max);
    if (offset < m->length && length > 0 && max > 0)
        assert_true(n >= 1);
    for (size_t i = 0; i < n; i++) {
        assert_true(extents[i].length > 0);
        assert_true(extents[i].length <= end - at);
        if (i > 0)
            assert_int_not_equal(extents[i].flags, extents[i - 1].flags);
        for (size_t k = 0; k < extents[i].length; k++)
            assert_int_equal(m->flags[at + k], extents[i].flags);
        at += extents[i].length;
    }
    if (n < max)
        assert_int_equal(at, MAX(end, offset));

    /* the same, as it is kept */
    assert_int_equal(map_status(m->map, offset, length, MAX(max, (size_t)1), &status),
                     offset < m->length && length > 0);
    if (max == 0 || n == 0)
        return;
    assert_int_equal(status.nruns, n);
    assert_true(status.starts[0] <= offset && status.end >= at);
    at = offset;
    for (size_t i = 0; i < n; i++) {
        uint64_t stop = i + 1 < n ? status.starts[i + 1] : MIN(status.end, end);

        assert_int_equal(stop - at, extents[i].length);
        assert_int_equal(status.flags[i], extents[i].flags);
        at = stop;
    }
}

static void check_model(const struct model *m)
{
    uint32_t masks[] = {0, 1, 2, 3, 0x80000000, UINT32_MAX};
    size_t nruns = 0;

    assert_int_equal(map_length(m->map), m->length);
    for (size_t i = 0; i < m->length; i++)
        nruns += i == 0 || m->flags[i] != m->flags[i - 1];
    assert_int_equal(map_nruns(m->map), nruns);
    for (size_t k = 0; k < ARRAY_SIZE(masks); k++) {
        uint64_t count = 0;

        for (size_t i = 0; i < m->length; i++)
            count += (m->flags[i] & masks[k]) != 0;
        assert_int_equal(map_count(m->map, masks[k]), count);
    }
    check_range(m, 0, m->length, 64);
    for (int i = 0; i < 100; i++)
        check_range(m, random_below(m->length + 10), random_below(m->length + 10), random_below(64));
}

static void a_map_says_what_was_appended(void **state)
{
    static struct model m;

    for (int i = 0; i < ROUNDS; i++) {
        model_fill(&m, 1 + random_below(MODEL_MAX), 1 + (unsigned)random_below(5));
        check_model(&m);
        map_free(m.map);
    }
}

static void an_overlay_changes_exactly_the_masked_bytes(void **state)
{
    static struct model m, mask, merged;

    for (int i = 0; i < ROUNDS; i++) {
        size_t length = 1 + random_below(MODEL_MAX);
        uint32_t value = (uint32_t)random_below(4);

        model_fill(&m, length, 4);
        model_fill(&mask, length, 2);
        assert_int_equal(map_overlay(m.map, mask.map, value, &merged.map), 0);
        merged.length = length;
        for (size_t k = 0; k < length; k++)
            merged.flags[k] = mask.flags[k] ? value : m.flags[k];
        check_model(&merged);
        map_free(m.map);
        map_free(mask.map);
        map_free(merged.map);
    }
}

static void an_overlay_of_another_length_is_refused(void **state)
{
    struct map *m, *mask, *merged = NULL;

    assert_int_equal(map_new_uniform(1000, 0, &m), 0);
    assert_int_equal(map_new_uniform(1001, 0, &mask), 0);
    assert_int_equal(map_overlay(m, mask, 1, &merged), -EINVAL);
    assert_int_equal(map_overlay(mask, m, 1, &merged), -EINVAL);
    assert_null(merged);
    map_free(m);
    map_free(mask);
}

static void picking_numbers_says_one_for_them_and_zero_for_all_others(void **state)
{
    static struct model m, picked;
    /* Bit 0 stands for the number 1; 0, and what 64 bits cannot count, are never picked. */
    uint64_t masks[] = {0, 1, 2, 5, UINT64_C(1) << 63, UINT64_MAX};
    uint32_t numbers[] = {0, 1, 2, 3, 63, 64, 65, UINT32_MAX};

    for (size_t i = 0; i < ROUNDS; i++) {
        uint64_t mask = masks[i % ARRAY_SIZE(masks)];

        m.length = picked.length = 0;
        assert_int_equal(map_new(&m.map), 0);
        for (int k = 0; k < 100; k++)
            model_append(&m, 1 + random_below(20), numbers[random_below(ARRAY_SIZE(numbers))]);
        assert_int_equal(map_pick(m.map, mask, &picked.map), 0);
        for (; picked.length < m.length; picked.length++) {
            uint32_t n = m.flags[picked.length];

            picked.flags[picked.length] = n >= 1 && n <= 64 && (mask >> (n - 1) & 1);
        }
        check_model(&picked);
        map_free(m.map);
        map_free(picked.map);
    }
}

static void equal_neighbours_are_one_run(void **state)
{
    struct map *m;

    assert_int_equal(map_new(&m), 0);
    for (int i = 0; i < 1000; i++)
        assert_int_equal(map_append(m, 512, 7), 0);
    assert_int_equal(map_nruns(m), 1);
    assert_int_equal(map_length(m), 512000);
    map_free(m);
}

static void what_no_disk_can_have_is_refused(void **state)
{
    struct map *m, *none = NULL;

    assert_int_equal(map_new(&m), 0);
    assert_int_equal(map_append(m, 0, 0), -EINVAL);
    assert_int_equal(map_append(m, 512, UINT64_C(1) << 32), -E2BIG);
    assert_int_equal(map_append(m, UINT64_MAX, 0), -EINVAL);
    assert_int_equal(map_append(m, INT64_MAX, 0), 0);
    assert_int_equal(map_append(m, 1, 0), -EINVAL);
    assert_int_equal(map_length(m), INT64_MAX);
    assert_int_equal(map_nruns(m), 1);
    map_free(m);
    assert_int_equal(map_new_uniform(512, UINT64_C(1) << 32, &none), -E2BIG);
    assert_int_equal(map_new_uniform(UINT64_MAX, 0, &none), -EINVAL);
    assert_null(none);
    map_free(NULL);
}

static void an_empty_map_has_no_extents(void **state)
{
    struct map_extent extent;
    struct map *m, *merged;

    assert_int_equal(map_new_uniform(0, 1, &m), 0);
    assert_int_equal(map_length(m), 0);
    assert_int_equal(map_extents(m, 0, 512, &extent, 1), 0);
    assert_int_equal(map_overlay(m, m, 1, &merged), 0);
    assert_int_equal(map_length(merged), 0);
    map_free(merged);
    map_free(m);
}

static void ranges_at_the_far_end_do_not_wrap(void **state)
{
    struct map_extent extents[2];
    struct map *m;

    assert_int_equal(map_new_uniform(INT64_MAX - 1, 3, &m), 0);
    assert_int_equal(map_append(m, 1, 4), 0);
    assert_int_equal(map_extents(m, INT64_MAX - 2, UINT64_MAX, extents, 2), 2);
    assert_int_equal(extents[0].length, 1);
    assert_int_equal(extents[0].flags, 3);
    assert_int_equal(extents[1].length, 1);
    assert_int_equal(extents[1].flags, 4);
    assert_int_equal(map_extents(m, UINT64_MAX, UINT64_MAX, extents, 2), 0);
    map_free(m);
}

static void a_million_extents_take_less_than_24_mib(void **state)
{
    struct map_extent extent;
    size_t worst = 0, nruns = 1 << 20;
    struct map *m, *merged;

    assert_int_equal(map_new(&m), 0);
    for (size_t i = 0; i < nruns; i++) {
        assert_int_equal(map_append(m, 65536, i & 1), 0);
        if (i > nruns / 2)
            worst = MAX(worst, map_memory(m) / (map_nruns(m) / 16)); /* sixteenths of a byte a run, slack included */
    }
    assert_int_equal(map_nruns(m), nruns);
    assert_true(map_memory(m) <= 24 << 20);
    assert_true(worst <= 256);
    for (size_t i = 0; i < nruns; i += 997) {
        assert_int_equal(map_extents(m, i * 65536 + 4096, 65536, &extent, 1), 1);
        assert_int_equal(extent.flags, i & 1);
        assert_int_equal(extent.length, 61440);
    }
    assert_int_equal(map_overlay(m, m, 0, &merged), 0);
    assert_int_equal(map_nruns(merged), 1);
    map_free(merged);
    map_free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_map_says_what_was_appended),
        cmocka_unit_test(an_overlay_changes_exactly_the_masked_bytes),
        cmocka_unit_test(an_overlay_of_another_length_is_refused),
        cmocka_unit_test(picking_numbers_says_one_for_them_and_zero_for_all_others),
        cmocka_unit_test(equal_neighbours_are_one_run),
        cmocka_unit_test(what_no_disk_can_have_is_refused),
        cmocka_unit_test(an_empty_map_has_no_extents),
        cmocka_unit_test(ranges_at_the_far_end_do_not_wrap),
        cmocka_unit_test(a_million_extents_take_less_than_24_mib),
    };
    const char *replay = getenv("QPULL_TEST_SEED");

    seed = replay ? (unsigned)strtoul(replay, NULL, 0) : (unsigned)time(NULL);
    (void)printf("QPULL_TEST_SEED=%u\n", seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
