/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * control: the daemon's control socket. It speaks QMP's wire form (greeting, "execute", "return", "error"), so that
 * qmp/client and any QMP shell are its clients; root and the daemon's own user may use it. The commands themselves are
 * in control_commands.c.
 *
 * Loop thread only. Owned by the server until control_close().
 */
#ifndef QPULL_CONTROL_H
#define QPULL_CONTROL_H

#include "server.h"

struct control;

int control_open(struct server *server, const char *path, struct control **ret_control, struct failure *f);

/* Removes the socket, lets the clients go and frees the control; cb comes later, as the last touch. */
void control_close(struct control *c, void (*cb)(void *arg), void *arg);

#endif
