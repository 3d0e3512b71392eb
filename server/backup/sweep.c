/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/sweep.h"

#include "backup/alive.h"
#include "backup/hold.h"
#include "backup/lock.h"
#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>

/* More dead sessions than this in one QEMU are not believed; the rest waits for the next connection. */
#define SWEEP_MAX_IDS 64

struct sweep {
    struct sweep_config config;
    struct rig rig;     /* of the id under way */
    struct calls calls; /* of the search */
    sweep_cb cb;
    void *arg;
    struct {
        char id[NAMES_ID_SIZE];
        unsigned ndisks;
        bool quiesced; /* a mark says that the guest's file systems may be frozen */
        bool paused;
        enum hold hold;
    } found[SWEEP_MAX_IDS];
    unsigned nfound, next;
    bool others_live;
    bool exported_ours, exported_others; /* over QEMU's NBD server: by a session, by somebody else */
    char living[NAMES_ID_SIZE];
    struct failure problems;
};

static void on_guest_thawed(void *arg, const struct failure *f)
{
    struct sweep *s = arg;
    struct failure mine = {0};

    if (f) {
        seq_done(&s->rig.seq, f);
        return;
    }
    if (rig_no_marks(&s->rig.seq, &mine) != 0)
        seq_done(&s->rig.seq, &mine);
}

/* Only what a daemon of ours has frozen, which the mark says; it goes when the agent says that all is thawed. */
static int guest_thawed(struct seq *q, struct failure *f)
{
    struct sweep *s = container_of(rig_of_seq(q), struct sweep, rig);

    if (s->next == s->nfound || !s->found[s->next].quiesced || !s->config.quiesce)
        return SEQ_DONE;
    return quiesce_rescue(s->config.quiesce, on_guest_thawed, s, f);
}

/*
 * From the last row to the first. A backup job takes its filter away, so the frozen view on it goes before; a commit
 * has no such view. Its bitmaps can only be removed when it has ended.
 */
static const struct seq_step steps[] = {
    {"hold", NULL, rig_no_hold, NULL},
    {"fds", NULL, rig_no_fds, NULL},
    {"scratch nodes", NULL, rig_no_scratch_nodes, NULL},
    {"copy-before-write", NULL, rig_no_cbw, NULL},
    {"pass-throughs", NULL, rig_no_passthroughs, NULL},
    {"devices", NULL, rig_detach, NULL},
    {"freeze", NULL, rig_thaw, NULL},
    {"bitmaps", NULL, rig_no_bitmaps, NULL},
    {"block jobs", NULL, rig_no_jobs, NULL},
    {"snapshot-access", NULL, rig_no_access, NULL},
    {"locks", NULL, rig_no_locks, NULL},
    {"vhost socket", NULL, rig_no_vhost_fd, NULL},
    {"NBD server", NULL, rig_server_down, NULL},
    {"exports", NULL, rig_no_exports, NULL},
    {"frozen file systems", NULL, guest_thawed, NULL}, /* an agent answers only while its guest runs */
    {"scratch connections", NULL, rig_cut_scratch, NULL},
    {"pause", NULL, rig_go_on, NULL},
};

static void found(struct sweep *s, const char *name)
{
    char id[NAMES_ID_SIZE];
    enum names_kind kind;
    unsigned n, i;

    if (!names_parse(name, id, &kind, &n) || (s->living[0] && strcmp(id, s->living) == 0))
        return;
    for (i = 0; i < s->nfound && strcmp(s->found[i].id, id) != 0; i++)
        ;
    if (i == SWEEP_MAX_IDS)
        return;
    if (i == s->nfound)
        memcpy(s->found[s->nfound++].id, id, sizeof(id));
    s->found[i].ndisks = MAX(s->found[i].ndisks, n + 1);
    s->found[i].quiesced |= kind == NAMES_QUIESCE;
    s->found[i].paused |= kind == NAMES_PAUSED;
    if (kind == NAMES_HOLD)
        s->found[i].hold = MIN(HOLD_SHUTDOWN + n, HOLD_SHUTDOWN_AND_PANIC);
}

static int on_nodes(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct sweep *s = container_of(c, struct sweep, calls);

    for (size_t i = 0; i < qmp_array_length(ret); i++) {
        struct json_object *node = json_object_array_get_idx(ret, i), *bitmaps = qmp_get(node, "dirty-bitmaps");

        found(s, qmp_get_string(node, "node-name"));
        for (size_t k = 0; k < qmp_array_length(bitmaps); k++)
            found(s, qmp_get_string(json_object_array_get_idx(bitmaps, k), "name"));
    }
    return 0;
}

static int on_exports(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct sweep *s = container_of(c, struct sweep, calls);

    for (size_t i = 0; i < qmp_array_length(ret); i++) {
        struct json_object *export = json_object_array_get_idx(ret, i);
        const char *type = qmp_get_string(export, "type");

        found(s, qmp_get_string(export, "id"));
        if (type && strcmp(type, "nbd") == 0) {
            s->exported_ours |= names_is_ours(qmp_get_string(export, "id"));
            s->exported_others |= !names_is_ours(qmp_get_string(export, "id"));
        }
    }
    return 0;
}

