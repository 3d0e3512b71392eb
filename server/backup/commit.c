/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The order of a commit; why it is this one stands in docs/decisions/0007-commit.md. The job never changes the graph by
 * itself: an active one stops at "ready" and waits for job-complete, another at "pending" and waits for job-finalize.
 * (An active one is not held at "pending": it keeps the guest's I/O stopped there.)
 */
#include "backup/commit_impl.h"

#include "source/nbd.h"

#include <errno.h>
#include <stdio.h>

#define COMMIT_TICK_MS 1000u /* how often the job's progress is asked for */
/* A job is given up that has not moved for so long: storage hangs. So is one that cannot finish: the guest writes
 * faster than QEMU copies. */
#define COMMIT_STALL_MS (UINT64_C(10) * 60000)

void commit_go_on(struct commit *c, int result, const struct failure *f)
{
    if (result != 0)
        rig_step_done(&c->rig.calls, result < 0 ? f : NULL);
}

/* -- the look ------------------------------------------------------------------------------------------------------ */

/* Nodes of a powered-off VM's images have no names that anybody knows. */
static const char *name_of(const struct commit *c, size_t layer)
{
    return c->still_socket ? chain_file(&c->chain, layer) : chain_node(&c->chain, layer);
}

static int find_ends(struct commit *c, size_t *ret_top, size_t *ret_base, struct failure *f)
{
    const struct chain *chain = &c->chain;
    size_t top = 0, base = 0;
    int r;

    if (chain->nlayers < 2)
        return failure_set(f, -EINVAL, "image '%s' has no backing image: there is nothing to commit into",
                           name_of(c, 0));
    if (c->top && (r = chain_find(chain, c->top, &top, f)) < 0)
        return r;
    base = c->shallow ? top + 1 : chain->nlayers - 1;
    if (c->base && (r = chain_find(chain, c->base, &base, f)) < 0)
        return r;
    if (base <= top || base >= chain->nlayers)
        return base == top || base >= chain->nlayers
                   ? failure_set(f, -EINVAL,
                                 "image '%s' cannot be committed into itself, or into nothing: it has no "
                                 "backing image",
                                 name_of(c, top))
                   : failure_set(f, -EINVAL, "base '%s' lies above top '%s'; data are committed downwards",
                                 name_of(c, base), name_of(c, top));
    if (top == 0 && !c->active && c->still_socket)
        return failure_set(
            f, -EINVAL,
            "top '%s' is the image that the VM is started with: say --active if it is to be committed, or "
            "name another --top",
            name_of(c, 0));
    if (top == 0 && !c->active)
        return failure_set(f, -EINVAL,
                           "top '%s' is the live image: say --active if the guest is to go on in '%s', or name another "
                           "--top",
                           name_of(c, 0), name_of(c, base));
    if (top != 0 && c->active)
        return failure_set(f, -EINVAL, "--active is for a commit of the live image '%s', and top is '%s'",
                           name_of(c, 0), name_of(c, top));
    *ret_top = top;
    *ret_base = base;
    return 0;
}

static int check_losses(const struct commit *c, struct failure *f)
{
    for (size_t i = 0; i < c->plan.nrecords; i++) {
        const struct commit_record *r = &c->plan.records[i];

        if (r->action != COMMIT_DROP)
            continue;
        if (!c->force)
            return failure_set(f, -ENOTSUP,
                               "base '%s' is %s and keeps no bitmaps, checkpoint '%s' would be lost; --force accepts "
                               "that",
                               name_of(c, c->plan.base), qmp_get_string(c->chain.layers[c->plan.base], "drv"), r->name);
        if (r->needs_store)
            return failure_set(
                f, -ENOTSUP,
                "base '%s' keeps no bitmaps, and what an image above top that cannot be written holds of "
                "checkpoint '%s' would pass for the whole; delete that checkpoint first",
                name_of(c, c->plan.base), r->name);
    }
    return 0;
}

static int look(struct commit *c, struct failure *f)
{
    const char *job;
    size_t top = 0, base = 0;
    int r = chain_init(&c->chain, c->rig.answers[1], c->rig.answers[2], c->node, f);

    if (r < 0 || (r = find_ends(c, &top, &base, f)) < 0)
        return r;
    c->chain.dead = (const char *const *)c->dead;
    c->chain.ndead = c->ndead;
    job = chain_job(&c->chain, NULL);
    if (job)
        return failure_set(f, -EBUSY, "block job '%s' works on this disk; try again when it has ended", job);
    if (chain_size(&c->chain, base) > chain_size(&c->chain, top))
        return failure_set(f, -EINVAL, "base '%s' is larger than top '%s' (%llu and %llu bytes)", name_of(c, base),
                           name_of(c, top), (unsigned long long)chain_size(&c->chain, base),
                           (unsigned long long)chain_size(&c->chain, top));
    c->top_node = strdup(chain_node(&c->chain, top));
    c->base_node = strdup(chain_node(&c->chain, base));
    c->live_node = strdup(chain_node(&c->chain, 0));
    c->top_file = strdup(chain_file(&c->chain, top));
    c->base_file = strdup(chain_file(&c->chain, base));
    if (!c->top_node || !c->base_node || !c->live_node || !c->top_file || !c->base_file)
        return failure_set(f, -ENOMEM, "out of memory");
    if ((r = commit_plan_make(&c->plan, &c->chain, top, base, f)) < 0 || (r = check_losses(c, f)) < 0)
        return r;
    return (r = commit_files_note(c, f)) < 0 ? r : commit_live_look(c, f);
}

static void looked(struct commit *c, const struct failure *f)
{
    if (!f)
        c->ops->on_started(c->arg);
    rig_step_done(&c->rig.calls, f);
}

static void after_files(struct rig *r)
{
    looked(commit_of_rig(r), r->work_failure.err ? &r->work_failure : NULL);
}

static void on_look(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    struct failure mine = {0};

    if (!f && (look(c, &mine) < 0 || (c->delete &&commit_files_check(c, after_files, &mine) < 0)))
        f = &mine;
    if (f || !c->delete)
        looked(c, f);
}

static int step_look(struct seq *s, struct failure *f)
{
    return rig_ask_graph(rig_of_seq(s), on_look, f);
}

/* -- the job ------------------------------------------------------------------------------------------------------- */

/* The device is the root, so that filters of others above the live image stay where they are. */
static int step_job(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    c->begun = true;
    calls_add(&c->rig.calls, "block-commit",
              qmp_args_block_commit(c->job, c->node, c->top_node, c->base_node, c->active, 0), QMP_NO_FD, 0, NULL);
    return rig_wait(&c->rig, f);
}

static void job_look(struct commit *c);

static void end_wait(struct commit *c, const struct failure *f)
{
    qmp_watch_remove(&c->job_watch);
    c->wanted = NULL;
    rig_step_done(&c->rig.calls, f);
}

static void on_job_tick(struct seq *s)
{
    job_look(commit_of_seq(s));
}

static void on_job_event(struct qmp_watch *w, const char *event, struct json_object *data)
{
    struct commit *c = container_of(w, struct commit, job_watch);
    const char *id = qmp_get_string(data, "id");

    if (!id || strcmp(id, c->job) != 0)
        return;
    c->event_seen = true;
    if (c->armed) {
        (void)uv_timer_stop(&c->rig.seq.timer);
        job_look(c);
    }
}

static int on_jobs(struct calls *calls, unsigned index, struct json_object *ret, struct failure *f)
{
    struct commit *c = commit_of_calls(calls);

    c->seen.listed = false;
    for (size_t i = 0; i < qmp_array_length(ret); i++) {
        struct json_object *job = json_object_array_get_idx(ret, i);
        const char *id = qmp_get_string(job, "id"), *status = qmp_get_string(job, "status");
        const char *error = qmp_get_string(job, "error");
        uint64_t current = (uint64_t)qmp_get_int(job, "current-progress");

        if (!id || strcmp(id, c->job) != 0)
            continue;
        if (current != c->seen.current && !c->finishing)
            c->changed_at_ms = uv_now(c->rig.loop);
        c->seen.listed = true;
        c->seen.current = current;
        c->seen.total = (uint64_t)qmp_get_int(job, "total-progress");
        (void)snprintf(c->seen.status, sizeof(c->seen.status), "%s", status ? status : "");
        (void)snprintf(c->seen.error, sizeof(c->seen.error), "%s", error ? error : "");
    }
    return 0;
}

/* 1: the wait is over; 0: not yet; negative: it is over badly. */
static int judge_job(struct commit *c, struct failure *f)
{
    bool concluded = strcmp(c->seen.status, "concluded") == 0;

    if (!c->seen.listed)
        return failure_set(f, -EPIPE, "block job '%s' is gone from QEMU: somebody else has ended it", c->job);
    if (concluded && *c->seen.error)
        return failure_set(f, -EREMOTEIO, "QEMU's commit job failed: %s", c->seen.error);
    if (strcmp(c->seen.status, c->wanted) == 0)
        return 1;
    if (concluded)
        return failure_set(f, -EPIPE, "block job '%s' ended before its time: somebody else meddled with it", c->job);
    if (c->rig.seq.stopping && !c->finishing)
        return 1;
    if (uv_now(c->rig.loop) - c->changed_at_ms > COMMIT_STALL_MS)
        return failure_set(f, -ETIMEDOUT, "QEMU's commit job stands at \"%s\", %llu of %llu bytes, since %u minutes",
                           c->seen.status, (unsigned long long)c->seen.current, (unsigned long long)c->seen.total,
                           (unsigned)(COMMIT_STALL_MS / 60000));
    return 0;
}

static void on_job_looked(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    struct failure mine = {0};
    int r;

    if (f) {
        end_wait(c, f);
        return;
    }
    r = judge_job(c, &mine);
    c->done = r > 0 && c->finishing;
    if (r != 0) {
        end_wait(c, r < 0 ? &mine : NULL);
    } else if (c->event_seen) {
        job_look(c);
    } else {
        c->armed = true;
        seq_deadline(&c->rig.seq, COMMIT_TICK_MS, on_job_tick);
    }
}

static int ask_job(struct commit *c, struct failure *f)
{
    c->armed = c->event_seen = false;
    calls_add(&c->rig.calls, "query-jobs", NULL, QMP_NO_FD, 0, on_jobs);
    return calls_wait(&c->rig.calls, on_job_looked, f);
}

static void job_look(struct commit *c)
{
    struct failure f = {0};

    if (ask_job(c, &f) < 0)
        end_wait(c, &f);
}

/* Events wake, and query-jobs tells: it knows why a job failed, which the events do not. */
int commit_wait_for(struct commit *c, const char *status, struct failure *f)
{
    int r;

    c->wanted = status;
    c->changed_at_ms = uv_now(c->rig.loop);
    qmp_watch_add(c->rig.qmp, &c->job_watch, "JOB_STATUS_CHANGE", on_job_event, c);
    r = ask_job(c, f);
    if (r < 0)
        qmp_watch_remove(&c->job_watch);
    return r;
}

static int step_copy(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    return commit_wait_for(c, c->active ? "ready" : "pending", f);
}

/*
 * QEMU writes the name of base into the overlay without a word about what it still holds back of base itself (7.2,
 * commit_prepare): should it die then, the disk would have holes. A mirror job, which an active commit is, flushes.
 */
static int on_flushed(struct calls *calls, unsigned index, struct json_object *ret, struct failure *f)
{
    const char *said = json_object_get_string(ret);

    return said && *said ? failure_set(f, -EIO, "base cannot be flushed: %.*s", (int)strcspn(said, "\r\n"), said) : 0;
}

static void after_flush(struct calls *calls, const struct failure *f)
{
    rig_step_done(calls, f && f->err == -ENOSYS ? NULL : f); /* a qemu-storage-daemon that others run */
}

/* A qemu-storage-daemon has no such command, but an NBD server, which flushes what it exports, also for reading. */
static int step_export(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);
    char name[NAMES_SIZE];

    if (!c->still_socket || c->active)
        return SEQ_DONE;
    names_make(name, c->rig.id, NAMES_EXPORT, 0);
    calls_add(&c->rig.calls, "block-export-add", qmp_args_export_add(name, c->base_node, name, 0, NULL, 0), QMP_NO_FD,
              0, NULL);
    return rig_wait(&c->rig, f);
}

