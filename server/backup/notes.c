/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The set of notes in memory: who descends from whom, and what has to be written when that changes. Parents are named,
 * not pointed to, in everything that lasts; the pointers are computed from the names.
 */
#include "backup/names.h"
#include "backup/notes_impl.h"

#include <errno.h>
#include <stdio.h>

/* -- one note ------------------------------------------------------------------------------------------------------ */

static void broken_clear(struct note_broken *b)
{
    free(b->disk);
    free(b->reason);
    free(b->text);
    free(b->extra);
    *b = (struct note_broken){0};
}

static void note_disk_clear(struct note_disk *d)
{
    free(d->name);
    free(d->node);
    free(d->file);
    free(d->extra);
}

void note_free(struct note *n)
{
    if (!n)
        return;
    for (size_t i = 0; i < n->ndisks; i++)
        note_disk_clear(&n->disks[i]);
    free(n->disks);
    broken_clear(&n->broken);
    free(n->name);
    free(n->description);
    free(n->parent_name);
    free(n->extra);
    free(n);
}

enum reason note_reason(const struct note *n, const struct disk *d)
{
    const struct checkpoint *record = disk_checkpoint(d, n->name);
    const struct note_broken *b = &n->broken;

    if (record)
        return record->reason;
    if (b->reason && (!b->disk || strcmp(b->disk, d->name) == 0)) {
        for (int r = REASON_NONE + 1; r <= REASON_BUSY; r++) {
            if (strcmp(b->reason, reason_name((enum reason)r)) == 0)
                return (enum reason)r;
        }
    }
    return REASON_NO_SUCH_CHECKPOINT;
}

/* -- changes to be written ----------------------------------------------------------------------------------------- */

void notes_change_cut(struct notes_change *c, size_t nops)
{
    while (c->nops > nops) {
        c->nops--;
        free(c->ops[c->nops].name);
        free(c->ops[c->nops].text);
    }
}

void notes_change_done(struct notes_change *c)
{
    notes_change_cut(c, 0);
    free(c->ops);
    *c = (struct notes_change){0};
}

int notes_change_push(struct notes_change *c, const char *name, char *text)
{
    _cleanup_free_ char *text_owned = text;
    char *copy;

    if (c->nops == c->nalloc) {
        size_t nalloc = c->nalloc ? 2 * c->nalloc : 4;
        struct notes_op *ops = reallocarray(c->ops, nalloc, sizeof(*ops));

        if (!ops)
            return -ENOMEM;
        c->ops = ops;
        c->nalloc = nalloc;
    }
    copy = strdup(name);
    if (!copy)
        return -ENOMEM;
    c->ops[c->nops++] = (struct notes_op){.name = copy, .text = TAKE_PTR(text_owned)};
    return 0;
}

/* The note as it is now, and how long its document is. */
static int push_note(struct notes_change *c, const struct note *n, const char *vm, size_t *ret_len)
{
    char *text = note_encode(n, vm);

    if (!text)
        return -ENOMEM;
    *ret_len = strlen(text);
    return notes_change_push(c, n->name, text);
}

static int no_memory(struct failure *f)
{
    (void)failure_set(f, -ENOMEM, "out of memory for the notes of checkpoints");
    return -ENOMEM;
}

/* -- relations ----------------------------------------------------------------------------------------------------- */

enum mark { UNSEEN, ON_PATH, SETTLED };

static int compare_names(const void *a, const void *b)
{
    return strcmp((*(struct note *const *)a)->name, (*(struct note *const *)b)->name);
}

/* A parent is never older in age_ms than its children, and less deep: this order is topological. */
static int compare_age(const void *a, const void *b)
{
    const struct note *x = *(struct note *const *)a, *y = *(struct note *const *)b;

    if (x->age_ms != y->age_ms)
        return x->age_ms < y->age_ms ? -1 : 1;
    if (x->depth != y->depth)
        return x->depth < y->depth ? -1 : 1;
    if (x->created_ms != y->created_ms)
        return x->created_ms < y->created_ms ? -1 : 1;
    return strcmp(x->name, y->name);
}

struct note *notes_find(const struct notes *set, const char *name)
{
    struct note key = {.name = (char *)name};
    const struct note *p = &key;
    struct note **found = NULL;

