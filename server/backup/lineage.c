/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is compared, and why that is enough: docs/decisions/0009-lineage.md. In short: a record is right as long as the
 * one file that held it when it was first seen (its root) still is a layer of the disk and still holds it. Whatever
 * came above the root counts by its allocation, whatever is below it must be what was there.
 */
#include "backup/lineage_impl.h"

#include <assert.h>
#include <errno.h>

static const struct {
    const char *name;
    enum reason reason;
    const char *text;
} causes[] = {
    [CAUSE_NONE] = {"none", REASON_NONE, NULL},
    [CAUSE_RESIZED] = {"resized", REASON_RESIZED, NULL},
    [CAUSE_LAYER_GONE] = {"layer-gone", REASON_GAP,
                          "the image file that held its record is no layer of the disk any more (streamed, committed, "
                          "mirrored or replaced), and nobody kept the record"},
    [CAUSE_RECORD_GONE] = {"record-gone", REASON_GAP,
                           "its record was removed from a lower layer of the image, what is left begins later"},
    [CAUSE_REPLACED] = {"replaced", REASON_GAP, "an image file below the layer that holds its record was replaced"},
    [CAUSE_SHRANK] = {"shrank", REASON_GAP,
                      "its record holds less than before: somebody cleared it, or rolled the image back"},
    [CAUSE_REMADE] = {"remade", REASON_GAP,
                      "its record was lost or removed, and somebody made a new one of the same name"},
    [CAUSE_RETURNED] = {"returned", REASON_GAP,
                        "its image file was taken away and has come back; what happened meanwhile is not known"},
    [CAUSE_RESTORED] =
        {"restored", REASON_GAP,
         "the disk was restored from a backup after it, so its record says nothing about what is there now"},
    [CAUSE_STOPPED] = {"stopped", REASON_GAP,
                       "its record did not record for a while: somebody disabled it, and enabled it again"},
};
static_assert(ARRAY_SIZE(causes) == CAUSE_NCAUSES, "every cause has a reason");

#define BURIED_TEXT "it was deleted; what is left of its record is in a read-only lower layer and goes with that layer"
#define REMOVED_TEXT \
    "its record is not in the image any more: somebody removed it, or QEMU stopped uncleanly before it was stored"
#define AWAY_TEXT "the image file that held its record is no layer of the disk any more"

const char *cause_name(enum cause c)
{
    return causes[c].name;
}

/* -- the memory ---------------------------------------------------------------------------------------------------- */

struct lineage *lineage_new(void)
{
    return calloc(1, sizeof(struct lineage));
}

void past_image_done(struct past_image *i)
{
    free(TAKE_PTR(i->file));
}

void past_done(struct past *p)
{
    for (size_t i = 0; i < p->nroots; i++)
        past_image_done(&p->roots[i].at);
    free(p->name);
}

static void forget_images(struct past_disk *d)
{
    for (size_t i = 0; i < d->nimages; i++)
        past_image_done(&d->images[i]);
    free(TAKE_PTR(d->images));
    d->nimages = 0;
}

void lineage_free(struct lineage *l)
{
    for (size_t i = 0; l && i < l->ndisks; i++) {
        forget_images(&l->disks[i]);
        for (size_t k = 0; k < l->disks[i].nretired; k++)
            past_image_done(&l->disks[i].retired[k]);
        for (size_t k = 0; k < l->disks[i].npasts; k++)
            past_done(&l->disks[i].pasts[k]);
        free(l->disks[i].pasts);
        free(l->disks[i].name);
    }
    if (l)
        free(l->disks);
    free(l);
}

struct past_disk *lineage_add_disk(struct lineage *l, const char *name)
{
    struct past_disk *disks = reallocarray(l->disks, l->ndisks + 1, sizeof(*disks));

    if (!disks)
        return NULL;
    l->disks = disks;
    disks[l->ndisks] = (struct past_disk){.name = strdup(name)};
    return disks[l->ndisks].name ? &disks[l->ndisks++] : NULL;
}