static int no_export(struct seq *s, struct failure *f)
{
    const struct commit *c = commit_of_seq(s);

    return c->still_socket && !c->active && !c->done ? rig_no_exports(s, f) : SEQ_DONE;
}

static void after_still_flush(void *arg, const struct failure *f)
{
    struct commit *c = arg;

    seq_done(&c->rig.seq, f);
}

static int step_flush(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);
    char name[NAMES_SIZE];
    struct source_nbd_config config = {
        .socket_path = c->rig.server_address,
        .export_name = names_make(name, c->rig.id, NAMES_EXPORT, 0),
        .timeout_ms = c->rig.timeout_ms,
    };
    int r;

    if (c->active)
        return SEQ_DONE;
    if (c->still_socket) {
        r = source_nbd_flush(c->rig.loop, &config, after_still_flush, c);
        return r < 0 ? failure_set(f, r, "base cannot be flushed: %s", strerror(-r)) : 0;
    }
    calls_add(&c->rig.calls, "human-monitor-command", qmp_args_flush(c->base_node), QMP_NO_FD, 0, on_flushed);
    return calls_wait(&c->rig.calls, after_flush, f);
}

/* The job has been told, or runs by itself: what is left of it is waited for. */
static void on_begun_to_end(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    struct failure mine = {0};

    if (!f && commit_wait_for(c, "concluded", &mine) < 0)
        f = &mine;
    if (f)
        rig_step_done(calls, f);
}

