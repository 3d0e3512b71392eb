/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * vhost_talk: the messages of vhost-user that a front end of a block device sends and hears to set one queue up
 * (docs/interop/vhost-user.rst of QEMU). Bytes only: whoever embeds it reads the socket and hands over what came.
 *
 * Any one thread; nothing to free.
 */
#ifndef QPULL_SOURCE_VHOST_TALK_H
#define QPULL_SOURCE_VHOST_TALK_H

#include "source/ring.h"

#include <stdbool.h>

/* What the longest reply that we ask for takes: header, and the device's configuration. */
#define VHOST_REPLY_MAX 512u

enum vhost_state {
    VHOST_ASKING,  /* features are asked for: -> SETTING */
    VHOST_SETTING, /* all is sent: -> READY */
    VHOST_READY,   /* the queue works */
};

struct vhost_talk {
    enum vhost_state state;
    unsigned heard; /* replies in this state */
    bool event_index;
    uint64_t capacity; /* bytes */
    /* private */
    size_t have;
    unsigned char input[VHOST_REPLY_MAX];
};

/* What the device has to know about us. */
struct vhost_setup {
    int memory_fd, kick_fd, call_fd; /* borrowed */
    void *memory;                    /* where memory_fd is mapped */
    size_t memory_bytes;
    const struct ring *ring; /* stands at the first byte of memory */
};

/* Sends the first questions. Negative errno of the socket. */
int vhost_talk_begin(struct vhost_talk *t, int fd);
/*
 * Takes what has come, at most `len` bytes; *ret_used of them. 0: go on; 1: the state has just changed: in SETTING the
 * caller makes the ring (event_index says how) and calls vhost_talk_set_up(). -EPROTO and a sentence.
 */
int vhost_talk_feed(struct vhost_talk *t, const void *bytes, size_t len, size_t *ret_used, struct failure *f);
int vhost_talk_set_up(struct vhost_talk *t, int fd, const struct vhost_setup *setup);

#endif
