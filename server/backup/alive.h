/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * alive: how one process of ours tells all others on this machine that it lives and what it is at: a listening socket
 * in Linux's abstract namespace, named by a word. The kernel closes it with the process, however that ends, and no file
 * stays. Nothing is ever said over it.
 *
 * Two daemons may hold two monitors of one QEMU, where neither sees the other: what carries the id of a session that
 * lives is no leftover, and must not be swept. A word must tell nothing. Processes in another network namespace are not
 * seen. Any thread.
 */
#ifndef QPULL_BACKUP_ALIVE_H
#define QPULL_BACKUP_ALIVE_H

#include <sys/types.h>

/* ret_fd is owned by the caller: close() gives the word free. -EBUSY: another one (or we) holds it. Where there are no
 * such sockets at all it fails otherwise, and nobody needs to be told. */
int alive_hold(const char *word, int *ret_fd);

/*
 * The process that holds the word and its user, 0: none. Every user of the machine sees words and may take one that has
 * become free: who it is can be told, whether it is one of ours cannot. Where its queue is full neither is known: pid -1.
 */
pid_t alive_holder(const char *word, uid_t *ret_uid);

#endif
