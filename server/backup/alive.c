/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/alive.h"

#include "qmp/base.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define PREFIX "qpull/"
#define ALIVE_BACKLOG 16

struct alive {
    uv_poll_t poll; /* of fd; closed by alive_free(), which the object outlives until then */
    int fd;         /* owned */
};

/* Abstract names begin with a NUL and end where the length says (unix(7)). */
static socklen_t address_of(const char *word, struct sockaddr_un *address)
{
    int len;

    memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    len = snprintf(address->sun_path + 1, sizeof(address->sun_path) - 1, PREFIX "%s", word);
    if (len < 0 || (size_t)len >= sizeof(address->sun_path) - 1)
        return 0;
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)len);
}

static int open_listener(const char *word)
{
    struct sockaddr_un address;
    socklen_t len = address_of(word, &address);
    int fd, r;

    if (len == 0)
        return -ENAMETOOLONG;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (bind(fd, (struct sockaddr *)&address, len) < 0 || listen(fd, ALIVE_BACKLOG) < 0) {
        r = errno == EADDRINUSE ? -EBUSY : -errno;
        (void)close(fd);
        return r;
    }
    return fd;
}

/* One at a time: the rest of the loop has its turn in between, however many come. */
static void on_asked(uv_poll_t *poll, int status, int events)
{
    struct alive *a = container_of(poll, struct alive, poll);
    int fd = accept4(a->fd, NULL, NULL, SOCK_CLOEXEC);

    if (fd >= 0)
        (void)close(fd);
    else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
        (void)uv_poll_stop(poll); /* no descriptor is left: it would be called again and again */
}

static void on_closed(uv_handle_t *h)
{
    free(container_of((uv_poll_t *)h, struct alive, poll));
}

int alive_new(uv_loop_t *loop, const char *word, struct alive **ret_alive)
{
    struct alive *a = calloc(1, sizeof(*a));
    int r;

    if (!a)
        return -ENOMEM;
    r = a->fd = open_listener(word);
    if (r >= 0 && (r = uv_poll_init(loop, &a->poll, a->fd)) < 0)
        (void)close(a->fd);
    if (r < 0) {
        free(a);
        return r;
    }
    r = uv_poll_start(&a->poll, UV_READABLE, on_asked);
    if (r < 0) {
        alive_free(a);
        return r;
    }
    *ret_alive = a;
    return 0;
}

void alive_free(struct alive *a)
{
    if (!a)
        return;
    uv_close((uv_handle_t *)&a->poll, on_closed);
    (void)close(a->fd); /* which libuv allows from here on */
}

static bool is_believed(const struct ucred *peer, uid_t friend)
{
    return peer->uid == 0 || peer->uid == geteuid() || (friend != (uid_t)-1 && peer->uid == friend);
}

pid_t alive_holder(const char *word, uid_t friend, unsigned patience_ms)
{
    const struct timeval patience = {
        .tv_sec = patience_ms / 1000,
        .tv_usec = (suseconds_t)(patience_ms % 1000) * 1000 + 1, /* all zero would be for ever */
    };
    struct sockaddr_un address;
    socklen_t len = address_of(word, &address), size;
    struct ucred peer = {0};
    int fd = len > 0 ? socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1;
    pid_t pid = 0;

    if (fd < 0)
        return 0;
    size = sizeof(peer);
    if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)) == 0 &&
        connect(fd, (struct sockaddr *)&address, len) == 0 &&
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && is_believed(&peer, friend))
        pid = peer.pid > 0 ? peer.pid : 1; /* 0: in a namespace of processes that we do not see */
    (void)close(fd);
    return pid;
}
