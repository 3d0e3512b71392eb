/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The frozen maps of a session: read once when it goes up, one more when somebody asks later, and corrected where
 * QEMU's own answer cannot be trusted. Block status of a frozen node is not frozen in QEMU (untouched areas are asked
 * of the live node), so nothing is asked twice.
 */
#include "backup/steps.h"
#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>

#define DIRTY_CONTEXT "qemu:dirty-bitmap:"
#define ALLOCATION_CONTEXT "base:allocation"
#define DEPTH_CONTEXT "qemu:allocation-depth"
#define DIRTY 1u      /* the one bit of a qemu:dirty-bitmap context */
#define STATE_HOLE 1u /* of base:allocation, alone: not NBD_STATE_ZERO too (NBD protocol) */
#define DEPTH_BELOW 2
#define DEPTH_TOP 1 /* allocated in the top layer (QEMU, docs/interop/nbd.txt) */

#define LATE_TIMEOUT_MS 5000u /* a command while our connections stand: a stuck QEMU may wait for them */

struct map_job {
    struct session *session; /* borrowed */
    unsigned disk;
    char *context; /* owned: as clients know it; NULL: the disk's layers */
    struct source_nbd_map *reading;
};

static void on_map(void *arg, struct map *map, const struct failure *f)
{
    struct map_job *job = arg;
    struct session *s = job->session;
    struct failure mine = {0};

    if (!f && !job->context) {
        s->disks[job->disk].layers = map;
    } else if (!f && session_add_map(s, job->disk, job->context, map) < 0) {
        (void)failure_set(&mine, -ENOMEM, "out of memory for a map");
        f = &mine;
    }
    free(job->context);
    free(job);
    session_one_done(s, f);
}

