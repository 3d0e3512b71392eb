/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A VM that is powered off: its images stand in for QEMU. They are a VM of their own, whose QMP is that of a
 * qemu-storage-daemon which runs only while somebody needs it (docs/decisions/0008-offline-images.md); a VM that has
 * both QMP and images has that other VM as its twin.
 */
#include "log.h"
#include "vm_internal.h"

#include "backup/seq.h"

#include <errno.h>

/* -- who answers --------------------------------------------------------------------------------------------------- */

/*
 * A QMP socket at which somebody listens belongs to a QEMU that lives, although it may not speak to us: perhaps it
 * waits, without a lock, for the migration that brings its disks. Only where nobody listens its images are ours.
 */
struct vm *vm_now(struct vm *vm)
{
    bool alone = vm->lost.err == -ENOENT || vm->lost.err == -ECONNREFUSED;

    return vm->twin && vm->state == VM_LOST && alone ? vm->twin : vm;
}

void vm_images_take_over(struct vm *vm)
{
    struct vm *twin = vm_now(vm);

    if (twin == vm)
        return;
    while (vm->waiting) {
        struct vm_query *q = vm->waiting;
        int r;

        vm_query_forget(q);
        r = vm_query_start(twin, q, q->cb, q->arg);
        if (r < 0)
            q->cb(q, NULL, &vm->lost);
    }
    vm_move_waiting(vm, twin);
}

/* -- their life ---------------------------------------------------------------------------------------------------- */

static void let_go_if_idle(struct vm *vm)
{
    if (vm->images_lost && !vm->session && !vm->asking && !vm->nwrites)
        images_close(vm->images);
}

/* A session whose last reader has left makes way for a change. */
static bool makes_way(struct vm *vm)
{
    if (!vm->nwrites || !vm->session || (!vm->lingering && !vm->ending))
        return false;
    vm_end_session(vm);
    return true;
}

bool vm_images_pump(struct vm *vm)
{
    if (!vm->images)
        return true;
    if (vm->images_lost) {
        let_go_if_idle(vm);
        return false;
    }
    if (vm->stopping || makes_way(vm))
        return false;
    if (vm->waiting || vm->asking || vm->nstays || vm->session || vm->nwrites)
        images_open(vm->images);
    else
        images_rest(vm->images);
    return true;
}

static void give_up(struct vm *vm, const struct failure *why)
{
    struct failure f = *why;

    vm->images_lost = true;
    vm->state = VM_CONNECTING;
    vm->lost = f;
    if (vm->session)
        session_fail(vm->session, &f);
    vm_commit_stop(vm);
    vm_refuse_questions(vm, &f);
    vm_refuse_waiting(vm, &f);
    let_go_if_idle(vm);
}

static void on_open(void *arg, struct qmp_client *qmp, const char *version)
{
    struct vm *vm = arg;

    vm->qmp = qmp;
    calls_init(&vm->calls, qmp, VM_CALL_TIMEOUT_MS);
    calls_init(&vm->watch.calls, qmp, VM_CALL_TIMEOUT_MS);
    vm->qemu_version[0] = 0;
    (void)strncat(vm->qemu_version, version, sizeof(vm->qemu_version) - 1);
    memset(&vm->lost, 0, sizeof(vm->lost));
    /* Nothing that another daemon of ours may have left can be in a process that has just begun, and there is no
     * snapshot-access to be tested. */
    vm->state = VM_READY;
    vm->tested = true;
    vm->narrow = vm->has_iothreads = false;
    log_info("VM %s: its images are open for reading, in qemu-storage-daemon %s", vm->name, vm->qemu_version);
    vm_pump(vm);
}

static void on_lost(void *arg, const struct failure *why)
{
    struct vm *vm = arg;

    log_warning("VM %s: no images: %s", vm->name, why->text);
    give_up(vm, why);
}

/* Who comes now waits for the end, and hears what it was. */
static void on_dying(void *arg)
{
    struct vm *vm = arg;

    vm->state = VM_CONNECTING;
}

static void on_rested(void *arg)
{
    struct vm *vm = arg;

    if (vm->waiting || vm->asking || vm->nstays || vm->session || vm->nwrites)
        return;
    vm->state = VM_CONNECTING;
    images_close(vm->images);
}

static void on_closed(void *arg)
{
    struct vm *vm = arg;

    log_info("VM %s: its images are let go", vm->name);
    vm->qmp = NULL;
    vm->images_lost = false;
    vm->state = VM_CONNECTING;
    if (vm->stopping)
        vm_stop_if_idle(vm);
    else
        vm_pump(vm);
}

static const struct images_ops images_ops = {
    .on_open = on_open,
    .on_dying = on_dying,
    .on_lost = on_lost,
    .on_rested = on_rested,
    .on_closed = on_closed,
};

int vm_images_new(struct vm *vm, const struct vm_config *config)
{
    struct images_config mine = {
        .loop = vm->loop,
        .vm = vm->name,
        .images = config->images,
        .nimages = config->nimages,
        .program = config->storage_daemon,
        .state = config->state_dir,
        .state_dir = vm->state_dir,
    };

    vm->linger_ms = MIN(vm->linger_ms, IMAGES_LINGER_MS);
    return images_new(&mine, &images_ops, vm, &vm->images);
}

void vm_images_yield(struct vm *vm)
{
    struct failure f = {0};

    if (!vm->twin || images_is_closed(vm->twin->images))
        return;
    log_info("VM %s: its QEMU is back, its images are let go", vm->name);
    (void)failure_set(&f, -ESTALE, "VM '%s' was started: its images are let go, and its QEMU answers from now on",
                      vm->name);
    give_up(vm->twin, &f);
}

