/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/steps.h"

#include "backup/hold.h"
#include "backup/lock.h"
#include "qmp/commands.h"
#include "source/giveback.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

const struct checkpoint *session_usable_since(const struct session *s, unsigned disk, const char *since)
{
    const struct checkpoint *c = disk_checkpoint(s->disks[disk].disk, since);

    return c && c->reason == REASON_NONE ? c : NULL;
}

const char *session_view(const struct session *s, unsigned disk, char name[NAMES_SIZE])
{
    return s->still ? s->disks[disk].disk->node : names_make(name, s->rig.id, NAMES_ACCESS, disk);
}

void session_one_done(struct session *s, const struct failure *f)
{
    if (f)
        (void)failure_copy(&s->step_failure, f);
    if (--s->npending == 0) {
        struct failure step = s->step_failure;

        memset(&s->step_failure, 0, sizeof(s->step_failure));
        seq_done(s->late_running ? &s->late.seq : &s->rig.seq, &step);
    }
}

int session_begun(struct session *s, struct failure *f)
{
    int r = failure_copy(f, &s->step_failure);

    if (s->npending)
        return 0; /* those that began tell the failure of the others, too */
    memset(&s->step_failure, 0, sizeof(s->step_failure));
    return r < 0 ? r : SEQ_DONE;
}

int session_add_map(struct session *s, unsigned disk, const char *context, struct map *map)
{
    struct session_disk *d = &s->disks[disk];
    struct named_map *maps;
    char *name;

    for (size_t i = 0; i < d->nmaps; i++) {
        if (strcmp(d->maps[i].context, context) == 0) {
            map_free(d->maps[i].map);
            d->maps[i].map = map;
            return 0;
        }
    }
    maps = realloc(d->maps, (d->nmaps + 1) * sizeof(*maps));
    name = strdup(context);
    if (maps)
        d->maps = maps;
    if (!maps || !name) {
        free(name);
        map_free(map);
        return -ENOMEM;
    }
    d->maps[d->nmaps++] = (struct named_map){.context = name, .map = map};
    return 0;
}

/* -- whose disks they are ------------------------------------------------------------------------------------------ */

static int on_run_state(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    static const char *const states[] = {"inmigrate", "finish-migrate", "postmigrate"};
    const char *status = qmp_get_string(ret, "status");

    for (size_t i = 0; status && i < ARRAY_SIZE(states); i++) {
        if (strcmp(status, states[i]) == 0)
            return failure_set(
                f, -EBUSY,
                "another QEMU has, or had last, the disks of this VM, which is being migrated or was (%s); "
                "back it up where it runs",
                status);
    }
    return 0;
}

/*
 * A QEMU from which its guest was migrated away stays, with all its nodes, and the other one writes to the images: they
 * cannot be frozen here, and no record here sees it. Whoever migrates later meets the lock, or vm_life.
 */
int step_run_state(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    calls_add(&s->rig.calls, "query-status", NULL, QMP_NO_FD, 0, on_run_state);
    return rig_wait(&s->rig, f);
}

/* -- scratch ------------------------------------------------------------------------------------------------------- */

