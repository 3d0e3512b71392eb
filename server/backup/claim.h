/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * claim: one process at a time keeps the notes of a VM in a state directory: a lock on the file STATE_DIR/locks/VM,
 * which the kernel takes away with the process, however that ends. The file stays, and says nothing by being there. It
 * is for its owner only, so nobody else learns the VM's name or can hold the lock. Waits for the disk: at start.
 */
#ifndef QPULL_BACKUP_CLAIM_H
#define QPULL_BACKUP_CLAIM_H

#include <sys/types.h>

#define CLAIM_DIR "locks"

/*
 * ret_fd is owned by the caller: close() gives it up. -EBUSY: another one (or we) has it, and *ret_holder is its
 * process, 0 if that cannot be told. All else: there can be no such lock here. state_dir may be an O_PATH descriptor.
 */
int claim_take(int state_dir, const char *vm, int *ret_fd, pid_t *ret_holder);

#endif