static int step_finish(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    c->finishing = true;
    calls_add(&c->rig.calls, c->active ? "job-complete" : "job-finalize", qmp_args_strings("id", c->job, NULL),
              QMP_NO_FD, 0, NULL);
    return calls_wait(&c->rig.calls, on_begun_to_end, f);
}

static int step_dismiss(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    calls_add(&c->rig.calls, "job-dismiss", qmp_args_strings("id", c->job, NULL), QMP_NO_FD, 0, NULL);
    return rig_wait(&c->rig, f);
}

/* -- an empty image, made by a job of the same name ------------------------------------------------------------------
 */

static int step_format(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    if (!commit_empties(c))
        return SEQ_DONE;
    calls_add(&c->rig.calls, "blockdev-create", TAKE_PTR(c->new_format), QMP_NO_FD, 0, NULL);
    return calls_wait(&c->rig.calls, on_begun_to_end, f);
}

static int step_formatted(struct seq *s, struct failure *f)
{
    return commit_empties(commit_of_seq(s)) ? step_dismiss(s, f) : SEQ_DONE;
}

/* -- the table ----------------------------------------------------------------------------------------------------- */

static const struct seq_step steps[] = {
    {"look", step_look, NULL, NULL},
    /* What can fail of the end is done before the beginning. */
    {"new image", commit_step_new_file, commit_no_new_file, NULL},
    {"open new image", commit_step_new_node, commit_no_new_node, NULL},
    {"format new image", step_format, rig_no_jobs, NULL},
    {"new image is made", step_formatted, NULL, NULL},
    {"close new image", commit_no_new_node, NULL, NULL},
    {"records that are not needed", NULL, commit_withdraw_after, NULL},
    {"records before the job", commit_step_open, rig_no_jobs, NULL},
    {"job", step_job, rig_no_jobs, NULL},
    /* An image that only reads is writable while the job stands. */
    {"records that are not needed", NULL, commit_withdraw_before, NULL},
    {"copy", step_copy, NULL, NULL},
    {"records", commit_step_records, NULL, NULL},
    {"export of base", step_export, no_export, NULL},
    {"flush", step_flush, NULL, NULL},
    {"no export", no_export, NULL, NULL},
    {"finish", step_finish, NULL, NULL},
    {"dismiss", step_dismiss, NULL, NULL},
    {"check", commit_step_check, NULL, NULL},
    {"replace", commit_step_replace, NULL, NULL},
    {"close", commit_step_close, NULL, NULL},
    {"delete", commit_step_delete, NULL, NULL},
};