/* In a worker thread. An unlinked file needs no clean-up after a kill and no path that QEMU may open. */
static void make_scratch(struct rig *r)
{
    struct session *s = container_of(r, struct session, rig);

    for (unsigned i = 0; i < r->ndisks; i++) {
        struct session_disk *d = &s->disks[i];

        d->scratch_fd = open(s->scratch_dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        if (d->scratch_fd < 0 || ftruncate(d->scratch_fd, (off_t)d->disk->size) < 0) {
            int err = -errno;

            (void)failure_set(&r->work_failure, err, "cannot make a scratch file of %llu bytes in '%s': %s",
                              (unsigned long long)d->disk->size, s->scratch_dir, strerror(-err));
            return;
        }
        if (i == 0 && s->scratch && scratch_check_room(s->scratch, d->scratch_fd, &r->work_failure) < 0)
            return;
    }
}

static int on_fd_added(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    session_of_calls(c)->disks[index].fdset_id = qmp_get_int(ret, "fdset-id");
    return 0;
}

static void after_scratch(struct rig *r)
{
    struct session *s = container_of(r, struct session, rig);
    struct failure f = {0};
    char name[NAMES_SIZE];
    int result;

    if (r->work_failure.err) {
        seq_done(&r->seq, &r->work_failure);
        return;
    }
    session_watch_scratch(s);
    for (unsigned i = 0; i < r->ndisks; i++)
        calls_add(&r->calls, "add-fd", qmp_args_add_fd(names_make(name, r->id, NAMES_SCRATCH, i)),
                  s->disks[i].scratch_fd, i, on_fd_added);
    result = rig_wait(r, &f);
    if (result != 0)
        seq_done(&r->seq, &f);
}

int step_scratch_up(struct seq *q, struct failure *f)
{
    const struct session *s = session_of_seq(q);

    if (s->place)
        return SEQ_DONE;
    if (s->scratch && scratch_check_quota(s->scratch, f) < 0)
        return f->err;
    return rig_work(rig_of_seq(q), make_scratch, after_scratch, f);
}

int step_scratch_nodes_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    char name[NAMES_SIZE];

    if (s->place)
        return step_places_up(q, f);
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        names_make(name, s->rig.id, NAMES_SCRATCH, i);
        calls_add(&s->rig.calls, "blockdev-add", qmp_args_blockdev_add_file(name, s->disks[i].fdset_id), QMP_NO_FD, i,
                  NULL);
    }
    return rig_wait(&s->rig, f);
}

/* -- the filters --------------------------------------------------------------------------------------------------- */

static int places_up(struct seq *q, struct failure *f)
{
    return session_of_seq(q)->place ? step_places_up(q, f) : SEQ_DONE;
}

/*
 * The cbw node carries a bitmap of what the guest writes from the cut on: the provisional checkpoint, and on
 * QEMU 7.0-7.2 the correction of the allocation map. It needs the copy granularity for the latter. A scratch file's
 * node comes and goes with it: that is one command less.
 */
static void add_cbw(struct session *s)
{
    struct json_object *args = qmp_args_transaction();
    bool counts = s->checkpoint || s->narrow_reads;
    char cbw[NAMES_SIZE], scratch[NAMES_SIZE], written[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct qmp_bitmap b = {names_make(cbw, s->rig.id, NAMES_CBW, i),
                               names_make(written, s->rig.id, NAMES_WRITTEN, 0)};

        names_make(scratch, s->rig.id, NAMES_SCRATCH, i);
        calls_add(&s->rig.calls, "blockdev-add",
                  qmp_args_blockdev_add_cbw(cbw, s->disks[i].disk->node,
                                            s->place ? json_object_new_string(scratch)
                                                     : qmp_args_blockdev_add_file(scratch, s->disks[i].fdset_id),
                                            s->cbw_timeout_s),
                  QMP_NO_FD, i, NULL);
        if (counts)
            qmp_action_bitmap_add(args, b, s->narrow_reads ? COPY_CLUSTER : 0, false, false);
    }
    if (counts)
        calls_add(&s->rig.calls, "transaction", args, QMP_NO_FD, 0, NULL);
    else
        json_object_put(args);
}

static uint64_t size_of_node(struct json_object *named, const char *node)
{
    for (size_t i = 0; i < qmp_array_length(named); i++) {
        struct json_object *n = json_object_array_get_idx(named, i);
        const char *name = qmp_get_string(n, "node-name");

        if (name && strcmp(name, node) == 0)
            return (uint64_t)qmp_get_int(qmp_get(n, "image"), "virtual-size");
    }
    return 0;
}

/* The filter's own bitmaps are the ones without a name (QEMU 7.2 to 10.0). 0: there are none. */
static uint32_t copy_cluster(struct json_object *named, const char *cbw)
{
    struct json_object *bitmaps = qmp_get(graph_named(named, cbw), "dirty-bitmaps");
    int64_t cluster = 0;

    for (size_t i = 0; i < qmp_array_length(bitmaps); i++) {
        struct json_object *b = json_object_array_get_idx(bitmaps, i);

        if (!qmp_get_string(b, "name"))
            cluster = MAX(cluster, qmp_get_int(b, "granularity"));
    }
    return cluster > 0 && cluster <= INT32_MAX ? (uint32_t)cluster : 0;
}