    if (set->nnotes)
        found = bsearch(&p, set->by_name, set->nnotes, sizeof(struct note *), compare_names);
    return found ? *found : NULL;
}

static void settle_one(struct note *n)
{
    n->age_ms = n->parent ? MAX(n->created_ms, n->parent->age_ms) : n->created_ms;
    n->depth = n->parent ? n->parent->depth + 1 : 0;
    n->mark = SETTLED;
}

/*
 * Climbs to the first ancestor that is settled and settles the way back. Whoever is met twice on one way is its own
 * ancestor, and so is all that lies between: these become roots. Returns how many. sibling serves as the way back.
 */
static size_t settle(struct note *n)
{
    struct note *path = NULL, *p, *next;
    size_t ncyclic = 0;

    for (p = n; p && p->mark == UNSEEN; p = p->parent) {
        p->mark = ON_PATH;
        p->sibling = path;
        path = p;
    }
    if (p && p->mark == ON_PATH) {
        struct note *first = p;

        do {
            next = p->parent;
            p->parent = NULL;
            p->cyclic = true;
            ncyclic++;
            p = next;
        } while (p != first);
    }
    for (; path; path = next) {
        next = path->sibling;
        settle_one(path);
    }
    return ncyclic;
}

size_t notes_relink(struct notes *set)
{
    size_t ncyclic = 0;

    set->root = NULL;
    set->ndangling = 0;
    if (!set->nnotes)
        return 0;
    memcpy(set->by_name, set->notes, set->nnotes * sizeof(struct note *));
    qsort(set->by_name, set->nnotes, sizeof(struct note *), compare_names);
    for (size_t i = 0; i < set->nnotes; i++) {
        struct note *n = set->notes[i];

        n->parent = n->parent_name ? notes_find(set, n->parent_name) : NULL;
        set->ndangling += n->parent_name && !n->parent;
        n->child = n->sibling = NULL;
        n->nchildren = 0;
        n->mark = UNSEEN;
        n->cyclic = false;
    }
    for (size_t i = 0; i < set->nnotes; i++)
        ncyclic += settle(set->notes[i]);
    qsort(set->notes, set->nnotes, sizeof(struct note *), compare_age);
    for (size_t i = set->nnotes; i-- > 0;) { /* backwards, as each is put in front */
        struct note *n = set->notes[i];
        struct note **family = n->parent ? &n->parent->child : &set->root;

        n->sibling = *family;
        *family = n;
        if (n->parent)
            n->parent->nchildren++;
    }
    return ncyclic;
}

const struct note *notes_current(const struct notes *set)
{
    return set->nnotes ? set->notes[set->nnotes - 1] : NULL;
}

const struct note *notes_below(const struct note *top, const struct note *n)
{
    if (n->child)
        return n->child;
    for (; n != top; n = n->parent) {
        if (n->sibling)
            return n->sibling;
    }
    return NULL;
}

bool notes_is_ancestor(const struct note *ancestor, const struct note *n)
{
    for (n = n->parent; n; n = n->parent) {
        if (n == ancestor)
            return true;
    }
    return false;
}

/* -- the set ------------------------------------------------------------------------------------------------------- */

struct notes *notes_new(const char *vm)
{
    struct notes *set = calloc(1, sizeof(*set));

    if (!set)
        return NULL;
    set->vm = strdup(vm);
    if (!set->vm) {
        free(set);
        return NULL;
    }
    return set;
}

void notes_free(struct notes *set)
{
    if (!set)
        return;
    for (size_t i = 0; i < set->nnotes; i++)
        note_free(set->notes[i]);
    free(set->notes);
    free(set->by_name);
    free(set->vm);
    free(set);
}

int notes_reserve(struct notes *set, size_t n)
{
    struct note **p;

    if (n <= set->nalloc)
        return 0;
    n = MAX(n, MIN(2 * set->nalloc, NOTES_MAX));
    p = reallocarray(set->notes, n, sizeof(struct note *));
    if (!p)
        return -ENOMEM;
    set->notes = p;
    p = reallocarray(set->by_name, n, sizeof(struct note *));
    if (!p)
        return -ENOMEM;
    set->by_name = p;
    set->nalloc = n;
    return 0;
}

void notes_append(struct notes *set, struct note *n)
{
    set->notes[set->nnotes++] = n;
    set->bytes += n->bytes;
}