static void on_top(struct seq *s)
{
    seq_stop(s, false);
}

static void on_failed(struct seq *s, const struct failure *why)
{
    struct commit *c = commit_of_seq(s);

    /* The one lock that the job needs besides what is held already. */
    if (!c->done && c->still_socket && c->base_file && strstr(why->text, "\"write\" lock"))
        (void)failure_set(
            &c->failure, -EBUSY,
            "base '%s' is in use by another process, which reads it (a qemu-img, another backup, a VM with "
            "an image of its own over it?); try again when that has ended; %s",
            c->base_file, why->text);
    /* What fails after the graph has changed does not undo it. */
    (void)failure_copy(c->done ? &c->problems : &c->failure, why);
}

static void on_end(struct seq *s, const struct failure *problems)
{
    struct commit *c = commit_of_seq(s);

    rig_done(&c->rig);
    qmp_watch_remove(&c->job_watch);
    if (!c->done)
        (void)failure_set(&c->failure, -ECANCELED, "the commit was cancelled; the disk is as it was");
    (void)failure_copy(&c->problems, problems);
    c->ops->on_end(c->arg, c->done ? NULL : &c->failure, &c->problems);
}

static void on_trace(struct seq *s, const char *text)
{
    struct commit *c = commit_of_seq(s);

    c->ops->on_trace(c->arg, text);
}

