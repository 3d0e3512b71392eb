/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "client_world.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* ---- connecting ---- */

static void a_greeting_leads_to_command_mode(void **state)
{
    struct world w;

    world_init(&w, NULL);
    world_connect(&w, &quick);
    assert_int_equal(qmp_client_open(w.client), -EALREADY);
    assert_string_equal(qmp_client_path(w.client), fake_qemu_path(w.qemu));
    assert_int_equal(qmp_client_peer_pid(w.client), 0);
    loop_until(&w.loop, w.nready == 1);
    assert_int_equal(w.nlost, 0);
    assert_non_null(strstr(w.greeting, "\"major\":7"));
    assert_int_equal(qmp_client_peer_pid(w.client), getpid());
    round_trip(&w);
    world_down(&w);
}

static void bytes_may_come_one_at_a_time(void **state)
{
    struct world w;

    world_up(&w, &(struct fake_qemu_options){.write_size = 1});
    round_trip(&w);
    world_down(&w);
}

static void a_path_longer_than_an_address_works(void **state)
{
    char name[201];
    struct world w;

    memset(name, 'n', sizeof(name) - 1);
    name[sizeof(name) - 1] = '\0';
    world_up(&w, &(struct fake_qemu_options){.name = name});
    round_trip(&w);
    fake_qemu_stop(w.qemu);
    loop_until(&w.loop, w.nlost > 1);
    assert_int_equal(w.why.err, -ENOENT);
    fake_qemu_start(w.qemu);
    loop_until(&w.loop, w.nready == 2);
    world_down(&w);
}

static void nobody_there_is_said_and_tried_again(void **state)
{
    struct world w;

    world_init(&w, NULL);
    fake_qemu_stop(w.qemu);
    world_connect(&w, &quick);
    assert_int_equal(w.nlost, 0); /* never from within */
    loop_until(&w.loop, w.nlost >= 3);
    assert_int_equal(w.why.err, -ENOENT);
    assert_non_null(strstr(w.why.text, fake_qemu_path(w.qemu)));
    fake_qemu_start(w.qemu);
    loop_until(&w.loop, w.nready == 1);
    round_trip(&w);
    world_down(&w);
}

static void a_socket_without_a_listener_is_said(void **state)
{
    struct world w;
    int fd;

    world_init(&w, NULL);
    fake_qemu_stop(w.qemu);
    fd = open(fake_qemu_path(w.qemu), O_CREAT | O_CLOEXEC | O_WRONLY, 0600);
    assert_true(fd >= 0);
    close(fd);
    world_connect(&w, &quick);
    loop_until(&w.loop, w.nlost >= 1);
    assert_int_equal(w.why.err, -ECONNREFUSED);
    assert_int_equal(unlink(fake_qemu_path(w.qemu)), 0);
    world_down(&w);
}

static void pauses_between_attempts_double_up_to_the_limit(void **state)
{
    static const unsigned pauses_ms[] = {8, 16, 20, 20};
    struct world w;

    world_init(&w, NULL);
    fake_qemu_stop(w.qemu);
    world_connect(&w, &(struct qmp_client_limits){.reconnect_min_ms = 8, .reconnect_max_ms = 20});
    loop_until(&w.loop, w.nlost >= ARRAY_SIZE(pauses_ms) + 1);
    for (size_t i = 0; i < ARRAY_SIZE(pauses_ms); i++)
        assert_true(w.lost_at[i + 1] - w.lost_at[i] >= pauses_ms[i]);
    world_down(&w);
}

static void pauses_do_not_grow_beyond_the_limit(void **state)
{
    struct world w;

    world_init(&w, NULL);
    fake_qemu_stop(w.qemu);
    world_connect(&w, &(struct qmp_client_limits){.reconnect_min_ms = 1, .reconnect_max_ms = 2});
    loop_until(&w.loop, w.nlost >= 20); /* doubling without end, that would be a week */
    world_down(&w);
}

static void the_pause_is_short_again_after_command_mode(void **state)
{
    struct world w;

    world_init(&w, NULL);
    fake_qemu_stop(w.qemu);
    world_connect(&w, &(struct qmp_client_limits){.reconnect_min_ms = 8, .reconnect_max_ms = 120000});
    loop_until(&w.loop, w.nlost >= 6); /* the next pauses would be 512 ms, and then a second */
    fake_qemu_start(w.qemu);
    loop_until(&w.loop, w.nready == 1);
    w.nlost = 0;
    fake_qemu_stop(w.qemu);
    loop_until(&w.loop, w.nlost >= 2);
    assert_true(w.lost_at[1] - w.lost_at[0] < 400);
    world_down(&w);
}

