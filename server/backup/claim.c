/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/claim.h"

#include "backup/state_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#define PID_TEXT_MAX 16

/* An OFD lock does not tell whose it is (fcntl(2): l_pid is -1), so the file does. */
static void sign(int fd)
{
    char text[PID_TEXT_MAX];
    int len = snprintf(text, sizeof(text), "%d\n", (int)getpid());

    if (ftruncate(fd, 0) < 0 || pwrite(fd, text, (size_t)len, 0) < 0)
        return; /* the lock holds all the same */
}

static pid_t read_holder(int fd)
{
    char text[PID_TEXT_MAX] = "";

    return pread(fd, text, sizeof(text) - 1, 0) > 0 ? (pid_t)MAX(strtol(text, NULL, 10), 0) : 0;
}

int claim_take(int state_dir, const char *vm, int *ret_fd, pid_t *ret_holder)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    _cleanup_fd_ int dir = -1, fd = -1;
    char file[NAME_MAX + 1];
    struct stat st;
    int r = state_make_dir(state_dir, CLAIM_DIR);

    if (r < 0)
        return r;
    dir = state_open_dir(state_dir, CLAIM_DIR);
    if (dir < 0)
        return dir;
    fd = openat(dir, state_name(vm, "", file), O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    if (fd < 0 || fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return -EINVAL;
    if (fcntl(fd, F_OFD_SETLK, &lock) < 0) {
        if (errno != EAGAIN && errno != EACCES)
            return -errno;
        *ret_holder = read_holder(fd);
        return -EBUSY;
    }
    sign(fd);
    *ret_fd = TAKE_FD(fd);
    return 0;
}
