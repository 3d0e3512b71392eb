/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "die.h"
#include "qmp/commands.h"
#include "stand.h"

#include <errno.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>

#define PATIENT_MS 20000    /* deadline of calls where none is meant to pass */
#define SHORT_MS 400        /* … where one is */
#define STALL_MS 1000       /* QEMU stands still for more than two of those */
#define REAL_CALL_MS 30000  /* the program's own: VM_CALL_TIMEOUT_MS of server/config.h */
#define REAL_STALL_MS 33000 /* … and longer than that */

bool strike_is_slow(enum fault f)
{
    return f == FAULT_LOST || f == FAULT_DROPPED || f == FAULT_STALLED;
}

unsigned strike_stall_ms(const struct run *r)
{
    return r->real_stalls ? REAL_STALL_MS : STALL_MS;
}

unsigned strike_timeout_ms(const struct run *r)
{
    if (!strike_is_slow(r->fault))
        return PATIENT_MS;
    return r->fault == FAULT_STALLED && r->real_stalls ? REAL_CALL_MS : SHORT_MS;
}

/* -- QEMU stands still, or dies ------------------------------------------------------------------------------------ */

static void on_resume(uv_timer_t *t)
{
    struct stand *st = t->data;

    (void)kill(st->guest.pid, SIGCONT);
    if (st->freeze_wanted)
        guest_freezes(&st->guest);
    st->freeze_wanted = false;
}

void strike_resume(struct stand *st)
{
    if (!uv_is_active((uv_handle_t *)&st->resume))
        return;
    (void)uv_timer_stop(&st->resume);
    on_resume(&st->resume);
}

static bool is_stopped(const struct stand *st)
{
    return st->died_ns || uv_is_active((const uv_handle_t *)&st->resume);
}

static void stop_qemu(struct stand *st)
{
    st->resume.data = st;
    (void)kill(st->guest.pid, SIGSTOP);
    (void)uv_timer_start(&st->resume, on_resume, strike_stall_ms(&st->run), 0);
}

static void kill_qemu(struct stand *st)
{
    st->late_stop = st->daemon.stopped;
    guest_die(&st->guest);
    st->died_ns = uv_hrtime();
    st->cut = true;
}

/* -- the proxy's questions ----------------------------------------------------------------------------------------- */

/* keep.c's last transaction: adds the checkpoint itself. Its disk, or -1. */
static int makes_checkpoint(const char *name, struct json_object *args)
{
    struct json_object *actions = qmp_get(args, "actions"), *data;
    const char *node, *bitmap;

    if (strcmp(name, "transaction") != 0 || qmp_array_length(actions) == 0)
        return -1;
    data = qmp_get(json_object_array_get_idx(actions, 0), "data");
    node = qmp_get_string(data, "node");
    bitmap = qmp_get_string(data, "name");
    return node && bitmap && strcmp(bitmap, GUEST_CHECKPOINT) == 0 && node[0] == 'd' ? node[1] - '0' : -1;
}

/* job_steps.c's transaction: the freeze. */
static bool begins_jobs(const char *name, struct json_object *args)
{
    struct json_object *actions = qmp_get(args, "actions");
    const char *type;

    if (strcmp(name, "transaction") != 0 || qmp_array_length(actions) == 0)
        return false;
    type = qmp_get_string(json_object_array_get_idx(actions, 0), "type");
    return type && strcmp(type, "blockdev-backup") == 0;
}

/* The stopped guest's disks are frozen one after the other, and its writes end with the first of them. */
static bool freezes(struct stand *st, const char *name, struct json_object *args, enum verdict verdict)
{
    const char *node = qmp_get_string(args, "value");

    st->stops |= strcmp(name, "blockdev-reopen") == 0 && verdict == VERDICT_REFUSE;
    if (!st->stops)
        return strcmp(name, "blockdev-reopen") == 0 || begins_jobs(name, args);
    return strcmp(name, "qom-set") == 0 && node && fnmatch("qpull-*-cbw0", node, 0) == 0;
}

/* This QEMU never gets to see it. */
static enum verdict without_reopen(enum verdict verdict)
{
    switch (verdict) {
    case VERDICT_LOSE:
        return VERDICT_DROP;
    case VERDICT_CUT_AFTER:
        return VERDICT_CUT;
    case VERDICT_PASS:
        return VERDICT_REFUSE;
    default:
        return verdict;
    }
}

