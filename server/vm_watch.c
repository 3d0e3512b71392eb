/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "vm_internal.h"

#include "backup/names.h"
#include "backup/seq.h"
#include "log.h"

#include <errno.h>
#include <stdio.h>

/* -- life ---------------------------------------------------------------------------------------------------------- */

static void on_job_changed(struct qmp_watch *watch, const char *event, struct json_object *data);
static void drop_cargo(struct vm_watch *w);

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

static void drop_jobs(struct job_list *jobs, struct image **targets)
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
    drop_cargo(&vm->watch);
    drop_jobs(&vm->watch.jobs, &vm->watch.targets);
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
    drop_jobs(&k->jobs, &k->targets);
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
        drop_jobs(&w->jobs, &w->targets);
        w->jobs = k->jobs;
        w->targets = TAKE_PTR(k->targets);
        k->jobs = (struct job_list){0};
        /* What was promised since QEMU answered belongs to a job that this look knows nothing of. */
        judge(vm, TAKE_PTR(k->seen), w->jobs.njobs > 0 || k->npromises != w->npromises);
    }
    look_free(k);
    if (vm)
        vm_stop_if_idle(vm);
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
    vm_stop_if_idle(vm);
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

/* -- carrying records over ----------------------------------------------------------------------------------------- */

/* One checkpoint's record on its way to the layer that stays. */
struct cargo {
    const struct disk *disk;       /* borrowed from watch.disks */
    const struct checkpoint *what; /* likewise */
    const struct job *job;         /* borrowed from watch.carry_jobs */
    const struct image *to;        /* likewise from watch.carry_targets */
    bool there;                    /* the layer has a record of that name: merging into it is all */
    bool fill;
    char temporary[NAMES_SIZE];
};

static void drop_cargo(struct vm_watch *w)
{
    free(TAKE_PTR(w->cargo));
    w->ncargo = w->at = 0;
    disk_list_free(TAKE_PTR(w->disks));
    json_object_put(TAKE_PTR(w->status));
    drop_jobs(&w->carry_jobs, &w->carry_targets);
}

static struct json_object *status_of(const struct vm_watch *w, const char *id)
{
    for (size_t i = 0; i < qmp_array_length(w->status); i++) {
        struct json_object *o = json_object_array_get_idx(w->status, i);
        const char *device = qmp_get_string(o, "device");

        if (device && strcmp(device, id) == 0)
            return o;
    }
    return NULL;
}

/* The job has not begun to end: its layers still are where they were. A mirror counts from when it is ready. */
static bool is_at_work(const struct vm_watch *w, const struct job *j)
{
    static const char *const states[] = {"created", "running", "paused", "ready", "standby"};
    struct json_object *o = status_of(w, j->id);
    const char *status = qmp_get_string(o, "status"), *type = qmp_get_string(o, "type");

    if (!status || !type || strcmp(type, "backup") == 0 || (j->kind == JOB_MIRROR && !qmp_get_bool(o, "ready")))
        return false;
    for (size_t i = 0; i < ARRAY_SIZE(states); i++) {
        if (strcmp(states[i], status) == 0)
            return true;
    }
    return false;
}

static bool goes(const struct job *j, const char *node)
{
    for (size_t i = 0; i < j->nfrom; i++) {
        if (strcmp(j->from[i], node) == 0)
            return true;
    }
    return false;
}

static const struct layer *layer_of(const struct checkpoint *c, const char *node)
{
    for (size_t i = 0; i < c->nlayers; i++) {
        if (strcmp(c->layers[i].node, node) == 0)
            return &c->layers[i];
    }
    return NULL;
}

/* Layers that go lie above the one with the record: what was written to them is known by their allocation alone. */
static bool is_under_others(const struct job *j, const struct disk *d, const char *root)
{
    for (size_t i = 0; i < d->nimages && strcmp(d->images[i].node, root) != 0; i++) {
        if (goes(j, d->images[i].node))
            return true;
    }
    return false;
}

/*
 * Whether, and how, the record outlives the job. What is streamed up lands in a layer of which nobody knows whether its
 * own record began with it: its allocation must count, too, and that without a record of its own would be everything.
 * What is committed or mirrored down takes the one record that is whole by itself.
 */
