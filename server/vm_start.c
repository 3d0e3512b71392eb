/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The start of a session: what has to be so before one, what it is about, and for whom. From vm_pump() alone.
 */
#include "log.h"
#include "vm_internal.h"

#include <errno.h>

static bool alike(const struct vm_stay *a, const struct vm_stay *b)
{
    return strcmp(a->identity, b->identity) == 0 && (!a->checkpoint == !b->checkpoint) &&
           (!a->checkpoint || strcmp(a->checkpoint, b->checkpoint) == 0);
}

/* The dirty maps that all who wait for the same session want: read at the freeze, they are exact. */
static size_t collect_since(const struct vm *vm, const struct vm_stay *first, const char *since[VM_SINCE_MAX])
{
    size_t n = 0;

    for (const struct vm_stay *stay = first; stay; stay = stay->next) {
        if (stay->state != STAY_WAITING || !alike(stay, first))
            continue;
        for (size_t i = 0; i < stay->nsince; i++) {
            size_t k;

            for (k = 0; k < n && strcmp(since[k], stay->since[i]) != 0; k++)
                ;
            if (k == n && n < VM_SINCE_MAX)
                since[n++] = stay->since[i];
        }
    }
    return n;
}

static bool any_tracked(const struct disk_list *disks)
{
    for (size_t i = 0; i < disks->ndisks; i++) {
        if (disks->disks[i].tracked)
            return true;
    }
    return false;
}

/*
 * A disk that keeps no checkpoint may be pulled beside others that do: they share one instant, and so one name. Where
 * no disk can keep it, that is better said now than found out later.
 */
static int check_stay(const struct vm *vm, const struct vm_stay *stay, const struct disk_list *disks, struct failure *f)
{
    const struct disk *d = stay->lease ? NULL : disk_list_find(disks, stay->disk);

    if (stay->lease)
        return vm_lease_check(vm, stay, disks, f);
    if (!d)
        return failure_set(f, -ENOENT, "VM '%s' has no disk '%s'", vm->name, stay->disk);
    if (stay->checkpoint && !any_tracked(disks))
        return failure_set(f, -ENOTSUP,
                           "disk '%s' of VM '%s' cannot keep a checkpoint (%s): its image is %s, only qcow2 version 3 "
                           "stores bitmaps; open '%s/%s' without '@%s'",
                           d->name, vm->name, reason_name(REASON_NOT_TRACKED), d->format, vm->name, d->name,
                           stay->checkpoint);
    return 0;
}

/*
 * A session of somebody else stands on a disk: of a dead one, the sweep makes an end; on a living one nothing is built.
 * Says whether the start has to wait, or is over.
 */
static bool meets_others(struct vm *vm, const struct disk_list *disks)
{
    const struct disk *d = disks->disks;
    struct failure f = {0};

    if (vm->images)
        return false;
    while (d < disks->disks + disks->ndisks && !*d->session)
        d++;
    if (d == disks->disks + disks->ndisks) {
        vm->swept = false;
        return false;
    }
    if (!vm->swept) {
        vm->swept = true;
        vm_sweep(vm);
        return true;
    }
    vm->swept = false;
    (void)failure_set(&f, -EBUSY, "disk '%s' of VM '%s' is in session %s already: %s", d->name, vm->name, d->session,
                      vm->left.err ? vm->left.text : "it could not be undone");
    vm_refuse_waiting(vm, &f);
    return true;
}

