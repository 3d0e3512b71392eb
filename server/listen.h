/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * listen: the listening sockets, those of NBD and the control socket: makes them, tells who comes, and removes what it
 * made. Who can connect to a unix socket is said by its file (struct listen_file), from the moment on at which that is
 * there, whatever the umask; who may do anything is asked by whoever takes the connection. One that a dead daemon left
 * is replaced, one that answers is not.
 *
 * Loop thread only. A listener is owned by whoever opened it until the callback of listen_close().
 */
#ifndef QPULL_LISTEN_H
#define QPULL_LISTEN_H

#include "config.h"

#include <assert.h>
#include <sys/stat.h>
#include <uv.h>

struct listener;

/* The file of a unix socket. */
struct listen_file {
    mode_t mode;
    uid_t uid; /* LISTEN_AS_IS: whoever we are when it is made */
    gid_t gid; /* likewise */
};
#define LISTEN_AS_IS ((uid_t)-1) /* as chown(2) has it */
static_assert(sizeof(uid_t) == sizeof(gid_t), "one word for both");

/* A client waits on stream: accept it. -ENOMEM: call me again later. */
typedef int (*listen_cb)(void *arg, uv_stream_t *stream);

/* ret_listener: owned by the caller. fd: one that socket activation passed (then config's type is LISTEN_FD), else -1.
 */
int listen_open(uv_loop_t *loop, const struct config_listener *config, int fd, const struct listen_file *file,
                listen_cb cb, void *arg, struct listener **ret_listener, struct failure *f);
int listen_open_unix(uv_loop_t *loop, const char *path, const struct listen_file *file, listen_cb cb, void *arg,
                     struct listener **ret_listener, struct failure *f);

/* The mode of a unix socket that we made, from now on; of others nothing happens. */
int listen_set_mode(struct listener *l, mode_t mode, struct failure *f);

/* As it can be connected to, with the real port: "unix:/run/qpull/nbd.sock", "tcp:127.0.0.1:10809". */
const char *listen_address(const struct listener *l);

/* Stops listening at once, removes the socket's file, and frees the listener later. NULL is fine. */
void listen_close(struct listener *l);

#endif
