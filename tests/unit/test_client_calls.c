/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "client_world.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void a_call_before_command_mode_is_refused_and_never_answered(void **state)
{
    struct answer a = {0};
    struct world w;

    world_init(&w, NULL);
    world_connect(&w, &quick);
    a.world = &w;
    assert_int_equal(
        qmp_call_start(w.client, &a.call, "echo", json_object_new_object(), QMP_NO_FD, LONG_MS, on_answer, &a),
        -ENOTCONN);
    qmp_call_cancel(&a.call);
    loop_until(&w.loop, w.nready == 1);
    round_trip(&w);
    assert_int_equal(a.n, 0);
    world_down(&w);
}

static void answers_out_of_order_reach_their_callers(void **state)
{
    struct answer a[4] = {0};
    struct world w;

    world_up(&w, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(a); i++)
        ask(&w, &a[i], "hold", NULL);
    loop_until(&w.loop, w.nheld == ARRAY_SIZE(a));
    release(&w, 2, "{\"n\":2}");
    release(&w, 0, "{\"n\":0}");
    release(&w, 3, "[3]");
    release(&w, 1, "\"one\"");
    loop_until(&w.loop, w.nanswers == ARRAY_SIZE(a));
    assert_string_equal(a[0].ret, "{\"n\":0}");
    assert_string_equal(a[1].ret, "\"one\"");
    assert_string_equal(a[2].ret, "{\"n\":2}");
    assert_string_equal(a[3].ret, "[3]");
    assert_int_equal(a[2].number, 1);
    assert_int_equal(a[1].number, 4);
    for (size_t i = 0; i < ARRAY_SIZE(a); i++) {
        assert_int_equal(a[i].n, 1);
        assert_int_equal(a[i].f.err, 0);
        answer_done(&a[i]);
    }
    world_down(&w);
}

static void commands_keep_their_order(void **state)
{
    struct answer a[3] = {0};
    struct world w;

    world_up(&w, NULL);
    ask(&w, &a[0], "one", NULL);
    ask(&w, &a[1], "two", NULL);
    ask(&w, &a[2], "three", NULL);
    round_trip(&w);
    assert_string_equal(w.order, "one two three echo ");
    world_down(&w);
}

static void errors_have_a_number_and_qemus_own_words(void **state)
{
    static const struct {
        const char *args, *desc;
        int err;
    } errors[] = {
        {"{\"class\": \"GenericError\", \"desc\": \"Node 'x' is busy: %s\"}", "Node 'x' is busy: %s", -EREMOTEIO},
        {"{\"class\": \"CommandNotFound\", \"desc\": \"no such thing\"}", "no such thing", -ENOSYS},
        {"{\"class\": \"DeviceNotFound\", \"desc\": \"gone\"}", "gone", -ENODEV},
        {"{\"class\": \"NewInQemu99\", \"desc\": \"?\"}", "?", -EREMOTEIO},
    };
    struct world w;

    world_up(&w, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(errors); i++) {
        struct answer a = {0};

        ask(&w, &a, "fail", errors[i].args);
        loop_until(&w.loop, a.n == 1);
        assert_null(a.ret);
        assert_int_equal(a.f.err, errors[i].err);
        assert_string_equal(a.f.text, errors[i].desc);
    }
    world_down(&w);
}

static void a_late_answer_is_dropped(void **state)
{
    struct answer a = {0};
    struct world w;

    world_up(&w, NULL);
    ask_with_fd(&w, &a, "hold", NULL, QMP_NO_FD, SHORT_MS);
    loop_until(&w.loop, a.n == 1);
    assert_int_equal(a.f.err, -ETIMEDOUT);
    assert_non_null(strstr(a.f.text, "'hold'"));
    release(&w, 0, "{}");
    round_trip(&w);
    assert_int_equal(a.n, 1);
    assert_int_equal(w.nlost, 0);
    world_down(&w);
}

