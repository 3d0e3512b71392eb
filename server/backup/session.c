/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/session.h"

#include "backup/steps.h"
#include "qmp/commands.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <unistd.h>

static const char *const status_names[] = {
    [SESSION_GOING_UP] = "GOING_UP",
    [SESSION_UP] = "UP",
    [SESSION_GOING_DOWN] = "GOING_DOWN",
    [SESSION_DOWN] = "DOWN",
};
static_assert(ARRAY_SIZE(status_names) == SESSION_DOWN + 1, "every status has a name");

const char *session_status_name(enum session_status s)
{
    return status_names[s];
}

static void trace(struct session *s, const char *text)
{
    if (s->ops->on_trace)
        s->ops->on_trace(s->arg, text);
}

static void set_status(struct session *s, enum session_status status)
{
    char text[64];

    assert(status > s->status);
    (void)snprintf(text, sizeof(text), "%s -> %s", status_names[s->status], status_names[status]);
    s->status = status;
    trace(s, text);
}

static void session_free(struct session *s)
{
    scratch_leave(&s->scratch_user);
    free(s->scratch_files);
    for (unsigned i = 0; s->disks && i < s->list->ndisks; i++) {
        struct session_disk *d = &s->disks[i];

        for (size_t k = 0; k < d->nmaps; k++) {
            free(d->maps[k].context);
            map_free(d->maps[k].map);
        }
        free(d->maps);
        map_free(d->layers);
        map_free(d->below);
        map_free(d->written);
        free(d->keep_node);
        if (d->scratch_fd >= 0)
            (void)close(d->scratch_fd);
    }
    for (size_t k = 0; s->since && k < s->nsince; k++)
        free(s->since[k]);
    free(s->since);
    free(s->disks);
    disk_list_free(s->list);
    free(s->vm);
    free(s->checkpoint);
    free(s->scratch_dir);
    free(s->server_socket);
    reopen_done(&s->reopen);
    free(s);
}

/* -- what the walk says -------------------------------------------------------------------------------------------- */

static void on_top(struct seq *q)
{
    struct session *s = session_of_seq(q);

    if (s->failed || s->stop_wanted)
        return;
    s->up_ns = uv_hrtime();
    set_status(s, SESSION_UP);
    session_look_start(s);
    session_maps_start(s);
    s->ops->on_up(s->arg);
}

static void on_tell(uv_timer_t *t)
{
    struct session *s = container_of(t, struct session, tell);

    s->failed = true;
    if (!s->stop_wanted)
        s->ops->on_failed(s->arg, &s->failure);
}

static void fail_within(struct session *s, const struct failure *why, unsigned ms)
{
    if (s->failed || s->stop_wanted)
        return;
    s->failed = ms == 0;
    if (!s->failed_step[0])
        (void)snprintf(s->failed_step, sizeof(s->failed_step), "%s", s->status == SESSION_UP ? "up" : session_step(s));
    s->failure = *why;
    (void)uv_timer_start(&s->tell, on_tell, ms, 0);
}

void session_fail(struct session *s, const struct failure *why)
{
    fail_within(s, why, 0);
}

/* The way down begins, and the guest does not wait for it. */
static void thaw_now(struct session *s, const char *why)
{
    if (s->quiesce)
        quiesce_thaw_now(s->quiesce, why);
}

static void on_failed(struct seq *q, const struct failure *why)
{
    struct session *s = session_of_seq(q);
    struct failure f = {0};
    char step[96];

    seq_describe(q, step, sizeof(step));
    (void)failure_set(&f, why->err, "VM '%s' cannot be %s: step %s: %s", s->vm, s->still ? "read" : "frozen", step,
                      why->text);
    thaw_now(s, f.text);
    (void)snprintf(s->failed_step, sizeof(s->failed_step), "%s", step);
    if (s->status < SESSION_GOING_DOWN)
        set_status(s, SESSION_GOING_DOWN);
    session_fail(s, &f);
}

static void on_tell_closed(uv_handle_t *h)
{
    struct session *s = container_of((uv_timer_t *)h, struct session, tell);

    if (s->rig.seq.problems.err)
        (void)failure_copy(&s->problems, &s->rig.seq.problems);
    set_status(s, SESSION_DOWN);
    s->ops->on_down(s->arg, &s->problems);
    session_free(s);
}

