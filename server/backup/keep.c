/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The good end of a session: a last look whether the frozen view still stands, and the provisional checkpoint becomes a
 * real one.
 *
 * Until then the checkpoint is no more than the bitmap "written" on our own cbw node, so whatever dies on the way
 * leaves nothing that could be taken for a checkpoint. Making it, per disk
 * (docs/decisions/0003-provisional-checkpoints.md):
 *   1. add a transient recording bitmap on the disk: from now on it sees every write that ends there;
 *   2. in a transaction, which begins by draining, merge "written" into it: writes that ended on the disk before 1 have
 * ended on the cbw node by then;
 *   3. in one transaction add the checkpoint's own bitmap, merge, and remove the transient one: both stand on one node,
 * where QEMU marks all bitmaps under one lock, so nothing falls between.
 */
#include "backup/steps.h"
#include "qmp/commands.h"

#include <errno.h>

/* -- the last look ------------------------------------------------------------------------------------------------- */

static void on_source_closed(void *arg)
{
    struct session *s = arg;

    session_one_done(s, NULL);
}

int step_close_sources(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct source *source = TAKE_PTR(s->disks[i].source);

        session_close_vhost(&s->disks[i]);
        s->disks[i].bare = s->disks[i].ahead = s->disks[i].giving = NULL; /* parts of it */
        if (!source)
            continue;
        s->npending++;
        source_close(source, on_source_closed, s);
    }
    return s->npending ? 0 : SEQ_DONE;
}

void session_drop_keep(struct session *s, struct session_disk *d, const char *why)
{
    d->keep = d->keepable = false;
    (void)failure_set(&s->problems, -EIO, "checkpoint '%s' of disk '%s' is not kept: %s", s->checkpoint, d->disk->name,
                      why);
}

static void after_probe(struct session *s)
{
    struct failure f = {0};

    if (--s->npending)
        return;
    if (step_close_sources(&s->rig.seq, &f) == SEQ_DONE)
        seq_done(&s->rig.seq, NULL);
}

static void on_probe(struct source_read *r, int err)
{
    struct session_disk *d = r->arg;

    if (err)
        session_drop_keep(d->session, d, "the frozen view was lost (scratch full, too slow, or QEMU failed)");
    after_probe(d->session);
}

/*
 * A broken snapshot has neither event nor counter in QEMU: reads of it fail, that is all. And a graph is changed only
 * after our own connections are closed.
 */
int step_probe_and_close(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    int r;

    s->npending++; /* ours, until all probes have begun */
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct session_disk *d = &s->disks[i];

        if (!d->keep)
            continue;
        d->probe = (struct source_read){.length = MIN(sizeof(d->probe_buffer), d->disk->size),
                                        .buffer = d->probe_buffer,
                                        .sure = true,
                                        .cb = on_probe,
                                        .arg = d};
        r = d->bare ? source_read(d->bare, &d->probe) : -ENOTCONN;
        if (r < 0)
            session_drop_keep(s, d, "its frozen view cannot be read any more");
        else
            s->npending++;
    }
    if (--s->npending)
        return 0;
    return step_close_sources(q, f);
}

/* -- the checkpoint ------------------------------------------------------------------------------------------------ */

static int on_made(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    session_of_calls(c)->disks[index].keepable = true;
    return 0;
}

static void on_kept(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (s->disks[i].keep && !s->disks[i].keepable)
            session_drop_keep(s, &s->disks[i],
                              !f                     ? "QEMU did not make it"
                              : f->err == -EREMOTEIO ? f->text
                                                     : "QEMU's answer was lost (it may exist, whole, all the same)");
    }
    seq_done(&s->rig.seq, NULL); /* what failed is in problems, by disk */
}