struct past *past_disk_add(struct past_disk *d, const char *name)
{
    struct past *pasts = reallocarray(d->pasts, d->npasts + 1, sizeof(*pasts));

    if (!pasts)
        return NULL;
    d->pasts = pasts;
    pasts[d->npasts] = (struct past){.name = strdup(name)};
    return pasts[d->npasts].name ? &pasts[d->npasts++] : NULL;
}

struct past_disk *lineage_find_disk(const struct lineage *l, const char *name)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        if (strcmp(l->disks[i].name, name) == 0)
            return &l->disks[i];
    }
    return NULL;
}

struct past *past_disk_find(const struct past_disk *d, const char *name)
{
    for (size_t i = 0; d && i < d->npasts; i++) {
        if (strcmp(d->pasts[i].name, name) == 0)
            return &d->pasts[i];
    }
    return NULL;
}

void past_disk_drop(struct lineage *l, struct past_disk *d, struct past *p)
{
    size_t i = (size_t)(p - d->pasts);

    past_done(p);
    d->npasts--;
    memmove(p, p + 1, (d->npasts - i) * sizeof(*p)); /* they stay in the order in which they were first seen */
    l->dirty = true;
}

/* -- files --------------------------------------------------------------------------------------------------------- */

int past_image_remember(struct past_image *p, const struct image *i)
{
    *p = (struct past_image){.file = strdup(i->file), .dev = i->dev, .ino = i->ino, .born_ns = i->born_ns};
    return p->file ? 0 : -ENOMEM;
}

/*
 * The same file? A moved one keeps its inode, and a device number may change with a reboot, but a copy put in its place
 * has another inode, or was born later. Where one of the two could not be seen its name must do.
 */
bool past_image_is(const struct past_image *p, const struct image *i)
{
    bool same_name = strcmp(p->file, i->file) == 0;

    if (!p->ino || !i->ino)
        return same_name && i->file[0];
    if (p->ino != i->ino || (p->born_ns && i->born_ns && p->born_ns != i->born_ns))
        return false;
    return same_name || p->dev == i->dev;
}

/* Its place in the chain, or nimages. */
static size_t depth_of(const struct disk *d, const struct past_image *p)
{
    size_t k = 0;

    while (k < d->nimages && !past_image_is(p, &d->images[k]))
        k++;
    return k;
}

static bool same_images(const struct past_disk *p, const struct disk *d)
{
    for (size_t i = 0; i < p->nimages && p->nimages == d->nimages; i++) {
        const struct past_image *was = &p->images[i];
        const struct image *is = &d->images[i];

        if (strcmp(was->file, is->file) != 0 ||
            (is->ino && (was->ino != is->ino || was->dev != is->dev || was->born_ns != is->born_ns)))
            return false; /* what could not be seen this time is as it was */
    }
    return p->nimages == d->nimages;
}

int lineage_remember_images(struct lineage *l, struct past_disk *p, const struct disk *d)
{
    if (same_images(p, d))
        return 0;
    l->dirty = true;
    forget_images(p);
    p->images = calloc(d->nimages + 1, sizeof(*p->images));
    for (; p->images && p->nimages < d->nimages; p->nimages++) {
        if (past_image_remember(&p->images[p->nimages], &d->images[p->nimages]) < 0)
            return -ENOMEM;
    }
    return p->images ? 0 : -ENOMEM;
}

static const struct layer *layer_at(const struct checkpoint *c, size_t depth)
{
    for (size_t i = 0; i < c->nlayers; i++) {
        if (c->layers[i].depth == depth)
            return &c->layers[i];
    }
    return NULL;
}

/* -- one checkpoint ------------------------------------------------------------------------------------------------ */

void past_drop_roots(struct past *p)
{
    while (p->nroots)
        past_image_done(&p->roots[--p->nroots].at);
}

