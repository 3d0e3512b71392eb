/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/upstream.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#define UPSTREAM_TIMEOUT_MS 30000u /* where the configuration has 0 */

/*
 * Our last word is the end of our stream; then QEMU closes its end, at once unless it is stuck. We wait for that, since
 * QEMU before 8.2 that is told to stop its NBD server while a client negotiates (although that client is gone, but the
 * main loop has not been there yet) waits for it without ever looking at its socket: the guest stands still for good.
 */
#define FAREWELL_MS 2000u

/* A unix listener whose backlog is full says EAGAIN at once and gives no sign when there is room again (unix(7)). */
#define CONNECT_RETRY_MS 20u

/* The deadline's timer can only come this late if our own process did not run: then the server is not to blame. */
#define LATE_MS 1000u

static void set_state(struct upstream *u, enum upstream_state state)
{
    assert(state > u->state); /* our own mistake; only ever towards closed */
    u->state = state;
}

void upstream_failure(const struct upstream *u, struct failure *f, int err, const char *sentence)
{
    const char *why = sentence ? sentence : nbd_get_error();
    const char *colon;

    /* libnbd begins with the name of the function that failed, which tells our readers nothing. */
    if (!sentence && why && strncmp(why, "nbd_", strlen("nbd_")) == 0 && (colon = strstr(why, ": ")))
        why = colon + strlen(": ");
    failure_set(f, err, "NBD export \"%.128s\" at %s: %s", u->export_name, u->address.sun_path,
                why ? why : "the connection failed");
}

/* What libnbd's last error means to us. */
static int libnbd_errno(int otherwise)
{
    int err = nbd_get_errno();

    return err > 0 ? -err : otherwise;
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct upstream *u = handle->data;

    u->nhandles--;
    if (u->state == UPSTREAM_CLOSED && u->nhandles == 0) {
        free(TAKE_PTR(u->export_name));
        u->ops->closed(u);
    }
}

static void close_handle(uv_handle_t *handle)
{
    uv_close(handle, on_handle_closed);
}

static void close_timers(struct upstream *u)
{
    close_handle((uv_handle_t *)&u->deadline);
    close_handle((uv_handle_t *)&u->kick);
}

/* The socket is nobody's any more. */
static void let_go(struct upstream *u)
{
    (void)uv_timer_stop(&u->deadline); /* never fails */
    close_handle((uv_handle_t *)&u->poll);
    (void)close(u->fd); /* a socket has nothing to lose here */
    u->fd = -1;
    if (u->state == UPSTREAM_CLOSED)
        close_timers(u);
}

static void on_farewell_late(uv_timer_t *deadline)
{
    let_go(deadline->data);
}

/* Replies that were under way are read and dropped: QEMU must not wait for us to take them. */
static void on_farewell(uv_poll_t *poll, int status, int events)
{
    struct upstream *u = poll->data;
    char dropped[4096];
    ssize_t n = status < 0 ? 0 : recv(u->fd, dropped, sizeof(dropped), 0);

    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        let_go(u);
}

/*
 * Ends libnbd's part, in every state, and begins the farewell where there is a socket. Without NBD_CMD_DISC: QEMU takes
 * end of file for the same, and nbd_aio_disconnect() of libnbd 1.14.2 reads memory that it has freed (valgrind).
 */
static void disconnect(struct upstream *u)
{
    (void)uv_timer_stop(&u->deadline); /* never fails */
    (void)uv_timer_stop(&u->kick);     /* never fails */
    u->events = 0;
    nbd_close(TAKE_PTR(u->nbd)); /* NULL is fine; commands in flight are forgotten */
    if (u->fd < 0)
        return;
    (void)shutdown(u->fd, SHUT_WR);                          /* fails where the server was faster */
    (void)uv_poll_start(&u->poll, UV_READABLE, on_farewell); /* fails only for a handle that is closing */
    (void)uv_timer_start(&u->deadline, on_farewell_late, FAREWELL_MS, /* repeat= */ 0);
}

static void fall(struct upstream *u)
{
    set_state(u, UPSTREAM_DOWN);
    disconnect(u);
    u->ops->down(u, &u->why);
}

static void on_poll(uv_poll_t *poll, int status, int events);

