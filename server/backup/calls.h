/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * calls: several QMP calls pipelined, one end: a step over n disks sends all its commands at once and finishes on the
 * last answer. Embedded in its owner; loop thread only.
 */
#ifndef QPULL_BACKUP_CALLS_H
#define QPULL_BACKUP_CALLS_H

#include "qmp/client.h"

struct calls;

/* One good answer; ret is borrowed until the callback returns. A negative return value fails the set with the sentence
 * in f. */
typedef int (*calls_ret_cb)(struct calls *c, unsigned index, struct json_object *ret, struct failure *f);
/* The last answer is in; f is NULL, or the first failure. The set may be used anew from within. */
typedef void (*calls_done_cb)(struct calls *c, const struct failure *f);

struct calls {
    struct qmp_client *qmp; /* borrowed */
    unsigned timeout_ms;    /* for each call */
    unsigned npending;
    struct failure failure;
    calls_done_cb done;
};

void calls_init(struct calls *c, struct qmp_client *qmp, unsigned timeout_ms);
/* Sends one command; args is given. A call that cannot be sent fails the set. on_ret may be NULL. */
void calls_add(struct calls *c, const char *command, struct json_object *args, int fd, unsigned index,
               calls_ret_cb on_ret);
/* The same for what is not needed: a refusal of QEMU is told to on_refused, as a sentence, and fails nothing. */
typedef void (*calls_refused_cb)(struct calls *c, unsigned index, const struct failure *f);
void calls_try(struct calls *c, const char *command, struct json_object *args, int fd, unsigned index,
               calls_ret_cb on_ret, calls_refused_cb on_refused);
/* After the last add: 0 (done comes later), 1 (nothing was added), or negative (nothing was sent, sentence in f). */
int calls_wait(struct calls *c, calls_done_cb done, struct failure *f);

#endif
