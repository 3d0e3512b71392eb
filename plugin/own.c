/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * own: the door with the engine behind it: one VM (server/vm) in this process, on the loop's thread. All connections of
 * this nbdkit are one client of it, so that they share a session.
 *
 * After a session whose reads failed there is no second one: a filter above (retry) or a client may come again and go
 * on where it was, and another freeze is another instant.
 */
#include "door.h"

#include "backup/scratch.h"
#include "config.h"
#include "source/vhost.h"
#include "vm.h"

#include <nbdkit-plugin.h>
#include <stdio.h>
#include <unistd.h>

#define IDENTITY "nbdkit"
#define ALLOCATION "base:allocation"
#define DIRTY "qemu:dirty-bitmap:"
#define RETRY_MS 200u /* to ask again for a QEMU that is not reached yet; its client tries by itself */

struct own {
    struct door door;
    struct vm *vm;                             /* owned */
    struct scratch_place *scratch;             /* owned */
    struct vhost_room room;                    /* memory that QEMU shares with us: the data comes through it */
    struct failure spoiled;                    /* reads failed … */
    char spoiled_session[FROZEN_SESSION_SIZE]; /* … in this one */
    struct wait *retrying;                     /* borrowed: those that will ask again */
    bool stopping;
};

struct own_handle {
    struct handle handle;
    struct vm_stay stay;
    struct open *opening; /* borrowed: waits for maps; NULL: it does not */
    const char *since;
    char *disk; /* owned */
};

static struct own *own_of(struct door *d)
{
    return container_of(d, struct own, door);
}

static struct own_handle *handle_of(struct vm_stay *stay)
{
    return container_of(stay, struct own_handle, stay);
}

static void spoil(struct own *own, const char *session, const struct failure *why)
{
    if (own->spoiled.err)
        return;
    own->spoiled = *why;
    (void)snprintf(own->spoiled_session, sizeof(own->spoiled_session), "%s", session);
}

/* -- what waits for QEMU ------------------------------------------------------------------------------------------- */

/* An operation with a deadline; its timer lives with it on the stack of the thread that waits. */
struct wait {
    struct task task;
    struct own *own;
    struct failure *failure; /* borrowed */
    uv_timer_t timer;
    uint64_t deadline_ms; /* of door_now_ms() and uv_now() */
    void (*again)(struct wait *w);
    void (*too_late)(struct wait *w);
    struct wait *next; /* of those that will ask again */
};

static void on_wait_closed(uv_handle_t *h)
{
    task_done(&container_of((uv_timer_t *)h, struct wait, timer)->task);
}

static void wait_begin(struct wait *w)
{
    (void)uv_timer_init(&w->own->door.loop->uv, &w->timer);
}

static void wait_end(struct wait *w)
{
    uv_close((uv_handle_t *)&w->timer, on_wait_closed);
}

static uint64_t wait_left_ms(const struct wait *w)
{
    uint64_t now = uv_now(&w->own->door.loop->uv);

    return now < w->deadline_ms ? w->deadline_ms - now : 0;
}

static void on_too_late(uv_timer_t *timer)
{
    struct wait *w = container_of(timer, struct wait, timer);

    w->too_late(w);
}

static void wait_for_answer(struct wait *w)
{
    (void)uv_timer_start(&w->timer, on_too_late, wait_left_ms(w), 0);
}

static void on_again(uv_timer_t *timer)
{
    struct wait *w = container_of(timer, struct wait, timer), **at = &w->own->retrying;

    while (*at != w)
        at = &(*at)->next;
    *at = w->next;
    w->again(w);
}

/* Whatever is said of an attempt to reach QEMU that failed: another one follows. */
static bool is_away(const struct wait *w, const struct failure *f)
{
    return f->err == -ENOTCONN || !vm_is_connected(w->own->vm);
}

