/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who takes part in which session. A stay waits until the VM is ready, the self-test is done and the session it wants
 * is up; the one place where anything goes on is vm_pump(), called whenever something changed.
 */
#include "log.h"
#include "vm_internal.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>

/* -- the list of stays --------------------------------------------------------------------------------------------- */

static void add_stay(struct vm *vm, struct vm_stay *stay)
{
    struct vm_stay **tail = &vm->stays;

    stay->vm = vm;
    stay->state = STAY_WAITING;
    stay->nasked = 0;
    memset(&stay->ask, 0, sizeof(stay->ask));
    stay->next = stay->prev = NULL;
    while (*tail) {
        stay->prev = *tail;
        tail = &(*tail)->next;
    }
    *tail = stay;
    vm->nstays++;
}

void vm_session_remove(struct vm_stay *stay)
{
    struct vm *vm = stay->vm;

    if (stay->prev)
        stay->prev->next = stay->next;
    else
        vm->stays = stay->next;
    if (stay->next)
        stay->next->prev = stay->prev;
    vm->nstays--;
    if (stay->lease && vm->lease == stay->lease)
        vm->lease = NULL;
    stay->vm = NULL;
    stay->state = STAY_OUT;
}

void vm_refuse(struct vm_stay *stay, const struct failure *why)
{
    struct failure f = *why; /* why may be the VM's own, which the callback may change */

    vm_session_remove(stay);
    stay->on_entered(stay, &f);
}

struct vm_stay *vm_first_stay(struct vm *vm, int state)
{
    struct vm_stay *stay = vm->stays;

    while (stay && (int)stay->state != state)
        stay = stay->next;
    return stay;
}

void vm_refuse_waiting(struct vm *vm, const struct failure *why)
{
    struct vm_stay *stay;

    while ((stay = vm_first_stay(vm, STAY_WAITING)))
        vm_refuse(stay, why);
}

void vm_move_waiting(struct vm *vm, struct vm *to)
{
    struct vm_stay *stay;

    while ((stay = vm_first_stay(vm, STAY_WAITING))) {
        struct failure f = {0};
        int r;

        vm_session_remove(stay);
        r = vm_enter(to, stay);
        if (r < 0) {
            (void)failure_set(&f, r, "%s", vm_trouble(to));
            stay->on_entered(stay, &f);
        }
    }
}

static bool any_inside(struct vm *vm)
{
    return vm_first_stay(vm, STAY_IN) || vm_first_stay(vm, STAY_ASKING);
}

/* -- how each disk's pull ends ------------------------------------------------------------------------------------- */

static struct vm_pull *pull_of(struct vm *vm, const char *disk, bool make)
{
    struct vm_pull *pulls;

    for (size_t i = 0; i < vm->npulls; i++) {
        if (strcmp(vm->pulls[i].disk, disk) == 0)
            return &vm->pulls[i];
    }
    if (!make || !(pulls = realloc(vm->pulls, (vm->npulls + 1) * sizeof(*pulls))))
        return NULL;
    vm->pulls = pulls;
    pulls[vm->npulls] = (struct vm_pull){.disk = strdup(disk)};
    return pulls[vm->npulls].disk ? &pulls[vm->npulls++] : NULL;
}

/* The checkpoint stays on the disks whose pull ended well, and nowhere else: it never claims data that nobody has. */
static bool is_to_be_kept(struct vm *vm, const char *disk)
{
    const struct vm_pull *p = pull_of(vm, disk, /* make= */ false);
    bool keep;

    if (vm_lease_decides(vm, disk, &keep))
        return keep;
    return p && p->nopen == 0 && p->well && !p->read_failed;
}

static void mark_kept(struct vm *vm)
{
    const struct disk_list *disks = session_disks(vm->session);

    for (size_t i = 0; i < disks->ndisks; i++) {
        if (is_to_be_kept(vm, disks->disks[i].name))
            session_keep(vm->session, disks->disks[i].name);
    }
}

void vm_session_done(struct vm *vm)
{
    for (size_t i = 0; i < vm->npulls; i++)
        free(vm->pulls[i].disk);
    free(TAKE_PTR(vm->pulls));
    vm->npulls = 0;
    free(TAKE_PTR(vm->identity));
    vm->session = NULL;
    vm->lease = NULL;
    vm->starting = vm->ending = vm->lingering = vm->was_up = false;
    memset(&vm->session_failure, 0, sizeof(vm->session_failure));
}

