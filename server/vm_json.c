/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a VM, its session and its disks look like on the control socket. */
#include "vm_internal.h"

static const char *const state_names[] = {
    [VM_CONNECTING] = "connecting", [VM_LOST] = "not connected", [VM_SWEEPING] = "sweeping",
    [VM_READY] = "ready",           [VM_TESTING] = "testing",
};

static struct json_object *string_or_null(const char *s)
{
    return s && *s ? json_object_new_string(s) : NULL;
}

struct json_object *vm_to_json(struct vm *vm)
{
    struct vm *now = vm_now(vm); /* its session and its state are told */
    const struct vm *images = vm->twin ? vm->twin : vm;
    struct json_object *o = qmp_args_strings(
        "name", vm->name, "state", now->images ? images_state_name(now->images) : state_names[vm->state], NULL);
    bool connected = now->state > VM_LOST;
    struct vm *last = now->last ? now : vm;

    (void)json_object_object_add(o, "qmp", string_or_null(vm->qmp_path));
    (void)json_object_object_add(o, "images", images->images ? images_to_json(images->images) : NULL);
    (void)json_object_object_add(o, "powered-off", json_object_new_boolean(now->images != NULL));
    (void)json_object_object_add(o, "connected", json_object_new_boolean(connected));
    (void)json_object_object_add(o, "qemu", connected ? json_object_new_string(now->qemu_version) : NULL);
    (void)json_object_object_add(o, "reason", connected ? NULL : string_or_null(now->lost.text));
    (void)json_object_object_add(o, "session", now->session ? json_object_new_string(session_id(now->session)) : NULL);
    (void)json_object_object_add(o, "engine", vm->qmp_path ? vm_engine_to_json(vm) : NULL);
    (void)json_object_object_add(o, "narrow-reads", now->tested ? json_object_new_boolean(now->narrow) : NULL);
    (void)json_object_object_add(o, "last-session", json_object_get(last->last));
    return o;
}

struct json_object *checkpoint_to_json(const struct disk *d, const struct checkpoint *c)
{
    struct json_object *o = json_object_new_object();

    json_object_object_add(o, "name", json_object_new_string(c->name));
    json_object_object_add(o, "disk", json_object_new_string(d->name));
    json_object_object_add(o, "usable", json_object_new_boolean(c->reason == REASON_NONE));
    json_object_object_add(o, "reason", json_object_new_string(reason_name(c->reason)));
    json_object_object_add(o, "text", json_object_new_string(checkpoint_text(c)));
    json_object_object_add(o, "granularity", json_object_new_uint64(c->granularity));
    json_object_object_add(o, "dirty-bytes", json_object_new_uint64(c->dirty));
    json_object_object_add(o, "layers", json_object_new_uint64(c->nlayers));
    return o;
}

struct json_object *disk_list_to_json(const struct disk_list *disks, const char *vm)
{
    struct json_object *list = json_object_new_array();

    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];
        struct json_object *o =
            qmp_args_strings("vm", vm, "name", d->name, "node", d->node, "format", d->format, "qdev", d->qdev, NULL);
        struct json_object *checkpoints = json_object_new_array();

        (void)json_object_object_add(o, "size", json_object_new_int64((int64_t)d->size));
        (void)json_object_object_add(o, "tracked", json_object_new_boolean(d->tracked));
        for (size_t k = 0; k < d->ncheckpoints; k++)
            (void)json_object_array_add(checkpoints, checkpoint_to_json(d, &d->checkpoints[k]));
        (void)json_object_object_add(o, "checkpoints", checkpoints);
        (void)json_object_array_add(list, o);
    }
    return list;
}

static struct json_object *kept_to_json(const struct vm *vm)
{
    struct json_object *list = json_object_new_array();

    for (size_t i = 0; i < vm->npulls; i++) {
        const struct vm_pull *p = &vm->pulls[i];
        struct json_object *o = qmp_args_strings("disk", p->disk, NULL);

        (void)json_object_object_add(o, "connections", json_object_new_int64(p->nopen));
        (void)json_object_object_add(o, "ended-well",
                                     json_object_new_boolean(p->nopen == 0 && p->well && !p->read_failed));
        (void)json_object_array_add(list, o);
    }
    return list;
}

struct json_object *vm_session_to_json(struct vm *vm)
{
    struct session *s = vm->session;
    struct json_object *o;

    if (!s && vm->twin)
        return vm_session_to_json(vm->twin);
    if (!s)
        return NULL;
    o = qmp_args_strings("id", session_id(s), "vm", vm->name, "status", session_status_name(session_status(s)), "step",
                         session_step(s), "identity", vm->identity, NULL);
    (void)json_object_object_add(o, "checkpoint",
                                 session_checkpoint(s) ? json_object_new_string(session_checkpoint(s)) : NULL);
    (void)json_object_object_add(o, "rate",
                                 json_object_new_uint64(vm->lease && vm->lease->rate ? vm->lease->rate : vm->rate));
    (void)json_object_object_add(o, "engine",
                                 vm->images ? NULL : json_object_new_string(engine_name(session_engine(s))));
    (void)json_object_object_add(o, "frozen-at-ms", json_object_new_int64(session_frozen_at_ms(s)));
    (void)json_object_object_add(o, "setup-ms", json_object_new_int64(session_setup_ms(s)));
    (void)json_object_object_add(o, "frozen-by", json_object_new_string(session_way_name(session_way(s))));
    (void)json_object_object_add(o, "pause-us", json_object_new_int64((int64_t)session_pause_us(s)));
    (void)json_object_object_add(o, "flush-ms", json_object_new_int64(session_flush_ms(s)));
    (void)json_object_object_add(o, "scratch-bytes", json_object_new_int64((int64_t)session_scratch_used(s)));
    (void)json_object_object_add(o, "shared-disks", json_object_new_int64(session_nshared(s)));
    vm_quiesce_to_json(vm, o);
    (void)json_object_object_add(o, "lingering", json_object_new_boolean(vm->lingering));
    (void)json_object_object_add(o, "held-shutdown", json_object_new_boolean(vm->life.held));
    (void)json_object_object_add(o, "failure",
                                 vm->session_failure.err ? json_object_new_string(vm->session_failure.text) : NULL);
    if (vm->session_failure.err)
        vm_add_failure(vm, o);
    (void)json_object_object_add(o, "pulls", kept_to_json(vm));
    return o;
}
