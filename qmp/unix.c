/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/unix.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int unix_connect(const char *path, int *ret_fd)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int by = -1, fd, r = 0;

    if (strlen(path) < sizeof(addr.sun_path)) {
        memcpy(addr.sun_path, path, strlen(path) + 1);
    } else {
        /* Too long for sun_path: /proc names the socket by a descriptor that needs no right to read or write. */
        by = open(path, O_PATH | O_CLOEXEC);
        if (by < 0)
            return -errno;
        (void)snprintf(addr.sun_path, sizeof(addr.sun_path), "/proc/self/fd/%d", by);
    }
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0)
        r = -errno;
    if (by >= 0)
        (void)close(by);
    if (r < 0 && r != -EINPROGRESS) {
        if (fd >= 0)
            (void)close(fd);
        return r;
    }
    *ret_fd = fd;
    return r;
}
