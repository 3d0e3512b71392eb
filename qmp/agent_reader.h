/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * agent_reader: what a guest agent says, as bytes, to the one answer that is waited for. The guest is not trusted:
 * whatever it says, memory and what is read for one answer have limits. No I/O.
 *
 * On a virtio-serial channel nothing tells where one client's talk ends and the next one's begins. So each question has
 * a guest-sync-delimited with a number of its own before it: the agent answers that with a byte that no JSON has, 0xff,
 * and the number. All that comes before, late answers to others and torn ones included, is skipped.
 *
 * Owned by whoever embeds it; any one thread.
 */
#ifndef QPULL_QMP_AGENT_READER_H
#define QPULL_QMP_AGENT_READER_H

#include "qmp/stream.h"

#include <stdbool.h>

#define AGENT_DELIMITER ((char)0xff) /* QEMU: qga/main.c, QGA_SENTINEL_BYTE */
#define AGENT_MAX_DOCUMENT (64u << 10)
#define AGENT_MAX_BYTES (1u << 20) /* read for one answer, stale ones before it included */

enum agent_reader_state {
    AGENT_IDLE,    /* whatever comes is skipped. begin */
    AGENT_SKIPS,   /* until the next delimiter */
    AGENT_SYNCING, /* after a delimiter: the sync's answer, or that of somebody else's */
    AGENT_SYNCED,  /* the next document is the answer; then IDLE */
};

/* The sync's answer is there (doc NULL), or the answer itself: {"return": …} or {"error": …}, borrowed. */
typedef void (*agent_reader_cb)(void *arg, struct json_object *doc);

struct agent_reader {
    struct qmp_stream stream;
    enum agent_reader_state state;
    int64_t sync_id;
    size_t nbytes; /* since begin */
    agent_reader_cb cb;
    void *arg;
};

void agent_reader_init(struct agent_reader *r, agent_reader_cb cb, void *arg);
void agent_reader_done(struct agent_reader *r);
/* From now on the answer behind that sync's is waited for, and no other. Also from within the callback. */
void agent_reader_begin(struct agent_reader *r, int64_t sync_id);
/* -EPROTO, -EMSGSIZE: no answer will come any more (the sentence is in f); begin is possible. */
int agent_reader_feed(struct agent_reader *r, const char *bytes, size_t len, struct failure *f);

#endif
