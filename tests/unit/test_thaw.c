/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The thaw that does not give up, and the watchdog that does it: this program is its own watchdog. */
#include "backup/thaw.h"
#include "backup/watchdog.h"
#include "lib/fake_agent.h"
#include "lib/loop.h"
#include "lib/test.h"

#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define LONG_MS LOOP_DEADLINE_MS

struct world {
    uv_loop_t loop;
    struct fake_agent *guest;
    struct watchdog *dog;
    int fd; /* the connection that the watchdog gets, which nobody reads here */
    bool ended, ready;
    int err;
    bool thawed;
};

static int set_up(void **state)
{
    struct world *w = calloc(1, sizeof(*w));

    assert_non_null(w);
    loop_init(&w->loop);
    w->guest = fake_agent_new(&w->loop);
    w->guest->nfrozen = 2;
    w->fd = -1;
    *state = w;
    return 0;
}

static int tear_down(void **state)
{
    struct world *w = *state;

    if (w->fd >= 0)
        (void)close(w->fd);
    fake_agent_free(w->guest);
    loop_turn(&w->loop, 5); /* a thaw that has ended closes its timer after its agent */
    loop_done(&w->loop);
    free(w);
    return 0;
}

static void on_end(void *arg, const struct failure *f)
{
    struct world *w = arg;

    w->ended = true;
    w->err = f ? f->err : 0;
}

static struct thaw *begin(struct world *w, bool look_first, unsigned total_ms)
{
    struct thaw_config config = {
        .loop = &w->loop, .path = w->guest->path, .fd = -1, .total_ms = total_ms, .look_first = look_first};
    struct thaw *t;

    assert_int_equal(thaw_start(&config, on_end, w, &t), 0);
    assert_false(w->ended);
    return t;
}

static void what_is_frozen_is_thawed(void **state)
{
    struct world *w = *state;

    (void)begin(w, false, LONG_MS);
    loop_until(&w->loop, w->ended);
    assert_int_equal(w->err, 0);
    assert_int_equal(w->guest->nfrozen, 0);
}

static void what_is_thawed_already_is_left_alone(void **state)
{
    struct world *w = *state;

    w->guest->nfrozen = 0;
    (void)begin(w, true, LONG_MS);
    loop_until(&w->loop, w->ended);
    assert_int_equal(w->err, 0);
    assert_int_equal(w->guest->nheard[FAKE_THAW], 0);
}

static void each_way_of_failing_is_tried_again(void **state)
{
    static const enum fake_agent_fault faults[] = {FAKE_REFUSES, FAKE_LIES, FAKE_RUBBISH, FAKE_FLOODS, FAKE_HANGS_UP};
    struct world *w = *state;

    for (size_t i = 0; i < ARRAY_SIZE(faults); i++) {
        w->guest->nfrozen = 2;
        w->guest->nheard[FAKE_THAW] = 0;
        w->guest->faults[FAKE_THAW] = faults[i];
        w->ended = false;
        (void)begin(w, true, LONG_MS);
        loop_until(&w->loop, w->guest->nheard[FAKE_THAW] == 1);
        w->guest->faults[FAKE_THAW] = FAKE_GOOD;
        loop_until(&w->loop, w->ended);
        assert_int_equal(w->err, 0);
        assert_int_equal(w->guest->nfrozen, 0);
    }
}

static void the_tries_end(void **state)
{
    struct world *w = *state;

    w->guest->faults[FAKE_THAW] = FAKE_REFUSES;
    (void)begin(w, false, THAW_PAUSE_MS * 2);
    loop_until(&w->loop, w->ended);
    assert_true(w->err == -EAGAIN || w->err == -ETIMEDOUT); /* what the last one said, or that its time was over */
    assert_true(w->guest->nheard[FAKE_THAW] > 1);
}

static void nobody_at_the_socket_ends_it_soon(void **state)
{
    struct world *w = *state;

    fake_agent_stop(w->guest);
    (void)begin(w, false, 1000 * LONG_MS);
    loop_until(&w->loop, w->ended);
    assert_int_equal(w->err, -ENOENT);
}

static void a_forgotten_thaw_is_silent(void **state)
{
    struct world *w = *state;

    thaw_forget(begin(w, false, LONG_MS));
    loop_turn(&w->loop, 5);
    assert_false(w->ended);
}

/* -- the watchdog -------------------------------------------------------------------------------------------------- */

