/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/qcow2.h"

#include "qmp/base.h"

#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define VERSION_FIRST 2 /* the format before it has the same magic, and other fields */
#define VERSION_LAST 3

struct head {
    unsigned char magic[4];
    uint32_t version_be;
    uint64_t backing_offset_be;
    uint32_t backing_len_be; /* bytes */
} __attribute__((packed));

int qcow2_read_backing(int fd, char out[QCOW2_NAME_MAX + 1])
{
    struct head head;
    uint64_t offset;
    uint32_t len, version;
    ssize_t n = pread(fd, &head, sizeof(head), 0);

    if (n < 0)
        return -errno;
    if ((size_t)n < sizeof(head) || memcmp(head.magic, "QFI\xfb", sizeof(head.magic)) != 0)
        return -EBADMSG;
    version = be32toh(head.version_be);
    offset = be64toh(head.backing_offset_be);
    len = offset ? be32toh(head.backing_len_be) : 0;
    if (version < VERSION_FIRST || version > VERSION_LAST || len > QCOW2_NAME_MAX || offset > INT64_MAX)
        return -EBADMSG;
    n = len ? pread(fd, out, len, (off_t)offset) : 0;
    if (n < 0)
        return -errno;
    if ((uint32_t)n < len || memchr(out, '\0', len))
        return -EBADMSG;
    out[len] = '\0';
    return 0;
}