void vm_end_session(struct vm *vm)
{
    (void)uv_timer_stop(&vm->linger);
    vm->lingering = false;
    if (vm->ending)
        return;
    vm->ending = true;
    mark_kept(vm);
    session_stop(vm->session);
}

/* -- what the session says ----------------------------------------------------------------------------------------- */

static bool wants_session(const struct vm *vm, const struct vm_stay *stay)
{
    const char *checkpoint = session_checkpoint(vm->session);

    return vm_lease_admits(vm, stay) && strcmp(stay->identity, vm->identity) == 0 &&
           (!stay->checkpoint == !checkpoint) && (!checkpoint || strcmp(stay->checkpoint, checkpoint) == 0);
}

static void log_up(const struct vm *vm)
{
    const struct session *s = vm->session;
    const char *checkpoint = session_checkpoint(s);
    double pause_ms = (double)session_pause_us(s) / 1000;
    size_t n = session_disks(s)->ndisks;
    char how[96], quiesced[64];

    switch (session_way(s)) {
    case SESSION_AS_IT_IS:
        (void)snprintf(how, sizeof(how), "nobody writes to %s", n == 1 ? "it" : "them");
        break;
    case SESSION_REOPENED:
    case SESSION_BY_JOBS:
        (void)snprintf(how, sizeof(how), "the guest's I/O stood still for %.1f ms at most", pause_ms);
        break;
    case SESSION_STOPPED:
        (void)snprintf(how, sizeof(how), "the guest's CPUs stood still for %.1f ms at most", pause_ms);
        log_warning("VM %s: session %s stopped the guest for its freeze: %s", vm->name, session_id(s),
                    session_way_why(s));
        break;
    case SESSION_WAS_STOPPED:
        (void)snprintf(how, sizeof(how), "the guest was stopped by others");
        break;
    }
    vm_quiesce_tell_up(vm, quiesced, sizeof(quiesced));
    log_info("VM %s: session %s is up, %zu disk%s frozen, %s, set up in %u ms%s%s%s", vm->name, session_id(s), n,
             n == 1 ? "" : "s", how, session_setup_ms(s), checkpoint ? ", provisional checkpoint " : "",
             checkpoint ? checkpoint : "", quiesced);
}

static void on_up(void *arg)
{
    struct vm *vm = arg;

    log_up(vm);
    if (session_hold_refused(vm->session))
        log_warning("VM %s: --hold-shutdown does not hold it: %s", vm->name, session_hold_refused(vm->session));
    vm->was_up = true;
    vm_tell_up(vm);
    vm_pump(vm);
}

static struct vm_stay *next_to_map(struct vm *vm)
{
    struct vm_stay *stay = vm->stays;

    while (stay && (stay->state != STAY_IN || stay->nmaps == vm->nmaps))
        stay = stay->next;
    return stay;
}

static void on_maps(void *arg)
{
    struct vm *vm = arg;
    struct vm_stay *stay;

    vm->nmaps++;
    while ((stay = next_to_map(vm))) {
        stay->nmaps = vm->nmaps;
        if (stay->on_maps)
            stay->on_maps(stay);
    }
}

/* A session that fails for want of a connection, to the monitor or to the export: QEMU ends, or has ended. */
static bool is_gone(const struct vm *vm, const struct failure *why)
{
    return !vm->images && why->err == -ENOTCONN && (*vm->life.words || !qmp_client_is_ready(vm->qmp));
}

/* Who has to hear of the session's end. */
static struct vm_stay *next_affected(struct vm *vm)
{
    struct vm_stay *stay = vm->stays;

    while (stay && (stay->state == STAY_LOST || (stay->state == STAY_WAITING && !wants_session(vm, stay))))
        stay = stay->next;
    return stay;
}

void vm_session_tell(struct vm *vm, const struct failure *why)
{
    struct vm_stay *stay;

    while ((stay = next_affected(vm))) {
        if (stay->state == STAY_IN) {
            stay->state = STAY_LOST; /* it leaves by itself */
            stay->on_lost(stay, why);
        } else {
            session_ask_forget(&stay->ask);
            vm_refuse(stay, why);
        }
    }
}

