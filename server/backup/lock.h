/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * lock: while a session stands nobody resizes its disks, puts a node between a device and our filter by the device's
 * name, or migrates the VM (docs/decisions/0014-vm-life.md). QEMU refuses the first two for a node that is the backing
 * file of another one, and the last where an image of the old qcow format is open: so each filter gets an empty one on
 * top whose backing file it is. The empty image is 1.5 KiB of memory, passed by fd. Steps of a rig's table; loop thread
 * only.
 */
#ifndef QPULL_BACKUP_LOCK_H
#define QPULL_BACKUP_LOCK_H

#include "backup/rig.h"

/* The devices stand on their copy-before-write nodes. */
int rig_lock(struct seq *s, struct failure *f);
int rig_no_locks(struct seq *s, struct failure *f);

#endif
