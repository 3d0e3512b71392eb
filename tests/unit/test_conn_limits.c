/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* conn: clients that wait, stall or flood: no client can make us keep more than the limits, or keep others out. */
#include "conn_world.h"

#include "conn_internal.h"

#include <unistd.h>

/* -- clients that hurt --------------------------------------------------------------------------------------------- */
static void a_silent_client_is_closed_in_time(void **state)
{
    struct world *w = *state;
    struct client *c;

    w->config.handshake_timeout_ms = 100;
    c = client_connect(w, 0);
    loop_until(&w->loop, c->eof);
    c = client_greet(w, 1, STRUCTURED);
    loop_until(&w->loop, c->eof);
}

static void the_time_a_session_takes_to_go_up_is_not_the_client_s(void **state)
{
    struct world *w = *state;
    struct client *c = client_greet(w, 0, STRUCTURED);
    struct bytes b = {0};
    uint64_t end;

    w->config.handshake_timeout_ms = 100;
    w->vms[0].hold_entering = true;
    say_info(&b, NBD_OPT_GO, "web/vda", 0, NULL);
    client_say(c, &b);
    end = uv_now(&w->loop) + 3 * CONN_TICK_MS;
    loop_until(&w->loop, uv_now(&w->loop) > end);
    w->vms[0].hold_entering = false;
    vm_answer_soon(&w->vms[0]);
    loop_until(&w->loop, w->vms[0].nentered == 1);
    assert_false(c->eof);
}

static void an_idle_client_is_closed_only_where_that_is_wanted(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", STRUCTURED);
    uint64_t end = uv_now(&w->loop) + 3 * CONN_TICK_MS;

    loop_until(&w->loop, uv_now(&w->loop) > end);
    assert_false(c->eof);
    w->config.idle_timeout_ms = 100;
    loop_until(&w->loop, c->eof);
}

/* 40 clients' worth of data is asked for, nothing is read: memory is the window, others are served, and it ends. */
static void a_client_that_does_not_read_costs_a_window_and_is_closed(void **state)
{
    struct world *w = *state;
    struct client *stuck = client_open(w, 0, "web/vda", STRUCTURED), *c;
    struct bytes b = {0};

    client_read(stuck, false);
    for (unsigned i = 0; i < 640; i++)
        say_read(&b, i, 1024 * KIB, 7168 * KIB);
    client_say(stuck, &b);
    loop_until(&w->loop, w->set.budget.used >= CONN_WINDOW - CONN_PIECE);
    c = client_open(w, 1, "web/vda", STRUCTURED);
    say_read(&b, 1, 256 * KIB, 4096);
    client_say(c, &b);
    loop_until(&w->loop, c->in.len >= 4096);
    assert_true(w->set.budget.most <= CONN_WINDOW + CONN_PIECE);
    w->config.idle_timeout_ms = 700;
    loop_until(&w->loop, w->vms[0].nleft >= 1);
    assert_false(w->vms[0].last_disc);
}

/* Requests that are refused at once have nothing in flight that would hold the client back. */
static void a_flood_of_refused_requests_is_not_read_on_without_end(void **state)
{
    struct world *w = *state;
    struct client *flood = client_open(w, 0, "web/vda", STRUCTURED);
    struct bytes b = {0};

    client_read(flood, false);
    for (unsigned i = 0; i < 200000; i++)
        say_read(&b, i, UINT64_C(1) << 40, 4096);
    client_say(flood, &b);
    loop_turn(&w->loop, 2000);
    assert_true(uv_stream_get_write_queue_size((uv_stream_t *)&flood->pipe) > 1024 * KIB);
}

static void with_all_places_taken_the_silent_make_way_and_the_working_do_not(void **state)
{
    struct world *w = *state;
    struct client *silent, *open, *c;

    w->config.max_connections = 2;
    open = client_open(w, 0, "web/vda", STRUCTURED);
    silent = client_connect(w, 1);
    loop_until(&w->loop, w->set.nconns == 2);
    c = client_open(w, 2, "web/vdb", STRUCTURED);
    loop_until(&w->loop, silent->eof);
    assert_false(open->eof || c->eof);
    c = client_connect(w, 3);
    loop_until(&w->loop, c->eof);
    assert_int_equal(c->in.len, 0);
    assert_false(open->eof);
    assert_int_equal(w->set.nevicted, 1);
    assert_int_equal(w->set.nrefused, 1);
}