/* Not reached yet, or its monitor is still with a predecessor of ours: until the deadline. */
static void wait_for_qemu(struct wait *w, const char *why)
{
    uint64_t left = wait_left_ms(w);

    if (left > 0 && !w->own->stopping) {
        w->next = w->own->retrying;
        w->own->retrying = w;
        (void)uv_timer_start(&w->timer, on_again, MIN(left, (uint64_t)RETRY_MS), 0);
        return;
    }
    (void)failure_set(w->failure, -ENOTCONN, "%s", why);
    wait_end(w);
}

struct give_up {
    struct task task;
    struct wait *wait;
};

static void begin_give_up(struct task *task)
{
    struct wait *w = container_of(task, struct give_up, task)->wait, **at = &w->own->retrying;

    if (!uv_is_closing((uv_handle_t *)&w->timer)) {
        while (*at && *at != w)
            at = &(*at)->next;
        if (*at)
            *at = w->next;
        (void)failure_set(w->failure, -ESHUTDOWN, "given up: the client has gone, or nbdkit is ending");
        w->too_late(w);
    }
    task_done(task);
}

static void wait_call(struct wait *w)
{
    struct loop *loop = w->own->door.loop;
    struct give_up give_up = {.task.fn = begin_give_up, .wait = w};
    bool wanted = true;

    loop_begin(loop, &w->task);
    while (!task_wait(&w->task, DOOR_LOOK_MS)) {
        if (wanted && !door_is_wanted()) {
            wanted = false;
            loop_call(loop, &give_up.task);
        }
    }
}

/* -- list ---------------------------------------------------------------------------------------------------------- */

struct list {
    struct wait wait;
    struct vm_query query;
    struct names *names; /* borrowed */
};

static void on_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct list *l = q->arg;

    if (f && is_away(&l->wait, f)) {
        wait_for_qemu(&l->wait, f->text);
        return;
    }
    if (f)
        (void)failure_copy(l->wait.failure, f);
    for (size_t i = 0; !f && i < disks->ndisks; i++) {
        if (names_add(l->names, disks->disks[i].name) < 0)
            (void)failure_set(l->wait.failure, -ENOMEM, "out of memory");
    }
    wait_end(&l->wait);
}

static void list_again(struct wait *w)
{
    struct list *l = container_of(w, struct list, wait);
    struct vm *vm = w->own->vm;
    int r = vm_query_start(vm, &l->query, on_disks, l);

    if (r == 0) {
        wait_for_answer(w);
    } else if (r == -ENOTCONN) {
        wait_for_qemu(w, vm_trouble(vm));
    } else {
        (void)failure_set(w->failure, r, "%s", vm_trouble(vm));
        wait_end(w);
    }
}

static void list_too_late(struct wait *w)
{
    vm_query_forget(&container_of(w, struct list, wait)->query);
    (void)failure_set(w->failure, -ETIMEDOUT, "VM '%s' has not said within %u s what disks it has", vm_name(w->own->vm),
                      w->own->door.options->timeout_s);
    wait_end(w);
}

static void begin_list(struct task *task)
{
    struct wait *w = container_of(task, struct wait, task);

    wait_begin(w);
    w->again(w);
}

static int own_list(struct door *d, uint64_t deadline_ms, struct names *ret_names, struct failure *f)
{
    struct list l = {
        .wait = {.task.fn = begin_list,
                 .own = own_of(d),
                 .failure = f,
                 .deadline_ms = deadline_ms,
                 .again = list_again,
                 .too_late = list_too_late},
        .names = ret_names,
    };

    wait_call(&l.wait);
    return f->err;
}

/* -- open ---------------------------------------------------------------------------------------------------------- */

struct open {
    struct wait wait;
    struct own_handle *handle; /* owned until it is open */
};

static void leave(struct own_handle *h, bool whole, bool failed)
{
    h->handle.source = NULL;
    vm_leave(&h->stay, whole, failed);
}

