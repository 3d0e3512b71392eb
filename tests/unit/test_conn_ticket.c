/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * conn_ticket: a connection that names a ticket, over a real socket: what it opens, what it is told, and when the
 * ticket is good no more. The catalog is empty: by a name nobody gets anything here.
 */
#include "conn_world.h"

#include "ticket.h"

#define LINGER_MS 600000u /* for ever, as a test goes */

struct bearer {
    struct world *w;
    struct ticket_book book;
    struct vm_lease lease;
    char name[TICKET_NAME_SIZE];
};

static int set_up(void **state)
{
    struct bearer *b = calloc(1, sizeof(*b));
    struct failure why = {0};
    int r = world_set_up((void **)&b->w);

    b->book.linger_ms = LINGER_MS;
    b->lease = (struct vm_lease){.identity = "uid:4711", .checkpoint = "tuesday", .stay = {.vm = &b->w->vms[0]}};
    b->w->set.tickets = &b->book;
    b->w->catalog.nvms = 0;
    assert_int_equal(ticket_new(&b->book, &b->lease, "vdb", /* ends_ms= */ 0, b->name, &why), 0);
    *state = b;
    return r;
}

static int tear_down(void **state)
{
    struct bearer *b = *state;
    int r = world_tear_down((void **)&b->w);

    ticket_book_done(&b->book);
    free(b);
    return r;
}

static bool has(const struct bytes *all, const struct bytes *part)
{
    return all->len > 0 && memmem(all->data, all->len, part->data, part->len);
}

/* Whether an option with that name gets a good answer; told: all that was said to it, to be freed. */
static bool is_let_in(struct world *w, size_t i, const char *name, uint32_t option, struct bytes *told)
{
    static const uint16_t infos[] = {NBD_INFO_NAME, NBD_INFO_DESCRIPTION};
    size_t nothers = w->set.nopen;
    struct client *c = client_greet(w, i, STRUCTURED);
    struct bytes b = {0}, good = {0}, last = {0};
    bool well;

    say_info(&b, option, name, ARRAY_SIZE(infos), infos);
    say_option(&b, NBD_OPT_LIST, NULL); /* has an end, which errors have not; in transmission half a request */
    client_say(c, &b);
    want_reply(&good, option, NBD_REP_ACK, NULL);
    want_reply(&last, NBD_OPT_LIST, NBD_REP_ACK, NULL);
    loop_until(&w->loop, has(&c->in, &good) || has(&c->in, &last));
    well = has(&c->in, &good);
    bytes_done(&good);
    bytes_done(&last);
    if (told)
        put_raw(told, c->in.data, c->in.len);
    client_close(c);
    loop_until(&w->loop, w->set.nopen == nothers);
    bytes_done(&c->in);
    *c = (struct client){0};
    return well;
}

/* Like a name that never was, byte for byte. */
static void expect_unknown(struct bearer *b, const char *name, uint32_t option)
{
    char never[TICKET_NAME_SIZE], *at;
    struct bytes told = {0}, other = {0};

    (void)snprintf(never, sizeof(never), TICKET_PREFIX "%064d", 0);
    assert_false(is_let_in(b->w, 0, name, option, &told));
    assert_false(is_let_in(b->w, 0, never, option, &other));
    while ((at = memmem(told.data, told.len, name, strlen(name)))) /* it is said back */
        memcpy(at, never, strlen(never));
    assert_int_equal(told.len, other.len);
    assert_memory_equal(told.data, other.data, other.len);
    bytes_done(&told);
    bytes_done(&other);
}

static void expect_dead(struct bearer *b, const char *name)
{
    expect_unknown(b, name, NBD_OPT_GO);
    expect_unknown(b, name, NBD_OPT_INFO);
}

static void a_ticket_opens_its_disk_of_its_session_where_names_open_nothing(void **state)
{
    struct bearer *b = *state;
    struct client *c;
    struct bytes say = {0};

    assert_false(is_let_in(b->w, 0, "web/vdb", NBD_OPT_GO, NULL));
    c = client_open(b->w, 1, b->name, SIMPLE);
    assert_int_equal(b->w->vms[0].nentered, 1);
    assert_string_equal(b->w->vms[0].disk, "vdb");
    assert_string_equal(b->w->vms[0].checkpoint, "tuesday"); /* the session's, whose name he did not say */
    assert_string_equal(b->w->vms[0].identity, "uid:4711");  /* who began it */
    say_disc(&say);
    client_say(c, &say);
    loop_until(&b->w->loop, b->w->set.nopen == 0);
    assert_int_equal(b->w->vms[0].nleft, 1);
    assert_true(b->w->vms[0].last_disc);
    expect_dead(b, b->name); /* he has said goodbye */
    assert_int_equal(b->w->vms[0].nentered, 1);
}

