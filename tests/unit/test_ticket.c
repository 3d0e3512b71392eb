/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* ticket: who finds which one, when, and who does not any more. */
#include "test.h"

#include "config.h"
#include "ticket.h"

#include <errno.h>
#include <stdio.h>

#define LINGER_MS 1000u

/* Two leases: tickets know them by their address only. */
static const char leases[2];
#define LEASE(i) ((const struct vm_lease *)(const void *)&leases[i])

static const struct ticket_who alice = {"x509:CN=alice", "ip:192.0.2.7", 0};
static const struct ticket_who bob = {"x509:CN=bob", "ip:192.0.2.7", 0};
static const struct ticket_who far_alice = {"x509:CN=alice", "ip:192.0.2.8", 0};
static const struct ticket_who process = {"uid:0", "uid:0", 17}, other_process = {"uid:0", "uid:0", 18};

static int set_up(void **state)
{
    static struct ticket_book b;

    b = (struct ticket_book){.linger_ms = LINGER_MS};
    *state = &b;
    return 0;
}

static int tear_down(void **state)
{
    struct ticket_book *b = *state;

    ticket_book_done(b);
    assert_int_equal(b->ntickets, 0);
    return 0;
}

static void make(struct ticket_book *b, unsigned lease, const char *disk, uint64_t ends_ms, char *name)
{
    struct failure f = {0};

    assert_int_equal(ticket_new(b, LEASE(lease), disk, ends_ms, name, &f), 0);
}

static void its_name_is_256_random_bits_and_is_found_whole_only(void **state)
{
    char name[TICKET_NAME_SIZE], other[TICKET_NAME_SIZE], wrong[TICKET_NAME_SIZE + 8];

    make(*state, 0, "vda", 0, name);
    make(*state, 0, "vda", 0, other);
    assert_int_equal(strlen(name), strlen("ticket-") + 64);
    assert_int_equal(strspn(name + strlen("ticket-"), "0123456789abcdef"), 64);
    assert_string_not_equal(name, other);
    assert_non_null(ticket_find(*state, name, &alice, 1));
    assert_string_equal(ticket_disk(ticket_find(*state, other, &alice, 1)), "vda");
    assert_ptr_equal(ticket_lease(ticket_find(*state, name, &alice, 1)), LEASE(0));
    for (size_t i = 0; i < strlen(name); i++) { /* each character, and each length, counts */
        (void)strcpy(wrong, name);
        wrong[i] = wrong[i] == 'a' ? 'b' : 'a';
        assert_null(ticket_find(*state, wrong, &alice, 1));
        wrong[i] = 0;
        assert_null(ticket_find(*state, wrong, &alice, 1));
    }
    (void)snprintf(wrong, sizeof wrong, "%s0", name);
    assert_null(ticket_find(*state, wrong, &alice, 1));
    assert_null(ticket_find(*state, "", &alice, 1));
    assert_null(ticket_find(*state, "vm/vda", &alice, 1));
}

static void what_looks_like_one_is_known_as_such(void **state)
{
    assert_true(ticket_is_meant("ticket-"));
    assert_true(ticket_is_meant("ticket-00"));
    assert_false(ticket_is_meant("ticket"));
    assert_false(ticket_is_meant("vm/ticket-00"));
    assert_false(ticket_is_meant("0123456789abcdef0123456789abcdef/vda")); /* a UUID as a VM's name */
    assert_true(ticket_is_meant("vm/0123456789abcdef0123456789ABCDEF0123456789"));
}

static void looking_at_it_binds_it_to_nobody(void **state)
{
    char name[TICKET_NAME_SIZE];

    make(*state, 0, "vda", 0, name);
    assert_non_null(ticket_find(*state, name, &alice, 1));
    assert_non_null(ticket_find(*state, name, &bob, 1));
}

static void the_first_who_opens_it_may_do_so_several_times_and_nobody_else_may(void **state)
{
    char name[TICKET_NAME_SIZE];
    struct ticket *t;

    make(*state, 0, "vda", 0, name);
    t = ticket_find(*state, name, &alice, 1);
    for (unsigned i = 0; i < 4; i++) {
        assert_ptr_equal(ticket_find(*state, name, &alice, 1), t);
        ticket_enter(t, &alice);
    }
    assert_null(ticket_find(*state, name, &bob, 1));
    assert_null(ticket_find(*state, name, &far_alice, 1));
    assert_null(ticket_find(*state, name, &process, 1));
    for (unsigned i = 0; i < 3; i++)
        ticket_leave(*state, t, /* used= */ true, /* well= */ true, 2);
    assert_non_null(ticket_find(*state, name, &alice, 2)); /* one connection is left */
    ticket_leave(*state, t, true, true, 3);
    assert_null(ticket_find(*state, name, &alice, 3));
    assert_null(ticket_find(*state, name, &bob, 3));
}

