/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/quiesce.h"

#include "backup/thaw.h"
#include "backup/watchdog.h"
#include "qmp/agent.h"

#include <assert.h>
#include <errno.h>

#define NS_PER_MS 1000000u

static const char *const mode_names[] = {
    [QUIESCE_OFF] = "off",
    [QUIESCE_TRY] = "try",
    [QUIESCE_REQUIRE] = "require",
};
static_assert(ARRAY_SIZE(mode_names) == QUIESCE_REQUIRE + 1, "every mode has a name");

enum quiesce_state {
    Q_IDLE,      /* nothing is frozen; no agent, no watchdog. prepare, rescue */
    Q_PREPARING, /* waits for the agent, then for the watchdog */
    Q_READY,     /* both are there, nothing is frozen. freeze, release */
    Q_FREEZING,  /* the freeze is sent, or about to be; the timer is the cut's deadline from here on */
    Q_FROZEN,    /* it was answered. thaw */
    Q_THAWING,   /* the thaw is sent */
    Q_RESCUING,  /* the watchdog, or our own tries, have it; the timer is whoever waits' deadline */
};

struct quiesce {
    uv_loop_t *loop;           /* borrowed */
    char *vm, *path, *program; /* owned; path may be NULL */
    enum quiesce_mode mode;
    void (*on_rescued)(void *arg, const struct failure *f);
    void *rescued_arg;

    enum quiesce_state state;
    struct agent *agent;       /* owned, NULL: none */
    struct watchdog *watchdog; /* owned, NULL: none */
    struct thaw *thaw;         /* owned, NULL: none */
    uv_timer_t timer;
    quiesce_cb cb; /* who waits, NULL: nobody */
    void *arg;
    bool for_freeze; /* … for the freeze's answer */

    int64_t nfrozen; /* file systems, by the agent's word */
    bool cut;        /* the cut was made before we sent the thaw */
    struct failure why_not;
    uint64_t began_ns;
    unsigned ms;
};

const char *quiesce_mode_name(enum quiesce_mode mode)
{
    return mode_names[mode];
}

/* -- who waits ----------------------------------------------------------------------------------------------------- */

static void wait_for(struct quiesce *q, quiesce_cb cb, void *arg)
{
    q->cb = cb;
    q->arg = arg;
    q->for_freeze = q->state == Q_FREEZING;
}

static void tell(struct quiesce *q, const struct failure *f)
{
    quiesce_cb cb = TAKE_PTR(q->cb);

    if (cb)
        cb(q->arg, f);
}

static void drop_agent(struct quiesce *q)
{
    if (q->agent)
        agent_close(TAKE_PTR(q->agent), NULL, NULL);
}

static void drop_watchdog(struct quiesce *q)
{
    if (q->watchdog)
        watchdog_dismiss(TAKE_PTR(q->watchdog));
}

static void become_idle(struct quiesce *q)
{
    (void)uv_timer_stop(&q->timer);
    drop_agent(q);
    drop_watchdog(q);
    q->state = Q_IDLE;
}

/* -- rescue -------------------------------------------------------------------------------------------------------- */

static void rescued(struct quiesce *q, const struct failure *f)
{
    bool awaited = q->cb != NULL;

    become_idle(q);
    if (awaited)
        tell(q, f);
    else
        q->on_rescued(q->rescued_arg, f);
}

static void on_rescue_thawed(void *arg, const struct failure *f)
{
    struct quiesce *q = arg;
    struct failure mine = {0};

    q->thaw = NULL;
    if (f) /* it will not get better soon: no further tries at once */
        (void)failure_set(&mine, -ENOTCONN,
                          "the file systems of VM '%s' may still be frozen, thaw them in the guest: %s", q->vm,
                          f->text);
    rescued(q, f ? &mine : NULL);
}

static int rescue_ourselves(struct quiesce *q, bool look_first)
{
    struct thaw_config config = {
        .loop = q->loop, .path = q->path, .fd = -1, .total_ms = QUIESCE_RESCUE_MS, .look_first = look_first};
    int r = thaw_start(&config, on_rescue_thawed, q, &q->thaw);

    if (r == 0)
        q->state = Q_RESCUING;
    return r;
}

/* We did not get an answer: whoever can goes on. The connection is the watchdog's from now on. */
static void hand_over(struct quiesce *q)
{
    struct failure f = {0};

    (void)uv_timer_stop(&q->timer);
    drop_agent(q);
    q->state = Q_RESCUING;
    if (q->watchdog)
        watchdog_hand_over(q->watchdog);
    else if (rescue_ourselves(q, /* look_first= */ false) < 0)
        q->state = Q_IDLE; /* out of memory: the mark stays */
    (void)failure_set(&f, -ENOTCONN, "the file systems of VM '%s' may still be frozen, %s: %s", q->vm,
                      q->watchdog ? "the watchdog goes on to thaw them" : "thawing is tried again", q->why_not.text);
    tell(q, &f);
}

