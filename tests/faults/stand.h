/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The inside of a stand, shared by run.c (runs), strike.c (what a fault does, and when) and judge.c (what may be left
 * of it). Nobody else includes this.
 */
#ifndef QPULL_FAULTS_STAND_H
#define QPULL_FAULTS_STAND_H

#include "proxy.h"
#include "run.h"

#define SWEEP_NQUESTIONS 4 /* what a sweep cannot do without: it looks before it undoes */

struct stand {
    const struct scenario *scenario;
    const char *program;
    uv_loop_t loop;
    struct guest guest;
    struct proxy *proxy;
    char path[64]; /* of the proxy */
    bool narrow;
    bool warm;                      /* what a first run leaves open for good (threads, random numbers) is open */
    unsigned nqemu_runs, qemu_nfds; /* of this QEMU; after its first ones it has so many descriptors, and never more */
    /* the run under way */
    struct run run;
    struct daemon daemon;
    pid_t child;
    bool armed; /* commands count */
    unsigned ncommands;
    char hit[128];
    const char *kill_at;            /* pattern of a command at which it is killed; NULL: by number */
    char *sabotaged;                /* owned: the command that is refused for good */
    bool made[GUEST_MAX_DISKS];     /* the command that makes the checkpoint reached QEMU */
    bool made_hit[GUEST_MAX_DISKS]; /* … and is the one that the fault hit */
    bool cut;
    bool paused;       /* by scenario->pause_at */
    bool stops;        /* blockdev-reopen was refused: the guest is stopped for the freeze */
    bool late_stop;    /* when QEMU died the session was ending already */
    uint64_t died_ns;  /* uv_hrtime() at QEMU's death, 0: it lives */
    uv_timer_t resume; /* active: QEMU is stopped */
    uv_signal_t children;
    bool freeze_wanted; /* … and the freeze waits inside it */
    struct stand *next_abandoned;
};

/* strike.c */
extern const struct proxy_ops strike_ops;
void strike_kill_daemon(struct stand *st);
void strike_resume(struct stand *st); /* QEMU goes on, if it is stopped */
/* Whether the fault makes calls pass their deadline, so that these are short. */
bool strike_is_slow(enum fault f);
/* How long QEMU stands still, and how long a call may take in this run, in ms. */
unsigned strike_stall_ms(const struct run *r);
unsigned strike_timeout_ms(const struct run *r);

/* judge.c: each negative with a sentence */
bool judge_is_excused(const struct stand *st);
bool judge_is_suspect(const struct stand *st); /* something may be left, and the next sweep must remove it */
int judge_session(struct stand *st, struct failure *f);
int judge_selftest(struct stand *st, struct failure *f);
int judge_death(struct stand *st, struct failure *f); /* of QEMU, under the task */
int judge_checkpoints(struct stand *st, struct failure *f);
int judge_pause(struct stand *st, bool suspect, struct failure *f);
int judge_picture(struct stand *st, const char *before, const char *when, struct failure *f);
int judge_fds(struct stand *st, struct failure *f); /* of QEMU */
int judge_server(struct stand *st, struct failure *f);

#endif