static bool can_carry(const struct vm_watch *w, struct cargo *g)
{
    const char *root = lineage_root(w->lineage, g->disk, g->what->name);
    const struct layer *there = layer_of(g->what, g->to->node);

    if (g->what->reason || !root || !goes(g->job, root) || !layer_of(g->what, root)->merge ||
        lineage_is_promised(w->lineage, g->disk->name, g->what->name, g->to))
        return false;
    g->there = there;
    g->fill = g->job->kind == JOB_STREAM;
    if (g->fill || g->there)
        return there && there->merge && (g->fill || !is_under_others(g->job, g->disk, root));
    return !is_under_others(g->job, g->disk, root);
}

static int load_disk(struct vm_watch *w, const struct job *j, const struct image *to, const struct disk *d)
{
    for (size_t i = 0; i < d->ncheckpoints; i++) {
        struct cargo g = {.disk = d, .what = &d->checkpoints[i], .job = j, .to = to}, *cargo;

        if (!can_carry(w, &g))
            continue;
        if (!(cargo = reallocarray(w->cargo, w->ncargo + 1, sizeof(*cargo))))
            return -ENOMEM;
        w->cargo = cargo;
        cargo[w->ncargo++] = g;
    }
    return 0;
}

/* All that goes are layers of that disk as we know it: no snapshot was taken since the last look. */
static bool takes_from(const struct job *j, const struct disk *d)
{
    size_t n = 0;

    for (size_t i = 0; i < d->nimages; i++)
        n += goes(j, d->images[i].node);
    return n == j->nfrom;
}

static int load_all(struct vm_watch *w)
{
    for (size_t i = 0; i < w->carry_jobs.njobs; i++) {
        const struct job *j = &w->carry_jobs.jobs[i];

        for (size_t k = 0; w->carry_targets[i].node && is_at_work(w, j) && k < w->disks->ndisks; k++) {
            if (takes_from(j, &w->disks->disks[k]) && load_disk(w, j, &w->carry_targets[i], &w->disks->disks[k]) < 0)
                return -ENOMEM;
        }
    }
    return 0;
}

static void carry_next(struct vm *vm);
static void meet_jobs(struct vm *vm);

static void carried(struct vm *vm, const struct failure *f)
{
    struct vm_watch *w = &vm->watch;
    const struct cargo *g = &w->cargo[w->at++];

    w->npromises++;
    if (f)
        log_warning(
            "VM %s: the record of checkpoint '%s' on disk '%s' goes with the layer that job '%s' takes away: %s",
            vm->name, g->what->name, g->disk->name, g->job->id, f->text);
    else if (lineage_promise(w->lineage, g->disk, g->what->name, g->to, g->fill) == 0)
        log_info("VM %s: job '%s' takes a layer of disk '%s' away: the record of checkpoint '%s' was carried over to "
                 "'%s'",
                 vm->name, g->job->id, g->disk->name, g->what->name, g->to->node);
    carry_next(vm);
}

static struct vm *vm_of_calls(struct calls *c)
{
    return container_of(container_of(c, struct vm_watch, calls), struct vm, watch);
}

static int keep_status(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct vm_watch *w = container_of(c, struct vm_watch, calls);

    json_object_put(w->status);
    w->status = json_object_get(ret);
    return 0;
}

static void on_undone(struct calls *c, const struct failure *f)
{
    struct vm *vm = vm_of_calls(c);
    const struct failure why = vm->watch.carry_failure;

    carried(vm, &why);
}

/* The record is not carried over: what was made for it goes. */
static void put_back(struct vm *vm, bool record, const struct failure *f)
{
    struct vm_watch *w = &vm->watch;
    const struct cargo *g = &w->cargo[w->at];
    struct failure next = {0};

    w->carry_failure = *f;
    if (record)
        calls_add(&w->calls, "block-dirty-bitmap-remove",
                  qmp_args_strings("node", g->to->node, "name", g->what->name, NULL), QMP_NO_FD, 0, NULL);
    if (!g->there)
        calls_add(&w->calls, "block-dirty-bitmap-remove",
                  qmp_args_strings("node", g->to->node, "name", g->temporary, NULL), QMP_NO_FD, 0, NULL);
    if (calls_wait(&w->calls, on_undone, &next) != 0)
        on_undone(&w->calls, NULL);
}

