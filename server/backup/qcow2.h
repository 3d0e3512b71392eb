/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * qcow2: what the head of a qcow2 image says, read by ourselves, where QEMU's word is not enough. Whoever can write to
 * the image can have it say anything. Waits for the disk: worker threads.
 */
#ifndef QPULL_BACKUP_QCOW2_H
#define QPULL_BACKUP_QCOW2_H

#define QCOW2_NAME_MAX 1023 /* bytes of a backing file's name; docs/interop/qcow2.txt */

/* The backing file's name as it stands there, "" if it has none. -EBADMSG: this is no qcow2 image, or a damaged one. */
int qcow2_read_backing(int fd, char out[QCOW2_NAME_MAX + 1]);

#endif
