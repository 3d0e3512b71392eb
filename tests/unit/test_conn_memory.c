/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* conn: what a client costs that does not take what it has asked for, and that nothing is lost when it does after all.
 */
#include "conn_internal.h"
#include "conn_world.h"

#include <stdio.h>

#define FAR (6u << 20) /* bytes of a read: more than the socket's buffer and the window hold */
#define FIRST (1u << 20)

/* Nothing is read beyond what is on its way, and that is one piece. */
static void wait_stuck(struct world *w, const struct client *c)
{
    loop_until(&w->loop, w->set.first->pull.window >= CONN_PIECE);
    loop_until(&w->loop, w->set.first->pull.window <= CONN_PIECE);
    assert_true(w->set.budget.used <= CONN_PIECE);
    assert_int_equal(c->in.len, 0);
}

static void a_simple_reply_that_was_given_up_comes_whole_all_the_same(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", SIMPLE);
    struct bytes b = {0};

    client_read(c, false);
    say_read(&b, 1, FIRST, FAR);
    say_read(&b, 2, FIRST, FAR);
    client_say(c, &b);
    wait_stuck(w, c);
    client_read(c, true);
    for (unsigned i = 1; i <= 2; i++) {
        want_simple(&b, 0, i);
        put_raw(&b, w->vms[0].source.data + FIRST, FAR);
    }
    client_expect(w, c, &b);
}

/* Every byte of these reads, whatever the order in which the chunks come. */
static void expect_reads(struct world *w, struct client *c, unsigned nreads, uint64_t offset, size_t length)
{
    uint8_t *got = calloc(nreads, length);
    size_t left = nreads * length;
    const size_t head = 20, at = 8; /* of a chunk; of its offset (spec: structured reply) */

    while (left > 0) {
        uint64_t cookie = 0, where = 0;
        size_t len = 0;

        loop_until(&w->loop, c->in.len >= head + at);
        for (size_t i = 0; i < 8; i++) {
            cookie = cookie << 8 | ((uint8_t *)c->in.data)[8 + i];
            where = where << 8 | ((uint8_t *)c->in.data)[head + i];
        }
        for (size_t i = 0; i < 4; i++)
            len = len << 8 | ((uint8_t *)c->in.data)[16 + i];
        assert_int_equal(((uint8_t *)c->in.data)[7], NBD_REPLY_TYPE_OFFSET_DATA);
        loop_until(&w->loop, c->in.len >= head + len);
        assert_between(cookie, 1, nreads);
        assert_true(where >= offset && where + len - at <= offset + length);
        memcpy(got + (cookie - 1) * length + (where - offset), (uint8_t *)c->in.data + head + at, len - at);
        left -= len - at;
        c->in.len -= head + len;
        memmove(c->in.data, (uint8_t *)c->in.data + head + len, c->in.len);
    }
    for (unsigned i = 0; i < nreads; i++)
        assert_memory_equal(got + i * length, w->vms[0].source.data + offset, length);
    assert_int_equal(c->in.len, 0);
    free(got);
}

static void structured_replies_that_were_given_up_come_whole_all_the_same(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", STRUCTURED);
    struct bytes b = {0};

    client_read(c, false);
    for (unsigned i = 1; i <= 40; i++)
        say_read(&b, i, FIRST, 1024 * KIB + 512);
    client_say(c, &b);
    wait_stuck(w, c);
    client_read(c, true);
    expect_reads(w, c, 40, FIRST, 1024 * KIB + 512);
}

/* Its memory is there for others, although they come later; and they take turns with smaller pieces when it is short.
 */
static void clients_that_are_stuck_leave_the_memory_to_the_others(void **state)
{
    struct world *w = *state;
    struct client *c;
    struct bytes b = {0};

    w->set.budget.limit = 8 * CONN_PIECE;
    for (unsigned i = 0; i < 6; i++) {
        c = client_open(w, i, "web/vda", STRUCTURED);
        client_read(c, false);
        say_read(&b, 1, FIRST, FAR);
        say_read(&b, 2, FIRST, FAR);
        client_say(c, &b);
    }
    loop_until(&w->loop, w->set.budget.used > 7 * CONN_PIECE);
    c = client_open(w, 6, "web/vda", STRUCTURED);
    for (unsigned i = 1; i <= 20; i++)
        say_read(&b, i, FIRST, 1024 * KIB);
    client_say(c, &b);
    expect_reads(w, c, 20, FIRST, 1024 * KIB);
    assert_true(w->set.budget.most <= 8 * CONN_PIECE + 7 * CONN_PIECE_SHORT);
}

