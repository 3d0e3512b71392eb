/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/rig.h"

#include "backup/alive.h"
#include "backup/disks.h"
#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

int rig_init(struct rig *r, const struct rig_config *config, const struct seq_step *steps, unsigned nsteps,
             const struct seq_ops *ops)
{
    memset(r, 0, sizeof(*r));
    r->loop = config->loop;
    r->qmp = config->qmp;
    (void)strncat(r->id, config->id, sizeof(r->id) - 1);
    r->ndisks = config->ndisks;
    r->timeout_ms = config->timeout_ms;
    r->server_socket = config->server_socket;
    r->server_dir = config->server_dir;
    (void)snprintf(r->server_address, sizeof(r->server_address), "/proc/self/fd/%d/%s", config->server_dir,
                   config->server_socket);
    r->listen_fd = r->alive_fd = -1;
    r->only_export = NAMES_NKINDS;
    calls_init(&r->calls, r->qmp, r->timeout_ms);
    return seq_init(&r->seq, r->loop, steps, nsteps, ops);
}

void rig_drop_answers(struct rig *r)
{
    for (size_t i = 0; i < ARRAY_SIZE(r->answers); i++)
        json_object_put(TAKE_PTR(r->answers[i]));
}

static void close_listener(struct rig *r)
{
    if (r->listen_fd >= 0)
        (void)close(r->listen_fd);
    r->listen_fd = -1;
}

/* Without it another daemon on another monitor could sweep us away, and nothing else: so it may fail. */
void rig_announce(struct rig *r)
{
    (void)alive_hold(r->id, &r->alive_fd);
}

void rig_done(struct rig *r)
{
    if (r->alive_fd >= 0)
        (void)close(r->alive_fd);
    r->alive_fd = -1;
    qmp_watch_remove(&r->watch);
    rig_drop_answers(r);
    close_listener(r);
}

static void step_done(struct rig *r, const struct failure *f)
{
    rig_drop_answers(r);
    seq_done(&r->seq, f);
}

void rig_step_done(struct calls *c, const struct failure *f)
{
    step_done(rig_of_calls(c), f);
}

int rig_wait(struct rig *r, struct failure *f)
{
    return calls_wait(&r->calls, rig_step_done, f);
}

static bool is_mine(const struct rig *r, const char *name, enum names_kind *ret_kind)
{
    char id[NAMES_ID_SIZE];
    unsigned n;

    return names_parse(name, id, ret_kind, &n) && strcmp(id, r->id) == 0;
}

int rig_keep_answer(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct rig *r = rig_of_calls(c);

    json_object_put(r->answers[index]);
    r->answers[index] = json_object_get(ret);
    return 0;
}

int rig_ask_graph(struct rig *r, calls_done_cb done, struct failure *f)
{
    rig_drop_answers(r);
    calls_add(&r->calls, "query-block", NULL, QMP_NO_FD, 0, rig_keep_answer);
    calls_add(&r->calls, "query-named-block-nodes", qmp_args_query_named_block_nodes(), QMP_NO_FD, 1, rig_keep_answer);
    calls_add(&r->calls, "x-debug-query-block-graph", NULL, QMP_NO_FD, 2, rig_keep_answer);
    return calls_wait(&r->calls, done, f);
}

void rig_proceed(struct rig *r, int result, const struct failure *f)
{
    if (result != 0)
        step_done(r, result < 0 ? f : NULL);
}

/* -- nodes --------------------------------------------------------------------------------------------------------- */

static bool is_listed(const struct rig *r, enum names_kind kind)
{
    for (unsigned i = 0; i < r->nkinds; i++) {
        if (r->kinds[i] == kind)
            return true;
    }
    return false;
}

/* Deleting was refused; only a node that is still there makes that a failure. */
static void on_nodes_looked_up(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    bool left = false;

    for (size_t i = 0; !f && i < qmp_array_length(r->answers[1]); i++) {
        enum names_kind kind;
        const char *name = qmp_get_string(json_object_array_get_idx(r->answers[1], i), "node-name");

        left |= is_mine(r, name, &kind) && is_listed(r, kind);
    }
    step_done(r, f ? f : left ? &r->first : NULL);
}

static void on_nodes_deleted(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};

    if (!f || f->err == -ENOTCONN) {
        step_done(r, f);
        return;
    }
    r->first = *f;
    calls_add(&r->calls, "query-named-block-nodes", qmp_args_query_named_block_nodes(), QMP_NO_FD, 1, rig_keep_answer);
    rig_proceed(r, calls_wait(&r->calls, on_nodes_looked_up, &next), &next);
}

