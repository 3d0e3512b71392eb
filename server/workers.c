/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "workers.h"

#include <assert.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>

#define STACK_SIZE (256u << 10) /* bytes: a handshake of gnutls takes less than 64 KiB of it */

struct work_list {
    struct work *first, *last;
};

struct workers {
    uv_async_t wake; /* some work is done, or a thread has ended */
    uv_mutex_t lock;
    uv_cond_t more;
    struct work_list todo, done; /* borrowed; with the lock */
    bool stopping;               /* likewise */
    unsigned nalive;             /* likewise: threads that have not ended */
    uv_thread_t *threads;        /* owned: the array */
    unsigned nthreads;
    void (*on_closed)(void *arg);
    void *arg;
};

static void append(struct work_list *l, struct work *w)
{
    w->next = NULL;
    if (l->last)
        l->last->next = w;
    else
        l->first = w;
    l->last = w;
}

static struct work *take_first(struct work_list *l)
{
    struct work *w = l->first;

    if (!w)
        return NULL;
    l->first = w->next;
    if (!l->first)
        l->last = NULL;
    return w;
}

/* -- a thread ------------------------------------------------------------------------------------------------------ */
static void thread_main(void *arg)
{
    struct workers *ws = arg;
    struct work *w;

    uv_mutex_lock(&ws->lock);
    for (;;) {
        while (!ws->todo.first && !ws->stopping)
            uv_cond_wait(&ws->more, &ws->lock);
        w = take_first(&ws->todo);
        if (!w)
            break;
        uv_mutex_unlock(&ws->lock);
        w->run(w);
        uv_mutex_lock(&ws->lock);
        append(&ws->done, w);
        (void)uv_async_send(&ws->wake);
    }
    ws->nalive--;
    (void)uv_async_send(&ws->wake);
    uv_mutex_unlock(&ws->lock);
}

/* -- the loop's side ----------------------------------------------------------------------------------------------- */
static void free_workers(struct workers *ws)
{
    uv_cond_destroy(&ws->more);
    uv_mutex_destroy(&ws->lock);
    free(ws->threads);
    free(ws);
}

static void on_wake_closed(uv_handle_t *handle)
{
    struct workers *ws = handle->data;
    void (*cb)(void *arg) = ws->on_closed;
    void *arg = ws->arg;

    free_workers(ws);
    if (cb)
        cb(arg);
}

static void on_wake(uv_async_t *wake)
{
    struct workers *ws = wake->data;
    struct work_list done;
    struct work *w;
    bool over;

    uv_mutex_lock(&ws->lock);
    done = ws->done;
    ws->done = (struct work_list){0};
    over = ws->stopping && ws->nalive == 0;
    uv_mutex_unlock(&ws->lock);
    while ((w = take_first(&done)))
        w->done(w);
    if (!over || uv_is_closing((uv_handle_t *)wake))
        return;
    for (unsigned i = 0; i < ws->nthreads; i++)
        (void)uv_thread_join(&ws->threads[i]); /* they are at their end: nothing to wait for */
    uv_close((uv_handle_t *)wake, on_wake_closed);
}

void workers_close(struct workers *ws, void (*cb)(void *arg), void *arg)
{
    ws->on_closed = cb;
    ws->arg = arg;
    uv_mutex_lock(&ws->lock);
    ws->stopping = true;
    uv_cond_broadcast(&ws->more);
    uv_mutex_unlock(&ws->lock);
    (void)uv_async_send(&ws->wake); /* there may be no thread that would */
}

void workers_submit(struct workers *ws, struct work *w)
{
    assert(!ws->stopping); /* set by this thread only */
    uv_mutex_lock(&ws->lock);
    append(&ws->todo, w);
    uv_cond_signal(&ws->more);
    uv_mutex_unlock(&ws->lock);
}

int workers_new(uv_loop_t *loop, unsigned nthreads, struct workers **ret_workers)
{
    const uv_thread_options_t options = {.flags = UV_THREAD_HAS_STACK_SIZE, .stack_size = STACK_SIZE};
    struct workers *ws = calloc(1, sizeof *ws);
    sigset_t all, old;
    int r;

    if (!ws)
        return -ENOMEM;
    ws->threads = calloc(nthreads, sizeof *ws->threads);
    r = ws->threads ? uv_mutex_init(&ws->lock) : -ENOMEM;
    if (r < 0) {
        free(ws->threads);
        free(ws);
        return r;
    }
    r = uv_cond_init(&ws->more);
    if (r < 0) {
        uv_mutex_destroy(&ws->lock);
        free(ws->threads);
        free(ws);
        return r;
    }
    r = uv_async_init(loop, &ws->wake, on_wake);
    if (r < 0) {
        free_workers(ws);
        return r;
    }
    ws->wake.data = ws;
    (void)sigfillset(&all); /* signals are the loop's */
    (void)pthread_sigmask(SIG_SETMASK, &all, &old);
    uv_mutex_lock(&ws->lock);
    while (r == 0 && ws->nthreads < nthreads) {
        r = uv_thread_create_ex(&ws->threads[ws->nthreads], &options, thread_main, ws);
        if (r == 0)
            ws->nthreads++;
    }
    ws->nalive = ws->nthreads;
    uv_mutex_unlock(&ws->lock);
    (void)pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r < 0) {
        workers_close(ws, NULL, NULL);
        return r;
    }
    *ret_workers = ws;
    return 0;
}

unsigned workers_default(unsigned most)
{
    cpu_set_t mine;
    int n = sched_getaffinity(0, sizeof mine, &mine) == 0 ? CPU_COUNT(&mine) : 1;

    return (unsigned)MIN(MAX(n, 1), (int)most);
}
