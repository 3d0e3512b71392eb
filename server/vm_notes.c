/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The notes of a VM follow its checkpoints. The set lives on the loop; what changes in it is written by a worker, one
 * batch at a time and in order. A note that cannot be written spoils no checkpoint: the records are the truth.
 */
#include "log.h"
#include "vm_internal.h"

#include <errno.h>
#include <stdlib.h>

int vm_notes_load(struct vm *vm)
{
    struct notes_problems problems = {0};
    struct failure f = {0};
    int r = notes_load(vm->state_dir, vm->name, &vm->notes, &problems, &f);

    if (r < 0)
        log_error("VM %s: the notes about its checkpoints cannot be read: %s", vm->name, f.text);
    for (size_t i = 0; i < problems.nproblems; i++)
        log_warning("VM %s: %s: %s", vm->name, problems.problems[i].file, problems.problems[i].why.text);
    if (problems.nmore)
        log_warning("VM %s: %zu more such files", vm->name, problems.nmore);
    notes_problems_done(&problems);
    return r;
}

void vm_notes_done(struct vm *vm)
{
    notes_free(TAKE_PTR(vm->notes));
    notes_change_done(&vm->note_changes);
    notes_change_done(&vm->note_batch);
}

/* -- writing ------------------------------------------------------------------------------------------------------- */

static void write_next(struct vm *vm);

static void on_written(struct vm *vm, const struct failure *f)
{
    while (vm->note_waits) {
        struct vm_note_wait *w = vm->note_waits;

        vm->note_waits = w->next;
        w->cb(w, f);
    }
    vm_stop_if_idle(vm);
}

static void on_work(uv_work_t *work)
{
    struct vm *vm = container_of(work, struct vm, note_work);

    if (!vm->note_rename)
        (void)notes_apply(vm->state_dir, vm->name, &vm->note_batch, &vm->note_failure);
    else if (notes_rename_vm(vm->state_dir, vm->note_rename, vm->name, &vm->note_failure) == 0 &&
             notes_load(vm->state_dir, vm->name, &vm->note_renamed, NULL, &vm->note_failure) == 0)
        (void)lineage_remove(vm->state_dir,
                             vm->note_rename); /* left there it refuses too much, should the name return */
}

static void after_work(uv_work_t *work, int status)
{
    struct vm *vm = container_of(work, struct vm, note_work);
    struct failure f = vm->note_failure;

    vm->note_writing = false;
    if (vm->note_rename) {
        free(TAKE_PTR(vm->note_rename));
        if (vm->note_renamed) {
            notes_free(vm->notes);
            vm->notes = TAKE_PTR(vm->note_renamed);
        }
    }
    if (f.err) { /* what is left is tried again with the next change */
        log_error("VM %s: notes about checkpoints cannot be written: %s", vm->name, f.text);
        on_written(vm, &f);
        return;
    }
    write_next(vm);
}

static void queue_work(struct vm *vm)
{
    vm->note_failure = (struct failure){0};
    vm->note_writing = true;
    (void)uv_queue_work(vm->loop, &vm->note_work, on_work, after_work); /* fails only without a callback */
}

/* What failed before goes first. */
static void take_batch(struct vm *vm)
{
    if (vm->note_batch.ndone < vm->note_batch.nops)
        return;
    notes_change_done(&vm->note_batch);
    vm->note_batch = vm->note_changes;
    vm->note_changes = (struct notes_change){0};
}

static void write_next(struct vm *vm)
{
    take_batch(vm);
    if (vm->note_batch.nops)
        queue_work(vm);
    else
        on_written(vm, NULL);
}

void vm_notes_write(struct vm *vm, struct vm_note_wait *wait, void (*cb)(struct vm_note_wait *, const struct failure *))
{
    vm = vm->keeper;
    if (wait) {
        wait->cb = cb;
        wait->next = vm->note_waits;
        vm->note_waits = wait;
    }
    if (vm->note_writing)
        return;
    take_batch(vm);
    queue_work(vm); /* also where nothing has changed: the answer comes later, always */
}