static const struct seq_ops seq_ops = {
    .on_top = on_top, .on_failed = on_failed, .on_end = on_end, .on_trace = on_trace};

/* -- life ---------------------------------------------------------------------------------------------------------- */

void commit_free(struct commit *c)
{
    if (!c)
        return;
    for (size_t i = 0; c->results && i < c->fresh.nrecords; i++)
        free(c->results[i].checkpoint);
    for (size_t i = 0; i < c->nmade; i++)
        free(c->made[i]);
    for (size_t i = 0; i < c->ndead; i++)
        free(c->dead[i]);
    free(c->dead);
    commit_files_done(c);
    commit_live_done(c);
    commit_plan_done(&c->plan);
    commit_plan_done(&c->fresh);
    chain_done(&c->chain);
    chain_done(&c->now);
    free(c->results);
    free(c->made);
    free(c->node);
    free(c->top);
    free(c->base);
    free(c->top_node);
    free(c->base_node);
    free(c->live_node);
    free(c->top_file);
    free(c->base_file);
    free(c->still_socket);
    free(c);
}

static int copy_config(struct commit *c, const struct commit_config *config)
{
    c->node = strdup(config->node);
    c->top = config->top ? strdup(config->top) : NULL;
    c->base = config->base ? strdup(config->base) : NULL;
    c->shallow = config->shallow;
    c->active = config->active;
    c->delete = config->delete;
    c->force = config->force;
    if (!(c->dead = calloc(config->ndead + 1, sizeof(*c->dead))))
        return -ENOMEM;
    for (; c->ndead < config->ndead; c->ndead++) {
        if (!(c->dead[c->ndead] = strdup(config->dead[c->ndead])))
            return -ENOMEM;
    }
    c->still_socket = config->still_socket ? strdup(config->still_socket) : NULL;
    return c->node && !config->top == !c->top && !config->base == !c->base && !config->still_socket == !c->still_socket
               ? 0
               : -ENOMEM;
}

