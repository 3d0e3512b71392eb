/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * child: how a program is started that does not outlive us. A parent-death signal must be asked for by the child
 * itself, after the fork and before the program; libuv has no hook there. So the child is our own program once more,
 * with these words in front; it asks for the signal, looks whether we are still alive, and becomes the other program.
 *
 * The signal comes when the thread dies that forked: the loop's, which is main()'s.
 */
#ifndef QPULL_CHILD_H
#define QPULL_CHILD_H

#include <stdbool.h>
#include <stddef.h>

#define CHILD_WORD "--become" /* as the first argument of our own program; then our PID, the program, its arguments */
#define CHILD_SELF "/proc/self/exe"

/* Whether this process is such a child: then main() returns child_main() before it does anything else. */
bool child_is_one(int argc, char *const *argv);
/* Becomes the program; comes back, with an exit status, only when it cannot. */
int child_main(int argc, char *const *argv);

#endif
