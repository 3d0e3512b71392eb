/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/fake_qemu.h"

#include "lib/test.h"
#include "qmp/stream.h"

#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* What QEMU's unix sockets have: a second client waits in the queue. */
#define BACKLOG 1
#define MAX_FDS_PER_MESSAGE 8

static const char greeting[] = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, "
                               "\"package\": \"fake\"}, \"capabilities\": [\"oob\"]}}\r\n";

/* One client; freed in its close callback. */
struct peer {
    struct fake_qemu *q;
    uv_poll_t poll;
    int fd;
    bool negotiated;
    struct qmp_stream stream;
    char *out; /* owned */
    size_t out_len;
    unsigned nfds;      /* since the last command */
    bool fd_came_first; /* likewise */
};

/* The listening socket; freed in its close callback. */
struct door {
    struct fake_qemu *q;
    uv_poll_t poll;
    int fd;
};

struct fake_qemu {
    uv_loop_t *loop;
    struct fake_qemu_options options;
    fake_command_cb cb;
    void *arg;
    char dir[64];
    char *path;        /* owned */
    struct door *door; /* owned, NULL: stopped */
    struct peer *peer; /* owned, NULL: no client */
    int msgfd;         /* owned, -1: none */
    unsigned nhandles, nclients, ncommands, nfds;
    bool freed;
};

static void fake_release(struct fake_qemu *q)
{
    if (q->nhandles > 0 || !q->freed)
        return;
    if (q->msgfd >= 0)
        close(q->msgfd);
    free(q->path);
    free(q);
}

/* ---- one client ---- */

static void on_peer_closed(uv_handle_t *handle)
{
    struct peer *p = container_of((uv_poll_t *)handle, struct peer, poll);
    struct fake_qemu *q = p->q;

    qmp_stream_done(&p->stream);
    free(p->out);
    free(p);
    q->nhandles--;
    fake_release(q);
}

static void peer_drop(struct peer *p)
{
    p->q->peer = NULL;
    uv_close((uv_handle_t *)&p->poll, on_peer_closed);
    close(p->fd);
}

static void on_peer(uv_poll_t *handle, int status, int events);
static void door_poll(struct fake_qemu *q);

static void peer_poll(struct peer *p)
{
    int events = UV_DISCONNECT | (p->q->options.deaf ? 0 : UV_READABLE) | (p->out_len > 0 ? UV_WRITABLE : 0);

    assert_int_equal(uv_poll_start(&p->poll, events, on_peer), 0);
}

static void peer_send(struct peer *p, const char *bytes, size_t len)
{
    char *out = realloc(p->out, p->out_len + len + 1);

    assert_non_null(out);
    memcpy(out + p->out_len, bytes, len);
    p->out = out;
    p->out_len += len;
    peer_poll(p);
}

static void peer_send_object(struct peer *p, struct json_object *o)
{
    size_t len;
    const char *text = json_object_to_json_string_length(o, JSON_C_TO_STRING_SPACED, &len);

    assert_non_null(text);
    peer_send(p, text, len);
    peer_send(p, "\r\n", 2);
    json_object_put(o);
}

/* Returns whether the client is still there. */
static bool peer_flush(struct peer *p)
{
    size_t len = p->q->options.write_size ? MIN(p->out_len, p->q->options.write_size) : p->out_len;
    ssize_t n = len ? send(p->fd, p->out, len, MSG_NOSIGNAL | MSG_DONTWAIT) : 0;

    if (n < 0 && errno != EAGAIN && errno != EINTR) {
        peer_drop(p);
        return false;
    }
    if (n > 0) {
        memmove(p->out, p->out + n, p->out_len - (size_t)n);
        p->out_len -= (size_t)n;
    }
    peer_poll(p);
    return true;
}

static void peer_hear_capabilities(struct peer *p, struct json_object *id)
{
    struct fake_qemu *q = p->q;

    if (q->options.refuse_capabilities) {
        fake_qemu_error(q, id, "GenericError", "not today");
        return;
    }
    p->negotiated = true;
    fake_qemu_return(q, id, NULL);
}

