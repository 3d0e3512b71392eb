/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The block commit of a VM: one at a time, and never beside a session: both build on the disk's graph. The one that has
 * ended is remembered until the next begins, so that whoever asked for it can learn how it went.
 */
#include "vm_internal.h"

#include "backup/commit.h"
#include "log.h"

#include <errno.h>
#include <stdio.h>

struct vm_job {
    struct vm *vm;
    struct vm_commit *request; /* NULL: answered */
    struct vm_query query;
    struct vm_write write;
    struct calls calls;
    struct commit *commit;   /* owned; NULL: QEMU is asked for the disks */
    char *disk, *top, *base; /* owned */
    char **usable;           /* owned, each too: checkpoints that were usable when it began */
    size_t nusable;
    bool ended, cancelled, told;
    uint64_t ended_ms; /* in loop time */
    struct failure failure, problems;
};

static void job_free(struct vm_job *job)
{
    if (!job)
        return;
    commit_free(job->commit);
    for (size_t i = 0; i < job->nusable; i++)
        free(job->usable[i]);
    free(job->usable);
    free(job->disk);
    free(job->top);
    free(job->base);
    free(job);
}

static void tell_status(const struct vm_job *job, const char *status)
{
    struct json_object *data;

    if (!job->commit || !job->told)
        return; /* it has not begun */
    data = qmp_args_strings("id", commit_job(job->commit), "type", "block-commit", "disk", job->disk, "status", status,
                            NULL);
    if (job->failure.err)
        json_object_object_add(data, "error", json_object_new_string(job->failure.text));
    vm_tell(job->vm, "JOB_STATUS_CHANGE", data);
}

/* A VM and its images have one job between them: the one that began last. */
static struct vm_job *job_of(const struct vm *vm)
{
    return vm->job || !vm->twin ? vm->job : vm->twin->job;
}

bool vm_is_committing(const struct vm *vm)
{
    return vm->job && !vm->job->ended;
}

bool vm_commit_is_news(const struct vm *vm)
{
    return vm->job && vm->job->commit && vm->job->ended && uv_now(vm->loop) - vm->job->ended_ms < VM_JOB_NEWS_MS;
}

bool vm_commit_may_ask(const struct vm *vm)
{
    return !vm_is_committing(vm) || !vm->job->commit || (!vm->job->cancelled && commit_may_ask(vm->job->commit));
}

bool vm_commit_refuses(struct vm *vm)
{
    struct failure f = {0};

    if (!vm_is_committing(vm))
        return false;
    (void)failure_set(&f, -EBUSY, "disk '%s' of VM '%s' is being committed; try again when that has ended",
                      vm->job->disk, vm->name);
    vm_refuse_waiting(vm, &f);
    return true;
}

void vm_commit_stop(struct vm *vm)
{
    if (!vm_is_committing(vm))
        return;
    if (!vm->job->cancelled)
        tell_status(vm->job, "aborting");
    vm->job->cancelled = true;
    if (vm->job->commit)
        commit_cancel(vm->job->commit);
}

void vm_commit_done(struct vm *vm)
{
    job_free(TAKE_PTR(vm->job));
}

static void answer(struct vm_job *job, const struct failure *f)
{
    struct vm_commit *request = TAKE_PTR(job->request);

    if (request)
        request->cb(request, job->commit ? commit_job(job->commit) : NULL, f);
}

/* -- what is remembered of the disk -------------------------------------------------------------------------------- */

static int remember_usable(struct vm_job *job, const struct disk *d)
{
    job->usable = calloc(d->ncheckpoints + 1, sizeof(*job->usable));
    for (size_t i = 0; job->usable && i < d->ncheckpoints; i++) {
        const struct checkpoint *c = &d->checkpoints[i];

        if (c->reason == REASON_NONE && !(job->usable[job->nusable++] = strdup(c->name)))
            return -ENOMEM;
    }
    return job->usable ? 0 : -ENOMEM;
}