int vm_notes_may_rename(const struct vm *vm, struct failure *f)
{
    if (vm->notes->nnotes || vm->note_writing)
        return failure_set(f, -EEXIST, "VM '%s' has notes of its own already (%zu); export, delete and import them",
                           vm->name, vm->notes->nnotes);
    return 0;
}

int vm_notes_rename(struct vm *vm, const char *from, struct failure *f)
{
    if (vm_notes_may_rename(vm, f) < 0)
        return f->err;
    vm->note_rename = strdup(from);
    return vm->note_rename ? 0 : failure_set(f, -ENOMEM, "out of memory");
}

/* -- changes ------------------------------------------------------------------------------------------------------- */

int vm_notes_add(struct vm *vm, const struct note_spec *spec, struct failure *f)
{
    vm = vm->keeper;
    if (vm->note_rename)
        return failure_set(f, -EBUSY, "its notes are just being taken over from another name");
    /* Records of that name were all gone, else none could have been made: the old note has nothing to tell about. */
    if (notes_find(vm->notes, spec->name) && notes_remove(vm->notes, spec->name, &vm->note_changes, f) < 0)
        return f->err;
    return notes_add(vm->notes, spec, &vm->note_changes, f);
}

void vm_notes_of_session(struct vm *vm)
{
    const struct disk_list *disks = session_disks(vm->session);
    struct note_disk *kept;
    struct note_spec spec = {.name = session_checkpoint(vm->session), .created_ms = session_frozen_at_ms(vm->session)};
    struct json_object *told;
    struct failure f = {0};

    if (!spec.name)
        return;
    told = json_object_new_array();
    kept = calloc(disks->ndisks + 1, sizeof(*kept));
    for (size_t i = 0; kept && i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];

        if (!session_kept(vm->session, d->name))
            continue;
        kept[spec.ndisks++] = (struct note_disk){.name = d->name, .size = d->size, .node = d->node};
        json_object_array_add(told, json_object_new_string(d->name));
    }
    spec.disks = kept;
    if (spec.ndisks)
        vm_tell_checkpoint(vm, "CHECKPOINT_CREATED", spec.name, json_object_get(told));
    json_object_put(told);
    if (spec.ndisks && vm_notes_add(vm, &spec, &f) < 0)
        log_error("VM %s: checkpoint %s is kept, but without a note: %s", vm->name, spec.name, f.text);
    else if (spec.ndisks)
        vm_retire(vm);
    free(kept);
    vm_notes_write(vm, NULL, NULL);
}

/* -- in words ------------------------------------------------------------------------------------------------------ */

static void add_note(const struct vm *vm, struct json_object *o, const struct note *n)
{
    json_object_object_add(o, "noted", json_object_new_boolean(n != NULL));
    json_object_object_add(o, "parent", n && n->parent_name ? json_object_new_string(n->parent_name) : NULL);
    json_object_object_add(o, "created-ms", n ? json_object_new_int64(n->created_ms) : NULL);
    json_object_object_add(o, "description", json_object_new_string(n ? n->description : ""));
    json_object_object_add(o, "current", json_object_new_boolean(n && n == notes_current(vm->notes)));
}

/* A note that tells of a record on this disk, and there is none. */
static struct json_object *broken_to_json(const struct vm *vm, const struct note *n, const struct note_disk *nd,
                                          const struct disk *d)
{
    struct json_object *o = qmp_args_strings("name", n->name, "disk", nd->name, NULL);
    enum reason reason = d ? note_reason(n, d) : REASON_NO_SUCH_CHECKPOINT;
    const char *lost = lineage_why_lost(vm->watch.lineage, nd->name, n->name);
    const char *text = !d                 ? "the VM has no such disk any more"
                       : n->broken.reason ? n->broken.text
                       : lost             ? lost
                                          : "its record is not in the image any more: QEMU stopped before it was "
                                            "stored, or somebody removed it";

    json_object_object_add(o, "usable", json_object_new_boolean(false));
    json_object_object_add(o, "reason", json_object_new_string(reason_name(reason)));
    json_object_object_add(o, "text", json_object_new_string(text));
    json_object_object_add(o, "granularity", json_object_new_int64(0));
    json_object_object_add(o, "dirty-bytes", json_object_new_int64(0));
    json_object_object_add(o, "layers", json_object_new_int64(0));
    return o;
}

