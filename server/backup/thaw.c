/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/thaw.h"

#include "qmp/agent.h"

#include <errno.h>

struct thaw {
    struct agent *agent; /* owned */
    uv_timer_t timer;    /* the next try */
    uv_loop_t *loop;
    uint64_t end_ms; /* in loop time */
    unsigned nlost;
    bool look_first;
    bool said_so; /* the last thaw was answered well */
    thaw_cb cb;
    void *arg;
    struct failure last;
};

static void on_timer_closed(uv_handle_t *h)
{
    free(container_of((uv_timer_t *)h, struct thaw, timer));
}

static void on_agent_closed(void *arg)
{
    struct thaw *t = arg;

    uv_close((uv_handle_t *)&t->timer, on_timer_closed);
}

void thaw_forget(struct thaw *t)
{
    (void)uv_timer_stop(&t->timer);
    agent_close(t->agent, on_agent_closed, t);
}

static void end(struct thaw *t, const struct failure *f)
{
    thaw_cb cb = t->cb;
    void *arg = t->arg;

    thaw_forget(t);
    cb(arg, f);
}

static void try(struct thaw *t);

static void on_again(uv_timer_t *timer)
{
    try(container_of(timer, struct thaw, timer));
}

static void again(struct thaw *t, const struct failure *f)
{
    bool lost = f->err == -ENOENT || f->err == -ECONNREFUSED;

    t->last = *f;
    t->nlost = lost ? t->nlost + 1 : 0;
    if (t->nlost >= THAW_LOST_TRIES || uv_now(t->loop) >= t->end_ms)
        end(t, &t->last);
    else
        (void)uv_timer_start(&t->timer, on_again, THAW_PAUSE_MS, 0);
}

static void call(struct thaw *t, const char *command, enum agent_order order, agent_cb cb)
{
    uint64_t now = uv_now(t->loop);
    unsigned left = t->end_ms > now ? (unsigned)MIN(t->end_ms - now, THAW_TRY_MS) : 1;
    struct failure f = {0};
    int r = agent_call(t->agent, command, order, left, cb, t);

    if (r < 0) {
        (void)failure_set(&f, r, "cannot ask the guest agent: %s", strerror(-r));
        again(t, &f);
    }
}

static void on_status(void *arg, struct json_object *ret, const struct failure *f)
{
    struct thaw *t = arg;
    struct failure mine = {0};
    const char *status = json_object_is_type(ret, json_type_string) ? json_object_get_string(ret) : "";
    /* An agent without that question has thawed when it says so. */
    bool thawed = f ? f->err == -ENOSYS && t->said_so : strcmp(status, "thawed") == 0;

    if (thawed) {
        end(t, NULL);
    } else if (f) {
        again(t, f);
    } else if (t->look_first) {
        t->look_first = false;
        try(t);
    } else {
        (void)failure_set(&mine, -EAGAIN, "the guest agent says that file systems are still frozen");
        again(t, &mine);
    }
}

/* Whatever it says: its status tells. What asks for a thaw may be read by an agent later than we wait for. */
static void on_thawed(void *arg, struct json_object *ret, const struct failure *f)
{
    struct thaw *t = arg;

    t->said_so = !f;
    if (f && f->err == -ENOSYS)
        end(t, f); /* then nobody has frozen anything through it */
    else if (f && f->err != -EREMOTEIO && f->err != -EPROTO)
        again(t, f);
    else
        call(t, "guest-fsfreeze-status", AGENT_AFTER_SYNC, on_status);
}

static void try(struct thaw *t)
{
    if (t->look_first)
        call(t, "guest-fsfreeze-status", AGENT_AFTER_SYNC, on_status);
    else
        call(t, "guest-fsfreeze-thaw", AGENT_AT_ONCE, on_thawed);
}

int thaw_start(const struct thaw_config *config, thaw_cb cb, void *arg, struct thaw **ret_thaw)
{
    struct thaw *t = calloc(1, sizeof(*t));
    int r;

    if (!t)
        return -ENOMEM;
    t->loop = config->loop;
    t->look_first = config->look_first;
    t->cb = cb;
    t->arg = arg;
    uv_update_time(t->loop);
    t->end_ms = uv_now(t->loop) + config->total_ms;
    r = agent_new(t->loop, config->path, config->fd, &t->agent);
    if (r < 0) {
        free(t);
        return r;
    }
    (void)uv_timer_init(t->loop, &t->timer);
    (void)uv_timer_start(&t->timer, on_again, 0, 0);
    *ret_thaw = t;
    return 0;
}
