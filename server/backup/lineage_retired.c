/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Images that a disk has left behind. After a commit of the live image, or a revert, the VM runs on an image below the
 * one that it was started with. That one still lies there, and still names its old backing file, which goes on without
 * it: together they are no state that the disk ever had.
 */
#include "backup/lineage_impl.h"

#include <errno.h>
#include <string.h>

static const struct image *find_image(const struct disk *d, const struct past_image *p)
{
    for (size_t i = 0; i < d->nimages; i++) {
        if (past_image_is(p, &d->images[i]))
            return &d->images[i];
    }
    return NULL;
}

static void forget(struct lineage *l, struct past_disk *was, size_t i)
{
    past_image_done(&was->retired[i]);
    was->nretired--;
    memmove(&was->retired[i], &was->retired[i + 1], (was->nretired - i) * sizeof(was->retired[0]));
    l->dirty = true;
}

/* The memory of the chain gives it up. */
static void retire(struct lineage *l, struct past_disk *was, struct past_image *image)
{
    if (was->nretired == RETIRED_MAX)
        forget(l, was, 0);
    was->retired[was->nretired++] = *image;
    *image = (struct past_image){.file = NULL};
    l->dirty = true;
}

static void compare_chains(struct lineage *l, struct past_disk *was, const struct disk *d)
{
    size_t gone = 0;

    for (size_t i = was->nretired; i-- > 0;) {
        if (find_image(d, &was->retired[i]))
            forget(l, was, i); /* the VM runs on it: so it is right */
    }
    while (gone < was->nimages && !find_image(d, &was->images[gone]))
        gone++;
    if (gone == 0 || gone == was->nimages || !past_image_is(&was->images[gone], &d->images[0]))
        return; /* as it was, another disk altogether, or one with new layers */
    for (size_t i = 0; i < gone; i++)
        retire(l, was, &was->images[i]);
    memmove(was->images, was->images + gone, (was->nimages - gone) * sizeof(*was->images));
    was->nimages -= gone;
}

int lineage_look_running(struct lineage *l, const struct disk_list *disks, bool all)
{
    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];
        struct past_disk *was = lineage_find_disk(l, d->name);

        if (!was && all && l->ndisks < LINEAGE_DISKS_MAX &&
            (!(was = lineage_add_disk(l, d->name)) || lineage_remember_images(l, was, d) < 0))
            return -ENOMEM;
        if (was && d->nimages)
            compare_chains(l, was, d);
    }
    return 0;
}

int lineage_look_stopped(const struct lineage *l, const struct disk_list *disks, struct failure *f)
{
    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];
        const struct past_disk *was = lineage_find_disk(l, d->name);

        for (size_t k = 0; was && k < was->nretired; k++) {
            const struct image *image = find_image(d, &was->retired[k]);

            if (image)
                return failure_set(f, -ESTALE,
                                   "image '%s' is not disk '%s' any more: while the VM ran it was committed into '%s', "
                                   "or left for that; give that one for the disk, or start the VM with this one",
                                   image->file, d->name, was->nimages ? was->images[0].file : "another");
        }
    }
    return 0;
}
