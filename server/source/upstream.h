/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * upstream: one connection to QEMU's NBD server: a libnbd handle, its socket on the loop, and a deadline for the
 * handshake and for every reply. source/nbd, source/nbd_map and source/nbd_poke share it; it does not know what they
 * ask.
 *
 * Embedded in its owner. Loop thread only. No op is called from inside one of the functions here, and none but `closed`
 * after upstream_close(), so an op may close the upstream and anything else that lives on the loop.
 */
#ifndef QPULL_SOURCE_UPSTREAM_H
#define QPULL_SOURCE_UPSTREAM_H

#include "source/nbd.h"

#include <libnbd.h>
#include <netinet/in.h>
#include <sys/un.h>

struct upstream;

struct upstream_ops {
    /* Once: the handshake is over, commands may be issued through u->nbd. */
    void (*up)(struct upstream *u);
    /* Completion callbacks may have come. Those run inside libnbd and must not call it: they note, this acts. */
    void (*moved)(struct upstream *u);
    /* Once: no connection, or none any more. libnbd is gone already and completion callbacks come no more. */
    void (*down)(struct upstream *u, const struct failure *why);
    /* After upstream_close(), when the server has closed its end, too, or takes longer than is good: the last touch. */
    void (*closed)(struct upstream *u);
    /* upstream_now() when the oldest command without its reply was issued; UPSTREAM_IDLE if all are answered. */
    uint64_t (*oldest)(const struct upstream *u);
};

#define UPSTREAM_IDLE UINT64_MAX

/* The state only moves down this list. */
enum upstream_state {
    UPSTREAM_CONNECT,   /* no socket yet; the kick timer tries, or tells that it cannot be: -> HANDSHAKE, DOWN */
    UPSTREAM_HANDSHAKE, /* libnbd negotiates: -> UP, DOWN */
    UPSTREAM_UP,        /* commands may be issued: -> DOWN */
    UPSTREAM_DOWN,   /* ops->down was called; the libnbd handle is gone, the socket's farewell is under way or over */
    UPSTREAM_CLOSED, /* upstream_close() was called, from any state; ops->closed comes when all handles are closed */
};

struct upstream {
    enum upstream_state state;
    const struct upstream_ops *ops; /* borrowed for life */
    struct nbd_handle *nbd;         /* owned; NULL once down or closed */
    uv_loop_t *loop;
    /*
     * A duplicate of libnbd's socket, owned: libnbd closes its own as soon as it sees the connection die, and a closed
     * number that the loop still polls could meanwhile belong to somebody else. It outlives libnbd's for the farewell.
     */
    int fd;
    uv_poll_t poll; /* of fd: exists as long as fd >= 0 */
    int events;     /* what poll waits for, 0: it is stopped */
    uv_timer_t deadline;
    /* All of upstream_now(). */
    uint64_t started_ms;  /* when deadline was last started from rest */
    uint64_t due_ms;      /* when deadline should fire */
    uint64_t forgiven_ms; /* nothing before this counts as late, see on_deadline() */
    uv_timer_t kick;      /* what is to be told from the loop, and not from inside the call that found it out */
    unsigned nhandles;    /* libuv handles that the loop still holds */
    unsigned timeout_ms;
    struct sockaddr_un address;
    char *export_name; /* owned */
    struct failure why;
};

/* Milliseconds of the monotonic clock. Not the loop's time, which stands still while a callback works. */
static inline uint64_t upstream_now(void)
{
    return uv_hrtime() / 1000000;
}

/* context: NULL or the metadata context to ask for. Negative (-ENOMEM, -EINVAL): nothing to close. */
int upstream_start(struct upstream *u, uv_loop_t *loop, const struct upstream_ops *ops,
                   const struct source_nbd_config *config, const char *context);

/* After issuing commands through u->nbd. */
void upstream_sent(struct upstream *u);
/* Have ops->moved called soon. */
void upstream_kick(struct upstream *u);
/* Says which export of which server; the sentence is libnbd's last error if NULL. */
void upstream_failure(const struct upstream *u, struct failure *f, int err, const char *sentence);

/* The socket is closed on return. Once; ops->closed follows. */
void upstream_close(struct upstream *u);

#endif
