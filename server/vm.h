/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * vm: one QEMU process: its QMP connection, its disks, at most one live session, and who takes part in it. This is
 * where the rules about joining, lingering, and ending well live. It does not know NBD.
 *
 * Loop thread only. Owned by the server until vm_stop(); a session that goes down is waited for.
 */
#ifndef QPULL_VM_H
#define QPULL_VM_H

#include "backup/quiesce.h"
#include "backup/session.h"

#include "vm_counters.h"

struct vm;
struct server_config;
struct config_image;

struct vm_config {
    const char *name;        /* copied, as all strings here */
    const char *qmp_path;    /* NULL: there are only images */
    const char *const *only; /* disks= of the config file: qdev ids or node names; none: all */
    size_t nonly;
    /* disk.NAME=: another name for a qdev id or node */
    const struct vm_rename {
        const char *name, *target;
    } * renames;
    size_t nrenames;
    struct scratch_place *scratch; /* borrowed for life */
    const struct place *place;     /* likewise: scratch goes there instead; NULL: does not */
    unsigned cbw_timeout_s;        /* > 0: 0 would let a hung scratch hold the guest for ever */
    bool give_back;                /* parts of a frozen disk may be given back */
    struct vhost_room *vhost_room; /* borrowed for life and for all reads: memory shared with QEMUs; NULL: none */
    const char *state_dir;         /* exists */
    unsigned linger_ms;
    unsigned max_pause_ms;     /* as struct session_config */
    unsigned hold_shutdown_ms; /* 0: a QEMU whose guest shuts down is not held for a session */
    unsigned keep_checkpoints; /* 0: all */
    enum engine engine;        /* the wish */
    const char *qga_path;      /* its guest agent's socket, or NULL */
    const char *watchdog;      /* program that thaws in our stead (backup/watchdog), NULL: our own */
    enum quiesce_mode quiesce;
    unsigned session_timeout_ms; /* a session that has been up for so long is given up; 0: never */
    uint64_t rate;               /* bytes a second that all clients of a session may have together; 0: any */
    /* Whether one more session may begin for who that is; a failure is told to who waits for it. NULL: always. */
    int (*may_start)(void *arg, const char *identity, const struct place *place /* or NULL */, struct failure *f);
    void *start_arg;
    /*
     * The VM's disks for the time when it is powered off: while nobody listens at its QMP socket, or where there is
     * none, all questions, sessions and changes go to them. Borrowed for life.
     */
    const struct config_image *images;
    size_t nimages;
    const char *storage_daemon; /* borrowed for life */
    struct vm *twin_of;         /* private to vm: whose images these are */
    /* Something has changed that clients of the control socket are told (control.h); data is given. NULL: nobody is. */
    void (*on_event)(void *arg, const char *event, struct json_object *data);
    void *event_arg;
};

int vm_new(uv_loop_t *loop, const struct vm_config *config, struct vm **ret_vm);
void vm_start(struct vm *vm); /* connects to QMP, and again when QEMU comes back */
/* Ends the session, then the connection; cb is the last touch of the caller's count. */
void vm_stop(struct vm *vm, void (*cb)(void *arg), void *arg);
/*
 * No session begins any more, for this reason; the one that stands goes on, and who belongs to it may join it. While
 * nothing but questions keeps the VM, none is taken. NULL: all is as before.
 */
void vm_shut(struct vm *vm, const struct failure *why);
/* Nobody uses it: vm_stop() takes nothing away from anybody, nor how a commit went that has just ended. */
bool vm_is_idle(const struct vm *vm);
const char *vm_name(const struct vm *vm);
/* Why vm_query_start() and vm_enter() refuse, in words. */
const char *vm_trouble(const struct vm *vm);

/*
 * Fresh disks and checkpoints, asked of QEMU; freezes nothing. The embedded operation is answered once, later, unless
 * forgotten.
 */
