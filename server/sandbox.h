/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * sandbox: what this process can ask of the kernel from now on, and the programs that it starts: a list of system calls
 * (seccomp), and where the kernel has it, files that it may write and programs that it may start, and no TCP of its own
 * making (landlock). docs/decisions/0023-least-privilege.md has what is on the lists, and why.
 *
 * Once, before there is a second thread: threads to come have it, others would not. There is no way back.
 */
#ifndef QPULL_SANDBOX_H
#define QPULL_SANDBOX_H

#include "qmp/base.h"

#include <stdbool.h>

/* AUTO: what this kernel has; REQUIRE: all that is for this configuration, or nothing begins. */
enum sandbox_mode { SANDBOX_OFF, SANDBOX_AUTO, SANDBOX_REQUIRE };

#define SANDBOX_TEXT_MAX 256u /* bytes */

struct sandbox_config {
    enum sandbox_mode mode;
    const char *const *dirs; /* borrowed: where files are made and written */
    size_t ndirs;
    bool starts_itself; /* as a watchdog */
    bool opens_images; /* by qemu-storage-daemon, which inherits this; which files their layers are nobody knows here */
};

/*
 * Before a loop is made: it gets no io_uring. libuv 1.49 and later take one for epoll whatever the environment says,
 * and end the process when sandbox_enter() has taken its calls away; and with it files and sockets could be had that no
 * filter sees. Where it cannot be done, sandbox_enter() cannot limit system calls either, and says so.
 */
void sandbox_prepare(enum sandbox_mode mode);
/* Negative only where it was required, or the kernel took one half of it. text: what there is now, for the log. */
int sandbox_enter(const struct sandbox_config *config, char text[SANDBOX_TEXT_MAX], struct failure *f);

#endif