/* Waits on the socket for what libnbd wants to do next. */
static void update_poll(struct upstream *u)
{
    unsigned direction = nbd_aio_get_direction(u->nbd);
    int events = 0;

    if (direction & LIBNBD_AIO_DIRECTION_READ)
        events |= UV_READABLE;
    if (direction & LIBNBD_AIO_DIRECTION_WRITE)
        events |= UV_WRITABLE;
    if (events == u->events)
        return;
    if (events)
        (void)uv_poll_start(&u->poll, events, on_poll); /* fails only for a handle that is closing */
    else
        (void)uv_poll_stop(&u->poll); /* never fails */
    u->events = events;
}

/* After libnbd has run from the loop: where does that leave us? */
static void progress(struct upstream *u)
{
    if (nbd_aio_is_dead(u->nbd) || nbd_aio_is_closed(u->nbd)) {
        upstream_failure(u, &u->why, u->state == UPSTREAM_UP ? -ENOTCONN : -EPROTO, "the server closed the connection");
        fall(u);
        return;
    }
    if (u->state == UPSTREAM_HANDSHAKE && nbd_aio_is_ready(u->nbd)) {
        set_state(u, UPSTREAM_UP);
        (void)uv_timer_stop(&u->deadline); /* never fails */
        u->ops->up(u);
    } else if (u->state == UPSTREAM_UP) {
        u->ops->moved(u);
    }
    if (u->nbd)
        update_poll(u);
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    struct upstream *u = poll->data;
    unsigned direction = nbd_aio_get_direction(u->nbd);
    int r = 0;

    if (status < 0) {
        /* The socket has an error and libuv stopped polling: have libnbd run into it, after what is still to be read.
         */
        events = UV_READABLE | UV_WRITABLE;
        u->events = 0;
    }
    if ((events & UV_READABLE) && (direction & LIBNBD_AIO_DIRECTION_READ))
        r = nbd_aio_notify_read(u->nbd);
    else if ((events & UV_WRITABLE) && (direction & LIBNBD_AIO_DIRECTION_WRITE))
        r = nbd_aio_notify_write(u->nbd);
    /* In the handshake a refusal is followed by a farewell, so libnbd may still be alive after it. */
    if (r < 0 && (u->state == UPSTREAM_HANDSHAKE || nbd_aio_is_dead(u->nbd)))
        upstream_failure(u, &u->why, libnbd_errno(-EPROTO), NULL);
    progress(u);
}

/* Puts the connected socket into libnbd and the loop's hands; libnbd owns fd from here on. */
static int begin_handshake(struct upstream *u, int fd)
{
    int r;

    u->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (u->fd < 0) {
        r = -errno;
        (void)close(fd); /* nothing was sent yet */
        failure_set(&u->why, r, "cannot duplicate a socket: %s", strerror(-r));
        return r;
    }
    r = uv_poll_init(u->loop, &u->poll, u->fd);
    if (r < 0) {
        (void)close(fd); /* nothing was sent yet */
        (void)close(u->fd);
        u->fd = -1;
        failure_set(&u->why, r, "cannot poll a socket: %s", uv_strerror(r));
        return r;
    }
    u->poll.data = u;
    u->nhandles++;
    set_state(u, UPSTREAM_HANDSHAKE);
    if (nbd_aio_connect_socket(u->nbd, fd) < 0) {
        upstream_failure(u, &u->why, libnbd_errno(-EPROTO), NULL);
        return u->why.err;
    }
    update_poll(u);
    return 0;
}

/* Returns -EAGAIN if it is to be tried again, other failures are in u->why. */
static int try_connect(struct upstream *u)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int r;

    if (fd < 0) {
        r = -errno;
        failure_set(&u->why, r, "cannot make a socket: %s", strerror(-r));
        return r;
    }
    /* On a unix socket this is done or refused at once, never in progress. */
    if (connect(fd, (const struct sockaddr *)&u->address, sizeof(u->address)) < 0) {
        r = -errno;
        (void)close(fd); /* nothing was sent yet */
        if (r != -EAGAIN)
            failure_set(&u->why, r, "cannot connect to the NBD server at %s: %s", u->address.sun_path, strerror(-r));
        return r;
    }
    return begin_handshake(u, fd);
}

static void on_kick(uv_timer_t *kick)
{
    struct upstream *u = kick->data;

    if (u->state == UPSTREAM_CONNECT && u->why.err == 0) {
        if (try_connect(u) == -EAGAIN)
            (void)uv_timer_start(kick, on_kick, CONNECT_RETRY_MS, /* repeat= */ 0);
    }
    if (u->why.err && u->state != UPSTREAM_UP)
        fall(u);
    else if (u->state != UPSTREAM_CONNECT)
        progress(u);
}

