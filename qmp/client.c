/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/client.h"

#include "qmp/outbox.h"
#include "qmp/stream.h"
#include "qmp/unix.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define GREETING_TIMEOUT_MS 5000
#define RECONNECT_MIN_MS 100
#define RECONNECT_MAX_MS 2000
#define MAX_UNSENT ((size_t)16 << 20)

/* What one turn of the loop reads at most, so that a chatty QEMU does not starve the others on this loop. */
#define READ_SIZE ((size_t)64 << 10)
#define READS_PER_TURN 16

#define NO_DEADLINE UINT64_MAX

enum client_state {
    CLIENT_IDLE,        /* new: nothing runs. open */
    CLIENT_WAITING,     /* no link; the pace timer starts the next attempt */
    CLIENT_CONNECTING,  /* link, connect() under way; the pace timer is the greeting's deadline from here on */
    CLIENT_GREETING,    /* connected, nothing heard yet */
    CLIENT_NEGOTIATING, /* greeting heard, qmp_capabilities sent */
    CLIENT_READY,       /* command mode: the only state in which calls are taken, and in which there are any */
    CLIENT_CLOSED,      /* qmp_client_close() was called: no link, no watch; handles close, then the memory goes */
    CLIENT_NSTATES,
};

#define MAY(state) (1u << (CLIENT_##state))
static const unsigned char client_moves[] = {
    [CLIENT_IDLE] = MAY(WAITING) | MAY(CLOSED),
    [CLIENT_WAITING] = MAY(CONNECTING) | MAY(CLOSED),
    [CLIENT_CONNECTING] = MAY(GREETING) | MAY(WAITING) | MAY(CLOSED),
    [CLIENT_GREETING] = MAY(NEGOTIATING) | MAY(WAITING) | MAY(CLOSED),
    [CLIENT_NEGOTIATING] = MAY(READY) | MAY(WAITING) | MAY(CLOSED),
    [CLIENT_READY] = MAY(WAITING) | MAY(CLOSED),
    [CLIENT_CLOSED] = 0,
};
#undef MAY
static_assert(ARRAY_SIZE(client_moves) == CLIENT_NSTATES, "one row per state");

/*
 * One connection or an attempt at one. The client points at the live link only; a dropped one lives on until its poll
 * handle's close callback, so whoever is inside it may finish, after seeing that the client has left it.
 */
struct link {
    struct qmp_client *client; /* outlives it: the client's end waits for all links */
    uv_poll_t poll;
    int fd;
    int polled; /* events that poll waits for */
    int broken; /* why sending failed; the link is lost once everything QEMU said before is read */
    pid_t peer;
    struct outbox outbox;
    struct qmp_stream stream;
    struct json_object *greeting; /* owned, until ready */
    uint64_t capabilities_id;
};

struct call_list {
    struct qmp_call *first, *last;
};

struct qmp_client {
    uv_loop_t *loop; /* borrowed */
    const struct qmp_client_ops *ops;
    void *arg;
    struct qmp_client_limits limits;
    enum client_state state;
    struct link *link;          /* owned, NULL: none */
    uv_timer_t pace;            /* next attempt, or deadline of the greeting */
    uv_timer_t deadline;        /* the earliest of all calls */
    uint64_t deadline_ms;       /* what it is set to, in loop time, or NO_DEADLINE */
    unsigned reconnect_ms;      /* the next pause */
    unsigned nhandles;          /* open or closing */
    uint64_t last_id;           /* never used again, whatever the link: a stale reply matches nothing */
    struct call_list calls;     /* in flight, in order of id; borrowed from their callers until answered */
    struct call_list cancelled; /* to be answered from the loop */
    struct qmp_watch *watches, *watches_last;
    struct qmp_watch *next_watch; /* who hears the event under way next */
    uint64_t nevents;
    qmp_close_cb close_cb;
    void *close_arg;
    char path[];
};

static void client_set_state(struct qmp_client *c, enum client_state to)
{
    assert(client_moves[c->state] & (1u << to));
    c->state = to;
}

/* ---- calls: lists and answers ---- */

static void calls_append(struct call_list *l, struct qmp_call *call)
{
    call->next = NULL;
    call->prev = l->last;
    *(l->last ? &l->last->next : &l->first) = call;
    l->last = call;
}