void vm_images_renew(struct vm *vm)
{
    vm->images_lost = true;
    vm->state = VM_CONNECTING;
}

static void on_freed(void *arg)
{
    struct vm *vm = arg;

    vm->client_closed = true;
    vm_stop_if_idle(vm);
}

void vm_images_stop(struct vm *vm)
{
    if (vm->nwrites)
        return; /* its end comes back here */
    if (images_is_closed(vm->images))
        images_free(TAKE_PTR(vm->images), on_freed, vm);
    else
        images_close(vm->images);
}

/* -- writing ------------------------------------------------------------------------------------------------------- */

static bool wants_disk(const struct reopen *r, size_t disk)
{
    const struct vm_write *w = container_of(r, struct vm_write, reopen);
    const struct disk *d = &w->list->disks[disk];
    bool meant = w->ndisks == 0;

    for (size_t i = 0; i < w->ndisks; i++)
        meant |= strcmp(w->disks[i], d->name) == 0;
    return meant && d->tracked;
}

static bool wants_back(const struct reopen *r, size_t disk)
{
    return r->done[disk];
}

static void hand_over(struct vm_write *w, const struct failure *f)
{
    w->on_disks(w->theirs, f ? NULL : w->list, f);
}

static void on_writable(struct reopen *r, const struct failure *f)
{
    struct vm_write *w = container_of(r, struct vm_write, reopen);
    struct failure mine = {0};

    w->open = true;
    for (size_t i = 0; i < w->list->ndisks; i++) {
        if (r->done[i])
            w->list->disks[i].images[0].read_only = false;
    }
    for (size_t i = 0; f && strstr(f->text, "lock") && i < w->list->ndisks; i++) {
        if (wants_disk(r, i) && !r->done[i])
            (void)failure_set(
                &mine, -EBUSY,
                "%s is in use by another process, which reads it (a qemu-img, another backup?); try again "
                "when that has ended; %s",
                images_path(w->vm->images, w->list->disks[i].name), f->text);
    }
    hand_over(w, mine.err ? &mine : f);
}

static void on_write_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct vm_write *w = container_of(q, struct vm_write, query);
    struct vm *vm = w->vm;
    struct failure mine = {0};
    int r;

    if (f) {
        hand_over(w, f);
        return;
    }
    calls_init(w->calls, vm->qmp, VM_CALL_TIMEOUT_MS);
    if (!vm->images) {
        w->on_disks(w->theirs, disks, NULL);
        return;
    }
    if (vm->session || vm->nwrites > 1) {
        (void)failure_set(&mine, -EBUSY, "the images of VM '%s' are in use by %s; try again when it has ended",
                          vm->name, vm->session ? "a session" : "another change");
        hand_over(w, &mine);
        return;
    }
    if (w->hold) {
        w->on_disks(w->theirs, disks, NULL);
        return;
    }
    w->list = disk_list_copy(disks);
    r = w->list ? reopen_init(&w->reopen, vm->qmp, w->list, VM_CALL_TIMEOUT_MS) : -ENOMEM;
    w->reopen.wants = wants_disk;
    w->reopen.cb = on_writable;
    if (r == 0)
        r = reopen_start(&w->reopen, true, &mine);
    if (r < 0)
        (void)failure_set(&mine, r, "out of memory");
    if (r != 0)
        hand_over(w, r < 0 ? &mine : NULL);
}

static int write_start(struct vm *vm, struct vm_write *w, bool hold, struct vm_query *q, struct calls *calls,
                       const char *const *disks, size_t ndisks,
                       void (*on_disks)(struct vm_query *, const struct disk_list *, const struct failure *))
{
    int r;

    memset(w, 0, sizeof(*w));
    w->hold = hold;
    w->vm = vm_now(vm);
    w->theirs = q;
    w->calls = calls;
    w->disks = disks;
    w->ndisks = ndisks;
    w->on_disks = on_disks;
    w->vm->nwrites++;
    r = vm_query_start(w->vm, &w->query, on_write_disks, NULL);
    if (r < 0)
        w->vm->nwrites--;
    return r;
}

int vm_write_start(struct vm *vm, struct vm_write *w, struct vm_query *q, struct calls *calls, const char *const *disks,
                   size_t ndisks, void (*on_disks)(struct vm_query *, const struct disk_list *, const struct failure *))
{
    return write_start(vm, w, /* hold= */ false, q, calls, disks, ndisks, on_disks);
}

int vm_hold_start(struct vm *vm, struct vm_write *w, struct vm_query *q, struct calls *calls,
                  void (*on_disks)(struct vm_query *, const struct disk_list *, const struct failure *))
{
    return write_start(vm, w, /* hold= */ true, q, calls, NULL, 0, on_disks);
}

static void write_done(struct vm_write *w)
{
    struct vm *vm = w->vm;

    reopen_done(&w->reopen);
    disk_list_free(TAKE_PTR(w->list));
    vm->nwrites--;
    if (vm->images)
        vm_pump(vm);
    vm_stop_if_idle(vm);
}

static void on_stored(struct reopen *r, const struct failure *f)
{
    struct vm_write *w = container_of(r, struct vm_write, reopen);
    struct failure mine = {0};

    if (f)
        (void)failure_set(&mine, f->err, "the change could not be stored in the image: %s", f->text);
    write_done(w);
    w->on_end(w, f ? &mine : NULL);
}

int vm_write_end(struct vm_write *w, void (*cb)(struct vm_write *w, const struct failure *f))
{
    struct failure f = {0};
    int r = SEQ_DONE;

    w->on_end = cb;
    w->reopen.wants = wants_back;
    w->reopen.cb = on_stored;
    if (w->open)
        r = reopen_start(&w->reopen, false, &f);
    if (r == 0)
        return 0;
    write_done(w);
    return r;
}