static struct frozen *freeze_of(struct own *own, struct own_handle *h, struct failure *f)
{
    const struct options *o = own->door.options;
    const char *session = vm_stay_session(&h->stay);
    struct source *source = vm_stay_source(&h->stay);
    const struct map *allocation = vm_stay_map(&h->stay, ALLOCATION), *dirty = NULL;
    struct frozen *frozen = door_find(&own->door, h->disk, session);
    _cleanup_free_ char *context = NULL;
    int r;

    if (own->spoiled.err && strcmp(session, own->spoiled_session) != 0) {
        (void)failure_set(
            f, -ESTALE,
            "reads of the disks frozen before have failed (%s); what is frozen now is another instant, and "
            "must not be mixed with what was read then: start nbdkit again",
            own->spoiled.text);
        return NULL;
    }
    if (frozen)
        return frozen;
    if (o->since && asprintf(&context, DIRTY "%s", o->since) < 0)
        context = NULL;
    if (o->since && context)
        dirty = vm_stay_map(&h->stay, context);
    if (!source || !allocation || (o->since && !dirty)) {
        (void)failure_set(f, -EIO, "session %s has no map of disk '%s'", session, h->disk);
        return NULL;
    }
    r = frozen_new(h->disk, session, source->size, o->view, allocation, dirty, &frozen);
    if (r < 0)
        (void)failure_set(f, r, "the maps of disk '%s' cannot be kept: %s", h->disk, strerror(-r));
    return r < 0 ? NULL : frozen;
}

/* Data could be read already, but a plugin's client may ask for extents first, and gets one answer. */
static bool expects_maps(struct own *own, struct vm_stay *stay)
{
    const char *since = own->door.options->since;
    _cleanup_free_ char *context = NULL;

    if (!vm_stay_map(stay, ALLOCATION) && vm_stay_expects_map(stay, ALLOCATION))
        return true;
    if (!since || asprintf(&context, DIRTY "%s", since) < 0)
        context = NULL;
    return context && !vm_stay_map(stay, context) && vm_stay_expects_map(stay, context);
}

static void try_open(struct open *open)
{
    struct wait *w = &open->wait;
    struct own_handle *h = open->handle;

    h->opening = expects_maps(w->own, &h->stay) ? open : NULL;
    if (h->opening)
        return;
    h->handle.frozen = freeze_of(w->own, h, w->failure);
    if (h->handle.frozen) {
        door_keep(&w->own->door, h->handle.frozen);
        h->handle.source = vm_stay_source(&h->stay);
    } else {
        leave(h, false, false);
    }
    wait_end(w);
}

static void on_maps(struct vm_stay *stay)
{
    struct open *open = handle_of(stay)->opening;

    if (open)
        try_open(open);
}

static void on_entered(struct vm_stay *stay, const struct failure *f)
{
    struct open *open = stay->arg;
    struct wait *w = &open->wait;

    if (f)
        (void)uv_timer_stop(&w->timer);
    if (f && is_away(w, f)) {
        wait_for_qemu(w, f->text);
        return;
    }
    if (f) {
        (void)failure_copy(w->failure, f);
        wait_end(w);
        return;
    }
    try_open(open);
}

/* The session is given up: QEMU is gone, or its snapshot. */
static void on_lost(struct vm_stay *stay, const struct failure *why)
{
    struct own_handle *h = handle_of(stay);
    struct own *own = own_of(h->handle.door);
    struct open *open = TAKE_PTR(h->opening);

    if (open) {
        (void)failure_copy(open->wait.failure, why);
        leave(h, false, true);
        wait_end(&open->wait);
        return;
    }
    spoil(own, vm_stay_session(stay), why);
    h->handle.lost = *why;
    h->handle.source = NULL;
    if (h->handle.frozen)
        frozen_read_failed(h->handle.frozen);
    if (h->handle.nreads == 0)
        leave(h, false, true);
}