static void calls_remove(struct call_list *l, struct qmp_call *call)
{
    *(call->prev ? &call->prev->next : &l->first) = call->next;
    *(call->next ? &call->next->prev : &l->last) = call->prev;
    call->next = call->prev = NULL;
}

/* The call is off every list and may be gone when this returns. */
static void call_answer(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    call->client = NULL;
    call->cb(call, ret, f);
}

static void call_answer_cancelled(struct qmp_client *c, struct qmp_call *call)
{
    struct failure f = {0};

    calls_remove(&c->cancelled, call);
    failure_set(&f, -ECANCELED, "'%s' was cancelled", call->command);
    call_answer(call, NULL, &f);
}

/* ---- the link's life ---- */

static void on_poll(uv_poll_t *handle, int status, int events);

static void link_poll(struct link *l)
{
    bool connecting = l->client->state == CLIENT_CONNECTING;
    int events = connecting ? UV_WRITABLE : UV_READABLE | (!outbox_is_empty(&l->outbox) || l->broken ? UV_WRITABLE : 0);

    if (events == l->polled)
        return;
    l->polled = events;
    (void)uv_poll_start(&l->poll, events, on_poll); /* fails for a closing handle only */
}

/* Sends what the socket takes. Calls nobody: a failure is noticed by the poll callback, so any caller is safe. */
static void link_write(struct link *l)
{
    if (!l->broken)
        l->broken = outbox_flush(&l->outbox, l->fd);
    if (l->broken)
        outbox_done(&l->outbox);
    link_poll(l);
}

static void client_handle_closed(struct qmp_client *c);
static void on_pace(uv_timer_t *timer);

static void link_free(struct link *l)
{
    qmp_stream_done(&l->stream);
    json_object_put(l->greeting);
    free(l);
}

static void on_link_closed(uv_handle_t *handle)
{
    struct link *l = container_of((uv_poll_t *)handle, struct link, poll);
    struct qmp_client *c = l->client;

    link_free(l);
    client_handle_closed(c);
}

/* Ends the live link, if there is one. */
static void link_drop(struct qmp_client *c)
{
    struct link *l = TAKE_PTR(c->link);

    if (!l)
        return;
    outbox_done(&l->outbox);
    uv_close((uv_handle_t *)&l->poll, on_link_closed);
    close(l->fd); /* libuv allows it right after uv_close() */
}

/* fd is given. */
static int link_new(struct qmp_client *c, int fd, struct failure *f)
{
    struct link *l = calloc(1, sizeof(*l));
    int r;

    if (!l) {
        close(fd);
        return failure_set(f, -ENOMEM, "no memory for a connection");
    }
    l->client = c;
    l->fd = fd;
    qmp_stream_init(&l->stream, c->limits.max_document);
    r = uv_poll_init(c->loop, &l->poll, fd);
    if (r < 0) {
        close(fd);
        link_free(l);
        return failure_set(f, r, "cannot set up a connection: %s", strerror(-r));
    }
    c->nhandles++;
    c->link = l;
    return 0;
}

/*
 * The link, or the attempt to make one, is over: answers the calls, says so and goes on after a pause. From the loop
 * only. The client may be closed when this returns, never freed.
 */
static void client_lose(struct qmp_client *c, const struct failure *why)
{
    link_drop(c);
    client_set_state(c, CLIENT_WAITING);
    uv_timer_start(&c->pace, on_pace, c->reconnect_ms, /* repeat= */ 0);
    c->reconnect_ms = MIN(c->reconnect_ms * 2, c->limits.reconnect_max_ms);

    while (c->state != CLIENT_CLOSED && (c->cancelled.first || c->calls.first)) {
        struct qmp_call *call = c->calls.first;
        struct failure f = {0};

        if (c->cancelled.first) {
            call_answer_cancelled(c, c->cancelled.first);
            continue;
        }
        calls_remove(&c->calls, call);
        failure_set(&f, -ECONNRESET, "'%s' was not answered: %s", call->command, why->text);
        call_answer(call, NULL, &f);
    }
    if (c->state != CLIENT_CLOSED)
        c->ops->on_lost(c->arg, why);
}

/* ---- what QEMU says ---- */

