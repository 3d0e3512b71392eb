/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "proxy.h"

#include "die.h"
#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define SEND_BUFFER (4 << 20) /* whole answers fit, so that nothing waits for room */

struct end {
    struct proxy *proxy;
    int fd;
    uv_poll_t *poll; /* owned by the loop once closing */
    struct qmp_stream stream;
};

struct proxy {
    uv_loop_t *loop;
    const char *path, *target;
    const struct proxy_ops *ops;
    void *arg;
    struct end listener, client, qemu;
    int passing;              /* a descriptor that came with the command under way, -1: none */
    struct json_object *lose; /* owned: the id whose answer is swallowed */
    struct json_object *cut;  /* owned: the id whose answer breaks the connection */
    struct json_object *tell; /* owned: the id whose answer is told of when it is passed on */
    bool broken;              /* the connection ends when the callback under way is over */
};

/* -- sockets ------------------------------------------------------------------------------------------------------- */

static int new_socket(const char *path, bool listening)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), r;

    (void)strncat(sa.sun_path, path, sizeof(sa.sun_path) - 1);
    if (fd < 0)
        die("socket: %s", strerror(errno));
    r = listening ? bind(fd, (const struct sockaddr *)&sa, sizeof(sa))
                  : connect(fd, (const struct sockaddr *)&sa, sizeof(sa));
    if (r < 0 || (listening && listen(fd, 8) < 0)) {
        int err = errno;

        (void)close(fd);
        errno = err;
        return -1;
    }
    return fd;
}

static void on_poll_closed(uv_handle_t *h)
{
    free(h);
}

static void end_open(struct end *e, struct proxy *p, int fd, uv_poll_cb cb)
{
    int size = SEND_BUFFER;

    e->proxy = p;
    e->fd = fd;
    e->poll = calloc(1, sizeof(*e->poll));
    /* Without privilege the kernel clips it, which is enough for a few disks. */
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) < 0)
        (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    qmp_stream_init(&e->stream, 0);
    if (!e->poll || uv_poll_init(p->loop, e->poll, fd) < 0)
        die("out of memory");
    e->poll->data = e;
    (void)uv_poll_start(e->poll, UV_READABLE, cb);
}

static void end_close(struct end *e)
{
    if (!e->poll)
        return;
    uv_close((uv_handle_t *)TAKE_PTR(e->poll), on_poll_closed);
    qmp_stream_done(&e->stream);
    (void)close(e->fd);
    e->fd = -1;
}

static void on_listener(uv_poll_t *h, int status, int events);

static void hang_up(struct proxy *p)
{
    if (p->client.poll)
        (void)uv_poll_start(p->listener.poll, UV_READABLE, on_listener);
    end_close(&p->client);
    end_close(&p->qemu);
    if (p->passing >= 0)
        (void)close(p->passing);
    p->passing = -1;
    json_object_put(TAKE_PTR(p->lose));
    json_object_put(TAKE_PTR(p->cut));
    json_object_put(TAKE_PTR(p->tell));
    p->broken = false;
}

static void hang_up_if_broken(struct proxy *p)
{
    if (!p->broken)
        return;
    if (p->ops->on_cut)
        p->ops->on_cut(p->arg);
    hang_up(p);
}

static void send_document(struct end *e, struct json_object *doc, int fd)
{
    char newline[] = "\r\n";
    const char *text = json_object_to_json_string_ext(doc, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);
    struct iovec iov[2] = {{.iov_base = (void *)text, .iov_len = strlen(text)}, {.iov_base = newline, .iov_len = 2}};
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = ARRAY_SIZE(iov)};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    ssize_t n;

    if (fd >= 0) {
        m.msg_control = control.bytes;
        m.msg_controllen = sizeof(control.bytes);
        *CMSG_FIRSTHDR(&m) =
            (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &fd, sizeof(fd));
    }
    n = sendmsg(e->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EPIPE)
        return; /* that its peer is gone is heard by reading */
    if (n != (ssize_t)(iov[0].iov_len + iov[1].iov_len))
        die("the proxy cannot pass a document of %zu bytes on: %s", iov[0].iov_len, strerror(errno));
}

/* -- from the client to QEMU --------------------------------------------------------------------------------------- */

static void refuse(struct proxy *p, struct json_object *id)
{
    struct json_object *doc = json_object_new_object(), *error = json_object_new_object();

    (void)json_object_object_add(error, "class", json_object_new_string("GenericError"));
    (void)json_object_object_add(error, "desc", json_object_new_string("refused by the test"));
    (void)json_object_object_add(doc, "id", json_object_get(id));
    (void)json_object_object_add(doc, "error", error);
    send_document(&p->client, doc, -1);
    json_object_put(doc);
}