int rig_no_nodes(struct seq *s, const enum names_kind *kinds, unsigned nkinds, struct failure *f)
{
    struct rig *r = rig_of_seq(s);
    char name[NAMES_SIZE];

    r->kinds = kinds;
    r->nkinds = nkinds;
    for (unsigned k = 0; k < nkinds; k++) {
        for (unsigned i = 0; i < r->ndisks; i++) {
            names_make(name, r->id, kinds[k], i);
            calls_add(&r->calls, "blockdev-del", qmp_args_strings("node-name", name, NULL), QMP_NO_FD, i, NULL);
        }
    }
    return calls_wait(&r->calls, on_nodes_deleted, f);
}

int rig_no_access(struct seq *s, struct failure *f)
{
    static const enum names_kind kinds[] = {NAMES_ACCESS};

    return rig_no_nodes(s, kinds, ARRAY_SIZE(kinds), f);
}

int rig_no_passthroughs(struct seq *s, struct failure *f)
{
    static const enum names_kind kinds[] = {NAMES_CUT, NAMES_PRE};

    return rig_no_nodes(s, kinds, ARRAY_SIZE(kinds), f);
}

int rig_no_cbw(struct seq *s, struct failure *f)
{
    static const enum names_kind kinds[] = {NAMES_CBW};

    return rig_no_nodes(s, kinds, ARRAY_SIZE(kinds), f);
}

int rig_no_marks(struct seq *s, struct failure *f)
{
    static const enum names_kind kinds[] = {NAMES_QUIESCE};

    return rig_no_nodes(s, kinds, ARRAY_SIZE(kinds), f);
}

int rig_no_scratch_nodes(struct seq *s, struct failure *f)
{
    static const enum names_kind kinds[] = {NAMES_SCRATCH, NAMES_BASE};

    return rig_no_nodes(s, kinds, ARRAY_SIZE(kinds), f);
}

/* -- a guest that we paused ---------------------------------------------------------------------------------------- */

static int no_mark(struct rig *r, struct failure *f)
{
    static const enum names_kind kinds[] = {NAMES_PAUSED};
    char name[NAMES_SIZE];

    r->kinds = kinds;
    r->nkinds = ARRAY_SIZE(kinds);
    names_make(name, r->id, NAMES_PAUSED, 0);
    calls_add(&r->calls, "blockdev-del", qmp_args_strings("node-name", name, NULL), QMP_NO_FD, 0, NULL);
    return calls_wait(&r->calls, on_nodes_deleted, f);
}

static void on_went_on(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};

    if (f) {
        step_done(r, f);
        return;
    }
    r->pause = PAUSE_MARKED; /* whoever pauses it from now on, it was not us */
    rig_proceed(r, no_mark(r, &next), &next);
}

static void on_pause_looked_up(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    const char *status = qmp_get_string(r->answers[0], "status");
    struct failure next = {0};
    char name[NAMES_SIZE];
    bool marked = !f && graph_named(r->answers[1], names_make(name, r->id, NAMES_PAUSED, 0));

    if (f || !marked || !status || strcmp(status, "paused") != 0) {
        on_went_on(c, f);
        return;
    }
    calls_add(&r->calls, "cont", NULL, QMP_NO_FD, 0, NULL);
    if (calls_wait(&r->calls, on_went_on, &next) < 0)
        on_went_on(c, &next);
}

/* The mark goes after the guest goes on: whoever dies in between leaves a mark too many, never one too few. */
int rig_go_on(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);
    int result;

    if (r->pause == PAUSE_NONE)
        return SEQ_DONE;
    if (r->pause == PAUSE_MARKED)
        return no_mark(r, f);
    rig_drop_answers(r);
    calls_add(&r->calls, "query-status", NULL, QMP_NO_FD, 0, rig_keep_answer);
    calls_add(&r->calls, "query-named-block-nodes", qmp_args_query_named_block_nodes(), QMP_NO_FD, 1, rig_keep_answer);
    result = calls_wait(&r->calls, on_pause_looked_up, f);
    if (result == -ENOTCONN)
        result = f->err = -EAGAIN; /* it comes back within moments, and no other undo is as urgent */
    return result;
}

/* -- the freeze, undone -------------------------------------------------------------------------------------------- */

