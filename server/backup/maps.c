/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The frozen maps of a session: read once as soon as it is up, while clients read data already, and corrected where
 * QEMU's own answer cannot be trusted. Block status of a frozen node is not frozen in QEMU (untouched areas are asked
 * of the live node), so nothing is asked twice. All are read in one walk, but for the depth's, which has one of its
 * own.
 */
#include "backup/late.h"
#include "qmp/commands.h"
#include "source/giveback.h"

#include <errno.h>
#include <stdio.h>

#define DIRTY 1u      /* the one bit of a qemu:dirty-bitmap context */
#define STATE_ZERO 2u /* of base:allocation (NBD protocol) */
#define STATE_HOLE 1u /* of base:allocation, alone: not NBD_STATE_ZERO too (NBD protocol) */
#define DEPTH_BELOW 2
#define DEPTH_TOP 1 /* allocated in the top layer (QEMU, docs/interop/nbd.txt) */

struct map_job {
    struct session *session; /* borrowed */
    unsigned disk;
    char *context; /* owned: as clients know it; NULL: `into` gets the map */
    bool final;    /* nothing of it has to be corrected */
    struct map **into;
};

void maps_tell_ready(struct session *s, unsigned disk, const char *context)
{
    struct session_disk *d = &s->disks[disk];

    for (size_t i = 0; i < d->nmaps; i++) {
        if (strcmp(d->maps[i].context, context) != 0 || d->maps[i].ready)
            continue;
        d->maps[i].ready = true;
        if (d->ahead && strcmp(context, ALLOCATION_CONTEXT) == 0)
            ahead_follow(d->ahead, d->maps[i].map, STATE_ZERO, 0);
        else if (d->ahead && strcmp(context, DEPTH_CONTEXT) != 0)
            ahead_follow(d->ahead, d->maps[i].map, DIRTY, DIRTY);
    }
    if (!s->stop_wanted && !s->failed)
        s->ops->on_maps(s->arg);
}

static void on_map(void *arg, struct map *map, const struct failure *f)
{
    struct map_job *job = arg;
    struct session *s = job->session;
    struct failure mine = {0};

    if (!f && !job->context) {
        *job->into = map;
    } else if (!f && session_add_map(s, job->disk, job->context, map) < 0) {
        (void)failure_set(&mine, -ENOMEM, "out of memory for a map");
        f = &mine;
    }
    if (!f && job->final)
        maps_tell_ready(s, job->disk, job->context);
    free(job->context);
    free(job);
    session_one_done(s, f);
}

/* context: NULL: the map goes to *into, which is NULL. */
static void start_map(struct session *s, unsigned disk, enum names_kind kind, const char *upstream, const char *context,
                      bool final, struct map **into)
{
    struct map_job *job = calloc(1, sizeof(*job));
    char export[NAMES_SIZE];
    struct source_nbd_config config = {
        .socket_path = s->rig.server_address,
        .export_name = kind == NAMES_EXPORT ? session_view(s, disk, export) : names_make(export, s->rig.id, kind, disk),
        .timeout_ms = s->rig.timeout_ms,
    };
    int r = -ENOMEM;

    if (job && (!context || (job->context = strdup(context)))) {
        job->session = s;
        job->disk = disk;
        job->final = final;
        job->into = into;
        r = source_nbd_map(s->rig.loop, &config, upstream, on_map, job, NULL);
    }
    if (r == 0) {
        s->npending++;
        return;
    }
    (void)failure_set(&s->step_failure, r, "cannot read the map '%s': %s", upstream, strerror(-r));
    if (job)
        free(job->context);
    free(job);
}

/* What changed since the checkpoints is a matter of milliseconds, whatever the disk's size: so it comes first. */
static int read_records(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);

    for (unsigned i = 0; !s->depth_pass && i < s->rig.ndisks; i++) {
        if (session_needs_allocation(s, i))
            start_map(s, i, NAMES_LAYER, DEPTH_CONTEXT, NULL, false, &s->disks[i].layers);
        for (unsigned k = 0; k < s->nsince; k++) {
            const struct checkpoint *c = session_usable_since(s, i, s->since[k]);
            _cleanup_free_ char *context = NULL;
            char name[NAMES_SIZE], upstream[sizeof(DIRTY_CONTEXT) + NAMES_SIZE];

            if (!c)
                continue;
            (void)snprintf(upstream, sizeof(upstream), DIRTY_CONTEXT "%s", names_make(name, s->rig.id, NAMES_SINCE, k));
            if (asprintf(&context, DIRTY_CONTEXT "%s", s->since[k]) < 0)
                (void)failure_set(&s->step_failure, -ENOMEM, "out of memory");
            else
                start_map(s, i, NAMES_EXPORT, upstream, context, !c->allocation_levels, NULL);
        }
    }
    return session_begun(s, f);
}

