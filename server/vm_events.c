/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What clients of the control socket are told without asking. Names and members: control.h. */
#include "vm_internal.h"

#include <assert.h>
#include <errno.h>

void vm_tell(struct vm *vm, const char *event, struct json_object *data)
{
    vm = vm->keeper;
    if (!vm->on_event) {
        json_object_put(data);
        return;
    }
    json_object_object_add(data, "vm", json_object_new_string(vm->name));
    vm->on_event(vm->event_arg, event, data);
}

void vm_tell_checkpoint(struct vm *vm, const char *event, const char *name, struct json_object *disks)
{
    struct json_object *data = qmp_args_strings("name", name, NULL);

    json_object_object_add(data, "disks", disks);
    vm_tell(vm, event, data);
}

/* One that was usable at the last look, and is refused now. */
void vm_tell_broken(struct vm *vm, const struct disk_list *was, const struct disk_list *now)
{
    for (size_t i = 0; was && i < now->ndisks; i++) {
        const struct disk *d = &now->disks[i], *before = disk_list_find(was, d->name);

        for (size_t k = 0; before && k < d->ncheckpoints; k++) {
            const struct checkpoint *c = &d->checkpoints[k], *old = disk_checkpoint(before, c->name);

            if (old && old->reason == REASON_NONE && c->reason != REASON_NONE && c->reason != REASON_NO_SUCH_CHECKPOINT)
                vm_tell(vm, "CHECKPOINT_BROKEN",
                        qmp_args_strings("name", c->name, "disk", d->name, "reason", reason_name(c->reason), "text",
                                         checkpoint_text(c), NULL));
        }
    }
}

/* -- sessions ------------------------------------------------------------------------------------------------------ */

static const char *const end_names[] = {
    [VM_END_DONE] = "done",     [VM_END_CLIENT] = "client",     [VM_END_SETUP] = "setup",
    [VM_END_BROKEN] = "broken", [VM_END_SCRATCH] = "scratch",   [VM_END_TIMEOUT] = "timeout",
    [VM_END_QEMU] = "qemu",     [VM_END_SHUTDOWN] = "shutdown", [VM_END_OTHER] = "other",
};
static_assert(ARRAY_SIZE(end_names) == VM_ENDS, "every end has a name");

const char *vm_end_name(enum vm_end end)
{
    return end_names[end];
}

static enum vm_end why_lost(const struct vm *vm)
{
    if (!vm->was_up)
        return VM_END_SETUP;
    switch (vm->session_failure.err) {
    case -ESTALE:
        return VM_END_BROKEN;
    case -ENOSPC:
        return VM_END_SCRATCH;
    case -ETIME:
        return VM_END_TIMEOUT;
    case -ENOTCONN:
        return VM_END_QEMU;
    default:
        return VM_END_OTHER;
    }
}

/* Whether all that was opened was pulled to its end. */
static bool all_ended_well(const struct vm *vm)
{
    for (size_t i = 0; i < vm->npulls; i++) {
        if (vm->pulls[i].nopen || !vm->pulls[i].well || vm->pulls[i].read_failed)
            return false;
    }
    return vm->npulls > 0;
}

static bool was_opened(const struct vm *vm, const char *disk)
{
    for (size_t i = 0; i < vm->npulls; i++) {
        if (strcmp(vm->pulls[i].disk, disk) == 0)
            return true;
    }
    return false;
}

static enum vm_end how_ended(const struct vm *vm)
{
    if (vm->session_failure.err)
        return why_lost(vm);
    if (vm->lease && vm->lease->ending)
        return VM_END_DONE;
    return all_ended_well(vm) ? VM_END_DONE : vm->stopping ? VM_END_SHUTDOWN : VM_END_CLIENT;
}

static void add_text(struct json_object *o, const char *key, const char *text)
{
    json_object_object_add(o, key, text && *text ? json_object_new_string(text) : NULL);
}

void vm_add_failure(struct vm *vm, struct json_object *o)
{
    add_text(o, "reason", vm_end_name(why_lost(vm)));
    add_text(o, "failed-step", session_failed_step(vm->session));
    add_text(o, "lost-disk", session_lost_disk(vm->session));
}

void vm_tell_up(struct vm *vm)
{
    struct vm_counters *counters = &vm->keeper->counters;
    struct json_object *data = qmp_args_strings("session", session_id(vm->session), NULL);

    counters->up++;
    counters->nsetups++;
    counters->last_setup_ms = session_setup_ms(vm->session);
    counters->setup_ms += counters->last_setup_ms;
    counters->last_pause_us = session_pause_us(vm->session);
    counters->longest_pause_us = MAX(counters->longest_pause_us, counters->last_pause_us);
    add_text(data, "checkpoint", session_checkpoint(vm->session));
    json_object_object_add(data, "setup-ms", json_object_new_uint64(counters->last_setup_ms));
    vm_tell(vm, "SESSION_UP", data);
}

void vm_tell_lost(struct vm *vm)
{
    struct json_object *data =
        qmp_args_strings("session", session_id(vm->session), "reason", vm_end_name(why_lost(vm)), "text",
                         vm->session_failure.text, "step", session_failed_step(vm->session), NULL);

    add_text(data, "disk", session_lost_disk(vm->session));
    vm_tell(vm, "SESSION_LOST", data);
}

void vm_tell_down(struct vm *vm, struct json_object *last, const struct failure *problems)
{
    struct vm_counters *counters = &vm->keeper->counters;
    const struct disk_list *disks = session_disks(vm->session);
    enum vm_end end = how_ended(vm);
    bool wanted;
    struct json_object *kept = json_object_new_array(), *dropped = json_object_new_array();
    struct json_object *data = qmp_args_strings("session", session_id(vm->session), "reason", vm_end_name(end), NULL);

    for (size_t i = 0; session_checkpoint(vm->session) && i < disks->ndisks; i++) {
        bool is_kept = session_kept(vm->session, disks->disks[i].name);

        if (!is_kept && !was_opened(vm, disks->disks[i].name) &&
            !(vm_lease_decides(vm, disks->disks[i].name, &wanted) && wanted))
            continue;
        json_object_array_add(is_kept ? kept : dropped, json_object_new_string(disks->disks[i].name));
        counters->kept += is_kept;
        counters->dropped += !is_kept;
    }
    counters->ended[end]++;
    counters->problems += problems->err != 0;
    add_text(last, "reason", vm_end_name(end));
    json_object_object_add(last, "kept", json_object_get(kept));
    json_object_object_add(last, "dropped", json_object_get(dropped));
    add_text(data, "checkpoint", session_checkpoint(vm->session));
    json_object_object_add(data, "kept", kept);
    json_object_object_add(data, "dropped", dropped);
    add_text(data, "problems", problems->err ? problems->text : NULL);
    vm_tell(vm, "SESSION_DOWN", data);
}

/* -- numbers ------------------------------------------------------------------------------------------------------- */

const struct vm_counters *vm_counters(const struct vm *vm)
{
    return &vm->counters;
}

bool vm_is_connected(struct vm *vm)
{
    return vm_now(vm)->state > VM_LOST;
}

static const struct vm *with_session(const struct vm *vm)
{
    return vm->session || !vm->twin ? vm : vm->twin;
}

uint64_t vm_scratch_used(const struct vm *vm)
{
    vm = with_session(vm);
    return vm->session ? session_scratch_used(vm->session) : 0;
}

size_t vm_nconnections(const struct vm *vm)
{
    size_t n = 0;

    vm = with_session(vm);
    for (size_t i = 0; i < vm->npulls; i++)
        n += vm->pulls[i].nopen;
    return n;
}
