/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * reach: what stands between us and a socket of QEMU's: the first directory on its path that we may not search, the
 * socket's own mode, or else a security module, with the words that would change it. It tries nothing and changes
 * nothing.
 *
 * Looks at the file system and at /proc: for a worker.
 */
#ifndef QPULL_REACH_H
#define QPULL_REACH_H

#include <stdbool.h>
#include <sys/types.h>

#define REACH_TEXT_MAX 1024u   /* bytes */
#define REACH_LABEL_MAX 256u   /* bytes of a process's label */
#define REACH_PROCESSES 65536u /* looked at, to find whose socket it is */

/* Why connect() to an absolute or relative path says EACCES or EPERM, and what to do. */
void reach_explain(const char *path, char text[REACH_TEXT_MAX], char advice[REACH_TEXT_MAX]);

/* How a security module calls a process, 0: us; "" if none does. SELinux's have colons in them, AppArmor's a mode. */
void reach_label(pid_t pid, char label[REACH_LABEL_MAX]);

/* "user 64055, AppArmor profile libvirt-… (enforce)" */
void reach_describe(pid_t pid, char text[REACH_TEXT_MAX]);

#endif
