/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "listen.h"
#include "backup/state_file.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

struct listener {
    union {
        uv_handle_t handle;
        uv_stream_t stream;
        uv_pipe_t pipe;
        uv_tcp_t tcp;
    } sock;
    uv_timer_t retry;
    unsigned nhandles; /* that are not closed yet */
    unsigned nturn;    /* clients taken without a look at the rest of the loop */
    listen_cb cb;
    void *arg;
    char *path; /* owned: of a socket that we made; NULL: nothing to remove */
    dev_t dev;
    ino_t ino; /* of that file, so that we remove ours only */
    char address[160];
};

static void on_closed(uv_handle_t *handle)
{
    struct listener *l = handle->data;

    if (--l->nhandles > 0)
        return;
    free(l->path);
    free(l);
}

void listen_close(struct listener *l)
{
    struct stat st;

    if (!l)
        return;
    if (l->path && lstat(l->path, &st) == 0 && st.st_dev == l->dev && st.st_ino == l->ino)
        (void)unlink(l->path); /* nothing to do about a file that cannot go */
    uv_close(&l->sock.handle, on_closed);
    uv_close((uv_handle_t *)&l->retry, on_closed);
}

const char *listen_address(const struct listener *l)
{
    return l->address;
}

static void on_connection(uv_stream_t *stream, int status);

static void on_retry(uv_timer_t *timer)
{
    struct listener *l = timer->data;

    l->nturn = 0;
    on_connection(&l->sock.stream, 0);
}

static void on_connection(uv_stream_t *stream, int status)
{
    struct listener *l = stream->data;

    if (status < 0) {
        log_warning("%s: accepting failed: %s", l->address, uv_strerror(status));
        return;
    }
    /*
     * libuv before 1.45 accepts in one go until nobody waits, which may be never. It stops where a client is not taken,
     * and goes on once it is.
     */
    if (l->nturn >= LISTEN_TURN)
        (void)uv_timer_start(&l->retry, on_retry, 0, 0);
    else if (l->nturn++, l->cb(l->arg, stream) < 0)
        (void)uv_timer_start(&l->retry, on_retry, LISTEN_RETRY_MS, 0);
}

/* -- sockets ------------------------------------------------------------------------------------------------------- */
/* Whether somebody answers at the path: 0 nobody, the file may go; -EADDRINUSE; or why that cannot be told. */
static int probe(const struct sockaddr_un *a)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int r;

    if (fd < 0)
        return -errno;
    r = connect(fd, (const struct sockaddr *)a, sizeof *a) < 0 ? -errno : -EADDRINUSE;
    close(fd);
    if (r == -ECONNREFUSED)
        return 0;
    return r == -EAGAIN ? -EADDRINUSE : r; /* EAGAIN: somebody listens, and its queue is full */
}

/* By a descriptor of the file itself, so that nobody can put another one in between. */
static int set_mode(int by, mode_t mode)
{
    char path[64];

    (void)snprintf(path, sizeof path, "/proc/self/fd/%d", by); /* fchmod() takes no O_PATH */
    return chmod(path, mode) < 0 ? -errno : 0;
}

/*
 * The file gets the mode of the socket's own inode less the umask. It begins with what its owner may, so that a wider
 * mode is never there for the wrong group; the umask, which is every thread's, is left alone.
 */
static int bind_unix(int fd, const struct sockaddr_un *a, const struct listen_file *file, struct failure *f)
{
    _cleanup_fd_ int by = -1;
    struct stat st;
    int r;

    if (fchmod(fd, file->mode & S_IRWXU) < 0 || bind(fd, (const struct sockaddr *)a, sizeof *a) < 0)
        return failure_set(f, -errno, "cannot bind %s: %s", a->sun_path, strerror(errno));
    by = open(a->sun_path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (by < 0 || fstat(by, &st) < 0)
        r = -errno; /* NOLINT(bugprone-branch-clone): one after the other */
    else if (!S_ISSOCK(st.st_mode))
        r = -EEXIST; /* somebody else may write to that directory */
    else if ((file->uid != LISTEN_AS_IS || file->gid != LISTEN_AS_IS) &&
             fchownat(by, "", file->uid, file->gid, AT_EMPTY_PATH) < 0)
        r = -errno;
    else
        r = set_mode(by, file->mode);
    if (r == 0)
        return 0;
    (void)failure_set(f, r, "cannot give %s its owner, group %d and mode 0%o: %s", a->sun_path, (int)file->gid,
                      (unsigned)file->mode, strerror(-r));
    (void)unlink(a->sun_path); /* nothing to do about a file that cannot go */
    return r;
}

static int open_unix(const char *path, const struct listen_file *file, int *ret_fd, struct failure *f)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    struct stat st;
    int fd, r;

    if (strlen(path) >= sizeof a.sun_path)
        return failure_set(f, -ENAMETOOLONG, "the socket's path %s is too long", path);
    memcpy(a.sun_path, path, strlen(path));
    if (lstat(path, &st) == 0) {
        if (!S_ISSOCK(st.st_mode))
            return failure_set(f, -EEXIST, "%s is in the way: it is not a socket", path);
        r = probe(&a);
        if (r == -EADDRINUSE)
            return failure_set(f, r, "another qpulld listens on %s", path);
        if (r < 0)
            return failure_set(f, r, "the socket %s is in the way: %s", path, strerror(-r));
        if (unlink(path) < 0 && errno != ENOENT)
            return failure_set(f, -errno, "the stale socket %s cannot be removed: %s", path, strerror(errno));
    }
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return failure_set(f, -errno, "cannot make a socket: %s", strerror(errno));
    r = bind_unix(fd, &a, file, f);
    if (r < 0) {
        close(fd);
        return r;
    }
    *ret_fd = fd;
    return 0;
}

