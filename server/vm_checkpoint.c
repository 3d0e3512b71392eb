/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Checkpoints outside of a session: made, and removed. The bitmaps in QEMU are the checkpoints; what is asked here is
 * asked of QEMU, and the notes follow.
 */
#include "log.h"
#include "vm_internal.h"

#include "backup/names.h"
#include "backup/seq.h"

#include <errno.h>

/* One of the checkpoints that go. */
struct going {
    char *name;             /* owned */
    unsigned nrecords;      /* of all disks and layers */
    unsigned nasked, ngone; /* transactions */
    bool elsewhere;         /* other disks keep theirs */
};

struct work {
    struct vm *vm; /* keeper of the notes */
    struct vm_write write;
    struct disk_list *deleted; /* owned: as it was before */
    struct vm_query query;
    struct calls calls;
    struct vm_watch_wait remembered;
    struct vm_note_wait wait;
    struct vm_change *change; /* NULL: forgotten */
    char *name;               /* owned: the checkpoint's */
    char **disks;             /* owned; none: all */
    size_t ndisks;
    unsigned ndone;
    void (*note)(struct work *w); /* what the notes learn, when all is stored */
    bool notes_only;
    struct failure failure;

    /* create */
    char *description, *parent; /* owned, or NULL */
    struct note_disk *noted;    /* owned, names and nodes too */
    size_t nnoted;

    /* delete */
    struct going *going; /* owned */
    size_t ngoing;
};

static void work_free(struct work *w)
{
    for (size_t i = 0; w->disks && i < w->ndisks; i++)
        free(w->disks[i]);
    for (size_t i = 0; i < w->nnoted; i++) {
        free(w->noted[i].name);
        free(w->noted[i].node);
    }
    for (size_t i = 0; i < w->ngoing; i++)
        free(w->going[i].name);
    free(w->going);
    free(w->noted);
    free(w->disks);
    free(w->description);
    free(w->parent);
    disk_list_free(w->deleted);
    free(w->name);
    free(w);
}

/* The answer waits for the notes; without them the change has happened all the same. */
static void on_noted(struct vm_note_wait *wait, const struct failure *f)
{
    struct work *w = container_of(wait, struct work, wait);
    struct vm_change *change = w->change;
    unsigned ndone = w->ndone;

    if (f && w->notes_only)
        (void)failure_copy(&w->failure, f);
    else if (f && change)
        (void)failure_set(&change->warning, f->err, "done, but its note could not be written: %s", f->text);
    if (change) {
        change->private = NULL;
        change->cb(change, ndone, w->failure.err ? &w->failure : NULL);
    }
    work_free(w);
}

static void on_remembered(struct vm_watch_wait *wait, const struct failure *f)
{
    struct work *w = container_of(wait, struct work, remembered);

    if (f && w->change)
        (void)failure_set(&w->change->warning, f->err, "done, but a record that is left may be seen again: %s",
                          f->text);
    vm_notes_write(w->vm, &w->wait, on_noted);
}

/* Whoever is told that a checkpoint is deleted does not see it again, even if we are killed just then. */
static void note_it(struct work *w)
{
    struct failure f = {0};
    int r = SEQ_DONE;

    if (w->note) {
        w->note(w);
        vm_watch_wake(w->write.vm);
    }
    if (w->deleted)
        r = vm_watch_store(w->vm, &w->remembered, on_remembered);
    if (r < 0)
        (void)failure_set(&f, r, "%s", strerror(-r));
    if (r != 0)
        on_remembered(&w->remembered, f.err ? &f : NULL);
}

static void on_stored(struct vm_write *write, const struct failure *f)
{
    struct work *w = container_of(write, struct work, write);

    if (f) {
        (void)failure_copy(&w->failure, f);
        w->note = NULL;
    }
    note_it(w);
}

/* All that was asked of QEMU is answered: what is done is stored, noted, and told. */
static void work_end(struct work *w, const struct failure *f)
{
    int r;

    if (f)
        (void)failure_copy(&w->failure, f);
    r = vm_write_end(&w->write, on_stored);
    if (r == 0)
        return;
    if (r < 0) {
        (void)failure_set(&w->failure, r, "the change could not be stored: %s", strerror(-r));
        w->note = NULL;
    }
    note_it(w);
}