static void the_earliest_deadline_comes_first(void **state)
{
    static const unsigned timeouts_ms[] = {150, 50, 200, 100};
    static const unsigned order[] = {3, 1, 4, 2};
    unsigned nright = 0;
    struct world w;

    world_up(&w, NULL);
    /* Where the machine stood still, several are overdue at once and come as they were asked: then once more. */
    for (unsigned round = 0; round < 10 && nright < ARRAY_SIZE(order); round++) {
        struct answer a[ARRAY_SIZE(timeouts_ms)] = {0};

        w.nanswers = nright = 0;
        for (size_t i = 0; i < ARRAY_SIZE(a); i++)
            ask_with_fd(&w, &a[i], "silence", NULL, QMP_NO_FD, timeouts_ms[i]);
        loop_until(&w.loop, w.nanswers == ARRAY_SIZE(a));
        for (size_t i = 0; i < ARRAY_SIZE(a); i++) {
            assert_int_equal(a[i].f.err, -ETIMEDOUT);
            nright += a[i].number == order[i];
        }
    }
    assert_int_equal(nright, ARRAY_SIZE(order));
    world_down(&w);
}

static void an_answer_in_time_counts_though_the_loop_stood_still(void **state)
{
    struct answer a = {0}, silent = {0};
    struct world w;
    uint64_t until;

    world_up(&w, NULL);
    ask_with_fd(&w, &a, "hold", NULL, QMP_NO_FD, 100);
    ask_with_fd(&w, &silent, "silence", NULL, QMP_NO_FD, 100);
    loop_until(&w.loop, w.ncommands == 2);
    if (a.n == 1) { /* a machine so slow that the deadline has passed proves nothing */
        world_down(&w);
        skip();
    }
    /* The answer reaches the socket in this turn; the client cannot have read it when the deadline passes. */
    release(&w, 0, "{}");
    fake_qemu_hangup(w.qemu);
    until = uv_hrtime() + 200 * (uint64_t)1000000;
    while (uv_hrtime() < until)
        continue;
    loop_until(&w.loop, w.nanswers == 2);
    assert_int_equal(a.f.err, 0);
    assert_int_equal(silent.f.err, -ECONNRESET);
    answer_done(&a);
    world_down(&w);
}

static void what_was_said_before_hanging_up_is_heard(void **state)
{
    struct answer a = {0};
    struct world w;

    world_up(&w, NULL);
    ask(&w, &a, "last-words", NULL);
    loop_until(&w.loop, w.nlost >= 1);
    assert_int_equal(a.n, 1);
    assert_int_equal(a.f.err, 0);
    answer_done(&a);
    world_down(&w);
}

static void on_answer_ask_again(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    struct answer *a = call->arg;

    assert_null(f);
    if (++a->n < 3)
        assert_int_equal(
            qmp_call_start(a->world->client, call, "echo", NULL, QMP_NO_FD, LONG_MS, on_answer_ask_again, a), 0);
}

static void a_call_may_be_used_again_in_its_callback(void **state)
{
    struct answer a = {0};
    struct world w;

    world_up(&w, NULL);
    a.world = &w;
    assert_int_equal(qmp_call_start(w.client, &a.call, "echo", NULL, QMP_NO_FD, LONG_MS, on_answer_ask_again, &a), 0);
    loop_until(&w.loop, a.n == 3);
    world_down(&w);
}

static void on_answer_free(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    unsigned *n = call->arg;

    (*n)++;
    free(call);
}

