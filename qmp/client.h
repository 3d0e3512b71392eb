/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * client: one asynchronous QMP connection on a libuv loop: greeting, capabilities, calls by id with deadlines, several
 * in flight, event watches, file descriptors by SCM_RIGHTS, and a new connection when QEMU comes back.
 * It is not a policy: what to call is the caller's. It does not log.
 *
 * Loop thread only. Time rules: a function that takes a callback returns negative and never calls it, or returns 0 and
 * calls it exactly once, later, from the loop.
 */
#ifndef QPULL_QMP_CLIENT_H
#define QPULL_QMP_CLIENT_H

#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>
#include <uv.h>

struct qmp_client;
struct qmp_call;
struct qmp_watch;

struct qmp_client_ops {
    /* The connection is in command mode; greeting (the "QMP" object) is borrowed until the callback returns. */
    void (*on_ready)(void *arg, struct json_object *greeting);
    /*
     * The connection, or an attempt to make one, is lost; every call in flight was answered before. The client tries
     * again by itself. why->err: -ENOENT/-ECONNREFUSED (nobody listens), -ETIMEDOUT (no greeting within the deadline:
     * another client holds this socket, the sentence says so), -EAGAIN (so many others wait for it that its queue is
     * full), -ECONNRESET, -EPROTO (no JSON, or capabilities refused), -EMSGSIZE (see max_document), …
     */
    void (*on_lost)(void *arg, const struct failure *why);
};

struct qmp_client_limits {
    unsigned greeting_timeout_ms; /* 0: 5000; from the connection to command mode */
    unsigned reconnect_min_ms;    /* 0: 100; doubles with each attempt that fails, up to … */
    unsigned reconnect_max_ms;    /* 0: 2000 */
    size_t max_document;          /* bytes, 0: QMP_STREAM_MAX_DOCUMENT */
    size_t max_unsent;            /* bytes of commands that QEMU has not read yet, 0: 16 MiB; more is -ENOBUFS */
};

/*
 * ret_client is owned by the caller until qmp_client_close(). Does nothing yet. path is copied; it speaks of a unix
 * socket and may be longer than sun_path. ops is borrowed for the client's life, limits (may be NULL) for this call.
 */
int qmp_client_new(uv_loop_t *loop, const char *path, const struct qmp_client_ops *ops, void *arg,
                   const struct qmp_client_limits *limits, struct qmp_client **ret_client);

/* Connects, and connects again whenever the connection is lost, until closed. -EALREADY: it was opened before. */
int qmp_client_open(struct qmp_client *c);

/*
 * Answers all calls with -ECANCELED, ends everything and frees the client, all of it later, from the loop; cb (may be
 * NULL) is the last touch. No on_ready or on_lost comes after this call, and watches hear nothing more. Once only, from
 * within any callback. Accepts a client that was never opened.
 */
typedef void (*qmp_close_cb)(void *arg);
void qmp_client_close(struct qmp_client *c, qmp_close_cb cb, void *arg);

bool qmp_client_is_ready(const struct qmp_client *c);
const char *qmp_client_path(const struct qmp_client *c);
/* Calls that were started and events that came, ever: where it has not changed, QEMU was told nothing by us meanwhile,
 * and has told of nothing. */
uint64_t qmp_client_nhappenings(const struct qmp_client *c);
/*
 * Peer's pid by SO_PEERCRED, or 0 when not connected. It is the process that called listen(): QEMU, unless somebody
 * else made the socket and handed it over (libvirt does).
 */
pid_t qmp_client_peer_pid(const struct qmp_client *c);

/*
 * One call. ret is the "return" value (NULL for a null), borrowed until the callback returns, NULL on failure; f is
 * NULL on success. f->err: -EREMOTEIO (QEMU answered with an error; f->text is QEMU's "desc" as it is), -ENOSYS
 * (CommandNotFound), -ENODEV (class DeviceNotFound), -ETIMEDOUT, -ECONNRESET (connection lost: the command may have had
 * its effect), -ECANCELED. The struct may be reused or freed from within the callback.
 */
typedef void (*qmp_call_cb)(struct qmp_call *call, struct json_object *ret, const struct failure *f);

#define QMP_COMMAND_SHOWN 48

struct qmp_call {
    qmp_call_cb cb;
    void *arg; /* the caller's */
    /* private */
    struct qmp_client *client;
    struct qmp_call *next, *prev;
    uint64_t id;
    uint64_t deadline_ms; /* in loop time */
    unsigned timeout_ms;
    bool cancelled;
    char command[QMP_COMMAND_SHOWN]; /* for sentences, cut */
};

#define QMP_NO_FD (-1)
#define QMP_DEFAULT_TIMEOUT_MS 30000

/*
 * Starts a call; *call is overwritten, and must not be under way. timeout_ms 0: QMP_DEFAULT_TIMEOUT_MS. args is given
 * to the client whatever is returned (NULL: none). fd is borrowed for this call (a duplicate travels), QMP_NO_FD for
 * none: it goes along with the first byte of this command and no other. Returns -ENOTCONN when the connection is not
 * ready, -ENOBUFS, -ENOMEM, or why fd cannot be duplicated. Calls are sent in the order in which they were started.
 */
int qmp_call_start(struct qmp_client *c, struct qmp_call *call, const char *command, struct json_object *args, int fd,
                   unsigned timeout_ms, qmp_call_cb cb, void *arg);

/*
 * The answer, later, is -ECANCELED; a reply that still comes is dropped. A command of which nothing was sent never is.
 * Nothing if the call is not under way (answered, or zeroed).
 */
void qmp_call_cancel(struct qmp_call *call);

/*
 * Hears every event of one name (NULL: of all names) until removed. data (may be NULL) and event are borrowed until the
 * callback returns. A watch may be removed, itself included, from within any callback; a removed watch hears nothing
 * more, one added during an event hears the next. Survives reconnects. Watches hear in the order they were added.
 */
typedef void (*qmp_watch_cb)(struct qmp_watch *watch, const char *event, struct json_object *data);

struct qmp_watch {
    qmp_watch_cb cb;
    void *arg;
    /* private */
    struct qmp_client *client;
    struct qmp_watch *next, *prev;
    uint64_t since;    /* the number of events when it was added */
    const char *event; /* borrowed while the watch is on */
};

/* *w is overwritten, and must not be on. */
void qmp_watch_add(struct qmp_client *c, struct qmp_watch *w, const char *event, qmp_watch_cb cb, void *arg);
void qmp_watch_remove(struct qmp_watch *w); /* also if never added (zeroed), twice, or after the client's end */

#endif
