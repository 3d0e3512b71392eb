/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * slow_sync: for LD_PRELOAD into QEMU and qpulld: storage that is slow to write back. Writes go to the page cache at its
 * own speed; a flush takes $QPULL_SYNC_MS, and as long as writing what all of them wrote since the last one with
 * $QPULL_SYNC_RATE megabytes a second would. $QPULL_SYNC_FILE is where they share that number.
 */
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_ullong alone, *unwritten = &alone; /* bytes */

__attribute__((constructor)) static void share(void)
{
    const char *path = getenv("QPULL_SYNC_FILE");
    int fd = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    void *shared = fd >= 0 && ftruncate(fd, sizeof(alone)) == 0
                       ? mmap(NULL, sizeof(alone), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                       : MAP_FAILED;

    if (shared != MAP_FAILED)
        unwritten = shared;
    if (fd >= 0)
        (void)close(fd);
}

static ssize_t count(ssize_t n)
{
    if (n > 0)
        atomic_fetch_add(unwritten, (unsigned long long)n);
    return n;
}

/* Through the one vector call that nothing here replaces. */
ssize_t pwrite64(int fd, const void *buf, size_t len, off_t at)
{
    struct iovec iov = {(void *)(uintptr_t)buf, len};

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

static unsigned long long number(const char *name)
{
    const char *value = getenv(name);

    return value ? strtoull(value, NULL, 10) : 0;
}

int fdatasync(int fd)
{
    unsigned long long bytes = atomic_exchange(unwritten, 0), rate = number("QPULL_SYNC_RATE"),
                       us = (rate ? bytes / rate : 0) + number("QPULL_SYNC_MS") * 1000;
    struct timespec t = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};

    while (nanosleep(&t, &t) < 0)
        ;
    return 0;
}