static void condemn(struct lineage *l, struct past *p, enum cause cause)
{
    if (p->cause == CAUSE_NONE) {
        p->cause = cause;
        l->dirty = true;
    }
}

static bool is_root_file(const struct past *p, const struct image *i)
{
    for (size_t k = 0; k < p->nroots; k++) {
        if (past_image_is(&p->roots[k].at, i))
            return true;
    }
    return false;
}

/*
 * QEMU says by itself what is wrong with such a record, but not for good: one that did not record may do so again, and
 * has a hole then; one that is inconsistent never is right again, so a right one of its name is another one.
 */
static void check_state(struct lineage *l, struct past *p, const struct layer *now)
{
    if (now->inconsistent)
        condemn(l, p, CAUSE_REMADE);
    else if (now->stopped)
        condemn(l, p, CAUSE_STOPPED);
}

#define LEARNED 1 /* and so there is nothing to compare */

/* The record as it is becomes what counts from now on. Of a buried one only the layers that came after. */
static int learn(struct lineage *l, struct past *p, const struct disk *d, const struct checkpoint *c)
{
    const struct layer *root = NULL;

    for (size_t i = 0; i < c->nlayers; i++) {
        if (!p->buried || !is_root_file(p, &d->images[c->layers[i].depth]))
            root = &c->layers[i];
    }
    past_drop_roots(p);
    p->size = d->size;
    p->cause = CAUSE_NONE;
    p->absence = ABSENCE_NONE;
    p->buried = false;
    l->dirty = true;
    if (!root || past_image_remember(&p->roots[0].at, &d->images[root->depth]) < 0)
        return -ENOMEM;
    p->roots[0].granularity = root->granularity;
    p->roots[0].dirty = p->roots[0].written = root->dirty;
    p->roots[0].fill = p->fill;
    p->roots[0].commit = false;
    p->fill = false;
    p->nroots = 1;
    check_state(l, p, root);
    if (!root->inconsistent && root->dirty < p->least)
        condemn(l, p, CAUSE_SHRANK);
    p->least = 0;
    return LEARNED;
}

static bool is_same(const struct past_image *a, const struct past_image *b)
{
    return a->ino == b->ino && (a->ino || strcmp(a->file, b->file) == 0);
}

/* Of the layers above all roots, as they were at the last look, one is above that depth. */
static bool has_kept_top(const struct past_disk *was, const struct past *p, const struct disk *d, size_t depth)
{
    for (size_t i = 0; i < was->nimages; i++) {
        for (size_t k = 0; k < p->nroots; k++) {
            if (is_same(&was->images[i], &p->roots[k].at))
                return false;
        }
        if (depth_of(d, &was->images[i]) < depth)
            return true;
    }
    return false;
}

/*
 * Into its layer a commit below the top puts what the checkpoint's own record does not mark: all that was there before
 * it. Without the layer that goes, in the same QEMU, the commit has ended; after that QEMU perhaps only the layers
 * above were thrown away. A revert to a layer with half of it has none of them.
 */
static bool is_whole(const struct past_disk *was, const struct past *p, const struct past_root *root,
                     const struct disk *d, size_t depth, enum cause former)
{
    return !root->commit || (former == CAUSE_LAYER_GONE && (root->here || has_kept_top(was, p, d, depth)));
}

/* The deepest of the known roots that holds its record; NULL: none, and then *ret_cause says what became of it. */
static struct past_root *find_root(const struct past_disk *was, struct past *p, const struct disk *d,
                                   const struct checkpoint *c, size_t *ret_depth, enum cause *ret_cause)
{
    *ret_cause = CAUSE_LAYER_GONE;
    for (size_t i = 0; i < p->nroots; i++) {
        size_t depth = depth_of(d, &p->roots[i].at);

        if (depth == d->nimages || !is_whole(was, p, &p->roots[i], d, depth, *ret_cause))
            continue;
        *ret_depth = depth;
        if (layer_at(c, depth))
            return &p->roots[i];
        *ret_cause = CAUSE_RECORD_GONE;
    }
    return NULL;
}

