/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "loop.h"

#include "qmp/base.h"

#include <errno.h>
#include <signal.h>

static void on_wake(uv_async_t *wake)
{
    struct loop *l = container_of(wake, struct loop, wake);
    struct task *t;

    (void)pthread_mutex_lock(&l->lock);
    t = l->first;
    l->first = NULL;
    l->last = &l->first;
    (void)pthread_mutex_unlock(&l->lock);
    while (t) {
        struct task *next = t->next; /* t may be gone after its end */

        t->fn(t);
        t = next;
    }
}

/* Signals are nbdkit's; libuv's own, of children that end, may come to any thread. */
static void *run(void *arg)
{
    struct loop *l = arg;

    (void)uv_run(&l->uv, UV_RUN_DEFAULT);
    return NULL;
}

int loop_start(struct loop *l)
{
    sigset_t all, before;
    int r = uv_loop_init(&l->uv);

    if (r < 0)
        return r;
    l->first = NULL;
    l->last = &l->first;
    (void)pthread_mutex_init(&l->lock, NULL);
    r = uv_async_init(&l->uv, &l->wake, on_wake);
    if (r == 0) {
        (void)sigfillset(&all);
        (void)pthread_sigmask(SIG_SETMASK, &all, &before);
        r = -pthread_create(&l->thread, NULL, run, l);
        (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (r < 0) {
            uv_close((uv_handle_t *)&l->wake, NULL);
            (void)uv_run(&l->uv, UV_RUN_DEFAULT);
        }
    }
    if (r < 0) {
        (void)uv_loop_close(&l->uv);
        (void)pthread_mutex_destroy(&l->lock);
    }
    return r;
}

void loop_begin(struct loop *l, struct task *t)
{
    bool was_empty;

    t->next = NULL;
    (void)sem_init(&t->done, /* pshared= */ 0, 0);
    (void)pthread_mutex_lock(&l->lock);
    was_empty = !l->first;
    *l->last = t;
    l->last = &t->next;
    (void)pthread_mutex_unlock(&l->lock);
    if (was_empty)
        (void)uv_async_send(&l->wake);
}

/* A clock that is set only makes this early or late; sem_clockwait() is not known to gcc 12's ThreadSanitizer. */
struct timespec task_time(unsigned ms)
{
    struct timespec until;

    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += (long)(ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    return until;
}

bool task_wait(struct task *t, unsigned ms)
{
    struct timespec until = task_time(ms);
    int r;

    while ((r = sem_timedwait(&t->done, &until)) < 0 && errno == EINTR)
        ;
    if (r < 0)
        return false;
    (void)sem_destroy(&t->done);
    return true;
}

void loop_call(struct loop *l, struct task *t)
{
    loop_begin(l, t);
    while (sem_wait(&t->done) < 0 && errno == EINTR)
        ;
    (void)sem_destroy(&t->done);
}

void task_done(struct task *t)
{
    (void)sem_post(&t->done);
}

struct stop {
    struct task task;
    struct loop *loop;
};

static void on_stop(struct task *t)
{
    uv_close((uv_handle_t *)&container_of(t, struct stop, task)->loop->wake, NULL);
    task_done(t);
}

int loop_stop(struct loop *l)
{
    struct stop stop = {.task.fn = on_stop, .loop = l};
    int r;

    loop_call(l, &stop.task);
    (void)pthread_join(l->thread, NULL);
    r = uv_loop_close(&l->uv);
    (void)pthread_mutex_destroy(&l->lock);
    return r;
}
