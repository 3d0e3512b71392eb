/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "vm_internal.h"

#include "backup/names.h"
#include "backup/seq.h"
#include "log.h"

#include <errno.h>
#include <stdio.h>

/* -- life ---------------------------------------------------------------------------------------------------------- */

static void on_job_changed(struct qmp_watch *watch, const char *event, struct json_object *data);

int vm_watch_load(struct vm *vm)
{
    struct failure f = {0};
    int r;

    if (vm->keeper != vm) {
        vm->watch.lineage = vm->keeper->watch.lineage;
        return 0;
    }
    r = lineage_load(vm->state_dir, vm->name, &vm->watch.lineage, &f);

    if (r == 0 && f.err)
        log_warning("VM %s: %s", vm->name, f.text);
    return r;
}

void vm_watch_init(struct vm *vm)
{
    struct vm_watch *w = &vm->watch;

    (void)uv_timer_init(vm->loop, &w->deadline);
    if (vm->images) /* nobody but us does anything there */
        return;
    calls_init(&w->calls, vm->qmp, VM_CALL_TIMEOUT_MS);
    qmp_watch_add(vm->qmp, &w->job_changed, "JOB_STATUS_CHANGE", on_job_changed, vm);
}

void vm_watch_close(struct vm *vm, uv_close_cb cb)
{
    uv_close((uv_handle_t *)&vm->watch.deadline, cb);
}

void vm_watch_drop_jobs(struct job_list *jobs, struct image **targets)
{
    for (size_t i = 0; *targets && i < jobs->njobs; i++) {
        free((*targets)[i].node);
        free((*targets)[i].file);
    }
    free(TAKE_PTR(*targets));
    jobs_done(jobs);
}

void vm_watch_done(struct vm *vm)
{
    vm_carry_drop(&vm->watch);
    vm_watch_drop_jobs(&vm->watch.jobs, &vm->watch.targets);
    disk_list_free(TAKE_PTR(vm->watch.last));
    if (vm->keeper == vm)
        lineage_free(TAKE_PTR(vm->watch.lineage));
}

bool vm_watch_is_busy(const struct vm *vm)
{
    return vm->watch.look || vm->watch.saving || vm->watch.heir.from;
}

/* -- the file ------------------------------------------------------------------------------------------------------ */

static void save_in_thread(uv_work_t *work)
{
    struct vm_watch *w = container_of(work, struct vm_watch, save);
    struct vm *vm = container_of(w, struct vm, watch);

    (void)lineage_save(vm->state_dir, vm->name, w->text, &w->save_failure);
}

static void save(struct vm *vm);

/* More may have changed meanwhile: those who wait are told when all is stored, or at once where it cannot be. */
static void tell_saved(struct vm *vm, const struct failure *f)
{
    struct vm_watch *w = &vm->watch;
    struct vm_watch_wait *waits;
    struct failure full = {0};

    if (w->saving)
        return;
    if (!f && lineage_is_dirty(w->lineage)) {
        (void)failure_set(&full, -ENOMEM, "out of memory");
        f = &full;
    }
    waits = TAKE_PTR(w->waits);
    while (waits) {
        struct vm_watch_wait *wait = waits;

        waits = wait->next;
        wait->cb(wait, f);
    }
}

static void on_saved(uv_work_t *work, int status)
{
    struct vm_watch *w = container_of(work, struct vm_watch, save);
    struct vm *vm = container_of(w, struct vm, watch);
    const struct failure f = w->save_failure;

    w->saving = false;
    free(TAKE_PTR(w->text));
    if (f.err) {
        log_warning("VM %s: %s", vm->name, f.text);
        lineage_unsaved(w->lineage); /* the next look tries again */
    } else if (!vm->stopping || w->waits) {
        save(vm);
    }
    tell_saved(vm, f.err ? &f : NULL);
    vm_stop_if_idle(vm);
}