static void a_call_may_be_freed_in_its_callback(void **state)
{
    static const char *const commands[] = {"echo", "fail", "silence", "hangup"};
    unsigned n = 0;
    struct world w;

    world_up(&w, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        struct qmp_call *call = malloc(sizeof(*call));

        assert_non_null(call);
        assert_int_equal(qmp_call_start(w.client, call, commands[i],
                                        json_tokener_parse("{\"class\": \"GenericError\", \"desc\": \"d\"}"), QMP_NO_FD,
                                        i == 2 ? SHORT_MS : LONG_MS, on_answer_free, &n),
                         0);
        loop_until(&w.loop, n == i + 1);
    }
    loop_until(&w.loop, w.nready == 2);
    for (unsigned i = 0; i < 2; i++) { /* cancelled; cancelled by close */
        struct qmp_call *call = malloc(sizeof(*call));

        assert_int_equal(qmp_call_start(w.client, call, "hold", NULL, QMP_NO_FD, LONG_MS, on_answer_free, &n), 0);
        if (i == 0)
            qmp_call_cancel(call);
    }
    world_down(&w);
    assert_int_equal(n, ARRAY_SIZE(commands) + 2);
}

static void a_cancelled_call_is_answered_later_and_once(void **state)
{
    struct answer a = {0}, b = {0};
    struct world w;

    world_up(&w, NULL);
    ask(&w, &a, "hold", NULL);
    ask(&w, &b, "hold", NULL);
    loop_until(&w.loop, w.nheld == 2);
    qmp_call_cancel(&a.call);
    qmp_call_cancel(&a.call);
    assert_int_equal(a.n, 0);
    release(&w, 0, "{}");
    release(&w, 1, "{}");
    loop_until(&w.loop, w.nanswers == 2);
    round_trip(&w);
    assert_int_equal(a.n, 1);
    assert_int_equal(a.f.err, -ECANCELED);
    assert_int_equal(b.f.err, 0);
    qmp_call_cancel(&a.call); /* not under way */
    answer_done(&b);
    world_down(&w);
}

static void a_callback_may_cancel_another_call(void **state)
{
    struct answer a[3] = {0};
    struct world w;

    world_up(&w, NULL);
    a[0].cancel = &a[1];
    a[1].cancel = &a[2];
    for (size_t i = 0; i < ARRAY_SIZE(a); i++)
        ask(&w, &a[i], "hold", NULL);
    loop_until(&w.loop, w.nheld == ARRAY_SIZE(a));
    release(&w, 0, "{}");
    release(&w, 1, "{}");
    release(&w, 2, "{}");
    loop_until(&w.loop, w.nanswers == ARRAY_SIZE(a));
    assert_int_equal(a[0].f.err, 0);
    assert_int_equal(a[1].f.err, -ECANCELED);
    assert_int_equal(a[1].n, 1);
    assert_int_equal(a[2].n, 1);
    answer_done(&a[0]);
    answer_done(&a[2]);
    world_down(&w);
}

static void a_cancelled_command_that_was_not_sent_never_is(void **state)
{
    _cleanup_free_ char *args = big_args(more_than_a_socket_holds());
    struct answer first = {0}, cancelled = {0}, timed_out = {0}, last = {0};
    struct world w;

    world_up(&w, NULL);
    fake_qemu_listen_to(w.qemu, false);
    ask(&w, &first, "first", args); /* fills the socket */
    ask(&w, &cancelled, "cancelled", NULL);
    ask_with_fd(&w, &timed_out, "timed-out", NULL, QMP_NO_FD, SHORT_MS);
    ask(&w, &last, "echo", NULL);
    qmp_call_cancel(&cancelled.call);
    loop_until(&w.loop, w.nanswers == 2);
    assert_int_equal(cancelled.f.err, -ECANCELED);
    assert_int_equal(timed_out.f.err, -ETIMEDOUT);
    fake_qemu_listen_to(w.qemu, true);
    loop_until(&w.loop, last.n == 1);
    assert_string_equal(w.order, "first echo ");
    answer_done(&last);
    world_down(&w);
}

static void a_cancelled_command_that_was_half_sent_is_sent_whole(void **state)
{
    _cleanup_free_ char *args = big_args(more_than_a_socket_holds());
    struct answer half = {0};
    struct world w;

    world_up(&w, NULL);
    fake_qemu_listen_to(w.qemu, false);
    ask(&w, &half, "half", args);
    qmp_call_cancel(&half.call);
    loop_until(&w.loop, half.n == 1);
    assert_int_equal(half.f.err, -ECANCELED);
    fake_qemu_listen_to(w.qemu, true);
    round_trip(&w); /* half a command would spoil it */
    assert_string_equal(w.order, "half echo ");
    world_down(&w);
}