static const char *root_of_device(struct json_object *query_block, const char *qdev)
{
    for (size_t i = 0; i < qmp_array_length(query_block); i++) {
        struct json_object *entry = json_object_array_get_idx(query_block, i);
        const char *name = qmp_get_string(entry, "qdev");

        if (name && strcmp(name, qdev) == 0)
            return qmp_get_string(qmp_get(entry, "inserted"), "node-name");
    }
    return NULL;
}

static int on_roots(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct session *s = session_of_calls(c);

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        const struct disk *d = s->disks[i].disk;
        const char *root = root_of_device(ret, d->qdev);

        if (names_is_ours(root))
            return failure_set(f, -EBUSY,
                               "disk '%s' still stands on '%s', which an earlier session could not undo (a job of "
                               "others may hold it); try again when that has ended",
                               d->name, root);
        if (!root || strcmp(root, d->node) != 0)
            return failure_set(f, -ESTALE, "disk '%s' got another node just now ('%s', was '%s'); try again", d->name,
                               root ? root : "none", d->node);
    }
    return 0;
}

static int on_sizes(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct session *s = session_of_calls(c);
    char name[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        const struct disk *d = s->disks[i].disk;
        uint64_t disk = size_of_node(ret, d->node),
                 scratch = size_of_node(ret, names_make(name, s->rig.id, NAMES_SCRATCH, i));

        s->disks[i].cluster = copy_cluster(ret, names_make(name, s->rig.id, NAMES_CBW, i));
        if (disk == d->size && s->place && scratch < disk)
            return failure_set(f, -ENOSPC,
                               "the scratch place of disk '%s' has %llu bytes and the disk %llu; it must be as large",
                               d->name, (unsigned long long)scratch, (unsigned long long)disk);
        if (disk != d->size || scratch < disk)
            return failure_set(f, -ESTALE, "disk '%s' was resized just now (%llu bytes, scratch %llu); try again",
                               d->name, (unsigned long long)disk, (unsigned long long)scratch);
    }
    return 0;
}

/*
 * A scratch file smaller than its disk is accepted by QEMU, and then a guest's write aborts it (all versions). From the
 * moment that the cbw node stands on the disk nobody can resize it any more, so here is the place to compare. Likewise
 * a snapshot that somebody takes now goes in between our filter and the disk; one taken before that left our filter on
 * what is now a backing image.
 */
static void compare_disks(struct session *s)
{
    calls_add(&s->rig.calls, "query-block", NULL, QMP_NO_FD, 0, on_roots);
    calls_add(&s->rig.calls, "query-named-block-nodes", qmp_args_query_named_block_nodes(), QMP_NO_FD, 0, on_sizes);
}

int step_compare_disks(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    compare_disks(s);
    return rig_wait(&s->rig, f);
}

static bool wants_records(const struct session *s, unsigned disk)
{
    for (unsigned k = 0; k < s->nsince; k++) {
        if (session_usable_since(s, disk, s->since[k]))
            return true;
    }
    return false;
}

/*
 * A raw node for each disk: "cut", whose file child the freeze replaces; and below it, where records are wanted, one
 * more: "pre", which only writes from before the freeze go through. A recording bitmap on pre, with the checkpoint's
 * record merged into it, is therefore exact at the instant of the freeze, although the guest's CPUs never stop.
 */
static void add_passthroughs(struct session *s)
{
    char pre[NAMES_SIZE], cut[NAMES_SIZE], since[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        const char *below = s->disks[i].disk->node;

        if (wants_records(s, i)) {
            names_make(pre, s->rig.id, NAMES_PRE, i);
            calls_add(&s->rig.calls, "blockdev-add", qmp_args_blockdev_add_raw(pre, below), QMP_NO_FD, i, NULL);
            below = pre;
        }
        names_make(cut, s->rig.id, NAMES_CUT, i);
        calls_add(&s->rig.calls, "blockdev-add", qmp_args_blockdev_add_raw(cut, below), QMP_NO_FD, i, NULL);
        for (unsigned k = 0; k < s->nsince; k++) {
            const struct checkpoint *c = session_usable_since(s, i, s->since[k]);
            struct qmp_bitmap b = {pre, names_make(since, s->rig.id, NAMES_SINCE, k)};

            if (c)
                calls_add(&s->rig.calls, "block-dirty-bitmap-add", qmp_args_bitmap_add(b, c->granularity, false, false),
                          QMP_NO_FD, i, NULL);
        }
    }
}