/*
 * As long as a cut node stands on a cbw node, the cbw node has a parent and lets nobody else write to the disk: the
 * device could not go back to it ("Permission conflict on node"). So the cut nodes go back first, all in one step.
 */
static void on_thaw_looked_up(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct json_object *args;
    struct failure next = {0};
    bool any = false;

    if (f) {
        step_done(r, f);
        return;
    }
    args = qmp_args_reopen();
    for (unsigned i = 0; i < r->ndisks; i++) {
        char cut[NAMES_SIZE];
        const char *child = graph_child(r->answers[2], names_make(cut, r->id, NAMES_CUT, i), "file");
        const char *below = child ? graph_first_foreign(r->answers[2], child) : NULL;
        enum names_kind kind;

        if (!below || !is_mine(r, child, &kind) || kind != NAMES_CBW)
            continue;
        qmp_args_reopen_raw(args, cut, below);
        any = true;
    }
    if (!any) {
        json_object_put(args);
        step_done(r, NULL);
        return;
    }
    calls_add(&r->calls, "blockdev-reopen", args, QMP_NO_FD, 0, NULL);
    rig_proceed(r, calls_wait(&r->calls, rig_step_done, &next), &next);
}

int rig_thaw(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);

    rig_drop_answers(r);
    calls_add(&r->calls, "x-debug-query-block-graph", NULL, QMP_NO_FD, 2, rig_keep_answer);
    return calls_wait(&r->calls, on_thaw_looked_up, f);
}

/* -- devices ------------------------------------------------------------------------------------------------------- */

/*
 * The guest's devices go back to the first node below that is not ours: not to a remembered one, because an external
 * snapshot taken meanwhile stands under our filter. Never to the node that is there already: that aborts QEMU (all
 * versions, assertion "old_bs != new_bs").
 */
static void on_detach_looked_up(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};

    if (f) {
        step_done(r, f);
        return;
    }
    for (size_t i = 0; i < qmp_array_length(r->answers[0]); i++) {
        struct json_object *entry = json_object_array_get_idx(r->answers[0], i);
        const char *qdev = qmp_get_string(entry, "qdev");
        const char *root = qmp_get_string(qmp_get(entry, "inserted"), "node-name");
        const char *below = graph_first_foreign(r->answers[2], root);
        _cleanup_free_ char *path = NULL;
        enum names_kind kind;

        if (!qdev || !is_mine(r, root, &kind) || kind == NAMES_BASE)
            continue;
        path = qdev_to_qom_path(qdev);
        if (!below || !path) {
            (void)failure_set(&r->calls.failure, -ENXIO,
                              "device '%s' stands on '%s', and below that is no node to go back to", qdev, root);
            continue;
        }
        calls_add(&r->calls, "qom-set", qmp_args_qom_set_drive(path, below), QMP_NO_FD, 0, NULL);
    }
    rig_proceed(r, calls_wait(&r->calls, rig_step_done, &next), &next);
}

int rig_detach(struct seq *s, struct failure *f)
{
    return rig_ask_graph(rig_of_seq(s), on_detach_looked_up, f);
}

/* -- exports ------------------------------------------------------------------------------------------------------- */

static int query_exports(struct rig *r, struct failure *f);

static void exports_gone(struct rig *r, const struct failure *f)
{
    qmp_watch_remove(&r->watch);
    step_done(r, f);
}

static void look_again(struct rig *r)
{
    struct failure f = {0};

    if (query_exports(r, &f) < 0)
        exports_gone(r, &f);
}

static void on_exports_deleted(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);

    if (f)
        (void)failure_copy(&r->first, f); /* what counts is whether they are still there */
    look_again(r);
}

static void on_export_deadline(struct seq *s)
{
    struct rig *r = rig_of_seq(s);
    struct failure f = {0};

    (void)failure_copy(&f, &r->first);
    (void)failure_set(&f, -ETIMEDOUT, "QEMU has not let go of an export within %u ms", r->timeout_ms);
    r->event_wanted = false;
    exports_gone(r, &f);
}

static void on_export_event(struct qmp_watch *w, const char *event, struct json_object *data)
{
    struct rig *r = container_of(w, struct rig, watch);

    r->event_seen = true;
    if (!r->event_wanted)
        return;
    r->event_wanted = false;
    (void)uv_timer_stop(&r->seq.timer);
    look_again(r);
}