static bool is_meant(const struct work *w, const struct disk *d)
{
    for (size_t i = 0; i < w->ndisks; i++) {
        if (strcmp(w->disks[i], d->name) == 0)
            return true;
    }
    return w->ndisks == 0;
}

static int check_disks(const struct work *w, const struct disk_list *disks, struct failure *f)
{
    for (size_t i = 0; i < w->ndisks; i++) {
        if (!disk_list_find(disks, w->disks[i]))
            return failure_set(f, -ENOENT, "there is no disk '%s'", w->disks[i]);
    }
    return 0;
}

/* NULL: out of memory */
static struct work *work_new(struct vm *vm, struct vm_change *change, const char *name, const char *const *disks,
                             size_t ndisks)
{
    struct work *w = calloc(1, sizeof(*w));

    if (!w)
        return NULL;
    w->vm = vm->keeper;
    w->name = strdup(name);
    w->disks = calloc(ndisks + 1, sizeof(*w->disks));
    for (; w->disks && w->ndisks < ndisks; w->ndisks++) {
        if (!(w->disks[w->ndisks] = strdup(disks[w->ndisks])))
            break;
    }
    if (!w->name || !w->disks || w->ndisks != ndisks) {
        work_free(w);
        return NULL;
    }
    w->change = change;
    change->warning = (struct failure){0};
    change->private = w;
    return w;
}

/* It has not begun. */
static void work_drop(struct work *w)
{
    w->change->private = NULL;
    work_free(w);
}

static int ask_disks(struct work *w, void (*cb)(struct vm_query *, const struct disk_list *, const struct failure *))
{
    int r = vm_write_start(w->vm, &w->write, &w->query, &w->calls, (const char *const *)w->disks, w->ndisks, cb);

    if (r < 0)
        work_drop(w);
    return r;
}

void vm_change_forget(struct vm_change *change)
{
    struct work *w = change->private;

    if (w)
        w->change = NULL;
    change->private = NULL;
}

/* -- delete -------------------------------------------------------------------------------------------------------- */

static int on_one_gone(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    container_of(c, struct work, calls)->going[index].ngone++;
    return 0;
}

static int remove_note(struct work *w, const char *name)
{
    return notes_remove(w->vm->notes, name, &w->vm->note_changes, &w->failure);
}

static int drop_disks(struct work *w, const char *name)
{
    int r = 0;

    for (size_t i = 0; i < w->ndisks && r == 0; i++)
        r = notes_drop_disk(w->vm->notes, name, w->disks[i], &w->vm->note_changes, &w->failure);
    return r;
}

/* Told: from which disks. */
static void tell_deleted(const struct work *w, const char *name)
{
    struct json_object *disks = json_object_new_array();

    for (size_t i = 0; i < w->deleted->ndisks; i++) {
        const struct disk *d = &w->deleted->disks[i];
        const struct checkpoint *c = disk_checkpoint(d, name);

        if (c && c->reason != REASON_NO_SUCH_CHECKPOINT && is_meant(w, d))
            json_object_array_add(disks, json_object_new_string(d->name));
    }
    if (json_object_array_length(disks))
        vm_tell_checkpoint(w->vm, "CHECKPOINT_DELETED", name, disks);
    else
        json_object_put(disks);
}

/* The records first, then the note: stopped in between, the note is shown as broken and can be deleted again. */
static void note_deleted(struct work *w)
{
    for (size_t i = 0; i < w->ngoing; i++) {
        const struct going *g = &w->going[i];

        if (g->ngone < g->nasked)
            continue; /* some are still there: failure says why */
        w->ndone += g->nrecords;
        tell_deleted(w, g->name);
        for (size_t k = 0; k < w->deleted->ndisks; k++) {
            if (is_meant(w, &w->deleted->disks[k]))
                vm_watch_deleted(w->vm, &w->deleted->disks[k], g->name);
        }
        if ((g->elsewhere ? drop_disks(w, g->name) : remove_note(w, g->name)) < 0)
            break;
    }
}

static void on_records_gone(struct calls *c, const struct failure *f)
{
    struct work *w = container_of(c, struct work, calls);

    work_end(w, f);
}

/*
 * A record that lies in several layers goes as a whole or, where QEMU refuses one of them, stays as a whole: what is
 * left of a half-removed one would begin later than the checkpoint. So one transaction for each disk; from the top,
 * because QEMU (7.2) takes a record out of the image before it knows whether the rest of the transaction works: after a
 * crash the allocation stands in for upper layers, never for the deepest one.
 */
