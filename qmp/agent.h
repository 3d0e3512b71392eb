/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * agent: an asynchronous client of a guest agent (QEMU's, "qga"), over the unix socket of its channel. One call at a
 * time. It is not a policy: what to call, and how often, is the caller's. It does not log. The guest is not trusted:
 * agent_reader says what it may cost us.
 *
 * What to know of such a channel: it takes one client at a time, and a second one connects and then hears nothing; it
 * also lets in whoever comes while no agent runs in the guest, and that looks the same. Agents answer late, after our
 * deadline, perhaps to the next client. Hence the sync before each call (agent_reader), which does the work of an "id":
 * older agents, and guests keep them for years, refuse commands that have one, or do not say it back.
 *
 * Loop thread only. Owned by the caller until agent_close().
 */
#ifndef QPULL_QMP_AGENT_H
#define QPULL_QMP_AGENT_H

#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>
#include <uv.h>

struct agent;

/*
 * Does nothing yet. path is copied. fd, given if this succeeds: a connection to it that is there already; -1: it is
 * made by the first call, and again by the next call after it was lost. -ENAMETOOLONG: the path does not fit an
 * address.
 */
int agent_new(uv_loop_t *loop, const char *path, int fd, struct agent **ret_agent);

/*
 * ret is the "return" value (NULL for a null), borrowed until the callback returns, NULL on failure; f is NULL on
 * success. f->err: -ENOENT, -ECONNREFUSED (nobody listens: no QEMU), -EAGAIN (so many wait for it that its queue is
 * full), -ETIMEDOUT, -ECONNRESET, -ENOSYS (the agent has no such command, or may not do it), -EREMOTEIO (it
 * refused; its words are in the sentence, made fit to print), -EPROTO, -EMSGSIZE. After a deadline the command may
 * still have its effect. The next call may be made from within.
 */
typedef void (*agent_cb)(void *arg, struct json_object *ret, const struct failure *f);

enum agent_order {
    AGENT_AFTER_SYNC, /* the command is sent only to an agent that has just answered: one that starts later, or wakes
                         up, does not find it */
    AGENT_AT_ONCE,    /* sent whether anybody listens or not, and done as soon as an agent reads it, even without us */
};

/* command: a literal without arguments, NULL: the sync only. timeout_ms: for all of it. -EBUSY: one is under way. */
int agent_call(struct agent *a, const char *command, enum agent_order order, unsigned timeout_ms, agent_cb cb,
               void *arg);
/* The callback does not come any more; the command may have its effect. Also if none is under way. */
void agent_forget(struct agent *a);

int agent_fd(const struct agent *a); /* borrowed; -1: not connected */
void agent_hang_up(struct agent *a); /* the connection ends, if there is one; no call may be under way */

/* Forgets and frees, later, from the loop; cb (may be NULL) is the last touch. Once only, from within any callback. */
void agent_close(struct agent *a, void (*cb)(void *arg), void *arg);

#endif