static void on_filled(struct calls *c, const struct failure *f)
{
    struct vm *vm = vm_of_calls(c);

    if (f)
        put_back(vm, true, f);
    else
        carried(vm, NULL);
}

static void on_made(struct calls *c, const struct failure *f)
{
    struct vm *vm = vm_of_calls(c);
    struct vm_watch *w = &vm->watch;
    const struct cargo *g = &w->cargo[w->at];
    struct qmp_bitmap temporary = {g->to->node, g->temporary}, record = {g->to->node, g->what->name};
    struct failure next = {0};

    if (f) { /* of somebody else's making, perhaps */
        put_back(vm, false, f);
        return;
    }
    calls_add(c, "block-dirty-bitmap-merge", qmp_args_bitmap_merge(record, &temporary, 1), QMP_NO_FD, 0, NULL);
    calls_add(c, "block-dirty-bitmap-remove", qmp_args_strings("node", g->to->node, "name", g->temporary, NULL),
              QMP_NO_FD, 0, NULL);
    if (calls_wait(c, on_filled, &next) != 0)
        on_filled(c, &next);
}

/*
 * Third part: the temporary record has stood since the merge, and the job since then has not ended, so what it lacks
 * no one has written. Only now a bitmap of the checkpoint's name is made; it has all once the temporary one, which goes
 * on recording meanwhile, is merged into it. Whoever dies in between has not promised it, and the next look says GAP.
 */
static void on_merged(struct calls *c, const struct failure *f)
{
    struct vm *vm = vm_of_calls(c);
    struct vm_watch *w = &vm->watch;
    const struct cargo *g = &w->cargo[w->at];
    struct failure next = {0};

    if (!f && g->job->kind != JOB_STREAM && !is_at_work(w, g->job)) {
        (void)failure_set(&next, -ESTALE, "the job was faster");
        f = &next;
    }
    if (f) {
        put_back(vm, false, f);
        return;
    }
    if (g->there) {
        carried(vm, NULL);
        return;
    }
    calls_add(c, "block-dirty-bitmap-add",
              qmp_args_bitmap_add((struct qmp_bitmap){g->to->node, g->what->name}, g->what->granularity, true, false),
              QMP_NO_FD, 0, NULL);
    if (calls_wait(c, on_made, &next) != 0)
        on_made(c, &next);
}

/*
 * First and second part: the merge, and whether the job still stood after it. Command by command: a transaction drains
 * all disks first, and a QEMU up to 7.2 in which a job ends just then leaves a disk drained for good (0009).
 */
static void carry_next(struct vm *vm)
{
    struct vm_watch *w = &vm->watch;
    struct failure f = {0};
    struct cargo *g;
    char id[NAMES_ID_SIZE];

    if (w->at == w->ncargo || vm->stopping) {
        bool any = w->ncargo > 0;

        w->carrying = false;
        drop_cargo(w);
        if (w->jobs_wanted)
            meet_jobs(vm);
        else if (any || w->wanted)
            vm_watch_wake(vm);
        return;
    }
    g = &w->cargo[w->at];
    names_new_id(id);
    names_make(g->temporary, id, NAMES_KEEP, 0);
    if (!g->there)
        calls_add(
            &w->calls, "block-dirty-bitmap-add",
            qmp_args_bitmap_add((struct qmp_bitmap){g->to->node, g->temporary}, g->what->granularity, false, false),
            QMP_NO_FD, 0, NULL);
    for (size_t i = 0; i < g->what->nlayers; i++) {
        struct qmp_bitmap source = {g->what->layers[i].node, g->what->name},
                          target = {g->to->node, g->there ? g->what->name : g->temporary};

        if (g->what->layers[i].merge && goes(g->job, source.node))
            calls_add(&w->calls, "block-dirty-bitmap-merge", qmp_args_bitmap_merge(target, &source, 1), QMP_NO_FD, 0,
                      NULL);
    }
    calls_add(&w->calls, "query-block-jobs", NULL, QMP_NO_FD, 0, keep_status);
    if (calls_wait(&w->calls, on_merged, &f) != 0)
        on_merged(&w->calls, &f);
}