static void client_hear_greeting(struct qmp_client *c, struct json_object *greeting)
{
    struct link *l = c->link;
    uint64_t id = ++c->last_id;
    int r = outbox_put(&l->outbox, "qmp_capabilities", /* args= */ NULL, id, QMP_NO_FD, c->limits.max_unsent);

    if (r < 0) {
        struct failure f = {0};

        failure_set(&f, r, "cannot answer the greeting of '%s': %s", c->path, strerror(-r));
        client_lose(c, &f);
        return;
    }
    l->greeting = json_object_get(greeting);
    l->capabilities_id = id;
    client_set_state(c, CLIENT_NEGOTIATING);
    link_write(l);
}

static const char *string_of(struct json_object *o, const char *key)
{
    struct json_object *v;

    return json_object_object_get_ex(o, key, &v) && json_object_is_type(v, json_type_string) ? json_object_get_string(v)
                                                                                             : NULL;
}

/* QEMU's sentence as it is, and a number by its class. */
static void failure_of_error(struct failure *f, struct json_object *error)
{
    static const struct {
        const char *class;
        int err;
    } classes[] = {{"CommandNotFound", -ENOSYS}, {"DeviceNotFound", -ENODEV}};
    const char *class = string_of(error, "class");
    const char *desc = string_of(error, "desc");
    int err = -EREMOTEIO;

    for (size_t i = 0; class && i < ARRAY_SIZE(classes); i++)
        if (strcmp(class, classes[i].class) == 0)
            err = classes[i].err;
    failure_set(f, err, "%s", desc ? desc : "an error without a description");
}

static void client_become_ready(struct qmp_client *c)
{
    struct json_object *greeting = TAKE_PTR(c->link->greeting);

    uv_timer_stop(&c->pace);
    c->reconnect_ms = c->limits.reconnect_min_ms;
    client_set_state(c, CLIENT_READY);
    c->ops->on_ready(c->arg, greeting);
    json_object_put(greeting);
}

/* v is what came with the answer: its "return" value or its "error". */
static void client_hear_reply(struct qmp_client *c, uint64_t id, bool worked, struct json_object *v)
{
    struct failure f = {0};
    struct qmp_call *call;

    if (!worked)
        failure_of_error(&f, v);
    if (c->state == CLIENT_NEGOTIATING && id == c->link->capabilities_id) {
        if (worked) {
            client_become_ready(c);
        } else {
            struct failure why = {0};

            failure_set(&why, -EPROTO, "'%s' refused command mode: %s", c->path, f.text);
            client_lose(c, &why);
        }
        return;
    }
    for (call = c->calls.first; call && call->id != id; call = call->next)
        ;
    if (!call)
        return; /* cancelled or late */
    calls_remove(&c->calls, call);
    call_answer(call, worked ? v : NULL, worked ? NULL : &f);
}

static void client_hear_event(struct qmp_client *c, const char *event, struct json_object *data)
{
    uint64_t number = c->nevents++;

    for (struct qmp_watch *w = c->watches; w; w = c->next_watch) {
        c->next_watch = w->next;
        if (w->since <= number && (!w->event || strcmp(w->event, event) == 0))
            w->cb(w, event, data);
    }
}

/* What qpulld says instead of its greeting; QEMU never does. */
static void client_hear_refusal(struct qmp_client *c, struct json_object *error)
{
    struct failure f = {0}, why = {0};

    failure_of_error(&f, error);
    failure_set(&why, f.err, "'%s' turns us away: %s", c->path, f.text);
    client_lose(c, &why);
}

/* Whatever is none of a greeting, a reply to somebody, and an event, is left alone: QEMU may learn to say more. */
static int on_document(void *arg, struct json_object *doc)
{
    struct link *l = arg;
    struct qmp_client *c = l->client;
    struct json_object *v = NULL, *id;
    const char *event = string_of(doc, "event");

    if (event) {
        (void)json_object_object_get_ex(doc, "data", &v);
        client_hear_event(c, event, v);
    } else if (json_object_object_get_ex(doc, "QMP", &v)) {
        if (c->state == CLIENT_GREETING && json_object_is_type(v, json_type_object))
            client_hear_greeting(c, v);
    } else if (json_object_object_get_ex(doc, "id", &id) && json_object_is_type(id, json_type_int)) {
        bool worked = json_object_object_get_ex(doc, "return", &v);

        if (worked || json_object_object_get_ex(doc, "error", &v))
            client_hear_reply(c, (uint64_t)json_object_get_int64(id), worked, v);
    } else if (c->state == CLIENT_GREETING && json_object_object_get_ex(doc, "error", &v)) {
        client_hear_refusal(c, v);
    }
    return c->link == l ? 0 : -ECANCELED; /* a callback closed the client, or the link is lost: stop */
}