static int on_document(void *arg, struct json_object *doc)
{
    struct peer *p = arg;
    struct fake_qemu *q = p->q;
    struct fake_command command = {.nfds = p->nfds, .fd_came_first = p->fd_came_first};
    struct json_object *name;

    p->nfds = 0;
    p->fd_came_first = false;
    (void)json_object_object_get_ex(doc, "id", &command.id);
    (void)json_object_object_get_ex(doc, "arguments", &command.args);
    if (!json_object_object_get_ex(doc, "execute", &name)) {
        fake_qemu_error(q, command.id, "GenericError", "QMP input lacks member 'execute'");
        return 0;
    }
    command.name = json_object_get_string(name);
    if (!p->negotiated && strcmp(command.name, "qmp_capabilities") == 0) {
        peer_hear_capabilities(p, command.id);
    } else if (!p->negotiated || strcmp(command.name, "qmp_capabilities") == 0) {
        fake_qemu_error(q, command.id, "CommandNotFound", "not in this mode");
    } else {
        q->ncommands++;
        if (q->cb)
            q->cb(q, &command, q->arg);
        else
            fake_qemu_return(q, command.id, NULL);
    }
    return q->peer == p ? 0 : -ECANCELED;
}

static void peer_keep_fds(struct peer *p, struct msghdr *msg, char first_byte)
{
    struct fake_qemu *q = p->q;

    for (struct cmsghdr *m = CMSG_FIRSTHDR(msg); m; m = CMSG_NXTHDR(msg, m)) {
        size_t n = (m->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (m->cmsg_level != SOL_SOCKET || m->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < n; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(m) + i * sizeof(int), sizeof(int));
            if (q->msgfd >= 0)
                close(q->msgfd);
            q->msgfd = fd;
            q->nfds++;
            if (p->nfds++ == 0)
                p->fd_came_first = p->stream.used == 0 && first_byte == '{';
        }
    }
}

/* Reads one piece. Returns whether the client is still there and there may be more. */
static bool peer_read(struct peer *p)
{
    struct fake_qemu *q = p->q;
    char bytes[FAKE_QEMU_READ_SIZE];
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(MAX_FDS_PER_MESSAGE * sizeof(int))];
    struct iovec iov = {.iov_base = bytes, .iov_len = sizeof(bytes)};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    struct failure f = {0};
    ssize_t n;

    if (q->options.read_size)
        iov.iov_len = MIN(q->options.read_size, sizeof(bytes));
    n = recvmsg(p->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n <= 0) {
        peer_drop(p);
        return false;
    }
    peer_keep_fds(p, &msg, bytes[0]);
    if (qmp_stream_feed(&p->stream, bytes, (size_t)n, on_document, p, &f) < 0) {
        if (q->peer == p)
            fail_msg("the fake QEMU heard nonsense: %s", f.text);
        return false;
    }
    return q->peer == p && !q->options.deaf;
}

static void on_peer(uv_poll_t *handle, int status, int events)
{
    struct peer *p = container_of(handle, struct peer, poll);
    struct fake_qemu *q = p->q;

    if ((events & UV_READABLE) && !q->options.deaf)
        while (peer_read(p))
            ;
    if (q->peer == p && (events & UV_DISCONNECT) && q->options.deaf)
        peer_drop(p);
    if (q->peer == p)
        (void)peer_flush(p);
    if (!q->peer)
        door_poll(q);
}

/* ---- listening ---- */

