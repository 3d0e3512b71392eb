/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * listen: the listening sockets, those of NBD and the control socket: makes them, tells who comes, and removes what it
 * made. A unix socket is for its owner (and root) only, unless
 * `open_to_all` is said: then whoever takes the connection looks at who it is; one that a dead daemon left is replaced,
 * one that answers is not.
 *
 * Loop thread only. A listener is owned by whoever opened it until the callback of listen_close().
 */
#ifndef QPULL_LISTEN_H
#define QPULL_LISTEN_H

#include "config.h"

#include <uv.h>

struct listener;

/* A client waits on stream: accept it. -ENOMEM: call me again later. */
typedef int (*listen_cb)(void *arg, uv_stream_t *stream);

/* ret_listener: owned by the caller. fd: one that socket activation passed (then config's type is LISTEN_FD), else -1.
 */
int listen_open(uv_loop_t *loop, const struct config_listener *config, int fd, bool open_to_all, listen_cb cb,
                void *arg, struct listener **ret_listener, struct failure *f);
int listen_open_unix(uv_loop_t *loop, const char *path, bool open_to_all, listen_cb cb, void *arg,
                     struct listener **ret_listener, struct failure *f);

/* As it can be connected to, with the real port: "unix:/run/qpull/nbd.sock", "tcp:127.0.0.1:10809". */
const char *listen_address(const struct listener *l);

/* Stops listening at once, removes the socket's file, and frees the listener later. NULL is fine. */
void listen_close(struct listener *l);

#endif