static void open_again(struct wait *w)
{
    struct open *open = container_of(w, struct open, wait);
    struct own_handle *h = open->handle;
    const struct options *o = w->own->door.options;
    int r;

    h->since = o->since;
    h->stay = (struct vm_stay){
        .identity = IDENTITY,
        .disk = h->disk,
        .checkpoint = o->checkpoint,
        .since = &h->since,
        .nsince = o->since ? 1 : 0,
        .on_entered = on_entered,
        .on_maps = on_maps,
        .on_lost = on_lost,
        .arg = open,
    };
    r = vm_enter(w->own->vm, &h->stay);
    if (r == 0) {
        wait_for_answer(w);
    } else if (r == -ENOTCONN) {
        wait_for_qemu(w, vm_trouble(w->own->vm));
    } else {
        (void)failure_set(w->failure, r, "%s", vm_trouble(w->own->vm));
        wait_end(w);
    }
}

static void open_too_late(struct wait *w)
{
    struct open *open = container_of(w, struct open, wait);
    const char *trouble = vm_trouble(w->own->vm);

    open->handle->opening = NULL;
    vm_leave(&open->handle->stay, false, false);
    (void)failure_set(w->failure, -ETIMEDOUT, "the disks of VM '%s' could not be frozen within %u s%s%s",
                      vm_name(w->own->vm), w->own->door.options->timeout_s, *trouble ? ": " : "", trouble);
    wait_end(w);
}

static void begin_open(struct task *task)
{
    struct wait *w = container_of(task, struct wait, task);

    wait_begin(w);
    w->again(w);
}

static void free_handle(struct own_handle *h)
{
    free(h->disk);
    free(h);
}

static int own_open(struct door *d, const char *disk, uint64_t deadline_ms, struct handle **ret_handle,
                    struct failure *f)
{
    struct own_handle *h = calloc(1, sizeof(*h));
    struct open open = {
        .wait = {.task.fn = begin_open,
                 .own = own_of(d),
                 .failure = f,
                 .deadline_ms = deadline_ms,
                 .again = open_again,
                 .too_late = open_too_late},
        .handle = h,
    };

    if (!h || !(h->disk = strdup(disk))) {
        free(h);
        return failure_set(f, -ENOMEM, "out of memory");
    }
    h->handle.door = d;
    wait_call(&open.wait);
    if (f->err) {
        free_handle(h);
        return f->err;
    }
    *ret_handle = &h->handle;
    return 0;
}

/* -- reads --------------------------------------------------------------------------------------------------------- */

static void own_read_failed(struct handle *handle, int err)
{
    struct own_handle *h = container_of(handle, struct own_handle, handle);
    struct failure why = {0};

    (void)failure_set(&why, err, "disk '%s': %s", h->disk, strerror(-err));
    if (h->stay.vm)
        spoil(own_of(handle->door), handle->frozen->session, &why);
    if (err == -ESTALE)
        vm_stay_lost(&h->stay);
}

static void own_idle(struct handle *handle)
{
    leave(container_of(handle, struct own_handle, handle), false, true);
}

/* -- close --------------------------------------------------------------------------------------------------------- */

struct close {
    struct task task;
    struct own_handle *handle;
};

/* NBD's goodbye does not reach a plugin. That all has been handed out must do: who breaks off has not got all. */
static void begin_close(struct task *task)
{
    struct own_handle *h = container_of(task, struct close, task)->handle;
    struct frozen *f = h->handle.frozen;

    leave(h, frozen_is_whole(f), false);
    if (door_let_go(h->handle.door, f))
        door_put_aside(h->handle.door, f);
    task_done(task);
}

static void own_close(struct handle *handle)
{
    struct own_handle *h = container_of(handle, struct own_handle, handle);
    struct close close = {.task.fn = begin_close, .handle = h};

    loop_call(handle->door->loop, &close.task);
    free_handle(h);
}

/* -- start and end ------------------------------------------------------------------------------------------------- */

struct start {
    struct task task;
    struct own *own;
    struct failure *failure; /* borrowed */
    uv_timer_t timer;
};

static void ignore_closed(void *arg)
{
}

