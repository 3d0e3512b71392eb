/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * private_socket: a listening unix socket in a directory of ours, for one peer that gets it by descriptor or finds it
 * there. Waits for the disk: worker threads, or where that may be.
 */
#ifndef QPULL_BACKUP_PRIVATE_SOCKET_H
#define QPULL_BACKUP_PRIVATE_SOCKET_H

/*
 * A socket that does not block, as file `name` in dir (O_PATH is enough), born with mode 0600; one of that name goes.
 * Its descriptor is the caller's; negative errno. -ENAMETOOLONG: nobody could connect to "/proc/self/fd/DIR/NAME".
 *
 * /proc/net/unix shows every user the address that a socket was bound to, for as long as anybody has it or a connection
 * of it. That is one without meaning, so `name` may speak of a VM.
 */
int private_socket_listen(int dir, const char *name, int backlog);

/* Removes from dir the sockets of those that were killed while they made one: such are without a name for moments only.
 */
void private_socket_tidy(int dir);

#endif