/*
 * One timer for all commands in flight: it fires for one that was the oldest once, and is wound up again for the one
 * that is the oldest now, so that issuing and answering do not touch it.
 */
static void on_deadline(uv_timer_t *deadline)
{
    struct upstream *u = deadline->data;
    uint64_t now = upstream_now();
    uint64_t since = u->state == UPSTREAM_UP ? u->ops->oldest(u) : u->started_ms;

    if (since == UPSTREAM_IDLE)
        return; /* the next upstream_sent() starts it again */
    if (now > u->due_ms + LATE_MS)
        u->forgiven_ms = now;
    u->due_ms = MAX(since, u->forgiven_ms) + u->timeout_ms;
    if (now < u->due_ms) {
        (void)uv_timer_start(deadline, on_deadline, u->due_ms - now, /* repeat= */ 0);
        return;
    }
    failure_set(&u->why, -ETIMEDOUT, "NBD export \"%.128s\" at %s: the server did not answer within %u ms",
                u->export_name, u->address.sun_path, u->timeout_ms);
    fall(u);
}

static void start_deadline(struct upstream *u)
{
    u->started_ms = upstream_now();
    u->due_ms = u->started_ms + u->timeout_ms;
    (void)uv_timer_start(&u->deadline, on_deadline, u->timeout_ms, /* repeat= */ 0);
}

static int new_handle(struct upstream *u, const struct source_nbd_config *config, const char *context)
{
    u->export_name = strdup(config->export_name);
    u->nbd = nbd_create();
    if (!u->export_name || !u->nbd)
        return -ENOMEM;
    /*
     * No block sizes: QEMU then takes any alignment and does the rest itself, where it would otherwise insist.
     * No clearing of buffers: a buffer whose read failed is never looked at.
     */
    if (nbd_set_export_name(u->nbd, config->export_name) < 0 || nbd_set_request_block_size(u->nbd, false) < 0 ||
        nbd_set_pread_initialize(u->nbd, false) < 0 || (context && nbd_add_meta_context(u->nbd, context) < 0))
        return -EINVAL;
    return 0;
}

static void init_timer(struct upstream *u, uv_timer_t *timer)
{
    (void)uv_timer_init(u->loop, timer); /* never fails */
    timer->data = u;
    u->nhandles++;
}

int upstream_start(struct upstream *u, uv_loop_t *loop, const struct upstream_ops *ops,
                   const struct source_nbd_config *config, const char *context)
{
    int r;

    if (!config->socket_path || !config->export_name || strlen(config->socket_path) >= sizeof(u->address.sun_path))
        return -EINVAL;
    *u = (struct upstream){
        .state = UPSTREAM_CONNECT,
        .ops = ops,
        .loop = loop,
        .fd = -1,
        .timeout_ms = config->timeout_ms ? config->timeout_ms : UPSTREAM_TIMEOUT_MS,
        .address = {.sun_family = AF_UNIX},
    };
    memcpy(u->address.sun_path, config->socket_path, strlen(config->socket_path));
    r = new_handle(u, config, context);
    if (r < 0) {
        nbd_close(TAKE_PTR(u->nbd));
        free(TAKE_PTR(u->export_name));
        return r;
    }
    init_timer(u, &u->deadline);
    init_timer(u, &u->kick);
    start_deadline(u);
    /*
     * At once, while the caller's path (a descriptor's, perhaps) certainly stands; what comes of it is told by the
     * loop. A quick server may bring libnbd through the whole handshake inside this call, and then no event follows.
     */
    r = try_connect(u);
    (void)uv_timer_start(&u->kick, on_kick, r == -EAGAIN ? CONNECT_RETRY_MS : 0, /* repeat= */ 0);
    return 0;
}

void upstream_sent(struct upstream *u)
{
    if (nbd_aio_is_dead(u->nbd) || nbd_aio_is_closed(u->nbd)) {
        upstream_kick(u);
        return;
    }
    update_poll(u);
    if (!uv_is_active((uv_handle_t *)&u->deadline))
        start_deadline(u);
}

void upstream_kick(struct upstream *u)
{
    (void)uv_timer_start(&u->kick, on_kick, 0, /* repeat= */ 0);
}

void upstream_close(struct upstream *u)
{
    bool down = u->state == UPSTREAM_DOWN;

    set_state(u, UPSTREAM_CLOSED);
    if (!down)
        disconnect(u);
    if (u->fd < 0)
        close_timers(u);
}