/*
 * All of it in one go: QEMU answers the two questions, in their turn, when the filters stand and before a device is
 * touched, and whatever is refused is undone with all that was not.
 */
static int filters_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    add_cbw(s);
    compare_disks(s);
    add_passthroughs(s);
    return rig_wait(&s->rig, f);
}

static int insert_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    session_set_drives(s, NAMES_CUT, NULL);
    return rig_wait(&s->rig, f);
}

static const struct disk *same_device(const struct disk_list *l, const struct disk *d)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        if (strcmp(l->disks[i].qom_path, d->qom_path) == 0)
            return &l->disks[i];
    }
    return NULL;
}

int session_other_layer(const struct disk *was, const char *now, struct failure *f)
{
    return failure_set(f, -ESTALE, "disk '%s' got another layer just now ('%s', was '%s'); try again", was->name,
                       now ? now : "none", was->top);
}

static void on_layers(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);
    struct rig *r = &s->rig;
    struct disk_list *now = NULL;
    struct failure mine = {0};

    if (f)
        (void)failure_copy(&mine, f);
    else
        (void)disk_list_parse(r->answers[0], r->answers[1], r->answers[2], &now, &mine);
    for (unsigned i = 0; now && i < r->ndisks; i++) {
        const struct disk *was = s->disks[i].disk, *is = same_device(now, was);

        if (!is || strcmp(is->node, was->node) != 0 || strcmp(is->top, was->top) != 0 ||
            !names_is_ours(root_of_device(r->answers[0], was->qdev)))
            (void)session_other_layer(was, is ? is->top : NULL, &mine);
    }
    rig_drop_answers(r);
    disk_list_free(now);
    seq_done(&r->seq, &mine);
}

/*
 * From "insert" on every write goes through pre, which records it whatever layer it ends in. A snapshot that somebody
 * took before that has a layer whose record nobody asked for: writes that went there past pre would be missing.
 */
int step_compare_layers(struct seq *q, struct failure *f)
{
    return rig_ask_graph(rig_of_seq(q), on_layers, f);
}

static int layers_up(struct seq *q, struct failure *f)
{
    return session_of_seq(q)->nsince ? step_compare_layers(q, f) : SEQ_DONE;
}

/* The record of every layer of the image that has it, into the recording bitmap on pre. */
static int records_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    struct json_object *args = qmp_args_transaction();
    char pre[NAMES_SIZE], since[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        for (unsigned k = 0; k < s->nsince; k++) {
            const struct checkpoint *c = session_usable_since(s, i, s->since[k]);
            struct qmp_bitmap target = {names_make(pre, s->rig.id, NAMES_PRE, i),
                                        names_make(since, s->rig.id, NAMES_SINCE, k)};

            for (size_t l = 0; c && l < c->nlayers; l++) {
                struct qmp_bitmap source = {c->layers[l].node, c->name};

                if (c->layers[l].merge)
                    qmp_action_bitmap_merge(args, target, &source, 1);
            }
        }
    }
    if (qmp_array_length(qmp_get(args, "actions")) == 0) {
        json_object_put(args);
        return SEQ_DONE;
    }
    calls_add(&s->rig.calls, "transaction", args, QMP_NO_FD, 0, NULL);
    return rig_wait(&s->rig, f);
}

/* -- after the freeze ---------------------------------------------------------------------------------------------- */

