/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * run: one session (self-test, sweep) over a real QEMU with at most one fault in it, and the oracle that judges what it
 * left.
 *
 * Leftovers are excused only where the removal itself was sabotaged, and then the next sweep must remove them. Any one
 * thread, one run at a time.
 */
#ifndef QPULL_FAULTS_RUN_H
#define QPULL_FAULTS_RUN_H

#include "daemon.h"
#include "guest.h"

enum fault {
    FAULT_NONE,
    FAULT_REFUSED,        /* QEMU says no, once */
    FAULT_REFUSED_ALWAYS, /* … to each repetition, too */
    FAULT_LOST,           /* QEMU does it, the answer never comes */
    FAULT_DROPPED,        /* QEMU never gets it, no answer comes */
    FAULT_CUT,            /* the connection breaks before the command */
    FAULT_CUT_AFTER,      /* … after it */
    FAULT_STOP,
    FAULT_STOP_TWICE,      /* and once more at the next command */
    FAULT_KILLED,          /* the daemon is killed when QEMU has done it */
    FAULT_KILLED_BEFORE,   /* … before QEMU gets it */
    FAULT_STALLED,         /* QEMU stands still, for longer than calls may take, and then goes on */
    FAULT_QEMU_DIES,       /* QEMU is killed before it gets it */
    FAULT_QEMU_DIES_AFTER, /* … when its answer was passed on */
    FAULT_NFAULTS
};
const char *fault_name(enum fault f);

struct scenario {
    const char *name;
    unsigned ndisks;
    enum daemon_task task;
    unsigned keep; /* as struct daemon_config */
    bool ask;
    bool swept;              /* the fault hits the sweep after a daemon that was killed at its top */
    const char *snapshot_at; /* somebody takes an external snapshot of each disk before the command that this pattern
                                fits, NULL: nobody */
    bool small_scratch;   /* it does not hold what the guest writes while the session is up: the frozen view is lost */
    bool job;             /* the backup-job engine */
    bool foreign_server;  /* QEMU's NBD server is in use by somebody else */
    bool no_reopen;       /* QEMU refuses every blockdev-reopen: the guest is stopped for the freeze */
    const char *pause_at; /* somebody stops the guest before the command that this pattern fits, NULL: nobody */
};

struct run {
    const struct scenario *scenario;
    enum fault fault;
    unsigned at;      /* the command it hits, from 0 */
    bool writing;     /* the guest writes before each command */
    bool real_stalls; /* a stall, and what calls may take then, is as long as in earnest */
    bool verbose;
};

struct stand; /* QEMU, proxy and loop for many runs */

struct stand *stand_new(const struct scenario *s, const char *program, uint64_t seed);
void stand_free(struct stand *st);
/* After a run that went wrong: QEMU goes, what hangs on the loop stays. */
void stand_abandon(struct stand *st);

/* ret_ncommands: how many there were to hit. Negative: the sentence says what is wrong. */
int stand_run(struct stand *st, const struct run *run, unsigned *ret_ncommands, struct failure *f);
/* What command the last run's fault hit ("-": none). */
const char *stand_hit(const struct stand *st);
unsigned stand_slowest_ms(const struct stand *st); /* of all writes of the guest */
/* Everything that the guest has on its disks. */
int stand_check_data(struct stand *st, struct failure *f);

/* The program as a daemon that is to be killed: what main() does when it is called as exec_daemon() in run.c does. */
int run_as_daemon(char **argv);

#endif