static void remove_record(struct work *w, unsigned going, const struct disk *d, const struct checkpoint *c)
{
    struct json_object *args = qmp_args_transaction();
    unsigned n = 0;

    /* What lies in a layer that QEMU cannot write stays there, and is remembered as nobody's. */
    for (size_t l = 0; l < c->nlayers; l++) {
        if (d->images[c->layers[l].depth].read_only)
            continue;
        qmp_action_bitmap_remove(args, (struct qmp_bitmap){c->layers[l].node, c->name});
        n++;
    }
    if (n == 0) {
        json_object_put(args);
        return;
    }
    w->going[going].nrecords += n;
    w->going[going].nasked++;
    calls_add(&w->calls, "transaction", args, QMP_NO_FD, going, on_one_gone);
}

static void on_delete_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct work *w = container_of(q, struct work, query);
    struct failure mine = {0};
    int r;

    if (!f && check_disks(w, disks, &mine) == 0 && !(w->deleted = disk_list_copy(disks)))
        (void)failure_set(&mine, -ENOMEM, "out of memory");
    if (f || mine.err) {
        work_end(w, f ? f : &mine);
        return;
    }
    for (size_t g = 0; g < w->ngoing; g++) {
        for (size_t i = 0; i < disks->ndisks; i++) {
            const struct disk *d = &disks->disks[i];
            const struct checkpoint *c = disk_checkpoint(d, w->going[g].name);

            if (c && is_meant(w, d))
                remove_record(w, (unsigned)g, d, c);
            else if (c && c->reason != REASON_NO_SUCH_CHECKPOINT)
                w->going[g].elsewhere = true;
        }
    }
    w->note = note_deleted;
    r = calls_wait(&w->calls, on_records_gone, &mine);
    if (r != 0)
        work_end(w, r < 0 ? &mine : NULL);
}

static int add_going(struct work *w, const char *name)
{
    struct going *more = realloc(w->going, (w->ngoing + 1) * sizeof(*more));

    if (!more)
        return -ENOMEM;
    w->going = more;
    more[w->ngoing] = (struct going){.name = strdup(name)};
    if (!more[w->ngoing].name)
        return -ENOMEM;
    w->ngoing++;
    return 0;
}

int vm_delete_start(struct vm *vm, struct vm_change *change, const char *checkpoint, const char *const *disks,
                    size_t ndisks, enum vm_delete what)
{
    const struct note *top = notes_find(vm->notes, checkpoint);
    bool family = what == VM_DELETE_WITH_DESCENDANTS || what == VM_DELETE_DESCENDANTS;
    struct work *w;
    int r = 0;

    if (family && !top)
        return -ENOENT;
    if (vm_is_committing(vm_now(vm)) && what != VM_DELETE_NOTE)
        return -EBUSY;
    if (!(w = work_new(vm, change, checkpoint, disks, ndisks)))
        return -ENOMEM;
    if (what != VM_DELETE_DESCENDANTS)
        r = add_going(w, checkpoint);
    for (const struct note *n = family ? notes_below(top, top) : NULL; n && r == 0; n = notes_below(top, n))
        r = add_going(w, n->name);
    if (r < 0) {
        work_drop(w);
        return r;
    }
    if (what != VM_DELETE_NOTE)
        return ask_disks(w, on_delete_disks);
    w->notes_only = true;
    w->ndone = top != NULL;
    r = notes_remove(vm->notes, checkpoint, &vm->note_changes, &w->failure);
    if (r < 0)
        work_drop(w);
    else
        vm_notes_write(vm, &w->wait, on_noted);
    return r;
}

/* -- retention ----------------------------------------------------------------------------------------------------- */

static void on_retired(struct vm_change *change, unsigned n, const struct failure *f)
{
    struct vm *vm = change->arg;

    vm->retiring = false;
    if (f) {
        log_warning("VM %s: the oldest checkpoint, more than keep-checkpoints allows, cannot be dropped: %s", vm->name,
                    f->text);
        return;
    }
    vm_retire(vm);
}