static int open_tcp(const struct config_listener *config, int *ret_fd, struct failure *f)
{
    const struct sockaddr *a = (const struct sockaddr *)&config->address;
    socklen_t len = a->sa_family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
    int fd = socket(a->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1;

    if (fd < 0)
        return failure_set(f, -errno, "%s: cannot make a socket: %s", config->text, strerror(errno));
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0 || bind(fd, a, len) < 0) {
        int r = -errno;
        close(fd);
        return failure_set(f, r, "cannot bind %s: %s", config->text, strerror(-r));
    }
    *ret_fd = fd;
    return 0;
}

static int describe(int fd, char *to, size_t size)
{
    struct sockaddr_storage a = {0};
    socklen_t len = sizeof a;
    char text[INET6_ADDRSTRLEN] = "";

    if (getsockname(fd, (struct sockaddr *)&a, &len) < 0)
        return -errno;
    if (a.ss_family == AF_UNIX) {
        (void)snprintf(to, size, "unix:%s", ((const struct sockaddr_un *)&a)->sun_path);
    } else if (a.ss_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)&a;
        (void)inet_ntop(AF_INET, &in->sin_addr, text, sizeof text);
        (void)snprintf(to, size, "tcp:%s:%u", text, ntohs(in->sin_port));
    } else if (a.ss_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)&a;
        (void)inet_ntop(AF_INET6, &in6->sin6_addr, text, sizeof text);
        (void)snprintf(to, size, "tcp:[%s]:%u", text, ntohs(in6->sin6_port));
    } else {
        return -EAFNOSUPPORT;
    }
    return a.ss_family;
}

/* fd is given, whatever is returned; path: of the file to remove one day, or NULL. */
static int begin(uv_loop_t *loop, int fd, const char *path, listen_cb cb, void *arg, struct listener **ret_listener,
                 struct failure *f)
{
    struct listener *l = calloc(1, sizeof *l);
    struct stat st;
    int family, r;

    if (!l) {
        close(fd);
        return failure_set(f, -ENOMEM, "out of memory");
    }
    l->cb = cb;
    l->arg = arg;
    family = describe(fd, l->address, sizeof l->address);
    if (family < 0) {
        close(fd);
        free(l);
        return failure_set(f, family, "this is no socket to listen on: %s", strerror(-family));
    }
    r = family == AF_UNIX ? uv_pipe_init(loop, &l->sock.pipe, /* ipc= */ 0) : uv_tcp_init(loop, &l->sock.tcp);
    assert(r == 0); /* neither allocates nor asks the system */
    (void)uv_timer_init(loop, &l->retry);
    l->sock.handle.data = l->retry.data = l;
    l->nhandles = 2;
    r = family == AF_UNIX ? uv_pipe_open(&l->sock.pipe, fd) : uv_tcp_open(&l->sock.tcp, fd);
    if (r < 0)
        close(fd);
    if (path && lstat(path, &st) == 0) {
        l->path = strdup(path);
        l->dev = st.st_dev;
        l->ino = st.st_ino;
    }
    if (r == 0)
        r = uv_listen(&l->sock.stream, LISTEN_BACKLOG, on_connection);
    if (r < 0) {
        (void)failure_set(f, r, "cannot listen on %s: %s", l->address, uv_strerror(r));
        listen_close(l);
        return r;
    }
    *ret_listener = l;
    return 0;
}

int listen_open_unix(uv_loop_t *loop, const char *path, const struct listen_file *file, listen_cb cb, void *arg,
                     struct listener **ret_listener, struct failure *f)
{
    int fd = -1, r;

    r = open_unix(path, file, &fd, f);
    return r < 0 ? r : begin(loop, fd, path, cb, arg, ret_listener, f);
}

int listen_open(uv_loop_t *loop, const struct config_listener *config, int fd, const struct listen_file *file,
                listen_cb cb, void *arg, struct listener **ret_listener, struct failure *f)
{
    int r;

    switch (config->type) {
    case LISTEN_UNIX:
        return listen_open_unix(loop, config->path, file, cb, arg, ret_listener, f);
    case LISTEN_TCP:
        r = open_tcp(config, &fd, f);
        return r < 0 ? r : begin(loop, fd, NULL, cb, arg, ret_listener, f);
    case LISTEN_FD:
        return begin(loop, fd, NULL, cb, arg, ret_listener, f);
    }
    return failure_set(f, -EINVAL, "unknown listener");
}

int listen_set_mode(struct listener *l, mode_t mode, struct failure *f)
{
    _cleanup_fd_ int by = -1;
    struct stat st;
    int r;

    if (!l->path)
        return 0;
    by = open(l->path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (by < 0 || fstat(by, &st) < 0)
        r = -errno;
    else if (st.st_dev != l->dev || st.st_ino != l->ino)
        r = -ESTALE; /* not ours any more */
    else
        r = set_mode(by, mode);
    return r < 0 ? failure_set(f, r, "%s: cannot set its mode to 0%o: %s", l->address, (unsigned)mode, strerror(-r))
                 : 0;
}