/* What shines through from below the root is what was below it: layers may have gone into others, but none came. */
static bool below_is_known(const struct past_disk *was, const struct past_root *root, const struct disk *d,
                           size_t depth)
{
    size_t from = 0;

    for (size_t k = 0; k < was->nimages; k++) {
        /* Of a root that a job made everything may be below that was in the chain. */
        if (is_same(&was->images[k], &root->at))
            from = k + 1;
    }
    for (size_t i = depth + 1; i < d->nimages; i++) {
        size_t k = from;

        while (k < was->nimages && !past_image_is(&was->images[k], &d->images[i]))
            k++;
        if (k == was->nimages)
            return false;
        from = k + 1;
    }
    return true;
}

/* The growth that is worth a write: a count in the file that is too low by this part finds out less, not wrongly. */
#define GROWTH_PART 4

static void follow(struct lineage *l, struct past_root *root, const struct layer *now)
{
    root->dirty = now->dirty;
    if (root->written != now->dirty && (now->dirty - root->written) >= root->written / GROWTH_PART)
        l->dirty = true;
}

static void check_record(struct lineage *l, struct past *p, struct past_root *root, const struct layer *now)
{
    check_state(l, p, now);
    if (now->inconsistent) /* has no count */
        return;
    if (root->granularity == 0) /* of a promise: seen for the first time */
        root->granularity = now->granularity;
    if (now->granularity != root->granularity)
        condemn(l, p, CAUSE_REMADE);
    else if (now->dirty < root->dirty)
        condemn(l, p, CAUSE_SHRANK);
    else
        follow(l, root, now);
}

/* Without jobs nothing is to come any more: a promise that was not needed ends. */
static void drop_promises(struct lineage *l, struct past *p, const struct past_root *root)
{
    struct past_root kept = *root;

    for (size_t i = 0; i < p->nroots; i++) {
        if (&p->roots[i] != root)
            past_image_done(&p->roots[i].at);
    }
    if (p->nroots > 1)
        l->dirty = true;
    p->roots[0] = kept;
    p->nroots = 1;
}

static void apply(const struct past *p, struct checkpoint *c)
{
    if (p->buried) {
        c->reason = REASON_NO_SUCH_CHECKPOINT;
        c->text = BURIED_TEXT;
    } else if (p->cause && c->reason == REASON_NONE) {
        c->reason = causes[p->cause].reason;
        c->text = causes[p->cause].text;
    }
}

static void count_allocation(struct lineage *l, struct past *p, const struct disk *d, size_t depth,
                             struct checkpoint *c)
{
    if (!checkpoint_count_allocation(c, &d->images[depth]))
        condemn(l, p, CAUSE_LAYER_GONE);
}

/* Of a file that could not be seen before, its name was all that was known. */
static void identify(struct lineage *l, struct past_image *p, const struct image *i)
{
    if (p->ino || !i->ino)
        return;
    p->dev = i->dev;
    p->ino = i->ino;
    p->born_ns = i->born_ns;
    l->dirty = true;
}

static void compare(struct lineage *l, const struct past_disk *was, struct past *p, const struct disk *d,
                    struct checkpoint *c, bool jobs)
{
    enum cause cause;
    size_t depth = 0;
    struct past_root *root = find_root(was, p, d, c, &depth, &cause);
    bool fill = root && root->fill;

    if (d->size != p->size)
        condemn(l, p, CAUSE_RESIZED);
    if (!root) {
        condemn(l, p, cause);
        return;
    }
    if (!below_is_known(was, root, d, depth))
        condemn(l, p, CAUSE_REPLACED);
    identify(l, &root->at, &d->images[depth]);
    check_record(l, p, root, layer_at(c, depth));
    l->dirty |= root->commit;
    root->commit = false; /* it has ended */
    if (!jobs)
        drop_promises(l, p, root);
    if (fill)
        count_allocation(l, p, d, depth, c);
}