/* A refusal opens nothing: whoever may see nothing could else hold all places. */
static void a_refused_client_makes_way_like_a_silent_one(void **state)
{
    struct world *w = *state;
    struct client *refused;
    struct bytes b = {0};

    w->config.max_connections = 2;
    (void)client_open(w, 0, "web/vda", STRUCTURED);
    refused = client_greet(w, 1, STRUCTURED);
    refused->in.len = 0;
    say_info(&b, NBD_OPT_GO, "no/such", 0, NULL);
    client_say(refused, &b);
    loop_until(&w->loop, refused->in.len > 0);
    (void)client_open(w, 2, "web/vdb", STRUCTURED);
    loop_until(&w->loop, refused->eof);
    assert_false(w->clients[0].eof);
}

/* A question can be asked for ever; who waits for a freeze keeps its place. */
static void who_asks_for_anything_but_go_makes_way_too(void **state)
{
    struct world *w = *state;
    struct client *list = client_greet(w, 0, STRUCTURED), *go = client_greet(w, 1, STRUCTURED);
    struct bytes b = {0};

    w->config.max_connections = 2;
    w->vms[0].hold_queries = w->vms[1].hold_queries = true;
    say_info(&b, NBD_OPT_GO, "web/vda", 0, NULL);
    client_say(go, &b);
    say_option(&b, NBD_OPT_LIST, NULL);
    client_say(list, &b);
    loop_until(&w->loop, w->set.first->asking && w->set.last->asking);
    (void)client_connect(w, 2);
    loop_until(&w->loop, list->eof);
    assert_false(go->eof);
    assert_false(w->clients[2].eof);
    w->vms[0].hold_queries = w->vms[1].hold_queries = false;
    vm_answer_soon(&w->vms[0]);
    loop_until(&w->loop, w->vms[0].nentered == 1);
}

/* They broke the protocol, were hung up on, and do not close: a flood of them is no flood of sockets. */
static void those_who_have_heard_the_last_word_are_few_too(void **state)
{
    struct world *w = *state;
    struct bytes b = {0};
    size_t most = 0;

    (void)client_open(w, CLIENTS_MAX - 1, "web/vda", STRUCTURED);
    for (size_t i = 0; i < CLIENTS_MAX - 1; i++) {
        struct client *c = client_connect(w, i);

        put32(&b, UINT32_MAX);
        client_say(c, &b);
        loop_until(&w->loop, c->eof);
        most = MAX(most, w->set.nopen);
    }
    assert_between(most, CONN_FAREWELLS_MAX, CONN_FAREWELLS_MAX + 8);
    assert_false(w->clients[CLIENTS_MAX - 1].eof);
}

static void lines_about_clients_are_few_in_a_second(void **state)
{
    struct world *w = *state;
    uint64_t end;

    for (unsigned i = 0; i < CONN_LINES_MAX; i++)
        assert_true(conn_limit_line(&w->set));
    assert_false(conn_limit_line(&w->set));
    assert_int_equal(w->set.nunsaid, 1);
    end = uv_now(&w->loop) + 1000;
    while (uv_now(&w->loop) < end) {
        usleep(50000);
        uv_update_time(&w->loop);
    }
    assert_true(conn_limit_line(&w->set));
    assert_int_equal(w->set.nunsaid, 0);
}

/* -- one client's limits ------------------------------------------------------------------------------------------- */
static void one_connection_too_many_of_a_client_is_told_so_and_let_go(void **state)
{
    struct world *w = *state;
    struct client *c;
    struct bytes b = {0};
    char said[1024] = {0};

    w->config.max_connections_per_client = 2;
    (void)client_open(w, 0, "web/vda", STRUCTURED);
    (void)client_open(w, 1, "web/vda", STRUCTURED);
    c = client_greet(w, 2, STRUCTURED);
    say_info(&b, NBD_OPT_GO, "web/vda", 0, NULL);
    client_say(c, &b);
    loop_until(&w->loop, c->eof);
    memcpy(said, c->in.data, MIN(c->in.len, sizeof said - 1));
    for (size_t i = 0; i < c->in.len && i < sizeof said; i++)
        said[i] = said[i] ? said[i] : ' ';
    assert_non_null(strstr(said, " has 2 connections already"));
    assert_non_null(strstr(said, "--max-connections-per-client"));
    assert_int_equal(w->set.nrefused, 1);
    client_close(&w->clients[1]);
    loop_until(&w->loop, w->set.nopen == 1);
    (void)client_open(w, 3, "web/vda", STRUCTURED); /* there is a place again */
}

