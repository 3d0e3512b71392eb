/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the doctor finds out of one VM: first what is known here, then its disks, then what only looking into QEMU
 * tells, and in the end the self-test, where it has not run yet.
 */
#include "doctor.h"
#include "vm_internal.h"

#include "backup/names.h"
#include "backup/sweep.h"

#include <errno.h>

static void add(struct vm_checkup *c, const char *check, enum verdict verdict, const char *advice, const char *fmt, ...)
    _printf_(5, 6);

static void add(struct vm_checkup *c, const char *check, enum verdict verdict, const char *advice, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    doctor_vadd(c->checks, c->vm->name, NULL, check, verdict, advice, fmt, ap);
    va_end(ap);
}

/* -- what is known ------------------------------------------------------------------------------------------------- */

static const char *advice_for_monitor(int err)
{
    switch (err) {
    case -ENOENT:
    case -ECONNREFUSED:
        return "start the VM, or correct the path of its QMP socket (--vm, qmp=)";
    case -ETIMEDOUT:
    case -EAGAIN:
        return "give qpulld a monitor of its own: one more -qmp unix:PATH,server=on,wait=off";
    case -EACCES:
    case -EPERM:
        return "see \"qmp access\"";
    case -ECONNRESET:
        return "see whether the VM still runs, and what QEMU's log says; qpulld tries again by itself";
    default:
        return "see what QEMU's log says";
    }
}

static void add_monitor(struct vm_checkup *c)
{
    const struct vm *vm = c->vm;

    if (!vm->qmp_path)
        add(c, "qmp", VERDICT_OK, NULL, "no QMP socket is configured, only images");
    else if (vm->state > VM_LOST)
        add(c, "qmp", VERDICT_OK, NULL, "connected to QEMU %s at %s", vm->qemu_version, vm->qmp_path);
    else if (vm->twin)
        add(c, "qmp", VERDICT_NOTE, NULL, "powered off, as far as can be seen: its images are served (%s)",
            vm->lost.text);
    else
        add(c, "qmp", VERDICT_WRONG, advice_for_monitor(vm->lost.err), "%s", vm->lost.text);
}

static void add_engine(struct vm_checkup *c)
{
    const struct vm *vm = c->vm;

    if (vm->engine_failure.err)
        add(c, "engine", VERDICT_WRONG, "update QEMU, or say --engine=auto", "%s", vm->engine_failure.text);
    else if (vm->capable)
        add(c, "engine", vm->engine.risk ? VERDICT_NOTE : VERDICT_OK,
            vm->engine.risk ? "watch --scratch, or say --engine=auto (QEMU 7.1 or later has copy-before-write)" : NULL,
            "%s: %s%s%s", engine_name(vm->engine.engine), vm->engine.why, vm->engine.risk ? "; " : "",
            vm->engine.risk ? vm->engine.risk : "");
}

static void add_last(struct vm_checkup *c)
{
    const char *failure = qmp_get_string(c->vm->last, "failure"), *problems = qmp_get_string(c->vm->last, "problems");

    if (failure)
        add(c, "last session", VERDICT_NOTE, NULL, "%s", failure);
    if (problems)
        add(c, "last session", VERDICT_NOTE, NULL, "%s", problems);
}

/* -- disks --------------------------------------------------------------------------------------------------------- */

static void add_checkpoints(struct vm_checkup *c, const struct disk *d, size_t *n, size_t *nbroken)
{
    for (size_t i = 0; i < d->ncheckpoints; i++) {
        const struct checkpoint *k = &d->checkpoints[i];
        bool busy = k->reason == REASON_BUSY;

        (*n)++;
        if (k->reason == REASON_NONE)
            continue;
        (*nbroken)++;
        doctor_add(c->checks, c->vm->name, d->name, "checkpoints", busy ? VERDICT_NOTE : VERDICT_WRONG,
                   busy ? "try again when that has ended"
                        : "delete it (qpull checkpoint delete); the next pull of this disk is a full one",
                   "'%s' cannot carry an incremental (%s): %s", k->name, reason_name(k->reason), checkpoint_text(k));
    }
}

static bool is_there(const struct disk_list *disks, const char *name)
{
    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];

        if (strcmp(name, d->name) == 0 || strcmp(name, d->node) == 0 || strcmp(name, d->qdev) == 0)
            return true;
    }
    return false;
}