static void on_a_unix_socket_a_client_is_a_process(void **state)
{
    char name[TICKET_NAME_SIZE];
    struct ticket *t;

    make(*state, 0, "vda", 0, name);
    t = ticket_find(*state, name, &process, 1);
    ticket_enter(t, &process);
    assert_null(ticket_find(*state, name, &other_process, 1));
    assert_non_null(ticket_find(*state, name, &process, 1));
    ticket_leave(*state, t, true, true, 2);
}

static void whose_connection_broke_may_come_back_within_linger(void **state)
{
    char name[TICKET_NAME_SIZE];
    struct ticket *t;

    make(*state, 0, "vda", 0, name);
    t = ticket_find(*state, name, &alice, 1);
    ticket_enter(t, &alice);
    ticket_leave(*state, t, true, /* well= */ false, 100);
    assert_null(ticket_find(*state, name, &bob, 101));
    assert_non_null(ticket_find(*state, name, &alice, 100 + LINGER_MS - 1));
    assert_null(ticket_find(*state, name, &alice, 100 + LINGER_MS));
    ticket_enter(t, &alice); /* it was found in time */
    assert_non_null(ticket_find(*state, name, &alice, 100 + 5 * LINGER_MS));
    ticket_leave(*state, t, true, true, 100 + 6 * LINGER_MS);
    assert_null(ticket_find(*state, name, &alice, 100 + 6 * LINGER_MS));
}

static void who_was_not_let_in_has_not_used_it(void **state)
{
    char name[TICKET_NAME_SIZE];
    struct ticket *t;

    make(*state, 0, "vda", 0, name);
    t = ticket_find(*state, name, &alice, 1);
    ticket_enter(t, &alice);
    assert_null(ticket_find(*state, name, &bob, 1));
    ticket_leave(*state, t, /* used= */ false, false, 1);
    assert_non_null(ticket_find(*state, name, &bob, 1));
}

static void at_its_end_it_is_found_no_more(void **state)
{
    char name[TICKET_NAME_SIZE];

    make(*state, 0, "vda", 5000, name);
    assert_non_null(ticket_find(*state, name, &alice, 4999));
    assert_null(ticket_find(*state, name, &alice, 5000));
}

static void those_of_a_session_go_with_it_and_others_stay(void **state)
{
    char name[TICKET_NAME_SIZE], used[TICKET_NAME_SIZE], other[TICKET_NAME_SIZE];
    struct ticket *t;
    unsigned ngood, nused;

    make(*state, 0, "vda", 0, name);
    make(*state, 0, "vdb", 0, used);
    make(*state, 1, "vda", 0, other);
    t = ticket_find(*state, used, &alice, 1);
    ticket_enter(t, &alice);
    ticket_count(*state, LEASE(0), 1, &ngood, &nused);
    assert_int_equal(ngood, 2);
    assert_int_equal(nused, 1);
    ticket_revoke(*state, LEASE(0));
    assert_null(ticket_find(*state, name, &alice, 1));
    assert_null(ticket_find(*state, used, &alice, 1));
    assert_null(ticket_lease(t));
    assert_non_null(ticket_find(*state, other, &alice, 1));
    ticket_leave(*state, t, true, true, 1); /* the last touch: it is freed */
    ticket_count(*state, LEASE(0), 1, &ngood, &nused);
    assert_int_equal(ngood + nused, 0);
}

static void there_are_no_more_than_the_limit(void **state)
{
    struct ticket_book *b = *state;
    char name[TICKET_NAME_SIZE];
    struct failure f = {0};

    for (unsigned i = 0; i < TICKETS_MAX; i++)
        make(b, 0, "vda", 0, name);
    assert_int_equal(ticket_new(b, LEASE(1), "vda", 0, name, &f), -EMFILE);
    assert_non_null(strstr(f.text, "tickets already"));
    ticket_revoke(b, LEASE(0));
    make(b, 1, "vda", 0, name);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(its_name_is_256_random_bits_and_is_found_whole_only),
        TEST(what_looks_like_one_is_known_as_such),
        TEST(looking_at_it_binds_it_to_nobody),
        TEST(the_first_who_opens_it_may_do_so_several_times_and_nobody_else_may),
        TEST(on_a_unix_socket_a_client_is_a_process),
        TEST(whose_connection_broke_may_come_back_within_linger),
        TEST(who_was_not_let_in_has_not_used_it),
        TEST(at_its_end_it_is_found_no_more),
        TEST(those_of_a_session_go_with_it_and_others_stay),
        TEST(there_are_no_more_than_the_limit),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