/* QEMU looks at every table of the image for these, while its main loop waits: seconds for a disk of 1 TiB. */
static int read_allocation(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    const char *context = s->depth_pass ? DEPTH_CONTEXT : ALLOCATION_CONTEXT;

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        start_map(s, i, NAMES_EXPORT, context, context, false, NULL);
    return session_begun(s, f);
}

/* -- records that upper layers have not ---------------------------------------------------------------------------- */

static const char *exported_node(struct json_object *exports, const char *id)
{
    for (size_t i = 0; i < qmp_array_length(exports); i++) {
        struct json_object *e = json_object_array_get_idx(exports, i);
        const char *found = qmp_get_string(e, "id");

        if (found && strcmp(found, id) == 0)
            return qmp_get_string(e, "node-name");
    }
    return NULL;
}

static void on_layer_exports(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct session *s = session_of_late(&r->seq);
    struct failure mine = {0};

    if (f)
        (void)failure_copy(&mine, f);
    for (unsigned i = 0; !f && i < s->rig.ndisks; i++) {
        const struct disk *d = s->disks[i].disk;
        char export[NAMES_SIZE];
        const char *node = exported_node(r->answers[0], names_make(export, s->rig.id, NAMES_LAYER, i));

        if (!session_needs_allocation(s, i))
            continue;
        if (!node || strcmp(node, d->top) != 0)
            (void)session_other_layer(d, node, &mine);
        else if (!graph_has_levels(r->answers[2], d))
            (void)failure_set(&mine, -ESTALE,
                              "the layers of disk '%s' were changed just now (by a block job of others?); try again",
                              d->name);
    }
    rig_drop_answers(r);
    seq_done(&r->seq, &mine);
}

/*
 * The depths below count from the exported layer. A snapshot that somebody takes puts the new layer below all users of
 * the old one, our export is one of them: a map read after that has every depth one lower. And a stream or a commit has
 * a filter of its own between the layers, as long as it goes: those below it lie one deeper. The graph is told without
 * a look at any image, which would be dangerous then (docs/decisions/0009, "Asking can kill").
 */
static int compare_depths(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    struct rig *r = &s->late;
    bool any = false;

    for (unsigned i = 0; !s->depth_pass && i < s->rig.ndisks; i++)
        any |= session_needs_allocation(s, i);
    if (!any)
        return SEQ_DONE;
    rig_drop_answers(r);
    calls_add(&r->calls, "query-block-exports", NULL, QMP_NO_FD, 0, rig_keep_answer);
    calls_add(&r->calls, "x-debug-query-block-graph", NULL, QMP_NO_FD, 2, rig_keep_answer);
    return calls_wait(&r->calls, on_layer_exports, f);
}

/* map with all that the layers of these depths have allocated called dirty, too. */
static int fill_in(const struct map *map, const struct map *layers, uint64_t depths, struct map **ret_map)
{
    struct map *mask = NULL;
    int r = map_pick(layers, depths, &mask);

    if (r == 0)
        r = map_overlay(map, mask, DIRTY, ret_map);
    map_free(mask);
    return r;
}

/*
 * After an external snapshot that did not re-create the bitmaps, the overlay's allocation is what changed since. It is
 * asked of the live disk after the freeze: what the guest writes meanwhile can only add to it.
 */
int maps_fill_in(struct session *s, unsigned disk, const struct checkpoint *c, const char *context)
{
    const struct map *map = session_any_map(&s->disks[disk], context);
    struct map *filled = NULL;
    int r;

    if (!c->allocation_levels)
        return 0;
    r = fill_in(map, s->disks[disk].layers, c->allocation_levels, &filled);
    return r < 0 ? r : session_add_map(s, disk, context, filled);
}

static int fill_in_all(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);

    for (unsigned i = 0; !s->depth_pass && i < s->rig.ndisks; i++) {
        for (unsigned k = 0; k < s->nsince; k++) {
            const struct checkpoint *c = session_usable_since(s, i, s->since[k]);
            _cleanup_free_ char *context = NULL;
            int r;

            if (!c || !c->allocation_levels)
                continue;
            if (asprintf(&context, DIRTY_CONTEXT "%s", s->since[k]) < 0)
                return -ENOMEM;
            if ((r = maps_fill_in(s, i, c, context)) < 0)
                return r;
            maps_tell_ready(s, i, context);
        }
    }
    return SEQ_DONE;
}

