/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Checkpoints outside of a session: made, and removed. The bitmaps in QEMU are the checkpoints; what is asked here is
 * asked of QEMU.
 */
#include "vm_internal.h"

#include "backup/names.h"

#include <errno.h>

struct work {
    struct vm *vm;
    struct disk_list *deleted; /* owned: as it was before */
    struct vm_query query;
    struct calls calls;
    struct vm_change *change; /* NULL: forgotten */
    char *name;               /* owned: the checkpoint's */
    char **disks;             /* owned; none: all */
    size_t ndisks;
    unsigned ndone;
};

static void work_free(struct work *w)
{
    for (size_t i = 0; w->disks && i < w->ndisks; i++)
        free(w->disks[i]);
    free(w->disks);
    free(w->name);
    disk_list_free(w->deleted);
    free(w);
}

static void work_end(struct work *w, const struct failure *f)
{
    struct vm_change *change = w->change;
    unsigned ndone = w->ndone;

    if (change) {
        change->private = NULL;
        change->cb(change, ndone, f);
    }
    work_free(w);
}

static int on_one_done(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    container_of(c, struct work, calls)->ndone += index;
    return 0;
}

static bool is_meant(const struct work *w, const struct disk *d)
{
    for (size_t i = 0; i < w->ndisks; i++) {
        if (strcmp(w->disks[i], d->name) == 0)
            return true;
    }
    return w->ndisks == 0;
}

static void on_all_done(struct calls *c, const struct failure *f)
{
    struct work *w = container_of(c, struct work, calls);

    for (size_t i = 0; !f && w->deleted && i < w->deleted->ndisks; i++) {
        if (is_meant(w, &w->deleted->disks[i]))
            vm_watch_deleted(w->vm, &w->deleted->disks[i], w->name);
    }
    vm_watch_wake(w->vm);
    work_end(w, f);
}

static void send_all(struct work *w)
{
    struct failure f = {0};
    int r = calls_wait(&w->calls, on_all_done, &f);

    if (r != 0)
        on_all_done(&w->calls, r < 0 ? &f : NULL);
}

static int check_disks(const struct work *w, const struct disk_list *disks, struct failure *f)
{
    for (size_t i = 0; i < w->ndisks; i++) {
        if (!disk_list_find(disks, w->disks[i]))
            return failure_set(f, -ENOENT, "there is no disk '%s'", w->disks[i]);
    }
    return 0;
}

static int start(struct vm *vm, struct vm_change *change, const char *name, const char *const *disks, size_t ndisks,
                 void (*on_disks)(struct vm_query *, const struct disk_list *, const struct failure *))
{
    struct work *w = calloc(1, sizeof(*w));
    int r = -ENOMEM;

    if (!w)
        return r;
    w->vm = vm;
    w->name = strdup(name);
    w->disks = calloc(ndisks + 1, sizeof(*w->disks));
    for (; w->disks && w->ndisks < ndisks; w->ndisks++) {
        if (!(w->disks[w->ndisks] = strdup(disks[w->ndisks])))
            break;
    }
    calls_init(&w->calls, vm->qmp, VM_CALL_TIMEOUT_MS);
    if (w->name && w->disks && w->ndisks == ndisks)
        r = vm_query_start(vm, &w->query, on_disks, w);
    if (r < 0) {
        work_free(w);
        return r;
    }
    w->change = change;
    change->private = w;
    return 0;
}

void vm_change_forget(struct vm_change *change)
{
    struct work *w = change->private;

    if (w)
        w->change = NULL;
    change->private = NULL;
}

/* -- delete -------------------------------------------------------------------------------------------------------- */

/*
 * A record that lies in several layers goes as a whole or, where QEMU refuses one of them, stays as a whole: what is
 * left of a half-removed one would begin later than the checkpoint. So one transaction for each disk; from the top,
 * because QEMU (7.2) takes a record out of the image before it knows whether the rest of the transaction works: after a
 * crash the allocation stands in for upper layers, never for the deepest one.
 */