static void expect_no_name(const struct bytes *told)
{
    static const char *const secrets[] = {"web", "vdb", "vda", "tuesday", "4711", "qcow2", "VM"};

    for (size_t i = 0; i < ARRAY_SIZE(secrets); i++)
        assert_null(memmem(told->data, told->len, secrets[i], strlen(secrets[i])));
}

static void its_bearer_is_not_told_whose_disk_it_is(void **state)
{
    struct bearer *b = *state;
    const uint32_t options[] = {NBD_OPT_INFO, NBD_OPT_GO};

    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        struct bytes told = {0};

        assert_true(is_let_in(b->w, 0, b->name, options[i], &told));
        expect_no_name(&told);
        bytes_done(&told);
    }
}

static bool heard(const struct client *c, const char *words)
{
    return c->in.len > 0 && memmem(c->in.data, c->in.len, words, strlen(words));
}

/* The log is told what he is not. */
static char *logged;

static void on_line(enum log_level level, const char *line)
{
    char *all;

    assert_true(asprintf(&all, "%s%s\n", logged ? logged : "", line) >= 0);
    free(logged);
    logged = all;
}

static void log_to_us(void)
{
    free(TAKE_PTR(logged));
    log_init_sink(LOG_LEVEL_DEBUG, on_line);
}

static void expect_logged(const char *words)
{
    log_init_sink(LOG_LEVEL_ERROR, NULL);
    assert_non_null(logged);
    assert_non_null(strstr(logged, words));
    free(TAKE_PTR(logged));
}

static void nor_by_a_map_that_cannot_be_read(void **state)
{
    const char *const queries[] = {"qemu:allocation-depth"};
    struct bearer *b = *state;
    struct client *c = client_greet(b->w, 0, STRUCTURED);
    struct bytes say = {0};

    log_to_us();
    say_meta(&say, NBD_OPT_SET_META_CONTEXT, b->name, 1, queries);
    say_info(&say, NBD_OPT_GO, b->name, 0, NULL);
    client_say(c, &say);
    loop_until(&b->w->loop, b->w->vms[0].nleft == 1);
    loop_turn(&b->w->loop, 2);
    expect_no_name(&c->in);
    assert_true(heard(c, "cannot be read"));
    expect_logged("of disk \"vdb\" could not be read");
    assert_true(is_let_in(b->w, 1, b->name, NBD_OPT_GO, NULL)); /* it is not used up */
}

static void nor_by_a_session_that_ends_under_his_reads(void **state)
{
    struct bearer *b = *state;
    struct client *c = client_open(b->w, 0, b->name, STRUCTURED);
    struct bytes say = {0};

    log_to_us();
    b->w->vms[0].source.hold = true;
    say_read(&say, 1, DISK_SIZE / 2, 64 * KIB);
    say_read(&say, 2, DISK_SIZE / 2, 128 * KIB);
    client_say(c, &say);
    loop_until(&b->w->loop, b->w->vms[0].source.nreads == 2);
    vm_lose(&b->w->vms[0], "session 1862c0f3 of VM 'web': disk vdb was for uid:4711");
    vm_release_reads(&b->w->vms[0]);
    loop_until(&b->w->loop, c->eof);
    expect_no_name(&c->in);
    assert_true(heard(c, "the session has ended"));
    expect_logged("session 1862c0f3 of VM 'web'");
}

static void a_name_that_may_be_a_ticket_is_not_logged(void **state)
{
    struct bearer *b = *state;
    char name[TICKET_NAME_SIZE];
    struct bytes say = {0};
    struct client *c;

    (void)snprintf(name, sizeof(name), "%.*sxy", (int)sizeof(name) - 3, b->name); /* nearly right */
    log_to_us();
    assert_false(is_let_in(b->w, 0, name, NBD_OPT_GO, NULL));
    c = client_greet(b->w, 1, SIMPLE);
    say_option_text(&say, NBD_OPT_EXPORT_NAME, name);
    client_say(c, &say);
    loop_until(&b->w->loop, c->eof);
    assert_null(strstr(logged, name));
    expect_logged("what it presented as a ticket is none");
}