/* -- correcting the allocation map --------------------------------------------------------------------------------- */

static int overlay(struct session *s, unsigned disk, const char *context, const struct map *mask, uint64_t value)
{
    const struct map *map = session_any_map(&s->disks[disk], context);
    struct map *corrected = NULL;
    int r = map_overlay(map, mask, value, &corrected);

    return r < 0 ? r : session_add_map(s, disk, context, corrected);
}

/*
 * snapshot-access asks the top layer alone (QEMU 7.2 to 10.0): what a backing file holds comes as a hole that is not
 * said to be zero. That is no hole, and its depth is "below", without saying how far.
 */
static int find_backing(struct session *s, unsigned disk)
{
    return map_pick(session_any_map(&s->disks[disk], ALLOCATION_CONTEXT), UINT64_C(1) << (STATE_HOLE - 1),
                    &s->disks[disk].below);
}

/*
 * What the guest has written is known for sure only when all writes have ended that are under way (merge_written()). Where
 * their copies go to another server that may stall, waiting for that could hold the guest for as long as that does.
 */
static bool may_not_drain(const struct session *s)
{
    return s->narrow_reads && !s->still && s->place && !s->depth_pass;
}

/*
 * On QEMU 7.0-7.2 block status, like reads, takes the live disk's word in ranges that cross from a copied into an
 * uncopied cluster. What the guest wrote since the freeze is known from the bitmap on the cbw node: there the map says
 * "data". A transaction drains: writes in flight are in that bitmap before it is merged, so none that could have misled
 * the maps, which were read before, is missing.
 */
static int merge_written(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    struct json_object *args;

    if (!s->narrow_reads || s->still || may_not_drain(s))
        return SEQ_DONE;
    s->merged = true;
    args = qmp_args_transaction();
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        char access[NAMES_SIZE], late[NAMES_SIZE], cbw[NAMES_SIZE], written[NAMES_SIZE];
        struct qmp_bitmap target = {session_view(s, i, access), names_make(late, s->rig.id, NAMES_LATE, i)},
                          source = {names_make(cbw, s->rig.id, NAMES_CBW, i),
                                    names_make(written, s->rig.id, NAMES_WRITTEN, 0)};

        qmp_action_bitmap_add(args, target, COPY_CLUSTER, false, true);
        qmp_action_bitmap_merge(args, target, &source, 1);
    }
    calls_add(&s->late.calls, "transaction", args, QMP_NO_FD, 0, NULL);
    return rig_wait(&s->late, f);
}

static int no_written(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);

    if (!s->merged || late_is_stuck(s))
        return SEQ_DONE;
    for (unsigned i = 0; i < s->rig.ndisks; i++)
        late_remove_bitmap(s, i);
    return calls_wait(&s->late.calls, late_on_gone, f);
}

static int export_written(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);

    for (unsigned i = 0; s->merged && i < s->rig.ndisks; i++)
        late_add_export(s, i);
    return rig_wait(&s->late, f);
}

static int no_written_exports(struct seq *q, struct failure *f)
{
    return session_of_late(q)->merged ? late_no_exports(q, f) : SEQ_DONE;
}

static int read_written(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);

    for (unsigned i = 0; s->merged && i < s->rig.ndisks; i++) {
        char name[NAMES_SIZE], context[sizeof(DIRTY_CONTEXT) + NAMES_SIZE];

        (void)snprintf(context, sizeof(context), DIRTY_CONTEXT "%s", names_make(name, s->rig.id, NAMES_LATE, i));
        start_map(s, i, NAMES_LATE, context, NULL, false, &s->disks[i].written);
    }
    return session_begun(s, f);
}

/* Never wrong, only less than "zero". */
static int call_it_data(struct session *s, unsigned disk, const char *context)
{
    struct map *data = NULL;
    int r = map_new_uniform(s->disks[disk].disk->size, 0, &data);

    return r < 0 ? r : session_add_map(s, disk, context, data);
}

static int correct_disk(struct session *s, unsigned disk, const char *context, uint64_t below, uint64_t top)
{
    struct session_disk *d = &s->disks[disk];
    int r = 0;

    if (!d->below)
        r = find_backing(s, disk);
    if (r == 0 && map_count(d->below, 1))
        r = overlay(s, disk, context, d->below, below);
    if (r == 0 && d->written)
        r = overlay(s, disk, context, d->written, top);
    if (r == 0 && may_not_drain(s))
        r = call_it_data(s, disk, context);
    map_free(TAKE_PTR(d->written));
    return r;
}

