/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * quiesce: one VM's guest agent and what is frozen through it: file systems are frozen before the cut and thawed right
 * after it, and are never left frozen. It thaws by itself when the cut does not come in time; a watchdog process
 * (backup/watchdog) thaws when we are dead or cannot. What it does not know: sessions, QEMU, marks (quiesce_steps).
 *
 *   IDLE -> PREPARING -> READY -> FREEZING -> FROZEN -> THAWING -> IDLE
 *                                                          +-----> RESCUING -> IDLE     nobody answers: by the
 * watchdog, IDLE --------------------------------------------------------> RESCUING             or a mark of a dead
 * daemon's
 *
 * Loop thread only. Owned by the VM until quiesce_close(). One user at a time: a session, or the sweep.
 */
#ifndef QPULL_BACKUP_QUIESCE_H
#define QPULL_BACKUP_QUIESCE_H

#include "qmp/base.h"

#include <stdbool.h>
#include <uv.h>

#define QUIESCE_SYNC_MS 5000u     /* for an agent to say that it is there: one that runs does so in ms */
#define QUIESCE_READY_MS 10000u   /* for our watchdog to start, on a machine under load */
#define QUIESCE_FREEZE_MS 7500u   /* for the freeze's answer: the guest stores what it has not stored yet */
#define QUIESCE_FROZEN_MS 8000u   /* from the freeze to the thaw: Windows thaws by itself after 10 s */
#define QUIESCE_THAW_MS 5000u     /* for the thaw's answer, but … */
#define QUIESCE_THAW_MIN_MS 2000u /* … not past QUIESCE_FROZEN_MS and this */
#define QUIESCE_DOG_MS 11000u     /* then the watchdog steps in by itself; we have handed over to it before */
#define QUIESCE_RESCUE_MS                                                                                         \
    120000u                   /* for all tries to thaw: of the watchdog, and of ours after a dead daemon's freeze \
                               */
#define QUIESCE_WAIT_MS 5000u /* a sweep waits so long for that */

enum quiesce_mode { QUIESCE_OFF, QUIESCE_TRY, QUIESCE_REQUIRE };
const char *quiesce_mode_name(enum quiesce_mode mode);

struct quiesce;

struct quiesce_config {
    uv_loop_t *loop;
    const char *vm;   /* its name, for sentences; copied as the rest */
    const char *path; /* the agent's socket; NULL: none is named */
    enum quiesce_mode mode;
    const char *program; /* the watchdog's: WATCHDOG_SELF, but for tests */
    /* A rescue has ended that nobody waits for any more; f NULL: nothing is frozen. */
    void (*on_rescued)(void *arg, const struct failure *f);
    void *arg;
};

int quiesce_new(const struct quiesce_config *config, struct quiesce **ret_quiesce);
/* No callback comes any more; what is frozen is left to the watchdog. NULL is fine. */
void quiesce_close(struct quiesce *q);
enum quiesce_mode quiesce_mode(const struct quiesce *q);

typedef void (*quiesce_cb)(void *arg, const struct failure *f);

/* An agent answers, nobody else has frozen its guest, and the watchdog watches. */
int quiesce_prepare(struct quiesce *q, quiesce_cb cb, void *arg, struct failure *f);
/* After a good quiesce_prepare(). After a failure file systems may be frozen all the same: quiesce_thaw(). */
int quiesce_freeze(struct quiesce *q, quiesce_cb cb, void *arg, struct failure *f);
/*
 * Ends what quiesce_freeze() began, at any time; after_cut: the cut is made, and this is its thaw. 1: there is nothing
 * to wait for. A failure: file systems may be frozen still, and the watchdog goes on; quiesce_is_thawed() tells.
 */
int quiesce_thaw(struct quiesce *q, bool after_cut, quiesce_cb cb, void *arg);
/* The session fails or ends: what is frozen is thawed at once, whoever waits for what. */
void quiesce_thaw_now(struct quiesce *q, const char *why);
bool quiesce_is_thawed(const struct quiesce *q);
/* A session has no more use for it. */
void quiesce_release(struct quiesce *q);

/* Of the last session: NULL: the cut was made while all was frozen. Else why it was not. */
const struct failure *quiesce_why_not(const struct quiesce *q);
unsigned
quiesce_ms(const struct quiesce *q); /* from the freeze to the thaw's answer: the guest stood still no longer */

/* A dead daemon's mark was found. -ENOTCONN: not thawed yet, or nobody to ask; the tries go on. */
int quiesce_rescue(struct quiesce *q, quiesce_cb cb, void *arg, struct failure *f);

#endif