static void on_dog_exit(void *arg, struct watchdog *w, bool thawed)
{
    struct quiesce *q = arg;
    struct failure f = {0};

    q->watchdog = NULL;
    switch (q->state) {
    case Q_PREPARING:
        (void)failure_set(&f, -ECHILD, "the thaw watchdog of VM '%s' could not start", q->vm);
        become_idle(q);
        tell(q, &f);
        break;
    case Q_RESCUING:
        if (!thawed)
            (void)failure_set(&f, -ENOTCONN,
                              "the file systems of VM '%s' may still be frozen, and the watchdog has given up: thaw "
                              "them in the guest, or reset it",
                              q->vm);
        rescued(q, thawed ? NULL : &f);
        break;
    default: /* READY: the freeze will not begin. FREEZING to THAWING: we do it. */
        break;
    }
}

/* -- prepare ------------------------------------------------------------------------------------------------------- */

static void on_dog_ready(void *arg)
{
    struct quiesce *q = arg;

    if (q->state != Q_PREPARING)
        return;
    (void)uv_timer_stop(&q->timer);
    q->state = Q_READY;
    tell(q, NULL);
}

static const struct watchdog_ops dog_ops = {.on_ready = on_dog_ready, .on_exit = on_dog_exit};

static void fail_prepare(struct quiesce *q, const struct failure *f)
{
    become_idle(q);
    tell(q, f);
}

static void on_dog_late(uv_timer_t *t)
{
    struct quiesce *q = container_of(t, struct quiesce, timer);
    struct failure f = {0};

    (void)failure_set(&f, -ETIMEDOUT, "the thaw watchdog of VM '%s' did not start within %u ms", q->vm,
                      QUIESCE_READY_MS);
    fail_prepare(q, &f);
}

/* What others have frozen is theirs to thaw: our thaw would end their freeze. */
static void on_status(void *arg, struct json_object *ret, const struct failure *f)
{
    struct quiesce *q = arg;
    struct failure mine = {0};
    struct watchdog_config config = {
        .loop = q->loop,
        .program = q->program,
        .path = q->path,
        .freeze_ms = QUIESCE_DOG_MS,
        .thaw_ms = QUIESCE_RESCUE_MS,
    };
    int r;

    if (f) {
        fail_prepare(q, f);
        return;
    }
    if (!json_object_is_type(ret, json_type_string) || strcmp(json_object_get_string(ret), "thawed") != 0) {
        (void)failure_set(&mine, -EBUSY, "somebody else has frozen the file systems of VM '%s'", q->vm);
        fail_prepare(q, &mine);
        return;
    }
    config.agent_fd = agent_fd(q->agent);
    r = watchdog_start(&config, &dog_ops, q, &q->watchdog);
    if (r < 0) {
        (void)failure_set(&mine, r, "cannot start the thaw watchdog of VM '%s': %s", q->vm, uv_strerror(r));
        fail_prepare(q, &mine);
        return;
    }
    (void)uv_timer_start(&q->timer, on_dog_late, QUIESCE_READY_MS, 0);
}

int quiesce_prepare(struct quiesce *q, quiesce_cb cb, void *arg, struct failure *f)
{
    int r;

    memset(&q->why_not, 0, sizeof(q->why_not));
    q->ms = 0;
    q->nfrozen = 0;
    q->cut = false;
    if (!q->path)
        return failure_set(f, -ENOENT, "no guest agent is named for VM '%s' (--qga)", q->vm);
    if (q->state != Q_IDLE)
        return failure_set(f, -EBUSY, "the file systems of VM '%s' are still to be thawed after an earlier session",
                           q->vm);
    r = agent_new(q->loop, q->path, -1, &q->agent);
    if (r == 0)
        r = agent_call(q->agent, "guest-fsfreeze-status", AGENT_AFTER_SYNC, QUIESCE_SYNC_MS, on_status, q);
    if (r < 0) {
        drop_agent(q);
        return failure_set(f, r, "cannot ask the guest agent '%s': %s", q->path, strerror(-r));
    }
    q->state = Q_PREPARING;
    wait_for(q, cb, arg);
    return 0;
}

/* -- freeze -------------------------------------------------------------------------------------------------------- */