static bool is_about(const char *only, const char *disk)
{
    return !only || strcmp(only, disk) == 0;
}

static void add_noted(const struct vm *vm, struct json_object *all, const struct note *n, const struct disk_list *disks,
                      const char *only)
{
    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];
        const struct checkpoint *c = disk_checkpoint(d, n->name);

        if (c && is_about(only, d->name)) {
            struct json_object *o = checkpoint_to_json(d, c);

            add_note(vm, o, n);
            json_object_array_add(all, o);
        }
    }
    for (size_t i = 0; i < n->ndisks; i++) {
        const struct disk *d = disk_list_find(disks, n->disks[i].name);

        if ((!d || !disk_checkpoint(d, n->name)) && is_about(only, n->disks[i].name)) {
            struct json_object *o = broken_to_json(vm, n, &n->disks[i], d);

            add_note(vm, o, n);
            json_object_array_add(all, o);
        }
    }
}

/* Parents before children; then those without a note, by name. */
struct json_object *vm_checkpoints_to_json(const struct vm *vm, const struct disk_list *disks, const char *only)
{
    struct json_object *all = json_object_new_array();
    const char *last = "";

    for (size_t i = 0; i < vm->notes->nnotes; i++)
        add_noted(vm, all, vm->notes->notes[i], disks, only);
    for (;;) {
        const char *next = NULL;

        for (size_t i = 0; i < disks->ndisks; i++) {
            for (size_t k = 0; k < disks->disks[i].ncheckpoints; k++) {
                const char *name = disks->disks[i].checkpoints[k].name;

                if (strcmp(name, last) > 0 && (!next || strcmp(name, next) < 0) && !notes_find(vm->notes, name))
                    next = name;
            }
        }
        if (!next)
            return all;
        for (size_t i = 0; i < disks->ndisks; i++) {
            const struct disk *d = &disks->disks[i];
            const struct checkpoint *c = disk_checkpoint(d, next);

            if (c && is_about(only, d->name)) {
                struct json_object *o = checkpoint_to_json(d, c);

                add_note(vm, o, NULL);
                json_object_array_add(all, o);
            }
        }
        last = next;
    }
}

/* Whether a pull since that checkpoint would be incremental, disk by disk, as things stand. */
struct json_object *vm_can_increment_to_json(const struct vm *vm, const struct disk_list *disks, const char *checkpoint,
                                             const char *only)
{
    const struct note *n = notes_find(vm->notes, checkpoint);
    struct json_object *all = json_object_new_array();

    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];
        const struct checkpoint *c = disk_checkpoint(d, checkpoint);
        enum reason reason = c             ? c->reason
                             : !d->tracked ? REASON_NOT_TRACKED
                             : n           ? note_reason(n, d)
                                           : REASON_NO_SUCH_CHECKPOINT;
        struct json_object *o;

        if (!is_about(only, d->name))
            continue;
        o = qmp_args_strings("disk", d->name, "verdict", reason == REASON_NONE ? "incremental" : "full", "reason",
                             reason_name(reason), "text", c ? checkpoint_text(c) : reason_text(reason), NULL);
        json_object_object_add(o, "dirty-bytes", c ? json_object_new_uint64(c->dirty) : NULL);
        json_object_array_add(all, o);
    }
    return all;
}

struct json_object *vm_export(const struct vm *vm)
{
    return notes_export(vm->notes);
}

const char *vm_current(const struct vm *vm)
{
    const struct note *n = notes_current(vm->notes);

    return n ? n->name : NULL;
}
