/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/sync.h"

#include "qmp/base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

struct sync {
    uv_thread_t thread;
    uv_async_t ended; /* also keeps the struct: freed when this and the deadline are closed */
    uv_timer_t deadline;
    unsigned nhandles;
    char *path; /* owned */
    int err;    /* the thread's until it has ended */
    sync_cb cb; /* NULL: told */
    void *arg;
};

/* In its thread. The name comes from QEMU: what is no storage is not even opened (a tape rewinds, a FIFO waits). */
static int sync_path(const char *path)
{
    int it = open(path, O_PATH | O_CLOEXEC), fd = -1, err = 0;
    char self[64];
    struct stat st;

    if (it < 0)
        return -errno;
    (void)snprintf(self, sizeof(self), "/proc/self/fd/%d", it);
    if (fstat(it, &st) < 0)
        err = -errno; /* NOLINT(bugprone-branch-clone): one after the other */
    else if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        err = -ENOTSUP;
    else if ((fd = open(self, O_RDONLY | O_NONBLOCK | O_CLOEXEC)) < 0 || fdatasync(fd) < 0)
        err = -errno;
    (void)close(it);
    if (fd >= 0)
        (void)close(fd); /* it was for reading */
    return err;
}

static void run(void *arg)
{
    struct sync *s = arg;

    s->err = sync_path(s->path);
    (void)uv_async_send(&s->ended); /* fails for a closing handle only, and only we close it */
}

static void on_handle_closed(uv_handle_t *h)
{
    struct sync *s = h->data;

    if (--s->nhandles)
        return;
    free(s->path);
    free(s);
}

static void close_handles(struct sync *s)
{
    uv_close((uv_handle_t *)&s->ended, on_handle_closed);
    uv_close((uv_handle_t *)&s->deadline, on_handle_closed);
}

static void on_ended(uv_async_t *ended)
{
    struct sync *s = ended->data;
    sync_cb cb = TAKE_PTR(s->cb);

    (void)uv_thread_join(&s->thread); /* it has said its last word */
    close_handles(s);
    if (cb)
        cb(s->arg, s->err);
}

static void on_deadline(uv_timer_t *deadline)
{
    struct sync *s = deadline->data;

    uv_unref((uv_handle_t *)&s->ended); /* nobody has to wait for it */
    TAKE_PTR(s->cb)(s->arg, -ETIMEDOUT);
}

int sync_start(uv_loop_t *loop, const char *path, unsigned timeout_ms, sync_cb cb, void *arg)
{
    struct sync *s = calloc(1, sizeof(*s));
    int r;

    if (!s || !(s->path = strdup(path))) {
        free(s);
        return -ENOMEM;
    }
    s->cb = cb;
    s->arg = arg;
    s->ended.data = s->deadline.data = s;
    if ((r = uv_async_init(loop, &s->ended, on_ended)) < 0) {
        free(s->path);
        free(s);
        return r;
    }
    (void)uv_timer_init(loop, &s->deadline); /* never fails */
    s->nhandles = 2;
    if ((r = uv_thread_create(&s->thread, run, s)) < 0) {
        close_handles(s);
        return r;
    }
    (void)uv_timer_start(&s->deadline, on_deadline, timeout_ms, /* repeat= */ 0);
    return 0;
}