/* The frozen view goes with its job: QEMU then puts it on the disk itself, where reads of it are refused. */
static void on_job_changed(struct qmp_watch *w, const char *event, struct json_object *data)
{
    struct session *s = container_of(w, struct session, jobs_watch);
    const char *id = qmp_get_string(data, "id"), *status = qmp_get_string(data, "status");
    char job[NAMES_SIZE];

    if (!id || !status || s->status >= SESSION_GOING_DOWN ||
        (strcmp(status, "aborting") != 0 && strcmp(status, "concluded") != 0))
        return;
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (strcmp(id, names_make(job, s->rig.id, NAMES_JOB, i)) == 0)
            session_lost(s, s->disks[i].disk->name, -ESTALE, "somebody else has ended the backup job that keeps it");
    }
}

static void on_look_closed(uv_handle_t *h)
{
    struct session *s = container_of((uv_timer_t *)h, struct session, look);

    uv_close((uv_handle_t *)&s->tell, on_tell_closed);
}

/* Down is told only once the owner has let go; a failed set-up may be undone before that. */
static void finish(struct session *s)
{
    qmp_watch_remove(&s->jobs_watch);
    rig_done(&s->rig);
    uv_close((uv_handle_t *)&s->look, on_look_closed);
}

static void on_end(struct seq *q, const struct failure *problems)
{
    struct session *s = session_of_seq(q);

    s->walked = true;
    if (s->stop_wanted)
        finish(s);
}

static void on_trace(struct seq *q, const char *text)
{
    trace(session_of_seq(q), text);
}

static const struct seq_ops walk_ops = {
    .on_top = on_top,
    .on_failed = on_failed,
    .on_end = on_end,
    .on_trace = on_trace,
};

/* -- start and stop ------------------------------------------------------------------------------------------------ */

static int check(const struct session_config *c, struct failure *f)
{
    unsigned ntracked = 0;

    if (c->disks->ndisks == 0)
        return failure_set(f, -ENODEV, "VM '%s' has no writable disk", c->vm);
    if (c->place && !c->still_socket && c->disks->ndisks > 1 && !place_tells_disks(c->place))
        return failure_set(f, -EINVAL,
                           "VM '%s' has %zu disks, and all would write to one scratch place: put %%d into its JSON "
                           "where the disk's name belongs",
                           c->vm, c->disks->ndisks);
    for (size_t i = 0; i < c->disks->ndisks; i++) {
        const struct disk *d = &c->disks->disks[i];

        ntracked += d->tracked;
        if (d->size == 0)
            return failure_set(f, -ENODEV, "disk '%s' of VM '%s' has no size", d->name, c->vm);
        if (c->checkpoint && disk_checkpoint(d, c->checkpoint))
            return failure_set(
                f, -EEXIST, "checkpoint '%s' exists already on disk '%s' of VM '%s'; choose another name, or delete it",
                c->checkpoint, d->name, c->vm);
    }
    if (c->checkpoint && ntracked == 0)
        return failure_set(f, -ENOTSUP,
                           "no disk of VM '%s' can keep a checkpoint: only qcow2 images (version 3) store bitmaps",
                           c->vm);
    return 0;
}

