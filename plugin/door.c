/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "door.h"

#include <nbdkit-plugin.h>

#define PIECE (256u << 10) /* bytes read at once of what nobody wants to have */

void names_free(struct names *n)
{
    for (size_t i = 0; i < n->nnames; i++)
        free(n->names[i]);
    free(TAKE_PTR(n->names));
    n->nnames = 0;
}

int names_add(struct names *n, const char *name)
{
    char **names = realloc(n->names, (n->nnames + 1) * sizeof(*names));

    if (!names)
        return -ENOMEM;
    n->names = names;
    names[n->nnames] = strdup(name);
    if (!names[n->nnames])
        return -ENOMEM;
    n->nnames++;
    return 0;
}

bool door_is_wanted(void)
{
    return nbdkit_nanosleep(0, 1) == 0;
}

uint64_t door_now_ms(void)
{
    return uv_hrtime() / 1000000;
}

/* -- frozen disks that somebody has open --------------------------------------------------------------------------- */

static struct frozen *find(struct frozen *f, const char *disk, const char *session)
{
    while (f && (strcmp(f->disk, disk) != 0 || (session && strcmp(f->session, session) != 0)))
        f = f->next;
    return f;
}

struct frozen *door_find(struct door *d, const char *disk, const char *session)
{
    struct frozen *f = find(d->frozen, disk, session);

    return f ? f : find(d->left, disk, session);
}

static void unlink_from(struct frozen **at, const struct frozen *f)
{
    while (*at && *at != f)
        at = &(*at)->next;
    if (*at)
        *at = f->next;
}

void door_keep(struct door *d, struct frozen *f)
{
    if (f->nrefs++ > 0)
        return;
    unlink_from(&d->left, f);
    door_clear(d, f->session);
    f->next = d->frozen;
    d->frozen = f;
}

bool door_let_go(struct door *d, struct frozen *f)
{
    if (--f->nrefs > 0)
        return false;
    unlink_from(&d->frozen, f);
    return true;
}

void door_put_aside(struct door *d, struct frozen *f)
{
    f->next = d->left;
    d->left = f;
}

void door_clear(struct door *d, const char *session)
{
    for (struct frozen *f = d->left, *next; f; f = next) {
        next = f->next;
        if (session && strcmp(f->session, session) == 0)
            continue;
        unlink_from(&d->left, f);
        frozen_free(f);
    }
}

/* -- reading ------------------------------------------------------------------------------------------------------- */

struct read_task {
    struct task task;
    struct handle *handle;
    struct source_read read;
    struct failure *failure; /* borrowed */
    int err;
};

static void end_read(struct read_task *t, int err)
{
    struct handle *h = t->handle;

    t->err = err;
    if (err == -ESTALE)
        (void)failure_set(t->failure, err,
                          "disk '%s': the frozen view is lost: scratch space was full, failed or was "
                          "too slow, and QEMU gave the snapshot up",
                          h->frozen->disk);
    else if (err < 0)
        (void)failure_set(t->failure, err, "disk '%s': %s", h->frozen->disk,
                          h->lost.err ? h->lost.text : strerror(-err));
    task_done(&t->task);
}

static void on_read(struct source_read *r, int err)
{
    struct read_task *t = r->arg;
    struct handle *h = t->handle;

    h->nreads--;
    if (err < 0)
        h->door->ops->read_failed(h, err);
    /* A handle is closed only when its reads are answered, so it stands until the last of them is. */
    if (!h->source && h->nreads == 0)
        h->door->ops->idle(h);
    end_read(t, err);
}

static void begin_read(struct task *task)
{
    struct read_task *t = container_of(task, struct read_task, task);
    struct handle *h = t->handle;
    int r = h->source ? source_read(h->source, &t->read) : -EIO;

    if (r == 0) {
        h->nreads++;
        return;
    }
    h->door->ops->read_failed(h, r);
    end_read(t, r);
}

static int read_piece(struct handle *h, void *buffer, size_t length, uint64_t offset, struct failure *f)
{
    struct read_task t = {
        .task.fn = begin_read,
        .handle = h,
        .read = {.offset = offset, .length = length, .buffer = buffer, .cb = on_read, .arg = &t},
        .failure = f,
    };

    loop_call(h->door->loop, &t.task);
    return t.err;
}

struct busy_task {
    struct task task;
    struct handle *handle;
    bool busy;
};

static void begin_busy(struct task *task)
{
    struct busy_task *t = container_of(task, struct busy_task, task);

    t->busy = t->handle->nreads > 0;
    task_done(task);
}

bool door_is_busy(struct handle *h)
{
    struct busy_task t = {.task.fn = begin_busy, .handle = h};

    loop_call(h->door->loop, &t.task);
    return t.busy;
}

static int read_for_nobody(struct handle *h, size_t length, uint64_t offset, struct failure *f)
{
    _cleanup_free_ char *buffer = malloc(MIN(length, (size_t)PIECE));
    int r = buffer ? 0 : failure_set(f, -ENOMEM, "out of memory");

    for (size_t done = 0; r == 0 && done < length;) {
        size_t n = MIN(length - done, (size_t)PIECE);

        if (!frozen_is_zero(h->frozen, offset + done, n))
            r = read_piece(h, buffer, n, offset + done, f);
        done += n;
    }
    return r;
}

int door_read(struct handle *h, void *buffer, size_t length, uint64_t offset, struct failure *f)
{
    int r = 0;

    if (!buffer)
        return read_for_nobody(h, length, offset, f);
    if (length == 0)
        return 0;
    if (frozen_is_zero(h->frozen, offset, length))
        memset(buffer, 0, length);
    else
        r = read_piece(h, buffer, length, offset, f);
    if (r == 0)
        frozen_was_read(h->frozen, offset, length);
    else
        frozen_read_failed(h->frozen);
    return r;
}
