/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * through: the door that leads through a running qpulld (server=): this nbdkit is one NBD client of it, and qpulld
 * alone decides who may freeze what, where scratch goes and what stays. Data comes by source/nbd on the loop's thread.
 */
#include "door.h"

#include "keeper.h"
#include "source/nbd.h"

#include <stdio.h>
#include <time.h>

#define DIRTY_CONTEXT "qemu:dirty-bitmap:"

struct through {
    struct door door;
    pthread_mutex_t opening; /* one at a time, so that a disk gets one keeper */
    struct failure spoiled;  /* loop thread: reads failed, see own.c */
};

struct open;

struct through_handle {
    struct handle handle;
    char *export_name; /* owned */
    struct open *open; /* while it is being opened */
};

static struct through *through_of(struct door *d)
{
    return container_of(d, struct through, door);
}

/* -- open ---------------------------------------------------------------------------------------------------------- */

struct open {
    struct task task;
    struct through_handle *handle;  /* borrowed */
    const char *disk;               /* borrowed */
    const char *context;            /* borrowed, or NULL: of the dirty map */
    struct keeper *keeper;          /* given when the disk is opened */
    struct failure *failure;        /* borrowed */
    struct map *allocation, *dirty; /* owned */
    struct source *source;          /* owned */
    uint64_t deadline_ms;           /* of door_now_ms(): of all of it */
    /* loop thread: what is waited for, or NULL */
    struct source_nbd_map *asking;
    struct source_nbd_open *opening;
};

static struct door *door_of(const struct open *o)
{
    return o->handle->handle.door;
}

static struct source_nbd_config config_of(const struct open *o)
{
    return (struct source_nbd_config){
        .socket_path = door_of(o)->options->server,
        .export_name = o->handle->export_name,
        .timeout_ms = door_of(o)->options->timeout_s * 1000,
    };
}

static void go_on(struct open *o);

/* Reads under way come back as failures of their own. */
static void on_lost(void *arg, const struct failure *why)
{
    struct through_handle *h = arg;

    h->handle.lost = *why;
}

static void on_map(void *arg, struct map *map, const struct failure *f)
{
    struct open *o = arg;

    o->asking = NULL;
    if (f)
        (void)failure_copy(o->failure, f);
    else if (!o->allocation)
        o->allocation = map;
    else
        o->dirty = map;
    go_on(o);
}

static void on_open(void *arg, struct source *s, const struct failure *f)
{
    struct open *o = ((struct through_handle *)arg)->open;

    o->opening = NULL;
    if (f)
        (void)failure_copy(o->failure, f);
    o->source = s;
    go_on(o);
}

static void end_open(struct open *o)
{
    map_free(TAKE_PTR(o->allocation));
    map_free(TAKE_PTR(o->dirty));
    if (o->failure->err && o->source)
        source_close(TAKE_PTR(o->source), NULL, NULL);
    o->handle->handle.source = o->source;
    task_done(&o->task);
}

static void take_frozen(struct open *o)
{
    struct door *d = door_of(o);
    struct frozen *frozen = o->handle->handle.frozen;
    int r = 0;

    if (!frozen) {
        r = frozen_new(o->disk, "qpulld", o->source->size, d->options->view, o->allocation, o->dirty, &frozen);
        if (r < 0) {
            (void)failure_set(o->failure, r, "the maps of disk '%s' cannot be kept: %s", o->disk, strerror(-r));
        } else {
            frozen->keeper = TAKE_PTR(o->keeper);
            o->handle->handle.frozen = frozen;
            door_keep(d, frozen);
        }
    }
    end_open(o);
}

/* The maps, where nobody has them yet, then the data. */
static void go_on(struct open *o)
{
    struct source_nbd_config config = config_of(o);
    uv_loop_t *loop = &door_of(o)->loop->uv;
    bool have_maps = o->handle->handle.frozen;
    int r;

    if (o->failure->err) {
        end_open(o);
        return;
    }
    if (!have_maps && !o->allocation)
        r = source_nbd_map(loop, &config, "base:allocation", on_map, o, &o->asking);
    else if (!have_maps && o->context && !o->dirty)
        r = source_nbd_map(loop, &config, o->context, on_map, o, &o->asking);
    else if (!o->source)
        r = source_nbd_open(loop, &config, on_lost, on_open, o->handle, &o->opening);
    else {
        take_frozen(o);
        return;
    }
    if (r < 0) {
        (void)failure_set(o->failure, r, "'%s': %s", config.socket_path, strerror(-r));
        end_open(o);
    }
}