static enum verdict spoil(struct stand *st, const char *text)
{
    switch (st->run.fault) {
    case FAULT_REFUSED:
        return VERDICT_REFUSE;
    case FAULT_REFUSED_ALWAYS:
        free(st->sabotaged);
        st->sabotaged = strdup(text);
        return VERDICT_REFUSE;
    case FAULT_LOST:
        return VERDICT_LOSE;
    case FAULT_DROPPED:
        return VERDICT_DROP;
    case FAULT_CUT:
    case FAULT_KILLED_BEFORE:
        return VERDICT_CUT;
    case FAULT_CUT_AFTER:
    case FAULT_KILLED:
        return VERDICT_CUT_AFTER;
    case FAULT_STOP:
    case FAULT_STOP_TWICE:
        daemon_stop(&st->daemon);
        return VERDICT_PASS;
    case FAULT_STALLED:
        stop_qemu(st);
        return VERDICT_PASS;
    case FAULT_QEMU_DIES:
        kill_qemu(st);
        return VERDICT_PASS;
    case FAULT_QEMU_DIES_AFTER:
        return VERDICT_PASS_AND_TELL;
    default:
        return VERDICT_PASS;
    }
}

static void note_made(struct stand *st, const char *name, struct json_object *args, enum verdict verdict, bool hit)
{
    int disk = makes_checkpoint(name, args);

    if (disk < 0 || disk >= GUEST_MAX_DISKS)
        return;
    st->made[disk] |= verdict != VERDICT_REFUSE && verdict != VERDICT_DROP && verdict != VERDICT_CUT;
    st->made_hit[disk] |= hit;
}

static enum verdict on_command(void *arg, const char *name, struct json_object *args)
{
    struct stand *st = arg;
    _cleanup_free_ char *text = NULL;
    enum verdict verdict = VERDICT_PASS;
    bool hit;

    if (st->run.verbose)
        (void)fprintf(stderr, "      %s %s\n", name, args ? json_object_to_json_string(args) : "");
    if (!st->armed)
        return VERDICT_PASS;
    /* The questions about disks before the session's first step are not the session's. */
    if (st->ncommands == 0 && st->daemon.config.task != DAEMON_SWEEP && strcmp(name, "add-fd") != 0)
        return VERDICT_PASS;
    if (asprintf(&text, "%s %s", name, args ? json_object_to_json_string_ext(args, JSON_C_TO_STRING_PLAIN) : "") < 0)
        die("out of memory");
    if (st->scenario->snapshot_at && st->ncommands && !is_stopped(st) &&
        fnmatch(st->scenario->snapshot_at, text, 0) == 0)
        guest_take_snapshots(&st->guest);
    if (st->scenario->pause_at && !st->paused && !is_stopped(st) && fnmatch(st->scenario->pause_at, text, 0) == 0) {
        json_object_put(guest_call(&st->guest, NULL, "{'execute':'stop'}"));
        st->paused = true;
    }
    /* QEMU does not answer the guest while it drains and its answers to our reads are not taken: our loop stands still
     * for the guest's writes, a daemon's never does. */
    if (st->run.writing && !st->scenario->small_scratch && !is_stopped(st) && !st->daemon.reading &&
        (!st->stops || guest_runs(&st->guest)))
        guest_write(&st->guest);
    hit = (st->ncommands == st->run.at && st->run.fault != FAULT_NONE) ||
          (st->kill_at && fnmatch(st->kill_at, text, 0) == 0);
    if (hit) {
        (void)snprintf(st->hit, sizeof(st->hit), "%.*s", (int)sizeof(st->hit) - 1, text);
        verdict = spoil(st, text);
    } else if (st->run.fault == FAULT_STOP_TWICE && st->ncommands == st->run.at + 1) {
        daemon_stop(&st->daemon);
    } else if (st->sabotaged && strcmp(st->sabotaged, text) == 0) {
        verdict = VERDICT_REFUSE;
    }
    if (st->scenario->no_reopen && strcmp(name, "blockdev-reopen") == 0)
        verdict = without_reopen(verdict);
    st->ncommands++;
    note_made(st, name, args, verdict, hit && st->run.fault != FAULT_STOP && st->run.fault != FAULT_STOP_TWICE);
    if (freezes(st, name, args, verdict) && !st->died_ns) {
        if (is_stopped(st))
            st->freeze_wanted = true;
        else
            guest_freezes(&st->guest);
    }
    return verdict;
}

void strike_kill_daemon(struct stand *st)
{
    if (st->child <= 0)
        return;
    (void)kill(st->child, SIGKILL);
    (void)waitpid(st->child, NULL, 0);
    st->child = 0;
}

static void on_cut(void *arg)
{
    struct stand *st = arg;

    st->cut = true;
    if (st->run.fault == FAULT_KILLED || st->run.fault == FAULT_KILLED_BEFORE)
        strike_kill_daemon(st);
}

static void on_passed(void *arg)
{
    kill_qemu(arg);
}

const struct proxy_ops strike_ops = {.on_command = on_command, .on_cut = on_cut, .on_passed = on_passed};
