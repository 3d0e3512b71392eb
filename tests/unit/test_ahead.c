/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading ahead: what it asks below, and that it never changes what a client gets. */
#include "lib/loop.h"
#include "lib/test.h"
#include "qmp/base.h"
#include "source/ahead.h"
#include "source/read_list.h"

#include <time.h>

#define KIB 1024u
#define SIZE (16u << 20)
#define REQUEST (64u * KIB)
#define READS_MAX 32u

/* What is below: answers in the next turn of the loop, and keeps a record. */
struct below {
    struct source source;
    uv_timer_t timer;
    struct read_list reads;
    unsigned nreads;
    uint64_t nbytes;
    uint8_t given[SIZE / REQUEST]; /* given back: reads of it fail */
    uint8_t asked[SIZE / REQUEST]; /* how often any byte of it was read */
    bool hold, broken;
    source_close_cb on_close;
    void *close_arg;
};

struct rig {
    uv_loop_t loop;
    struct below below;
    struct ahead_pool pool;
    uint64_t wanted; /* told with each read */
    struct source *source;
    struct client_read {
        struct source_read read;
        unsigned nanswers;
        int err;
        char buffer[AHEAD_PIECE];
    } reads[READS_MAX];
    bool closed;
};

static unsigned char *data;

static void answer(uv_timer_t *t)
{
    struct below *b = container_of(t, struct below, timer);
    struct read_list all = b->reads;
    struct source_read *r;

    b->reads = (struct read_list){0};
    while ((r = read_list_pop(&all))) {
        int err = b->broken ? -ESTALE : 0;

        for (uint64_t i = r->offset / REQUEST; i <= (r->offset + r->length - 1) / REQUEST && !err; i++)
            err = b->given[i] ? -ENODATA : 0;
        memset(r->buffer, 0xee, r->length);
        if (!err)
            memcpy(r->buffer, data + r->offset, r->length);
        r->cb(r, err);
    }
}

static int below_read(struct source *s, struct source_read *r)
{
    struct below *b = container_of(s, struct below, source);

    b->nreads++;
    b->nbytes += r->length;
    for (uint64_t i = r->offset / REQUEST; i <= (r->offset + r->length - 1) / REQUEST; i++)
        b->asked[i]++;
    read_list_append(&b->reads, r);
    if (!b->hold)
        assert_int_equal(uv_timer_start(&b->timer, answer, 0, 0), 0);
    return 0;
}

static void on_below_closed(uv_handle_t *h)
{
    struct below *b = container_of((uv_timer_t *)h, struct below, timer);
    struct source_read *r;

    while ((r = read_list_pop(&b->reads)))
        r->cb(r, -ECANCELED);
    b->on_close(b->close_arg);
}

static void below_close(struct source *s, source_close_cb cb, void *arg)
{
    struct below *b = container_of(s, struct below, source);

    b->on_close = cb;
    b->close_arg = arg;
    uv_close((uv_handle_t *)&b->timer, on_below_closed);
}

static void below_give_back(struct source *s, uint64_t offset, uint64_t length)
{
    struct below *b = container_of(s, struct below, source);

    for (uint64_t i = (offset + REQUEST - 1) / REQUEST; i < (offset + length) / REQUEST; i++)
        b->given[i] = 1;
}

static const struct source_ops below_ops = {.read = below_read, .close = below_close, .give_back = below_give_back};

static int set_up(void **state)
{
    struct rig *rig = calloc(1, sizeof(*rig));

    if (!data) {
        data = malloc(SIZE);
        for (size_t i = 0; i < SIZE; i++)
            data[i] = (unsigned char)(i * 2654435761u >> 13);
    }
    loop_init(&rig->loop);
    (void)uv_timer_init(&rig->loop, &rig->below.timer);
    rig->below.source = (struct source){.ops = &below_ops, .size = SIZE};
    rig->pool.left = AHEAD_POOL;
    assert_int_equal(ahead_new(&rig->loop, &rig->pool, &rig->below.source, &rig->source), 0);
    *state = rig;
    return 0;
}

static void on_closed(void *arg)
{
    ((struct rig *)arg)->closed = true;
}

static int tear_down(void **state)
{
    struct rig *rig = *state;

    source_close(rig->source, on_closed, rig);
    loop_until(&rig->loop, rig->closed);
    assert_int_equal(rig->pool.left, AHEAD_POOL);
    loop_done(&rig->loop);
    free(rig);
    return 0;
}

