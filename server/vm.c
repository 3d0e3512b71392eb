/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "vm_internal.h"

#include "backup/names.h"
#include "backup/selftest.h"
#include "backup/sweep.h"
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

static const char *const state_names[] = {
    [VM_CONNECTING] = "connecting", [VM_LOST] = "not connected", [VM_SWEEPING] = "sweeping",
    [VM_READY] = "ready",           [VM_TESTING] = "testing",
};

/* -- life ---------------------------------------------------------------------------------------------------------- */

static void vm_free(struct vm *vm)
{
    vm_session_done(vm);
    vm_notes_done(vm);
    vm_commit_done(vm);
    vm_watch_done(vm);
    json_object_put(vm->last);
    for (size_t i = 0; vm->only && i < vm->nonly; i++)
        free(vm->only[i]);
    for (size_t i = 0; vm->renames && i < vm->nrenames; i++) {
        free((char *)vm->renames[i].name);
        free((char *)vm->renames[i].target);
    }
    free(vm->only);
    free(vm->renames);
    if (vm->state_dir >= 0)
        (void)close(vm->state_dir);
    free(vm->name);
    free(vm->qmp_path);
    free(vm->server_socket);
    free(vm);
}

static int copy_config(struct vm *vm, const struct vm_config *c)
{
    vm->linger_ms = c->linger_ms;
    vm->max_pause_ms = c->max_pause_ms;
    vm->hold_shutdown_ms = c->hold_shutdown_ms;
    vm->keep_checkpoints = c->keep_checkpoints;
    vm->engine_wish = c->engine;
    vm->session_timeout_ms = c->session_timeout_ms;
    vm->on_event = c->on_event;
    vm->event_arg = c->event_arg;
    vm->name = strdup(c->name);
    vm->qmp_path = c->qmp_path ? strdup(c->qmp_path) : NULL;
    vm->scratch = c->scratch;
    vm->place = c->place;
    vm->cbw_timeout_s = c->cbw_timeout_s;
    vm->give_back = c->give_back;
    vm->only = calloc(c->nonly + 1, sizeof(*vm->only));
    vm->renames = calloc(c->nrenames + 1, sizeof(*vm->renames));
    if (asprintf(&vm->server_socket, "nbd-%s.sock", c->name) < 0)
        vm->server_socket = NULL;
    if (!vm->name || (c->qmp_path && !vm->qmp_path) || !vm->only || !vm->renames || !vm->server_socket)
        return -ENOMEM;
    for (; vm->nonly < c->nonly; vm->nonly++) {
        if (!(vm->only[vm->nonly] = strdup(c->only[vm->nonly])))
            return -ENOMEM;
    }
    for (; vm->nrenames < c->nrenames; vm->nrenames++) {
        struct vm_rename *r = &vm->renames[vm->nrenames];

        r->name = strdup(c->renames[vm->nrenames].name);
        r->target = strdup(c->renames[vm->nrenames].target);
        if (!r->name || !r->target) {
            vm->nrenames++;
            return -ENOMEM;
        }
    }
    return 0;
}

static void on_ready(void *arg, struct json_object *greeting);
static void on_lost(void *arg, const struct failure *why);

static const struct qmp_client_ops client_ops = {.on_ready = on_ready, .on_lost = on_lost};

/*
 * QEMU up to 9.x closes the descriptors of a removed fdset only while the guest runs: what a session left of them in a
 * paused one, and with it the scratch files' space, goes when the guest goes on and the set is removed once more.
 */
static void on_resumed(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    vm_sweep_when_idle(container_of(watch, struct vm, resumed));
}

static int connect_to_qemu(struct vm *vm, const struct vm_config *config)
{
    struct vm_config twin = *config;
    int r = qmp_client_new(vm->loop, vm->qmp_path, &client_ops, vm, NULL, &vm->qmp);

    if (r == 0)
        r = vm_quiesce_new(vm, config);

    if (r < 0)
        return r;
    (void)failure_set(&vm->lost, -ENOTCONN, "VM '%s' has not been reached yet at '%s'", vm->name, vm->qmp_path);
    calls_init(&vm->calls, vm->qmp, VM_CALL_TIMEOUT_MS);
    qmp_watch_add(vm->qmp, &vm->resumed, "RESUME", on_resumed, vm);
    vm_life_watch(vm);
    if (config->nimages == 0)
        return 0;
    /* disks= and disk.NAME= speak of devices; an image has its name already. */
    twin.qmp_path = NULL;
    twin.twin_of = vm;
    twin.nonly = twin.nrenames = 0;
    return vm_new(vm->loop, &twin, &vm->twin);
}