void vm_retire(struct vm *vm)
{
    const char *oldest;
    int r;

    vm = vm->keeper;
    if (vm->retiring || vm->stopping || !notes_over(vm->notes, vm->keep_checkpoints, &oldest, 1))
        return;
    vm->retired = (struct vm_change){.cb = on_retired, .arg = vm};
    r = vm_delete_start(vm, &vm->retired, oldest, NULL, 0, VM_DELETE_ITSELF);
    vm->retiring = r == 0;
    if (r == 0)
        log_info("VM %s: checkpoint %s is dropped: %u are kept", vm->name, oldest, vm->keep_checkpoints);
    else if (r != -ENOTCONN && r != -ESHUTDOWN) /* without a connection the next one that is kept tries again */
        log_warning("VM %s: checkpoint %s cannot be dropped: %s", vm->name, oldest, strerror(-r));
}

/* -- create -------------------------------------------------------------------------------------------------------- */

/* It was a checkpoint when the session was frozen, and whoever asks that session for it means that one. */
static bool is_of_session(const struct work *w, const struct disk *d)
{
    const struct session *s = w->write.vm->session;
    const struct disk *frozen = s ? disk_list_find(session_disks(s), d->name) : NULL;

    return frozen && disk_checkpoint(frozen, w->name);
}

static int check_create(const struct work *w, const struct disk *d, struct failure *f)
{
    const struct checkpoint *c = disk_checkpoint(d, w->name);

    if (c && c->reason == REASON_NO_SUCH_CHECKPOINT)
        return failure_set(f, -EEXIST, "checkpoint name '%s' cannot be used again on disk '%s' yet: %s; choose another",
                           w->name, d->name, checkpoint_text(c));
    if (c)
        return failure_set(f, -EEXIST, "checkpoint '%s' exists already on disk '%s'; choose another name, or delete it",
                           w->name, d->name);
    if (is_of_session(w, d))
        return failure_set(f, -EBUSY,
                           "checkpoint '%s' of disk '%s' was deleted in session %s, which was frozen before that and "
                           "may be asked for it; choose another name, or try again when the session has ended",
                           w->name, d->name, session_id(w->write.vm->session));
    if (is_meant(w, d) && w->ndisks > 0 && !d->tracked)
        return failure_set(
            f, -ENOTSUP,
            "disk '%s' cannot keep a checkpoint (%s): its image is %s, only qcow2 version 3 stores bitmaps", d->name,
            reason_name(REASON_NOT_TRACKED), d->format);
    return 0;
}

static void note_created(struct work *w)
{
    struct note_spec spec = {.name = w->name,
                             .created_ms = unix_time_ms(),
                             .parent = w->parent,
                             .description = w->description,
                             .disks = w->noted,
                             .ndisks = w->nnoted};
    struct json_object *disks = json_object_new_array();
    struct failure why = {0};

    for (size_t i = 0; i < w->nnoted; i++)
        json_object_array_add(disks, json_object_new_string(w->noted[i].name));
    vm_tell_checkpoint(w->vm, "CHECKPOINT_CREATED", w->name, disks);
    if (vm_notes_add(w->vm, &spec, &why) < 0 && w->change)
        (void)failure_set(&w->change->warning, why.err, "done, but it has no note: %s", why.text);
    vm_retire(w->vm);
}

static void on_created(struct calls *c, const struct failure *f)
{
    struct work *w = container_of(c, struct work, calls);

    if (!f) {
        w->ndone = (unsigned)w->nnoted;
        w->note = note_created;
    }
    work_end(w, f);
}

static int note_disk(struct work *w, const struct disk *d)
{
    struct note_disk *n = &w->noted[w->nnoted];

    n->size = d->size;
    n->name = strdup(d->name);
    n->node = strdup(d->node);
    w->nnoted++;
    return n->name && n->node ? 0 : -ENOMEM;
}

/* One transaction: it begins by draining, so that all disks' records begin at one instant. */
static void on_create_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct work *w = container_of(q, struct work, query);
    struct json_object *args = NULL;
    struct failure mine = {0};
    int r;

    if (f || check_disks(w, disks, &mine) < 0) {
        work_end(w, f ? f : &mine);
        return;
    }
    args = qmp_args_transaction();
    w->noted = calloc(disks->ndisks + 1, sizeof(*w->noted));
    if (!w->noted)
        (void)failure_set(&mine, -ENOMEM, "out of memory");
    for (size_t i = 0; !mine.err && i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];

        /* One name is one instant: it must be free on all disks. */
        if (check_create(w, d, &mine) < 0 || !is_meant(w, d) || !d->tracked)
            continue;
        if (note_disk(w, d) < 0)
            (void)failure_set(&mine, -ENOMEM, "out of memory");
        else
            qmp_action_bitmap_add(args, (struct qmp_bitmap){d->top, w->name}, 0, true, false);
    }
    if (!mine.err && w->nnoted == 0)
        (void)failure_set(&mine, -ENOTSUP,
                          "no disk can keep a checkpoint: only qcow2 images (version 3) store bitmaps");
    if (mine.err) {
        json_object_put(args);
        work_end(w, &mine);
        return;
    }
    vm_watch_forget(w->vm, w->name);
    calls_add(&w->calls, "transaction", args, QMP_NO_FD, 0, NULL);
    r = calls_wait(&w->calls, on_created, &mine);
    if (r < 0)
        work_end(w, &mine);
}

