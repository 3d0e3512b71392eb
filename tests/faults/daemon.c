/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon.h"

#include "backup/selftest.h"
#include "backup/sweep.h"
#include "die.h"
#include "nbd/nbd.h"
#include "qmp/commands.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#define DIRTY "qemu:dirty-bitmap:old"
#define ALLOCATION "base:allocation"

/* -- what is read at the top --------------------------------------------------------------------------------------- */

static bool is_filled(const unsigned char *data, unsigned char pattern)
{
    return data[0] == pattern && memcmp(data, data + 1, GUEST_CLUSTER - 1) == 0;
}

/* The flags of one cluster, if they are the same all over it; else -1. */
static int64_t flags_of(const struct map *m, unsigned cluster)
{
    struct map_extent e[2];
    size_t n = map_extents(m, (uint64_t)cluster * GUEST_CLUSTER, GUEST_CLUSTER, e, ARRAY_SIZE(e));

    return n == 1 ? (int64_t)e[0].flags : -1;
}

static void check_maps(struct daemon *d, unsigned disk, const char *when, bool may_be_more)
{
    const char *name = d->list->disks[disk].name;
    const struct map *dirty = session_map(d->session, name, DIRTY),
                     *allocation = session_map(d->session, name, ALLOCATION);
    const struct guest_disk *want = &d->model->disks[disk];

    if (!dirty || !allocation || map_length(dirty) != GUEST_SIZE || map_length(allocation) != GUEST_SIZE) {
        (void)failure_set(&d->check, -EILSEQ, "%s: disk %u has not got its maps", when, disk);
        return;
    }
    for (unsigned c = 0; c < GUEST_NCLUSTERS; c++) {
        int64_t is_dirty = flags_of(dirty, c), flags = flags_of(allocation, c);

        if (is_dirty != want->before[c] && !(may_be_more && is_dirty == 1 && want->after[c]))
            (void)failure_set(&d->check, -EILSEQ,
                              "%s: the dirty map of disk %u says %lld of cluster %u, which was%s written", when, disk,
                              (long long)is_dirty, c, want->before[c] ? "" : " not");
        if (want->frozen[c] && (flags < 0 || (flags & NBD_STATE_ZERO)))
            (void)failure_set(&d->check, -EILSEQ,
                              "%s: the allocation map of disk %u says %lld of cluster %u, which has data", when, disk,
                              (long long)flags, c);
    }
}

static void finish_top(struct daemon *d)
{
    if (d->stopped)
        return;
    d->finished = !d->nbroken;
    if (d->config.at_top)
        d->config.at_top(d->config.arg);
    for (unsigned i = 0; i < d->list->ndisks; i++) {
        if (!d->read_failed && (d->config.keep & (1u << i))) {
            session_keep(d->session, d->list->disks[i].name);
            d->wants_checkpoint = true;
        }
    }
    daemon_stop(d);
}

static void on_asked(struct session_ask *a, const struct failure *f)
{
    struct daemon *d = container_of(a, struct daemon, ask);

    d->nbroken += f != NULL;
    if (!f && !d->stopped && d->model)
        check_maps(d, 0, "asked later", true);
    finish_top(d);
}

/* Of the disk at hand, or of all. */
static bool waits_for_maps(const struct daemon *d)
{
    bool waits = false;

    for (unsigned i = d->disk < d->list->ndisks && d->model ? d->disk : 0; i < d->list->ndisks; i++) {
        const char *name = d->list->disks[i].name;

        waits |= session_expects_map(d->session, name, DIRTY) || session_expects_map(d->session, name, ALLOCATION);
    }
    return waits;
}

/* Also where nobody looks at the maps: how many commands there are is not a matter of chance. */
static void ask_one_more(struct daemon *d)
{
    d->waits_for_maps = waits_for_maps(d);
    if (d->waits_for_maps)
        return;
    if (d->config.ask && session_ask_start(d->session, &d->ask, d->list->disks[0].name, "old", on_asked) == 0)
        return;
    finish_top(d);
}

static void read_next(struct daemon *d);

static void check_read(struct daemon *d)
{
    for (unsigned i = 0; i < DAEMON_READ_CLUSTERS; i++) {
        const unsigned char *data = d->buffer + (size_t)i * GUEST_CLUSTER;
        unsigned char want = d->model->disks[d->disk].frozen[d->cluster + i];

        if (!is_filled(data, want))
            (void)failure_set(&d->check, -EILSEQ, "disk %u, cluster %u reads 0x%02x…, at the freeze it was 0x%02x",
                              d->disk, d->cluster + i, data[0], want);
    }
}