void session_add_view(struct session *s, unsigned disk, enum names_kind holder)
{
    struct json_object *args = qmp_args_transaction();
    char access[NAMES_SIZE], cbw[NAMES_SIZE], records[NAMES_SIZE], since[NAMES_SIZE];

    names_make(access, s->rig.id, NAMES_ACCESS, disk);
    names_make(records, s->rig.id, holder, disk);
    calls_add(&s->rig.calls, "blockdev-add",
              qmp_args_blockdev_add_snapshot_access(access, names_make(cbw, s->rig.id, NAMES_CBW, disk), s->give_back),
              QMP_NO_FD, disk, NULL);
    for (unsigned k = 0; k < s->nsince; k++) {
        const struct checkpoint *c = session_usable_since(s, disk, s->since[k]);
        struct qmp_bitmap target = {access, names_make(since, s->rig.id, NAMES_SINCE, k)},
                          source = {records, target.name};

        if (!c)
            continue;
        qmp_action_bitmap_add(args, target, c->granularity, false, true);
        qmp_action_bitmap_merge(args, target, &source, 1);
    }
    if (qmp_array_length(qmp_get(args, "actions")))
        calls_add(&s->rig.calls, "transaction", args, QMP_NO_FD, disk, NULL);
    else
        json_object_put(args);
}

/* The frozen view, with the temporary bitmaps on it; after this pre has done its work. */
static int access_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    char pre[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        session_add_view(s, i, NAMES_PRE);
        if (wants_records(s, i))
            calls_add(&s->rig.calls, "blockdev-del",
                      qmp_args_strings("node-name", names_make(pre, s->rig.id, NAMES_PRE, i), NULL), QMP_NO_FD, i,
                      NULL);
    }
    return rig_wait(&s->rig, f);
}

bool session_needs_allocation(const struct session *s, unsigned disk)
{
    const struct disk *d = s->disks[disk].disk;

    for (size_t i = 0; i < d->ncheckpoints; i++) {
        if (d->checkpoints[i].reason == REASON_NONE && d->checkpoints[i].allocation_levels)
            return true;
    }
    return false;
}

/* -- the private exports ------------------------------------------------------------------------------------------- */

int step_exports_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    _cleanup_free_ struct qmp_bitmap *bitmaps = calloc(s->nsince + 1, sizeof(*bitmaps));
    _cleanup_free_ char(*names)[NAMES_SIZE] = calloc(s->nsince + 1, sizeof(*names));
    char access[NAMES_SIZE], export[NAMES_SIZE];
    const char *view;

    if (!bitmaps || !names)
        return -ENOMEM;
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        size_t n = 0;

        view = session_view(s, i, access);
        names_make(export, s->rig.id, NAMES_EXPORT, i);
        for (unsigned k = 0; k < s->nsince; k++) {
            if (session_usable_since(s, i, s->since[k])) {
                bitmaps[n] = (struct qmp_bitmap){view, names_make(names[n], s->rig.id, NAMES_SINCE, k)};
                n++;
            }
        }
        calls_add(&s->rig.calls, "block-export-add",
                  qmp_args_export_add(export, view, NULL, QMP_EXPORT_DEPTH, bitmaps, n), QMP_NO_FD, i, NULL);
        if (s->give_back) {
            names_make(export, s->rig.id, NAMES_DISCARD, i);
            calls_add(&s->rig.calls, "block-export-add",
                      qmp_args_export_add(export, view, export, QMP_EXPORT_WRITABLE, NULL, 0), QMP_NO_FD, i, NULL);
        }
        if (!session_needs_allocation(s, i))
            continue;
        names_make(export, s->rig.id, NAMES_LAYER, i);
        calls_add(&s->rig.calls, "block-export-add",
                  qmp_args_export_add(export, s->disks[i].disk->top, export, QMP_EXPORT_DEPTH, NULL, 0), QMP_NO_FD, i,
                  NULL);
    }
    return rig_wait(&s->rig, f);
}

/* -- sources ------------------------------------------------------------------------------------------------------- */

static void on_source_lost(void *arg, const struct failure *why)
{
    struct session_disk *d = arg;

    session_lost_export(d, why->text);
}

/* Without it nothing is freed early, that is all. */
static void allow_giving_back(struct session_disk *d)
{
    struct session *s = d->session;
    char export[NAMES_SIZE];
    struct source_nbd_config config = {
        .socket_path = s->rig.server_address,
        .export_name = names_make(export, s->rig.id, NAMES_DISCARD, (unsigned)(d - s->disks)),
        .timeout_ms = s->rig.timeout_ms,
    };

    if (giveback_new(s->rig.loop, &config, d->cluster, d->source, &d->source) == 0)
        d->giving = d->source;
}

