/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A VM's guest agent: whose it is, and what people hear of it. */
#include "backup/watchdog.h"
#include "log.h"
#include "vm_internal.h"

#include <stdio.h>

/* What was handed over to a watchdog, or tried on, has ended: the mark in QEMU can go, or stays. */
static void on_rescued(void *arg, const struct failure *f)
{
    struct vm *vm = arg;

    if (f)
        log_error("VM %s: %s", vm->name, f->text);
    else
        log_warning("VM %s: the guest's file systems are thawed at last", vm->name);
    if (f || vm->stopping)
        return;
    if (vm->session || vm->starting || vm_is_committing(vm) || vm->state != VM_READY)
        vm->sweep_wanted = true;
    else
        vm_sweep(vm);
}

int vm_quiesce_new(struct vm *vm, const struct vm_config *config)
{
    const struct quiesce_config quiesce = {
        .loop = vm->loop,
        .vm = vm->name,
        .path = config->qga_path,
        .mode = config->quiesce,
        .program = config->watchdog ? config->watchdog : WATCHDOG_SELF,
        .on_rescued = on_rescued,
        .arg = vm,
    };

    return quiesce_new(&quiesce, &vm->quiesce);
}

static bool is_wanted(const struct vm *vm)
{
    return vm->quiesce && quiesce_mode(vm->quiesce) != QUIESCE_OFF;
}

void vm_quiesce_tell_up(const struct vm *vm, char *buf, size_t size)
{
    const struct failure *why = session_not_quiesced(vm->session);

    *buf = '\0';
    if (session_quiesced(vm->session))
        (void)snprintf(buf, size, ", guest quiesced for %u ms", session_quiesced_ms(vm->session));
    else if (is_wanted(vm))
        (void)snprintf(buf, size, ", guest NOT quiesced");
    if (why)
        log_warning("VM %s: session %s is crash-consistent only, the guest is not quiesced: %s", vm->name,
                    session_id(vm->session), why->text);
}

/* "quiesced": null where it was not wanted. */
void vm_quiesce_to_json(const struct vm *vm, struct json_object *o)
{
    const struct failure *why = session_not_quiesced(vm->session);
    bool known = why || session_quiesced(vm->session);

    (void)json_object_object_add(o, "quiesced", known ? json_object_new_boolean(session_quiesced(vm->session)) : NULL);
    (void)json_object_object_add(o, "quiesced-ms", json_object_new_int64(session_quiesced_ms(vm->session)));
    (void)json_object_object_add(o, "not-quiesced", why ? json_object_new_string(why->text) : NULL);
}