/*
 * A name that was not to be seen comes again, and not by us (lineage_forget()): the same record in a file that came
 * back, or a new one that somebody made under the old name, which knows nothing of what came before.
 */
static void welcome(struct lineage *l, const struct past_disk *was, struct past *p, const struct disk *d,
                    const struct checkpoint *c)
{
    enum cause cause;
    size_t depth = 0;
    bool back = p->absence == ABSENCE_AWAY && find_root(was, p, d, c, &depth, &cause);

    p->absence = ABSENCE_NONE;
    l->dirty = true;
    condemn(l, p, back ? CAUSE_RETURNED : CAUSE_REMADE);
}

static bool only_buried(const struct past *p, const struct disk *d, const struct checkpoint *c)
{
    for (size_t i = 0; i < c->nlayers; i++) {
        if (!is_root_file(p, &d->images[c->layers[i].depth]))
            return false;
    }
    return true;
}

static int copy_past(struct past *to, const struct past *from)
{
    char *name = to->name;

    *to = *from;
    to->name = name;
    for (to->nroots = 0; to->nroots < from->nroots; to->nroots++) {
        to->roots[to->nroots].at.file = strdup(from->roots[to->nroots].at.file);
        if (!to->roots[to->nroots].at.file)
            return -ENOMEM;
    }
    return 0;
}

/*
 * Never seen on this disk, but its record is in a file that is known as another disk's: the same disk, whose device has
 * another id now. What is known of the record counts, the worst of it, or the latest; and under the old id, should it
 * come back, it has been away. *ret_was: that disk; untouched where there is none. -ENOMEM.
 */
static int recognise(struct lineage *l, const struct disk_list *all, struct past *p, const struct disk *d,
                     const struct checkpoint *c, const struct past_disk **ret_was)
{
    struct past *found = NULL;
    int r;

    for (size_t i = 0; i < l->ndisks; i++) {
        struct past *other = past_disk_find(&l->disks[i], c->name);
        enum cause cause;
        size_t depth;

        if (!other || other == p || other->buried || (found && found->cause && !other->cause) ||
            !find_root(&l->disks[i], other, d, c, &depth, &cause))
            continue;
        found = other;
        *ret_was = &l->disks[i];
    }
    if (!found)
        return 0;
    r = copy_past(p, found);
    if (!disk_list_find(all, (*ret_was)->name))
        found->absence = ABSENCE_AWAY;
    return r;
}

static int look_at(struct lineage *l, const struct disk_list *all, struct past_disk *disk, const struct disk *d,
                   struct checkpoint *c, bool jobs)
{
    struct past *p = past_disk_find(disk, c->name);
    const struct past_disk *was = disk;
    int r = 0;

    if (!p) {
        if (disk->npasts >= LINEAGE_CHECKPOINTS_MAX)
            return 0; /* too many to remember: the bitmaps alone decide */
        if (!(p = past_disk_add(disk, c->name)) || recognise(l, all, p, d, c, &was) < 0)
            return -ENOMEM;
        l->dirty = true;
    }
    p->seen = true;
    if (p->buried && only_buried(p, d, c)) {
        apply(p, c);
        return 0;
    }
    if (!p->nroots || p->buried)
        r = learn(l, p, d, c);
    else if (p->absence)
        welcome(l, was, p, d, c);
    if (r == 0)
        compare(l, was, p, d, c, jobs);
    else if (r == LEARNED && p->roots[0].fill)
        count_allocation(l, p, d, depth_of(d, &p->roots[0].at), c);
    apply(p, c);
    return MIN(r, 0);
}

static void miss(struct lineage *l, struct past_disk *was, struct past *p, const struct disk *d)
{
    enum absence absence = ABSENCE_AWAY;

    for (size_t i = 0; i < p->nroots; i++) {
        if (depth_of(d, &p->roots[i].at) < d->nimages)
            absence = ABSENCE_REMOVED;
    }
    if (p->buried || !p->nroots) { /* now it is gone for good */
        past_disk_drop(l, was, p);
    } else if (p->absence != absence) {
        p->absence = absence;
        l->dirty = true;
    }
}

