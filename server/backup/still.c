/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The table of a session over images of a powered-off VM. A qemu-storage-daemon of ours holds them, for reading, under
 * QEMU's image lock: from before the walk begins until after it has ended nobody else writes to them. So the exported
 * node is the image itself, the records stand still, and a new checkpoint is an empty record that is there before the
 * lock is given up (docs/decisions/0008-offline-images.md).
 *
 * Everything but the checkpoint works on nodes that are open for reading: a kill -9 of QEMU hurts no record then.
 */
#include "backup/steps.h"

#include "qmp/commands.h"

#include <errno.h>

/* -- the records --------------------------------------------------------------------------------------------------- */

/* The union of a checkpoint's record in all layers, as a transient bitmap: what stands in the file is not exported. */
static int records_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    uv_timeval64_t now = {0};

    (void)uv_gettimeofday(&now);
    s->frozen_at_ms = now.tv_sec * 1000 + now.tv_usec / 1000;
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct json_object *args = qmp_args_transaction();
        char since[NAMES_SIZE];

        for (unsigned k = 0; k < s->nsince; k++) {
            const struct checkpoint *c = session_usable_since(s, i, s->since[k]);
            struct qmp_bitmap target = {s->disks[i].disk->node, names_make(since, s->rig.id, NAMES_SINCE, k)};

            if (!c)
                continue;
            qmp_action_bitmap_add(args, target, c->granularity, false, true);
            for (size_t l = 0; l < c->nlayers; l++) {
                struct qmp_bitmap source = {c->layers[l].node, c->name};

                if (c->layers[l].merge)
                    qmp_action_bitmap_merge(args, target, &source, 1);
            }
        }
        if (qmp_array_length(qmp_get(args, "actions")))
            calls_add(&s->rig.calls, "transaction", args, QMP_NO_FD, i, NULL);
        else
            json_object_put(args);
    }
    return rig_wait(&s->rig, f);
}

/* -- the checkpoint ------------------------------------------------------------------------------------------------ */

static bool wants_keep(const struct reopen *r, size_t disk)
{
    return container_of(r, struct session, reopen)->disks[disk].keep;
}

static bool wants_store(const struct reopen *r, size_t disk)
{
    return container_of(r, struct session, reopen)->disks[disk].keepable;
}

/* Read-only again: the new record is in the file, or QEMU has said why not. */
static void on_stored(struct reopen *r, const struct failure *f)
{
    struct session *s = container_of(r, struct session, reopen);

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (s->disks[i].keep && !r->done[i])
            session_drop_keep(s, &s->disks[i], f ? f->text : "QEMU did not store it");
    }
    seq_done(&s->rig.seq, NULL); /* what failed is in problems, by disk */
}

static int on_made(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    session_of_calls(c)->disks[index].keepable = true;
    return 0;
}

static void store(struct session *s, const struct failure *made)
{
    struct failure f = {0};
    int r;

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct session_disk *d = &s->disks[i];

        if (d->keep && !d->keepable)
            session_drop_keep(s, d, made ? made->text : "QEMU did not make it");
        d->keepable |= s->reopen.done[i]; /* what is writable becomes read-only again, with a new record or without */
    }
    s->reopen.wants = wants_store;
    s->reopen.cb = on_stored;
    r = reopen_start(&s->reopen, false, &f);
    if (r != 0)
        on_stored(&s->reopen, r < 0 ? &f : NULL);
}

static void on_all_made(struct calls *c, const struct failure *f)
{
    store(session_of_calls(c), f);
}

static void on_writable(struct reopen *r, const struct failure *f)
{
    struct session *s = container_of(r, struct session, reopen);
    struct failure next = {0};
    int result;

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct session_disk *d = &s->disks[i];

        if (d->keep && !r->done[i])
            session_drop_keep(s, d, f ? f->text : "its image could not be made writable");
        else if (d->keep)
            calls_add(&s->rig.calls, "block-dirty-bitmap-add",
                      qmp_args_bitmap_add((struct qmp_bitmap){d->disk->top, s->checkpoint}, 0, true, false), QMP_NO_FD,
                      i, on_made);
    }
    result = calls_wait(&s->rig.calls, on_all_made, &next);
    if (result != 0)
        store(s, result < 0 ? &next : NULL);
}

static int keep(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    int r;

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        s->disks[i].keepable = false;
    reopen_done(&s->reopen);
    r = reopen_init(&s->reopen, s->rig.qmp, s->list, s->rig.timeout_ms);
    if (r < 0)
        return r;
    s->reopen.wants = wants_keep;
    s->reopen.cb = on_writable;
    return reopen_start(&s->reopen, true, f);
}

const struct seq_step session_still_steps[] = {
    {"copy records", records_up, rig_no_bitmaps, NULL},
    {"add exports", step_exports_up, rig_no_exports, NULL},
    {"open sources", step_sources_up, step_close_sources, step_probe_and_close},
    {"keep checkpoint", NULL, NULL, keep},
};
const unsigned session_nstill_steps = ARRAY_SIZE(session_still_steps);
