/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What happens to the guest and its QEMU while a session stands, as far as QEMU announces it: how it ends, in words
 * for those whose session ends with it, and how long it is held; a VM that is migrated; a disk that is unplugged; jobs
 * of others that stood in the way of the undoing of a session (docs/decisions/0014-vm-life.md).
 */
#include "log.h"
#include "vm_internal.h"

#include "backup/names.h"

#include <errno.h>
#include <stdio.h>

/* -- last words ---------------------------------------------------------------------------------------------------- */

/* QEMU: ShutdownCause (qapi/run-state.json). Those of a reset come with -no-reboot only, when QEMU ends instead. */
static const struct {
    const char *reason, *words;
} causes[] = {
    {"guest-shutdown", "its guest has shut down"},
    {"guest-reset", "its guest has rebooted, and QEMU was told to end then"},
    {"guest-panic", "its guest has panicked"},
    {"host-qmp-quit", "somebody sent it 'quit'"},
    {"host-qmp-system-reset", "somebody reset its guest, and QEMU was told to end then"},
    {"host-signal", "it got a signal"},
    {"host-ui", "its window was closed"},
    {"host-error", "it met an error of the host"},
};

static void on_held_too_long(uv_timer_t *t)
{
    struct vm *vm = container_of(t, struct vm, life.hold);
    struct failure f = {0};

    if (!vm->session)
        return;
    (void)failure_set(&f, -ETIMEDOUT,
                      "VM '%s' has been off for %g s, and --hold-shutdown lets QEMU wait no longer for session %s; "
                      "hold longer, or pull faster",
                      vm->name, vm->hold_shutdown_ms / 1000.0, session_id(vm->session));
    session_fail(vm->session, &f);
}

static void hold(struct vm *vm, const char *words, bool panic)
{
    if (!vm->session || !session_holds(vm->session, panic) || vm->life.held)
        return; /* held: it is told once more, and that gives it no more time */
    log_warning("VM %s: %s; QEMU waits for the end of session %s, for %g s at most", vm->name, words,
                session_id(vm->session), vm->hold_shutdown_ms / 1000.0);
    vm->life.held = true;
    (void)uv_timer_start(&vm->life.hold, on_held_too_long, vm->hold_shutdown_ms, 0);
}

void vm_life_session_down(struct vm *vm)
{
    if (vm->life.held)
        log_info("VM %s: QEMU has waited for the end of session %s, and ends now", vm->name, session_id(vm->session));
    vm->life.held = false;
    (void)uv_timer_stop(&vm->life.hold);
}

/* A suspended guest is to QEMU what a paused one is (vm.c, on_resumed()), but another event ends it. */
static void on_woken(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    vm_sweep_when_idle(watch->arg);
}

static void on_shutdown(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    struct vm *vm = watch->arg;
    const char *reason = qmp_get_string(data, "reason"), *words = "it was told to";

    for (size_t i = 0; reason && i < ARRAY_SIZE(causes); i++) {
        if (strcmp(causes[i].reason, reason) == 0)
            words = causes[i].words;
    }
    (void)snprintf(vm->life.words, sizeof(vm->life.words), "QEMU ended: %s (%s)", words, reason ? reason : event);
    /* 'quit' and signals end QEMU whatever its action is (softmmu/runstate.c, qemu_system_killed(), qmp_quit()). */
    if (!reason || (strcmp(reason, "host-qmp-quit") != 0 && strcmp(reason, "host-signal") != 0))
        hold(vm, words, /* panic= */ false);
}

static void on_panicked(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    const char *action = qmp_get_string(data, "action");

    if (action && strcmp(action, "pause") == 0)
        hold(watch->arg, "its guest has panicked", /* panic= */ true);
}

/* With -no-shutdown QEMU stays, and its guest may run again: what it announced is over. */
static void on_goes_on(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    struct vm *vm = watch->arg;

    *vm->life.words = '\0';
    vm->life.held = false;
    (void)uv_timer_stop(&vm->life.hold);
}

int vm_life_last_words(const struct vm *vm, const struct failure *why, struct failure *f)
{
    if (*vm->life.words)
        return failure_set(f, why->err, "%s", vm->life.words);
    return failure_set(f, why->err, "the connection to QEMU was lost, without a word before (killed, or crashed?): %s",
                       why->text);
}