/* context: NULL for the layers of the live disk. */
static void start_map(struct session *s, unsigned disk, const char *context, const char *upstream)
{
    struct map_job *job = calloc(1, sizeof(*job));
    char export[NAMES_SIZE];
    struct source_nbd_config config = {
        .socket_path = s->rig.server_address,
        .export_name = names_make(export, s->rig.id, context ? NAMES_EXPORT : NAMES_LAYER, disk),
        .timeout_ms = s->rig.timeout_ms,
    };
    int r = -ENOMEM;

    if (job && (!context || (job->context = strdup(context)))) {
        job->session = s;
        job->disk = disk;
        r = source_nbd_map(s->rig.loop, &config, upstream, on_map, job, &job->reading);
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

int step_read_maps(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        start_map(s, i, ALLOCATION_CONTEXT, ALLOCATION_CONTEXT);
        start_map(s, i, DEPTH_CONTEXT, DEPTH_CONTEXT);
        if (session_needs_allocation(s, i))
            start_map(s, i, NULL, DEPTH_CONTEXT);
        for (unsigned k = 0; k < s->nsince; k++) {
            _cleanup_free_ char *context = NULL;
            char name[NAMES_SIZE], upstream[sizeof(DIRTY_CONTEXT) + NAMES_SIZE];

            if (!session_usable_since(s, i, s->since[k]))
                continue;
            (void)snprintf(upstream, sizeof(upstream), DIRTY_CONTEXT "%s", names_make(name, s->rig.id, NAMES_SINCE, k));
            if (asprintf(&context, DIRTY_CONTEXT "%s", s->since[k]) < 0)
                (void)failure_set(&s->step_failure, -ENOMEM, "out of memory");
            else
                start_map(s, i, context, upstream);
        }
    }
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
    struct session *s = session_of_seq(&r->seq);
    struct failure mine = {0};

    if (f)
        (void)failure_copy(&mine, f);
    for (unsigned i = 0; !f && i < s->rig.ndisks; i++) {
        const struct disk *d = s->disks[i].disk;
        char export[NAMES_SIZE];
        const char *node = exported_node(r->answers[0], names_make(export, s->rig.id, NAMES_LAYER, i));

        if (session_needs_allocation(s, i) && (!node || strcmp(node, d->top) != 0))
            (void)session_other_layer(d, node, &mine);
    }
    rig_drop_answers(r);
    seq_done(&r->seq, &mine);
}

/*
 * The depths below count from the exported layer. A snapshot that somebody takes puts the new layer below all users of
 * the old one, our export is one of them: a map read after that has every depth one lower.
 */
int step_compare_depths(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    struct rig *r = rig_of_seq(q);
    bool any = false;

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        any |= session_needs_allocation(s, i);
    if (!any)
        return SEQ_DONE;
    rig_drop_answers(r);
    calls_add(&r->calls, "query-block-exports", NULL, QMP_NO_FD, 0, rig_keep_answer);
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
static int fill_in_since(struct session *s, unsigned disk, const struct checkpoint *c, const char *context)
{
    const struct map *map = session_map(s, s->disks[disk].disk->name, context);
    struct map *filled = NULL;
    int r;

    if (!c->allocation_levels)
        return 0;
    r = fill_in(map, s->disks[disk].layers, c->allocation_levels, &filled);
    return r < 0 ? r : session_add_map(s, disk, context, filled);
}

int step_fill_in(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        for (unsigned k = 0; k < s->nsince; k++) {
            const struct checkpoint *c = session_usable_since(s, i, s->since[k]);
            _cleanup_free_ char *context = NULL;
            int r;

            if (!c)
                continue;
            if (asprintf(&context, DIRTY_CONTEXT "%s", s->since[k]) < 0)
                return -ENOMEM;
            if ((r = fill_in_since(s, i, c, context)) < 0)
                return r;
        }
    }
    return SEQ_DONE;
}

/* -- one more map -------------------------------------------------------------------------------------------------- */

/*
 * A bitmap cannot join an export that stands, so a second export of the same frozen node carries it for as long as it
 * is read. The walk goes up this little table and down again for each ask.
 */
static struct session *session_of_late(struct seq *q)
{
    return container_of(rig_of_seq(q), struct session, late);
}

/* The record of what the guest wrote since the freeze. A transaction drains: writes in flight are in it before it is
 * read. */
static void merge_written(struct session *s, unsigned disk, struct qmp_bitmap target)
{
    struct json_object *args = qmp_args_transaction();
    char cbw[NAMES_SIZE], written[NAMES_SIZE];
    struct qmp_bitmap source = {names_make(cbw, s->rig.id, NAMES_CBW, disk),
                                names_make(written, s->rig.id, NAMES_WRITTEN, 0)};

    qmp_action_bitmap_add(args, target, COPY_CLUSTER, false, true);
    qmp_action_bitmap_merge(args, target, &source, 1);
    calls_add(&s->late.calls, "transaction", args, QMP_NO_FD, 0, NULL);
}

/*
 * The freeze has drained, so the layers' records have all from before it; without a transaction, since somebody may run
 * a block job by now (see 0009 on drains).
 */
static void merge_since(struct session *s, const struct session_ask *a, struct qmp_bitmap target)
{
    const struct checkpoint *c = session_usable_since(s, a->disk, a->since);

    calls_add(&s->late.calls, "block-dirty-bitmap-add",
              qmp_args_bitmap_add(target, c ? c->granularity : 0, false, true), QMP_NO_FD, 0, NULL);
    for (size_t l = 0; c && l < c->nlayers; l++) {
        struct qmp_bitmap source = {c->layers[l].node, c->name};

        if (c->layers[l].merge)
            calls_add(&s->late.calls, "block-dirty-bitmap-merge", qmp_args_bitmap_merge(target, &source, 1), QMP_NO_FD,
                      0, NULL);
    }
}

static int late_merge_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    const struct session_ask *a = s->asks;
    char access[NAMES_SIZE], late[NAMES_SIZE];
    struct qmp_bitmap target = {session_view(s, a->disk, access), names_make(late, s->rig.id, NAMES_LATE, 0)};

    if (a->since)
        merge_since(s, a, target);
    else
        merge_written(s, a->disk, target);
    return rig_wait(&s->late, f);
}

static int late_export_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    char access[NAMES_SIZE], late[NAMES_SIZE];
    struct qmp_bitmap b = {session_view(s, s->asks->disk, access), names_make(late, s->rig.id, NAMES_LATE, 0)};

    calls_add(&s->late.calls, "block-export-add", qmp_args_export_add(late, b.node, late, false, &b, 1), QMP_NO_FD, 0,
              NULL);
    return rig_wait(&s->late, f);
}

static void on_late_map(void *arg, struct map *map, const struct failure *f)
{
    struct session *s = arg;

    s->late_reading = NULL;
    s->late_map = map;
    seq_done(&s->late.seq, f);
}

static int late_read_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    char name[NAMES_SIZE], context[sizeof(DIRTY_CONTEXT) + NAMES_SIZE];
    struct source_nbd_config config = {
        .socket_path = s->rig.server_address,
        .export_name = names_make(name, s->rig.id, NAMES_LATE, 0),
        .timeout_ms = s->rig.timeout_ms,
    };

    (void)snprintf(context, sizeof(context), DIRTY_CONTEXT "%s", name);
    return source_nbd_map(s->rig.loop, &config, context, on_late_map, s, &s->late_reading);
}