static void on_failed(void *arg, const struct failure *why)
{
    struct vm *vm = arg;
    struct failure gone = {0};

    if (is_gone(vm, why)) {
        (void)vm_life_last_words(vm, why, &gone);
        why = &gone;
    }
    log_error("VM %s: session %s is given up%s: %s", vm->name, session_id(vm->session),
              why == &gone ? "" : ", its set-up is undone", why->text);
    (void)failure_copy(&vm->session_failure, why);
    vm_tell_lost(vm);
    vm_session_tell(vm, why);
    vm_end_session(vm);
}

/* Somebody believes to have a checkpoint of this disk: its pull ended well, and then QEMU ended before the session. */
static const char *disk_not_kept(struct vm *vm)
{
    const struct disk_list *disks = session_disks(vm->session);

    for (size_t i = 0; session_checkpoint(vm->session) && i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];

        if (is_to_be_kept(vm, d->name) && d->tracked && !session_kept(vm->session, d->name))
            return d->name;
    }
    return NULL;
}

/* What could not be undone went with QEMU. A monitor alone that is lost comes back, and then the sweep undoes it. */
static void check_problems(struct vm *vm, const struct failure *problems, struct failure *mine)
{
    bool lost = problems->err == -ENOTCONN || problems->err == -ECONNRESET;
    const char *disk = disk_not_kept(vm);

    if (vm->images || qmp_client_is_ready(vm->qmp) || (problems->err && !lost))
        (void)failure_copy(mine, problems);
    else if (disk)
        (void)failure_set(mine, -EIO, "checkpoint '%s' of disk '%s' is not kept: QEMU ended before the session did",
                          session_checkpoint(vm->session), disk);
}

static void on_down(void *arg, const struct failure *problems)
{
    struct vm *vm = arg;
    struct json_object *last = vm_session_to_json(vm);
    struct failure mine = {0};

    check_problems(vm, problems, &mine);
    if (mine.err)
        log_error("VM %s: session %s ended with problems: %s", vm->name, session_id(vm->session), mine.text);
    else if (problems->err)
        log_info("VM %s: session %s ended with its QEMU, and so did what it had made there", vm->name,
                 session_id(vm->session));
    else
        log_info("VM %s: session %s is down, nothing is left behind", vm->name, session_id(vm->session));
    problems = &mine;
    (void)json_object_object_add(last, "problems", problems->err ? json_object_new_string(problems->text) : NULL);
    vm_tell_down(vm, last, problems);
    vm_lease_down(vm, last, problems);
    json_object_put(vm->last);
    vm->last = last;
    vm_notes_of_session(vm);
    vm_life_session_down(vm);
    if (session_checkpoint(vm->session))
        vm_watch_wake(vm);
    vm_session_done(vm);
    /* What could not be undone, or a connection that came back meanwhile, is a matter for the sweep. */
    if (!vm->images && qmp_client_is_ready(vm->qmp) && (problems->err || vm->sweep_wanted || vm->state == VM_LOST) &&
        !vm->stopping)
        vm_sweep(vm);
    vm_pump(vm);
    vm_stop_if_idle(vm);
}

static void on_note(void *arg, const char *text)
{
    struct vm *vm = arg;

    log_info("VM %s: session %s: %s", vm->name, session_id(vm->session), text);
}

static void on_trace(void *arg, const char *text)
{
    struct vm *vm = arg;

    log_debug("VM %s: session %s: %s", vm->name, vm->session ? session_id(vm->session) : "new", text);
}

const struct session_ops vm_session_ops = {
    .on_up = on_up,
    .on_maps = on_maps,
    .on_failed = on_failed,
    .on_down = on_down,
    .on_note = on_note,
    .on_trace = on_trace,
};

/* -- entering ------------------------------------------------------------------------------------------------------ */

static void on_asked(struct session_ask *a, const struct failure *f);

/* In words, for the map that this stay asks for. */
static const char *why_not(const struct vm *vm, const struct vm_stay *stay)
{
    const struct disk *d = disk_list_find(session_disks(vm->session), stay->disk);
    const struct checkpoint *c = d ? disk_checkpoint(d, stay->since[stay->nasked]) : NULL;

    return c ? checkpoint_text(c) : reason_text(REASON_NO_SUCH_CHECKPOINT);
}

