/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What disks a VM has, as QEMU says: when it may be asked, and who is answered. */
#include "vm_internal.h"

#include "backup/names.h"

#include <errno.h>

static bool is_wanted(const struct vm *vm, const struct disk *d)
{
    for (size_t i = 0; i < vm->nonly; i++) {
        if (strcmp(vm->only[i], d->name) == 0 || strcmp(vm->only[i], d->node) == 0 || strcmp(vm->only[i], d->qdev) == 0)
            return true;
    }
    return vm->nonly == 0;
}

static int rename_disk(const struct vm *vm, struct disk *d)
{
    for (size_t i = 0; i < vm->nrenames; i++) {
        const char *target = vm->renames[i].target;
        char *name;

        if (strcmp(target, d->name) != 0 && strcmp(target, d->node) != 0 && strcmp(target, d->qdev) != 0)
            continue;
        if (!(name = strdup(vm->renames[i].name)))
            return -ENOMEM;
        free(d->name);
        d->name = name;
        break;
    }
    return 0;
}

/* The configuration's choice and names. Disks that are not wanted move to the end and out of sight. */
static int apply_config(const struct vm *vm, struct disk_list *l)
{
    size_t n = 0;

    for (size_t i = 0; i < l->ndisks; i++) {
        struct disk d = l->disks[i];

        if (!is_wanted(vm, &d))
            continue;
        l->disks[i] = l->disks[n];
        l->disks[n] = d;
        if (rename_disk(vm, &l->disks[n++]) < 0)
            return -ENOMEM;
    }
    disk_list_truncate(l, n);
    return 0;
}

static void push_query(struct vm_query *q, struct vm_query **list)
{
    q->prev = NULL;
    q->next = *list;
    if (q->next)
        q->next->prev = q;
    *list = q;
}

/* From the list that it is in: it is its caller's again. */
static void remove_query(struct vm_query *q)
{
    struct vm *vm = TAKE_PTR(q->vm);

    if (q->next)
        q->next->prev = q->prev;
    if (q->prev)
        q->prev->next = q->next;
    else if (vm->waiting == q)
        vm->waiting = q->next;
    else
        vm->answering = q->next;
}

static void put_questions(struct vm *vm);

static void drop_answers(struct vm *vm)
{
    for (size_t i = 0; i < ARRAY_SIZE(vm->answers); i++)
        json_object_put(TAKE_PTR(vm->answers[i]));
}

static bool nothing_happened(const struct vm *vm)
{
    return vm->qmp && qmp_client_nhappenings(vm->qmp) == vm->nhappenings;
}

/* An idle VM keeps no memory for it. */
static void drop_recent_if_old(struct vm *vm)
{
    uint64_t age_ms = (uv_hrtime() - vm->asked_ns) / 1000000;

    if (!vm->recent)
        return;
    if (vm->images || age_ms > VM_RECENT_MS || !nothing_happened(vm))
        disk_list_free(TAKE_PTR(vm->recent));
    else if (!uv_is_active((uv_handle_t *)&vm->kick))
        vm_pump_after(vm, VM_RECENT_MS + 1 - (unsigned)age_ms);
}

/*
 * From those who wait to those who are answered: who is content with the answer that is there. A client asks about its
 * maps and, a moment later, with GO; the guest's QEMU need not be asked twice for that.
 */
static bool take_content(struct vm *vm)
{
    for (struct vm_query *q = vm->waiting, *next; q; q = next) {
        next = q->next;
        if (q->content_ns == 0 || q->content_ns >= vm->asked_ns)
            continue;
        remove_query(q);
        q->vm = vm;
        push_query(q, &vm->answering);
    }
    return vm->answering;
}

/*
 * list is given. A client that enters at this answer needs no other, unless something has happened at it; nor one that
 * asks again in a moment. Nobody's end stops the VM before all have heard: they may call QEMU.
 */
static void answer(struct vm *vm, struct disk_list *list, const struct failure *f)
{
    if (f)
        disk_list_free(TAKE_PTR(list));
    vm->telling = true;
    while (vm->answering) {
        struct vm_query *q = vm->answering;

        remove_query(q);
        q->cb(q, list, f);
    }
    vm->asking = false;
    vm->fresh = nothing_happened(vm) ? list : NULL;
    vm_pump(vm);
    vm->fresh = NULL;
    vm->telling = false;
    disk_list_free(vm->recent);
    vm->recent = list;
    drop_recent_if_old(vm);
    vm_stop_if_idle(vm);
}

/* While backup jobs of ours go, QEMU must not be asked about its disks (session_may_ask()): the question waits, or
 * fails. */
static bool may_ask(const struct vm *vm, struct failure *f)
{
    if (!vm->session || session_may_ask(vm->session))
        return true;
    (void)failure_set(f, -EBUSY, "session %s of VM '%s' is ending; try again in a moment", session_id(vm->session),
                      vm->name);
    return false;
}

static void on_answers(struct calls *c, const struct failure *f)
{
    struct vm *vm = container_of(c, struct vm, calls);
    struct disk_list *list = NULL;
    struct failure mine = {0};

    /* From here on, for the look below takes its time. */
    vm->nhappenings = vm->qmp ? qmp_client_nhappenings(vm->qmp) : 0;
    /* Between two answers a job of others may change the graph. */
    if (!f && !answers_agree(vm->images ? NULL : vm->answers[0], vm->answers[1], vm->answers[2]) &&
        vm->nasks < VM_ASKS_MAX) {
        if (may_ask(vm, &mine)) {
            put_questions(vm);
            return;
        }
        f = &mine;
    }
    if (!f && (disk_list_parse(vm->answers[0], vm->answers[1], vm->answers[2], &list, &mine) < 0 ||
               apply_config(vm, list) < 0 || vm_watch_look(vm, list, vm->answers[1], vm->answers[2], answer) < 0)) {
        (void)failure_set(&mine, -ENOMEM, "out of memory");
        f = &mine;
    }
    drop_answers(vm);
    if (f)
        answer(vm, list, f);
}

