/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "fair.h"

#include "config.h"
#include "lib/loop.h"
#include "lib/test.h"

#define NMEMBERS 12

struct world {
    uv_loop_t loop;
    struct fair fair;
    bool enough; /* nobody begins to read any more */
    struct member {
        struct fair_member m;
        struct world *world;
        unsigned nturns, nreads;
        unsigned wants; /* turns more */
    } members[NMEMBERS];
    unsigned order[64], norder; /* who had its turn: index of the member */
};

static void on_requests(struct fair_member *m)
{
    struct member *me = container_of(m, struct member, m);
    struct world *w = me->world;

    me->nturns++;
    if (w->norder < ARRAY_SIZE(w->order))
        w->order[w->norder++] = (unsigned)(me - w->members);
    if (me->wants && --me->wants)
        fair_queue(m);
}

/* Begins as many as it may. */
static void on_read(struct fair_member *m)
{
    struct member *me = container_of(m, struct member, m);

    while (!me->world->enough && me->nreads < 1000 && fair_may_read(m)) {
        fair_read_begun(m);
        me->nreads++;
    }
}

static void end_reads(struct member *me, unsigned n)
{
    while (n--) {
        me->nreads--;
        fair_read_done(&me->m);
    }
}

static int set_up(void **state)
{
    struct world *w = calloc(1, sizeof(*w));

    assert_non_null(w);
    loop_init(&w->loop);
    assert_int_equal(fair_init(&w->fair, &w->loop), 0);
    *state = w;
    return 0;
}

static void join_vm(struct world *w, unsigned i, const char *client, const char *vm)
{
    struct member *me = &w->members[i];

    me->world = w;
    me->m.on_requests = on_requests;
    me->m.on_read = on_read;
    assert_int_equal(fair_join(&w->fair, &me->m, client), 0);
    assert_int_equal(fair_join_reads(&w->fair, &me->m, vm), 0);
}

static void join(struct world *w, unsigned i, const char *client)
{
    join_vm(w, i, client, "vm");
}

static int tear_down(void **state)
{
    struct world *w = *state;

    for (unsigned i = 0; i < NMEMBERS; i++)
        fair_leave(&w->members[i].m);
    fair_close(&w->fair, NULL);
    loop_done(&w->loop);
    free(w);
    return 0;
}

static void who_is_alone_reads_as_much_as_it_likes(void **state)
{
    struct world *w = *state;

    join(w, 0, "a");
    assert_true(fair_is_alone(&w->fair));
    on_read(&w->members[0].m);
    assert_int_equal(w->members[0].nreads, 1000);
    end_reads(&w->members[0], 1000);
}

static void two_clients_read_half_each_however_many_connections_they_have(void **state)
{
    struct world *w = *state;
    unsigned ngreedy = 0;

    for (unsigned i = 0; i < NMEMBERS - 1; i++)
        join(w, i, "greedy");
    join(w, NMEMBERS - 1, "one");
    assert_false(fair_is_alone(&w->fair));
    on_read(&w->members[NMEMBERS - 1].m); /* still alone with its reads */
    end_reads(&w->members[NMEMBERS - 1], 1000 - 1);
    for (unsigned i = 0; i < NMEMBERS - 1; i++) {
        on_read(&w->members[i].m);
        ngreedy += w->members[i].nreads;
    }
    assert_int_equal(ngreedy, FAIR_READS / 2);
    on_read(&w->members[NMEMBERS - 1].m);
    assert_int_equal(w->members[NMEMBERS - 1].nreads, FAIR_READS / 2);
    /* A read that ends makes room for the next connection of the same client. */
    assert_int_equal(w->members[1].nreads, 0);
    end_reads(&w->members[0], 1); /* which was the first to wait: it begins the next one, and goes to the end */
    assert_int_equal(w->members[0].nreads, FAIR_READS / 2);
    end_reads(&w->members[0], 1);
    assert_int_equal(w->members[0].nreads, FAIR_READS / 2 - 1);
    assert_int_equal(w->members[1].nreads, 1);
    /* And when the other one has done, all is the first one's. */
    end_reads(&w->members[NMEMBERS - 1], FAIR_READS / 2);
    end_reads(&w->members[1], 1);
    assert_true(w->members[2].nreads > 0);
    w->enough = true;
    for (unsigned i = 0; i < NMEMBERS; i++)
        end_reads(&w->members[i], w->members[i].nreads);
}