/* Third part, for the disks whose first two went well. */
static void on_merged(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);
    struct failure next = {0};
    char temporary[NAMES_SIZE];
    int r;

    names_make(temporary, s->rig.id, NAMES_KEEP, 0);
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct session_disk *d = &s->disks[i];
        struct qmp_bitmap keep = {d->keep_node, s->checkpoint}, merged = {d->keep_node, temporary};
        struct json_object *args;

        if (!d->keep)
            continue;
        if (!d->keepable) {
            session_drop_keep(s, d, f ? f->text : "QEMU did not merge its record");
            continue;
        }
        d->keepable = false;
        args = qmp_args_transaction();
        qmp_action_bitmap_add(args, keep, 0, true, false);
        qmp_action_bitmap_merge(args, keep, &merged, 1);
        qmp_action_bitmap_remove(args, merged);
        calls_add(&s->rig.calls, "transaction", args, QMP_NO_FD, i, on_made);
    }
    r = calls_wait(&s->rig.calls, on_kept, &next);
    if (r != 0)
        on_kept(&s->rig.calls, r < 0 ? &next : NULL);
}

static void start_merge(struct session *s, unsigned i)
{
    struct session_disk *d = &s->disks[i];
    struct json_object *args = qmp_args_transaction();
    char temporary[NAMES_SIZE], cbw[NAMES_SIZE], written[NAMES_SIZE];
    struct qmp_bitmap merged = {d->keep_node, names_make(temporary, s->rig.id, NAMES_KEEP, 0)};
    struct qmp_bitmap source = {names_make(cbw, s->rig.id, NAMES_CBW, i),
                                names_make(written, s->rig.id, NAMES_WRITTEN, 0)};

    calls_add(&s->rig.calls, "block-dirty-bitmap-add", qmp_args_bitmap_add(merged, 0, false, false), QMP_NO_FD, i,
              NULL);
    qmp_action_bitmap_merge(args, merged, &source, 1);
    calls_add(&s->rig.calls, "transaction", args, QMP_NO_FD, i, on_made);
}

static const struct disk *find_by_device(const struct disk_list *l, const char *qom_path)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        if (strcmp(l->disks[i].qom_path, qom_path) == 0)
            return &l->disks[i];
    }
    return NULL;
}

/*
 * What our filter stands on is that disk's image. Of a device that was unplugged, and another one plugged in under its
 * id, the filter knows nothing.
 */
static bool is_over(const struct rig *r, unsigned i, const struct disk *disk)
{
    char cbw[NAMES_SIZE];
    const char *top = graph_see_through(r->answers[1], r->answers[2], names_make(cbw, r->id, NAMES_CBW, i));

    return top && strcmp(top, disk->top) == 0;
}

static void on_graph(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);
    struct rig *r = &s->rig;
    struct disk_list *now = NULL;
    struct failure next = {0};
    int result;

    if (!f && disk_list_parse(r->answers[0], r->answers[1], r->answers[2], &now, &next) < 0)
        f = &next;
    for (unsigned i = 0; i < r->ndisks; i++) {
        struct session_disk *d = &s->disks[i];
        const struct disk *disk = now ? find_by_device(now, d->disk->qom_path) : NULL;
        bool other = disk && !is_over(r, i, disk);

        d->keepable = false;
        if (!d->keep)
            continue;
        /* The top may be another node than at the freeze: somebody took an external snapshot under our filter. */
        if (disk && !other && disk->tracked && disk->size == d->disk->size && !disk_checkpoint(disk, s->checkpoint))
            d->keep_node = strdup(disk->top);
        if (d->keep_node)
            start_merge(s, i);
        else
            session_drop_keep(s, d,
                              f       ? f->text
                              : !disk ? "the device is gone"
                              : other ? "the device has another image by now"
                                      : "its image keeps no bitmaps, has one of that name by now, or was resized");
    }
    disk_list_free(now);
    rig_drop_answers(r);
    memset(&next, 0, sizeof(next));
    result = calls_wait(&r->calls, on_merged, &next);
    if (result != 0)
        on_merged(&r->calls, result < 0 ? &next : NULL);
}

/* Asks QEMU for its bitmaps only where there may be one: asking is dangerous while somebody's job ends (0009). */
int step_keep_undo(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    bool any = false;

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        any |= s->disks[i].keep_node != NULL;
    return any ? rig_no_bitmaps(q, f) : SEQ_DONE;
}

int step_keep(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    bool any = false;

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        any |= s->disks[i].keep;
    return any ? rig_ask_graph(&s->rig, on_graph, f) : SEQ_DONE;
}
