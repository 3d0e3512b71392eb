/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "vm_internal.h"

#include "backup/claim.h"
#include "backup/names.h"
#include "backup/private_socket.h"
#include "backup/selftest.h"
#include "backup/sweep.h"
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

/* -- life ---------------------------------------------------------------------------------------------------------- */

static void vm_free(struct vm *vm)
{
    vm_session_done(vm);
    vm_notes_done(vm);
    vm_commit_done(vm);
    vm_watch_done(vm);
    json_object_put(vm->last);
    disk_list_free(vm->recent);
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
    if (vm->claim_fd >= 0)
        (void)close(vm->claim_fd);
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
    vm->rate = c->rate;
    vm->may_start = c->may_start;
    vm->start_arg = c->start_arg;
    vm->on_event = c->on_event;
    vm->event_arg = c->event_arg;
    vm->name = strdup(c->name);
    vm->qmp_path = c->qmp_path ? strdup(c->qmp_path) : NULL;
    vm->scratch = c->scratch;
    vm->place = c->place;
    vm->cbw_timeout_s = c->cbw_timeout_s;
    vm->give_back = c->give_back;
    vm->vhost_room = c->vhost_room;
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

/* Two that write the notes of one VM, or take its NBD socket from each other, would both be wrong. */
static int claim_state(struct vm *vm)
{
    char who[64] = "";
    pid_t holder = 0;
    int r;

    if (vm->keeper != vm)
        return 0;
    r = claim_take(vm->state_dir, vm->name, &vm->claim_fd, &holder);
    if (r == 0) {
        private_socket_tidy(vm->state_dir);
        return 0;
    }
    if (r != -EBUSY) { /* as good as it gets */
        log_warning("VM %s: cannot lock its notes in '" CLAIM_DIR "' of the state directory (%s): see to it that no "
                    "other qpulld or nbdkit uses them",
                    vm->name, strerror(-r));
        return 0;
    }
    if (holder)
        (void)snprintf(who, sizeof(who), " (process %d)", (int)holder);
    log_error(
        "VM %s: another qpulld or nbdkit%s keeps the notes of a VM of this name in the same state directory; give "
        "this one another name or directory, or end the other",
        vm->name, who);
    return r;
}

int vm_new(uv_loop_t *loop, const struct vm_config *config, struct vm **ret_vm)
{
    struct vm *vm = calloc(1, sizeof(*vm));
    int r;

    if (!vm)
        return -ENOMEM;
    vm->loop = loop;
    vm->state_dir = vm->claim_fd = -1;
    vm->keeper = config->twin_of ? config->twin_of : vm;
    r = strlen(config->name) > CONFIG_NAME_MAX ? -ENAMETOOLONG : copy_config(vm, config);
    if (r == 0) {
        vm->state_dir = open(config->state_dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
        r = vm->state_dir < 0 ? -errno : claim_state(vm);
        r = r == 0 && vm->keeper == vm ? vm_notes_load(vm) : r;
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

static const char *stop_words(const struct vm *vm)
{
    return vm->keeper->shut.err ? vm->keeper->shut.text : "qpulld is shutting down";
}

const char *vm_trouble(const struct vm *vm)
{
    return vm->stopping || vm_is_leaving(vm) ? stop_words(vm) : vm->lost.text;
}

void vm_shut(struct vm *vm, const struct failure *why)
{
    vm->shut = why ? *why : (struct failure){0};
    vm_pump_later(vm); /* who waits for a session is told */
    if (vm->twin)
        vm_pump_later(vm->twin);
}

/* By more than questions. */
static bool is_in_use(const struct vm *vm)
{
    return vm->session || vm->stays || vm->starting || vm->nwrites || vm->note_writing || vm->watch.carrying ||
           vm_is_committing(vm) || vm_commit_is_news(vm) || (vm->twin && is_in_use(vm->twin));
}

bool vm_is_leaving(const struct vm *vm)
{
    return vm->keeper->shut.err && !is_in_use(vm->keeper);
}

bool vm_is_idle(const struct vm *vm)
{
    return !is_in_use(vm) && !vm->waiting && !vm->answering && (!vm->twin || vm_is_idle(vm->twin));
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

/*
 * A sweep, a self-test or a worker under way ends by itself, with answers or with deadlines. Calls that the closing
 * client answers may write a last note.
 */
void vm_stop_if_idle(struct vm *vm)
{
    if (!vm->stopping || vm->telling || vm->session || vm_is_committing(vm) || vm->state == VM_SWEEPING ||
        vm->state == VM_TESTING || vm->twin || vm->note_writing || vm_watch_is_busy(vm))
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
    (void)failure_set(&f, -ESHUTDOWN, "%s", stop_words(vm));
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
    vm_watch_lost(vm);
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
    memset(&vm->left, 0, sizeof(vm->left));
    if (f)
        vm->left = *f;
    vm->keeper->counters.sweeps++;
    vm->keeper->counters.leftovers += nsessions;
    vm->keeper->counters.sweep_problems += vm->life.leftovers;
    if (f && !vm->life.leftovers)
        log_info("VM %s: QEMU went away while leftovers of an earlier session were being undone: %s", vm->name,
                 f->text);
    else if (f && f->err == -EBUSY)
        log_warning("VM %s: %s", vm->name, f->text);
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