static void on_frozen(void *arg, struct json_object *ret, const struct failure *f)
{
    struct quiesce *q = arg;
    struct failure mine = {0};

    if (!f && !json_object_is_type(ret, json_type_int))
        (void)failure_set(&mine, -EPROTO, "the guest agent of VM '%s' answers the freeze with no number", q->vm);
    else if (!f && json_object_get_int64(ret) <= 0)
        (void)failure_set(&mine, -ENODEV, "the guest agent of VM '%s' found no file system to freeze", q->vm);
    else if (f)
        (void)failure_copy(&mine, f);
    if (mine.err) {
        (void)failure_copy(&q->why_not, &mine);
        if (mine.err == -ENOSYS) {
            (void)uv_timer_stop(&q->timer);
            q->state = Q_READY;
        }
    } else {
        q->state = Q_FROZEN;
        q->nfrozen = json_object_get_int64(ret);
    }
    tell(q, mine.err ? &mine : NULL);
}

static void on_overdue(uv_timer_t *t)
{
    struct quiesce *q = container_of(t, struct quiesce, timer);

    quiesce_thaw_now(q, "the disks were not cut in time");
}

int quiesce_freeze(struct quiesce *q, quiesce_cb cb, void *arg, struct failure *f)
{
    int r = q->watchdog ? watchdog_arm(q->watchdog) : -ECHILD;

    assert(q->state == Q_READY);
    if (r < 0)
        return failure_set(f, r, "the thaw watchdog of VM '%s' is gone, so nothing is frozen", q->vm);
    q->began_ns = uv_hrtime();
    q->state = Q_FREEZING;
    (void)uv_timer_start(&q->timer, on_overdue, QUIESCE_FROZEN_MS, 0);
    r = agent_call(q->agent, "guest-fsfreeze-freeze", AGENT_AFTER_SYNC, QUIESCE_FREEZE_MS, on_frozen, q);
    if (r < 0)
        return failure_set(f, r, "cannot ask the guest agent '%s': %s", q->path, strerror(-r));
    wait_for(q, cb, arg);
    return 0;
}

/* -- thaw ---------------------------------------------------------------------------------------------------------- */

static unsigned ms_since_freeze(const struct quiesce *q)
{
    return (unsigned)((uv_hrtime() - q->began_ns) / NS_PER_MS);
}

static void thawed(struct quiesce *q)
{
    q->ms = ms_since_freeze(q);
    if (!q->cut)
        (void)failure_set(&q->why_not, -ECANCELED, "thawed before the disks were cut");
    become_idle(q);
    tell(q, q->for_freeze ? &q->why_not : NULL);
}

static void on_thaw_status(void *arg, struct json_object *ret, const struct failure *f)
{
    struct quiesce *q = arg;

    if (!f && json_object_is_type(ret, json_type_string) && strcmp(json_object_get_string(ret), "thawed") == 0)
        thawed(q);
    else
        hand_over(q);
}

/*
 * Fewer than were frozen: some have thawed by themselves, perhaps before the cut. Windows says it with an error (its
 * writers wait for 10 s at most).
 */
static void on_thaw_answer(void *arg, struct json_object *ret, const struct failure *f)
{
    struct quiesce *q = arg;
    int64_t n = json_object_is_type(ret, json_type_int) ? json_object_get_int64(ret) : 0;

    if (f)
        (void)failure_set(&q->why_not, f->err, "the thaw failed, file systems may have thawed before the cut: %s",
                          f->text);
    else if (n < q->nfrozen)
        (void)failure_set(&q->why_not, -ESTALE,
                          "of %lld frozen file systems %lld were still frozen after the cut: something in the guest "
                          "thaws them",
                          (long long)q->nfrozen, (long long)n);
    if (!f && q->nfrozen > 0) {
        thawed(q);
        return;
    }
    if (f && f->err != -EREMOTEIO && f->err != -ENOSYS) {
        hand_over(q);
        return;
    }
    if (agent_call(q->agent, "guest-fsfreeze-status", AGENT_AFTER_SYNC, QUIESCE_THAW_MIN_MS, on_thaw_status, q) < 0)
        hand_over(q);
}

/* False: it could not be sent, and whoever waited has been told. */
static bool begin_thaw(struct quiesce *q)
{
    unsigned passed = ms_since_freeze(q), end = QUIESCE_FROZEN_MS + QUIESCE_THAW_MIN_MS;
    unsigned left = passed < end ? MIN(end - passed, QUIESCE_THAW_MS) : QUIESCE_THAW_MIN_MS;

    (void)uv_timer_stop(&q->timer);
    q->state = Q_THAWING;
    agent_forget(q->agent);
    if (agent_call(q->agent, "guest-fsfreeze-thaw", AGENT_AT_ONCE, MAX(left, QUIESCE_THAW_MIN_MS), on_thaw_answer, q) ==
        0)
        return true;
    (void)failure_set(&q->why_not, -ENOMEM, "the thaw could not be sent");
    hand_over(q);
    return false;
}