static void on_read(struct source_read *r, int err)
{
    struct daemon *d = r->arg;

    if (d->stopped)
        return; /* what QEMU has sent of it may still lie in the socket: it counts as being read */
    d->reading = false;
    if (err && d->config.impatient) {
        d->read_failed = true;
        d->nbroken++;
        finish_top(d);
        return;
    }
    if (err)
        (void)failure_set(&d->check, err, "disk %u, cluster %u cannot be read: %s", d->disk, d->cluster,
                          strerror(-err));
    else
        check_read(d);
    d->cluster += DAEMON_READ_CLUSTERS;
    read_next(d);
}

static_assert(GUEST_NCLUSTERS % DAEMON_READ_CLUSTERS == 0, "reads end where the disk ends");

static void read_next(struct daemon *d)
{
    struct source *source;

    if (d->cluster == GUEST_NCLUSTERS && waits_for_maps(d)) {
        d->waits_for_maps = true;
        return;
    }
    if (d->cluster == GUEST_NCLUSTERS) {
        check_maps(d, d->disk, "at the freeze", false);
        d->cluster = 0;
        d->disk++;
    }
    if (d->disk == d->list->ndisks) {
        ask_one_more(d);
        return;
    }
    d->read = (struct source_read){.offset = (uint64_t)d->cluster * GUEST_CLUSTER,
                                   .length = sizeof(d->buffer),
                                   .buffer = d->buffer,
                                   .cb = on_read,
                                   .arg = d};
    source = session_source(d->session, d->list->disks[d->disk].name);
    d->reading = source && source_read(source, &d->read) == 0;
    if (!d->reading) {
        d->read_failed = true;
        d->nbroken++;
        if (!d->config.impatient)
            (void)failure_set(&d->check, -EIO, "disk %u has no source that can be read", d->disk);
        finish_top(d);
    }
}

/* -- the session --------------------------------------------------------------------------------------------------- */

static void on_up(void *arg)
{
    struct daemon *d = arg;

    d->nup++;
    d->nlate += d->stopped;
    if (d->stopped)
        return;
    if (d->model)
        read_next(d);
    else
        ask_one_more(d);
}

static void on_maps(void *arg)
{
    struct daemon *d = arg;

    d->nlate += d->stopped || d->nfailed;
    if (!d->waits_for_maps)
        return;
    d->waits_for_maps = false;
    if (d->model && d->disk < d->list->ndisks)
        read_next(d);
    else
        ask_one_more(d);
}

static void on_failed(void *arg, const struct failure *why)
{
    struct daemon *d = arg;

    d->nfailed++;
    d->nlate += d->stopped;
    d->failure = *why;
    daemon_stop(d);
}

static void on_down(void *arg, const struct failure *problems)
{
    struct daemon *d = arg;

    d->ndown++;
    d->problems = *problems;
    if (d->vhost_room.used)
        (void)failure_set(&d->check, -EBUSY, "%zu bytes are still shared with QEMU", d->vhost_room.used);
    d->session = NULL;
}

static void on_trace(void *arg, const char *text)
{
    const struct daemon *d = arg;

    if (d->config.verbose)
        (void)fprintf(stderr, "      | %s\n", text);
}

static const struct session_ops session_ops = {
    .on_up = on_up,
    .on_maps = on_maps,
    .on_failed = on_failed,
    .on_down = on_down,
    .on_trace = on_trace,
};

static void start_session(struct daemon *d)
{
    static const char *const since[] = {"old"};
    struct session_config config = {
        .loop = d->loop,
        .qmp = d->qmp,
        .vm = DAEMON_VM,
        .disks = d->list,
        .checkpoint = GUEST_CHECKPOINT,
        .since = since,
        .nsince = 1,
        .scratch_dir = d->guest->scratch,
        .state_dir = d->state_dir,
        .engine = d->config.job ? ENGINE_JOB : ENGINE_CBW,
        .narrow_reads = d->config.narrow_reads,
        .cbw_timeout_s = GUEST_CBW_TIMEOUT_S,
        .give_back = true,            /* one more export for each disk */
        .vhost_room = &d->vhost_room, /* and another */
        .call_timeout_ms = d->config.timeout_ms,
    };
    struct failure f = {0};

    d->vhost_room.limit = SIZE_MAX;
    if (session_start(&config, &session_ops, d, &d->session, &f) < 0)
        die("the session does not start: %s", f.text);
}

void daemon_stop(struct daemon *d)
{
    d->stopped = true;
    if (d->session)
        session_stop(d->session);
}

static int keep_answer(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    container_of(c, struct daemon, calls)->answers[index] = json_object_get(ret);
    return 0;
}

static void on_disks(struct calls *c, const struct failure *f)
{
    struct daemon *d = container_of(c, struct daemon, calls);
    struct failure mine = {0};

    if (f || disk_list_parse(d->answers[0], d->answers[1], d->answers[2], &d->list, &mine) < 0)
        die("QEMU's disks: %s", f ? f->text : mine.text);
    for (size_t i = 0; i < ARRAY_SIZE(d->answers); i++)
        json_object_put(TAKE_PTR(d->answers[i]));
    if (d->list->ndisks != d->guest->ndisks)
        die("QEMU has %zu disks", d->list->ndisks);
    start_session(d);
}