static void a_greeting_that_never_comes_is_another_clients_fault(void **state)
{
    struct world w;

    world_init(&w, &(struct fake_qemu_options){.mute = true});
    world_connect(&w, &(struct qmp_client_limits){.greeting_timeout_ms = SHORT_MS, .reconnect_min_ms = 1});
    loop_until(&w.loop, w.nlost >= 2);
    assert_int_equal(w.why.err, -ETIMEDOUT);
    assert_non_null(strstr(w.why.text, "another client"));
    fake_qemu_set_mute(w.qemu, false);
    loop_until(&w.loop, w.nready == 1);
    round_trip(&w);
    world_down(&w);
}

static void an_error_instead_of_a_greeting_is_why_it_does_not_come(void **state)
{
    static const char error[] = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"all places are taken\"}}\r\n";
    struct world w;

    world_init(&w, &(struct fake_qemu_options){.mute = true});
    world_connect(&w, &(struct qmp_client_limits){.reconnect_min_ms = 1});
    loop_until(&w.loop, fake_qemu_nclients(w.qemu) == 1);
    fake_qemu_set_mute(w.qemu, false);
    fake_qemu_send(w.qemu, error, sizeof(error) - 1);
    loop_until(&w.loop, w.nlost == 1);
    assert_non_null(strstr(w.why.text, "turns us away: all places are taken"));
    fake_qemu_hangup(w.qemu);
    loop_until(&w.loop, w.nready == 1);
    world_down(&w);
}

static void a_second_client_waits_until_the_first_has_gone(void **state)
{
    struct world w, second = {.clock = &w.loop};

    world_up(&w, NULL);
    assert_int_equal(qmp_client_new(&w.loop, fake_qemu_path(w.qemu), &world_ops, &second,
                                    &(struct qmp_client_limits){.greeting_timeout_ms = SHORT_MS}, &second.client),
                     0);
    assert_int_equal(qmp_client_open(second.client), 0);
    loop_until(&w.loop, second.nlost >= 1);
    assert_int_equal(second.why.err, -ETIMEDOUT);
    world_close(&w);
    loop_until(&w.loop, second.nready == 1);
    world_close(&second);
    free(second.greeting);
    world_down(&w);
    assert_true(second.closed);
}

static void a_full_queue_of_others_is_said(void **state)
{
    struct world w, others[4] = {0};
    unsigned nfull = 0;

    world_up(&w, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(others); i++) {
        others[i].clock = &w.loop;
        assert_int_equal(
            qmp_client_new(&w.loop, fake_qemu_path(w.qemu), &world_ops, &others[i], NULL, &others[i].client), 0);
        assert_int_equal(qmp_client_open(others[i].client), 0);
    }
    loop_until(&w.loop, others[ARRAY_SIZE(others) - 1].nlost >= 1);
    for (size_t i = 0; i < ARRAY_SIZE(others); i++) {
        if (others[i].nlost > 0) {
            assert_int_equal(others[i].why.err, -EAGAIN);
            assert_non_null(strstr(others[i].why.text, "other clients"));
            nfull++;
        }
        world_close(&others[i]);
    }
    assert_true(nfull > 0);
    world_down(&w);
}

static void refused_capabilities_are_a_protocol_error(void **state)
{
    struct world w;

    world_init(&w, &(struct fake_qemu_options){.refuse_capabilities = true});
    world_connect(&w, &quick);
    loop_until(&w.loop, w.nlost >= 2);
    assert_int_equal(w.why.err, -EPROTO);
    assert_non_null(strstr(w.why.text, "not today"));
    assert_int_equal(w.nready, 0);
    world_down(&w);
}

static void capabilities_have_a_deadline_too(void **state)
{
    struct world w;

    world_init(&w, &(struct fake_qemu_options){.deaf = true});
    world_connect(&w, &(struct qmp_client_limits){.greeting_timeout_ms = SHORT_MS});
    /* Where the machine stood still, the greeting may have come too late at first. */
    loop_until(&w.loop, w.nlost >= 1 && strstr(w.why.text, "command mode"));
    assert_int_equal(w.why.err, -ETIMEDOUT);
    world_down(&w);
}

/* ---- what goes wrong ---- */