/* A socket's last error, or 0 for its end. To people, QEMU leaving is one thing, whatever it left unread. */
static void link_end_of(struct link *l, int error, struct failure *f)
{
    const char *path = l->client->path;

    if (error == 0 || error == EPIPE || error == ECONNRESET)
        failure_set(f, -ECONNRESET, "'%s' closed the connection", path);
    else
        failure_set(f, -ECONNRESET, "the connection to '%s' failed: %s", path, strerror(error));
}

/* Hears what has come, in bounds. Returns whether the link is still the client's. */
static bool link_read(struct link *l)
{
    struct qmp_client *c = l->client;
    struct failure f = {0};
    char input[READ_SIZE]; /* of nobody: an idle VM costs nothing for it */

    for (unsigned i = 0; i < READS_PER_TURN; i++) {
        ssize_t n = recv(l->fd, input, sizeof(input), MSG_DONTWAIT);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN && !l->broken)
            return true;
        if (n <= 0)
            link_end_of(l, n == 0 ? 0 : errno == EAGAIN ? -l->broken : errno, &f);
        else if (qmp_stream_feed(&l->stream, input, (size_t)n, on_document, l, &f) == 0)
            continue;
        if (c->link != l)
            return false;
        client_lose(c, &f);
        return false;
    }
    return true;
}

/* ---- connecting ---- */

static void client_connected(struct qmp_client *c)
{
    struct ucred peer = {0};
    socklen_t len = sizeof(peer);

    if (getsockopt(c->link->fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) == 0)
        c->link->peer = peer.pid;
    client_set_state(c, CLIENT_GREETING);
    link_poll(c->link);
}

static int refused(struct qmp_client *c, int err, struct failure *f)
{
    if (err == -EAGAIN)
        return failure_set(f, err, "cannot connect to '%s': other clients are waiting for this socket already",
                           c->path);
    return failure_set(f, err, "cannot connect to '%s': %s", c->path, strerror(-err));
}

static void on_poll(uv_poll_t *handle, int status, int events)
{
    struct link *l = container_of(handle, struct link, poll);
    struct qmp_client *c = l->client;
    struct failure f = {0};

    if (status < 0) {
        /* What libuv 1.44 makes of any POLLERR, such as QEMU's end with commands unread: -EBADF, and polling stops. */
        l->broken = l->broken ? l->broken : -ECONNRESET;
        l->polled = 0;
    }
    if (c->state == CLIENT_CONNECTING) {
        int err = 0;
        socklen_t len = sizeof(err);

        if (getsockopt(l->fd, SOL_SOCKET, SO_ERROR, &err, &len) < 0)
            err = errno;
        if (err) {
            refused(c, -err, &f);
            client_lose(c, &f);
            return;
        }
        client_connected(c);
    }
    if (link_read(l))
        link_write(l);
}

static int client_connect(struct qmp_client *c, struct failure *f)
{
    int fd = -1, r = unix_connect(c->path, &fd);

    if (r < 0 && r != -EINPROGRESS)
        return refused(c, r, f);
    if (link_new(c, fd, f) < 0)
        return f->err;
    if (r == 0)
        client_connected(c);
    else
        link_poll(c->link);
    return 0;
}

static void on_pace(uv_timer_t *timer)
{
    struct qmp_client *c = container_of(timer, struct qmp_client, pace);
    struct failure f = {0};

    if (c->state == CLIENT_WAITING) {
        client_set_state(c, CLIENT_CONNECTING);
        uv_timer_start(&c->pace, on_pace, c->limits.greeting_timeout_ms, /* repeat= */ 0);
        if (client_connect(c, &f) < 0)
            client_lose(c, &f);
        return;
    }
    /* Timers run before sockets: where the loop stood still for long, the answer may have come in time. */
    if (c->state != CLIENT_CONNECTING && (!link_read(c->link) || c->state == CLIENT_READY))
        return;
    failure_set(&f, -ETIMEDOUT,
                c->state == CLIENT_NEGOTIATING
                    ? "'%s' did not enter command mode within %u ms"
                    : "no QMP greeting from '%s' within %u ms: another client holds this socket, and QEMU talks to one "
                      "at a time; end that one, or give QEMU another QMP socket",
                c->path, c->limits.greeting_timeout_ms);
    client_lose(c, &f);
}