static void on_read(struct source_read *r, int err)
{
    struct client_read *c = container_of(r, struct client_read, read);

    c->nanswers++;
    c->err = err;
}

static struct client_read *begin(struct rig *rig, unsigned i, uint64_t offset, size_t length)
{
    struct client_read *c = &rig->reads[i];

    c->nanswers = 0;
    memset(c->buffer, 0xaa, sizeof(c->buffer));
    c->read = (struct source_read){
        .offset = offset, .length = length, .wanted = rig->wanted, .buffer = c->buffer, .cb = on_read};
    assert_int_equal(source_read(rig->source, &c->read), 0);
    assert_int_equal(c->nanswers, 0); /* never from inside */
    return c;
}

static int finish(struct rig *rig, struct client_read *c)
{
    loop_until(&rig->loop, c->nanswers > 0);
    assert_int_equal(c->nanswers, 1);
    if (!c->err)
        assert_memory_equal(c->buffer, data + c->read.offset, c->read.length);
    return c->err;
}

static int read_one(struct rig *rig, uint64_t offset, size_t length)
{
    return finish(rig, begin(rig, 0, offset, length));
}

static void who_reads_one_by_one_is_read_ahead_for(void **state)
{
    struct rig *rig = *state;
    struct client_read *c;

    for (uint64_t at = 0; at < SIZE / 2; at += REQUEST)
        assert_int_equal(read_one(rig, at, REQUEST), 0);
    loop_turn(&rig->loop, 4);
    assert_true(rig->below.nreads < SIZE / 2 / REQUEST / 2);
    for (size_t i = 0; i < SIZE / 2 / REQUEST; i++)
        assert_int_equal(rig->below.asked[i], 1);
    rig->below.hold = true; /* what comes next is here */
    c = begin(rig, 0, SIZE / 2, REQUEST);
    assert_int_equal(finish(rig, c), 0);
    assert_true(rig->below.nbytes <= SIZE / 2 + (AHEAD_PIECES + 1) * AHEAD_PIECE);
    rig->below.hold = false;
    answer(&rig->below.timer);
}

/* A read of what is being read ahead, and not answered from below. */
static struct client_read *wait_for_a_piece(struct rig *rig)
{
    for (uint64_t at = 0; at < AHEAD_BEGIN * REQUEST; at += REQUEST)
        assert_int_equal(read_one(rig, at, REQUEST), 0);
    rig->below.hold = true;
    for (uint64_t at = AHEAD_BEGIN * REQUEST; !rig->below.reads.first; at += REQUEST)
        assert_int_equal(read_one(rig, at, REQUEST), 0);
    return begin(rig, 1, rig->below.reads.first->offset, REQUEST);
}

static void who_waits_for_what_is_under_way_gets_it(void **state)
{
    struct rig *rig = *state;
    struct client_read *c = wait_for_a_piece(rig);

    loop_turn(&rig->loop, 4);
    assert_int_equal(c->nanswers, 0);
    rig->below.hold = false;
    answer(&rig->below.timer);
    assert_int_equal(finish(rig, c), 0);
}

static void reads_in_no_order_are_only_passed_on(void **state)
{
    static const unsigned order[] = {7, 3, 90, 2, 1, 60, 61, 8, 120, 33, 34, 5};
    struct rig *rig = *state;

    for (size_t i = 0; i < ARRAY_SIZE(order); i++)
        assert_int_equal(read_one(rig, (uint64_t)order[i] * REQUEST, REQUEST), 0);
    assert_int_equal(rig->below.nreads, ARRAY_SIZE(order));
    assert_int_equal(rig->pool.left, AHEAD_POOL);
}

static void a_step_aside_gives_all_memory_back(void **state)
{
    struct rig *rig = *state;

    for (uint64_t at = 0; at < 8 * REQUEST; at += REQUEST)
        assert_int_equal(read_one(rig, at, REQUEST), 0);
    assert_true(rig->pool.left < AHEAD_POOL);
    loop_turn(&rig->loop, 4);
    assert_int_equal(read_one(rig, SIZE / 2, REQUEST), 0);
    assert_int_equal(rig->pool.left, AHEAD_POOL);
}

static void many_requests_in_flight_are_only_passed_on(void **state)
{
    struct rig *rig = *state;

    for (uint64_t at = 0; at + 16 * AHEAD_PIECE <= SIZE; at += 16 * AHEAD_PIECE) {
        for (unsigned i = 0; i < 16; i++)
            (void)begin(rig, i, at + i * AHEAD_PIECE, AHEAD_PIECE);
        for (unsigned i = 0; i < 16; i++)
            assert_int_equal(finish(rig, &rig->reads[i]), 0);
    }
    assert_int_equal(rig->below.nbytes, SIZE);
    assert_int_equal(rig->pool.left, AHEAD_POOL);
}

