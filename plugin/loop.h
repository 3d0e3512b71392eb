/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * loop: the one thread on which all of the engine runs, and how nbdkit's threads hand it something to do. It begins
 * after nbdkit's fork, which no thread survives.
 *
 * loop_call() is for any thread but the loop's; a task's function and whatever it starts run on the loop's.
 */
#ifndef QPULL_PLUGIN_LOOP_H
#define QPULL_PLUGIN_LOOP_H

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <time.h>
#include <uv.h>

struct task {
    void (*fn)(struct task *t); /* begins the work; task_done() ends it, at once or later */
    /* private */
    struct task *next;
    sem_t done;
};

struct loop {
    uv_loop_t uv;
    uv_async_t wake;
    pthread_t thread;
    pthread_mutex_t lock; /* of what follows */
    struct task *first, **last;
};

/* Negative errno: nothing runs. */
int loop_start(struct loop *l);
/* Has the loop do it, and waits for its end. There is no deadline here: the work has its own. */
void loop_call(struct loop *l, struct task *t);
/* The same in two: has the loop do it; and waits about so long at most. True: it has ended, and the task is the
 * caller's again. */
void loop_begin(struct loop *l, struct task *t);
struct timespec task_time(unsigned ms); /* so long from now, for a wait that takes CLOCK_REALTIME */
bool task_wait(struct task *t, unsigned ms);
/* The last touch of the task: its caller goes on. */
void task_done(struct task *t);
/* Nothing uses the loop any more: ends the thread. Negative: handles were left. */
int loop_stop(struct loop *l);

#endif