static void begin_open(struct task *task)
{
    struct open *o = container_of(task, struct open, task);

    go_on(o);
}

struct give_up {
    struct task task;
    struct open *open;
    struct failure why;
};

/* What is waited for answers, later, and finds the failure. */
static void begin_give_up(struct task *task)
{
    struct give_up *g = container_of(task, struct give_up, task);
    struct open *o = g->open;

    (void)failure_copy(o->failure, &g->why);
    if (o->asking)
        source_nbd_map_cancel(o->asking);
    if (o->opening)
        source_nbd_open_cancel(o->opening);
    task_done(task);
}

static uint64_t left_ms(const struct open *o)
{
    uint64_t now = door_now_ms();

    return now < o->deadline_ms ? o->deadline_ms - now : 0;
}

/* Why the open must end now; 0: it need not. */
static int why_end(const struct open *o, struct failure *f)
{
    if (left_ms(o) == 0)
        return failure_set(f, -ETIMEDOUT, "disk '%s': qpulld at '%s' has not given it within %u s", o->disk,
                           door_of(o)->options->server, door_of(o)->options->timeout_s);
    if (!door_is_wanted())
        return failure_set(f, -ESHUTDOWN, "disk '%s': given up: the client has gone, or nbdkit is ending", o->disk);
    return 0;
}

static unsigned look_ms(const struct open *o)
{
    return (unsigned)MIN(left_ms(o), (uint64_t)DOOR_LOOK_MS);
}

static void open_call(struct open *o)
{
    struct loop *loop = door_of(o)->loop;
    struct give_up give_up = {.task.fn = begin_give_up, .open = o};

    loop_begin(loop, &o->task);
    while (!task_wait(&o->task, give_up.why.err ? DOOR_LOOK_MS : look_ms(o))) {
        if (!give_up.why.err && why_end(o, &give_up.why) < 0)
            loop_call(loop, &give_up.task);
    }
}

/* While another one opens its disk. */
static int wait_for_turn(struct open *o)
{
    pthread_mutex_t *opening = &through_of(door_of(o))->opening;

    for (;;) {
        struct timespec until = task_time(look_ms(o));
        int r = pthread_mutex_timedlock(opening, &until);

        if (r == 0)
            return 0;
        if (r != ETIMEDOUT)
            return failure_set(o->failure, -r, "disk '%s': %s", o->disk, strerror(r));
        if (why_end(o, o->failure) < 0)
            return o->failure->err;
    }
}

/* What is open already is kept for us, so that its keeper stays. */
static void begin_find(struct task *task)
{
    struct open *o = container_of(task, struct open, task);
    struct through *t = through_of(door_of(o));
    struct frozen *frozen = door_find(&t->door, o->disk, /* session= */ NULL);

    if (t->spoiled.err) {
        (void)failure_set(o->failure, -ESTALE,
                          "reads of the disks frozen before have failed (%s); what is frozen now may be another "
                          "instant, and must not be mixed with what was read then: start nbdkit again",
                          t->spoiled.text);
    } else if (frozen) {
        door_keep(&t->door, frozen);
        o->handle->handle.frozen = frozen;
    }
    task_done(task);
}

struct close {
    struct task task;
    struct through_handle *handle;
    bool last;
};

static void on_source_closed(void *arg)
{
    struct close *c = arg;
    struct handle *h = &c->handle->handle;

    c->last = h->frozen && door_let_go(h->door, h->frozen);
    task_done(&c->task);
}

static void begin_close(struct task *task)
{
    struct close *c = container_of(task, struct close, task);
    struct source *source = TAKE_PTR(c->handle->handle.source);

    if (source)
        source_close(source, on_source_closed, c);
    else
        on_source_closed(c);
}