/* Deleted ones, of which a layer still holds a record. Borrowed from d, the array is the caller's. NULL: out of memory.
 */
static const char **list_dead(const struct disk *d, size_t *ret_n)
{
    const char **dead = calloc(d->ncheckpoints + 1, sizeof(*dead));
    size_t n = 0;

    for (size_t i = 0; dead && i < d->ncheckpoints; i++) {
        if (d->checkpoints[i].reason == REASON_NO_SUCH_CHECKPOINT)
            dead[n++] = d->checkpoints[i].name;
    }
    *ret_n = n;
    return dead;
}

static bool is_broken(const struct vm_job *job, const char *checkpoint)
{
    for (size_t i = 0; i < commit_nresults(job->commit); i++) {
        const struct commit_result *r = commit_result_at(job->commit, i);

        if (r->state == COMMIT_BROKEN && strcmp(r->checkpoint, checkpoint) == 0)
            return true;
    }
    return false;
}

/*
 * A record that lies in another layer than before looks like a lost one to whoever does not know why. We do: what was
 * usable is right as it is now, also where the commit has ended before its time: it only adds to records. What was
 * refused before is as wrong as it was, so it is not forgiven; nor is what others did to a record meanwhile.
 */
static void tell_watch(struct vm_job *job)
{
    for (size_t i = 0; i < job->nusable; i++) {
        if (!is_broken(job, job->usable[i]))
            vm_watch_moved(job->vm, job->disk, job->usable[i]);
    }
    vm_watch_wake(job->vm);
}

/* -- its end ------------------------------------------------------------------------------------------------------- */

/* A note tells of it even when the record is gone. */
static void mark_broken(const struct vm_job *job, const struct commit_result *r)
{
    struct vm *vm = job->vm->keeper;
    struct failure f = {0};

    log_error("VM %s: the commit of disk \"%s\" has spoiled checkpoint \"%s\": %s", vm->name, job->disk, r->checkpoint,
              r->why.text);
    if (notes_mark_broken(vm->notes, r->checkpoint, job->disk, REASON_INCONSISTENT, r->why.text, &vm->note_changes,
                          &f) < 0 &&
        f.err != -ENOENT) /* not every checkpoint has a note */
        log_error("VM %s: that is not noted: %s", vm->name, f.text);
}

static void tell_results(const struct vm_job *job)
{
    for (size_t i = 0; i < commit_nresults(job->commit); i++) {
        const struct commit_result *r = commit_result_at(job->commit, i);

        if (r->state == COMMIT_BROKEN)
            mark_broken(job, r);
    }
    vm_notes_write(job->vm->keeper, NULL, NULL);
    for (size_t i = 0; i < commit_ndeleted(job->commit); i++)
        log_info("VM %s: deleted image %s", job->vm->name, commit_deleted_at(job->commit, i));
}

static void end(struct vm_job *job)
{
    struct vm *vm = job->vm;
    const struct failure *f = job->failure.err ? &job->failure : NULL;

    job->ended = true;
    job->ended_ms = uv_now(vm->loop);
    tell_status(job, "concluded");
    answer(job, f);
    /* What could not be undone, or a connection that came back meanwhile, is a matter for the sweep. */
    if (job->commit && !vm->images && qmp_client_is_ready(vm->qmp) && !vm->stopping &&
        ((f && job->problems.err) || vm->sweep_wanted || vm->state == VM_LOST))
        vm_sweep(vm);
    vm_pump(vm);
    vm_stop_if_idle(vm);
}

static void on_written(struct vm_write *w, const struct failure *f)
{
    struct vm_job *job = container_of(w, struct vm_job, write);

    if (f) {
        log_error("VM %s: commit of disk \"%s\": %s", job->vm->name, job->disk, f->text);
        (void)failure_copy(&job->problems, f);
    }
    end(job);
}