static void who_reads_from_another_qemu_takes_no_part(void **state)
{
    struct world *w = *state;

    join_vm(w, 0, "a", "vm");
    join_vm(w, 1, "a", "vm");
    join_vm(w, 2, "b", "other vm");
    join_vm(w, 3, "c", "vm");
    for (unsigned i = 0; i < 3; i++) {
        on_read(&w->members[i].m);
        assert_int_equal(w->members[i].nreads, 1000);
    }
    end_reads(&w->members[0], 1000);
    end_reads(&w->members[1], 1000 - 1);
    on_read(&w->members[3].m);
    assert_int_equal(w->members[3].nreads, FAIR_READS / 2);
    w->enough = true;
    for (unsigned i = 0; i < 4; i++)
        end_reads(&w->members[i], w->members[i].nreads);
}

static void memory_is_shared_by_clients_while_several_read(void **state)
{
    struct world *w = *state;

    join(w, 0, "a");
    join(w, 1, "a");
    join_vm(w, 2, "b", "other vm");
    fair_read_begun(&w->members[0].m);
    assert_int_equal(fair_part(&w->members[0].m, 1000), 1000);
    fair_read_begun(&w->members[2].m);
    assert_int_equal(fair_part(&w->members[0].m, 1000), 250);
    assert_int_equal(fair_part(&w->members[1].m, 1000), 250);
    assert_int_equal(fair_part(&w->members[2].m, 1000), 500);
    fair_read_done(&w->members[2].m);
    assert_int_equal(fair_part(&w->members[1].m, 1000), 1000);
    fair_read_done(&w->members[0].m);
}

static void clients_take_turns_and_not_connections(void **state)
{
    struct world *w = *state;

    for (unsigned i = 0; i < NMEMBERS - 1; i++)
        join(w, i, "many");
    join(w, NMEMBERS - 1, "one");
    for (unsigned i = 0; i < NMEMBERS; i++) {
        w->members[i].wants = i == NMEMBERS - 1 ? 3 : 1;
        fair_queue(&w->members[i].m);
        fair_queue(&w->members[i].m); /* twice is once */
    }
    loop_until(&w->loop, w->norder == NMEMBERS - 1 + 3);
    assert_int_equal(w->members[NMEMBERS - 1].nturns, 3);
    /* Its three turns are among the first six, although eleven others came before it. */
    for (unsigned i = 0, n = 0; i < 6; i++) {
        n += w->order[i] == NMEMBERS - 1;
        if (i == 5)
            assert_int_equal(n, 3);
    }
    loop_turn(&w->loop, 3);
    assert_int_equal(w->norder, NMEMBERS - 1 + 3);
}

static void who_leaves_has_no_turn_any_more(void **state)
{
    struct world *w = *state;

    join(w, 0, "a");
    join(w, 1, "b");
    fair_queue(&w->members[0].m);
    fair_queue(&w->members[1].m);
    fair_leave(&w->members[0].m);
    assert_true(fair_is_alone(&w->fair));
    loop_until(&w->loop, w->norder == 1);
    assert_int_equal(w->order[0], 1);
    fair_leave(&w->members[0].m); /* twice is no harm */
    assert_true(fair_may_read(&w->members[0].m));
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(who_is_alone_reads_as_much_as_it_likes),
        TEST(two_clients_read_half_each_however_many_connections_they_have),
        TEST(who_reads_from_another_qemu_takes_no_part),
        TEST(memory_is_shared_by_clients_while_several_read),
        TEST(clients_take_turns_and_not_connections),
        TEST(who_leaves_has_no_turn_any_more),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