int commit_start(const struct commit_config *config, const struct commit_ops *ops, void *arg, struct commit **ret,
                 struct failure *f)
{
    struct commit *c = calloc(1, sizeof(*c));
    char id[NAMES_ID_SIZE];
    struct rig_config rig = {
        .loop = config->loop,
        .qmp = config->qmp,
        .id = id,
        .timeout_ms = config->timeout_ms,
        .server_socket = "",
        .server_dir = -1,
    };
    int r;

    if (!c)
        return failure_set(f, -ENOMEM, "out of memory");
    if (config->base && config->shallow) {
        commit_free(c);
        return failure_set(f, -EINVAL, "--shallow and --base contradict each other: shallow means top's own backing");
    }
    names_new_id(id);
    names_make(c->job, id, NAMES_JOB, 0);
    c->ops = ops;
    c->arg = arg;
    r = copy_config(c, config);
    if (c->still_socket) {
        rig.server_socket = c->still_socket;
        rig.server_dir = config->still_dir;
    }
    if (r == 0)
        r = rig_init(&c->rig, &rig, steps, ARRAY_SIZE(steps), &seq_ops);
    if (r < 0) {
        commit_free(c);
        return failure_set(f, r, "out of memory");
    }
    rig_announce(&c->rig);
    seq_start(&c->rig.seq);
    *ret = c;
    return 0;
}

void commit_cancel(struct commit *c)
{
    seq_stop(&c->rig.seq, false);
    if (c->armed && !c->finishing) {
        c->armed = false;
        seq_deadline(&c->rig.seq, 0, on_job_tick);
    }
}

bool commit_may_ask(const struct commit *c)
{
    return c->done ? !commit_has_closed(c) : c->begun && !c->finishing && !c->failure.err;
}

/* -- for those who ask --------------------------------------------------------------------------------------------- */

const char *commit_job(const struct commit *c)
{
    return c->job;
}

const char *commit_step(struct commit *c)
{
    seq_describe(&c->rig.seq, c->step, sizeof(c->step));
    return c->step;
}

void commit_progress(const struct commit *c, uint64_t *ret_current, uint64_t *ret_total)
{
    *ret_current = c->seen.current;
    *ret_total = c->seen.total;
}

const char *commit_base_node(const struct commit *c)
{
    return c->base_node;
}

const char *commit_base_file(const struct commit *c)
{
    return c->base_file;
}

const char *commit_top_node(const struct commit *c)
{
    return c->top_node;
}

const char *commit_top_file(const struct commit *c)
{
    return c->top_file;
}

const char *commit_base_name(const struct commit *c)
{
    return c->still_socket ? c->base_file : c->base_node;
}

const char *commit_top_name(const struct commit *c)
{
    return c->still_socket ? c->top_file : c->top_node;
}

bool commit_has_closed(const struct commit *c)
{
    return c->done && commit_is_live(c);
}

size_t commit_nresults(const struct commit *c)
{
    return c->done ? c->fresh.nrecords : 0;
}

const struct commit_result *commit_result_at(const struct commit *c, size_t i)
{
    return &c->results[i];
}

static const struct commit_file *deleted_at(const struct commit *c, size_t i)
{
    for (size_t k = 0; k < c->nfiles; k++) {
        if (c->files[k].deleted && i-- == 0)
            return &c->files[k];
    }
    return NULL;
}

size_t commit_ndeleted(const struct commit *c)
{
    size_t n = 0;

    while (deleted_at(c, n))
        n++;
    return n;
}

const char *commit_deleted_at(const struct commit *c, size_t i)
{
    const struct commit_file *file = deleted_at(c, i);

    return file ? file->path : NULL;
}
