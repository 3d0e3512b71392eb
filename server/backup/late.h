/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * late: walks at the top of a session's table (session.late), one at a time, while clients read already: maps.c reads
 * the maps of the freeze by one, asks.c one more map. Only these and late.c include this.
 */
#ifndef QPULL_BACKUP_LATE_H
#define QPULL_BACKUP_LATE_H

#include "backup/steps.h"

/* The walk under way. */
static inline struct session *session_of_late(struct seq *q)
{
    return container_of(rig_of_seq(q), struct session, late);
}

/* Starts such a walk; no other is under way. ops: late_on_top, late_on_failed, and an on_end that begins with
 * rig_done(). */
void late_start(struct session *s, const struct seq_step *steps, unsigned nsteps, const struct seq_ops *ops);
void late_on_top(struct seq *q);
/* The reason is in session.ask_failure then. */
void late_on_failed(struct seq *q, const struct failure *why);
/* QEMU does not answer: what the walk has made is undone with all else of the session. */
bool late_is_stuck(const struct session *s);

/* The bitmap of such a walk on the frozen view of that disk, and its export. */
void late_add_export(struct session *s, unsigned disk);
void late_remove_bitmap(struct session *s, unsigned disk);
/* Of calls that undo: a refusal says that it is not there, since it stands on a node of ours that nobody else knows. */
void late_on_gone(struct calls *c, const struct failure *f);
int late_no_exports(struct seq *q, struct failure *f); /* a row's undo */

/* maps.c: clients may have it: it will not change any more. Their owner may stop the session in here. */
void maps_tell_ready(struct session *s, unsigned disk, const char *context);
/* maps.c: calls dirty, too, what layers without the record have allocated. -ENOMEM */
int maps_fill_in(struct session *s, unsigned disk, const struct checkpoint *c, const char *context);
/* maps.c: whether there are maps of the freeze to read, now; if so, begins. */
bool maps_next(struct session *s);
/* asks.c: begins with the first of them, if there is one. */
void asks_next(struct session *s);

#endif