static void insert(struct note **array, size_t n, struct note *x, int (*compare)(const void *, const void *))
{
    size_t low = 0, high = n;

    while (low < high) {
        size_t mid = (low + high) / 2;

        if (compare(&array[mid], &x) < 0)
            low = mid + 1;
        else
            high = mid;
    }
    memmove(array + low + 1, array + low, (n - low) * sizeof(struct note *));
    array[low] = x;
}

/* What notes_relink() comes to for a new leaf. */
static void insert_leaf(struct notes *set, struct note *n, struct note *parent)
{
    struct note **family = parent ? &parent->child : &set->root;

    n->parent = parent;
    settle_one(n);
    insert(set->notes, set->nnotes, n, compare_age);
    insert(set->by_name, set->nnotes, n, compare_names);
    set->nnotes++;
    set->bytes += n->bytes;
    if (parent)
        parent->nchildren++;
    while (*family && compare_age(family, &n) < 0)
        family = &(*family)->sibling;
    n->sibling = *family;
    *family = n;
}

/* -- adding -------------------------------------------------------------------------------------------------------- */

static bool copy_text(char **to, const char *from)
{
    if (from)
        *to = strdup(from);
    return !from || *to;
}

/* Without its parent. NULL: out of memory. */
static struct note *note_from_spec(const struct note_spec *spec)
{
    _cleanup_(note_freep) struct note *n = calloc(1, sizeof(*n));
    bool good;

    if (!n)
        return NULL;
    n->created_ms = spec->created_ms;
    n->name = strdup(spec->name);
    n->description = strdup(spec->description ? spec->description : "");
    good = n->name && n->description;
    if (spec->ndisks)
        good = (n->disks = calloc(spec->ndisks, sizeof(*n->disks))) && good;
    for (size_t i = 0; good && i < spec->ndisks; i++) {
        const struct note_disk *from = &spec->disks[i];
        struct note_disk *to = &n->disks[n->ndisks++];

        to->size = from->size;
        good = copy_text(&to->name, from->name) && copy_text(&to->node, from->node) && copy_text(&to->file, from->file);
    }
    return good ? TAKE_PTR(n) : NULL;
}

static int check_hint(const char *what, const char *text, struct failure *f)
{
    if (text && strlen(text) > NOTES_STRING_MAX)
        return failure_set(f, -EINVAL, "the %s of a disk has %zu bytes, at most %u are noted", what, strlen(text),
                           NOTES_STRING_MAX);
    return 0;
}

int note_check(const char *name, int64_t created_ms, const char *description, const struct note_disk *disks,
               size_t ndisks, struct failure *f)
{
    int r = name_check(name, f);

    if (r < 0)
        return r;
    if (created_ms < 0 || created_ms > NOTES_CREATED_MAX)
        return failure_set(f, -EINVAL, "its time of creation is not between the years 1970 and 9999");
    if (description && strlen(description) > NOTES_DESCRIPTION_MAX)
        return failure_set(f, -EINVAL, "its description has %zu bytes, at most %u are kept", strlen(description),
                           NOTES_DESCRIPTION_MAX);
    if (ndisks > NOTES_DISKS_MAX)
        return failure_set(f, -EINVAL, "it has %zu disks, at most %u are noted", ndisks, NOTES_DISKS_MAX);
    for (size_t i = 0; i < ndisks; i++) {
        if (!disks[i].name || !disks[i].name[0])
            return failure_set(f, -EINVAL, "its disk number %zu has no name", i + 1);
        r = check_hint("name", disks[i].name, f);
        r = r < 0 ? r : check_hint("node", disks[i].node, f);
        r = r < 0 ? r : check_hint("file", disks[i].file, f);
        if (r < 0)
            return r;
        for (size_t k = 0; k < i; k++) {
            if (strcmp(disks[k].name, disks[i].name) == 0)
                return failure_set(f, -EINVAL, "it names a disk twice: '%s'", disks[i].name);
        }
    }
    return 0;
}