static void admit(struct vm_stay *stay)
{
    struct vm *vm = stay->vm;
    const struct disk *d;
    struct vm_pull *p;
    struct failure f = {0};

    if (stay->lease) {
        stay->state = STAY_IN;
        stay->on_entered(stay, NULL);
        return;
    }
    for (; stay->nasked < stay->nsince; stay->nasked++) {
        _cleanup_free_ char *context = NULL;
        int r;

        if (asprintf(&context, "qemu:dirty-bitmap:%s", stay->since[stay->nasked]) < 0)
            context = NULL;
        if (!context || session_map(vm->session, stay->disk, context) ||
            session_expects_map(vm->session, stay->disk, context))
            continue;
        r = session_ask_start(vm->session, &stay->ask, stay->disk, stay->since[stay->nasked], on_asked);
        if (r == 0) {
            stay->state = STAY_ASKING;
            return;
        }
        (void)failure_set(&f, r, "no incremental of disk '%s' of VM '%s' since '%s': %s", stay->disk, vm->name,
                          stay->since[stay->nasked], why_not(vm, stay));
        vm_refuse(stay, &f);
        return;
    }
    p = pull_of(vm, stay->disk, /* make= */ true);
    if (!p) {
        (void)failure_set(&f, -ENOMEM, "out of memory");
        vm_refuse(stay, &f);
        return;
    }
    d = disk_list_find(session_disks(vm->session), stay->disk);
    if (stay->checkpoint && !d->tracked)
        log_warning("VM %s: checkpoint %s will not be kept on disk %s (%s): its image is %s", vm->name,
                    stay->checkpoint, d->name, reason_name(REASON_NOT_TRACKED), d->format);
    if (stay->depth)
        session_want_depth(vm->session);
    p->nopen++;
    vm->keeper->counters.connections++;
    stay->state = STAY_IN;
    vm_lease_notice(vm);
    stay->on_entered(stay, NULL);
}

static void on_asked(struct session_ask *a, const struct failure *f)
{
    struct vm_stay *stay = container_of(a, struct vm_stay, ask);
    struct vm *vm = stay->vm;

    if (f)
        vm_refuse(stay, f);
    else
        admit(stay);
    vm_pump(vm);
}

/* A stay that meets a session. Returns whether something changed (then the list must be looked at anew). */
static bool meet_session(struct vm *vm, struct vm_stay *stay)
{
    struct failure f = {0};

    if (vm->ending)
        return false;
    if (wants_session(vm, stay)) {
        if (session_status(vm->session) != SESSION_UP || vm->session_failure.err)
            return false;
        if (!stay->lease && !disk_list_find(session_disks(vm->session), stay->disk)) {
            (void)failure_set(&f, -ENOENT, "VM '%s' had no disk '%s' when session %s was frozen", vm->name, stay->disk,
                              session_id(vm->session));
            vm_refuse(stay, &f);
            return true;
        }
        (void)uv_timer_stop(&vm->linger);
        vm->lingering = false;
        admit(stay);
        return true;
    }
    if (vm->lingering) {
        /* Nobody reads any more. The same client wants something else: it will not come back. Others wait for the
         * linger. */
        if (strcmp(stay->identity, vm->identity) == 0)
            vm_end_session(vm);
        return false;
    }
    (void)failure_set(&f, -EBUSY,
                      "VM '%s' is in session %s of another client or with another checkpoint name ('%s'); try again "
                      "when it has ended",
                      vm->name, session_id(vm->session),
                      session_checkpoint(vm->session) ? session_checkpoint(vm->session) : "none");
    vm_refuse(stay, &f);
    return true;
}

static bool pump_stays(struct vm *vm)
{
    for (struct vm_stay *stay = vm->stays; stay; stay = stay->next) {
        if (stay->state == STAY_WAITING && meet_session(vm, stay))
            return true;
    }
    return false;
}

void vm_pump(struct vm *vm)
{
    struct failure gone = {0};
    struct vm_stay *stray;

    (void)failure_set(&gone, -ENOENT, "the session has ended");
    (void)vm_images_pump(vm);
    if (vm->stopping || vm->state != VM_READY)
        return;
    vm_ask_if_waiting(vm);
    while (vm_lease_refuse_strays(vm, &stray))
        vm_refuse(stray, &gone);
    if (vm->session) {
        while (vm->session && pump_stays(vm))
            ;
        return;
    }
    if (vm_first_stay(vm, STAY_WAITING))
        vm_start_session(vm);
}