/* -- migrated ------------------------------------------------------------------------------------------------------ */

static void ask_status(struct vm *vm);

/*
 * From its switch-over on another QEMU may write to the disks, and what we call frozen is read from them. The lock
 * keeps a migration from beginning; this is for a QEMU in which it cannot.
 */
static void on_status(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    struct vm *vm = call->arg;
    const char *status = qmp_get_string(ret, "status");
    struct failure why = {0};

    vm->life.asking = false;
    if (vm->session && status && (strcmp(status, "finish-migrate") == 0 || strcmp(status, "postmigrate") == 0)) {
        (void)failure_set(&why, -ESTALE,
                          "VM '%s' is migrated away while session %s stands, and another QEMU may write to its disks",
                          vm->name, session_id(vm->session));
        session_fail(vm->session, &why);
    } else if (vm->life.ask_again && !vm->stopping && qmp_client_is_ready(vm->qmp)) {
        ask_status(vm);
    }
}

static void ask_status(struct vm *vm)
{
    vm->life.ask_again = false;
    vm->life.asking = qmp_call_start(vm->qmp, &vm->life.status, "query-status", NULL, QMP_NO_FD, 0, on_status, vm) == 0;
}

static void on_stop(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    struct vm *vm = watch->arg;

    if (vm->life.asking)
        vm->life.ask_again = true; /* the answer on its way may be of an earlier stop */
    else if (vm->session)
        ask_status(vm);
}

/* -- unplugged ----------------------------------------------------------------------------------------------------- */

/* A device's own path, or that of the back end inside it (virtio). */
static bool is_device_of(const struct disk *d, const char *path)
{
    size_t len = strlen(path);

    return strncmp(d->qom_path, path, len) == 0 && (d->qom_path[len] == '\0' || d->qom_path[len] == '/');
}

static void on_unplugged(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    struct vm *vm = watch->arg;
    const char *path = qmp_get_string(data, "path");
    const struct disk_list *disks = vm->session && path ? session_disks(vm->session) : NULL;

    /* The device itself comes last, after what is inside it. */
    for (size_t i = 0; disks && i < disks->ndisks && qmp_get_string(data, "device"); i++) {
        const struct disk *d = &disks->disks[i];

        if (is_device_of(d, path))
            log_warning("VM %s: disk %s was unplugged; session %s goes on with what was frozen of it%s%s%s", vm->name,
                        d->name, session_id(vm->session), session_checkpoint(vm->session) ? ", checkpoint " : "",
                        session_checkpoint(vm->session) ? session_checkpoint(vm->session) : "",
                        session_checkpoint(vm->session) ? " is not kept on it" : "");
    }
}

/* -- what stood in the way ----------------------------------------------------------------------------------------- */

static void on_job_changed(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    struct vm *vm = watch->arg;
    const char *status = qmp_get_string(data, "status");

    if (vm->life.leftovers && status && strcmp(status, "null") == 0 && !names_is_ours(qmp_get_string(data, "id")))
        vm_sweep_when_idle(vm);
}

/* -- life ---------------------------------------------------------------------------------------------------------- */

void vm_life_watch(struct vm *vm)
{
    struct vm_life *l = &vm->life;

    qmp_watch_add(vm->qmp, &l->shutdown, "SHUTDOWN", on_shutdown, vm);
    qmp_watch_add(vm->qmp, &l->panicked, "GUEST_PANICKED", on_panicked, vm);
    qmp_watch_add(vm->qmp, &l->resumed, "RESUME", on_goes_on, vm);
    qmp_watch_add(vm->qmp, &l->reset, "RESET", on_goes_on, vm);
    qmp_watch_add(vm->qmp, &l->woken, "WAKEUP", on_woken, vm);
    qmp_watch_add(vm->qmp, &l->stop, "STOP", on_stop, vm);
    qmp_watch_add(vm->qmp, &l->unplugged, "DEVICE_DELETED", on_unplugged, vm);
    qmp_watch_add(vm->qmp, &l->jobs, "JOB_STATUS_CHANGE", on_job_changed, vm);
}

void vm_life_connected(struct vm *vm)
{
    *vm->life.words = '\0';
}