static int keep_answer(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct vm *vm = container_of(c, struct vm, calls);

    json_object_put(vm->answers[index]);
    vm->answers[index] = json_object_get(ret);
    return 0;
}

static void put_questions(struct vm *vm)
{
    struct failure f = {0};

    vm->nasks++;
    json_object_put(TAKE_PTR(vm->answers[0]));
    if (vm->images)
        vm->answers[0] = images_query_block(vm->images);
    else
        calls_add(&vm->calls, "query-block", NULL, QMP_NO_FD, 0, keep_answer);
    calls_add(&vm->calls, "query-named-block-nodes", qmp_args_query_named_block_nodes(), QMP_NO_FD, 1, keep_answer);
    calls_add(&vm->calls, "x-debug-query-block-graph", NULL, QMP_NO_FD, 2, keep_answer);
    if (calls_wait(&vm->calls, on_answers, &f) < 0)
        on_answers(&vm->calls, &f);
}

static int see_jobs(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    for (size_t i = 0; i < qmp_array_length(ret); i++) {
        struct json_object *job = json_object_array_get_idx(ret, i);
        const char *type = qmp_get_string(job, "type"), *id = qmp_get_string(job, "device");

        if (names_is_ours(id)) /* on_jobs_seen() knows how it stands */
            continue;
        if (type && (strcmp(type, "stream") == 0 || strcmp(type, "commit") == 0) && !qmp_get_bool(job, "ready"))
            return failure_set(f, -EBUSY,
                               "job '%s' (%s) of others is changing a disk's layers, and QEMU must not be asked about "
                               "its disks meanwhile; try again when it has ended",
                               id ? id : "?", type);
    }
    return 0;
}

static void on_jobs_seen(struct calls *c, const struct failure *f)
{
    struct vm *vm = container_of(c, struct vm, calls);
    struct failure mine = {0};

    if (!f && !vm_commit_may_ask(vm))
        (void)failure_set(
            &mine, -EBUSY,
            "a commit of VM '%s' is about to change a disk's layers, and QEMU must not be asked about its "
            "disks meanwhile; try again in a moment",
            vm->name);
    if (f || mine.err || !may_ask(vm, &mine))
        on_answers(c, f ? f : &mine);
    else
        put_questions(vm);
}

/*
 * One round of questions to QEMU answers everybody who asked before it began. QEMU 7.2 reads the bitmap directories of
 * all images for query-block and query-named-block-nodes, and crashes when a stream or a commit ends just then.
 */
static void ask(struct vm *vm)
{
    struct failure f = {0};

    vm->asking = true;
    vm->asked_ns = uv_hrtime();
    vm->nasks = 0;
    vm->answering = TAKE_PTR(vm->waiting);
    calls_add(&vm->calls, "query-block-jobs", NULL, QMP_NO_FD, 0, see_jobs);
    if (calls_wait(&vm->calls, on_jobs_seen, &f) < 0)
        on_answers(&vm->calls, &f);
}

/* A client that asks without end shall not keep the guest's QEMU busy with answers. */
static bool may_ask_now(struct vm *vm)
{
    uint64_t now = uv_now(vm->loop), rests = (now - vm->rested_ms) / VM_ROUND_REST_MS;

    if (rests > 0) {
        vm->nrounds -= (unsigned)MIN(rests, (uint64_t)vm->nrounds);
        vm->rested_ms = now;
    }
    if (vm->nrounds < VM_ROUNDS_BURST) {
        vm->nrounds++;
        return true;
    }
    vm_pump_after(vm, VM_ROUND_REST_MS);
    return false;
}

void vm_ask_if_waiting(struct vm *vm)
{
    struct failure later = {0};

    drop_recent_if_old(vm);
    if (vm->telling && vm->waiting)
        vm_pump_later(vm);
    if (vm->telling || !vm_images_pump(vm) || !vm->waiting || vm->asking || vm->state != VM_READY ||
        !may_ask(vm, &later))
        return;
    if (vm->recent && take_content(vm)) {
        vm->asking = true;
        answer(vm, TAKE_PTR(vm->recent), NULL);
    } else if (may_ask_now(vm)) {
        ask(vm);
    }
}

int vm_query_start(struct vm *vm, struct vm_query *q,
                   void (*cb)(struct vm_query *, const struct disk_list *, const struct failure *), void *arg)
{
    vm = vm_now(vm);
    /* Whoever asks without end shall not keep a VM that is to go; its own look saves what was carried over. */
    if (vm->stopping || (vm_is_leaving(vm) && q != &vm->watch.query))
        return -ESHUTDOWN;
    if (vm->state == VM_LOST)
        return -ENOTCONN;
    q->cb = cb;
    q->arg = arg;
    q->vm = vm;
    push_query(q, &vm->waiting);
    vm_pump_later(vm); /* what cannot be asked answers at once: not from in here */
    return 0;
}

void vm_refuse_questions(struct vm *vm, const struct failure *f)
{
    while (vm->waiting) {
        struct vm_query *q = vm->waiting;

        remove_query(q);
        q->cb(q, NULL, f);
    }
}

void vm_query_forget(struct vm_query *q)
{
    if (q->vm)
        remove_query(q);
}