static void begin_start(struct task *task)
{
    struct start *s = container_of(task, struct start, task);
    struct own *own = s->own;
    const struct options *o = own->door.options;
    const struct scratch_limits limits = {.reserve = CONFIG_SCRATCH_RESERVE};
    const struct vm_config config = {
        .name = o->vm,
        .qmp_path = o->qmp,
        .only = (const char *const *)o->disks,
        .nonly = o->ndisks,
        .place = o->place,
        .cbw_timeout_s = CONFIG_CBW_TIMEOUT_S,
        .state_dir = o->state,
        .linger_ms = o->linger_s * 1000,
        .max_pause_ms = o->max_pause_s * 1000,
        .engine = ENGINE_AUTO,
        .qga_path = o->qga,
        .quiesce = o->quiesce,
        .watchdog = o->watchdog,
        .vhost_room = &own->room,
    };
    struct vm_config with_scratch = config;
    int r = scratch_new(&own->door.loop->uv, o->scratch ? o->scratch : "", &limits, &own->scratch);

    if (r == 0) {
        with_scratch.scratch = own->scratch;
        r = vm_new(&own->door.loop->uv, &with_scratch, &own->vm);
        if (r < 0)
            scratch_close(TAKE_PTR(own->scratch), ignore_closed, NULL);
    }
    if (r < 0)
        (void)failure_set(s->failure, r, "cannot begin with VM '%s': %s", o->vm, strerror(-r));
    else
        vm_start(own->vm);
    task_done(task);
}

static void on_stop_closed(uv_handle_t *h)
{
    task_done(&container_of((uv_timer_t *)h, struct start, timer)->task);
}

static void on_scratch_closed(void *arg)
{
    uv_close((uv_handle_t *)&((struct start *)arg)->timer, on_stop_closed);
}

static void on_vm_stopped(void *arg)
{
    struct own *own = ((struct start *)arg)->own;

    own->vm = NULL;
    door_clear(&own->door, /* session= */ NULL);
    scratch_close(TAKE_PTR(own->scratch), on_scratch_closed, arg);
}

/* As the daemon does it: what hangs now would hang for ever, and the next who comes sweeps. */
static void on_stop_too_late(uv_timer_t *timer)
{
    nbdkit_error("qpull: not everything could be undone within %u s; ending anyhow, the next start makes it good",
                 SERVER_STOP_MS / 1000);
    _exit(EXIT_FAILURE);
}

static void begin_stop(struct task *task)
{
    struct start *s = container_of(task, struct start, task);

    (void)uv_timer_init(&s->own->door.loop->uv, &s->timer);
    (void)uv_timer_start(&s->timer, on_stop_too_late, SERVER_STOP_MS, 0);
    s->own->stopping = true;
    for (struct wait *w = TAKE_PTR(s->own->retrying), *next; w; w = next) {
        next = w->next;
        (void)failure_set(w->failure, -ESHUTDOWN, "nbdkit is ending");
        wait_end(w);
    }
    vm_stop(s->own->vm, on_vm_stopped, s); /* answers all who wait for it; they may still ask for its name */
}

static void own_stop(struct door *d)
{
    struct own *own = own_of(d);
    struct start stop = {.task.fn = begin_stop, .own = own};

    loop_call(d->loop, &stop.task);
    free(own);
}

static const struct door_ops own_ops = {
    .list = own_list,
    .open = own_open,
    .close = own_close,
    .read_failed = own_read_failed,
    .idle = own_idle,
    .stop = own_stop,
};

int own_new(const struct options *o, struct loop *l, struct door **ret_door, struct failure *f)
{
    struct own *own = calloc(1, sizeof(*own));
    struct start start = {.task.fn = begin_start, .own = own, .failure = f};

    if (!own)
        return failure_set(f, -ENOMEM, "out of memory");
    own->door = (struct door){.ops = &own_ops, .options = o, .loop = l};
    own->room.limit = CONFIG_SHARED_MEMORY;
    loop_call(l, &start.task);
    if (f->err) {
        free(own);
        return f->err;
    }
    *ret_door = &own->door;
    return 0;
}
