/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lineage: what was done to records on purpose, by us or with our knowledge, and is not held against them. */
#include "backup/lineage_impl.h"

#include <errno.h>

/* A copy of a record marks as much; a finer one counts the piece at the disk's end in smaller steps. */
static uint64_t least_of(const struct past_root *r)
{
    return r->dirty > r->granularity ? r->dirty - r->granularity : 0;
}

int lineage_promise(struct lineage *l, const struct disk *d, const char *checkpoint, const struct image *layer,
                    enum job_kind kind)
{
    struct past *p = past_disk_find(lineage_find_disk(l, d->name), checkpoint);
    struct past_root *root = NULL;

    if (lineage_is_promised(l, d->name, checkpoint, layer))
        return 0;
    if (p->nroots == ROOTS_MAX) /* the oldest promise goes; the first root is the record itself */
        past_image_done(&p->roots[--p->nroots].at);
    root = &p->roots[p->nroots];
    if (past_image_remember(&root->at, layer) < 0)
        return -ENOMEM;
    root->granularity = 0;
    root->dirty = root->written = least_of(&p->roots[0]);
    root->fill = kind == JOB_STREAM;
    root->commit = root->here = kind == JOB_COMMIT;
    p->nroots++;
    l->dirty = true;
    return 0;
}

void lineage_lost(struct lineage *l)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        for (size_t k = 0; k < l->disks[i].npasts; k++) {
            struct past *p = &l->disks[i].pasts[k];

            for (size_t n = 0; n < p->nroots; n++)
                p->roots[n].here = false;
        }
    }
}

void lineage_forget(struct lineage *l, const char *disk, const char *checkpoint)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        struct past *p = past_disk_find(&l->disks[i], checkpoint);

        if (p && (!disk || strcmp(disk, l->disks[i].name) == 0))
            past_disk_drop(l, &l->disks[i], p);
    }
}

int lineage_bury(struct lineage *l, const struct disk *d, const char *checkpoint)
{
    const struct checkpoint *c = disk_checkpoint(d, checkpoint);
    struct past_disk *was = lineage_find_disk(l, d->name);
    struct past *p = past_disk_find(was, checkpoint);

    if (!c || (!was && !(was = lineage_add_disk(l, d->name))) || (!p && !(p = past_disk_add(was, checkpoint))))
        return c ? -ENOMEM : 0;
    past_drop_roots(p);
    p->fill = false;
    for (size_t i = 0; i < c->nlayers && p->nroots < ROOTS_MAX; i++) {
        const struct image *image = &d->images[c->layers[i].depth];

        if (!image->read_only)
            continue;
        if (past_image_remember(&p->roots[p->nroots].at, image) < 0)
            return -ENOMEM;
        p->nroots++;
    }
    p->buried = true;
    p->size = d->size;
    p->absence = ABSENCE_NONE;
    l->dirty = true;
    return 0;
}

int lineage_restored(struct lineage *l, const char *disk)
{
    struct past_disk *was = lineage_find_disk(l, disk);

    if (!was && l->ndisks >= LINEAGE_DISKS_MAX)
        return -E2BIG;
    if (!was && !(was = lineage_add_disk(l, disk)))
        return -ENOMEM;
    was->restored = true;
    l->dirty = true;
    return 0;
}

/* Whoever vouches for a record, be it our own commit, does not make it whole: its layer's allocation counts on. */
static void forget_roots(struct past *p)
{
    for (size_t k = 0; k < p->nroots; k++)
        p->fill |= p->roots[k].fill;
    past_drop_roots(p);
}

void lineage_accept(struct lineage *l, const char *disk, const char *checkpoint)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        struct past *p = past_disk_find(&l->disks[i], checkpoint);

        if (!p || p->buried || (disk && strcmp(disk, l->disks[i].name) != 0))
            continue;
        forget_roots(p);
        p->least = 0;
        l->dirty = true;
    }
}

void lineage_moved(struct lineage *l, const char *disk, const char *checkpoint)
{
    struct past *p = past_disk_find(lineage_find_disk(l, disk), checkpoint);

    if (!p || p->buried || !p->nroots || (p->cause && p->cause != CAUSE_LAYER_GONE && p->cause != CAUSE_RECORD_GONE))
        return;
    p->least = least_of(&p->roots[0]);
    forget_roots(p);
    l->dirty = true;
}

/*
 * The older memory of a checkpoint compares with more, so it counts, with the files that it knew below. But what was
 * found out against it since then, or that it was deleted, only the newer one knows.
 */
static int inherit_disk(struct past_disk *d, struct past_disk *old)
{
    struct past *pasts = reallocarray(old->pasts, old->npasts + d->npasts + 1, sizeof(*pasts));
    struct past_disk newer = *d;

    if (!pasts)
        return -ENOMEM;
    old->pasts = pasts;
    for (size_t i = 0; i < newer.npasts; i++) {
        struct past was, *now = &newer.pasts[i], *older = past_disk_find(old, now->name);

        if (!older) {
            pasts[old->npasts++] = *now;
            continue;
        }
        was = *older;
        if (now->cause || now->buried)
            *older = *now;
        else
            was = *now;
        past_done(&was);
    }
    newer.npasts = 0;
    old->restored |= newer.restored;
    *d = *old;
    *old = newer;
    return 0;
}

int lineage_inherit(struct lineage *l, struct lineage *old)
{
    for (size_t i = 0; i < old->ndisks; i++) {
        struct past_disk *was = &old->disks[i], *d = lineage_find_disk(l, was->name);
        int r;

        if (d ? d->npasts + was->npasts > LINEAGE_CHECKPOINTS_MAX : l->ndisks >= LINEAGE_DISKS_MAX)
            return -E2BIG;
        l->dirty = true;
        if (!d && !(d = lineage_add_disk(l, was->name)))
            return -ENOMEM;
        r = inherit_disk(d, was);
        if (r < 0)
            return r;
    }
    return 0;
}