static void add_disks(struct vm_checkup *c, const struct disk_list *disks)
{
    const struct vm *vm = c->vm;
    size_t n = 0, nbroken = 0;

    if (disks->ndisks == 0)
        add(c, "disks", VERDICT_WRONG, "a disk needs a device with a name (id=) that is writable and has a medium",
            "there is no disk that can be pulled");
    for (size_t i = 0; i < vm->nonly; i++) {
        bool renamed = false;

        for (size_t k = 0; k < vm->nrenames; k++)
            renamed |= strcmp(vm->renames[k].target, vm->only[i]) == 0 && is_there(disks, vm->renames[k].name);
        if (!renamed && !is_there(disks, vm->only[i]))
            add(c, "disks", VERDICT_WRONG, "correct disks= of this VM, see qpull disks",
                "disks= names '%s', and QEMU has no such disk", vm->only[i]);
    }
    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];

        if (d->tracked)
            doctor_add(c->checks, vm->name, d->name, "disks", VERDICT_OK, NULL, "%s: keeps checkpoints", d->format);
        else
            doctor_add(c->checks, vm->name, d->name, "disks", VERDICT_NOTE,
                       "convert it to qcow2 version 3 for incremental pulls",
                       "%s: keeps no checkpoints, each pull is a full one", d->format);
        add_checkpoints(c, d, &n, &nbroken);
    }
    if (!nbroken)
        add(c, "checkpoints", VERDICT_OK, NULL, "%zu record%s on its disks, all usable", n, n == 1 ? "" : "s");
}

/* -- the self-test ------------------------------------------------------------------------------------------------- */

static void finish(struct vm_checkup *c)
{
    c->cb(c);
}

static void add_test(struct vm_checkup *c)
{
    const struct vm *vm = c->vm;

    if (!vm->tested)
        return;
    add(c, "self-test", VERDICT_OK, NULL, "%s",
        vm->narrow ? "this QEMU returns live bytes for reads across clusters (7.0-7.2): reads are kept inside them"
                   : "reads of a frozen view are right");
    if (vm->has_iothreads && vm->narrow)
        add(c, "iothreads", VERDICT_WRONG, "update QEMU to 8.0 or later, or take the iothreads from the VM",
            "QEMU %s aborts when a disk with an iothread is exported: sessions are refused", vm->qemu_version);
    else
        add(c, "iothreads", VERDICT_OK, NULL, "%s", vm->has_iothreads ? "used, and this QEMU can bear it" : "not used");
}

void vm_tell_tested(struct vm *vm, const struct failure *f)
{
    while (vm->checkups) {
        struct vm_checkup *c = vm->checkups;

        vm->checkups = c->next;
        if (f)
            add(c, "self-test", VERDICT_WRONG, "no session can begin before it passes", "%s", f->text);
        else
            add_test(c);
        finish(c);
    }
}

/* A session, a change or a question would be in the way; they are short, or the test has run by then. */
static void test(struct vm_checkup *c)
{
    struct vm *vm = c->vm;

    if (vm->tested || !vm->capable || vm->engine_failure.err || c->nbd_busy) {
        add_test(c);
        finish(c);
    } else if (vm->state == VM_TESTING) {
        c->next = vm->checkups;
        vm->checkups = c;
    } else if (vm->state != VM_READY || vm->session || vm->starting || vm->asking || vm_is_committing(vm) ||
               vm->stopping) {
        add(c, "self-test", VERDICT_NOTE, "ask again", "has not run yet, and the VM is busy now");
        finish(c);
    } else {
        c->next = vm->checkups;
        vm->checkups = c;
        vm_test(vm);
    }
}

/* -- what only QEMU knows ------------------------------------------------------------------------------------------ */

#define SERVER_RUNS "already running" /* QEMU's words (all versions): "NBD server already running" */

/* QEMU looks whether there is a server before it looks at the address: what is asked for can never be. */
static void on_server(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    struct vm_checkup *c = container_of(call, struct vm_checkup, call);

    c->nbd_busy = f && f->err == -EREMOTEIO && strstr(f->text, SERVER_RUNS);
    if (c->nbd_busy)
        add(c, "nbd server", VERDICT_WRONG, "stop it (nbd-server-stop) when its user has ended",
            "QEMU's NBD server is in use by somebody else, and it has only one: sessions are refused");
    else if (f && f->err == -EREMOTEIO)
        add(c, "nbd server", VERDICT_OK, NULL, "QEMU's NBD server is free");
    else
        add(c, "nbd server", VERDICT_NOTE, "ask again", "QEMU was asked and did not say: %s", f ? f->text : "no error");
    test(c);
}