static void start_session(struct vm *vm, const struct disk_list *disks, const struct failure *f)
{
    struct vm_stay *stay = vm_first_stay(vm, STAY_WAITING);
    const char *since[VM_SINCE_MAX];
    struct failure mine = {0};

    vm->starting = false;
    if (!stay)
        return;
    if (f) {
        vm_refuse_waiting(vm, f);
        return;
    }
    if (meets_others(vm, disks))
        return;
    if (check_stay(vm, stay, disks, &mine) == 0 &&
        (!vm->may_start || vm->may_start(vm->start_arg, stay->identity, vm->images ? NULL : vm->place, &mine) == 0)) {
        struct session_config config = {
            .loop = vm->loop,
            .qmp = vm->qmp,
            .vm = vm->name,
            .disks = disks,
            .checkpoint = stay->checkpoint,
            .since = since,
            .nsince = collect_since(vm, stay, since),
            .scratch = vm->scratch,
            .place = vm->place,
            .state_dir = vm->state_dir,
            .still_socket = vm->images ? images_nbd_socket(vm->images) : NULL,
            .engine = vm->engine.engine,
            .job_breaks = vm->capabilities.has[CAPABILITY_JOB_ON_ERROR],
            .narrow_reads = vm->narrow,
            .max_pause_ms = vm->max_pause_ms,
            .cbw_timeout_s = capabilities_cbw_timeout(vm->qemu_version, vm->cbw_timeout_s),
            .give_back = vm->give_back,
            .vhost_room = vm->capabilities.has[CAPABILITY_VHOST] ? vm->vhost_room : NULL,
            .call_timeout_ms = VM_CALL_TIMEOUT_MS,
            .quiesce = vm->quiesce,
            .hold_shutdown = vm->hold_shutdown_ms > 0,
            .timeout_s = vm->session_timeout_ms / 1000,
        };

        if (stay->lease)
            config.nsince = vm_lease_since(disks, since, config.nsince, VM_SINCE_MAX);
        vm->identity = strdup(stay->identity);
        if (vm->identity && session_start(&config, &vm_session_ops, vm, &vm->session, &mine) == 0) {
            if (stay->checkpoint)
                vm_watch_forget(vm, stay->checkpoint);
            vm->lease = stay->lease;
            vm->keeper->counters.started++;
            log_info("VM %s: session %s starts for %s", vm->name, session_id(vm->session), vm->identity);
            if (!vm->images && vm->engine.risk)
                log_warning("VM %s: session %s: engine %s: %s", vm->name, session_id(vm->session),
                            engine_name(vm->engine.engine), vm->engine.risk);
            return;
        }
        free(TAKE_PTR(vm->identity));
    }
    (void)failure_set(&mine, -ENOMEM, "out of memory");
    vm_refuse(stay, &mine);
    vm_pump(vm);
}

static void on_start_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    start_session(container_of(q, struct vm, start_query), disks, f);
}

/* QEMU 7.2 with an iothread aborts when an NBD client disconnects, and on blockdev-add of the filters under load. */
static bool refuse_iothreads(struct vm *vm)
{
    struct failure f = {0};

    if (!vm->narrow || !vm->has_iothreads)
        return false;
    (void)failure_set(
        &f, -ENOTSUP,
        "VM '%s' uses iothreads, and QEMU %s aborts when such a disk is exported; QEMU 8.0 or later is needed",
        vm->name, vm->qemu_version);
    vm_refuse_waiting(vm, &f);
    return true;
}

void vm_start_session(struct vm *vm)
{
    if (vm->keeper->shut.err) {
        vm_refuse_waiting(vm, &vm->keeper->shut);
        return;
    }
    if (vm_commit_refuses(vm) || vm->starting || vm->asking || (vm->images && vm->nwrites))
        return;
    if (!vm->images && !vm->capable) { /* the question at the connection was not answered */
        vm_ask_capabilities(vm);
        return;
    }
    if (vm_engine_refuses(vm))
        return;
    if (vm->life.sweep_due) {
        vm->life.sweep_due = false;
        vm_sweep(vm);
        return;
    }
    if (vm->life.leftovers && vm->left.err == -EBUSY) { /* looked at just now: somebody else is at work */
        vm_refuse_waiting(vm, &vm->left);
        return;
    }
    if (!vm->tested) {
        vm_test(vm);
        return;
    }
    if (refuse_iothreads(vm))
        return;
    if (vm->fresh)
        start_session(vm, TAKE_PTR(vm->fresh), NULL);
    else
        vm->starting = vm_query_start(vm, &vm->start_query, on_start_disks, vm) == 0;
}