static void save(struct vm *vm)
{
    struct vm_watch *w;

    vm = vm->keeper;
    w = &vm->watch;
    if (w->saving || vm->closing || !lineage_is_dirty(w->lineage))
        return;
    w->text = lineage_encode(w->lineage, vm->name);
    if (!w->text) {
        log_warning("VM %s: out of memory for what is remembered of its disks", vm->name);
        return;
    }
    memset(&w->save_failure, 0, sizeof(w->save_failure));
    lineage_saved(w->lineage);
    w->saving = uv_queue_work(vm->loop, &w->save, save_in_thread, on_saved) == 0;
}

int vm_watch_store(struct vm *vm, struct vm_watch_wait *wait,
                   void (*cb)(struct vm_watch_wait *, const struct failure *))
{
    struct vm_watch *w = &vm->keeper->watch;

    save(vm);
    if (!w->saving)
        return lineage_is_dirty(w->lineage) ? -ENOMEM : SEQ_DONE;
    wait->cb = cb;
    wait->next = w->waits;
    w->waits = wait;
    return 0;
}

/* -- a look -------------------------------------------------------------------------------------------------------- */

/* Belongs to the worker thread until it ends, and then to itself where nobody waits for it any more. */
struct look {
    uv_work_t work;
    struct vm *vm;                 /* NULL: nobody waits */
    struct disk_list *list, *seen; /* owned: the disks, and a copy that the thread works on */
    struct job_list jobs;
    struct image *targets; /* owned: of the jobs */
    unsigned npromises;    /* of the watch, when QEMU had answered */
};

static void look_free(struct look *k)
{
    vm_watch_drop_jobs(&k->jobs, &k->targets);
    disk_list_free(k->list);
    disk_list_free(k->seen);
    free(k);
}

static void look_in_thread(uv_work_t *work)
{
    struct look *k = container_of(work, struct look, work);

    disk_list_stat(k->seen);
    for (size_t i = 0; i < k->jobs.njobs; i++)
        image_stat(&k->targets[i]);
}

/* list is given. */
static void judge(struct vm *vm, struct disk_list *list, bool jobs)
{
    struct vm_watch *w = &vm->watch;
    void (*cb)(struct vm *, struct disk_list *, const struct failure *) = w->on_looked;
    struct failure f = {0};

    (void)uv_timer_stop(&w->deadline);
    if (vm->images && lineage_look_stopped(w->lineage, list, &f) < 0) {
        cb(vm, list, &f);
        return;
    }
    if ((!vm->images && lineage_look_running(w->lineage, list, vm->twin != NULL) < 0) ||
        lineage_look(w->lineage, list, jobs) < 0)
        (void)failure_set(&f, -ENOMEM, "out of memory");
    vm_tell_broken(vm, w->last, list);
    disk_list_free(w->last);
    w->last = disk_list_copy(list); /* NULL: nothing is carried until the next look */
    save(vm);
    cb(vm, list, f.err ? &f : NULL);
}

static void on_seen(uv_work_t *work, int status)
{
    struct look *k = container_of(work, struct look, work);
    struct vm *vm = k->vm;

    if (vm) {
        struct vm_watch *w = &vm->watch;

        w->look = NULL;
        vm_watch_drop_jobs(&w->jobs, &w->targets);
        w->jobs = k->jobs;
        w->targets = TAKE_PTR(k->targets);
        k->jobs = (struct job_list){0};
        /* What was promised since QEMU answered belongs to a job that this look knows nothing of. */
        judge(vm, TAKE_PTR(k->seen), w->jobs.njobs > 0 || k->npromises != w->npromises);
    }
    look_free(k);
}

/* A file system does not answer: names must do this time. */
static void on_look_deadline(uv_timer_t *t)
{
    struct vm_watch *w = container_of(t, struct vm_watch, deadline);
    struct vm *vm = container_of(w, struct vm, watch);
    struct look *k = TAKE_PTR(w->look);

    log_warning("VM %s: the file system of its images does not answer; that they are the same is not verified",
                vm->name);
    k->vm = NULL;
    judge(vm, TAKE_PTR(k->list), /* jobs= */ true);
}

