/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * control: the daemon's control socket. It speaks QMP's wire form (greeting, "execute", "return", "error", "event"), so
 * that qmp/client and any QMP shell are its clients; root and the daemon's own user may use it, and others as
 * server/access says. The commands themselves are in control_commands.c.
 *
 * Who may not use it, for whom there is no place, or who does not say "qmp_capabilities" in time, hears an "error" in
 * place of the greeting, or after it, and the socket is closed.
 *
 * "doctor" ("vm": one, else all) answers with a list of checks, the daemon's own first: {"vm", "disk": null or a name,
 * "check": "daemon" | "scratch" | "state" | "qmp" | "engine" | "last session" | "disks" | "checkpoints" | "leftovers" |
 * "nbd server" | "self-test" | "iothreads" | "answers", "verdict": "ok" | "note" | "wrong", "text": what is found,
 * "advice": what to do, or null}. It takes DOCTOR_TIMEOUT_MS (server/config.h) at most.
 *
 * "session-begin" ("vm", "checkpoint", "disk": one or several, "keep", "ticket": bool, "ttl": seconds, "rate": bytes a
 * second) answers {"session", "vm", "checkpoint", "begin-timeout": seconds or null, "disks": [{"disk", "size", "uris":
 * […]}]} when the session is up; "session-end" ("session", "checkpoint": "commit" | "rollback", or left out) {"id",
 * "vm", "checkpoint", "kept", "dropped": disks, "problems": text or null} when all is undone
 * (docs/decisions/0022-begin-and-tickets.md).
 *
 * Events, to every client that has negotiated; "data" has the VM as "vm", and
 *   CHECKPOINT_CREATED  "name", "disks"                     on these disks: at once, or when a pull has ended well
 *   CHECKPOINT_DELETED  "name", "disks"                     from these disks
 *   CHECKPOINT_BROKEN   "name", "disk", "reason", "text"    a look has found that it cannot be used any more
 *   SESSION_UP          "session", "checkpoint", "setup-ms"
 *   SESSION_LOST        "session", "disk", "reason", "text", "step"   it is given up, or its set-up failed; "disk":
 * whose frozen view is lost, or null; "reason": as in SESSION_DOWN; SESSION_DOWN follows SESSION_DOWN        "session",
 * "reason", "checkpoint", "kept", "dropped", "problems"   all is undone, but for the problems (text or null); on which
 * disks the checkpoint was kept; "reason": done, client (left too early), setup, broken, scratch, timeout, qemu,
 * shutdown, other JOB_STATUS_CHANGE   "id", "type", "disk", "status"      a commit: "running", "aborting", "concluded"
 * ("error": why)
 *
 * Loop thread only. Owned by the server until control_close().
 */
#ifndef QPULL_CONTROL_H
#define QPULL_CONTROL_H

#include "server.h"

#include <json-c/json.h>
#include <sys/types.h>

struct control;

int control_open(struct server *server, const char *path, struct control **ret_control, struct failure *f);

/* Of its socket, from now on. */
int control_set_mode(struct control *c, mode_t mode, struct failure *f);

/* The rules are new ones: whom they name no more is turned away. */
void control_check_access(struct control *c);

/* Tells all clients; data is given. A client that takes nothing is closed later: nobody is called back from here. */
void control_event(struct control *c, const char *event, struct json_object *data);

/* Removes the socket, lets the clients go and frees the control; cb comes later, as the last touch. */
void control_close(struct control *c, void (*cb)(void *arg), void *arg);

#endif