static void on_status(struct calls *c, const struct failure *f)
{
    struct vm *vm = vm_of_calls(c);

    if (!f && load_all(&vm->watch) < 0)
        log_warning("VM %s: out of memory for carrying records over", vm->name);
    carry_next(vm);
}

static void on_look(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct vm_watch *w = container_of(q, struct vm_watch, query);
    struct vm *vm = container_of(w, struct vm, watch);
    struct failure mine = {0};

    if (f || w->carrying || !w->jobs.njobs || vm->stopping || !(w->disks = disk_list_copy(disks))) {
        if (w->wanted)
            vm_watch_wake(vm);
        return;
    }
    w->carrying = true;
    w->carry_jobs = w->jobs;
    w->carry_targets = TAKE_PTR(w->targets);
    w->jobs = (struct job_list){0};
    calls_add(&w->calls, "query-block-jobs", NULL, QMP_NO_FD, 0, keep_status);
    if (calls_wait(&w->calls, on_status, &mine) < 0)
        on_status(&w->calls, &mine);
}

static const struct image *find_image(const struct disk_list *l, const char *node)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        for (size_t k = 0; k < l->disks[i].nimages; k++) {
            if (strcmp(l->disks[i].images[k].node, node) == 0)
                return &l->disks[i].images[k];
        }
    }
    return NULL;
}

static int keep_jobs(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct vm_watch *w = container_of(c, struct vm_watch, calls);

    if (jobs_parse(ret, &w->carry_jobs) < 0 ||
        !(w->carry_targets = calloc(w->carry_jobs.njobs + 1, sizeof(*w->carry_targets))))
        return failure_set(f, -ENOMEM, "out of memory");
    for (size_t i = 0; i < w->carry_jobs.njobs; i++) {
        const struct image *to = find_image(w->disks, w->carry_jobs.jobs[i].to);
        struct image *copy = &w->carry_targets[i];

        if (!to)
            continue; /* of a mirror: a look when it is ready tells more */
        *copy = *to;
        copy->node = strdup(to->node);
        copy->file = strdup(to->file);
        if (!copy->node || !copy->file)
            return failure_set(f, -ENOMEM, "out of memory");
    }
    return 0;
}

/*
 * A stream or a commit runs to its end by itself, and meanwhile QEMU must not be asked about its disks (vm.c): what was
 * seen last must do, and these two questions, which touch no image.
 */
static void meet_jobs(struct vm *vm)
{
    struct vm_watch *w = &vm->watch;
    struct failure f = {0};

    w->jobs_wanted = w->carrying;
    if (w->carrying || vm->stopping || !w->last || !(w->disks = disk_list_copy(w->last)))
        return;
    w->carrying = true;
    calls_add(&w->calls, "x-debug-query-block-graph", NULL, QMP_NO_FD, 0, keep_jobs);
    calls_add(&w->calls, "query-block-jobs", NULL, QMP_NO_FD, 0, keep_status);
    if (calls_wait(&w->calls, on_status, &f) < 0)
        on_status(&w->calls, &f);
}

/* -- when ---------------------------------------------------------------------------------------------------------- */

void vm_watch_wake(struct vm *vm)
{
    struct vm_watch *w = &vm->watch;

    w->wanted = w->query.vm || w->carrying;
    if (!w->wanted && !vm->stopping)
        (void)vm_query_start(vm, &w->query, on_look, NULL); /* else: without a connection; the next one looks */
}

/* At work: records can be carried over. Ready to change over, or gone: a look. */
static void on_job_changed(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    struct vm *vm = watch->arg;
    const char *status = qmp_get_string(data, "status");

    if (!status || names_is_ours(qmp_get_string(data, "id")))
        return;
    if (strcmp(status, "running") == 0)
        meet_jobs(vm);
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

void vm_watch_accept(struct vm *vm, const char *disk, const char *checkpoint)
{
    lineage_accept(vm->watch.lineage, disk, checkpoint);
    save(vm);
}

void vm_accept(struct vm *vm, const char *checkpoint)
{
    vm_watch_accept(vm, NULL, checkpoint);
}