static int fill(struct session *s, const struct session_config *c)
{
    s->engine = c->engine == ENGINE_JOB ? ENGINE_JOB : ENGINE_CBW;
    s->job_breaks = c->job_breaks;
    s->narrow_reads = c->narrow_reads;
    s->vhost_room = c->still_socket ? NULL : c->vhost_room;
    s->quiesce = c->quiesce;
    s->cbw_timeout_s = c->cbw_timeout_s;
    s->max_pause_ms = c->max_pause_ms;
    s->timeout_s = c->timeout_s;
    s->give_back = c->give_back && !c->still_socket;
    s->ahead_pool.left = AHEAD_POOL;
    s->vm = strdup(c->vm);
    s->place = c->place;
    s->scratch = c->place ? NULL : c->scratch;
    s->scratch_dir = strdup(c->place ? "" : c->scratch ? scratch_dir(c->scratch) : c->scratch_dir);
    s->list = disk_list_copy(c->disks);
    s->still = c->still_socket;
    if (s->still)
        s->server_socket = strdup(c->still_socket);
    else if (asprintf(&s->server_socket, "nbd-%s.sock", c->vm) < 0)
        s->server_socket = NULL;
    if (c->checkpoint && !(s->checkpoint = strdup(c->checkpoint)))
        return -ENOMEM;
    if (!s->vm || !s->scratch_dir || !s->server_socket || !s->list)
        return -ENOMEM;
    s->disks = calloc(s->list->ndisks, sizeof(*s->disks));
    s->scratch_files = calloc(s->list->ndisks, sizeof(*s->scratch_files));
    s->since = calloc(c->nsince + 1, sizeof(*s->since));
    if (!s->disks || !s->scratch_files || !s->since)
        return -ENOMEM;
    for (size_t i = 0; i < s->list->ndisks; i++) {
        s->disks[i].disk = &s->list->disks[i];
        s->disks[i].scratch_fd = -1;
        s->disks[i].vhost.listen_fd = s->disks[i].vhost.fd = -1;
        s->disks[i].session = s;
    }
    for (; s->nsince < c->nsince; s->nsince++) {
        if (!(s->since[s->nsince] = strdup(c->since[s->nsince])))
            return -ENOMEM;
    }
    return 0;
}

int session_start(const struct session_config *config, const struct session_ops *ops, void *arg,
                  struct session **ret_session, struct failure *f)
{
    struct session *s;
    char id[NAMES_ID_SIZE];
    struct rig_config rig = {
        .loop = config->loop,
        .qmp = config->qmp,
        .id = id,
        .ndisks = (unsigned)config->disks->ndisks,
        .timeout_ms = config->call_timeout_ms,
        .server_dir = config->state_dir,
    };
    int r = check(config, f);

    if (r < 0)
        return r;
    s = calloc(1, sizeof(*s));
    if (!s || fill(s, config) < 0) {
        if (s)
            session_free(s);
        return failure_set(f, -ENOMEM, "out of memory");
    }
    names_new_id(id);
    s->ops = ops;
    s->arg = arg;
    s->began_ns = uv_hrtime();
    rig.server_socket = s->server_socket;
    /* timers only: these cannot fail */
    if (s->still)
        (void)rig_init(&s->rig, &rig, session_still_steps, session_nstill_steps, &walk_ops);
    else if (s->engine == ENGINE_JOB)
        (void)rig_init(&s->rig, &rig, session_job_steps, session_njob_steps, &walk_ops);
    else
        (void)rig_init(&s->rig, &rig, session_steps, session_nsteps, &walk_ops);
    if (s->engine == ENGINE_JOB && !s->still)
        qmp_watch_add(config->qmp, &s->jobs_watch, "JOB_STATUS_CHANGE", on_job_changed, s);
    s->rig.hold_wanted = config->hold_shutdown && !s->still;
    (void)uv_timer_init(config->loop, &s->tell);
    (void)uv_timer_init(config->loop, &s->look);
    rig_announce(&s->rig);
    seq_start(&s->rig.seq);
    *ret_session = s;
    return 0;
}

static void stop_walk(struct session *s)
{
    bool commit = false;

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        commit |= s->disks[i].keep;
    if (s->walked)
        finish(s);
    else if (s->rig.seq.phase != SEQ_END) /* else its handle closes: on_end() comes */
        seq_stop(&s->rig.seq, commit);
}

void session_late_idle(struct session *s)
{
    if (s->stop_wanted && s->rig.seq.phase == SEQ_TOP && !s->late_running)
        stop_walk(s);
}

void session_stop(struct session *s)
{
    if (s->stop_wanted)
        return;
    s->stop_wanted = true;
    thaw_now(s, "the session was stopped");
    session_look_stop(s);
    scratch_going(&s->scratch_user);
    if (s->status < SESSION_GOING_DOWN)
        set_status(s, SESSION_GOING_DOWN);
    if (s->rig.seq.phase == SEQ_TOP)
        session_late_cancel(s);
    if (s->rig.seq.phase != SEQ_TOP || !s->late_running) /* else the walk down begins when that one has ended */
        stop_walk(s);
}

