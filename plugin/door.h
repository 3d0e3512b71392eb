/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * door: the way to frozen disks, as nbdkit's threads use it: list, open, read, close. There are two: own (the engine
 * itself, in this process: server/vm) and through (a running qpulld, as its NBD client).
 *
 * All functions here are for nbdkit's threads; they wait, each with a deadline behind it. Marked fields are the loop
 * thread's alone.
 */
#ifndef QPULL_PLUGIN_DOOR_H
#define QPULL_PLUGIN_DOOR_H

#include "frozen.h"
#include "loop.h"
#include "options.h"
#include "source/source.h"

struct door;

/* One connection's view of one frozen disk. */
struct handle {
    struct door *door;     /* borrowed */
    struct frozen *frozen; /* a reference */
    struct handle *next;   /* its opener's */
    /* loop thread */
    struct source *source; /* NULL: lost */
    unsigned nreads;       /* in flight */
    struct failure lost;
};

struct names {
    char **names; /* owned, each */
    size_t nnames;
};
void names_free(struct names *n);
int names_add(struct names *n, const char *name); /* copied; -ENOMEM */

struct door_ops {
    /* deadline_ms: of door_now_ms(); the whole of it ends by then. */
    int (*list)(struct door *d, uint64_t deadline_ms, struct names *ret_names, struct failure *f);
    int (*open)(struct door *d, const char *disk, uint64_t deadline_ms, struct handle **ret_handle, struct failure *f);
    void (*close)(struct handle *h);
    /* Loop thread: a read failed; and: the last read of a lost handle is answered. */
    void (*read_failed)(struct handle *h, int err);
    void (*idle)(struct handle *h);
    /* Tears down what stands, and frees the door; no handle is open. */
    void (*stop)(struct door *d);
};

struct door {
    const struct door_ops *ops;
    const struct options *options; /* borrowed for life */
    struct loop *loop;             /* borrowed for life: runs from before the door to after it */
    /* loop thread */
    struct frozen *frozen; /* all that have references */
    struct frozen *left;   /* owned: of the last session, nobody has them open now */
};

/* Loop thread. */
struct frozen *door_find(struct door *d, const char *disk, const char *session); /* NULL session: any; no reference */
void door_keep(struct door *d, struct frozen *f);                                /* takes a reference */
bool door_let_go(struct door *d, struct frozen *f); /* gives one back; true: it was the last, f is the caller's */
/*
 * After the last let go: who comes back while the session lingers finds it again, with what has been handed out of it
 * so far. It goes when a disk of another session is kept, or (session NULL) at the end.
 */
void door_put_aside(struct door *d, struct frozen *f);
void door_clear(struct door *d, const char *session); /* all that was put aside of other sessions; NULL: all */

/*
 * For a wait that may be long: whether its client is still there, and nbdkit not told to end. nbdkit tells this to who
 * sleeps, and to nobody else, so a wait has to look: every so often.
 */
#define DOOR_LOOK_MS 500u
bool door_is_wanted(void);
uint64_t door_now_ms(void); /* the clock of the loop, too */

/* Whether reads of it are in flight. */
bool door_is_busy(struct handle *h);
/* Into buffer, or (NULL) only so that it has been read. The range is inside the disk. Negative errno. */
int door_read(struct handle *h, void *buffer, size_t length, uint64_t offset, struct failure *f);

int own_new(const struct options *o, struct loop *l, struct door **ret_door, struct failure *f);
int through_new(const struct options *o, struct loop *l, struct door **ret_door, struct failure *f);

#endif