static void asking_uses_nothing_up_and_several_connections_may_be_one_client(void **state)
{
    struct bearer *b = *state;

    for (size_t i = 0; i < 3; i++)
        assert_true(is_let_in(b->w, 0, b->name, NBD_OPT_INFO, NULL));
    assert_int_equal(b->w->vms[0].nentered, 0);
    (void)client_open(b->w, 1, b->name, SIMPLE);
    (void)client_open(b->w, 2, b->name, SIMPLE);
    assert_int_equal(b->w->vms[0].nentered, 2);
    /* One broke, another reads on; and he may come back. */
    client_close(&b->w->clients[1]);
    loop_until(&b->w->loop, b->w->vms[0].nleft == 1);
    assert_false(b->w->vms[0].last_disc);
    (void)client_open(b->w, 3, b->name, SIMPLE);
    client_close(&b->w->clients[2]);
    client_close(&b->w->clients[3]);
    loop_until(&b->w->loop, b->w->set.nopen == 0);
    (void)client_open(b->w, 4, b->name, SIMPLE);
}

static void after_its_time_it_is_as_if_it_had_never_been(void **state)
{
    struct bearer *b = *state;
    char name[TICKET_NAME_SIZE];
    struct failure why = {0};

    uv_update_time(&b->w->loop);
    assert_int_equal(ticket_new(&b->book, &b->lease, "vdb", uv_now(&b->w->loop), name, &why), 0);
    expect_dead(b, name);
    assert_int_equal(b->w->vms[0].nentered, 0);
    (void)client_open(b->w, 0, b->name, SIMPLE); /* the other is still good */
}

static void a_session_that_ends_takes_it_along_also_from_under_a_client(void **state)
{
    struct bearer *b = *state;

    (void)client_open(b->w, 5, b->name, SIMPLE);
    ticket_revoke(&b->book, &b->lease);
    expect_dead(b, b->name);
    vm_lose(&b->w->vms[0], "it has ended");
    loop_until(&b->w->loop, b->w->set.nopen == 0);
    expect_dead(b, b->name);
}

static void a_disk_that_the_session_has_not_is_unknown_too(void **state)
{
    struct bearer *b = *state;

    b->w->vms[0].list.ndisks = 1; /* no vdb */
    expect_dead(b, b->name);
    b->w->vms[0].list.ndisks = 2;
    assert_true(is_let_in(b->w, 0, b->name, NBD_OPT_GO, NULL));
}

static void who_is_not_let_in_has_not_used_it(void **state)
{
    struct bearer *b = *state;
    struct client *c;
    struct bytes say = {0};

    /* The session does not take him, for a reason that is not his to know. */
    (void)failure_set(&b->w->vms[0].refusal, -EBUSY, "VM \"web\" is in session for uid:4711");
    expect_unknown(b, b->name, NBD_OPT_GO);
    b->w->vms[0].refusal = (struct failure){0};
    /* He leaves before it does. */
    b->w->vms[0].hold_entering = true;
    c = client_greet(b->w, 6, SIMPLE);
    say_info(&say, NBD_OPT_GO, b->name, 0, NULL);
    client_say(c, &say);
    loop_until(&b->w->loop, b->w->vms[0].stays != NULL);
    client_close(c);
    loop_until(&b->w->loop, b->w->set.nopen == 0);
    b->w->vms[0].hold_entering = false;
    assert_true(is_let_in(b->w, 7, b->name, NBD_OPT_GO, NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_ticket_opens_its_disk_of_its_session_where_names_open_nothing, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(its_bearer_is_not_told_whose_disk_it_is, set_up, tear_down),
        cmocka_unit_test_setup_teardown(nor_by_a_map_that_cannot_be_read, set_up, tear_down),
        cmocka_unit_test_setup_teardown(nor_by_a_session_that_ends_under_his_reads, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_name_that_may_be_a_ticket_is_not_logged, set_up, tear_down),
        cmocka_unit_test_setup_teardown(asking_uses_nothing_up_and_several_connections_may_be_one_client, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(after_its_time_it_is_as_if_it_had_never_been, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_session_that_ends_takes_it_along_also_from_under_a_client, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_disk_that_the_session_has_not_is_unknown_too, set_up, tear_down),
        cmocka_unit_test_setup_teardown(who_is_not_let_in_has_not_used_it, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