static int on_fdsets(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct sweep *s = container_of(c, struct sweep, calls);

    for (size_t i = 0; i < qmp_array_length(ret); i++) {
        struct json_object *fds = qmp_get(json_object_array_get_idx(ret, i), "fds");

        for (size_t k = 0; k < qmp_array_length(fds); k++)
            found(s, qmp_get_string(json_object_array_get_idx(fds, k), "opaque"));
    }
    return 0;
}

static int on_jobs(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct sweep *s = container_of(c, struct sweep, calls);

    for (size_t i = 0; i < qmp_array_length(ret); i++)
        found(s, qmp_get_string(json_object_array_get_idx(ret, i), "id"));
    return 0;
}

static void next_id(struct sweep *s);

static void on_top(struct seq *q)
{
}

static void on_failed(struct seq *q, const struct failure *why)
{
}

static void on_end(struct seq *q, const struct failure *problems)
{
    struct sweep *s = container_of(rig_of_seq(q), struct sweep, rig);

    if (problems->err)
        (void)failure_copy(&s->problems, problems);
    rig_done(&s->rig);
    s->next++;
    next_id(s);
}

static const struct seq_ops ops = {.on_top = on_top, .on_failed = on_failed, .on_end = on_end};

/* One more walk than ids, with nothing but the NBD server in it: a daemon may die with only that standing. */
static void next_id(struct sweep *s)
{
    bool last = s->next == s->nfound;
    struct rig_config rig = {
        .loop = s->config.loop,
        .qmp = s->config.qmp,
        .id = last ? NAMES_ID_SERVER : s->found[s->next].id,
        .ndisks = last ? 0 : s->found[s->next].ndisks,
        .timeout_ms = s->config.timeout_ms,
        .server_socket = s->config.server_socket,
        .server_dir = s->config.server_dir,
    };

    if (s->next > s->nfound || (last && s->others_live)) {
        s->cb(s->arg, s->nfound, s->problems.err ? &s->problems : NULL);
        free(s);
        return;
    }
    (void)rig_init(&s->rig, &rig, steps, ARRAY_SIZE(steps), &ops); /* a timer only: cannot fail */
    /*
     * A session exports nothing over a server that it has not started. So one that has an export there has left us the
     * server, too, wherever its socket was: the dead one may have had another state directory.
     */
    s->rig.server = s->exported_ours && !s->exported_others && !s->others_live ? SERVER_OURS : SERVER_UNKNOWN;
    s->exported_ours = false;
    s->rig.pause = !last && s->found[s->next].paused ? PAUSE_OURS : PAUSE_NONE;
    s->rig.hold = last ? HOLD_NONE : s->found[s->next].hold;
    seq_start_at_top(&s->rig.seq);
    seq_stop(&s->rig.seq, false);
}

/*
 * Another qpulld or nbdkit looks after this QEMU over another monitor. Its NBD server is not touched, either: where all
 * sessions are dead the last walk sees to that.
 */
static void spare_the_living(struct sweep *s)
{
    unsigned n = 0;

    for (unsigned i = 0; i < s->nfound; i++) {
        uid_t uid;
        pid_t pid = alive_holder(s->found[i].id, &uid);
        char who[64] = "one that does not tell who it is";

        if (pid > 0)
            (void)snprintf(who, sizeof(who), "process %d, user %u", (int)pid, (unsigned)uid);
        if (pid)
            (void)failure_set(&s->problems, -EBUSY,
                              "another qpulld or nbdkit (%s) is at work in this QEMU over another monitor "
                              "(session %s); pull through that one, or wait for its end",
                              who, s->found[i].id);
        else
            s->found[n++] = s->found[i];
    }
    s->others_live = n < s->nfound;
    s->nfound = n;
}

/* A guest that was left paused goes on before anything else is done. */
static void paused_first(struct sweep *s)
{
    for (unsigned i = 1; i < s->nfound; i++) {
        typeof(s->found[0]) it = s->found[i];

        if (!it.paused)
            continue;
        memmove(&s->found[1], &s->found[0], i * sizeof(it));
        s->found[0] = it;
    }
}

static void on_searched(struct calls *c, const struct failure *f)
{
    struct sweep *s = container_of(c, struct sweep, calls);

    if (f || s->config.only_look) {
        s->cb(s->arg, f ? 0 : s->nfound, f);
        free(s);
        return;
    }
    spare_the_living(s);
    paused_first(s);
    next_id(s);
}

int sweep_start(const struct sweep_config *config, sweep_cb cb, void *arg, struct failure *f)
{
    struct sweep *s = calloc(1, sizeof(*s));
    int r;

    if (!s)
        return failure_set(f, -ENOMEM, "out of memory");
    s->config = *config;
    if (config->living)
        (void)strncat(s->living, config->living, sizeof(s->living) - 1);
    s->cb = cb;
    s->arg = arg;
    calls_init(&s->calls, config->qmp, config->timeout_ms);
    calls_add(&s->calls, "query-named-block-nodes", qmp_args_query_named_block_nodes(), QMP_NO_FD, 0, on_nodes);
    calls_add(&s->calls, "query-block-exports", NULL, QMP_NO_FD, 0, on_exports);
    calls_add(&s->calls, "query-fdsets", NULL, QMP_NO_FD, 0, on_fdsets);
    calls_add(&s->calls, "query-jobs", NULL, QMP_NO_FD, 0, on_jobs);
    r = calls_wait(&s->calls, on_searched, f);
    if (r < 0)
        free(s);
    return r;
}
