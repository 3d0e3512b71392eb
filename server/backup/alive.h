/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * alive: how one process of ours tells all others on this machine that it lives and what it is at: a listening socket
 * in Linux's abstract namespace, named by a word. The kernel closes it with the process, however that ends, and no file
 * stays. Nothing is ever said over it: who connects is let in and shown out, so that the queue is never full for long.
 *
 * Two daemons may hold two monitors of one QEMU, where neither sees the other: what carries the id of a session that
 * lives is no leftover, and must not be swept. Every user of the machine sees such words and may bind them, so a word
 * must tell nothing, and only some holders are believed. Processes in another network namespace are not seen.
 */
#ifndef QPULL_BACKUP_ALIVE_H
#define QPULL_BACKUP_ALIVE_H

#include <sys/types.h>
#include <uv.h>

struct alive;

/* ret_alive is owned by the caller until alive_free(). -EBUSY: another one (or we) holds the word. Where there are no
 * such sockets at all it fails otherwise, and nobody needs to be told. Loop thread only. */
int alive_new(uv_loop_t *loop, const char *word, struct alive **ret_alive);
/* The word is free when this returns; NULL is accepted. */
void alive_free(struct alive *a);

/*
 * The process that holds the word, 0: none that is believed. Those are root's, those of our own user, and of `friend`,
 * whom the caller trusts ((uid_t)-1: nobody else). Where the queue is full it waits so long for room: a living holder
 * makes some, and who does not is not believed either. Any thread.
 */
pid_t alive_holder(const char *word, uid_t friend, unsigned patience_ms);

#endif