static void unsent_commands_are_bounded(void **state)
{
    _cleanup_free_ char *args = big_args(more_than_a_socket_holds());
    struct answer first = {0}, refused = {0};
    struct world w;

    world_init(&w, NULL);
    world_connect(&w, &(struct qmp_client_limits){.max_unsent = strlen(args) + 100});
    loop_until(&w.loop, w.nready == 1);
    fake_qemu_listen_to(w.qemu, false);
    ask(&w, &first, "echo", args);
    assert_int_equal(qmp_call_start(w.client, &refused.call, "echo", json_tokener_parse(args), QMP_NO_FD, LONG_MS,
                                    on_answer, &refused),
                     -ENOBUFS);
    fake_qemu_listen_to(w.qemu, true);
    loop_until(&w.loop, first.n == 1);
    assert_int_equal(strlen(first.ret), strlen(args));
    assert_int_equal(refused.n, 0);
    round_trip(&w); /* what was sent does not count any more */
    answer_done(&first);
    world_down(&w);
}

/* ---- file descriptors ---- */

static bool is_same_file(int a, int b)
{
    struct stat sa, sb;

    assert_int_equal(fstat(a, &sa), 0);
    assert_int_equal(fstat(b, &sb), 0);
    return sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino;
}

static void a_descriptor_comes_with_its_own_command_only(void **state)
{
    static const bool has_fd[] = {false, true, false, false, true, true};
    struct answer a[ARRAY_SIZE(has_fd)] = {0};
    struct world w;
    int fd = memfd_create("scratch", MFD_CLOEXEC), received;

    world_up(&w, &(struct fake_qemu_options){.read_size = 1});
    for (size_t i = 0; i < ARRAY_SIZE(has_fd); i++) /* all under way at once */
        ask_with_fd(&w, &a[i], "echo", NULL, has_fd[i] ? fd : QMP_NO_FD, LONG_MS);
    loop_until(&w.loop, w.nanswers == ARRAY_SIZE(has_fd));
    for (size_t i = 0; i < ARRAY_SIZE(has_fd); i++) {
        assert_int_equal(w.nfds_with[i], has_fd[i]);
        assert_int_equal(w.fd_came_first[i], has_fd[i]);
        answer_done(&a[i]);
    }
    received = fake_qemu_take_fd(w.qemu);
    assert_true(is_same_file(received, fd));
    close(received);
    close(fd);
    world_down(&w);
}

static void a_descriptor_comes_once_where_writes_are_partial(void **state)
{
    _cleanup_free_ char *args = big_args(more_than_a_socket_holds());
    struct answer a[4] = {0};
    struct world w;
    int fd = memfd_create("scratch", MFD_CLOEXEC);
    unsigned nfds;

    world_up(&w, &(struct fake_qemu_options){.read_size = 1});
    nfds = open_fds();
    fake_qemu_listen_to(w.qemu, false);
    ask_with_fd(&w, &a[0], "echo", NULL, fd, LONG_MS);
    ask_with_fd(&w, &a[1], "discard", args, fd, LONG_MS); /* its beginning is sent, its end is not */
    ask_with_fd(&w, &a[2], "echo", NULL, QMP_NO_FD, LONG_MS);
    ask_with_fd(&w, &a[3], "echo", NULL, fd, LONG_MS);
    fake_qemu_listen_to(w.qemu, true);
    loop_until(&w.loop, a[3].n == 1);
    assert_int_equal(fake_qemu_nfds(w.qemu), 3);
    assert_int_equal(w.nfds_with[0], 1);
    assert_int_equal(w.nfds_with[1], 1);
    assert_int_equal(w.nfds_with[2], 0);
    assert_int_equal(w.nfds_with[3], 1);
    assert_true(w.fd_came_first[0] && w.fd_came_first[1] && w.fd_came_first[3]);
    close(fake_qemu_take_fd(w.qemu));
    assert_int_equal(open_fds(), nfds); /* no duplicate stays behind */
    for (size_t i = 0; i < ARRAY_SIZE(a); i++)
        answer_done(&a[i]);
    close(fd);
    world_down(&w);
}