static struct session_disk *find_disk(const struct session *s, const char *name)
{
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (strcmp(s->disks[i].disk->name, name) == 0)
            return &s->disks[i];
    }
    return NULL;
}

static void lose(struct session_disk *d, const char *why, int err, unsigned ms)
{
    struct failure f = {0};

    d->lost = true;
    if (d->keep && d->session->stop_wanted) /* nobody is told of a failure any more, but of this */
        session_drop_keep(d->session, d, why);
    d->keep = false;
    (void)failure_set(&f, err, "the frozen view of disk '%s' of VM '%s' is lost: %s%s", d->disk->name, d->session->vm,
                      why, err == -ESTALE ? "; the guest goes on" : "");
    fail_within(d->session, &f, ms);
}

void session_lost(struct session *s, const char *disk, int err, const char *why)
{
    struct session_disk *d = find_disk(s, disk);

    if (d)
        lose(d, why, err, 0);
}

/* A QEMU that ends closes its exports before its monitor, where it has said why. */
void session_lost_export(struct session_disk *d, const char *why)
{
    lose(d, why, -ENOTCONN, SESSION_LAST_WORDS_MS);
}

void session_keep(struct session *s, const char *disk)
{
    struct session_disk *d = find_disk(s, disk);

    if (d && s->checkpoint && d->disk->tracked && !d->lost)
        d->keep = true;
}

bool session_may_ask(const struct session *s)
{
    return s->still || s->engine != ENGINE_JOB || s->status < SESSION_GOING_DOWN;
}

bool session_kept(const struct session *s, const char *disk)
{
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (strcmp(s->disks[i].disk->name, disk) == 0)
            return s->checkpoint && s->disks[i].keep && s->disks[i].keepable;
    }
    return false;
}

/* -- scratch ------------------------------------------------------------------------------------------------------- */

static void over_in_words(const struct session *s, const struct scratch_over *over, char *buf, size_t size)
{
    unsigned long long found = over->found, allowed = over->allowed;

    switch (over->limit) {
    case SCRATCH_SESSION:
        (void)snprintf(buf, size, "more than the %llu that --scratch-limit allows", allowed);
        break;
    case SCRATCH_ALL:
        (void)snprintf(buf, size, "those of all sessions %llu, more than the %llu that --scratch-total-limit allows",
                       found, allowed);
        break;
    case SCRATCH_RESERVE:
        (void)snprintf(buf, size,
                       "%llu are free on the file system of '%s', less than the %llu that --scratch-reserve keeps",
                       found, s->scratch_dir, allowed);
        break;
    }
}

/* The frozen view still stands: a disk whose pull has ended well keeps its part of the checkpoint. */
static void on_scratch_over(struct scratch_user *u, const struct scratch_over *over)
{
    struct session *s = container_of(u, struct session, scratch_user);
    struct failure f = {0};
    char why[256];
    unsigned most = 0;

    for (unsigned i = 1; i < u->nfiles; i++) {
        if (u->files[i].used > u->files[most].used)
            most = i;
    }
    over_in_words(s, over, why, sizeof(why));
    (void)failure_set(&f, -ENOSPC,
                      "session %s of VM '%s' is given up so that the guest is not: its scratch holds %llu bytes (%llu "
                      "for disk '%s'), %s; %s, or pull when the guest writes less",
                      s->rig.id, s->vm, (unsigned long long)scratch_used(u), (unsigned long long)u->files[most].used,
                      s->disks[most].disk->name, why,
                      over->limit == SCRATCH_RESERVE ? "make room there, name another --scratch" : "raise the limit");
    session_fail(s, &f);
}

void session_watch_scratch(struct session *s)
{
    if (!s->scratch)
        return;
    for (unsigned i = 0; i < s->rig.ndisks; i++)
        s->scratch_files[i].fd = s->disks[i].scratch_fd;
    s->scratch_user =
        (struct scratch_user){.files = s->scratch_files, .nfiles = s->rig.ndisks, .on_over = on_scratch_over};
    scratch_enter(s->scratch, &s->scratch_user);
    if (s->stop_wanted)
        scratch_going(&s->scratch_user);
}

/* -- questions ----------------------------------------------------------------------------------------------------- */

