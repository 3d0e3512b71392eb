/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * loop: a libuv loop in a test: wait for a condition with a deadline, and prove at the end that every handle was
 * closed. Failing means cmocka's fail_msg(). Loop thread only.
 */
#ifndef QPULL_TEST_LOOP_H
#define QPULL_TEST_LOOP_H

#include <stdbool.h>
#include <uv.h>

/* Generous: valgrind on a loaded machine. A test that waits this long has failed. */
#define LOOP_DEADLINE_MS 30000
#define LOOP_TICK_MS 20

void loop_init(uv_loop_t *loop);

/* Lets what is closing close, and fails if a handle was left open. */
void loop_done(uv_loop_t *loop);

/* Runs the loop until the condition is true: a macro, since the condition is looked at after each turn. */
#define loop_until(loop, condition)                                                      \
    for (struct loop_wait wait_ = loop_wait_begin(loop, #condition, __FILE__, __LINE__); \
         !loop_wait_is_over(&wait_, (condition));)

/* The same with a function. */
void loop_run_until(uv_loop_t *loop, bool (*done)(void *arg), void *arg);

/* Turns without waiting: for what must happen soon or not at all. Not for what takes time. */
void loop_turn(uv_loop_t *loop, unsigned nturns);

/* private to loop_until() */
struct loop_wait {
    uv_loop_t *loop;
    uv_timer_t *alarm; /* owned by the loop */
    const char *what, *file;
    int line;
    uint64_t end_ns;
};
struct loop_wait loop_wait_begin(uv_loop_t *loop, const char *what, const char *file, int line);
bool loop_wait_is_over(struct loop_wait *w, bool condition);

#endif