static void on_door(uv_poll_t *handle, int status, int events)
{
    struct door *d = container_of(handle, struct door, poll);
    struct fake_qemu *q = d->q;
    int fd = accept4(d->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct peer *p;

    if (fd < 0)
        return; /* it went away again */
    p = calloc(1, sizeof(*p));
    assert_non_null(p);
    p->q = q;
    p->fd = fd;
    qmp_stream_init(&p->stream, /* max_document= */ 0);
    assert_int_equal(uv_poll_init(q->loop, &p->poll, fd), 0);
    q->nhandles++;
    q->nclients++;
    q->peer = p;
    peer_poll(p);
    if (!q->options.mute)
        peer_send(p, greeting, sizeof(greeting) - 1);
    door_poll(q);
}

/* One client at a time. */
static void door_poll(struct fake_qemu *q)
{
    if (!q->door)
        return;
    if (q->peer)
        assert_int_equal(uv_poll_stop(&q->door->poll), 0);
    else
        assert_int_equal(uv_poll_start(&q->door->poll, UV_READABLE, on_door), 0);
}

static void on_door_closed(uv_handle_t *handle)
{
    struct door *d = container_of((uv_poll_t *)handle, struct door, poll);
    struct fake_qemu *q = d->q;

    free(d);
    q->nhandles--;
    fake_release(q);
}

void fake_qemu_start(struct fake_qemu *q)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    struct door *d = calloc(1, sizeof(*d));

    assert_non_null(d);
    assert_null(q->door);
    d->q = q;
    d->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    assert_true(d->fd >= 0);
    /* The name may be too long for an address: bind a short one, and rename. */
    assert_true((size_t)snprintf(addr.sun_path, sizeof(addr.sun_path), "%s/new", q->dir) < sizeof(addr.sun_path));
    assert_int_equal(bind(d->fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
    assert_int_equal(listen(d->fd, BACKLOG), 0);
    assert_int_equal(rename(addr.sun_path, q->path), 0);
    assert_int_equal(uv_poll_init(q->loop, &d->poll, d->fd), 0);
    q->nhandles++;
    q->door = d;
    door_poll(q);
}

void fake_qemu_stop(struct fake_qemu *q)
{
    struct door *d = TAKE_PTR(q->door);

    fake_qemu_hangup(q);
    if (!d)
        return;
    (void)unlink(q->path);
    uv_close((uv_handle_t *)&d->poll, on_door_closed);
    close(d->fd);
}

struct fake_qemu *fake_qemu_new(uv_loop_t *loop, const struct fake_qemu_options *options, fake_command_cb cb, void *arg)
{
    struct fake_qemu *q = calloc(1, sizeof(*q));

    assert_non_null(q);
    if (options)
        q->options = *options;
    q->loop = loop;
    q->cb = cb;
    q->arg = arg;
    q->msgfd = -1;
    (void)snprintf(q->dir, sizeof(q->dir), "/tmp/qpull-fake.XXXXXX");
    assert_non_null(mkdtemp(q->dir));
    assert_true(asprintf(&q->path, "%s/%s", q->dir, q->options.name ? q->options.name : "qmp.sock") > 0);
    q->options.name = NULL;
    fake_qemu_start(q);
    return q;
}

void fake_qemu_free(struct fake_qemu *q)
{
    if (!q)
        return;
    fake_qemu_stop(q);
    (void)rmdir(q->dir);
    q->freed = true;
    fake_release(q);
}

void fake_qemu_hangup(struct fake_qemu *q)
{
    if (!q->peer)
        return;
    if (q->peer->out_len > 0) /* what was said before is said; what the socket does not take is lost */
        (void)send(q->peer->fd, q->peer->out, q->peer->out_len, MSG_NOSIGNAL | MSG_DONTWAIT);
    peer_drop(q->peer);
    door_poll(q);
}

/* ---- what it says ---- */

static struct json_object *reply_to(struct json_object *id)
{
    struct json_object *o = json_object_new_object();

    assert_non_null(o);
    if (id)
        json_object_object_add(o, "id", json_object_get(id));
    return o;
}

void fake_qemu_return(struct fake_qemu *q, struct json_object *id, struct json_object *result)
{
    struct json_object *o;

    if (!q->peer) {
        json_object_put(result);
        return;
    }
    o = reply_to(id);
    json_object_object_add(o, "return", result ? result : json_object_new_object());
    peer_send_object(q->peer, o);
}

void fake_qemu_error(struct fake_qemu *q, struct json_object *id, const char *class, const char *desc)
{
    struct json_object *o, *error;

    if (!q->peer)
        return;
    o = reply_to(id);
    error = json_object_new_object();
    json_object_object_add(error, "class", json_object_new_string(class));
    json_object_object_add(error, "desc", json_object_new_string(desc));
    json_object_object_add(o, "error", error);
    peer_send_object(q->peer, o);
}

void fake_qemu_event(struct fake_qemu *q, const char *name, struct json_object *data)
{
    struct json_object *o;

    if (!fake_qemu_has_client(q)) {
        json_object_put(data);
        return;
    }
    o = json_object_new_object();
    json_object_object_add(o, "event", json_object_new_string(name));
    if (data)
        json_object_object_add(o, "data", data);
    peer_send_object(q->peer, o);
}

void fake_qemu_send(struct fake_qemu *q, const char *bytes, size_t len)
{
    if (q->peer)
        peer_send(q->peer, bytes, len);
}

/* ---- what it is asked ---- */

int fake_qemu_take_fd(struct fake_qemu *q)
{
    int fd = q->msgfd;

    q->msgfd = -1;
    return fd;
}

void fake_qemu_listen_to(struct fake_qemu *q, bool listen)
{
    q->options.deaf = !listen;
    if (q->peer)
        peer_poll(q->peer);
}

void fake_qemu_set_mute(struct fake_qemu *q, bool mute)
{
    q->options.mute = mute;
}

const char *fake_qemu_path(const struct fake_qemu *q)
{
    return q->path;
}

bool fake_qemu_has_client(const struct fake_qemu *q)
{
    return q->peer && q->peer->negotiated;
}

unsigned fake_qemu_nclients(const struct fake_qemu *q)
{
    return q->nclients;
}

unsigned fake_qemu_ncommands(const struct fake_qemu *q)
{
    return q->ncommands;
}

unsigned fake_qemu_nfds(const struct fake_qemu *q)
{
    return q->nfds;
}