static void ask_for_disks(struct daemon *d)
{
    struct failure f = {0};

    calls_add(&d->calls, "query-block", NULL, QMP_NO_FD, 0, keep_answer);
    calls_add(&d->calls, "query-named-block-nodes", qmp_args_query_named_block_nodes(), QMP_NO_FD, 1, keep_answer);
    calls_add(&d->calls, "x-debug-query-block-graph", NULL, QMP_NO_FD, 2, keep_answer);
    if (calls_wait(&d->calls, on_disks, &f) < 0)
        die("QEMU cannot be asked for its disks: %s", f.text);
}

/* -- the other tasks ----------------------------------------------------------------------------------------------- */

static void on_tested(void *arg, bool narrow, const struct failure *f, const struct failure *problems)
{
    struct daemon *d = arg;

    d->nended++;
    d->narrow = narrow;
    if (f)
        d->failure = *f;
    d->problems = *problems;
}

static void start_selftest(struct daemon *d)
{
    struct selftest_config config = {
        .loop = d->loop,
        .qmp = d->qmp,
        .server_socket = DAEMON_SERVER_SOCKET,
        .server_dir = d->state_dir,
        .timeout_ms = d->config.timeout_ms,
    };

    if (selftest_start(&config, on_tested, d) < 0)
        die("the self-test does not start");
}

static void on_swept(void *arg, unsigned nsessions, const struct failure *f)
{
    struct daemon *d = arg;

    d->nended++;
    d->nswept = nsessions;
    if (f)
        d->failure = *f;
}

static void start_sweep(struct daemon *d)
{
    struct sweep_config config = {
        .loop = d->loop,
        .qmp = d->qmp,
        .server_socket = DAEMON_SERVER_SOCKET,
        .server_dir = d->state_dir,
        .timeout_ms = d->config.timeout_ms,
    };
    struct failure f = {0};

    if (sweep_start(&config, on_swept, d, &f) < 0)
        die("the sweep does not start: %s", f.text);
}

/* -- the connection ------------------------------------------------------------------------------------------------ */

static void on_ready(void *arg, struct json_object *greeting)
{
    struct daemon *d = arg;

    if (d->begun)
        return;
    d->begun = true;
    switch (d->config.task) {
    case DAEMON_SESSION:
        ask_for_disks(d);
        break;
    case DAEMON_SELFTEST:
        start_selftest(d);
        break;
    case DAEMON_SWEEP:
        start_sweep(d);
        break;
    }
}

static void on_lost(void *arg, const struct failure *why)
{
    struct daemon *d = arg;

    if (d->config.verbose)
        (void)fprintf(stderr, "      | lost: %s\n", why->text);
    if (d->session)
        session_fail(d->session, why);
}

static const struct qmp_client_ops client_ops = {.on_ready = on_ready, .on_lost = on_lost};

void daemon_start(struct daemon *d, uv_loop_t *loop, const char *path, const struct guest *g, const struct guest *model,
                  const struct daemon_config *config)
{
    /* A connection that was cut comes back soon: the walk down meets both a dead and a new one. */
    static const struct qmp_client_limits limits = {.reconnect_min_ms = 20, .reconnect_max_ms = 100};

    memset(d, 0, sizeof(*d));
    d->loop = loop;
    d->guest = g;
    d->model = model;
    d->config = *config;
    d->state_dir = open(g->state, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (d->state_dir < 0 || qmp_client_new(loop, path, &client_ops, d, &limits, &d->qmp) < 0 ||
        qmp_client_open(d->qmp) < 0)
        die("the QMP client does not start: %s", strerror(errno));
    calls_init(&d->calls, d->qmp, config->timeout_ms);
}

void daemon_again(struct daemon *d)
{
    disk_list_free(TAKE_PTR(d->list));
    d->waits_for_maps = d->reading = d->read_failed = false;
    d->nup = d->nfailed = d->ndown = d->nended = d->nbroken = d->nlate = d->nswept = 0;
    d->stopped = d->wants_checkpoint = d->finished = d->begun = false;
    d->failure = d->problems = d->check = (struct failure){0};
    d->disk = d->cluster = 0;
}

bool daemon_is_over(const struct daemon *d)
{
    return d->ndown || d->nended;
}

static void on_closed(void *arg)
{
    struct daemon *d = arg;

    disk_list_free(TAKE_PTR(d->list));
    (void)close(d->state_dir);
    d->closed = true;
}

void daemon_close(struct daemon *d)
{
    qmp_client_close(TAKE_PTR(d->qmp), on_closed, d);
}
