/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * slow_sync: for LD_PRELOAD into QEMU: storage that takes $QPULL_SYNC_RATE MB a second. Writes go to the page cache at
 * its own speed, and a flush takes as long as writing back what the process has written since the last one would.
 */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_ullong unwritten; /* bytes */

static ssize_t count(ssize_t n)
{
    if (n > 0)
        atomic_fetch_add(&unwritten, (unsigned long long)n);
    return n;
}

/* Through the vector calls, which nothing replaces. */
ssize_t pwrite64(int fd, const void *buf, size_t len, off_t at)
{
    struct iovec iov = {(void *)buf, len};

    return count(pwritev2(fd, &iov, 1, at, 0));
}

ssize_t pwrite(int fd, const void *buf, size_t len, off_t at)
{
    return pwrite64(fd, buf, len, at);
}

ssize_t pwritev64(int fd, const struct iovec *iov, int n, off_t at)
{
    return count(pwritev2(fd, iov, n, at, 0));
}

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t at)
{
    return pwritev64(fd, iov, n, at);
}

int fdatasync(int fd)
{
    const char *rate = getenv("QPULL_SYNC_RATE");
    unsigned long long bytes = atomic_exchange(&unwritten, 0), us = rate && *rate ? bytes / strtoull(rate, NULL, 10) : 0;
    struct timespec t = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};

    while (nanosleep(&t, &t) < 0)
        ;
    return 0;
}