static void a_client_s_own_silent_connections_make_way_before_it_has_too_many(void **state)
{
    struct world *w = *state;

    w->config.max_connections_per_client = 2;
    (void)client_connect(w, 0);
    loop_until(&w->loop, w->set.nconns == 1);
    (void)client_connect(w, 1);
    loop_until(&w->loop, w->set.nconns == 2);
    (void)client_open(w, 2, "web/vda", STRUCTURED);
    loop_until(&w->loop, w->clients[0].eof);
    assert_false(w->clients[1].eof);
    assert_int_equal(w->set.nevicted, 1);
    assert_int_equal(w->set.nrefused, 0);
}

static void those_that_are_refused_are_few_at_a_time_too(void **state)
{
    struct world *w = *state;
    struct client *c;

    w->config.max_connections = 256;
    w->config.max_connections_per_client = 1;
    (void)client_open(w, 0, "web/vda", STRUCTURED);
    for (size_t i = 1; i <= CONN_REFUSED_MAX; i++) { /* these say nothing, and are heard out */
        (void)client_connect(w, i);
        loop_until(&w->loop, w->set.nconns == i + 1);
    }
    c = client_connect(w, CONN_REFUSED_MAX + 1);
    loop_until(&w->loop, c->eof);
    for (size_t i = 0; i <= CONN_REFUSED_MAX; i++)
        assert_false(w->clients[i].eof);
    assert_int_equal(w->set.nrefused, CONN_REFUSED_MAX + 1);
}

/* -- rate ---------------------------------------------------------------------------------------------------------- */
static void a_session_s_rate_slows_its_reads_and_changes_no_byte(void **state)
{
    struct world *w = *state;
    struct client *c[2];
    uint64_t before = uv_hrtime();
    struct bytes b = {0};

    w->vms[0].rate = 4u << 20;
    for (size_t i = 0; i < 2; i++)
        c[i] = client_open(w, i, "web/vda", SIMPLE);
    for (size_t i = 0; i < 2; i++) {
        say_read(&b, 1, 1024 * KIB, 1024 * KIB);
        client_say(c[i], &b);
    }
    loop_until(&w->loop, c[0]->in.len >= 1024 * KIB + 16 && c[1]->in.len >= 1024 * KIB + 16);
    /* 2 MiB, but for the first piece, at 4 MiB a second */
    assert_true(uv_hrtime() - before >= UINT64_C(400000000));
    for (size_t i = 0; i < 2; i++) {
        assert_int_equal(c[i]->in.len, 1024 * KIB + 16);
        assert_memory_equal(c[i]->in.data + 16, w->vms[0].source.data + 1024 * KIB, 1024 * KIB);
    }
}

static void a_client_that_leaves_while_it_waits_for_the_rate_leaves_nothing(void **state)
{
    struct world *w = *state;
    struct client *c[3];
    struct bytes b = {0};

    w->vms[0].rate = CONFIG_RATE_LEAST;
    for (size_t i = 0; i < 3; i++) {
        c[i] = client_open(w, i, "web/vda", STRUCTURED);
        say_read(&b, 1, 1024 * KIB, 1024 * KIB);
        client_say(c[i], &b);
    }
    loop_turn(&w->loop, 20);
    client_close(c[0]);
    loop_until(&w->loop, w->vms[0].nleft == 1);
    vm_lose(&w->vms[0], "gone");
    for (size_t i = 1; i < 3; i++) {
        loop_until(&w->loop, c[i]->eof);
        client_close(c[i]);
    }
    loop_until(&w->loop, w->set.nopen == 0);
    assert_null(w->set.rates.buckets);
}

/* -- budget -------------------------------------------------------------------------------------------------------- */
struct taker {
    struct budget_user user;
    struct budget *budget;
    void *held[8];
    unsigned nheld, nwanted;
};