static void look_at_server(struct vm_checkup *c)
{
    struct vm *vm = c->vm;
    struct json_object *args;
    int r;

    if (vm->session) {
        add(c, "nbd server", VERDICT_OK, NULL, "QEMU's NBD server is ours, session %s stands", session_id(vm->session));
        test(c);
        return;
    }
    if (!vm->qmp) { /* vm_stop() came while QEMU was being asked */
        add(c, "nbd server", VERDICT_NOTE, NULL, "QEMU cannot be asked: %s", vm_trouble(vm));
        test(c);
        return;
    }
    args = qmp_args_nbd_server_start_fd(NAMES_PREFIX "no-such-fd");
    r = qmp_call_start(vm->qmp, &c->call, "nbd-server-start", args, QMP_NO_FD, VM_CALL_TIMEOUT_MS, on_server, c);
    if (r < 0) {
        add(c, "nbd server", VERDICT_NOTE, "ask again", "QEMU cannot be asked: %s", strerror(-r));
        test(c);
    }
}

static void on_leftovers(void *arg, unsigned nsessions, const struct failure *f)
{
    struct vm_checkup *c = arg;

    if (f)
        add(c, "leftovers", VERDICT_NOTE, "ask again", "QEMU was asked and did not say: %s", f->text);
    else if (nsessions)
        add(c, "leftovers", VERDICT_WRONG,
            "start qpulld anew: what is left is undone when it connects; files of a stopped guest when it runs again",
            "QEMU still has temporary objects of %u session%s that ended (names that begin with " NAMES_PREFIX ")",
            nsessions, nsessions == 1 ? "" : "s");
    else
        add(c, "leftovers", VERDICT_OK, NULL, "nothing of ours is left in QEMU");
    look_at_server(c);
}

static void look_for_leftovers(struct vm_checkup *c)
{
    struct vm *vm = c->vm;
    struct failure f = {0};
    struct sweep_config config = {
        .loop = vm->loop,
        .qmp = vm->qmp,
        .timeout_ms = VM_CALL_TIMEOUT_MS,
        .only_look = true,
        .living = vm->session ? session_id(vm->session) : NULL,
    };

    /* A commit's or a test's objects are no leftovers; and see session_may_ask(). */
    if (!vm->qmp || vm_is_committing(vm) || vm->state == VM_TESTING || (vm->session && !session_may_ask(vm->session))) {
        look_at_server(c);
        return;
    }
    if (sweep_start(&config, on_leftovers, c, &f) < 0)
        on_leftovers(c, 0, &f);
}

static void on_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct vm_checkup *c = q->arg;

    if (f) {
        add(c, "disks", f->err == -EBUSY ? VERDICT_NOTE : VERDICT_WRONG, "ask again when that has ended", "%s",
            f->text);
        finish(c);
        return;
    }
    add_disks(c, disks);
    if (vm_now(c->vm)->images || c->vm->state <= VM_LOST)
        finish(c);
    else
        look_for_leftovers(c);
}

bool vm_checkup_start(struct vm *vm, struct vm_checkup *c)
{
    int r;

    c->vm = vm;
    add_monitor(c);
    add_engine(c);
    add_last(c);
    r = vm_query_start(vm, &c->query, on_disks, c);
    if (r < 0 && vm_now(vm)->state > VM_LOST)
        add(c, "disks", VERDICT_WRONG, NULL, "cannot be asked now: %s", strerror(-r));
    return r < 0;
}

const char *vm_locked_socket(const struct vm *vm)
{
    bool locked = vm->qmp_path && vm->state <= VM_LOST && (vm->lost.err == -EACCES || vm->lost.err == -EPERM);

    return locked ? vm->qmp_path : NULL;
}

pid_t vm_qemu_pid(const struct vm *vm)
{
    return vm->qmp_path && vm->state > VM_LOST ? qmp_client_peer_pid(vm->qmp) : 0;
}

bool vm_opens_scratch(const struct vm *vm)
{
    return vm->place != NULL;
}