static int correct(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    const char *context = s->depth_pass ? DEPTH_CONTEXT : ALLOCATION_CONTEXT;

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        int r =
            s->still ? 0 : correct_disk(s, i, context, s->depth_pass ? DEPTH_BELOW : 0, s->depth_pass ? DEPTH_TOP : 0);

        if (r < 0)
            return failure_set(f, r, "cannot correct the allocation map: %s", strerror(-r));
        maps_tell_ready(s, i, context);
    }
    return SEQ_DONE;
}

/* -- the maps of the freeze ---------------------------------------------------------------------------------------- */

/*
 * What the freeze has left behind: nodes that no device uses any more, and exports that nobody is connected to. The
 * session's way down has them, too.
 */
static int drop_remains(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    char cut[NAMES_SIZE], export[NAMES_SIZE];

    /* To delete a node is to drain what is below it: not where scratch is another server's, which may stall. */
    if (s->still || s->engine == ENGINE_JOB || s->depth_pass || s->place || late_is_stuck(s))
        return SEQ_DONE;
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        calls_add(&s->late.calls, "blockdev-del",
                  qmp_args_strings("node-name", names_make(cut, s->rig.id, NAMES_CUT, i), NULL), QMP_NO_FD, i, NULL);
        if (s->disks[i].disk->host_cache)
            calls_add(&s->late.calls, "block-export-del",
                      qmp_args_export_del(names_make(export, s->rig.id, NAMES_LIVE, i)), QMP_NO_FD, i, NULL);
    }
    return calls_wait(&s->late.calls, late_on_gone, f);
}

/*
 * The first row is the last on the way down, which the walk takes at once: clients have their maps by then. What a
 * pull of changes asks for first comes first, and what takes longest, last.
 */
static const struct seq_step maps_steps[] = {
    {"drop remains", NULL, drop_remains, NULL},
    {"read dirty maps", read_records, NULL, NULL},
    {"compare depths", compare_depths, NULL, NULL},
    {"fill in records", fill_in_all, NULL, NULL},
    {"make sockets", late_make_sockets, NULL, NULL},
    {"share memory", late_share_memory, NULL, NULL},
    {"read allocation", read_allocation, NULL, NULL},
    {"merge what was written", merge_written, no_written, NULL},
    {"add exports for it", export_written, no_written_exports, NULL},
    {"read it", read_written, NULL, NULL},
    {"correct maps", correct, NULL, NULL},
};

static void on_maps_top(struct seq *q)
{
    struct session *s = session_of_late(q);

    seq_stop(q, false);
    s->mapped = true;
    if (s->wants_depth && !s->depth_pass)
        return;
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (s->disks[i].giving)
            giveback_begin(s->disks[i].giving);
    }
}

static void on_maps_end(struct seq *q, const struct failure *problems)
{
    struct session *s = session_of_late(q);
    struct failure f = {0};

    rig_done(&s->late);
    s->late_running = s->mapping = s->merged = false;
    if (problems->err)
        (void)failure_copy(&s->problems, problems);
    if (s->ask_failure.err)
        (void)failure_set(&f, s->ask_failure.err, "the maps of VM '%s' cannot be read: %s", s->vm, s->ask_failure.text);
    memset(&s->ask_failure, 0, sizeof(s->ask_failure));
    if (f.err && s->status == SESSION_UP)
        session_fail(s, &f);
    session_late_next(s);
    session_late_idle(s);
}

static const struct seq_ops maps_ops = {
    .on_top = on_maps_top,
    .on_failed = late_on_failed,
    .on_end = on_maps_end,
};

static void start_maps(struct session *s)
{
    s->mapping = true;
    late_start(s, maps_steps, ARRAY_SIZE(maps_steps), &maps_ops);
}

void session_maps_start(struct session *s)
{
    s->wants_depth |= s->give_back; /* what is given back has no status any more */
    start_maps(s);
}

void session_want_depth(struct session *s)
{
    s->wants_depth = true;
    if (s->status == SESSION_UP && !s->failed)
        session_late_next(s);
}

bool maps_next(struct session *s)
{
    if (!s->wants_depth || !s->mapped || s->depth_pass)
        return false;
    s->depth_pass = true;
    start_maps(s);
    return true;
}