static void on_room(struct budget_user *u)
{
    struct taker *t = container_of(u, struct taker, user);

    while (t->nheld < t->nwanted &&
           (t->held[t->nheld] = budget_reserve(t->budget, u, KIB) ? budget_buffer(t->budget, KIB) : NULL))
        t->nheld++;
}

static void give_one(struct taker *t)
{
    t->nwanted = 0;
    budget_give(t->budget, &t->user, t->held[--t->nheld], KIB);
}

static void everybody_gets_one_buffer_and_those_who_wait_take_turns(void **state)
{
    struct budget b;
    struct taker t[4] = {{.nwanted = 8}, {.nwanted = 3}, {.nwanted = 3}, {.nwanted = 3}};

    budget_init(&b, 8 * KIB, KIB, 2);
    for (size_t i = 0; i < ARRAY_SIZE(t); i++) {
        t[i].budget = &b;
        t[i].user.on_room = on_room;
        on_room(&t[i].user);
        assert_int_equal(t[i].nheld, i == 0 ? 8 : 1); /* the limit is reached, and still one for each */
    }
    for (unsigned i = 0; i < 3; i++)
        give_one(&t[0]); /* down to the limit */
    for (size_t i = 1; i < ARRAY_SIZE(t); i++) {
        assert_int_equal(t[i].nheld, 1);
        give_one(&t[0]);
        assert_int_equal(t[i].nheld, 2); /* in turn */
    }
    budget_forget(&b, &t[1].user);
    give_one(&t[0]);
    assert_int_equal(t[1].nheld, 2);
    assert_int_equal(t[2].nheld, 3);
    for (size_t i = 0; i < ARRAY_SIZE(t); i++)
        while (t[i].nheld > 0)
            give_one(&t[i]);
    assert_int_equal(b.used, 0);
    assert_int_equal(budget_spare_bytes(&b), 2 * KIB);
    budget_done(&b);
}

static void what_is_kept_spare_makes_room_for_other_sizes(void **state)
{
    struct budget_user u = {.on_room = NULL};
    void *held[8];
    struct budget b;

    budget_init(&b, 8 * KIB, KIB, 8);
    for (unsigned i = 0; i < 8; i++) {
        assert_true(budget_reserve(&b, &u, KIB));
        held[i] = budget_buffer(&b, KIB);
    }
    for (unsigned i = 0; i < 8; i++)
        budget_give(&b, &u, held[i], KIB);
    assert_int_equal(budget_spare_bytes(&b), 8 * KIB);
    for (unsigned i = 0; i < 8; i++) {
        assert_true(budget_reserve(&b, &u, KIB / 2));
        held[i] = budget_buffer(&b, KIB / 2);
        assert_true(b.used + budget_spare_bytes(&b) <= 8 * KIB);
    }
    assert_int_equal(budget_spare_bytes(&b), 4 * KIB);
    for (unsigned i = 0; i < 8; i++)
        budget_give(&b, &u, held[i], KIB / 2);
    budget_done(&b);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, world_set_up, world_tear_down)
    const struct CMUnitTest tests[] = {
        TEST(a_silent_client_is_closed_in_time),
        TEST(the_time_a_session_takes_to_go_up_is_not_the_client_s),
        TEST(an_idle_client_is_closed_only_where_that_is_wanted),
        TEST(a_client_that_does_not_read_costs_a_window_and_is_closed),
        TEST(a_flood_of_refused_requests_is_not_read_on_without_end),
        TEST(with_all_places_taken_the_silent_make_way_and_the_working_do_not),
        TEST(a_refused_client_makes_way_like_a_silent_one),
        TEST(who_asks_for_anything_but_go_makes_way_too),
        TEST(those_who_have_heard_the_last_word_are_few_too),
        TEST(lines_about_clients_are_few_in_a_second),
        TEST(a_client_s_own_silent_connections_make_way_before_it_has_too_many),
        TEST(one_connection_too_many_of_a_client_is_told_so_and_let_go),
        TEST(those_that_are_refused_are_few_at_a_time_too),
        TEST(a_session_s_rate_slows_its_reads_and_changes_no_byte),
        TEST(a_client_that_leaves_while_it_waits_for_the_rate_leaves_nothing),
        cmocka_unit_test(everybody_gets_one_buffer_and_those_who_wait_take_turns),
        cmocka_unit_test(what_is_kept_spare_makes_room_for_other_sizes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