static void a_lost_connection_answers_every_call_once_and_comes_back(void **state)
{
    struct answer a[5] = {0};
    struct world w;

    world_up(&w, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(a); i++)
        ask(&w, &a[i], "hold", NULL);
    loop_until(&w.loop, w.nheld == ARRAY_SIZE(a));
    qmp_call_cancel(&a[1].call);
    a[2].cancel = &a[3];
    a[3].cancel = &a[4];
    fake_qemu_hangup(w.qemu);
    loop_until(&w.loop, w.nready == 2);
    assert_int_equal(w.nlost, 1);
    assert_int_equal(w.why.err, -ECONNRESET);
    assert_int_equal(w.nanswers_at_loss, ARRAY_SIZE(a));
    release(&w, 0, "{}"); /* for the new connection, with an id of the old one */
    round_trip(&w);
    for (size_t i = 0; i < ARRAY_SIZE(a); i++) {
        assert_int_equal(a[i].n, 1);
        assert_int_equal(a[i].f.err, i == 1 || i >= 3 ? -ECANCELED : -ECONNRESET);
    }
    world_down(&w);
}

static void a_call_into_a_connection_that_has_just_gone_is_answered(void **state)
{
    struct answer a[2] = {0};
    struct world w;

    world_up(&w, NULL);
    fake_qemu_hangup(w.qemu); /* which the client does not know yet */
    assert_true(qmp_client_is_ready(w.client));
    ask(&w, &a[0], "echo", NULL);
    ask(&w, &a[1], "echo", NULL);
    loop_until(&w.loop, w.nready == 2);
    assert_int_equal(w.nlost, 1);
    assert_int_equal(w.why.err, -ECONNRESET);
    for (size_t i = 0; i < ARRAY_SIZE(a); i++) {
        assert_int_equal(a[i].n, 1);
        assert_int_equal(a[i].f.err, -ECONNRESET);
    }
    world_down(&w);
}

static void what_was_said_is_heard_though_commands_stay_unread(void **state)
{
    _cleanup_free_ char *args = big_args(more_than_a_socket_holds());
    struct answer first = {0}, unread = {0};
    struct ear e = {0};
    struct world w;

    world_up(&w, NULL);
    hear(&w, &e, "SHUTDOWN");
    ask(&w, &first, "hold", NULL);
    loop_until(&w.loop, w.nheld == 1);
    fake_qemu_listen_to(w.qemu, false);
    ask(&w, &unread, "echo", args);
    release(&w, 0, "{}");
    fake_qemu_event(w.qemu, "SHUTDOWN", NULL);
    fake_qemu_hangup(w.qemu);
    loop_until(&w.loop, w.nlost >= 1);
    assert_int_equal(w.why.err, -ECONNRESET);
    assert_int_equal(first.f.err, 0);
    assert_int_equal(unread.f.err, -ECONNRESET);
    assert_int_equal(e.n, 1);
    answer_done(&first);
    world_down(&w);
}

static void rubbish_ends_the_connection_and_a_new_one_works(void **state)
{
    static const char rubbish[] = "{\"return\": {}, \"id\": 1}\r\nOops\r\n";
    struct answer a = {0};
    struct world w;

    world_up(&w, NULL);
    ask(&w, &a, "hold", NULL);
    loop_until(&w.loop, w.nheld == 1);
    fake_qemu_send(w.qemu, rubbish, sizeof(rubbish) - 1);
    loop_until(&w.loop, w.nlost >= 1);
    assert_int_equal(w.why.err, -EPROTO);
    assert_int_equal(a.f.err, -ECONNRESET);
    loop_until(&w.loop, w.nready == 2);
    round_trip(&w);
    world_down(&w);
}

static void a_document_over_the_limit_ends_the_connection(void **state)
{
    _cleanup_free_ char *args = big_args(more_than_a_socket_holds());
    struct world w;

    world_init(&w, NULL);
    world_connect(&w, &(struct qmp_client_limits){.max_document = 4096, .reconnect_min_ms = 1});
    loop_until(&w.loop, w.nready == 1);
    fake_qemu_send(w.qemu, args, strlen(args));
    loop_until(&w.loop, w.nlost >= 1);
    assert_int_equal(w.why.err, -EMSGSIZE);
    loop_until(&w.loop, w.nready == 2);
    round_trip(&w);
    world_down(&w);
}

static void a_big_document_within_the_limit_arrives(void **state)
{
    _cleanup_free_ char *args = big_args(4 * more_than_a_socket_holds());
    struct answer a = {0};
    struct world w;

    world_up(&w, NULL);
    ask(&w, &a, "echo", args);
    loop_until(&w.loop, a.n == 1);
    assert_string_equal(a.ret, args);
    answer_done(&a);
    world_down(&w);
}

