/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "images_look.h"

#include "backup/commit.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* -- formats ------------------------------------------------------------------------------------------------------- */

/* How files of a format begin (QEMU, block/<format>.c, the probe functions). */
static const struct magic {
    const char *magic;
    size_t len;
    const char *format; /* NULL: not served */
    const char *name;
    const char *ending; /* of a file that is believed to be one that names other files; NULL: none of these can */
} magics[] = {
    {"QFI\xfb\0\0\0\1", 8, NULL, "qcow version 1", NULL},
    {"QFI\xfb", 4, "qcow2", "qcow2", ".qcow2"},
    {"QED\0", 4, "qed", "QED", ".qed"},
    {"vhdxfile", 8, "vhdx", "VHDX", NULL},
    {"KDMV", 4, "vmdk", "VMDK", ".vmdk"},
    {"# Disk DescriptorFile", 21, "vmdk", "VMDK", ".vmdk"},
    {"COWD", 4, "vmdk", "VMDK", ".vmdk"},
    {"conectix", 8, "vpc", "VHD", NULL},
    {"<<< ", 4, "vdi", "VDI", NULL},
    {"LUKS\xba\xbe", 6, NULL, "LUKS", NULL},
    {"WithoutFreeSpace", 16, NULL, "Parallels", NULL},
    {"WithouFreSpacExt", 16, NULL, "Parallels", NULL},
};
static const struct magic raw = {.format = "raw", .name = "raw"};

/* docs/interop/qcow2.txt */
#define QCOW2_BACKING 8   /* offset of backing_file_offset, 8 bytes */
#define QCOW2_VERSION 4   /* offset, 4 bytes, big-endian */
#define QCOW2_FEATURES 72 /* offset of incompatible_features, 8 bytes, big-endian; version 3 only */
#define QCOW2_DATA_FILE 4 /* bit 2 */
#define HEAD_SIZE 512

/* Of qcow2 the head tells. VMDK and QED say it in more ways than are worth knowing here. */
static bool may_refer_to_others(const struct magic *m, const unsigned char head[HEAD_SIZE])
{
    static const unsigned char zero[8];

    if (!m->ending || strcmp(m->format, "qcow2") != 0)
        return m->ending;
    return memcmp(head + QCOW2_BACKING, zero, sizeof zero) != 0 ||
           (head[QCOW2_VERSION + 3] >= 3 && (head[QCOW2_FEATURES + 7] & QCOW2_DATA_FILE));
}

static bool is_called(const char *path, const char *ending)
{
    size_t len = strlen(path), elen = strlen(ending);

    return len > elen && strcmp(path + len - elen, ending) == 0;
}

/*
 * A guest can write anything into a raw disk of its own, also the head of an image whose backing file, or whose data,
 * is some file of this host. So an image that was not said to be of such a format, neither by a word nor by its file's
 * name, is not allowed to name other files.
 */
static int believe(const struct config_image *image, const unsigned char head[HEAD_SIZE], const char **ret_format,
                   struct failure *f)
{
    const struct magic *m = &raw;

    for (size_t i = 0; i < ARRAY_SIZE(magics) && m == &raw; i++)
        if (memcmp(head, magics[i].magic, magics[i].len) == 0)
            m = &magics[i];
    if (!m->format)
        return failure_set(f, -EINVAL,
                           "image '%s' of disk '%s' looks like %s, which is not served; if it is a raw disk all the "
                           "same, say raw:%s",
                           image->path, image->disk, m->name, image->path);
    if (m == &raw && is_called(image->path, ".qcow2"))
        return failure_set(f, -EINVAL,
                           "image '%s' of disk '%s' is not in qcow2 format, as its name says; if it is a raw disk, say "
                           "raw:%s",
                           image->path, image->disk, image->path);
    if (m != &raw && is_called(image->path, ".raw"))
        return failure_set(f, -EINVAL,
                           "image '%s' of disk '%s' looks like %s, not raw as its name says; say %s:%s or raw:%s",
                           image->path, image->disk, m->name, m->format, image->path, image->path);
    if (may_refer_to_others(m, head) && !is_called(image->path, m->ending))
        return failure_set(f, -EINVAL,
                           "image '%s' of disk '%s' looks like %s over another file; the guest of a raw disk could "
                           "have written that, so say %s:%s or raw:%s",
                           image->path, image->disk, m->name, m->format, image->path, image->path);
    *ret_format = m->format;
    return 0;
}

/* A commit of ours that was killed in its first moments has left an empty image beside this one. */
static void clear_up(const char *path)
{
    _cleanup_free_ char *real = realpath(path, NULL), *left = NULL;
    struct stat st;

    if (!real || asprintf(&left, "%s" COMMIT_NEW_ENDING, real) < 0)
        left = NULL;
    if (left && lstat(left, &st) == 0 && S_ISREG(st.st_mode))
        (void)unlink(left);
}

