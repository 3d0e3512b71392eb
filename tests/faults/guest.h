/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * guest: a real QEMU with n virtio-blk disks over qcow2 and nobody inside, and a second monitor through which the test
 * plays the guest: it writes clusters as the device would, remembers what must be read where, and looks at the whole
 * block layer. It is not what is under test, and must not hang with it: calls on the second monitor wait, with a
 * deadline.
 *
 * Any one thread. Whatever cannot go on ends the program with a sentence; what a test may judge is returned.
 */
#ifndef QPULL_FAULTS_GUEST_H
#define QPULL_FAULTS_GUEST_H

#include "qmp/stream.h"

#include <stdbool.h>
#include <sys/types.h>

#define GUEST_MAX_DISKS 3
#define GUEST_CLUSTER 65536u /* qcow2's default, and the copy granularity over a raw file */
#define GUEST_NCLUSTERS 48u
#define GUEST_SIZE ((uint64_t)GUEST_CLUSTER * GUEST_NCLUSTERS)

#define GUEST_CBW_TIMEOUT_S                                                                   \
    10u /* of the sessions: a write waits so long for its copy, then the snapshot is given up \
         */
/* No write may take longer: that, and what a machine needs that runs other things. */
#define GUEST_WRITE_MAX_MS (GUEST_CBW_TIMEOUT_S * 1000u + 5000u)

#define GUEST_CHECKPOINT "new"    /* what the sessions are to make */
#define GUEST_RECORD "test-after" /* the test's own record of what was written since the freeze */

struct guest_disk {
    unsigned char now[GUEST_NCLUSTERS], frozen[GUEST_NCLUSTERS]; /* the byte that fills each cluster */
    /* Written since "old" was cleared and before the freeze; since the freeze. */
    bool before[GUEST_NCLUSTERS], after[GUEST_NCLUSTERS];
};

struct guest {
    char dir[32];     /* holds everything: images, monitors, output */
    char monitor[64]; /* path of the first monitor, which the test leaves alone */
    char scratch[64], state[64];
    pid_t pid;
    unsigned ndisks;
    struct guest_disk disks[GUEST_MAX_DISKS];
    bool frozen;
    bool has_overlays;
    unsigned nwrites;    /* since the last guest_check_writes() */
    unsigned slowest_ms; /* of all writes */
    uint64_t seed;
    /* private */
    int control; /* the second monitor */
    struct qmp_stream stream;
    struct json_object *answer; /* owned */
    int output;
    long output_at;
};

/* False: there is no QEMU here. */
bool guest_possible(void);
/* scratch_size in bytes; 0: what the disk has room for. */
void guest_start(struct guest *g, unsigned ndisks, uint64_t scratch_size, uint64_t seed);
/* Gives the process mounts of its own, and every thread that it starts from now on. */
bool guest_can_limit_scratch(void);
/* SIGKILL, and removes the directory. */
void guest_done(struct guest *g);
/* SIGKILL: nothing else is done until guest_replace(). */
void guest_die(struct guest *g);
/* Another QEMU, with new disks, at the same paths. */
void guest_replace(struct guest *g);
/* False, with QEMU's last words, when QEMU has died. */
bool guest_lives(struct guest *g, struct failure *f);

/* Its CPUs are not stopped. */
bool guest_runs(struct guest *g);

/* One command in JSON (single quotes will do). NULL and the sentence in f (may be NULL): QEMU's refusal. Owned by the
 * caller. */
struct json_object *guest_call(struct guest *g, struct failure *f, const char *fmt, ...) _printf_(3, 4);

/* The guest writes one cluster, any. */
void guest_write(struct guest *g);
/* Every write has succeeded, as far as the device was told, and none was slower than GUEST_WRITE_MAX_MS. */
int guest_check_writes(struct guest *g, struct failure *f);
/* Reads all clusters as the guest would and compares them. */
int guest_check_data(struct guest *g, struct failure *f);

/* Forgets what was written so far: what comes is "before" the next freeze. Clears the checkpoint "old" on all disks. */
void guest_begin_run(struct guest *g);
/* The next command freezes: what comes is "after". A bitmap of the test's own begins to record on each disk. */
void guest_freezes(struct guest *g);
/*
 * Whether the checkpoint exists on a disk and, if so, that its dirty bits cover every write since guest_freezes().
 * ret_surplus: how many bytes more than those it claims.
 */
int guest_check_checkpoint(struct guest *g, unsigned disk, bool *ret_exists, uint64_t *ret_surplus, struct failure *f);
/* Removes the checkpoint where it exists, and the test's own bitmaps. */
void guest_end_run(struct guest *g);

/*
 * Everything that the block layer shows, in a form that only changes when something came or went: one sorted line for
 * each node, edge, bitmap, export, fd set, job, device, open file of QEMU and for the NBD server. Owned by the caller.
 */
char *guest_picture(struct guest *g);
/* Of these lines only those about files that lie on the host, "": none. Asks QEMU nothing. Owned by the caller. */
char *guest_files(const struct guest *g);
unsigned guest_count_fds(const struct guest *g); /* of the process; its first session opens some for good */
/* The lines that only one of them has, one after the other ("+line" or "-line"); NULL: there is none. Owned by the
 * caller. */
char *guest_difference(const char *before, const char *after);

/* Somebody takes an external snapshot of every disk: "overlayN" goes on top of "dN". */
void guest_take_snapshots(struct guest *g);
/* The devices stand on the overlays (else: negative), which are committed and removed again. */
int guest_undo_snapshots(struct guest *g, struct failure *f);

uint64_t guest_random(struct guest *g);

#endif
