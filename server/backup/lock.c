/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/lock.h"

#include "qmp/commands.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

/* QEMU: docs/interop/qcow2.txt. Version 2, the smallest clusters there are, no byte of data. */
#define CLUSTER_BITS 9
#define CLUSTER (1u << CLUSTER_BITS)

struct qcow2_header {
    uint32_t magic_be, version_be;
    uint64_t backing_file_offset_be;
    uint32_t backing_file_size_be, cluster_bits_be;
    uint64_t size_be;
    uint32_t crypt_method_be, l1_size_be;
    uint64_t l1_table_offset_be, refcount_table_offset_be;
    uint32_t refcount_table_clusters_be, nb_snapshots_be;
    uint64_t snapshots_offset_be;
};

struct empty_image {
    struct qcow2_header header;
    char rest[CLUSTER - sizeof(struct qcow2_header)];
    char refcount_table[CLUSTER]; /* all zeros, as is all that would be in it: it is never written to */
    char l1_table[CLUSTER];
};

/* A descriptor that can do no more than read it, as the node that QEMU makes of it; negative errno. */
static int open_empty_image(void)
{
    const struct empty_image image = {
        .header = {.magic_be = htobe32(0x514649fb), /* "QFI\xfb" */
                   .version_be = htobe32(2),
                   .cluster_bits_be = htobe32(CLUSTER_BITS),
                   .l1_table_offset_be = htobe64(offsetof(struct empty_image, l1_table)),
                   .refcount_table_offset_be = htobe64(offsetof(struct empty_image, refcount_table)),
                   .refcount_table_clusters_be = htobe32(1)}};
    char path[64];
    int fd = memfd_create("qpull-lock", MFD_CLOEXEC), readable, err;

    if (fd < 0)
        return -errno;
    (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    readable = write(fd, &image, sizeof(image)) == (ssize_t)sizeof(image) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    err = errno;
    (void)close(fd);
    return readable < 0 ? -err : readable;
}

static int on_fd_added(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    rig_of_calls(c)->lock_fdset = qmp_get_int(ret, "fdset-id");
    return 0;
}

static void on_passed(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};
    char lock[NAMES_SIZE], cbw[NAMES_SIZE];
    int result;

    if (f) {
        seq_done(&r->seq, f);
        return;
    }
    for (unsigned i = 0; i < r->ndisks; i++)
        calls_add(c, "blockdev-add",
                  qmp_args_blockdev_add_empty(names_make(lock, r->id, NAMES_LOCK, i), r->lock_fdset,
                                              names_make(cbw, r->id, NAMES_CBW, i)),
                  QMP_NO_FD, i, NULL);
    result = rig_wait(r, &next);
    if (result != 0)
        seq_done(&r->seq, &next);
}

int rig_lock(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);
    char name[NAMES_SIZE];
    int fd = open_empty_image();

    if (fd < 0)
        return failure_set(f, fd, "cannot make an empty image in memory: %s", strerror(-fd));
    calls_add(&r->calls, "add-fd", qmp_args_add_fd(names_make(name, r->id, NAMES_LOCK, 0)), fd, 0, on_fd_added);
    (void)close(fd);
    return calls_wait(&r->calls, on_passed, f);
}

int rig_no_locks(struct seq *s, struct failure *f)
{
    static const enum names_kind kinds[] = {NAMES_LOCK};

    return rig_no_nodes(s, kinds, ARRAY_SIZE(kinds), f);
}