static void on_exports_listed(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};
    unsigned nleft = 0;

    if (f) {
        exports_gone(r, f);
        return;
    }
    for (size_t i = 0; i < qmp_array_length(r->answers[0]); i++) {
        struct json_object *e = json_object_array_get_idx(r->answers[0], i);
        const char *id = qmp_get_string(e, "id");
        enum names_kind kind;

        if (!is_mine(r, id, &kind) || (r->only_export != NAMES_NKINDS && kind != r->only_export))
            continue;
        nleft++;
        if (qmp_get_bool(e, "shutting-down"))
            continue;
        if (r->first.err) { /* it was asked to go, and refused */
            exports_gone(r, &r->first);
            return;
        }
        calls_add(&r->calls, "block-export-del", qmp_args_export_del(id), QMP_NO_FD, 0, NULL);
    }
    if (nleft == 0) {
        exports_gone(r, NULL);
    } else if (r->calls.npending) {
        (void)calls_wait(&r->calls, on_exports_deleted, &next);
    } else if (r->calls.failure.err) { /* none could be sent */
        (void)calls_wait(&r->calls, on_exports_deleted, &next);
        exports_gone(r, &next);
    } else if (r->event_seen) {
        look_again(r);
    } else {
        r->event_wanted = true; /* they are shutting down: QEMU says when it is done */
        seq_deadline(&r->seq, r->timeout_ms, on_export_deadline);
    }
}

static int query_exports(struct rig *r, struct failure *f)
{
    r->event_seen = false;
    calls_add(&r->calls, "query-block-exports", NULL, QMP_NO_FD, 0, rig_keep_answer);
    return calls_wait(&r->calls, on_exports_listed, f);
}

int rig_no_exports(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);
    int result;

    memset(&r->first, 0, sizeof(r->first));
    r->event_wanted = false;
    qmp_watch_add(r->qmp, &r->watch, "BLOCK_EXPORT_DELETED", on_export_event, r);
    result = query_exports(r, f);
    if (result < 0)
        qmp_watch_remove(&r->watch);
    return result;
}

/* -- file descriptors and bitmaps ---------------------------------------------------------------------------------- */

static void on_fdsets(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};

    for (size_t i = 0; !f && i < qmp_array_length(r->answers[0]); i++) {
        struct json_object *set = json_object_array_get_idx(r->answers[0], i), *fds = qmp_get(set, "fds");
        bool mine = false;

        for (size_t k = 0; k < qmp_array_length(fds); k++) {
            enum names_kind kind;

            mine |= is_mine(r, qmp_get_string(json_object_array_get_idx(fds, k), "opaque"), &kind);
        }
        if (mine)
            calls_add(&r->calls, "remove-fd", qmp_args_remove_fd(qmp_get_int(set, "fdset-id")), QMP_NO_FD, 0, NULL);
    }
    if (f)
        step_done(r, f);
    else
        rig_proceed(r, calls_wait(&r->calls, rig_step_done, &next), &next);
}

int rig_no_fds(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);

    calls_add(&r->calls, "query-fdsets", NULL, QMP_NO_FD, 0, rig_keep_answer);
    return calls_wait(&r->calls, on_fdsets, f);
}

static void on_bitmaps(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};

    for (size_t i = 0; !f && i < qmp_array_length(r->answers[1]); i++) {
        struct json_object *node = json_object_array_get_idx(r->answers[1], i),
                           *bitmaps = qmp_get(node, "dirty-bitmaps");
        const char *node_name = qmp_get_string(node, "node-name");

        for (size_t k = 0; k < qmp_array_length(bitmaps); k++) {
            const char *name = qmp_get_string(json_object_array_get_idx(bitmaps, k), "name");
            enum names_kind kind;

            if (!is_mine(r, name, &kind) || names_is_ours(node_name))
                continue;
            calls_add(&r->calls, "block-dirty-bitmap-remove", qmp_args_strings("node", node_name, "name", name, NULL),
                      QMP_NO_FD, 0, NULL);
        }
    }
    if (f)
        step_done(r, f);
    else
        rig_proceed(r, calls_wait(&r->calls, rig_step_done, &next), &next);
}

int rig_no_bitmaps(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);

    calls_add(&r->calls, "query-named-block-nodes", qmp_args_query_named_block_nodes(), QMP_NO_FD, 1, rig_keep_answer);
    return calls_wait(&r->calls, on_bitmaps, f);
}

/* -- block jobs ---------------------------------------------------------------------------------------------------- */

static int query_jobs(struct rig *r, struct failure *f);

static void jobs_gone(struct rig *r, const struct failure *f)
{
    qmp_watch_remove(&r->watch);
    step_done(r, f);
}

