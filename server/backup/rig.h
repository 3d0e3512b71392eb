/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * rig: what we build in a QEMU, and how each kind of thing is made absent again. A session, the self-test and the sweep
 * each embed one; they differ in the table of steps they walk, and share these step functions, most of them undo
 * functions.
 *
 * Everything is found by name (backup/names): "make it absent" deletes first and looks only when QEMU refuses, so that
 * an object that was never there, or went by itself, is no failure. Loop thread only.
 */
#ifndef QPULL_BACKUP_RIG_H
#define QPULL_BACKUP_RIG_H

#include "backup/calls.h"
#include "backup/names.h"
#include "backup/seq.h"

#include <json-c/json.h>

/* Whether QEMU is kept from ending when its guest shuts down (backup/hold), and which mark says so: they are numbered
 * from HOLD_SHUTDOWN. */
enum hold {
    HOLD_NONE,
    HOLD_SHUTDOWN,           /* a guest that panics stays anyhow, as somebody wanted it (-action panic=pause) */
    HOLD_SHUTDOWN_AND_PANIC, /* QEMU would have ended; "shutdown=pause" keeps it then, too */
};

struct rig {
    struct seq seq;
    struct calls calls;     /* of the step under way */
    uv_loop_t *loop;        /* borrowed */
    struct qmp_client *qmp; /* borrowed */
    char id[NAMES_ID_SIZE];
    unsigned ndisks; /* names are numbered from 0 to ndisks - 1 */
    unsigned timeout_ms;
    /*
     * The NBD server in QEMU listens on a socket that we made and passed by fd. Its file is also the durable note that
     * a server is ours: whoever is let in through it talks to a QEMU that holds our socket (rig_server_down).
     */
    const char *server_socket; /* borrowed: file name in server_dir */
    int server_dir;            /* borrowed: O_PATH descriptor, keeps the address short enough for sun_path */
    char server_address[108];
    enum {
        SERVER_ABSENT,
        SERVER_PASSED,
        SERVER_UNKNOWN,
        SERVER_OURS
    } server;      /* PASSED: not started, but QEMU may hold our socket */
    int listen_fd; /* until QEMU has it */
    int alive_fd;  /* tells others that what carries our id is no leftover (backup/alive) */
    /*
     * Whether we have stopped the guest's CPUs. OURS: our mark stands in QEMU, or may stand; a VM that is "paused"
     * while it does was paused by us. MARKED: the mark may stand, but the guest runs, or others have stopped it.
     */
    enum { PAUSE_NONE, PAUSE_MARKED, PAUSE_OURS } pause;
    /* Narrows rig_no_exports() to what one rig of several of the same id made; NAMES_NKINDS: all of the id. */
    enum names_kind only_export;
    bool hold_wanted;            /* backup/hold: set by the owner */
    enum hold hold;              /* the mark that stands, or may stand */
    struct failure hold_refused; /* why not, although it was wanted */
    /* private: of the step function under way */
    int64_t lock_fdset;
    unsigned lock_format;
    enum hold hold_found;
    bool hold_over;
    pid_t hold_pid;
    struct failure first;
    const enum names_kind *kinds;
    unsigned nkinds;
    bool found, event_seen, event_wanted;
    struct qmp_watch watch;
    struct json_object *answers[3]; /* owned */
    uv_work_t work;
    void (*work_fn)(struct rig *r), (*work_after)(struct rig *r);
    struct failure work_failure;
};

struct rig_config {
    uv_loop_t *loop;
    struct qmp_client *qmp;
    const char *id;
    unsigned ndisks, timeout_ms;
    const char *server_socket;
    int server_dir;
};

/* config is borrowed for the call, what it points to for the rig's life (id is copied). */
int rig_init(struct rig *r, const struct rig_config *config, const struct seq_step *steps, unsigned nsteps,
             const struct seq_ops *ops);
/* What carries the rig's id belongs to a living process until rig_done(): before anything of it is made in QEMU. */
void rig_announce(struct rig *r);
/* Frees what the rig itself holds, in or after on_end. */
void rig_done(struct rig *r);

static inline struct rig *rig_of_seq(struct seq *s)
{
    return container_of(s, struct rig, seq);
}

static inline struct rig *rig_of_calls(struct calls *c)
{
    return container_of(c, struct rig, calls);
}

/*
 * Asks QEMU for query-block, query-named-block-nodes and x-debug-query-block-graph at once; on success r->answers holds
 * them until the next step function or rig_done(). Returns as calls_wait() does.
 */
int rig_ask_graph(struct rig *r, calls_done_cb done, struct failure *f);
void rig_drop_answers(struct rig *r);

/* For step functions that only send: waits for rig->calls and ends the step. */
int rig_wait(struct rig *r, struct failure *f);
/* A calls_done_cb that ends the step. */
void rig_step_done(struct calls *c, const struct failure *f);
/* Goes on from a callback with what calls_wait() or the like said: only a wait that began may be left alone. */
void rig_proceed(struct rig *r, int result, const struct failure *f);
/* A calls_ret_cb that keeps an answer for the function that comes when all are in; index says which of answers. */
int rig_keep_answer(struct calls *c, unsigned index, struct json_object *ret, struct failure *f);

/* Deletes the nodes of these kinds (static), parents before children. */
int rig_no_nodes(struct seq *s, const enum names_kind *kinds, unsigned nkinds, struct failure *f);

/* -- undo functions (seq_step_fn) ---------------------------------------------------------------------------------- */
int rig_no_exports(struct seq *s, struct failure *f); /* waits until QEMU says they are gone */
int rig_no_access(struct seq *s, struct failure *f);  /* snapshot-access nodes */
int rig_go_on(struct seq *s, struct failure *f);      /* a guest that we paused goes on, and no mark says it does not */
int rig_thaw(struct seq *s, struct failure *f);       /* no cut node stands on a cbw node */
int rig_detach(struct seq *s, struct failure *f);     /* no device has a node of ours as its root */
int rig_cut_scratch(struct seq *s, struct failure *f);     /* network connections of scratch nodes are cut; yank.c */
int rig_no_passthroughs(struct seq *s, struct failure *f); /* cut and pre nodes */
int rig_no_cbw(struct seq *s, struct failure *f);
int rig_no_scratch_nodes(struct seq *s, struct failure *f); /* and base nodes */
int rig_no_fds(struct seq *s, struct failure *f);
int rig_no_bitmaps(struct seq *s, struct failure *f);  /* bitmaps of ours on nodes that are not */
int rig_no_marks(struct seq *s, struct failure *f);    /* nodes that only say something to a successor */
int rig_no_vhost_fd(struct seq *s, struct failure *f); /* the sweep's last walk: the socket of a vhost-user export */
int rig_no_jobs(struct seq *s, struct failure *f);     /* cancelled unless they have ended, and dismissed */

/* Runs work on libuv's thread pool (what blocks: files), then after on the loop; work puts its failure into
 * r->work_failure. */
int rig_work(struct rig *r, void (*work)(struct rig *r), void (*after)(struct rig *r), struct failure *f);

/* -- the NBD server ------------------------------------------------------------------------------------------------ */
int rig_server_up(struct seq *s, struct failure *f);
int rig_server_down(struct seq *s, struct failure *f);

#endif