/*
 * A QEMU that does not answer may wait, in a drain, for our own connections: they close before anything else, and what
 * the walk has made is undone with all else of the session.
 */
static bool is_stuck(const struct session *s)
{
    return s->ask_failure.err == -ETIMEDOUT;
}

/* A refusal says that it is not there: it stands on a node of ours, of which nobody else knows. */
static void on_late_bitmap_gone(struct calls *c, const struct failure *f)
{
    seq_done(&rig_of_calls(c)->seq, f && f->err != -EREMOTEIO ? f : NULL);
}

static int late_no_bitmaps(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    char access[NAMES_SIZE], late[NAMES_SIZE];

    if (is_stuck(s))
        return SEQ_DONE;
    calls_add(&s->late.calls, "block-dirty-bitmap-remove",
              qmp_args_strings("node", session_view(s, s->asks->disk, access), "name",
                               names_make(late, s->rig.id, NAMES_LATE, 0), NULL),
              QMP_NO_FD, 0, NULL);
    return calls_wait(&s->late.calls, on_late_bitmap_gone, f);
}

static int late_no_exports(struct seq *q, struct failure *f)
{
    return is_stuck(session_of_late(q)) ? SEQ_DONE : rig_no_exports(q, f);
}

static const struct seq_step late_steps[] = {
    {"merge the record", late_merge_up, late_no_bitmaps, NULL},
    {"add an export for the map", late_export_up, late_no_exports, NULL},
    {"read the map", late_read_up, NULL, NULL},
};

static void on_late_top(struct seq *q)
{
    seq_stop(q, false);
}

static void on_late_failed(struct seq *q, const struct failure *why)
{
    (void)failure_copy(&session_of_late(q)->ask_failure, why);
    seq_stop(q, false);
}

static void on_late_end(struct seq *q, const struct failure *problems)
{
    struct session *s = session_of_late(q);
    struct session_ask *a = s->asks;
    struct map *map = TAKE_PTR(s->late_map);
    struct failure f = s->ask_failure;
    _cleanup_free_ char *context = NULL;

    rig_done(&s->late);
    s->late_running = false;
    if (problems->err)
        (void)failure_copy(&s->problems, problems);
    if (is_stuck(s) && s->status == SESSION_UP)
        session_fail(s, &f);
    memset(&s->ask_failure, 0, sizeof(s->ask_failure));
    if (!f.err && !map)
        (void)failure_set(&f, -ECANCELED, "the session ends");
    if (!f.err && a->since) {
        if (asprintf(&context, DIRTY_CONTEXT "%s", a->since) < 0 ||
            session_add_map(s, a->disk, context, TAKE_PTR(map)) < 0 ||
            fill_in_since(s, a->disk, session_usable_since(s, a->disk, a->since), context) < 0)
            (void)failure_set(&f, -ENOMEM, "out of memory for a map");
    } else if (!f.err) {
        s->late_map = TAKE_PTR(map); /* the correction's: it takes it in its callback */
    }
    map_free(map);
    s->asks = a->next;
    free(TAKE_PTR(a->since));
    a->session = NULL;
    if (a->cb)
        a->cb(a, f.err ? &f : NULL);
    map_free(TAKE_PTR(s->late_map));
    session_late_next(s);
    session_late_idle(s);
}

static const struct seq_ops late_ops = {
    .on_top = on_late_top,
    .on_failed = on_late_failed,
    .on_end = on_late_end,
};

static void start_late(struct session *s)
{
    struct rig_config config = {
        .loop = s->rig.loop,
        .qmp = s->rig.qmp,
        .id = s->rig.id,
        .ndisks = s->rig.ndisks,
        .timeout_ms = MIN(s->rig.timeout_ms, LATE_TIMEOUT_MS),
        .server_socket = s->rig.server_socket,
        .server_dir = s->rig.server_dir,
    };

    s->late_running = true;
    (void)rig_init(&s->late, &config, late_steps, ARRAY_SIZE(late_steps), &late_ops); /* only a timer: cannot fail */
    s->late.only_export = NAMES_LATE;
    seq_start(&s->late.seq);
}

static int push_ask(struct session *s, struct session_ask *a)
{
    struct session_ask **tail = &s->asks;

    a->session = s;
    a->next = NULL;
    while (*tail)
        tail = &(*tail)->next;
    *tail = a;
    if (!s->late_running)
        start_late(s);
    return 0;
}