static void on_jobs_told(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};

    if (f)
        (void)failure_copy(&r->first, f); /* what counts is whether they are still there */
    if (query_jobs(r, &next) < 0)
        jobs_gone(r, &next);
}

static void on_job_deadline(struct seq *s)
{
    struct rig *r = rig_of_seq(s);
    struct failure f = {0};

    (void)failure_copy(&f, &r->first);
    (void)failure_set(&f, -ETIMEDOUT, "QEMU has not ended a block job within %u ms", r->timeout_ms);
    r->event_wanted = false;
    jobs_gone(r, &f);
}

static void on_job_event(struct qmp_watch *w, const char *event, struct json_object *data)
{
    struct rig *r = container_of(w, struct rig, watch);
    struct failure next = {0};

    r->event_seen = true;
    if (!r->event_wanted)
        return;
    r->event_wanted = false;
    (void)uv_timer_stop(&r->seq.timer);
    if (query_jobs(r, &next) < 0)
        jobs_gone(r, &next);
}

/* One refused what it was told although it is not about to end: no event will come of it. */
static bool any_job_refuses(const struct rig *r)
{
    for (size_t i = 0; r->first.err && i < qmp_array_length(r->answers[0]); i++) {
        struct json_object *job = json_object_array_get_idx(r->answers[0], i);
        const char *status = qmp_get_string(job, "status");
        enum names_kind kind;

        if (is_mine(r, qmp_get_string(job, "id"), &kind) && !(status && strcmp(status, "aborting") == 0))
            return true;
    }
    return false;
}

/* Cancels each once, then waits for "concluded", the only state in which a job that is kept may be dismissed. */
static void on_jobs_listed(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};
    unsigned nleft = 0;

    if (f || any_job_refuses(r)) {
        jobs_gone(r, f ? f : &r->first);
        return;
    }
    for (size_t i = 0; i < qmp_array_length(r->answers[0]); i++) {
        struct json_object *job = json_object_array_get_idx(r->answers[0], i);
        const char *id = qmp_get_string(job, "id"), *status = qmp_get_string(job, "status");
        bool concluded = status && strcmp(status, "concluded") == 0;
        enum names_kind kind;

        if (!is_mine(r, id, &kind))
            continue;
        nleft++;
        if (concluded || !r->found)
            calls_add(&r->calls, concluded ? "job-dismiss" : "job-cancel", qmp_args_strings("id", id, NULL), QMP_NO_FD,
                      0, NULL);
    }
    r->found = true;
    if (nleft == 0) {
        jobs_gone(r, NULL);
    } else if (r->calls.npending) {
        (void)calls_wait(&r->calls, on_jobs_told, &next);
    } else if (r->calls.failure.err) { /* none could be sent */
        (void)calls_wait(&r->calls, on_jobs_told, &next);
        jobs_gone(r, &next);
    } else if (r->event_seen) {
        if (query_jobs(r, &next) < 0)
            jobs_gone(r, &next);
    } else {
        r->event_wanted = true;
        seq_deadline(&r->seq, r->timeout_ms, on_job_deadline);
    }
}

static int query_jobs(struct rig *r, struct failure *f)
{
    r->event_seen = false;
    calls_add(&r->calls, "query-jobs", NULL, QMP_NO_FD, 0, rig_keep_answer);
    return calls_wait(&r->calls, on_jobs_listed, f);
}

int rig_no_jobs(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);
    int result;

    memset(&r->first, 0, sizeof(r->first));
    r->event_wanted = r->found = false;
    qmp_watch_add(r->qmp, &r->watch, "JOB_STATUS_CHANGE", on_job_event, r);
    result = query_jobs(r, f);
    if (result < 0)
        qmp_watch_remove(&r->watch);
    return result;
}

/* -- work that blocks ---------------------------------------------------------------------------------------------- */

static void on_work(uv_work_t *w)
{
    struct rig *r = container_of(w, struct rig, work);

    r->work_fn(r);
}

static void after_work(uv_work_t *w, int status)
{
    struct rig *r = container_of(w, struct rig, work);

    r->work_after(r);
}

int rig_work(struct rig *r, void (*work)(struct rig *r), void (*after)(struct rig *r), struct failure *f)
{
    r->work_fn = work;
    r->work_after = after;
    memset(&r->work_failure, 0, sizeof(r->work_failure));
    return uv_queue_work(r->loop, &r->work, on_work, after_work);
}
