/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What clients of the control socket are told without asking. Names and members: control.h. */
#include "vm_internal.h"

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