static void on_kick(uv_timer_t *t)
{
    vm_pump(container_of(t, struct vm, kick));
}

/* Callbacks come from the loop, never from inside vm_enter() or vm_leave(). */
void vm_pump_later(struct vm *vm)
{
    vm_pump_after(vm, 0);
}

void vm_pump_after(struct vm *vm, unsigned ms)
{
    (void)uv_timer_start(&vm->kick, on_kick, ms, 0);
}

int vm_enter(struct vm *vm, struct vm_stay *stay)
{
    vm = vm_now(vm);
    if (vm->stopping)
        return -ESHUTDOWN;
    if (vm->state == VM_LOST)
        return -ENOTCONN;
    if (vm->nstays >= VM_STAYS_MAX || stay->nsince > VM_SINCE_MAX)
        return -E2BIG;
    add_stay(vm, stay);
    vm->life.sweep_due = vm->life.leftovers;
    vm_pump_later(vm);
    return 0;
}

/* Who comes back is first told what disks there are: while QEMU does not answer that, the way back stays open. */
static void on_linger(uv_timer_t *t)
{
    struct vm *vm = container_of(t, struct vm, linger);

    if (!vm->session)
        return;
    if ((vm->waiting || vm->answering) && vm->lingered_ms < VM_CALL_TIMEOUT_MS) {
        vm->lingered_ms += VM_LINGER_STEP_MS;
        (void)uv_timer_start(&vm->linger, on_linger, VM_LINGER_STEP_MS, 0);
        return;
    }
    vm_end_session(vm);
}

static bool anybody_waits(const struct vm *vm)
{
    for (const struct vm_stay *stay = vm->stays; stay; stay = stay->next) {
        if (stay->state == STAY_WAITING && wants_session(vm, stay))
            return true;
    }
    return false;
}

void vm_leave(struct vm_stay *stay, bool said_disc, bool read_failed)
{
    struct vm *vm = stay->vm;
    bool was_in;

    if (!vm)
        return;
    was_in = !stay->lease && (stay->state == STAY_IN || stay->state == STAY_LOST);
    if (stay->state == STAY_ASKING)
        session_ask_forget(&stay->ask);
    if (was_in) {
        struct vm_pull *p = pull_of(vm, stay->disk, /* make= */ false);

        assert(p && p->nopen);
        p->read_failed |= read_failed || stay->state == STAY_LOST;
        if (--p->nopen == 0)
            p->well = said_disc;
    }
    vm_session_remove(stay);
    vm_lease_notice(vm);
    if (!vm->session || vm->ending || any_inside(vm))
        return;
    if (session_status(vm->session) == SESSION_UP) {
        vm->lingering = true;
        vm->lingered_ms = 0;
        (void)uv_timer_start(&vm->linger, on_linger, vm->linger_ms, 0);
        vm_pump_later(vm);
    } else if (!anybody_waits(vm)) {
        vm_end_session(vm); /* it was never told that the session is up: it has nothing to come back to */
    }
}

/* QEMU tells of a broken snapshot in no other way than by the errors of reads. */
void vm_stay_lost(struct vm_stay *stay)
{
    struct vm *vm = stay->vm;

    if (vm && vm->session && !vm->ending && stay->state == STAY_IN)
        session_lost(vm->session, stay->disk, -ESTALE, SESSION_BROKEN);
}

struct source *vm_stay_source(struct vm_stay *stay)
{
    return stay->vm && stay->vm->session ? session_source(stay->vm->session, stay->disk) : NULL;
}

const struct map *vm_stay_map(struct vm_stay *stay, const char *context)
{
    return stay->vm && stay->vm->session ? session_map(stay->vm->session, stay->disk, context) : NULL;
}

bool vm_stay_expects_map(struct vm_stay *stay, const char *context)
{
    return stay->vm && stay->vm->session && session_expects_map(stay->vm->session, stay->disk, context);
}

struct vm_counters *vm_stay_counters(struct vm_stay *stay)
{
    return &stay->vm->keeper->counters;
}

const char *vm_stay_session(const struct vm_stay *stay)
{
    return stay->vm && stay->vm->session ? session_id(stay->vm->session) : "-";
}
