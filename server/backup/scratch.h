/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * scratch: the directory where copy-before-write data goes, how much of it sessions may use, and who is given up when
 * that is passed (docs/decisions/0010-scratch.md). It knows files and bytes; what a session is, it does not.
 *
 * QEMU tells of no scratch file that grows, so the files are looked at: by a worker thread (a file system may hang),
 * one look at a time, the sooner the closer a limit is. A look has descriptors of its own, so that a session may go
 * while it is under way.
 *
 * Loop thread only, but for scratch_check_room(). The place is owned by the program, a user is embedded in a session.
 */
#ifndef QPULL_BACKUP_SCRATCH_H
#define QPULL_BACKUP_SCRATCH_H

#include "qmp/base.h"

#include <stdbool.h>
#include <uv.h>

/* How often the files are looked at: so late that a guest of SCRATCH_RATE cannot have passed the nearest limit, within
 * these bounds. */
#define SCRATCH_LOOK_MIN_MS 50u
#define SCRATCH_LOOK_MAX_MS 1000u
#define SCRATCH_RATE (4ull << 30) /* bytes per second: more than one fast disk takes */
/* What a session that has been given up holds is expected to be free so soon; then others have to make the room. */
#define SCRATCH_LEAVE_MS 5000u
/* Where less than this part of the limit of all is left, a new session would only cost a running one its life. */
#define SCRATCH_LAST_PART 8u

struct scratch_limits {
    uint64_t session; /* bytes of one user; 0: no limit */
    uint64_t all;     /* bytes of all users together; 0: no limit */
    uint64_t reserve; /* bytes of the file system that are left free for others; 0: none */
};

enum scratch_limit { SCRATCH_SESSION, SCRATCH_ALL, SCRATCH_RESERVE };

/* Why somebody is given up. */
struct scratch_over {
    enum scratch_limit limit;
    uint64_t allowed; /* bytes: the limit */
    uint64_t found;   /* bytes: held by it, by all, or free */
};

struct scratch_file {
    int fd;        /* borrowed */
    uint64_t used; /* bytes on the file system, at the last look */
};

struct scratch_place;

struct scratch_user {
    struct scratch_file *files; /* borrowed until scratch_leave() */
    unsigned nfiles;
    /* It holds too much, or it is its turn to make room: it goes, and as fast as can be. At most once, and from within
     * no call of the user's. */
    void (*on_over)(struct scratch_user *u, const struct scratch_over *over);
    /* private */
    struct scratch_place *place;
    struct scratch_user *next, *prev;
    uint64_t serial;
    uint64_t leaving_ms; /* loop time; 0: it stays */
};

/* limits are copied. -ENOMEM. */
int scratch_new(uv_loop_t *loop, const char *dir, const struct scratch_limits *limits,
                struct scratch_place **ret_place);
/* Nobody uses it any more. Waits for a look under way; cb is the last touch, later. */
void scratch_close(struct scratch_place *p, void (*cb)(void *arg), void *arg);

const char *scratch_dir(const struct scratch_place *p);
/* -ENOSPC and a sentence: all users together hold nearly what they may. */
int scratch_check_quota(const struct scratch_place *p, struct failure *f);
/* Any thread, may wait for the file system that fd is on. -ENOSPC and a sentence: no more than the reserve is free. */
int scratch_check_room(const struct scratch_place *p, int fd, struct failure *f);

/* The caller has set the public fields. */
void scratch_enter(struct scratch_place *p, struct scratch_user *u);
/* It is going: no on_over any more, and what it holds will be free soon. Also if it is not inside (zeroed). */
void scratch_going(struct scratch_user *u);
/* Its files are gone. Also if it is not inside (zeroed), and twice. */
void scratch_leave(struct scratch_user *u);
uint64_t scratch_used(const struct scratch_user *u); /* bytes, at the last look */
/* Bytes of all users at the last look. */
uint64_t scratch_used_by_all(const struct scratch_place *p);
const struct scratch_limits *scratch_limits(const struct scratch_place *p);

#endif