int images_look(const struct config_image *image, struct image_kind *ret_kind, struct failure *f)
{
    unsigned char head[HEAD_SIZE] = {0};
    const char *format = image->format;
    struct stat st;
    int fd, r = 0;

    /* O_NONBLOCK: a FIFO by that name does not hold a thread for ever */
    fd = open(image->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) < 0) {
        r = failure_set(f, -errno, "cannot open image '%s' of disk '%s': %s", image->path, image->disk,
                        strerror(errno));
    } else if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
        r = failure_set(f, -EINVAL, "image '%s' of disk '%s' is neither a file nor a block device", image->path,
                        image->disk);
    } else if (!format) {
        if (pread(fd, head, sizeof head, 0) < 0)
            r = failure_set(f, -errno, "cannot read image '%s' of disk '%s': %s", image->path, image->disk,
                            strerror(errno));
        else
            r = believe(image, head, &format, f);
    }
    if (r == 0)
        clear_up(image->path);
    if (r == 0)
        *ret_kind = (struct image_kind){.format = format, .protocol = S_ISBLK(st.st_mode) ? "host_device" : "file"};
    if (fd >= 0)
        (void)close(fd);
    return r;
}

/* -- programs ------------------------------------------------------------------------------------------------------ */

static bool can_run(const char *path)
{
    struct stat st;

    return stat(path, &st) == 0 && S_ISREG(st.st_mode) && access(path, X_OK) == 0;
}

int images_find_program(const char *name, char **ret_path, struct failure *f)
{
    const char *path = getenv("PATH");

    if (strchr(name, '/')) {
        if (!can_run(name))
            return failure_set(f, -ENOENT, "there is no program '%s'", name);
        *ret_path = strdup(name);
        return *ret_path ? 0 : failure_set(f, -ENOMEM, "out of memory");
    }
    for (const char *s = path && *path ? path : "/usr/bin:/bin"; s; s = strchr(s, ':') ? strchr(s, ':') + 1 : NULL) {
        _cleanup_free_ char *candidate = NULL;
        int len = (int)strcspn(s, ":");

        if (asprintf(&candidate, "%.*s/%s", len, s, name) < 0)
            return failure_set(f, -ENOMEM, "out of memory");
        if (len > 0 && can_run(candidate)) {
            *ret_path = TAKE_PTR(candidate);
            return 0;
        }
    }
    return failure_set(f, -ENOENT, "the program '%s' is not in PATH", name);
}

/* -- who holds a file ---------------------------------------------------------------------------------------------- */

static bool has_open(int proc, const char *pid, const struct stat *wanted)
{
    char path[64];
    struct dirent *entry;
    struct stat st;
    bool found = false;
    DIR *dir;
    int fd;

    (void)snprintf(path, sizeof path, "%.20s/fd", pid);
    fd = openat(proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir) { /* gone, or not ours to look at */
        if (fd >= 0)
            (void)close(fd);
        return false;
    }
    while (!found && (entry = readdir(dir)))
        found = fstatat(dirfd(dir), entry->d_name, &st, 0) == 0 && st.st_dev == wanted->st_dev &&
                st.st_ino == wanted->st_ino;
    (void)closedir(dir);
    return found;
}

static void tell(int proc, const char *pid, char *text, size_t size)
{
    char path[64], name[64] = "";
    ssize_t len;
    int fd;

    (void)snprintf(path, sizeof path, "%.20s/comm", pid);
    fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
    len = fd < 0 ? 0 : read(fd, name, sizeof name - 1);
    if (fd >= 0)
        (void)close(fd);
    name[MAX(len, 0)] = 0;
    name[strcspn(name, "\n")] = 0;
    (void)snprintf(text, size, "%s (PID %.20s)", *name ? name : "a process", pid);
}

bool images_find_holder(const char *path, const pid_t * not, size_t nnot, char *text, size_t size)
{
    struct dirent *entry;
    struct stat st;
    bool found = false;
    DIR *proc;

    if (stat(path, &st) < 0 || !(proc = opendir("/proc")))
        return false;
    while (!found && (entry = readdir(proc))) {
        bool skip = !isdigit((unsigned char)entry->d_name[0]);

        for (size_t i = 0; i < nnot; i++)
            skip |= strtol(entry->d_name, NULL, 10) == not [i];
        if (skip || !has_open(dirfd(proc), entry->d_name, &st))
            continue;
        found = true;
        tell(dirfd(proc), entry->d_name, text, size);
    }
    (void)closedir(proc);
    return found;
}
