/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * lock: while a session stands nobody resizes its disks, or puts a node between a device and our filter, by the
 * device's name (docs/decisions/0014-vm-life.md). QEMU refuses both for a node that is the backing file of another one,
 * so each filter gets an empty qcow2 node on top whose backing file it is. The empty image is a few hundred bytes of
 * memory, passed by fd. Steps of a rig's table; loop thread only.
 */
#ifndef QPULL_BACKUP_LOCK_H
#define QPULL_BACKUP_LOCK_H

#include "backup/rig.h"

/* The devices stand on their copy-before-write nodes. */
int rig_lock(struct seq *s, struct failure *f);
int rig_no_locks(struct seq *s, struct failure *f);

#endif