/* ---- the client ---- */

static void on_deadline(uv_timer_t *timer);

int qmp_client_new(uv_loop_t *loop, const char *path, const struct qmp_client_ops *ops, void *arg,
                   const struct qmp_client_limits *limits, struct qmp_client **ret_client)
{
    struct qmp_client *c = calloc(1, sizeof(*c) + strlen(path) + 1);

    if (!c)
        return -ENOMEM;
    c->loop = loop;
    c->ops = ops;
    c->arg = arg;
    c->deadline_ms = NO_DEADLINE;
    memcpy(c->path, path, strlen(path) + 1);
    if (limits)
        c->limits = *limits;
    if (c->limits.greeting_timeout_ms == 0)
        c->limits.greeting_timeout_ms = GREETING_TIMEOUT_MS;
    if (c->limits.reconnect_min_ms == 0)
        c->limits.reconnect_min_ms = RECONNECT_MIN_MS;
    if (c->limits.reconnect_max_ms == 0)
        c->limits.reconnect_max_ms = RECONNECT_MAX_MS;
    if (c->limits.max_unsent == 0)
        c->limits.max_unsent = MAX_UNSENT;
    c->limits.reconnect_max_ms = MAX(c->limits.reconnect_max_ms, c->limits.reconnect_min_ms);
    c->reconnect_ms = c->limits.reconnect_min_ms;
    (void)uv_timer_init(loop, &c->pace); /* cannot fail */
    (void)uv_timer_init(loop, &c->deadline);
    c->nhandles = 2;
    *ret_client = c;
    return 0;
}

int qmp_client_open(struct qmp_client *c)
{
    if (c->state != CLIENT_IDLE)
        return -EALREADY;
    client_set_state(c, CLIENT_WAITING);
    return uv_timer_start(&c->pace, on_pace, /* timeout= */ 0, /* repeat= */ 0);
}

static void client_handle_closed(struct qmp_client *c)
{
    qmp_close_cb cb;
    void *arg;

    if (--c->nhandles > 0 || c->state != CLIENT_CLOSED)
        return;
    while (c->cancelled.first)
        call_answer_cancelled(c, c->cancelled.first);
    cb = c->close_cb;
    arg = c->close_arg;
    free(c);
    if (cb)
        cb(arg);
}

static void on_pace_closed(uv_handle_t *handle)
{
    client_handle_closed(container_of((uv_timer_t *)handle, struct qmp_client, pace));
}

static void on_deadline_closed(uv_handle_t *handle)
{
    client_handle_closed(container_of((uv_timer_t *)handle, struct qmp_client, deadline));
}

void qmp_client_close(struct qmp_client *c, qmp_close_cb cb, void *arg)
{
    client_set_state(c, CLIENT_CLOSED);
    c->close_cb = cb;
    c->close_arg = arg;
    link_drop(c);
    while (c->calls.first)
        qmp_call_cancel(c->calls.first);
    while (c->watches)
        qmp_watch_remove(c->watches);
    uv_close((uv_handle_t *)&c->pace, on_pace_closed);
    uv_close((uv_handle_t *)&c->deadline, on_deadline_closed);
}

bool qmp_client_is_ready(const struct qmp_client *c)
{
    return c->state == CLIENT_READY;
}

uint64_t qmp_client_nhappenings(const struct qmp_client *c)
{
    return c->last_id + c->nevents;
}

const char *qmp_client_path(const struct qmp_client *c)
{
    return c->path;
}

pid_t qmp_client_peer_pid(const struct qmp_client *c)
{
    return c->link ? c->link->peer : 0;
}

/* ---- calls ---- */

static void client_wake_at(struct qmp_client *c, uint64_t when_ms)
{
    uint64_t now = uv_now(c->loop);

    if (when_ms >= c->deadline_ms || c->state == CLIENT_CLOSED)
        return;
    c->deadline_ms = when_ms;
    (void)uv_timer_start(&c->deadline, on_deadline, when_ms > now ? when_ms - now : 0, /* repeat= */ 0);
}