int notes_check_room(const struct notes *set, size_t nnotes, size_t bytes, struct failure *f)
{
    if (nnotes > NOTES_MAX)
        return failure_set(f, -ENOSPC,
                           "VM '%s' cannot have more than %u checkpoint notes; delete checkpoints that are not needed "
                           "any more",
                           set->vm, NOTES_MAX);
    if (bytes > NOTES_TOTAL_MAX)
        return failure_set(f, -ENOSPC,
                           "the checkpoint notes of VM '%s' cannot have more than %u MiB together; delete checkpoints "
                           "that are not needed any more",
                           set->vm, NOTES_TOTAL_MAX >> 20);
    return 0;
}

/*
 * The lost parent of parent's oldest known ancestor has the name that is about to come: taken for the same, it would
 * close a cycle, so that ancestor is a root from now on. NULL: nothing of that kind.
 */
static struct note *who_waits_above(struct note *parent, const char *name)
{
    while (parent && parent->parent)
        parent = parent->parent;
    return parent && parent->parent_name && strcmp(parent->parent_name, name) == 0 ? parent : NULL;
}

int notes_add(struct notes *set, const struct note_spec *spec, struct notes_change *change, struct failure *f)
{
    _cleanup_(note_freep) struct note *n = NULL;
    struct note *parent = NULL, *above;
    size_t nops = change->nops, above_bytes = 0;
    int r;

    r = note_check(spec->name, spec->created_ms, spec->description, spec->disks, spec->ndisks, f);
    if (r < 0)
        return r;
    if (notes_find(set, spec->name))
        return failure_set(f, -EEXIST, "VM '%s' has a note of a checkpoint '%s' already; delete that checkpoint first",
                           set->vm, spec->name);
    if (!spec->parent)
        parent = (struct note *)notes_current(set);
    else if (spec->parent[0])
        parent = notes_find(set, spec->parent);
    if (spec->parent && spec->parent[0] && !parent)
        return failure_set(f, -ENOENT, "VM '%s' has no note of a checkpoint '%s' that could be the parent", set->vm,
                           spec->parent);
    n = note_from_spec(spec);
    if (!n || !copy_text(&n->parent_name, parent ? parent->name : NULL) || notes_reserve(set, set->nnotes + 1) < 0)
        return no_memory(f);

    above = who_waits_above(parent, spec->name);
    if (above) {
        char *lost = TAKE_PTR(above->parent_name);

        r = push_note(change, above, set->vm, &above_bytes);
        above->parent_name = lost;
    }
    if (r == 0)
        r = push_note(change, n, set->vm, &n->bytes);
    if (r < 0)
        (void)no_memory(f);
    else if (n->bytes > NOTES_FILE_MAX - NOTES_SPARE)
        r = failure_set(f, -E2BIG,
                        "the note of checkpoint '%s' would have %zu bytes, at most %u are kept; name fewer "
                        "disks or a shorter description",
                        spec->name, n->bytes, NOTES_FILE_MAX - NOTES_SPARE);
    else
        r = notes_check_room(set, set->nnotes + 1, set->bytes + n->bytes, f);
    if (r < 0) {
        notes_change_cut(change, nops);
        return r;
    }

    if (above)
        free(TAKE_PTR(above->parent_name));
    if (set->ndangling) { /* some of those whose parent was lost may have found it */
        notes_append(set, TAKE_PTR(n));
        (void)notes_relink(set);
    } else {
        insert_leaf(set, TAKE_PTR(n), parent);
    }
    return 0;
}

/* -- removing ------------------------------------------------------------------------------------------------------ */

struct orphan {
    struct note *note;
    char *heir; /* owned: the name of its new parent, or NULL */
};

static bool names_parent(const struct note *n, const char *name)
{
    return n->parent_name && strcmp(n->parent_name, name) == 0;
}

/* The document that the orphan will have. */
static int push_orphan(struct notes *set, struct orphan *o, const char *heir, struct notes_change *change)
{
    char *parent = o->note->parent_name;
    size_t len;
    int r;

    if (!copy_text(&o->heir, heir))
        return -ENOMEM;
    o->note->parent_name = o->heir;
    r = push_note(change, o->note, set->vm, &len);
    o->note->parent_name = parent;
    return r;
}

static void take_out(struct notes *set, const struct note *n)
{
    size_t i = 0;

    while (set->notes[i] != n)
        i++;
    set->nnotes--;
    memmove(set->notes + i, set->notes + i + 1, (set->nnotes - i) * sizeof(struct note *));
    set->bytes -= n->bytes;
}

