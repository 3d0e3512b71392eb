/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * outbox: commands on their way to a QMP socket, in order, each with the file descriptor that belongs to it. It writes
 * to the socket it is given; it knows no answers and no loop.
 *
 * Owned by whoever embeds it (zeroed is empty); any one thread.
 */
#ifndef QPULL_QMP_OUTBOX_H
#define QPULL_QMP_OUTBOX_H

#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>

struct outbox_item;

struct outbox {
    struct outbox_item *first, *last; /* owned */
    size_t unsent;                    /* bytes */
};

/*
 * Puts {"execute": command, "arguments": args, "id": id} at the end. args is given whatever is returned (NULL: none).
 * fd is borrowed for this call (a duplicate travels), negative: none. -ENOBUFS: more than max_unsent bytes would wait;
 * -ENOMEM; or why fd cannot be duplicated.
 */
int outbox_put(struct outbox *b, const char *command, struct json_object *args, uint64_t id, int fd, size_t max_unsent);

/* Sends what a non-blocking socket takes. Returns 0, also when something is left, or what sendmsg() says. */
int outbox_flush(struct outbox *b, int sock);

/* A command nobody waits for any more need not have its effect: drops it, unless a part of it is under way. */
void outbox_drop(struct outbox *b, uint64_t id);

bool outbox_is_empty(const struct outbox *b);
void outbox_done(struct outbox *b); /* or twice */

#endif