static void on_ready(void *arg)
{
    ((struct world *)arg)->ready = true;
}

static void on_exit_of(void *arg, struct watchdog *dog, bool thawed)
{
    struct world *w = arg;

    assert_ptr_equal(dog, w->dog);
    w->ended = true;
    w->thawed = thawed;
}

static void watch(struct world *w, unsigned freeze_ms, unsigned thaw_ms)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    static const struct watchdog_ops ops = {.on_ready = on_ready, .on_exit = on_exit_of};
    struct watchdog_config config = {
        .loop = &w->loop, .program = WATCHDOG_SELF, .path = w->guest->path, .freeze_ms = freeze_ms, .thaw_ms = thaw_ms};

    /* There, our own program is valgrind. */
    if (getenv("QPULL_TEST_VALGRIND")) {
        print_message("skipped: a watchdog cannot be started under valgrind\n");
        skip();
    }

    w->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", w->guest->path);
    assert_int_equal(connect(w->fd, (struct sockaddr *)&address, sizeof(address)), 0);
    config.agent_fd = w->fd;
    assert_int_equal(watchdog_start(&config, &ops, w, &w->dog), 0);
    loop_until(&w->loop, w->ready);
}

static void a_watchdog_that_nobody_armed_thaws_nothing(void **state)
{
    struct world *w = *state;

    watch(w, LONG_MS, LONG_MS);
    watchdog_hand_over(w->dog);
    loop_until(&w->loop, w->ended);
    assert_true(w->thawed);
    assert_int_equal(w->guest->nheard[FAKE_THAW], 0);
}

static void a_watchdog_thaws_through_the_connection_that_it_has(void **state)
{
    struct world *w = *state;

    watch(w, LONG_MS, LONG_MS);
    assert_int_equal(watchdog_arm(w->dog), 0);
    (void)close(w->fd);
    w->fd = -1;
    watchdog_hand_over(w->dog);
    loop_until(&w->loop, w->ended);
    assert_true(w->thawed);
    assert_int_equal(w->guest->nfrozen, 0);
    assert_int_equal(w->guest->nclients, 1);
}

static void a_watchdog_does_not_wait_for_ever(void **state)
{
    struct world *w = *state;

    watch(w, /* freeze_ms= */ 50, LONG_MS);
    assert_int_equal(watchdog_arm(w->dog), 0);
    loop_until(&w->loop, w->ended); /* we hang, so to say: nothing is handed over */
    assert_true(w->thawed);
    assert_int_equal(w->guest->nfrozen, 0);
}

static void a_watchdog_gives_up_and_says_so(void **state)
{
    struct world *w = *state;

    watch(w, LONG_MS, THAW_PAUSE_MS);
    w->guest->faults[FAKE_THAW] = FAKE_REFUSES;
    assert_int_equal(watchdog_arm(w->dog), 0);
    watchdog_hand_over(w->dog);
    loop_until(&w->loop, w->ended);
    assert_false(w->thawed);
}

static void count(uv_handle_t *h, void *arg)
{
    ++*(unsigned *)arg;
}

static unsigned nhandles(struct world *w)
{
    unsigned n = 0;

    uv_walk(&w->loop, count, &n);
    return n;
}

static void a_dismissed_watchdog_goes_silently(void **state)
{
    struct world *w = *state;
    unsigned before;

    watch(w, LONG_MS, LONG_MS);
    before = nhandles(w);
    assert_int_equal(watchdog_arm(w->dog), 0);
    watchdog_dismiss(w->dog);
    loop_until(&w->loop, nhandles(w) < before); /* its pipe and its process go, and this wait has a timer */
    assert_false(w->ended);
    assert_int_equal(w->guest->nheard[FAKE_THAW], 0);
}

#define T(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        T(what_is_frozen_is_thawed),
        T(what_is_thawed_already_is_left_alone),
        T(each_way_of_failing_is_tried_again),
        T(the_tries_end),
        T(nobody_at_the_socket_ends_it_soon),
        T(a_forgotten_thaw_is_silent),
        T(a_watchdog_that_nobody_armed_thaws_nothing),
        T(a_watchdog_thaws_through_the_connection_that_it_has),
        T(a_watchdog_does_not_wait_for_ever),
        T(a_watchdog_gives_up_and_says_so),
        T(a_dismissed_watchdog_goes_silently),
    };

    if (watchdog_is_one(argc, argv))
        return watchdog_main(argc, argv);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