struct vm_query {
    void (*cb)(struct vm_query *q, const struct disk_list *disks /* borrowed */, const struct failure *f);
    void *arg;
    /* uv_hrtime(): what QEMU was asked later than this will do, where nothing has happened since; 0: it is asked anew.
     * The caller sets it. */
    uint64_t content_ns;
    /* private */
    struct vm *vm;
    struct vm_query *next, *prev;
};
int vm_query_start(struct vm *vm, struct vm_query *q,
                   void (*cb)(struct vm_query *, const struct disk_list *, const struct failure *), void *arg);
void vm_query_forget(struct vm_query *q); /* no callback any more; also if not under way (zeroed) */

/*
 * A change to the checkpoints outside of a session: answered once, later, unless forgotten (the change itself goes on).
 * The caller sets cb and arg. n: bitmaps made or removed.
 */
struct vm_change {
    void (*cb)(struct vm_change *change, unsigned n, const struct failure *f);
    void *arg;
    struct failure warning; /* done all the same, but: */
    void *private;          /* NULL when not under way */
};
void vm_change_forget(struct vm_change *change); /* also if not under way (zeroed) */

/* All strings are copied. */
struct vm_create {
    const char *checkpoint;           /* has passed name_check() */
    const char *description, *parent; /* or NULL: none, and the current one ("": none) */
    const char *const *disks;         /* none: all that can */
    size_t ndisks;
};
/* All records begin at one instant. -ENOENT: the parent has no note. */
int vm_create_start(struct vm *vm, struct vm_change *change, const struct vm_create *what);

enum vm_delete {
    VM_DELETE_ITSELF,
    VM_DELETE_WITH_DESCENDANTS,
    VM_DELETE_DESCENDANTS,
    VM_DELETE_NOTE, /* QEMU is not asked, and keeps the records */
};
/* No disks: all. "Not there" is success; -ENOENT: a checkpoint without a note has no descendants. */
int vm_delete_start(struct vm *vm, struct vm_change *change, const char *checkpoint, const char *const *disks,
                    size_t ndisks, enum vm_delete what);

/* Notes alone, without QEMU; the sentence in f where they cannot begin. n: notes written. */
int vm_import_start(struct vm *vm, struct vm_change *change, struct json_object *doc /* borrowed */, struct failure *f);
/* The VM was called `from` before, and has no notes under its own name yet. */
int vm_rename_start(struct vm *vm, struct vm_change *change, const char *from, struct failure *f);
/* The disk was restored from a backup: all its checkpoints are a GAP from now on. n: 1. */
int vm_restored_start(struct vm *vm, struct vm_change *change, const char *disk, struct failure *f);
/* What others did to its records is forgiven, on all disks: what the next look sees is taken for right. */
void vm_accept(struct vm *vm, const char *checkpoint);
const char *vm_current(const struct vm *vm); /* the current checkpoint, or NULL; borrowed until the next change */
struct json_object *vm_export(const struct vm *vm); /* owned by the caller; NULL: out of memory */

/*
 * A block commit of one disk (backup/commit): cb comes once, later: the job has begun (f NULL, its id), or why it has
 * not. The caller sets all fields; strings are copied, or NULL where there is a default. One at a time for each VM; it
 * goes on whoever leaves, and is remembered until the next one.
 */
struct vm_commit {
    const char *disk, *top, *base;
    bool shallow, active, delete, force;
    void (*cb)(struct vm_commit *request, const char *job, const struct failure *f);
};
int vm_commit_start(struct vm *vm, struct vm_commit *request, struct failure *f);
/* -ENOENT: no such job; a job that has ended stays as it is. */
int vm_commit_cancel(struct vm *vm, const char *job);
/* {"id", "type", "vm", "disk", "status", "step", "current-progress", "total-progress", "top", "base", "base-file",
 * "powered-off", "emptied": file or null, "error", "problem", "checkpoints": [{"name", "state", "text"}], "deleted":
 * […]}; NULL: there was none. */
struct json_object *vm_commit_to_json(const struct vm *vm);

/*
 * A stay: one NBD connection's part in a session. Enter starts a session or joins the live one (same identity, same
 * checkpoint name); a session that only lingers makes way for a different wish of the same identity.
 */
struct vm_lease;

