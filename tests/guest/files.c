/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "files.h"

#include "load.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NFILES 32
#define FILE_SIZE 24576
#define PAUSE_US 500

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t nops, nerrors, slowest_us, last_us;

static int one(uint64_t n, const char *buf)
{
    char path[64], temporary[64];
    int fd, error = 0;

    snprintf(path, sizeof(path), FILES_DIR "/%u/file", (unsigned)(n % NFILES));
    snprintf(temporary, sizeof(temporary), FILES_DIR "/%u", (unsigned)(n % NFILES));
    (void)mkdir(temporary, 0755);
    snprintf(temporary, sizeof(temporary), FILES_DIR "/new%u", (unsigned)(n % NFILES));
    if (n % 7 == 0)
        (void)unlink(path);
    fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return -errno;
    if (write(fd, buf, FILE_SIZE) != FILE_SIZE || (n % 3 == 0 && fsync(fd) < 0))
        error = errno ? -errno : -EIO;
    close(fd);
    if (!error && rename(temporary, path) < 0)
        error = -errno;
    return error;
}

static void *work(void *arg)
{
    static char buf[FILE_SIZE];

    for (uint64_t n = 0;; n++) {
        uint64_t began = now_us(), took;
        int error;

        memset(buf, (int)(n % 255) + 1, sizeof(buf));
        error = one(n, buf);
        took = now_us() - began;
        pthread_mutex_lock(&lock);
        nops++;
        nerrors += error != 0;
        last_us = now_us();
        if (took > slowest_us)
            slowest_us = took;
        pthread_mutex_unlock(&lock);
        if (error)
            error_note("files", "an operation", n, error);
        usleep(PAUSE_US);
    }
    return arg;
}

int files_start(char *answer, size_t len)
{
    pthread_t thread;
    int error = pthread_create(&thread, NULL, work, NULL);

    snprintf(answer, len, "%s", error ? strerror(error) : "");
    return -error;
}

int files_status(char *answer, size_t len)
{
    pthread_mutex_lock(&lock);
    snprintf(answer, len, "ops=%" PRIu64 " errors=%" PRIu64 " slowest-us=%" PRIu64 " idle-us=%" PRIu64, nops, nerrors,
             slowest_us, last_us ? now_us() - last_us : 0);
    slowest_us = 0;
    pthread_mutex_unlock(&lock);
    return 0;
}