static void calls_expire(struct qmp_client *c)
{
    uint64_t now = uv_now(c->loop);
    struct qmp_call *call = c->calls.first;

    while (call) {
        struct failure f = {0};

        if (call->deadline_ms > now) {
            call = call->next;
            continue;
        }
        calls_remove(&c->calls, call);
        outbox_drop(&c->link->outbox, call->id);
        failure_set(&f, -ETIMEDOUT, "'%s' was not answered within %u ms", call->command, call->timeout_ms);
        call_answer(call, NULL, &f);
        call = c->calls.first; /* the callback may have changed the list anyhow; what it starts is not overdue */
    }
}

static bool calls_are_overdue(const struct qmp_client *c)
{
    for (const struct qmp_call *call = c->calls.first; call; call = call->next)
        if (call->deadline_ms <= uv_now(c->loop))
            return true;
    return false;
}

/* Those that stand there now; what a callback cancels waits for the next turn. */
static void calls_answer_cancelled(struct qmp_client *c)
{
    const struct qmp_call *last = c->cancelled.last;
    bool more = last != NULL;

    while (more && c->state != CLIENT_CLOSED) {
        struct qmp_call *call = c->cancelled.first;

        more = call != last;
        call_answer_cancelled(c, call);
    }
}

static void on_deadline(uv_timer_t *timer)
{
    struct qmp_client *c = container_of(timer, struct qmp_client, deadline);
    uint64_t next_ms = NO_DEADLINE;

    c->deadline_ms = NO_DEADLINE;
    /* As for the greeting: an answer that came in time counts. */
    if (calls_are_overdue(c))
        (void)link_read(c->link);
    calls_answer_cancelled(c);
    calls_expire(c);
    for (const struct qmp_call *call = c->calls.first; call; call = call->next)
        next_ms = MIN(next_ms, call->deadline_ms);
    client_wake_at(c, c->cancelled.first ? 0 : next_ms);
}

int qmp_call_start(struct qmp_client *c, struct qmp_call *call, const char *command, struct json_object *args, int fd,
                   unsigned timeout_ms, qmp_call_cb cb, void *arg)
{
    int r;

    *call = (struct qmp_call){.cb = cb, .arg = arg, .timeout_ms = timeout_ms ? timeout_ms : QMP_DEFAULT_TIMEOUT_MS};
    if (c->state != CLIENT_READY) {
        json_object_put(args);
        return -ENOTCONN;
    }
    call->id = ++c->last_id;
    r = outbox_put(&c->link->outbox, command, args, call->id, fd, c->limits.max_unsent);
    if (r < 0)
        return r;
    (void)snprintf(call->command, sizeof(call->command), "%s", command);
    call->client = c;
    call->deadline_ms = uv_now(c->loop) + call->timeout_ms;
    calls_append(&c->calls, call);
    client_wake_at(c, call->deadline_ms);
    link_write(c->link);
    return 0;
}

void qmp_call_cancel(struct qmp_call *call)
{
    struct qmp_client *c = call->client;

    if (!c || call->cancelled)
        return;
    calls_remove(&c->calls, call);
    call->cancelled = true;
    calls_append(&c->cancelled, call);
    if (c->link)
        outbox_drop(&c->link->outbox, call->id);
    client_wake_at(c, 0);
}

/* ---- watches ---- */

void qmp_watch_add(struct qmp_client *c, struct qmp_watch *w, const char *event, qmp_watch_cb cb, void *arg)
{
    *w = (struct qmp_watch){.cb = cb, .arg = arg, .event = event, .since = c->nevents};
    if (c->state == CLIENT_CLOSED)
        return;
    w->client = c;
    w->prev = c->watches_last;
    *(w->prev ? &w->prev->next : &c->watches) = w;
    c->watches_last = w;
}

void qmp_watch_remove(struct qmp_watch *w)
{
    struct qmp_client *c = w->client;

    if (!c)
        return;
    if (c->next_watch == w)
        c->next_watch = w->next;
    *(w->prev ? &w->prev->next : &c->watches) = w->next;
    *(w->next ? &w->next->prev : &c->watches_last) = w->prev;
    w->next = w->prev = NULL;
    w->client = NULL;
}