static void documents_of_no_known_kind_are_left_alone(void **state)
{
    static const char strange[] =
        "{}{\"id\": 2}{\"return\": {}}{\"return\": {}, \"id\": \"2\"}{\"return\": {}, \"id\": 999}"
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Invalid JSON syntax\"}}"
        "{\"QMP\": {}}{\"event\": 5}{\"return\": {}, \"id\": null}{\"return\": {}, \"id\": -2}";
    static const char odd[] = "{\"error\": null, \"id\": 4}";
    struct answer a = {0}, null_error = {0};
    struct world w;

    world_up(&w, NULL);
    ask(&w, &a, "hold", NULL); /* its id is 2 */
    loop_until(&w.loop, w.nheld == 1);
    fake_qemu_send(w.qemu, strange, sizeof(strange) - 1);
    round_trip(&w);
    assert_int_equal(a.n, 0);
    assert_int_equal(w.nready, 1);
    assert_int_equal(w.nlost, 0);
    release(&w, 0, "{}");
    loop_until(&w.loop, a.n == 1);
    /* Of a known kind, but odd. */
    ask(&w, &null_error, "silence", NULL); /* its id is 4, after the round trip */
    fake_qemu_send(w.qemu, odd, sizeof(odd) - 1);
    loop_until(&w.loop, null_error.n == 1);
    assert_int_equal(null_error.f.err, -EREMOTEIO);
    answer_done(&a);
    world_down(&w);
}

/* ---- the end ---- */

static void a_client_that_was_never_opened_can_be_closed(void **state)
{
    struct world w;

    world_init(&w, NULL);
    assert_int_equal(qmp_client_new(&w.loop, fake_qemu_path(w.qemu), &world_ops, &w, NULL, &w.client), 0);
    world_close(&w);
    assert_false(w.closed);
    loop_until(&w.loop, w.closed);
    world_down(&w);
}

static void a_client_can_be_closed_while_it_connects(void **state)
{
    for (unsigned nturns = 0; nturns < 8; nturns++) { /* connect, accept, greeting, capabilities … */
        struct world w;

        world_init(&w, NULL);
        world_connect(&w, &quick);
        loop_turn(&w.loop, nturns);
        world_down(&w);
        assert_int_equal(w.nlost, 0);
    }
}

static void closing_answers_every_call_before_it_is_over(void **state)
{
    struct answer a[3] = {0};
    struct world w;

    world_up(&w, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(a); i++)
        ask(&w, &a[i], "hold", NULL);
    qmp_call_cancel(&a[1].call);
    world_close(&w);
    assert_int_equal(w.nanswers, 0);
    loop_until(&w.loop, w.nanswers > 0 || w.closed);
    assert_int_equal(w.nanswers, ARRAY_SIZE(a));
    for (size_t i = 0; i < ARRAY_SIZE(a); i++) {
        assert_int_equal(a[i].n, 1);
        assert_int_equal(a[i].f.err, -ECANCELED);
    }
    world_down(&w);
    assert_int_equal(w.nlost, 0);
}

static void closing_when_ready_is_safe(void **state)
{
    struct world w;

    world_init(&w, NULL);
    w.close_when_ready = true;
    world_connect(&w, &quick);
    loop_until(&w.loop, w.closed);
    assert_int_equal(w.nlost, 0);
    world_down(&w);
}

static void closing_when_lost_is_safe(void **state)
{
    struct world w;

    world_up(&w, NULL);
    w.close_when_lost = true;
    fake_qemu_hangup(w.qemu);
    loop_until(&w.loop, w.closed);
    assert_int_equal(w.nlost, 1);
    world_down(&w);

    world_init(&w, NULL); /* an attempt that fails */
    fake_qemu_stop(w.qemu);
    w.close_when_lost = true;
    world_connect(&w, &quick);
    loop_until(&w.loop, w.closed);
    assert_int_equal(w.nlost, 1);
    world_down(&w);

    world_init(&w, &(struct fake_qemu_options){.mute = true}); /* a greeting that does not come */
    w.close_when_lost = true;
    world_connect(&w, &(struct qmp_client_limits){.greeting_timeout_ms = SHORT_MS});
    loop_until(&w.loop, w.closed);
    assert_int_equal(w.nlost, 1);
    world_down(&w);
}