struct vm_stay {
    const char *identity;     /* borrowed until vm_leave() or a failed on_entered: who the client is, e.g. "uid:0",
                                 "ip:192.0.2.7" */
    const char *disk;         /* likewise: disk name */
    const char *checkpoint;   /* likewise: NAME or NULL */
    const char *const *since; /* likewise: checkpoint names of the negotiated qemu:dirty-bitmap contexts */
    size_t nsince;
    bool depth; /* wants the map "qemu:allocation-depth", too */
    /* Likewise: the id of the only session that it may join; NULL: any, or one of its own. */
    const char *session;
    struct vm_lease *lease; /* vm_lease.c's own: it has no disk; NULL for all others */
    /* f NULL: entered; the source, and the maps if they are there, may be used until on_lost or vm_leave(). Comes once,
     * later, unless vm_leave() comes before. */
    void (*on_entered)(struct vm_stay *stay, const struct failure *f);
    /* There are more maps than before. After a successful on_entered, any number of times. NULL: who cares. */
    void (*on_maps)(struct vm_stay *stay);
    /* After a successful on_entered, at most once: the session is lost. Answer what is in flight, hang up, vm_leave().
     */
    void (*on_lost)(struct vm_stay *stay, const struct failure *why);
    void *arg;
    /* private */
    struct vm *vm; /* NULL: not in any list */
    struct vm_stay *next, *prev;
    enum { STAY_OUT, STAY_WAITING, STAY_ASKING, STAY_IN, STAY_LOST } state; /* LOST: on_lost was said */
    size_t nasked;                                                          /* of since, how many maps are there */
    unsigned nmaps;                                                         /* of on_maps, what it has been told */
    struct session_ask ask;
};

/* The stay is zeroed but for the caller's fields. Negative: no callback comes, there is nothing to leave. */
int vm_enter(struct vm *vm, struct vm_stay *stay);
/* Ends the stay at once, whatever it waits for; no callback comes after. Nothing happens if it is not in (zeroed, or
 * on_entered failed). Reads in flight on the source must have been answered. */
void vm_leave(struct vm_stay *stay, bool said_disc, bool read_failed);

/* The stay's source says that the frozen disk is gone (-ESTALE): on_lost comes, later, to all stays. Any number of
 * times. */
void vm_stay_lost(struct vm_stay *stay);

struct source *vm_stay_source(struct vm_stay *stay);
const struct map *vm_stay_map(struct vm_stay *stay, const char *context); /* NULL: it is not there (yet) */
bool vm_stay_expects_map(struct vm_stay *stay, const char *context);      /* on_maps brings it */
const char *vm_stay_session(const struct vm_stay *stay);                  /* session id, for the log */

uint64_t vm_stay_rate(const struct vm_stay *stay); /* bytes a second for all in its session together; 0: any */

/*
 * A lease: a session that stands for itself, whoever reads, until it is ended (vm_lease.c). Always a session of its
 * own: another one, of the same identity too, refuses it. The caller sets the fields, which are borrowed until on_down,
 * or until an on_up with a failure; the lease is embedded, and the VM's meanwhile.
 */
enum vm_decision {
    VM_DECISION_DROP,   /* the checkpoint is kept nowhere */
    VM_DECISION_KEEP,   /* on all its disks that can keep one, whoever has read what */
    VM_DECISION_AS_EVER /* on those whose pull ended well */
};

struct vm_lease {
    const char *identity, *checkpoint; /* as of a stay, who joins must be and want the same */
    const char *const *disks;          /* what it is about; none: all */
    size_t ndisks;
    uint64_t rate; /* bytes a second, 0: as the VM's others */
    /* Once, later: the session is up, or why not; then nothing else comes. */
    void (*on_up)(struct vm_lease *l, const struct failure *f);
    /* How many stays are in it. Never from inside a function of this lease; may only start and stop timers. */
    void (*on_clients)(struct vm_lease *l, size_t nclients);
    /* The session is lost, and on_down will come. At most once. */
    void (*on_lost)(struct vm_lease *l, const struct failure *why);
    /* After on_up without a failure, once: all is undone, but for the problems. last: what vm_session_to_json() said,
     * with "kept" and "dropped". The lease is the caller's again. */
    void (*on_down)(struct vm_lease *l, struct json_object *last, const struct failure *problems);
    /* private */
    struct vm_stay stay;
    enum vm_decision decision;
    bool ending;
};