enum engine session_engine(const struct session *s)
{
    return s->engine;
}

const char *session_failed_step(const struct session *s)
{
    return s->failed_step;
}

const char *session_lost_disk(const struct session *s)
{
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (s->disks[i].lost)
            return s->disks[i].disk->name;
    }
    return NULL;
}

const char *session_id(const struct session *s)
{
    return s->rig.id;
}

enum session_status session_status(const struct session *s)
{
    return s->status;
}

const char *session_checkpoint(const struct session *s)
{
    return s->checkpoint;
}

const struct disk_list *session_disks(const struct session *s)
{
    return s->list;
}

const char *session_step(struct session *s)
{
    seq_describe(&s->rig.seq, s->step_text, sizeof(s->step_text));
    return s->step_text;
}

int64_t session_frozen_at_ms(const struct session *s)
{
    return s->frozen_at_ms;
}

unsigned session_setup_ms(const struct session *s)
{
    return s->up_ns ? (unsigned)((s->up_ns - s->began_ns) / 1000000) : 0;
}

const struct failure *session_not_quiesced(const struct session *s)
{
    return s->not_quiesced.err ? &s->not_quiesced : NULL;
}

bool session_quiesced(const struct session *s)
{
    return s->quiesced;
}

unsigned session_quiesced_ms(const struct session *s)
{
    return s->quiesced_ms;
}

static const char *const way_names[] = {
    [SESSION_AS_IT_IS] = "nothing", [SESSION_REOPENED] = "blockdev-reopen",  [SESSION_BY_JOBS] = "backup jobs",
    [SESSION_STOPPED] = "stop",     [SESSION_WAS_STOPPED] = "while stopped",
};
static_assert(ARRAY_SIZE(way_names) == SESSION_WAS_STOPPED + 1, "every way has a name");

const char *session_way_name(enum session_way way)
{
    return way_names[way];
}

const char *session_way_why(const struct session *s)
{
    return s->cut.refusal.text;
}

enum session_way session_way(const struct session *s)
{
    return s->cut.way;
}

uint64_t session_pause_us(const struct session *s)
{
    return s->pause_us;
}

unsigned session_flush_ms(const struct session *s)
{
    return (unsigned)(s->flush.all_ns / 1000000);
}

bool session_holds(const struct session *s, bool panic)
{
    return s->rig.hold >= (panic ? HOLD_SHUTDOWN_AND_PANIC : HOLD_SHUTDOWN);
}

const char *session_hold_refused(const struct session *s)
{
    return s->rig.hold_refused.err ? s->rig.hold_refused.text : NULL;
}

uint64_t session_scratch_used(const struct session *s)
{
    return scratch_used(&s->scratch_user);
}

struct source *session_source(struct session *s, const char *disk)
{
    struct session_disk *d = find_disk(s, disk);

    return d && s->status == SESSION_UP ? d->source : NULL;
}

const struct map *session_any_map(const struct session_disk *d, const char *context)
{
    for (size_t i = 0; i < d->nmaps; i++) {
        if (strcmp(d->maps[i].context, context) == 0)
            return d->maps[i].map;
    }
    return NULL;
}

const struct map *session_map(struct session *s, const char *disk, const char *context)
{
    const struct session_disk *d = find_disk(s, disk);

    for (size_t i = 0; d && i < d->nmaps; i++) {
        if (d->maps[i].ready && strcmp(d->maps[i].context, context) == 0)
            return d->maps[i].map;
    }
    return NULL;
}

bool session_expects_map(struct session *s, const char *disk, const char *context)
{
    const struct session_disk *d = find_disk(s, disk);
    size_t prefix = strlen(DIRTY_CONTEXT);

    if (!d || session_map(s, disk, context))
        return false;
    if (strcmp(context, ALLOCATION_CONTEXT) == 0)
        return true;
    if (strcmp(context, DEPTH_CONTEXT) == 0)
        return s->wants_depth;
    for (size_t k = 0; k < s->nsince; k++) {
        if (strncmp(context, DIRTY_CONTEXT, prefix) == 0 && strcmp(s->since[k], context + prefix) == 0)
            return session_usable_since(s, (unsigned)(d - s->disks), s->since[k]);
    }
    return false;
}