static void ignore_closed(void *arg)
{
}

int vm_new(uv_loop_t *loop, const struct vm_config *config, struct vm **ret_vm)
{
    struct vm *vm = calloc(1, sizeof(*vm));
    int r;

    if (!vm)
        return -ENOMEM;
    vm->loop = loop;
    vm->state_dir = -1;
    vm->keeper = config->twin_of ? config->twin_of : vm;
    r = strlen(config->name) > CONFIG_NAME_MAX ? -ENAMETOOLONG : copy_config(vm, config);
    if (r == 0) {
        vm->state_dir = open(config->state_dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
        r = vm->state_dir < 0 ? -errno : vm->keeper == vm ? vm_notes_load(vm) : 0;
        r = r < 0 ? r : vm_watch_load(vm);
    }
    if (r == 0)
        r = vm->qmp_path ? connect_to_qemu(vm, config) : vm_images_new(vm, config);
    if (r < 0) {
        if (vm->qmp)
            qmp_client_close(vm->qmp, ignore_closed, NULL);
        quiesce_close(vm->quiesce);
        vm_free(vm);
        return r;
    }
    vm_watch_init(vm);
    (void)uv_timer_init(loop, &vm->linger);
    (void)uv_timer_init(loop, &vm->life.hold);
    (void)uv_timer_init(loop, &vm->kick);
    *ret_vm = vm;
    return 0;
}

void vm_start(struct vm *vm)
{
    int r = vm->images ? 0 : qmp_client_open(vm->qmp);

    if (r < 0)
        log_error("VM %s: cannot begin to connect to '%s': %s", vm->name, vm->qmp_path, strerror(-r));
}

const char *vm_trouble(const struct vm *vm)
{
    return vm->stopping ? "qpulld is shutting down" : vm->lost.text;
}

const char *vm_name(const struct vm *vm)
{
    return vm->name;
}

static void on_linger_closed(uv_handle_t *h)
{
    struct vm *vm = container_of((uv_timer_t *)h, struct vm, linger);
    void (*cb)(void *) = vm->on_stopped;
    void *arg = vm->stop_arg;

    vm_free(vm);
    cb(arg);
}

static void on_hold_closed(uv_handle_t *h)
{
    struct vm *vm = container_of((uv_timer_t *)h, struct vm, life.hold);

    uv_close((uv_handle_t *)&vm->linger, on_linger_closed);
}

static void on_kick_closed(uv_handle_t *h)
{
    struct vm *vm = container_of((uv_timer_t *)h, struct vm, kick);

    uv_close((uv_handle_t *)&vm->life.hold, on_hold_closed);
}

static void on_watch_closed(uv_handle_t *h)
{
    struct vm *vm = container_of((uv_timer_t *)h, struct vm, watch.deadline);

    uv_close((uv_handle_t *)&vm->kick, on_kick_closed);
}

static void on_client_closed(void *arg)
{
    struct vm *vm = arg;

    vm->client_closed = true;
    vm_stop_if_idle(vm);
}

void vm_refuse_questions(struct vm *vm, const struct failure *f)
{
    while (vm->waiting) {
        struct vm_query *q = vm->waiting;

        vm->waiting = q->next;
        q->vm = NULL;
        q->cb(q, NULL, f);
    }
}

/*
 * A sweep, a self-test or a worker under way ends by itself, with answers or with deadlines. Calls that the closing
 * client answers may write a last note.
 */
void vm_stop_if_idle(struct vm *vm)
{
    if (!vm->stopping || vm->session || vm_is_committing(vm) || vm->state == VM_SWEEPING || vm->state == VM_TESTING ||
        vm->twin || vm->note_writing || vm_watch_is_busy(vm))
        return;
    if (vm->images) {
        vm_images_stop(vm);
    } else if (vm->qmp && vm->qmp_path) {
        qmp_client_close(TAKE_PTR(vm->qmp), on_client_closed, vm);
    } else if (vm->client_closed && !vm->closing) {
        vm->closing = true;
        quiesce_close(TAKE_PTR(vm->quiesce));
        vm_watch_close(vm, on_watch_closed);
    }
}

static void on_twin_stopped(void *arg)
{
    struct vm *vm = arg;

    vm->twin = NULL;
    vm_stop_if_idle(vm);
}

void vm_stop(struct vm *vm, void (*cb)(void *arg), void *arg)
{
    struct failure f = {0};

    vm->stopping = true;
    vm->on_stopped = cb;
    vm->stop_arg = arg;
    (void)failure_set(&f, -ESHUTDOWN, "qpulld is shutting down");
    vm_refuse_questions(vm, &f);
    vm_refuse_waiting(vm, &f);
    if (vm->session)
        vm_end_session(vm);
    if (vm->twin)
        vm_stop(vm->twin, on_twin_stopped, vm);
    vm_commit_stop(vm);
    vm_stop_if_idle(vm);
}

/* -- connection ---------------------------------------------------------------------------------------------------- */

static void on_ready(void *arg, struct json_object *greeting)
{
    struct vm *vm = arg;
    struct json_object *version = qmp_get(greeting, "version"), *qemu = qmp_get(version, "qemu");

    (void)snprintf(vm->qemu_version, sizeof(vm->qemu_version), "%lld.%lld.%lld", (long long)qmp_get_int(qemu, "major"),
                   (long long)qmp_get_int(qemu, "minor"), (long long)qmp_get_int(qemu, "micro"));
    log_info("VM %s: connected to QEMU %s at %s", vm->name, vm->qemu_version, vm->qmp_path);
    memset(&vm->lost, 0, sizeof(vm->lost));
    vm_life_connected(vm);
    vm_images_yield(vm);
    vm->tested = vm->capable = false;
    memset(&vm->engine_failure, 0, sizeof(vm->engine_failure));
    if (!vm->session && !vm_is_committing(vm) && vm->state <= VM_LOST)
        vm_sweep(vm);
    else
        vm->sweep_wanted = true; /* what still walks on the old connection ends first */
}

static void on_lost(void *arg, const struct failure *why)
{
    struct vm *vm = arg;

    /* Attempts fail again and again while QEMU is down: one line is enough until the reason changes. */
    if (strcmp(vm->lost.text, why->text) != 0)
        log_warning("VM %s: no QMP connection: %s", vm->name, why->text);
    vm->lost = *why;
    vm->tested = vm->capable = false;
    if (vm->state == VM_READY || vm->state == VM_CONNECTING)
        vm->state = VM_LOST;
    if (vm->session) {
        struct failure f = {0};

        (void)failure_set(&f, -ENOTCONN, "%s", why->text);
        session_fail(vm->session, &f);
    }
    if (vm->state == VM_LOST) {
        vm_images_take_over(vm);
        vm_refuse_questions(vm, why);
        vm_refuse_waiting(vm, why);
    }
}

/* Perhaps with a connection that came after the one it began with. */
void vm_settle(struct vm *vm)
{
    vm->state = qmp_client_is_ready(vm->qmp) ? VM_READY : VM_LOST;
    if (vm->state == VM_LOST) {
        vm_refuse_questions(vm, &vm->lost);
        vm_refuse_waiting(vm, &vm->lost);
    } else if (vm->sweep_wanted && !vm->stopping) {
        vm->tested = false;
        memset(&vm->engine_failure, 0, sizeof(vm->engine_failure));
        vm_sweep(vm);
        return;
    } else if (!vm->images && !vm->capable && !vm->engine_failure.err && !vm->stopping) {
        vm_ask_capabilities(vm);
        return;
    }
    vm_watch_wake(vm);
    vm_pump(vm);
    vm_stop_if_idle(vm);
}

static void on_swept(void *arg, unsigned nsessions, const struct failure *f)
{
    struct vm *vm = arg;

    vm->life.leftovers = f && qmp_client_is_ready(vm->qmp);
    vm->keeper->counters.sweeps++;
    vm->keeper->counters.leftovers += nsessions;
    vm->keeper->counters.sweep_problems += vm->life.leftovers;
    if (f && !vm->life.leftovers)
        log_info("VM %s: QEMU went away while leftovers of an earlier session were being undone: %s", vm->name,
                 f->text);
    else if (f)
        log_error("VM %s: leftovers of an earlier session are still in QEMU: %s", vm->name, f->text);
    else if (nsessions)
        log_warning("VM %s: undid what %u earlier session%s had left in QEMU", vm->name, nsessions,
                    nsessions == 1 ? "" : "s");
    vm_settle(vm);
}

void vm_sweep(struct vm *vm)
{
    struct failure f = {0};
    struct sweep_config config = {
        .loop = vm->loop,
        .qmp = vm->qmp,
        .server_socket = vm->server_socket,
        .server_dir = vm->state_dir,
        .timeout_ms = VM_CALL_TIMEOUT_MS,
        .quiesce = vm->quiesce,
    };

    vm->state = VM_SWEEPING;
    vm->sweep_wanted = false;
    if (sweep_start(&config, on_swept, vm, &f) < 0)
        on_swept(vm, 0, &f);
}

void vm_sweep_when_idle(struct vm *vm)
{
    if (vm->session || vm->starting || vm_is_committing(vm) || vm->state != VM_READY)
        vm->sweep_wanted = true;
    else if (!vm->stopping)
        vm_sweep(vm);
}

/* -- the self-test ------------------------------------------------------------------------------------------------- */

static void on_tested(void *arg, bool narrow, const struct failure *f, const struct failure *problems)
{
    struct vm *vm = arg;

    if (problems->err)
        log_error("VM %s: the self-test left something in QEMU: %s", vm->name, problems->text);
    if (f) {
        log_warning("VM %s: %s", vm->name, f->text);
        vm_refuse_waiting(vm, f);
    } else {
        vm->tested = true;
        vm->narrow = narrow;
        log_info("VM %s: QEMU %s %s", vm->name, vm->qemu_version,
                 narrow ? "returns live bytes for reads across clusters (known of 7.0-7.2): reads are kept inside 64 "
                          "KiB clusters"
                        : "reads frozen bytes right");
    }
    vm_tell_tested(vm, f);
    vm_settle(vm);
}

static int on_iothreads(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    container_of(c, struct vm, calls)->has_iothreads = qmp_array_length(ret) > 0;
    return 0;
}

static void on_iothreads_known(struct calls *c, const struct failure *f)
{
    struct vm *vm = container_of(c, struct vm, calls);
    struct failure none = {0}, mine = {0};
    struct selftest_config config = {
        .loop = vm->loop,
        .qmp = vm->qmp,
        .server_socket = vm->server_socket,
        .server_dir = vm->state_dir,
        .timeout_ms = VM_CALL_TIMEOUT_MS,
    };

    if (!f && selftest_start(&config, on_tested, vm) == 0)
        return;
    (void)failure_set(&mine, -ENOMEM, "the self-test cannot start: %s", f ? f->text : "out of memory");
    on_tested(vm, false, &mine, &none);
}

void vm_test(struct vm *vm)
{
    struct failure f = {0}, none = {0};

    vm->state = VM_TESTING;
    calls_add(&vm->calls, "query-iothreads", NULL, QMP_NO_FD, 0, on_iothreads);
    if (calls_wait(&vm->calls, on_iothreads_known, &f) < 0)
        on_tested(vm, false, &f, &none);
}

/* -- questions ----------------------------------------------------------------------------------------------------- */

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

static void put_questions(struct vm *vm);

static void drop_answers(struct vm *vm)
{
    for (size_t i = 0; i < ARRAY_SIZE(vm->answers); i++)
        json_object_put(TAKE_PTR(vm->answers[i]));
}

/* list is given. */
static void answer(struct vm *vm, struct disk_list *list, const struct failure *f)
{
    while (vm->answering) {
        struct vm_query *q = vm->answering;

        vm->answering = q->next;
        if (q->next)
            q->next->prev = NULL;
        q->vm = NULL;
        q->cb(q, f ? NULL : list, f);
    }
    disk_list_free(list);
    vm->asking = false;
    vm_pump(vm);
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

    if (vm_images_pump(vm) && vm->waiting && !vm->asking && vm->state == VM_READY &&
        may_ask(vm, &later) && may_ask_now(vm))
        ask(vm);
}

int vm_query_start(struct vm *vm, struct vm_query *q,
                   void (*cb)(struct vm_query *, const struct disk_list *, const struct failure *), void *arg)
{
    vm = vm_now(vm);
    if (vm->stopping)
        return -ESHUTDOWN;
    if (vm->state == VM_LOST)
        return -ENOTCONN;
    q->cb = cb;
    q->arg = arg;
    q->vm = vm;
    q->prev = NULL;
    q->next = vm->waiting;
    if (q->next)
        q->next->prev = q;
    vm->waiting = q;
    vm_pump_later(vm); /* what cannot be asked answers at once: not from in here */
    return 0;
}

void vm_query_forget(struct vm_query *q)
{
    struct vm *vm = q->vm;

    if (!vm)
        return;
    if (q->next)
        q->next->prev = q->prev;
    if (q->prev)
        q->prev->next = q->next;
    else if (vm->waiting == q)
        vm->waiting = q->next;
    else
        vm->answering = q->next;
    q->vm = NULL;
}

/* -- for the control socket ---------------------------------------------------------------------------------------- */

static struct json_object *string_or_null(const char *s)
{
    return s && *s ? json_object_new_string(s) : NULL;
}

struct json_object *vm_to_json(struct vm *vm)
{
    struct vm *now = vm_now(vm); /* its session and its state are told */
    const struct vm *images = vm->twin ? vm->twin : vm;
    struct json_object *o = qmp_args_strings(
        "name", vm->name, "state", now->images ? images_state_name(now->images) : state_names[vm->state], NULL);
    bool connected = now->state > VM_LOST;
    struct vm *last = now->last ? now : vm;

    (void)json_object_object_add(o, "qmp", string_or_null(vm->qmp_path));
    (void)json_object_object_add(o, "images", images->images ? images_to_json(images->images) : NULL);
    (void)json_object_object_add(o, "powered-off", json_object_new_boolean(now->images != NULL));
    (void)json_object_object_add(o, "connected", json_object_new_boolean(connected));
    (void)json_object_object_add(o, "qemu", connected ? json_object_new_string(now->qemu_version) : NULL);
    (void)json_object_object_add(o, "reason", connected ? NULL : string_or_null(now->lost.text));
    (void)json_object_object_add(o, "session", now->session ? json_object_new_string(session_id(now->session)) : NULL);
    (void)json_object_object_add(o, "engine", vm->qmp_path ? vm_engine_to_json(vm) : NULL);
    (void)json_object_object_add(o, "narrow-reads", now->tested ? json_object_new_boolean(now->narrow) : NULL);
    (void)json_object_object_add(o, "last-session", json_object_get(last->last));
    return o;
}

struct json_object *checkpoint_to_json(const struct disk *d, const struct checkpoint *c)
{
    struct json_object *o = json_object_new_object();

    json_object_object_add(o, "name", json_object_new_string(c->name));
    json_object_object_add(o, "disk", json_object_new_string(d->name));
    json_object_object_add(o, "usable", json_object_new_boolean(c->reason == REASON_NONE));
    json_object_object_add(o, "reason", json_object_new_string(reason_name(c->reason)));
    json_object_object_add(o, "text", json_object_new_string(checkpoint_text(c)));
    json_object_object_add(o, "granularity", json_object_new_uint64(c->granularity));
    json_object_object_add(o, "dirty-bytes", json_object_new_uint64(c->dirty));
    json_object_object_add(o, "layers", json_object_new_uint64(c->nlayers));
    return o;
}

struct json_object *disk_list_to_json(const struct disk_list *disks, const char *vm)
{
    struct json_object *list = json_object_new_array();

    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];
        struct json_object *o =
            qmp_args_strings("vm", vm, "name", d->name, "node", d->node, "format", d->format, "qdev", d->qdev, NULL);
        struct json_object *checkpoints = json_object_new_array();

        (void)json_object_object_add(o, "size", json_object_new_int64((int64_t)d->size));
        (void)json_object_object_add(o, "tracked", json_object_new_boolean(d->tracked));
        for (size_t k = 0; k < d->ncheckpoints; k++)
            (void)json_object_array_add(checkpoints, checkpoint_to_json(d, &d->checkpoints[k]));
        (void)json_object_object_add(o, "checkpoints", checkpoints);
        (void)json_object_array_add(list, o);
    }
    return list;
}