/* Others may write to the images again, or start the VM. */
static void let_go(struct vm_job *job, const struct failure *f)
{
    struct failure lost = {0};
    int r;

    if (f)
        job->failure = *f;
    if (job->commit && commit_has_closed(job->commit))
        vm_images_renew(job->vm);
    r = vm_write_end(&job->write, on_written);
    if (r < 0)
        (void)failure_set(&lost, r, "the image could not be made read-only again: %s", strerror(-r));
    if (r != 0)
        on_written(&job->write, r < 0 ? &lost : NULL);
}

static void on_started(void *arg)
{
    struct vm_job *job = arg;

    log_info("VM %s: commit %s of disk \"%s\" begins: '%s' into '%s'", job->vm->name, commit_job(job->commit),
             job->disk, commit_top_name(job->commit), commit_base_name(job->commit));
    job->told = true;
    tell_status(job, "running");
    answer(job, NULL);
}

static void on_end(void *arg, const struct failure *f, const struct failure *problems)
{
    struct vm_job *job = arg;

    job->problems = *problems;
    if (f)
        log_warning("VM %s: commit of disk \"%s\" failed: %s", job->vm->name, job->disk, f->text);
    else
        log_info("VM %s: commit %s of disk \"%s\" is done", job->vm->name, commit_job(job->commit), job->disk);
    if (problems->err)
        log_error("VM %s: commit of disk \"%s\": %s", job->vm->name, job->disk, problems->text);
    tell_results(job);
    tell_watch(job);
    let_go(job, f);
}

static void on_trace(void *arg, const char *text)
{
    struct vm_job *job = arg;

    log_debug("VM %s: commit of disk \"%s\": %s", job->vm->name, job->disk, text);
}

static const struct commit_ops commit_ops = {.on_started = on_started, .on_end = on_end, .on_trace = on_trace};

/* -- its beginning ------------------------------------------------------------------------------------------------- */

static void on_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct vm_job *job = container_of(q, struct vm_job, query);
    struct vm *vm = job->vm;
    const struct disk *d = disks ? disk_list_find(disks, job->disk) : NULL;
    _cleanup_free_ const char **dead = NULL;
    struct failure mine = {0};
    size_t ndead = 0;

    if (!f && !d)
        (void)failure_set(&mine, -ENODEV, "VM '%s' has no disk '%s'", vm->name, job->disk);
    else if (!f && job->cancelled)
        (void)failure_set(&mine, -ECANCELED, "the commit was cancelled");
    else if (!f && (remember_usable(job, d) < 0 || !(dead = list_dead(d, &ndead))))
        (void)failure_set(&mine, -ENOMEM, "out of memory");
    else if (!f) {
        struct commit_config config = {
            .loop = vm->loop,
            .qmp = vm->qmp,
            .node = d->node,
            .top = job->top,
            .base = job->base,
            .shallow = job->request->shallow,
            .active = job->request->active,
            .delete = job->request->delete,
            .force = job->request->force,
            .dead = dead,
            .ndead = ndead,
            .timeout_ms = VM_CALL_TIMEOUT_MS,
            .still_socket = vm->images ? images_nbd_socket(vm->images) : NULL,
            .still_dir = vm->state_dir,
        };

        if (commit_start(&config, &commit_ops, job, &job->commit, &mine) == 0)
            return;
    }
    let_go(job, f ? f : &mine);
}

/*
 * Images stay open for reading: the job makes base writable, and a kill -9 hurts the records of no other. With force it
 * may have to remove a record from the one that the VM is started with, unless that is merged away.
 */
static int ask_disks(struct vm_job *job)
{
    if (job->request->force && !job->request->active)
        return vm_write_start(job->vm, &job->write, &job->query, &job->calls, (const char *const *)&job->disk, 1,
                              on_disks);
    return vm_hold_start(job->vm, &job->write, &job->query, &job->calls, on_disks);
}