int vm_lease_start(struct vm *vm, struct vm_lease *l);
/* on_up has not come, and will not: nothing is left of it. */
void vm_lease_forget(struct vm_lease *l);
/* Nobody enters any more. The caller waits as long as it likes for those who are inside, and says vm_lease_end(). */
void vm_lease_close(struct vm_lease *l, enum vm_decision decision);
/* Who is still inside is told why. From the loop, not from inside a callback of the lease. */
void vm_lease_end(struct vm_lease *l, const struct failure *why);
/* The session is given up: as if it had failed, with why. */
void vm_lease_fail(struct vm_lease *l, const struct failure *why);
/* While up: a disk as it was frozen, or NULL. */
const struct disk *vm_lease_disk(const struct vm_lease *l, const char *name);
const struct disk_list *vm_lease_disks(const struct vm_lease *l);
struct vm *vm_lease_vm(const struct vm_lease *l);       /* which vm_enter() wants */
const char *vm_lease_session(const struct vm_lease *l); /* its id, while up */
size_t vm_lease_nclients(const struct vm_lease *l);
/* Whether a session of that VM goes for that identity. */
bool vm_is_for(const struct vm *vm, const char *identity);
/* Whether it has a session that writes there, if places are alike that read alike. */
bool vm_writes_to(const struct vm *vm, const struct place *place);

/* Whoever moves bytes for it counts them here. */
struct vm_counters *vm_stay_counters(struct vm_stay *stay);
const struct vm_counters *vm_counters(const struct vm *vm);
/* Now, of the session that stands: bytes on the scratch file system, connections inside. */
bool vm_is_connected(struct vm *vm);
uint64_t vm_scratch_used(const struct vm *vm);
size_t vm_nconnections(const struct vm *vm);
/*
 * All that the doctor (server/doctor) can say of a VM. The caller sets cb and checks, an array that gets the rows, and
 * keeps all until the end. True: it is done already, and cb does not come; else it comes once, later.
 */
struct vm_checkup {
    void (*cb)(struct vm_checkup *c);
    struct json_object *checks;
    /* private */
    struct vm *vm;
    struct vm_query query;
    struct qmp_call call;
    bool nbd_busy;
    struct vm_checkup *next;
};
bool vm_checkup_start(struct vm *vm, struct vm_checkup *c);
const char *vm_locked_socket(const struct vm *vm); /* its QMP socket, if we may not open that; else NULL */
pid_t vm_qemu_pid(const struct vm *vm);            /* 0: not connected */
bool vm_opens_scratch(const struct vm *vm);        /* itself, by a path or an address */

/* For the control socket; the caller owns the answer. */
/* {"name", "qmp", "connected", "qemu", "reason", "session": id or null, "engine": {…}, …} */
struct json_object *vm_to_json(struct vm *vm);
/* {"wish", "name", "why", "risk", "failure", "capabilities": {NAME: bool} or null}; null: not known (yet). */
struct json_object *vm_engine_to_json(const struct vm *vm);
struct json_object *vm_brief_to_json(const struct vm *vm); /* {"name", "qemu", "engine": {…}} for query-status */
struct json_object *vm_session_to_json(struct vm *vm); /* NULL: no session. {"id", "vm", "status", "step", "checkpoint",
                                                          "identity", "frozen-at", "disks": [...], …} */
struct json_object *checkpoint_to_json(const struct disk *d, const struct checkpoint *c);
/* Of one disk, or of all (NULL): records with what is noted about them, parents first, and notes without a record. */
struct json_object *vm_checkpoints_to_json(const struct vm *vm, const struct disk_list *disks, const char *disk);
/* [{"disk", "verdict": "incremental" | "full", "reason", "text", "dirty-bytes"}]: of all disks, or of one. */
struct json_object *vm_can_increment_to_json(const struct vm *vm, const struct disk_list *disks, const char *checkpoint,
                                             const char *disk);
struct json_object *disk_list_to_json(const struct disk_list *disks, const char *vm);

#endif
