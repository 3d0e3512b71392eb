/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/lock.h"

#include "qmp/commands.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

/*
 * The old qcow format does not only have backing files: whoever has a node of it open cannot be migrated, and it cannot
 * be opened during a migration. Where QEMU lacks it, or was told to forbid nothing (-only-migratable), qcow2 must do.
 */
static const char *const formats[] = {"qcow", "qcow2"};
#define MAGIC 0x514649fbu /* "QFI\xfb" */

/* QEMU: block/qcow.c and docs/interop/qcow2.txt. The smallest clusters there are, no byte of data. */
#define CLUSTER_BITS 9
#define CLUSTER (1u << CLUSTER_BITS)

struct qcow_header {
    uint32_t magic_be, version_be;
    uint64_t backing_file_offset_be;
    uint32_t backing_file_size_be, mtime_be;
    uint64_t size_be;
    uint8_t cluster_bits, l2_bits;
    uint16_t padding;
    uint32_t crypt_method_be;
    uint64_t l1_table_offset_be;
};

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
    union {
        struct qcow_header qcow;
        struct qcow2_header qcow2;
        char cluster[CLUSTER];
    } header;
    char refcount_table[CLUSTER]; /* all zeros, as is all that would be in it: it is never written to */
    char l1_table[CLUSTER];
};

static void fill_qcow(struct qcow_header *h)
{
    h->magic_be = htobe32(MAGIC);
    h->version_be = htobe32(1);
    h->size_be = htobe64(CLUSTER); /* less than two bytes are refused */
    h->cluster_bits = CLUSTER_BITS;
    h->l2_bits = CLUSTER_BITS - 3; /* a cluster of 8-byte entries, the least */
    h->l1_table_offset_be = htobe64(offsetof(struct empty_image, l1_table));
}

static void fill_qcow2(struct qcow2_header *h)
{
    h->magic_be = htobe32(MAGIC);
    h->version_be = htobe32(2);
    h->cluster_bits_be = htobe32(CLUSTER_BITS);
    h->l1_table_offset_be = htobe64(offsetof(struct empty_image, l1_table));
    h->refcount_table_offset_be = htobe64(offsetof(struct empty_image, refcount_table));
    h->refcount_table_clusters_be = htobe32(1);
}

/* A descriptor that can do no more than read it, as the node that QEMU makes of it; negative errno. */
static int open_empty_image(unsigned format)
{
    struct empty_image image = {0};
    char path[64];
    int fd = memfd_create("qpull-lock", MFD_CLOEXEC), readable, err;

    if (fd < 0)
        return -errno;
    if (format == 0)
        fill_qcow(&image.header.qcow);
    else
        fill_qcow2(&image.header.qcow2);
    (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    readable = write(fd, &image, sizeof(image)) == (ssize_t)sizeof(image) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    err = errno;
    (void)close(fd);
    return readable < 0 ? -err : readable;
}

static int lock(struct rig *r, struct failure *f);

static void on_locked(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};
    bool migrates = f && strstr(f->text, "in progress");

    if (f && f->err == -EREMOTEIO && !migrates && ++r->lock_format < ARRAY_SIZE(formats)) {
        if (lock(r, &next) < 0)
            seq_done(&r->seq, &next);
        return;
    }
    if (migrates)
        (void)failure_set(&next, -EBUSY,
                          "the VM is being migrated away, and its disks will be written to by another QEMU; back it up "
                          "where it goes (%s)",
                          f->text);
    seq_done(&r->seq, migrates ? &next : f);
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
    char name[NAMES_SIZE], cbw[NAMES_SIZE];

    if (f) {
        seq_done(&r->seq, f);
        return;
    }
    for (unsigned i = 0; i < r->ndisks; i++)
        calls_add(c, "blockdev-add",
                  qmp_args_blockdev_add_empty(names_make(name, r->id, NAMES_LOCK, i), formats[r->lock_format],
                                              r->lock_fdset, names_make(cbw, r->id, NAMES_CBW, i)),
                  QMP_NO_FD, i, NULL);
    if (calls_wait(c, on_locked, &next) < 0)
        seq_done(&r->seq, &next);
}

static int lock(struct rig *r, struct failure *f)
{
    char name[NAMES_SIZE];
    int fd = open_empty_image(r->lock_format);

    if (fd < 0)
        return failure_set(f, fd, "cannot make an empty image in memory: %s", strerror(-fd));
    calls_add(&r->calls, "add-fd", qmp_args_add_fd(names_make(name, r->id, NAMES_LOCK, 0)), fd, 0, on_fd_added);
    (void)close(fd);
    return calls_wait(&r->calls, on_passed, f);
}

int rig_lock(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);

    r->lock_format = 0;
    return lock(r, f);
}

int rig_no_locks(struct seq *s, struct failure *f)
{
    static const enum names_kind kinds[] = {NAMES_LOCK};

    return rig_no_nodes(s, kinds, ARRAY_SIZE(kinds), f);
}