int quiesce_thaw(struct quiesce *q, bool after_cut, quiesce_cb cb, void *arg)
{
    switch (q->state) {
    case Q_FREEZING:
    case Q_FROZEN:
        q->cut = after_cut && q->state == Q_FROZEN;
        if (!begin_thaw(q))
            return -ENOTCONN;
        break;
    case Q_THAWING:
        break;
    case Q_RESCUING:
        return -ENOTCONN;
    default:
        return 1;
    }
    wait_for(q, cb, arg);
    return 0;
}

void quiesce_thaw_now(struct quiesce *q, const char *why)
{
    if (q->state != Q_FREEZING && q->state != Q_FROZEN)
        return;
    (void)failure_set(&q->why_not, -ECANCELED, "%s", why);
    (void)begin_thaw(q); /* who waits for the freeze hears of it when the thaw has ended */
}

bool quiesce_is_thawed(const struct quiesce *q)
{
    return q->state <= Q_READY;
}

void quiesce_release(struct quiesce *q)
{
    if (q->state == Q_PREPARING || q->state == Q_READY) {
        q->cb = NULL;
        become_idle(q);
    } else {
        quiesce_thaw_now(q, "the session has ended");
    }
}

const struct failure *quiesce_why_not(const struct quiesce *q)
{
    return q->why_not.err ? &q->why_not : NULL;
}

unsigned quiesce_ms(const struct quiesce *q)
{
    return q->ms;
}

/* -- a dead daemon's freeze ---------------------------------------------------------------------------------------- */

static void on_waited(uv_timer_t *t)
{
    struct quiesce *q = container_of(t, struct quiesce, timer);
    struct failure f = {0};

    (void)failure_set(&f, -ENOTCONN,
                      "file systems of VM '%s' that were frozen may still be; its guest agent does not answer yet, "
                      "thawing is tried on",
                      q->vm);
    tell(q, &f);
}

int quiesce_rescue(struct quiesce *q, quiesce_cb cb, void *arg, struct failure *f)
{
    int r = 0;

    if (!q->path)
        return failure_set(
            f, -ENOTCONN,
            "a daemon has died while the file systems of VM '%s' were frozen, and no guest agent is named "
            "to thaw them (--qga)",
            q->vm);
    if (q->state != Q_IDLE && q->state != Q_RESCUING)
        return failure_set(f, -ENOTCONN, "the guest agent of VM '%s' is in use", q->vm);
    if (q->state == Q_IDLE)
        r = rescue_ourselves(q, /* look_first= */ true);
    if (r < 0)
        return failure_set(f, -ENOTCONN, "cannot ask the guest agent '%s': %s", q->path, strerror(-r));
    (void)uv_timer_start(&q->timer, on_waited, QUIESCE_WAIT_MS, 0);
    wait_for(q, cb, arg);
    return 0;
}

/* -- life ---------------------------------------------------------------------------------------------------------- */

enum quiesce_mode quiesce_mode(const struct quiesce *q)
{
    return q->mode;
}

static void quiesce_free(struct quiesce *q)
{
    free(q->vm);
    free(q->path);
    free(q->program);
    free(q);
}

int quiesce_new(const struct quiesce_config *config, struct quiesce **ret_quiesce)
{
    struct quiesce *q = calloc(1, sizeof(*q));

    if (!q)
        return -ENOMEM;
    q->loop = config->loop;
    q->mode = config->mode;
    q->on_rescued = config->on_rescued;
    q->rescued_arg = config->arg;
    q->vm = strdup(config->vm);
    q->program = strdup(config->program);
    q->path = config->path ? strdup(config->path) : NULL;
    if (!q->vm || !q->program || (config->path && !q->path)) {
        quiesce_free(q);
        return -ENOMEM;
    }
    (void)uv_timer_init(q->loop, &q->timer);
    *ret_quiesce = q;
    return 0;
}

static void on_timer_closed(uv_handle_t *h)
{
    quiesce_free(container_of((uv_timer_t *)h, struct quiesce, timer));
}

void quiesce_close(struct quiesce *q)
{
    if (!q)
        return;
    q->cb = NULL;
    if (q->thaw)
        thaw_forget(TAKE_PTR(q->thaw));
    drop_agent(q);
    if (q->watchdog)
        watchdog_abandon(TAKE_PTR(q->watchdog));
    uv_close((uv_handle_t *)&q->timer, on_timer_closed);
}
