/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Two sources as one. The two hold different bytes here, so that it shows who has answered. */
#include "lib/loop.h"
#include "lib/test.h"
#include "qmp/base.h"
#include "source/memory.h"
#include "source/paired.h"

#define SURE_SIZE 100000u
#define FAST_SIZE 98304u /* the end of the disk is out of its reach */
#define NREADS 20u
#define READ 4000u

#define FROM_SURE 's'
#define FROM_FAST 'f'

struct world {
    uv_loop_t loop;
    struct source *sure, *fast, *pair;
    unsigned nanswered, nfailed, nlost;
    unsigned nfrom_fast, nfrom_sure;
    bool closed;
    int last; /* what the last read was answered with */
    struct source_read reads[NREADS];
    unsigned char buffers[NREADS][READ];
};

static unsigned char sure_data[SURE_SIZE], fast_data[FAST_SIZE];

static void on_sure_lost(void *arg, const struct failure *why)
{
    struct world *w = arg;

    w->nlost++;
}

static void on_fast_lost(void *arg, const struct failure *why)
{
    struct world *w = arg;

    source_paired_lost(w->pair);
}

static int set_up(void **state)
{
    struct world *w = calloc(1, sizeof(*w));

    assert_non_null(w);
    memset(sure_data, FROM_SURE, sizeof(sure_data));
    memset(fast_data, FROM_FAST, sizeof(fast_data));
    loop_init(&w->loop);
    assert_int_equal(source_memory_new(&w->loop, sure_data, SURE_SIZE, on_sure_lost, w, &w->sure), 0);
    assert_int_equal(source_memory_new(&w->loop, fast_data, FAST_SIZE, on_fast_lost, w, &w->fast), 0);
    assert_int_equal(source_paired_new(w->sure, &w->pair), 0);
    assert_int_equal(w->pair->size, SURE_SIZE);
    *state = w;
    return 0;
}

static void on_close(void *arg)
{
    struct world *w = arg;

    assert_false(w->closed);
    w->closed = true;
}

static int tear_down(void **state)
{
    struct world *w = *state;

    if (w->pair)
        source_close(w->pair, on_close, w);
    loop_until(&w->loop, w->closed);
    loop_done(&w->loop);
    free(w);
    return 0;
}

static void on_read(struct source_read *r, int err)
{
    struct world *w = r->arg;
    const unsigned char *bytes = r->buffer;

    w->nanswered++;
    w->last = err;
    if (err < 0) {
        w->nfailed++;
        return;
    }
    assert_int_equal(bytes[0], bytes[r->length - 1]);
    w->nfrom_fast += bytes[0] == FROM_FAST;
    w->nfrom_sure += bytes[0] == FROM_SURE;
}

static void start(struct world *w, unsigned i, uint64_t offset)
{
    w->reads[i] =
        (struct source_read){.offset = offset, .length = READ, .buffer = w->buffers[i], .cb = on_read, .arg = w};
    assert_int_equal(source_read(w->pair, &w->reads[i]), 0);
}

static void start_all(struct world *w)
{
    for (unsigned i = 0; i < NREADS; i++)
        start(w, i, (uint64_t)i * READ);
}

static void without_a_fast_source_the_sure_one_answers(void **state)
{
    struct world *w = *state;

    start_all(w);
    loop_until(&w->loop, w->nanswered == NREADS);
    assert_int_equal(w->nfrom_sure, NREADS);
    source_close(TAKE_PTR(w->fast), NULL, NULL);
}

static void reads_go_through_the_fast_source(void **state)
{
    struct world *w = *state;

    source_paired_add(w->pair, w->fast);
    start_all(w);
    loop_until(&w->loop, w->nanswered == NREADS);
    assert_int_equal(w->nfrom_fast, NREADS);
}

static void who_wants_to_be_sure_is_answered_by_the_sure_source(void **state)
{
    struct world *w = *state;

    source_paired_add(w->pair, w->fast);
    w->reads[0] = (struct source_read){.length = READ, .buffer = w->buffers[0], .sure = true, .cb = on_read, .arg = w};
    assert_int_equal(source_read(w->pair, &w->reads[0]), 0);
    loop_until(&w->loop, w->nanswered == 1);
    assert_int_equal(w->nfrom_sure, 1);
}

