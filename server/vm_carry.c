/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Records carried over: while a block job of others takes a layer away, those that are in it are copied to the layer
 * that stays, where that can be done rightly, and promised to be there (backup/lineage).
 */
#include "vm_internal.h"

#include "backup/names.h"
#include "log.h"

#include <errno.h>

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

void vm_carry_drop(struct vm_watch *w)
{
    free(TAKE_PTR(w->cargo));
    w->ncargo = w->at = 0;
    disk_list_free(TAKE_PTR(w->disks));
    json_object_put(TAKE_PTR(w->status));
    vm_watch_drop_jobs(&w->carry_jobs, &w->carry_targets);
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

static void carried(struct vm *vm, const struct failure *f)
{
    struct vm_watch *w = &vm->watch;
    const struct cargo *g = &w->cargo[w->at++];

    w->npromises++;
    if (f)
        log_warning(
            "VM %s: the record of checkpoint '%s' on disk '%s' goes with the layer that job '%s' takes away: %s",
            vm->name, g->what->name, g->disk->name, g->job->id, f->text);
    else if (lineage_promise(w->lineage, g->disk, g->what->name, g->to, g->job->kind) == 0)
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
        vm_carry_drop(w);
        if (w->jobs_wanted)
            vm_carry_meet_jobs(vm);
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

void vm_carry_on_look(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
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
void vm_carry_meet_jobs(struct vm *vm)
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
