/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/alive.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PREFIX "qpull/"
/* Those who ask are never accepted, and the queue is cut to what is let in: when it is full the answer is still "yes".
 */
#define ALIVE_BACKLOG 16

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

int alive_hold(const char *word, int *ret_fd)
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
    *ret_fd = fd;
    return 0;
}

pid_t alive_holder(const char *word, uid_t *ret_uid)
{
    struct sockaddr_un address;
    socklen_t len = address_of(word, &address), size;
    struct ucred peer = {0};
    int fd = len > 0 ? socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0) : -1;
    pid_t pid = 0;

    if (fd < 0)
        return 0;
    size = sizeof(peer);
    if (connect(fd, (struct sockaddr *)&address, len) == 0)
        pid = getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.pid > 0 ? peer.pid : -1;
    else if (errno == EAGAIN) /* its queue is full: of whom, is not told */
        pid = -1;
    *ret_uid = peer.uid;
    (void)close(fd);
    return pid;
}