/* The daemon has so many VMs that their list is longer than what may be unsent. */
static void a_client_that_does_not_read_keeps_few_loans(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", SIMPLE);
    struct bytes b = {0};

    client_read(c, false);
    say_read(&b, 1, FIRST, FAR);
    client_say(c, &b);
    do {
        loop_turn(&w->loop, 1);
        assert_true(w->vms[0].source.nlent <= CONN_LOANS);
    } while (w->set.first->pull.ncopied == 0);
    client_read(c, true);
    want_simple(&b, 0, 1);
    put_raw(&b, w->vms[0].source.data + FIRST, FAR);
    client_expect(w, c, &b);
    assert_int_equal(w->vms[0].source.nlent, 0);
}

static void lists_that_nobody_reads_are_not_made(void **state)
{
    struct world *w = *state;
    struct vm *many[2000];
    struct client *c, *other;
    struct bytes b = {0};
    size_t most = 0;

    for (size_t i = 0; i < ARRAY_SIZE(many); i++)
        many[i] = &w->vms[0];
    c = client_greet(w, 0, SIMPLE);
    client_read(c, false);
    w->catalog = (struct catalog){.vms = many, .nvms = ARRAY_SIZE(many)};
    for (unsigned i = 0; i < 200; i++)
        say_option(&b, NBD_OPT_LIST, NULL);
    client_say(c, &b);
    loop_until(&w->loop, w->set.first->parked);
    for (unsigned i = 0; i < 50; i++) {
        loop_turn(&w->loop, 10);
        most = MAX(most, w->set.head_bytes);
    }
    assert_true(most <= CONN_MAX_UNSENT + 2000 * 2 * (CONN_CHUNK_COST + 128));
    /* It is its own time that passes, and others are served. */
    w->catalog.nvms = 1;
    other = client_open(w, 1, "web/vda", SIMPLE);
    assert_false(other->eof);
    w->config.handshake_timeout_ms = 100;
    client_read(c, true);
    loop_until(&w->loop, c->eof);
    assert_int_equal(w->set.head_bytes, 0);
}

static void a_client_that_reads_late_gets_all_its_lists(void **state)
{
    struct world *w = *state;
    struct vm *many[2000];
    struct client *c;
    struct bytes b = {0};
    size_t one;

    for (size_t i = 0; i < ARRAY_SIZE(many); i++)
        many[i] = &w->vms[0];
    w->catalog = (struct catalog){.vms = many, .nvms = ARRAY_SIZE(many)};
    c = client_greet(w, 0, SIMPLE);
    say_option(&b, NBD_OPT_LIST, NULL);
    client_say(c, &b);
    loop_until(&w->loop, c->in.len > 0);
    loop_turn(&w->loop, 100);
    one = c->in.len;
    bytes_done(&c->in);
    client_read(c, false);
    for (unsigned i = 0; i < 40; i++)
        say_option(&b, NBD_OPT_LIST, NULL);
    client_say(c, &b);
    loop_until(&w->loop, w->set.first->parked);
    client_read(c, true);
    loop_until(&w->loop, c->in.len >= 40 * one);
    loop_turn(&w->loop, 10);
    assert_int_equal(c->in.len, 40 * one);
}

/* Half a request is none. */
static void a_client_that_sends_a_byte_now_and_then_is_idle(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", STRUCTURED);
    struct bytes all = {0}, b = {0};
    uint64_t next = 0;
    size_t n = 0;

    say_read(&all, 1, 0, 4096);
    w->config.idle_timeout_ms = 1200;
    while (!c->eof && n + 1 < all.len) {
        loop_turn(&w->loop, 1);
        if (uv_now(&w->loop) < next)
            continue;
        next = uv_now(&w->loop) + 300;
        put_raw(&b, (char *)all.data + n++, 1);
        client_say(c, &b);
    }
    assert_true(c->eof);
    bytes_done(&all);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, world_set_up, world_tear_down)
#define LENT(name)                                                        \
    {                                                                     \
        "lent: " #name, name, world_set_up_lending, world_tear_down, NULL \
    }
    const struct CMUnitTest tests[] = {
        TEST(a_simple_reply_that_was_given_up_comes_whole_all_the_same),
        LENT(a_simple_reply_that_was_given_up_comes_whole_all_the_same),
        TEST(structured_replies_that_were_given_up_come_whole_all_the_same),
        LENT(structured_replies_that_were_given_up_come_whole_all_the_same),
        TEST(clients_that_are_stuck_leave_the_memory_to_the_others),
        LENT(clients_that_are_stuck_leave_the_memory_to_the_others),
        LENT(a_client_that_does_not_read_keeps_few_loans),
        TEST(lists_that_nobody_reads_are_not_made),
        TEST(a_client_that_reads_late_gets_all_its_lists),
        TEST(a_client_that_sends_a_byte_now_and_then_is_idle),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