static void what_the_fast_source_does_not_reach_comes_from_the_sure_one(void **state)
{
    struct world *w = *state;

    source_paired_add(w->pair, w->fast);
    start(w, 0, FAST_SIZE - READ);     /* just within */
    start(w, 1, FAST_SIZE - READ + 1); /* across its end */
    start(w, 2, SURE_SIZE - READ);
    loop_until(&w->loop, w->nanswered == 3);
    assert_int_equal(w->nfrom_fast, 1);
    assert_int_equal(w->nfrom_sure, 2);
}

static void nobody_notices_that_the_fast_source_is_lost(void **state)
{
    struct world *w = *state;

    source_paired_add(w->pair, w->fast);
    source_memory_hold(w->fast, true);
    start_all(w);
    loop_turn(&w->loop, 5);
    assert_int_equal(w->nanswered, 0);
    source_memory_lose(w->fast);
    loop_until(&w->loop, w->nanswered == NREADS);
    assert_int_equal(w->nfrom_sure, NREADS);
    start(w, 0, 0); /* and it goes on */
    loop_until(&w->loop, w->nanswered == NREADS + 1);
    assert_int_equal(w->nfrom_sure, NREADS + 1);
    assert_int_equal(w->nlost, 0);
}

static void a_fast_source_that_is_taken_away_in_mid_read_is_made_up_for(void **state)
{
    struct world *w = *state;

    source_paired_add(w->pair, w->fast);
    source_memory_hold(w->fast, true);
    start_all(w);
    source_paired_lost(w->pair);
    source_paired_lost(w->pair); /* twice is no harm */
    loop_until(&w->loop, w->nanswered == NREADS);
    assert_int_equal(w->nfrom_sure, NREADS);
}

static void who_borrows_is_sent_for_a_buffer_where_the_sure_source_has_to_answer(void **state)
{
    struct world *w = *state;
    struct source_read *r = &w->reads[0];

    *r = (struct source_read){.length = READ, .borrow = true, .cb = on_read, .arg = w};
    assert_int_equal(source_read(w->pair, r), -ENOBUFS); /* nobody lends yet */
    w->fast->lends = true;                               /* it is lost before it does */
    source_paired_add(w->pair, w->fast);
    source_memory_hold(w->fast, true);
    assert_int_equal(source_read(w->pair, r), 0);
    source_memory_lose(w->fast);
    loop_until(&w->loop, w->nanswered == 1);
    assert_int_equal(w->last, -ENOBUFS);
    loop_turn(&w->loop, 3);
    assert_int_equal(source_read(w->pair, r), -ENOBUFS);
    start(w, 0, 0);
    loop_until(&w->loop, w->nanswered == 2);
    assert_int_equal(w->nfrom_sure, 1);
}

static void the_loss_of_the_sure_source_is_the_loss(void **state)
{
    struct world *w = *state;

    start_all(w);
    source_memory_lose(w->sure);
    loop_until(&w->loop, w->nlost == 1);
    assert_int_equal(w->nanswered, NREADS);
    assert_int_equal(w->nfailed, NREADS);
    source_close(TAKE_PTR(w->fast), NULL, NULL);
}

static void closing_answers_every_read_once_and_closes_both(void **state)
{
    struct world *w = *state;

    source_paired_add(w->pair, w->fast);
    source_memory_hold(w->fast, true);
    source_memory_hold(w->sure, true);
    for (unsigned i = 1; i < NREADS; i++)
        start(w, i, (uint64_t)i * READ);
    start(w, 0, SURE_SIZE - READ); /* one at the sure source */
    loop_turn(&w->loop, 5);
    source_close(TAKE_PTR(w->pair), on_close, w);
    loop_until(&w->loop, w->closed);
    assert_int_equal(w->nanswered, NREADS);
    assert_int_equal(w->nfailed, NREADS);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(without_a_fast_source_the_sure_one_answers),
        TEST(reads_go_through_the_fast_source),
        TEST(who_wants_to_be_sure_is_answered_by_the_sure_source),
        TEST(what_the_fast_source_does_not_reach_comes_from_the_sure_one),
        TEST(nobody_notices_that_the_fast_source_is_lost),
        TEST(a_fast_source_that_is_taken_away_in_mid_read_is_made_up_for),
        TEST(who_borrows_is_sent_for_a_buffer_where_the_sure_source_has_to_answer),
        TEST(the_loss_of_the_sure_source_is_the_loss),
        TEST(closing_answers_every_read_once_and_closes_both),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