int vm_create_start(struct vm *vm, struct vm_change *change, const struct vm_create *what)
{
    struct work *w;

    if (what->parent && *what->parent && !notes_find(vm->notes, what->parent))
        return -ENOENT;
    if (vm_is_committing(vm_now(vm)))
        return -EBUSY;
    if (!(w = work_new(vm, change, what->checkpoint, what->disks, what->ndisks)))
        return -ENOMEM;
    w->description = what->description ? strdup(what->description) : NULL;
    w->parent = what->parent ? strdup(what->parent) : NULL;
    return ask_disks(w, on_create_disks);
}

/* -- notes alone --------------------------------------------------------------------------------------------------- */

int vm_import_start(struct vm *vm, struct vm_change *change, struct json_object *doc, struct failure *f)
{
    size_t before = vm->note_changes.nops;
    struct work *w;
    int r;

    if (!(w = work_new(vm, change, vm->name, NULL, 0)))
        return failure_set(f, -ENOMEM, "out of memory");
    w->notes_only = true;
    r = notes_import(vm->notes, doc, &vm->note_changes, f);
    w->ndone = (unsigned)(vm->note_changes.nops - before);
    if (r == 0)
        vm_notes_write(vm, &w->wait, on_noted);
    else
        work_drop(w);
    return r;
}

/* The memory of the disks is there under the new name, too: now the notes. */
static void on_inherited(struct vm *vm, void *arg, const struct failure *f, const struct failure *warning)
{
    struct work *w = arg;

    if (warning && w->change)
        (void)failure_copy(&w->change->warning, warning);
    if (f)
        (void)failure_copy(&w->failure, f);
    if (f || vm_notes_rename(vm, w->name, &w->failure) < 0) {
        on_noted(&w->wait, NULL);
        return;
    }
    vm_notes_write(vm, &w->wait, on_noted);
    vm_watch_wake(vm);
}

int vm_rename_start(struct vm *vm, struct vm_change *change, const char *from, struct failure *f)
{
    struct work *w;
    int r;

    if (vm_notes_may_rename(vm, f) < 0)
        return f->err;
    if (!(w = work_new(vm, change, from, NULL, 0)))
        return failure_set(f, -ENOMEM, "out of memory");
    w->notes_only = true;
    r = vm_inherit_start(vm, from, on_inherited, w);
    if (r < 0)
        work_drop(w);
    return r < 0 ? failure_set(f, r, "it cannot be done now: %s", strerror(-r)) : 0;
}

/* -- a disk that was restored -------------------------------------------------------------------------------------- */

static void on_restored(struct vm_watch_wait *wait, const struct failure *f)
{
    struct work *w = container_of(wait, struct work, remembered);

    if (f)
        (void)failure_set(&w->failure, f->err, "it is not on disk that disk '%s' was restored: %s", w->name, f->text);
    else
        w->ndone = 1;
    vm_watch_wake(w->vm);
    vm_notes_write(w->vm, &w->wait, on_noted);
}

int vm_restored_start(struct vm *vm, struct vm_change *change, const char *disk, struct failure *f)
{
    struct work *w = work_new(vm, change, disk, NULL, 0);
    int r = w ? lineage_restored(vm->keeper->watch.lineage, disk) : -ENOMEM;

    if (r == 0)
        r = vm_watch_store(vm, &w->remembered, on_restored);
    if (r == 0)
        return 0;
    if (w)
        work_drop(w);
    return failure_set(f, r < 0 ? r : -EAGAIN, "what is remembered of disk '%s' cannot be written: %s", disk,
                       r < 0 ? strerror(-r) : "try again");
}
