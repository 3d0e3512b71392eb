/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * hold: a QEMU whose guest shuts down waits until the session has ended (docs/decisions/0014-vm-life.md). For as long
 * as the session stands QEMU's action on "shutdown" is "pause"; afterwards it is "poweroff" again, and a QEMU whose
 * guest has shut down meanwhile is told to quit. Other ways to end it ('quit', signals) are not held.
 *
 * QEMU cannot be asked for its actions, so a node of ours is the mark that this one was changed: made before the
 * change, gone after it was taken back. Who finds the mark of a dead daemon undoes the same (backup/sweep). Steps of a
 * rig's table; loop thread only.
 */
#ifndef QPULL_BACKUP_HOLD_H
#define QPULL_BACKUP_HOLD_H

#include "backup/rig.h"

/*
 * What a QEMU's command line (words ended by NUL) says about the actions that we would change. -ENOTSUP and a sentence:
 * it must not be held, for we could not put back what was there.
 */
int hold_from_command_line(const char *words, size_t length, enum hold *ret_hold, struct failure *f);

/* Step functions for a rig whose hold_wanted is set, else they do nothing. A QEMU that cannot be held is no failure:
 * why is in hold_refused then. */
int rig_hold(struct seq *s, struct failure *f);
int rig_no_hold(struct seq *s, struct failure *f); /* whatever mark rig.hold says */

#endif
