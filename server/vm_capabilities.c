/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the QEMU at the other end can do: asked once for each connection, after the sweep and before anything else, for
 * the answer is some 250 KB. What is kept of it is a handful of bits.
 */
#include "log.h"
#include "vm_internal.h"

#include <errno.h>

static int on_schema(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct vm *vm = container_of(c, struct vm, calls);

    return capabilities_parse(ret, &vm->capabilities, f);
}

static void log_choice(const struct vm *vm)
{
    char text[CAPABILITIES_TEXT_SIZE];

    (void)capabilities_text(&vm->capabilities, text);
    if (vm->engine_failure.err)
        log_error("VM %s: no session is possible: %s (it has %s)", vm->name, vm->engine_failure.text, text);
    else
        log_info("VM %s: QEMU %s has %s; sessions are frozen by %s: %s", vm->name, vm->qemu_version, text,
                 engine_name(vm->engine.engine), vm->engine.why);
    if (capabilities_cbw_timeout(vm->qemu_version, vm->cbw_timeout_s) != vm->cbw_timeout_s)
        log_info("VM %s: QEMU %s cannot count more than %u seconds: a guest's write waits no longer for its copy "
                 "(--cbw-timeout %u)",
                 vm->name, vm->qemu_version, capabilities_cbw_timeout(vm->qemu_version, vm->cbw_timeout_s),
                 vm->cbw_timeout_s);
}

static void on_asked(struct calls *c, const struct failure *f)
{
    struct vm *vm = container_of(c, struct vm, calls);

    memset(&vm->engine_failure, 0, sizeof(vm->engine_failure));
    if (f) {
        /* Nothing is known, so the next session asks again. */
        (void)failure_set(&vm->engine_failure, f->err, "QEMU does not say what it can do: %s", f->text);
        log_warning("VM %s: %s", vm->name, vm->engine_failure.text);
        vm_refuse_waiting(vm, &vm->engine_failure);
    } else {
        vm->capable = true;
        (void)engine_choose(&vm->capabilities, vm->engine_wish, vm->qemu_version, &vm->engine, &vm->engine_failure);
        log_choice(vm);
    }
    vm_settle(vm);
}

void vm_ask_capabilities(struct vm *vm)
{
    struct failure f = {0};

    vm->state = VM_SWEEPING;
    calls_add(&vm->calls, "query-qmp-schema", NULL, QMP_NO_FD, 0, on_schema);
    if (calls_wait(&vm->calls, on_asked, &f) < 0)
        on_asked(&vm->calls, &f);
}

bool vm_engine_refuses(struct vm *vm)
{
    if (vm->images || !vm->engine_failure.err)
        return false;
    vm_refuse_waiting(vm, &vm->engine_failure);
    return true;
}

struct json_object *vm_engine_to_json(const struct vm *vm)
{
    struct json_object *o = qmp_args_strings("wish", engine_name(vm->engine_wish), NULL);
    const struct engine_choice *e = vm->capable && !vm->engine_failure.err ? &vm->engine : NULL;

    (void)json_object_object_add(o, "name", e ? json_object_new_string(engine_name(e->engine)) : NULL);
    (void)json_object_object_add(o, "why", e ? json_object_new_string(e->why) : NULL);
    (void)json_object_object_add(o, "risk", e && e->risk ? json_object_new_string(e->risk) : NULL);
    (void)json_object_object_add(o, "failure",
                                 vm->engine_failure.err ? json_object_new_string(vm->engine_failure.text) : NULL);
    (void)json_object_object_add(o, "capabilities", vm->capable ? capabilities_to_json(&vm->capabilities) : NULL);
    return o;
}

struct json_object *vm_brief_to_json(const struct vm *vm)
{
    struct json_object *o = qmp_args_strings("name", vm->name, NULL);

    (void)json_object_object_add(o, "qemu", vm->state > VM_LOST ? json_object_new_string(vm->qemu_version) : NULL);
    (void)json_object_object_add(o, "engine", vm->qmp_path ? vm_engine_to_json(vm) : NULL);
    return o;
}