/* The data's connections leave before the keeper, whose goodbye counts. */
static void through_close(struct handle *handle)
{
    struct through_handle *h = container_of(handle, struct through_handle, handle);
    struct close close = {.task.fn = begin_close, .handle = h};

    loop_call(handle->door->loop, &close.task);
    if (close.last) {
        keeper_free(handle->frozen->keeper, frozen_is_whole(handle->frozen));
        frozen_free(handle->frozen);
    }
    free(h->export_name);
    free(h);
}

static char *export_name_of(const struct options *o, const char *disk)
{
    char *name = NULL;
    int r =
        o->checkpoint ? asprintf(&name, "%s/%s@%s", o->vm, disk, o->checkpoint) : asprintf(&name, "%s/%s", o->vm, disk);

    return r < 0 ? NULL : name;
}

static int open_it(struct open *o)
{
    const struct options *options = door_of(o)->options;
    struct loop *loop = door_of(o)->loop;
    struct failure *f = o->failure;

    o->task.fn = begin_find;
    loop_call(loop, &o->task);
    if (f->err)
        return f->err;
    if (!o->handle->handle.frozen &&
        keeper_new(options->server, o->handle->export_name, o->context, o->deadline_ms, &o->keeper, f) < 0)
        return f->err;
    o->task.fn = begin_open;
    open_call(o);
    if (f->err)
        return f->err;
    /* It has been there all the time: then this is its session, and no later one. */
    return keeper_stands(o->handle->handle.frozen->keeper)
               ? 0
               : failure_set(f, -ENOTCONN, "disk '%s': qpulld at '%s' has ended the session", o->disk, options->server);
}

static int through_open(struct door *d, const char *disk, uint64_t deadline_ms, struct handle **ret_handle,
                        struct failure *f)
{
    struct through_handle *h = calloc(1, sizeof(*h));
    _cleanup_free_ char *context = NULL;
    struct open o = {.handle = h, .disk = disk, .failure = f, .deadline_ms = deadline_ms};

    if (h)
        h->export_name = export_name_of(d->options, disk);
    if (!h || !h->export_name || (d->options->since && asprintf(&context, DIRTY_CONTEXT "%s", d->options->since) < 0)) {
        if (h)
            free(h->export_name);
        free(h);
        context = NULL;
        return failure_set(f, -ENOMEM, "out of memory");
    }
    h->handle.door = d;
    h->open = &o;
    o.context = context;
    if (wait_for_turn(&o) == 0) {
        (void)open_it(&o);
        (void)pthread_mutex_unlock(&through_of(d)->opening);
    }
    h->open = NULL;
    if (f->err) {
        keeper_free(o.keeper, /* well= */ false);
        through_close(&h->handle);
        return f->err;
    }
    *ret_handle = &h->handle;
    return 0;
}

/* -- the rest ------------------------------------------------------------------------------------------------------ */

static int through_list(struct door *d, uint64_t deadline_ms, struct names *ret_names, struct failure *f)
{
    _cleanup_free_ char *prefix = NULL;

    if (asprintf(&prefix, "%s/", d->options->vm) < 0) {
        prefix = NULL;
        return failure_set(f, -ENOMEM, "out of memory");
    }
    return keeper_list(d->options->server, prefix, deadline_ms, ret_names, f);
}

static void through_read_failed(struct handle *handle, int err)
{
    struct through *t = through_of(handle->door);

    (void)failure_set(&t->spoiled, err, "disk '%s': %s", handle->frozen->disk,
                      handle->lost.err ? handle->lost.text : strerror(-err));
}

static void through_idle(struct handle *handle)
{
}

static void through_stop(struct door *d)
{
    struct through *t = through_of(d);

    (void)pthread_mutex_destroy(&t->opening);
    free(t);
}

static const struct door_ops through_ops = {
    .list = through_list,
    .open = through_open,
    .close = through_close,
    .read_failed = through_read_failed,
    .idle = through_idle,
    .stop = through_stop,
};

int through_new(const struct options *o, struct loop *l, struct door **ret_door, struct failure *f)
{
    struct through *t = calloc(1, sizeof(*t));

    if (!t)
        return failure_set(f, -ENOMEM, "out of memory");
    t->door = (struct door){.ops = &through_ops, .options = o, .loop = l};
    (void)pthread_mutex_init(&t->opening, NULL);
    *ret_door = &t->door;
    return 0;
}
