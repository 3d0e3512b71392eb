/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * daemon: the part of qpulld that is under test, without its policy: a QMP client, and one session (or self-test, or
 * sweep) over it. It does at the top what a client would do, checks what it reads there, and counts what it is told.
 *
 * Loop thread only. Owned by the test; daemon_close() must have ended before the memory goes.
 */
#ifndef QPULL_FAULTS_DAEMON_H
#define QPULL_FAULTS_DAEMON_H

#include "backup/calls.h"
#include "backup/session.h"
#include "guest.h"
#include "source/vhost.h"

/* Some cross from what the guest has overwritten into what it has not: QEMU 7.0-7.2 get that wrong (source/nbd.h). */
#define DAEMON_READ_CLUSTERS 3u

#define DAEMON_VM "faults"
#define DAEMON_SERVER_SOCKET "nbd-" DAEMON_VM ".sock" /* in the state directory */

enum daemon_task { DAEMON_SESSION, DAEMON_SELFTEST, DAEMON_SWEEP };

struct daemon_config {
#define DAEMON_VM "faults"
#define DAEMON_SERVER_SOCKET "nbd-" DAEMON_VM ".sock" /* in the state directory */

    enum daemon_task task;
    unsigned keep; /* bit n: the pull of disk n ends well; the session has a checkpoint in any case */
    bool ask;      /* one more dirty map while the session is up */
    bool narrow_reads;
    bool job; /* the backup-job engine */
    unsigned timeout_ms;
    bool impatient; /* so short that on a loaded machine a good answer may be late, too: then no read need succeed */
    void (*at_top)(void *arg); /* once all has been read; may be NULL */
    void *arg;
    bool verbose;
};

struct daemon {
    /* what it was told */
    bool waits_for_maps;
    bool reading;                         /* at the top */
    bool read_failed;                     /* so no checkpoint is to be kept */
    unsigned nup, nfailed, ndown, nended; /* nended: the self-test's or the sweep's callback */
    unsigned nbroken;                     /* reads and asks that were answered with an error */
    unsigned nlate;                       /* on_up or on_failed after session_stop() */
    bool stopped, wants_checkpoint;       /* session_stop() was called; session_keep() before it */
    bool finished;                        /* it had all that it wanted, before anything was told */
    bool narrow;                          /* the self-test's word */
    unsigned nswept;
    struct failure failure;  /* of on_failed, of the self-test, of the sweep */
    struct failure problems; /* of on_down, of the self-test */
    struct failure check;    /* what was read at the top is wrong */
    bool closed;
    /* private */
    struct daemon_config config;
    uv_loop_t *loop;
    const struct guest *guest; /* borrowed */
    const struct guest *model; /* the same where its memory of writes is true; NULL: reads are not checked */
    struct qmp_client *qmp;
    struct calls calls;
    struct json_object *answers[3];
    struct disk_list *list;
    struct session *session;
    struct vhost_room vhost_room;
    int state_dir;
    bool begun;
    unsigned disk, cluster; /* of the read under way */
    struct source_read read;
    struct session_ask ask;
    unsigned char buffer[DAEMON_READ_CLUSTERS * GUEST_CLUSTER];
};

/* Connects to path and begins. Everything is borrowed until it has closed. */
void daemon_start(struct daemon *d, uv_loop_t *loop, const char *path, const struct guest *g, const struct guest *model,
                  const struct daemon_config *config);
/* The task is over: on_down or the like has come. */
bool daemon_is_over(const struct daemon *d);
/* session_stop(), at any time, and twice. */
void daemon_stop(struct daemon *d);
/* Once it is over, and QEMU is gone: the same task once more when there is a QEMU again. */
void daemon_again(struct daemon *d);
/* Once it is over; closed becomes true later. */
void daemon_close(struct daemon *d);

#endif