/* The first of three calls is answered in some way, and closes the client; an event follows the answer at once. */
static void closing_at(const char *command, const char *args, unsigned timeout_ms, bool cancel, int err)
{
    struct answer a[3] = {0};
    struct ear e = {0};
    struct world w;

    world_up(&w, NULL);
    hear(&w, &e, NULL);
    a[0].close_client = true;
    ask_with_fd(&w, &a[0], command, args, QMP_NO_FD, timeout_ms);
    ask_with_fd(&w, &a[1], command, args, QMP_NO_FD, timeout_ms);
    ask(&w, &a[2], "hold", NULL);
    if (cancel) {
        qmp_call_cancel(&a[0].call);
        qmp_call_cancel(&a[1].call);
    }
    loop_until(&w.loop, w.closed);
    for (size_t i = 0; i < ARRAY_SIZE(a); i++) {
        assert_int_equal(a[i].n, 1);
        assert_int_equal(a[i].f.err, i == 0 ? err : -ECANCELED);
        answer_done(&a[i]);
    }
    assert_int_equal(w.nlost, 0);
    assert_int_equal(e.n, 0);
    world_down(&w);
}

static void closing_in_an_answer_is_safe(void **state)
{
    closing_at("echo", NULL, LONG_MS, /* cancel= */ false, 0);
    closing_at("fail", "{\"class\": \"GenericError\", \"desc\": \"no\"}", LONG_MS, /* cancel= */ false, -EREMOTEIO);
    closing_at("silence", NULL, SHORT_MS, /* cancel= */ false, -ETIMEDOUT);
    closing_at("silence", NULL, LONG_MS, /* cancel= */ true, -ECANCELED);
    closing_at("hangup", NULL, LONG_MS, /* cancel= */ false, -ECONNRESET);
}

static void closing_in_an_event_is_safe(void **state)
{
    struct ear closes = {0}, after = {0};
    struct answer a = {0};
    struct world w;

    world_up(&w, NULL);
    hear(&w, &closes, "STOP");
    hear(&w, &after, "STOP");
    closes.close_client = true;
    ask(&w, &a, "hold", NULL);
    loop_until(&w.loop, w.nheld == 1);
    fake_qemu_event(w.qemu, "STOP", NULL);
    fake_qemu_event(w.qemu, "STOP", NULL);
    release(&w, 0, "{}");
    loop_until(&w.loop, w.closed);
    assert_int_equal(closes.n, 1);
    assert_int_equal(after.n, 0);
    assert_int_equal(a.f.err, -ECANCELED);
    world_down(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_greeting_leads_to_command_mode),
        cmocka_unit_test(bytes_may_come_one_at_a_time),
        cmocka_unit_test(a_path_longer_than_an_address_works),
        cmocka_unit_test(nobody_there_is_said_and_tried_again),
        cmocka_unit_test(a_socket_without_a_listener_is_said),
        cmocka_unit_test(pauses_between_attempts_double_up_to_the_limit),
        cmocka_unit_test(pauses_do_not_grow_beyond_the_limit),
        cmocka_unit_test(the_pause_is_short_again_after_command_mode),
        cmocka_unit_test(a_greeting_that_never_comes_is_another_clients_fault),
        cmocka_unit_test(an_error_instead_of_a_greeting_is_why_it_does_not_come),
        cmocka_unit_test(a_second_client_waits_until_the_first_has_gone),
        cmocka_unit_test(a_full_queue_of_others_is_said),
        cmocka_unit_test(refused_capabilities_are_a_protocol_error),
        cmocka_unit_test(capabilities_have_a_deadline_too),
        cmocka_unit_test(a_lost_connection_answers_every_call_once_and_comes_back),
        cmocka_unit_test(a_call_into_a_connection_that_has_just_gone_is_answered),
        cmocka_unit_test(what_was_said_is_heard_though_commands_stay_unread),
        cmocka_unit_test(rubbish_ends_the_connection_and_a_new_one_works),
        cmocka_unit_test(a_document_over_the_limit_ends_the_connection),
        cmocka_unit_test(a_big_document_within_the_limit_arrives),
        cmocka_unit_test(documents_of_no_known_kind_are_left_alone),
        cmocka_unit_test(a_client_that_was_never_opened_can_be_closed),
        cmocka_unit_test(a_client_can_be_closed_while_it_connects),
        cmocka_unit_test(closing_answers_every_call_before_it_is_over),
        cmocka_unit_test(closing_when_ready_is_safe),
        cmocka_unit_test(closing_when_lost_is_safe),
        cmocka_unit_test(closing_in_an_answer_is_safe),
        cmocka_unit_test(closing_in_an_event_is_safe),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