static void on_delete_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct work *w = container_of(q, struct work, query);
    struct failure mine = {0};

    if (!f && check_disks(w, disks, &mine) == 0 && !(w->deleted = disk_list_copy(disks)))
        (void)failure_set(&mine, -ENOMEM, "out of memory");
    if (f || mine.err) {
        work_end(w, f ? f : &mine);
        return;
    }
    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];
        const struct checkpoint *c = is_meant(w, d) ? disk_checkpoint(d, w->name) : NULL;
        struct json_object *args = qmp_args_transaction();
        unsigned n = 0;

        /* What lies in a layer that QEMU cannot write stays there, and is remembered as nobody's. */
        for (size_t l = 0; c && l < c->nlayers; l++) {
            if (d->images[c->layers[l].depth].read_only)
                continue;
            qmp_action_bitmap_remove(args, (struct qmp_bitmap){c->layers[l].node, c->name});
            n++;
        }
        if (n)
            calls_add(&w->calls, "transaction", args, QMP_NO_FD, n, on_one_done);
        else
            json_object_put(args);
    }
    send_all(w);
}

int vm_delete_start(struct vm *vm, struct vm_change *change, const char *checkpoint, const char *const *disks,
                    size_t ndisks)
{
    return start(vm, change, checkpoint, disks, ndisks, on_delete_disks);
}

/* -- create -------------------------------------------------------------------------------------------------------- */

static int check_create(const struct work *w, const struct disk *d, struct failure *f)
{
    const struct checkpoint *c;

    if (!d->tracked)
        return failure_set(
            f, -ENOTSUP,
            "disk '%s' cannot keep a checkpoint (%s): its image is %s, only qcow2 version 3 stores bitmaps", d->name,
            reason_name(REASON_NOT_TRACKED), d->format);
    if ((c = disk_checkpoint(d, w->name)) && c->reason == REASON_NO_SUCH_CHECKPOINT)
        return failure_set(f, -EEXIST, "checkpoint name '%s' cannot be used again on disk '%s' yet: %s; choose another",
                           w->name, d->name, checkpoint_text(c));
    if (c)
        return failure_set(f, -EEXIST, "checkpoint '%s' exists already on disk '%s'; choose another name, or delete it",
                           w->name, d->name);
    return 0;
}

/* One transaction: it begins by draining, so that all disks' records begin at one instant. */
static void on_create_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct work *w = container_of(q, struct work, query);
    struct json_object *args = NULL;
    struct failure mine = {0};
    unsigned n = 0;

    if (f || check_disks(w, disks, &mine) < 0) {
        work_end(w, f ? f : &mine);
        return;
    }
    args = qmp_args_transaction();
    for (size_t i = 0; !mine.err && i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];

        /* Of "all disks" those that cannot take part are left out; a disk that was named must. */
        if (!is_meant(w, d) || (w->ndisks == 0 && !d->tracked))
            continue;
        if (check_create(w, d, &mine) == 0) {
            qmp_action_bitmap_add(args, (struct qmp_bitmap){d->top, w->name}, 0, true, false);
            n++;
        }
    }
    if (!mine.err && n == 0)
        (void)failure_set(&mine, -ENOTSUP,
                          "no disk can keep a checkpoint: only qcow2 images (version 3) store bitmaps");
    if (mine.err) {
        json_object_put(args);
        work_end(w, &mine);
        return;
    }
    vm_watch_forget(w->vm, w->name);
    calls_add(&w->calls, "transaction", args, QMP_NO_FD, n, on_one_done);
    send_all(w);
}

int vm_create_start(struct vm *vm, struct vm_change *change, const char *checkpoint, const char *const *disks,
                    size_t ndisks)
{
    return start(vm, change, checkpoint, disks, ndisks, on_create_disks);
}
