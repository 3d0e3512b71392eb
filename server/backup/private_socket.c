/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/private_socket.h"

#include "backup/state_file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define ABANDONED_S 60 /* by then it has its name, or nobody will give it one */

int private_socket_listen(int dir, const char *name, int backlog)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    _cleanup_fd_ int fd = -1;
    char temp[STATE_TEMP_SIZE];
    int r;

    if (snprintf(sa.sun_path, sizeof(sa.sun_path), "/proc/self/fd/%d/%s", dir, name) >= (int)sizeof(sa.sun_path))
        return -ENAMETOOLONG;
    state_temp_name(temp);
    (void)snprintf(sa.sun_path, sizeof(sa.sun_path), "/proc/self/fd/%d/%s", dir, temp);
    (void)unlinkat(dir, name, 0);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* fchmod() before bind() sets the mode that the file is born with. */
    if (fd < 0 || fchmod(fd, 0600) < 0 || bind(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0)
        return -errno;
    if (listen(fd, backlog) < 0 || renameat(dir, temp, dir, name) < 0) {
        r = -errno;
        (void)unlinkat(dir, temp, 0);
        return r;
    }
    return TAKE_FD(fd);
}

void private_socket_tidy(int dir)
{
    int fd = state_open_dir(dir, ".");
    DIR *all = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;
    struct stat st;

    if (!all && fd >= 0)
        (void)close(fd);
    while (all && (entry = readdir(all)))
        if (state_is_temp(entry->d_name) && fstatat(dir, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            S_ISSOCK(st.st_mode) && time(NULL) - st.st_ctime > ABANDONED_S)
            (void)unlinkat(dir, entry->d_name, 0);
    if (all)
        (void)closedir(all);
}