static int on_command(void *arg, struct json_object *doc)
{
    struct proxy *p = arg;
    const char *name = qmp_get_string(doc, "execute") ?: "?";
    struct json_object *id = qmp_get(doc, "id");
    enum verdict verdict = VERDICT_PASS;

    if (strcmp(name, "qmp_capabilities") != 0)
        verdict = p->ops->on_command(p->arg, name, qmp_get(doc, "arguments"));
    switch (verdict) {
    case VERDICT_PASS:
        break;
    case VERDICT_PASS_AND_TELL:
        json_object_put(p->tell);
        p->tell = json_object_get(id);
        break;
    case VERDICT_REFUSE:
        refuse(p, id);
        break;
    case VERDICT_LOSE:
        json_object_put(p->lose);
        p->lose = json_object_get(id);
        break;
    case VERDICT_CUT:
        p->broken = true;
        break;
    case VERDICT_CUT_AFTER:
        json_object_put(p->cut);
        p->cut = json_object_get(id);
        break;
    case VERDICT_DROP:
        break;
    }
    if (verdict != VERDICT_REFUSE && verdict != VERDICT_DROP && verdict != VERDICT_CUT)
        send_document(&p->qemu, doc, p->passing);
    if (p->passing >= 0)
        (void)close(p->passing);
    p->passing = -1;
    return p->broken;
}

/* A descriptor belongs to the command with whose first byte it came: read as QEMU does, byte by byte, it cannot be
 * mistaken. */
static ssize_t receive_byte(struct proxy *p, char *byte)
{
    struct iovec iov = {.iov_base = byte, .iov_len = 1};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr m = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t n = recvmsg(p->client.fd, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);

    if (n > 0 && CMSG_FIRSTHDR(&m) && CMSG_FIRSTHDR(&m)->cmsg_type == SCM_RIGHTS) {
        if (p->passing >= 0)
            (void)close(p->passing);
        memcpy(&p->passing, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(p->passing));
    }
    return n;
}

static void on_client(uv_poll_t *h, int status, int events)
{
    struct proxy *p = ((struct end *)h->data)->proxy;
    struct failure f = {0};
    ssize_t n;
    char byte;

    while (!p->broken && (n = receive_byte(p, &byte)) != 0) {
        if (n < 0 && (errno == EAGAIN || errno == EINTR) && status == 0)
            return;
        if (n < 0)
            break;
        if (qmp_stream_feed(&p->client.stream, &byte, 1, on_command, p, &f) < 0)
            die("the client sends rubbish: %s", f.text);
    }
    if (p->broken)
        hang_up_if_broken(p);
    else
        hang_up(p);
}

/* -- from QEMU to the client --------------------------------------------------------------------------------------- */

static bool is_id(struct json_object *id, struct json_object *wanted)
{
    return id && wanted && json_object_equal(id, wanted);
}

static int on_answer(void *arg, struct json_object *doc)
{
    struct proxy *p = arg;
    struct json_object *id = qmp_get(doc, "id");

    if (is_id(id, p->lose)) {
        json_object_put(TAKE_PTR(p->lose));
        return 0;
    }
    if (is_id(id, p->cut)) {
        p->broken = true;
        return 1;
    }
    send_document(&p->client, doc, -1);
    if (is_id(id, p->tell)) {
        json_object_put(TAKE_PTR(p->tell));
        if (p->ops->on_passed)
            p->ops->on_passed(p->arg);
    }
    return 0;
}

/* What has come so far. False: nothing more will. */
static bool read_qemu(struct proxy *p)
{
    struct failure f = {0};
    char bytes[65536];
    ssize_t n = recv(p->qemu.fd, bytes, sizeof(bytes), MSG_DONTWAIT);

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    if (n <= 0)
        return false;
    if (qmp_stream_feed(&p->qemu.stream, bytes, (size_t)n, on_answer, p, &f) < 0)
        die("QEMU sends rubbish: %s", f.text);
    hang_up_if_broken(p);
    return p->qemu.poll;
}

static void on_qemu(uv_poll_t *h, int status, int events)
{
    struct proxy *p = ((struct end *)h->data)->proxy;
    bool more = read_qemu(p);

    /* libuv polls a socket with an error no more: QEMU has died, and what it has said until then is still to be read.
     */
    while (status < 0 && more)
        more = read_qemu(p);
    if (!more && p->qemu.poll)
        hang_up(p);
}

/* -- life ---------------------------------------------------------------------------------------------------------- */

static void on_listener(uv_poll_t *h, int status, int events)
{
    struct proxy *p = ((struct end *)h->data)->proxy;
    int fd, qemu;

    fd = accept4(p->listener.fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    qemu = new_socket(p->target, false);
    if (qemu < 0) {
        (void)close(fd); /* QEMU is gone: the test finds out by itself */
        return;
    }
    (void)uv_poll_stop(p->listener.poll); /* the next one waits, as with QEMU */
    end_open(&p->client, p, fd, on_client);
    end_open(&p->qemu, p, qemu, on_qemu);
}

struct proxy *proxy_new(uv_loop_t *loop, const char *path, const char *target, const struct proxy_ops *ops, void *arg)
{
    struct proxy *p = calloc(1, sizeof(*p));
    int fd = new_socket(path, true);

    if (!p || fd < 0)
        die("cannot listen at '%s': %s", path, strerror(errno));
    p->loop = loop;
    p->path = path;
    p->target = target;
    p->ops = ops;
    p->arg = arg;
    p->passing = -1;
    end_open(&p->listener, p, fd, on_listener);
    return p;
}

void proxy_free(struct proxy *p)
{
    hang_up(p);
    end_close(&p->listener);
    (void)unlink(p->path);
    free(p);
}

bool proxy_has_client(const struct proxy *p)
{
    return p->client.poll;
}