int session_ask_start(struct session *s, struct session_ask *a, const char *disk, const char *since,
                      void (*cb)(struct session_ask *a, const struct failure *f))
{
    if (s->status != SESSION_UP || s->failed)
        return -ENOTCONN;
    memset(a, 0, sizeof(*a));
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (strcmp(s->disks[i].disk->name, disk) != 0)
            continue;
        if (!session_usable_since(s, i, since))
            return -ENOENT;
        a->cb = cb;
        a->disk = i;
        a->since = strdup(since);
        return a->since ? push_ask(s, a) : -ENOMEM;
    }
    return -ENOENT;
}

/* The one under way cannot leave the queue: a stand-in takes its place. */
void session_ask_forget(struct session_ask *a)
{
    struct session *s = a->session;
    struct session_ask **p;

    if (!s)
        return;
    for (p = &s->asks; *p != a; p = &(*p)->next)
        ;
    a->session = NULL;
    if (p != &s->asks) {
        *p = a->next;
        free(TAKE_PTR(a->since));
        return;
    }
    s->stand_in = *a;
    s->stand_in.cb = NULL;
    s->stand_in.session = s;
    a->since = NULL;
    *p = &s->stand_in;
}

void session_late_next(struct session *s)
{
    if (s->asks && !s->late_running)
        start_late(s);
}

void session_late_cancel(struct session *s)
{
    struct failure f = {0};
    struct session_ask *waiting = s->asks ? TAKE_PTR(s->asks->next) : NULL;

    (void)failure_set(&f, -ECANCELED, "the session ends");
    while (waiting) {
        struct session_ask *a = waiting;

        waiting = a->next;
        free(TAKE_PTR(a->since));
        a->session = NULL;
        a->cb(a, &f);
    }
    if (s->late_running)
        seq_stop(&s->late.seq, false);
}

/* -- correcting the allocation map --------------------------------------------------------------------------------- */

static int overlay(struct session *s, unsigned disk, const char *context, const struct map *mask, uint64_t value)
{
    const struct map *map = session_map(s, s->disks[disk].disk->name, context);
    struct map *corrected = NULL;
    int r = map_overlay(map, mask, value, &corrected);

    return r < 0 ? r : session_add_map(s, disk, context, corrected);
}

/*
 * snapshot-access asks the top layer alone (QEMU 7.2 to 10.0): what a backing file holds comes as a hole that is not
 * said to be zero. That is no hole, and its depth is "below", without saying how far.
 */
static int tell_backing(struct session *s, unsigned disk)
{
    const struct map *allocation = session_map(s, s->disks[disk].disk->name, ALLOCATION_CONTEXT);
    struct map *below = NULL;
    int r = map_pick(allocation, UINT64_C(1) << (STATE_HOLE - 1), &below);

    if (r == 0 && map_count(below, 1)) {
        r = overlay(s, disk, ALLOCATION_CONTEXT, below, 0);
        if (r == 0)
            r = overlay(s, disk, DEPTH_CONTEXT, below, DEPTH_BELOW);
    }
    map_free(below);
    return r;
}

static void on_written(struct session_ask *a, const struct failure *f)
{
    struct session *s = container_of(a, struct session, written);
    struct failure mine = {0};
    int r = 0;

    if (!f) {
        r = overlay(s, s->correcting, ALLOCATION_CONTEXT, s->late_map, 0);
        if (r == 0)
            r = overlay(s, s->correcting, DEPTH_CONTEXT, s->late_map, DEPTH_TOP);
    }
    if (r < 0) {
        (void)failure_set(&mine, r, "cannot correct the allocation map: %s", strerror(-r));
        f = &mine;
    }
    if (f || ++s->correcting == s->rig.ndisks) {
        s->correcting = 0;
        seq_done(&s->rig.seq, f);
        return;
    }
    s->written.disk = s->correcting;
    (void)push_ask(s, &s->written);
}

/*
 * On QEMU 7.0-7.2 block status, like reads, takes the live disk's word in ranges that cross from a copied into an
 * uncopied cluster. What the guest wrote since the freeze is known from the bitmap on the cbw node: there the map says
 * "data".
 */
int step_correct_maps(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        int r = tell_backing(s, i);

        if (r < 0)
            return failure_set(f, r, "cannot correct the allocation map: %s", strerror(-r));
    }
    if (!s->narrow_reads)
        return SEQ_DONE;
    memset(&s->written, 0, sizeof(s->written));
    s->written.cb = on_written;
    s->correcting = 0;
    return push_ask(s, &s->written);
}