static void a_descriptor_that_was_not_sent_is_closed(void **state)
{
    _cleanup_free_ char *args = big_args(more_than_a_socket_holds());
    struct answer first = {0}, timed_out = {0}, cancelled = {0}, lost = {0};
    struct world w;
    int fd = memfd_create("scratch", MFD_CLOEXEC);
    unsigned nfds;

    world_up(&w, NULL);
    nfds = open_fds();
    fake_qemu_listen_to(w.qemu, false);
    ask(&w, &first, "first", args);
    ask_with_fd(&w, &timed_out, "echo", NULL, fd, SHORT_MS);
    ask_with_fd(&w, &cancelled, "echo", NULL, fd, LONG_MS);
    ask_with_fd(&w, &lost, "echo", NULL, fd, LONG_MS);
    assert_int_equal(open_fds(), nfds + 3);
    qmp_call_cancel(&cancelled.call);
    loop_until(&w.loop, timed_out.n == 1 && cancelled.n == 1);
    assert_int_equal(open_fds(), nfds + 1);
    fake_qemu_hangup(w.qemu);
    fake_qemu_listen_to(w.qemu, true);
    loop_until(&w.loop, w.nready == 2);
    assert_int_equal(w.why.err, -ECONNRESET);
    assert_int_equal(lost.f.err, -ECONNRESET);
    assert_int_equal(fake_qemu_nfds(w.qemu), 0);
    assert_int_equal(open_fds(), nfds);
    close(fd);
    world_down(&w);
}

static void a_bad_descriptor_is_refused(void **state)
{
    struct answer a = {0};
    struct world w;

    world_up(&w, NULL);
    assert_int_equal(qmp_call_start(w.client, &a.call, "echo", NULL, /* fd= */ 1 << 20, LONG_MS, on_answer, &a),
                     -EBADF);
    round_trip(&w);
    assert_int_equal(a.n, 0);
    assert_int_equal(fake_qemu_ncommands(w.qemu), 1);
    world_down(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_call_before_command_mode_is_refused_and_never_answered),
        cmocka_unit_test(answers_out_of_order_reach_their_callers),
        cmocka_unit_test(commands_keep_their_order),
        cmocka_unit_test(errors_have_a_number_and_qemus_own_words),
        cmocka_unit_test(a_late_answer_is_dropped),
        cmocka_unit_test(the_earliest_deadline_comes_first),
        cmocka_unit_test(an_answer_in_time_counts_though_the_loop_stood_still),
        cmocka_unit_test(what_was_said_before_hanging_up_is_heard),
        cmocka_unit_test(a_call_may_be_used_again_in_its_callback),
        cmocka_unit_test(a_call_may_be_freed_in_its_callback),
        cmocka_unit_test(a_cancelled_call_is_answered_later_and_once),
        cmocka_unit_test(a_callback_may_cancel_another_call),
        cmocka_unit_test(a_cancelled_command_that_was_not_sent_never_is),
        cmocka_unit_test(a_cancelled_command_that_was_half_sent_is_sent_whole),
        cmocka_unit_test(unsent_commands_are_bounded),
        cmocka_unit_test(a_descriptor_comes_with_its_own_command_only),
        cmocka_unit_test(a_descriptor_comes_once_where_writes_are_partial),
        cmocka_unit_test(a_descriptor_that_was_not_sent_is_closed),
        cmocka_unit_test(a_bad_descriptor_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