/* The client has asked for much; it is not its doing that little is in flight. */
static void who_gets_several_pieces_at_a_time_of_many_is_not_read_ahead_for(void **state)
{
    struct rig *rig = *state;

    rig->wanted = 4 * AHEAD_REQUEST;
    for (uint64_t at = 0; at < SIZE / 2; at += 4 * AHEAD_PIECE) {
        for (unsigned i = 0; i < 4; i++)
            (void)begin(rig, i, at + i * AHEAD_PIECE, AHEAD_PIECE);
        for (unsigned i = 0; i < 4; i++)
            assert_int_equal(finish(rig, &rig->reads[i]), 0);
    }
    assert_int_equal(rig->below.nbytes, SIZE / 2);
    assert_int_equal(rig->pool.left, AHEAD_POOL);
    for (uint64_t at = SIZE / 2; at < SIZE; at += AHEAD_PIECE)
        assert_int_equal(read_one(rig, at, AHEAD_PIECE), 0);
    assert_true(rig->pool.left < AHEAD_POOL);
    for (size_t i = 0; i < SIZE / REQUEST; i++)
        assert_int_equal(rig->below.asked[i], 1);
}

static void a_map_shows_the_way_and_nothing_else_is_read(void **state)
{
    struct rig *rig = *state;
    struct map *map;

    assert_int_equal(map_new(&map), 0);
    for (uint64_t at = 0; at < SIZE; at += 4 * REQUEST) {
        assert_int_equal(map_append(map, REQUEST, 1), 0);
        assert_int_equal(map_append(map, 3 * REQUEST, 0), 0);
    }
    ahead_follow(rig->source, map, 1, 1);
    for (uint64_t at = 0; at < SIZE / 2; at += 4 * REQUEST)
        assert_int_equal(read_one(rig, at, REQUEST), 0);
    loop_turn(&rig->loop, 4);
    for (size_t i = 0; i < SIZE / REQUEST; i++)
        assert_int_equal(rig->below.asked[i], i % 4 == 0 && i < SIZE / 2 / REQUEST + 4 * AHEAD_PIECES);
    map_free(map);
}

static void what_was_given_back_is_not_served_and_the_rest_is(void **state)
{
    struct rig *rig = *state;
    unsigned nreads;

    for (uint64_t at = 0; at < 20 * REQUEST; at += REQUEST) {
        assert_int_equal(read_one(rig, at, REQUEST), 0);
        source_give_back(rig->source, at, REQUEST);
    }
    loop_turn(&rig->loop, 4);
    nreads = rig->below.nreads;
    assert_int_equal(read_one(rig, 20 * REQUEST, REQUEST), 0);
    assert_true(rig->below.nreads <= nreads + 1); /* from memory; perhaps one more piece was asked for */
    for (size_t i = 0; i < 20; i++)
        assert_int_equal(rig->below.asked[i], 1);
    source_give_back(rig->source, 20 * REQUEST, 2 * REQUEST);
    assert_int_equal(read_one(rig, 21 * REQUEST, REQUEST), -ENODATA);
}

static void nothing_kept_is_served_once_the_snapshot_is_known_to_be_lost(void **state)
{
    struct rig *rig = *state;
    uint64_t at;

    for (at = 0; at < 20 * REQUEST; at += REQUEST)
        assert_int_equal(read_one(rig, at, REQUEST), 0);
    loop_turn(&rig->loop, 4);
    rig->below.broken = true;
    assert_int_equal(read_one(rig, at, REQUEST), 0); /* read before: right bytes, and nobody knows yet */
    loop_turn(&rig->loop, 4);                        /* more is read ahead, and that fails */
    for (unsigned i = 0; i < 8; i++) {
        at += REQUEST;
        if (read_one(rig, at, REQUEST) == -ESTALE)
            break;
    }
    assert_int_equal(read_one(rig, at + REQUEST, REQUEST), -ESTALE);
    assert_int_equal(rig->pool.left, AHEAD_POOL);
}