int notes_remove(struct notes *set, const char *name, struct notes_change *change, struct failure *f)
{
    struct note *n = notes_find(set, name);
    size_t norphans = 0, k = 0, nops = change->nops;
    struct orphan *orphans;
    int r = 0;

    for (size_t i = 0; i < set->nnotes; i++)
        norphans += names_parent(set->notes[i], name);
    if (!n && !norphans)
        return 0;
    orphans = calloc(norphans + 1, sizeof(*orphans));
    if (!orphans)
        return no_memory(f);

    /* The children come first: stopped in between, they stand beside the deleted one and not below nobody. */
    for (size_t i = 0; i < set->nnotes && r == 0; i++) {
        if (!names_parent(set->notes[i], name))
            continue;
        orphans[k].note = set->notes[i];
        r = push_orphan(set, &orphans[k++], n ? n->parent_name : NULL, change);
    }
    if (r == 0 && n)
        r = notes_change_push(change, name, NULL);
    if (r < 0) {
        notes_change_cut(change, nops);
        (void)no_memory(f);
    } else {
        for (size_t i = 0; i < k; i++) {
            free(orphans[i].note->parent_name);
            orphans[i].note->parent_name = TAKE_PTR(orphans[i].heir);
        }
        if (n)
            take_out(set, n);
        (void)notes_relink(set);
        note_free(n);
    }
    for (size_t i = 0; i < k; i++)
        free(orphans[i].heir);
    free(orphans);
    return r;
}

int notes_drop_disk(struct notes *set, const char *name, const char *disk, struct notes_change *change,
                    struct failure *f)
{
    struct note *n = notes_find(set, name);
    struct note_disk gone;
    size_t i = 0, len;

    while (n && i < n->ndisks && strcmp(n->disks[i].name, disk) != 0)
        i++;
    if (!n || i == n->ndisks)
        return 0;
    gone = n->disks[i];
    n->ndisks--;
    memmove(n->disks + i, n->disks + i + 1, (n->ndisks - i) * sizeof(gone));
    if (push_note(change, n, set->vm, &len) < 0) {
        memmove(n->disks + i + 1, n->disks + i, (n->ndisks - i) * sizeof(gone));
        n->disks[i] = gone;
        n->ndisks++;
        return no_memory(f);
    }
    note_disk_clear(&gone);
    return 0;
}

/* -- what is known against a checkpoint ---------------------------------------------------------------------------- */

static bool same_disk(const char *a, const char *b)
{
    return a && b ? strcmp(a, b) == 0 : a == b;
}

int notes_mark_broken(struct notes *set, const char *name, const char *disk, enum reason reason, const char *text,
                      struct notes_change *change, struct failure *f)
{
    struct note *n = notes_find(set, name);
    struct note_broken was, b = {0};
    size_t len;
    int r;

    if (!n)
        return failure_set(f, -ENOENT, "VM '%s' has no note of a checkpoint '%s'", set->vm, name);
    r = check_hint("name", disk, f);
    if (r < 0)
        return r;
    if (reason == REASON_NONE ? !n->broken.reason || (disk && !same_disk(n->broken.disk, disk))
                              : n->broken.reason && !same_disk(n->broken.disk, disk))
        return 0;
    if (reason != REASON_NONE) {
        struct failure sentence = {0}; /* for its bound */

        (void)failure_set(&sentence, -EIO, "%s", text ? text : reason_text(reason));
        if (!copy_text(&b.disk, disk) || !copy_text(&b.reason, reason_name(reason)) ||
            !copy_text(&b.text, sentence.text)) {
            broken_clear(&b);
            return no_memory(f);
        }
    }
    was = n->broken;
    n->broken = b;
    r = push_note(change, n, set->vm, &len);
    if (r < 0) {
        broken_clear(&n->broken);
        n->broken = was;
        return no_memory(f);
    }
    broken_clear(&was);
    return 0;
}

/* -- retention ----------------------------------------------------------------------------------------------------- */

size_t notes_over(const struct notes *set, size_t keep, const char **out, size_t nout)
{
    size_t nover = keep && set->nnotes > keep ? set->nnotes - keep : 0;

    for (size_t i = 0; i < MIN(nover, nout); i++)
        out[i] = set->notes[i]->name;
    return nover;
}