static void on_source_open(void *arg, struct source *source, const struct failure *f)
{
    struct session_disk *d = arg;

    d->opening = NULL;
    d->source = source;
    if (source)
        session_pair_source(d);
    if (source && d->session->give_back && d->cluster)
        allow_giving_back(d);
    d->bare = d->source;
    /* Without it clients that read one request at a time are slower, that is all. */
    if (source && ahead_new(d->session->rig.loop, &d->session->ahead_pool, d->source, &d->source) == 0)
        d->ahead = d->source;
    session_one_done(d->session, f);
}

int step_sources_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    char access[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct source_nbd_config config = {
            .socket_path = s->rig.server_address,
            .export_name = session_view(s, i, access),
            .cluster = s->narrow_reads ? COPY_CLUSTER : 0,
            .timeout_ms = s->rig.timeout_ms,
        };
        int r =
            source_nbd_open(s->rig.loop, &config, on_source_lost, on_source_open, &s->disks[i], &s->disks[i].opening);

        if (r < 0)
            (void)failure_set(&s->step_failure, r, "cannot connect to QEMU's export '%s': %s", config.export_name,
                              strerror(-r));
        else
            s->npending++;
    }
    return session_begun(s, f);
}

/* -- the table ----------------------------------------------------------------------------------------------------- */

/*
 * Order: snapshot-access before the switch, or switching back while it stands, is a "Permission conflict on node" in
 * QEMU. Our own NBD connections close before anything else is taken down: a client that QEMU waits for while it drains
 * freezes the guest. Copies that hang on stalled scratch do likewise: they are let go before anything drains, also
 * where the way up ended between the freeze and the sources. The first flush comes before all that drains the disks,
 * the second right before the freeze.
 *
 * The maps are read when the table's top is reached, while clients read data already (maps.c).
 *
 * A QEMU that is held because its guest has shut down ends with the undoing of the first row, when all else is undone.
 */
const struct seq_step session_steps[] = {
    {"hold", rig_hold, rig_no_hold, NULL},
    {"ask run state", step_run_state, NULL, NULL},
    {"ask guest agent", step_agent_up, step_agent_down, NULL},
    {"pass scratch files", step_scratch_up, rig_no_fds, NULL},
    {"add scratch places", places_up, rig_no_scratch_nodes, NULL},
    {"start NBD server", rig_server_up, rig_server_down, NULL},
    {"export live disks", step_live_exports_up, rig_no_exports, NULL},
    {"flush ahead", step_flush_ahead_up, NULL, NULL},
    {"copy-before-write", NULL, rig_no_cbw, NULL},
    {"add filters", filters_up, rig_no_passthroughs, NULL},
    {"insert", insert_up, rig_detach, NULL},
    {"compare layers", layers_up, NULL, NULL},
    {"copy records", records_up, NULL, NULL},
    {"flush again", step_flush_up, NULL, NULL},
    {"mark guest", step_mark_up, step_mark_down, NULL},
    {"quiesce guest", step_quiesce_up, step_quiesce_down, NULL},
    {"before the freeze", NULL, rig_thaw, NULL},
    {"freeze", step_freeze_up, rig_go_on, NULL},
    {"thaw guest", step_thaw_up, NULL, NULL},
    {"unmark guest", step_unmark_up, NULL, NULL},
    {"settle", step_settle_up, step_let_go, NULL},
    {"add snapshot-access", access_up, rig_no_access, NULL},
    {"lock", rig_lock, rig_no_locks, NULL},
    {"drop sockets", NULL, step_vhost_sockets_down, NULL},
    {"add exports", step_exports_up, rig_no_exports, NULL},
    {"open sources", step_sources_up, step_close_sources, step_probe_and_close},
    {"let go of scratch", NULL, step_let_go, step_let_go},
    {"keep checkpoint", NULL, step_keep_undo, step_keep},
};
const unsigned session_nsteps = ARRAY_SIZE(session_steps);