static int find_targets(struct look *k, struct json_object *named_nodes, struct json_object *graph)
{
    if (!(k->targets = calloc(k->jobs.njobs + 1, sizeof(*k->targets))))
        return -ENOMEM;
    for (size_t i = 0; i < k->jobs.njobs; i++) {
        k->targets[i].node = strdup(k->jobs.jobs[i].to);
        k->targets[i].file = strdup(graph_file(named_nodes, graph, k->jobs.jobs[i].to));
        if (!k->targets[i].node || !k->targets[i].file)
            return -ENOMEM;
    }
    return 0;
}

int vm_watch_look(struct vm *vm, struct disk_list *list, struct json_object *named_nodes, struct json_object *graph,
                  void (*cb)(struct vm *vm, struct disk_list *list, const struct failure *f))
{
    struct look *k = calloc(1, sizeof(*k));
    int r = -ENOMEM;

    if (k)
        k->list = list;
    if (k && (k->seen = disk_list_copy(list)) && jobs_parse(graph, &k->jobs) == 0 &&
        find_targets(k, named_nodes, graph) == 0)
        r = uv_queue_work(vm->loop, &k->work, look_in_thread, on_seen);
    if (r < 0) {
        if (k)
            k->list = NULL;
        if (k)
            look_free(k);
        return r;
    }
    k->vm = vm;
    k->npromises = vm->watch.npromises;
    vm->watch.look = k;
    vm->watch.on_looked = cb;
    return uv_timer_start(&vm->watch.deadline, on_look_deadline, VM_LOOK_TIMEOUT_MS, 0);
}

/* -- when ---------------------------------------------------------------------------------------------------------- */

void vm_watch_wake(struct vm *vm)
{
    struct vm_watch *w = &vm->watch;

    w->wanted = w->query.vm || w->carrying;
    if (!w->wanted && !vm->stopping)
        (void)vm_query_start(vm, &w->query, vm_carry_on_look,
                             NULL); /* else: without a connection; the next one looks */
}

void vm_watch_lost(struct vm *vm)
{
    if (vm->keeper == vm) /* else: QEMU can be connected */
        lineage_lost(vm->watch.lineage);
}

/* At work: records can be carried over. Ready to change over, or gone: a look. */
static void on_job_changed(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    struct vm *vm = watch->arg;
    const char *status = qmp_get_string(data, "status");

    if (!status || names_is_ours(qmp_get_string(data, "id")))
        return;
    if (strcmp(status, "running") == 0)
        vm_carry_meet_jobs(vm);
    else if (strcmp(status, "ready") == 0 || strcmp(status, "null") == 0)
        vm_watch_wake(vm);
}

void vm_watch_forget(struct vm *vm, const char *checkpoint)
{
    lineage_forget(vm->watch.lineage, NULL, checkpoint);
}

void vm_watch_deleted(struct vm *vm, const struct disk *d, const char *checkpoint)
{
    const struct checkpoint *c = disk_checkpoint(d, checkpoint);
    bool left = false;

    for (size_t i = 0; c && i < c->nlayers; i++)
        left |= d->images[c->layers[i].depth].read_only;
    if (!left)
        lineage_forget(vm->watch.lineage, d->name, checkpoint);
    else if (lineage_bury(vm->watch.lineage, d, checkpoint) < 0)
        log_warning("VM %s: out of memory: checkpoint '%s' of disk '%s' will be seen again", vm->name, checkpoint,
                    d->name);
    save(vm);
}

void vm_watch_moved(struct vm *vm, const char *disk, const char *checkpoint)
{
    lineage_moved(vm->watch.lineage, disk, checkpoint);
    save(vm);
}

void vm_accept(struct vm *vm, const char *checkpoint)
{
    lineage_accept(vm->watch.lineage, NULL, checkpoint);
    save(vm);
}