/* Of names that come and go for years the oldest are forgotten. */
static void prune(struct lineage *l, struct past_disk *was)
{
    size_t n = 0;

    for (size_t i = was->npasts; i-- > 0;) {
        if (was->pasts[i].absence && ++n > LINEAGE_ABSENT_MAX)
            past_disk_drop(l, was, &was->pasts[i]);
    }
}

static int look_at_disk(struct lineage *l, const struct disk_list *all, struct disk *d, bool jobs)
{
    struct past_disk *was = lineage_find_disk(l, d->name);

    if (!was) {
        if (l->ndisks >= LINEAGE_DISKS_MAX || d->ncheckpoints == 0)
            return 0;
        if (!(was = lineage_add_disk(l, d->name)) || lineage_remember_images(l, was, d) < 0)
            return -ENOMEM;
    }
    for (size_t i = 0; i < was->npasts; i++)
        was->pasts[i].seen = false;
    for (size_t i = 0; i < d->ncheckpoints; i++) {
        if (look_at(l, all, was, d, &d->checkpoints[i], jobs) < 0)
            return -ENOMEM;
    }
    for (size_t i = was->npasts; i-- > 0;) {
        if (!was->pasts[i].seen)
            miss(l, was, &was->pasts[i], d);
    }
    for (size_t i = 0; was->restored && i < d->ncheckpoints; i++) {
        struct past *p = past_disk_find(was, d->checkpoints[i].name);

        if (p && !p->buried)
            condemn(l, p, CAUSE_RESTORED);
        if (p)
            apply(p, &d->checkpoints[i]);
    }
    l->dirty |= was->restored;
    was->restored = false;
    prune(l, was);
    return lineage_remember_images(l, was, d);
}

int lineage_look(struct lineage *l, struct disk_list *disks, bool jobs)
{
    for (size_t i = 0; i < disks->ndisks; i++) {
        if (look_at_disk(l, disks, &disks->disks[i], jobs) < 0)
            return -ENOMEM;
    }
    return 0;
}

bool lineage_is_promised(const struct lineage *l, const char *disk, const char *checkpoint, const struct image *layer)
{
    const struct past *p = past_disk_find(lineage_find_disk(l, disk), checkpoint);

    /* Nothing can be promised of one that is not known or not right. */
    return !p || !p->nroots || p->cause || p->buried || is_root_file(p, layer);
}

const char *lineage_root(const struct lineage *l, const struct disk *d, const char *checkpoint)
{
    const struct past_disk *was = lineage_find_disk(l, d->name);
    struct past *p = past_disk_find(was, checkpoint);
    const struct checkpoint *c = disk_checkpoint(d, checkpoint);
    enum cause cause;
    size_t depth = 0;

    return p && c && !p->absence && find_root(was, p, d, c, &depth, &cause) ? d->images[depth].node : NULL;
}

bool lineage_is_dirty(const struct lineage *l)
{
    return l->dirty;
}

void lineage_saved(struct lineage *l)
{
    l->dirty = false;
    for (size_t i = 0; i < l->ndisks; i++) {
        for (size_t k = 0; k < l->disks[i].npasts; k++) {
            struct past *p = &l->disks[i].pasts[k];

            for (size_t n = 0; n < p->nroots; n++)
                p->roots[n].written = p->roots[n].dirty;
        }
    }
}

void lineage_unsaved(struct lineage *l)
{
    l->dirty = true;
}

const char *lineage_why_lost(const struct lineage *l, const char *disk, const char *checkpoint)
{
    const struct past *p = past_disk_find(lineage_find_disk(l, disk), checkpoint);

    if (!p || p->buried || p->absence == ABSENCE_NONE)
        return NULL;
    return p->absence == ABSENCE_AWAY ? AWAY_TEXT : REMOVED_TEXT;
}
