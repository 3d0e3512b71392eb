/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/loop.h"

#include "lib/test.h"

#include <stdlib.h>

#define NS_PER_MS 1000000u

void loop_init(uv_loop_t *loop)
{
    assert_int_equal(uv_loop_init(loop), 0);
}

static void on_leftover(uv_handle_t *handle, void *arg)
{
    unsigned *nleft = arg;

    if (uv_is_closing(handle))
        return;
    print_error("a handle was left open: %s\n", uv_handle_type_name(handle->type));
    (*nleft)++;
}

void loop_done(uv_loop_t *loop)
{
    unsigned nleft = 0;

    uv_walk(loop, on_leftover, &nleft);
    assert_int_equal(nleft, 0);
    (void)uv_run(loop, UV_RUN_DEFAULT);
    assert_int_equal(uv_loop_close(loop), 0);
}

static void on_alarm(uv_timer_t *alarm)
{
    /* Only ends a turn of the loop; loop_wait_is_over() looks at the clock. */
    (void)alarm;
}

static void on_alarm_closed(uv_handle_t *handle)
{
    free(handle);
}

struct loop_wait loop_wait_begin(uv_loop_t *loop, const char *what, const char *file, int line)
{
    struct loop_wait w = {.loop = loop, .what = what, .file = file, .line = line};

    w.end_ns = uv_hrtime() + (uint64_t)LOOP_DEADLINE_MS * NS_PER_MS;
    w.alarm = malloc(sizeof(*w.alarm));
    assert_non_null(w.alarm);
    assert_int_equal(uv_timer_init(loop, w.alarm), 0);
    /* It ticks: a condition that a timer makes true is seen although uv_run() then waits for I/O. */
    uv_update_time(loop);
    assert_int_equal(uv_timer_start(w.alarm, on_alarm, LOOP_TICK_MS, LOOP_TICK_MS), 0);
    return w;
}

bool loop_wait_is_over(struct loop_wait *w, bool condition)
{
    if (condition) {
        uv_close((uv_handle_t *)w->alarm, on_alarm_closed);
        return true;
    }
    if (uv_hrtime() >= w->end_ns)
        fail_msg("%s:%d: waited %u ms in vain for: %s", w->file, w->line, LOOP_DEADLINE_MS, w->what);
    (void)uv_run(w->loop, UV_RUN_ONCE);
    return false;
}

void loop_run_until(uv_loop_t *loop, bool (*done)(void *arg), void *arg)
{
    loop_until(loop, done(arg));
}

void loop_turn(uv_loop_t *loop, unsigned nturns)
{
    while (nturns-- > 0)
        (void)uv_run(loop, UV_RUN_NOWAIT);
}