int vm_commit_start(struct vm *vm, struct vm_commit *request, struct failure *f)
{
    struct vm *now = vm_now(vm);
    struct vm_job *job = job_of(vm);
    int r;

    /* A session of images that only lingers makes way. */
    if (!now->images && (now->session || now->starting))
        return failure_set(f, -EBUSY, "VM '%s' is in a session; try again when it has ended", vm->name);
    if (job && !job->ended)
        return failure_set(f, -EBUSY, "disk '%s' of VM '%s' is being committed already", job->disk, vm->name);
    vm_commit_done(vm);
    if (vm->twin)
        vm_commit_done(vm->twin);
    if (!(job = calloc(1, sizeof(*job))))
        return failure_set(f, -ENOMEM, "out of memory");
    job->vm = now;
    job->request = request;
    job->disk = strdup(request->disk);
    job->top = request->top ? strdup(request->top) : NULL;
    job->base = request->base ? strdup(request->base) : NULL;
    now->job = job;
    r = job->disk && !request->top == !job->top && !request->base == !job->base ? ask_disks(job) : -ENOMEM;
    if (r < 0) {
        vm_commit_done(now);
        return failure_set(f, r, "VM '%s' cannot be asked now: %s", vm->name,
                           r == -ENOTCONN || r == -ESHUTDOWN ? vm_trouble(now) : strerror(-r));
    }
    return 0;
}

int vm_commit_cancel(struct vm *vm, const char *id)
{
    struct vm_job *job = job_of(vm);

    if (!job || !job->commit || strcmp(commit_job(job->commit), id) != 0)
        return -ENOENT;
    vm_commit_stop(job->vm);
    return 0;
}

/* -- for the control socket ---------------------------------------------------------------------------------------- */

static void put_text(struct json_object *o, const char *key, const char *text)
{
    (void)json_object_object_add(o, key, text && *text ? json_object_new_string(text) : NULL);
}

static struct json_object *results_to_json(const struct commit *c)
{
    static const char *const states[] = {
        [COMMIT_KEPT] = "kept", [COMMIT_UNUSABLE] = "unusable", [COMMIT_BROKEN] = "broken"};
    struct json_object *list = json_object_new_array();

    for (size_t i = 0; i < commit_nresults(c); i++) {
        const struct commit_result *r = commit_result_at(c, i);
        struct json_object *o = qmp_args_strings("name", r->checkpoint, "state", states[r->state], NULL);

        put_text(o, "text", r->why.text);
        (void)json_object_array_add(list, o);
    }
    return list;
}

struct json_object *vm_commit_to_json(const struct vm *vm)
{
    const struct vm_job *job = job_of(vm);
    struct json_object *o, *deleted;
    uint64_t current, total;

    if (!job || !job->commit)
        return NULL;
    commit_progress(job->commit, &current, &total);
    o = qmp_args_strings("id", commit_job(job->commit), "type", "block-commit", "vm", vm->name, "disk", job->disk,
                         "status",
                         job->ended       ? "concluded"
                         : job->cancelled ? "aborting"
                                          : "running",
                         "step", commit_step(job->commit), NULL);
    (void)json_object_object_add(o, "current-progress", json_object_new_uint64(current));
    (void)json_object_object_add(o, "total-progress", json_object_new_uint64(total));
    put_text(o, "top", commit_top_node(job->commit));
    put_text(o, "top-file", commit_top_file(job->commit));
    put_text(o, "base", commit_base_node(job->commit));
    put_text(o, "base-file", commit_base_file(job->commit));
    (void)json_object_object_add(o, "powered-off", json_object_new_boolean(job->vm->images != NULL));
    put_text(o, "emptied", commit_emptied(job->commit));
    put_text(o, "error", job->failure.text);
    put_text(o, "problem", job->problems.text);
    (void)json_object_object_add(o, "checkpoints", results_to_json(job->commit));
    deleted = json_object_new_array();
    for (size_t i = 0; i < commit_ndeleted(job->commit); i++)
        (void)json_object_array_add(deleted, json_object_new_string(commit_deleted_at(job->commit, i)));
    (void)json_object_object_add(o, "deleted", deleted);
    return o;
}