/* One that landed before, but of which the news came together. */
static void who_waits_while_the_snapshot_is_found_lost_is_told_by_the_source(void **state)
{
    struct rig *rig = *state;
    struct source_read *later;
    struct client_read *c;
    uint64_t at;

    for (at = 0; at < AHEAD_BEGIN * REQUEST; at += REQUEST)
        assert_int_equal(read_one(rig, at, REQUEST), 0);
    rig->below.hold = true;
    while (!rig->below.reads.first || rig->below.reads.first->offset != at) {
        assert_int_equal(read_one(rig, at, REQUEST), 0);
        at += REQUEST;
    }
    c = begin(rig, 1, at, REQUEST); /* and more is read ahead */
    assert_true(rig->below.reads.first != rig->below.reads.last);
    later = rig->below.reads.last;
    read_list_remove(&rig->below.reads, later);
    later->cb(later, -ESTALE);
    rig->below.hold = false;
    answer(&rig->below.timer); /* this read began before the break and ends well */
    rig->below.broken = true;
    assert_int_equal(finish(rig, c), -ESTALE);
}

/* Whatever the order, the lengths, what is given back and when answers come: right bytes, or an error that is due. */
static void any_mixture_gives_right_bytes(void **state)
{
    const char *given = getenv("QPULL_TEST_SEED");
    unsigned seed = given ? (unsigned)strtoul(given, NULL, 0) : (unsigned)time(NULL);
    struct rig *rig = *state;
    uint64_t at = 0;

    print_message("QPULL_TEST_SEED=%u\n", seed);
    srand(seed);
    for (unsigned round = 0; round < 3000; round++) {
        unsigned n = rand() % 8 ? 1 : 1 + (unsigned)rand() % 8;

        if (rand() % 25 == 0)
            at = (uint64_t)rand() % SIZE;
        rig->below.hold = rand() % 4 == 0;
        for (unsigned i = 0; i < n; i++) {
            size_t length = 1 + (size_t)rand() % 4 * 16 * KIB;

            length = MIN(length, AHEAD_PIECE - at % AHEAD_PIECE);
            (void)begin(rig, i, at, length);
            at = (at + length) % SIZE;
        }
        if (rig->below.hold) {
            loop_turn(&rig->loop, 2);
            if (rand() % 3 == 0) {
                uint64_t from = (uint64_t)rand() % SIZE;
                source_give_back(rig->source, from, MIN(SIZE - from, (uint64_t)rand() % (2 * REQUEST)));
            }
            rig->below.hold = false;
            answer(&rig->below.timer);
        }
        for (unsigned i = 0; i < n; i++) {
            uint64_t offset = rig->reads[i].read.offset;
            int err = finish(rig, &rig->reads[i]);

            assert_true(err == 0 || err == -ENODATA);
            if (err == -ENODATA)
                assert_true(rig->below.given[offset / REQUEST] ||
                            rig->below.given[(offset + rig->reads[i].read.length - 1) / REQUEST]);
        }
        assert_true(rig->pool.left <= AHEAD_POOL);
    }
}

/* Closing answers all, also who waits for a piece that is under way. */
static void closing_answers_who_waits(void **state)
{
    struct rig *rig = *state;
    struct client_read *c = wait_for_a_piece(rig);

    source_close(rig->source, on_closed, rig);
    loop_until(&rig->loop, rig->closed);
    assert_int_equal(c->nanswers, 1);
    assert_int_equal(c->err, -ECANCELED);
    rig->closed = false;
    rig->below = (struct below){.source = {.ops = &below_ops, .size = SIZE}};
    (void)uv_timer_init(&rig->loop, &rig->below.timer);
    assert_int_equal(ahead_new(&rig->loop, &rig->pool, &rig->below.source, &rig->source), 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(who_reads_one_by_one_is_read_ahead_for),
        TEST(who_waits_for_what_is_under_way_gets_it),
        TEST(reads_in_no_order_are_only_passed_on),
        TEST(a_step_aside_gives_all_memory_back),
        TEST(many_requests_in_flight_are_only_passed_on),
        TEST(who_gets_several_pieces_at_a_time_of_many_is_not_read_ahead_for),
        TEST(a_map_shows_the_way_and_nothing_else_is_read),
        TEST(what_was_given_back_is_not_served_and_the_rest_is),
        TEST(nothing_kept_is_served_once_the_snapshot_is_known_to_be_lost),
        TEST(who_waits_while_the_snapshot_is_found_lost_is_told_by_the_source),
        TEST(any_mixture_gives_right_bytes),
        TEST(closing_answers_who_waits),
    };
    int r = cmocka_run_group_tests(tests, NULL, NULL);

    free(data);
    return r;
}
