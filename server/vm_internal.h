/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The inside of a VM, shared by vm.c (connection, questions), vm_session.c (who takes part in which session) and
 * others.
 */
#ifndef QPULL_VM_INTERNAL_H
#define QPULL_VM_INTERNAL_H

#include "config.h"
#include "images.h"
#include "qmp/commands.h"
#include "vm.h"
#include "vm_watch.h"

#include "backup/calls.h"
#include "backup/notes.h"
#include "backup/reopen.h"

/* How far we are with this QEMU. Sessions start, and questions are put, in READY only; until then they wait. */
enum vm_state {
    VM_CONNECTING, /* images: closed, or being opened or closed. Else: the first attempt is under way: a client that
                      comes with the daemon's start waits for it */
    VM_LOST,       /* no QMP connection; everything that waits is refused */
    VM_SWEEPING,   /* connected; leftovers of a dead daemon are being undone, then QEMU is asked what it can do */
    VM_READY,      /* -> TESTING at the first session */
    VM_TESTING,    /* the self-test for the snapshot-access bug runs */
};

/* How a disk's pull stands: kept from the first connection that opens it to the end of the session. */
struct vm_pull {
    char *disk; /* owned */
    unsigned nopen;
    bool well; /* the last connection to leave said goodbye in order, and no read failed */
    bool read_failed;
};

/* Answered once, later, when all changes of the notes up to now are on disk, or cannot be written. */
struct vm_note_wait {
    void (*cb)(struct vm_note_wait *w, const struct failure *f);
    struct vm_note_wait *next;
};

/* What QEMU announces of its guest and of itself (vm_life.c). */
struct vm_life {
    struct qmp_watch shutdown, panicked, resumed, reset, woken, stop, unplugged, jobs;
    struct qmp_call status;
    bool asking, ask_again; /* for it */
    uv_timer_t hold;        /* runs while QEMU waits, with its guest off, for the session's end */
    char words[128];        /* why it is about to end; "": it has not said so */
    bool held;              /* the guest is off, and QEMU waits */
    bool leftovers;         /* something of a session could not be undone, and QEMU still runs */
    bool sweep_due;         /* so, and somebody wants a session: one more try before that */
};

struct vm {
    uv_loop_t *loop;
    char *name, *qmp_path;         /* owned */
    struct scratch_place *scratch; /* borrowed */
    const struct place *place;     /* borrowed, or NULL */
    unsigned cbw_timeout_s;
    bool give_back;
    struct vhost_room *vhost_room; /* borrowed, or NULL */
    char *server_socket;           /* owned: "nbd-NAME.sock" */
    int state_dir;                 /* O_PATH */
    int claim_fd;                  /* these notes are ours (backup/claim), -1: is a twin's, or cannot */
    char **only;                   /* owned */
    size_t nonly;
    struct vm_rename *renames; /* owned, strings too */
    size_t nrenames;
    unsigned linger_ms, max_pause_ms, hold_shutdown_ms;
    unsigned keep_checkpoints;
    unsigned session_timeout_ms;
    uint64_t rate;
    int (*may_start)(void *arg, const char *identity, const struct place *place, struct failure *f);
    void *start_arg;
    struct vm_counters counters; /* of the keeper; a twin's are not used */
    void (*on_event)(void *arg, const char *event, struct json_object *data);
    void *event_arg;

    struct qmp_client *qmp;
    enum vm_state state;
    char qemu_version[64];
    struct failure lost; /* why there is no connection */
    struct qmp_watch resumed;
    bool sweep_wanted; /* the guest went on while a session stood or went down */
    bool stopping, client_closed, closing;
    struct failure shut; /* of the keeper: why no session begins any more */
    void (*on_stopped)(void *arg);
    void *stop_arg;

    /* questions: those that wait, and those that the walk under way answers */
    struct vm_query *waiting, *answering;
    struct calls calls;
    bool asking;
    bool telling; /* the answer, to one after the other; no other question begins meanwhile */
    unsigned nasks;
    uint64_t asked_ns; /* uv_hrtime(): when the walk under way, or the last one, began */
    /* What it has answered, for who is content with it: valid while nothing happens, and not for long. */
    struct disk_list *recent;       /* owned, or NULL */
    uint64_t nhappenings;           /* of qmp, when QEMU's answers had come */
    unsigned nrounds;               /* of questions that count against VM_ROUNDS_BURST … */
    uint64_t rested_ms;             /* … one less for every VM_ROUND_REST_MS since then */
    struct json_object *answers[3]; /* owned */

    struct vm_watch watch; /* what others do to the disks */
    struct vm_life life;

    /* what QEMU can do, valid for this connection (vm_capabilities.c) */
    enum engine engine_wish;
    bool capable; /* the next two are known */
    struct capabilities capabilities;
    struct engine_choice engine;   /* unless … */
    struct failure engine_failure; /* … sessions are refused with this, or nothing is known */

    /* what the self-test found, valid for this connection */
    bool tested, narrow;
    struct vm_checkup *checkups; /* that wait for it */
    bool has_iothreads;

    struct quiesce *quiesce; /* owned; NULL: images only */

    /* the session */
    struct session *session;
    struct vm_stay *stays;
    size_t nstays;
    char *identity;         /* owned: whose session it is */
    struct vm_lease *lease; /* borrowed: that has begun it; NULL: a client has */
    bool starting;          /* disks are being asked for it */
    bool swept;             /* for this start, because a node of a session stood on a disk */
    struct failure left;    /* what the last sweep could not do */
    struct vm_query start_query;
    const struct disk_list *fresh;  /* borrowed: what QEMU has answered just now; NULL: it was longer ago */
    bool ending;                    /* session_stop() was said */
    bool was_up;                    /* it came up */
    unsigned nmaps;                 /* how often it had more maps than before */
    struct failure session_failure; /* why it failed */
    struct vm_pull *pulls;          /* owned */
    size_t npulls;
    uv_timer_t linger, kick;
    unsigned lingered_ms; /* past the linger, for QEMU's answers */
    bool lingering;
    struct json_object *last; /* owned: the session before this one, for status */

    struct vm *keeper; /* of the notes: this VM, or the one whose twin it is */
    /* notes: the set is the loop's; a worker has the batch while note_writing */
    struct notes *notes;                          /* owned */
    struct notes_change note_changes, note_batch; /* to be written, and being written */
    struct vm_note_wait *note_waits;
    uv_work_t note_work;
    bool note_writing;
    struct failure note_failure;
    char *note_rename;          /* owned: the name to take notes over from */
    struct notes *note_renamed; /* owned: these */
    bool retiring;
    struct vm_change retired;
    /* images: exactly one of these two, or none */
    struct vm *twin;       /* owned: of a VM with QMP, what answers while nobody listens there */
    struct images *images; /* owned: this VM is images only, and qmp is theirs, NULL while they are closed */
    bool images_lost;      /* they are closed as soon as nothing uses them */
    unsigned nwrites;      /* under way; 1 at most on images */

    struct vm_job *job; /* owned: the commit under way, or the last one; NULL: there was none */
};

/* -- images (vm_images.c) ------------------------------------------------------------------------------------------ */

/* Who answers for this VM now: itself, or its images. */
struct vm *vm_now(struct vm *vm);
/*
 * Something changed: opens the images if anybody waits for them, lets them go when nobody does. For every VM, in every
 * state. False: questions have to wait.
 */
bool vm_images_pump(struct vm *vm);
int vm_images_new(struct vm *vm, const struct vm_config *config);
/* QEMU answers again: whatever goes on with the images ends, and they are let go as fast as can be. */
void vm_images_yield(struct vm *vm);
/* The first look has found nobody at the QMP socket: who has waited for that goes on with the images. */
void vm_images_take_over(struct vm *vm);
/* The nodes are not what they were: the images are let go, and opened anew for whoever waits. Within a write. */
void vm_images_renew(struct vm *vm);
/* When all else has ended; comes back to vm_stop_if_idle() whenever more is let go. */
void vm_images_stop(struct vm *vm);

/*
 * Write: what changes something in the disks, with nothing but QMP commands (checkpoints, block jobs). The disks' top
 * nodes are writable from on_open until vm_write_end(); images are opened, stored and let go around it. Others of that
 * VM wait meanwhile, or are refused.
 */
struct vm_write {
    struct vm *vm; /* who it is done to, from vm_write_start() on: its qmp may be used */
    /* private */
    struct vm_query query, *theirs;
    void (*on_disks)(struct vm_query *, const struct disk_list *, const struct failure *);
    const char *const *disks;
    size_t ndisks;
    struct calls *calls;
    bool hold;
    struct disk_list *list; /* owned */
    struct reopen reopen;
    void (*on_end)(struct vm_write *w, const struct failure *f);
    bool open;
};
/*
 * on_disks(q, …) comes once, later, as if q had been started by vm_query_start(), with calls made ready for the VM's
 * QMP. disks (none: all) are borrowed until the end. A failure: nothing is open, vm_write_end() may be called all the
 * same.
 */
int vm_write_start(struct vm *vm, struct vm_write *w, struct vm_query *q, struct calls *calls, const char *const *disks,
                   size_t ndisks,
                   void (*on_disks)(struct vm_query *, const struct disk_list *, const struct failure *));
/* The same, but images stay open for reading: the change makes writable what it needs, for as long as it needs it. */
int vm_hold_start(struct vm *vm, struct vm_write *w, struct vm_query *q, struct calls *calls,
                  void (*on_disks)(struct vm_query *, const struct disk_list *, const struct failure *));
/* All commands are answered. SEQ_DONE: nothing to wait for; 0: cb comes later, f tells what could not be stored. */
int vm_write_end(struct vm_write *w, void (*cb)(struct vm_write *w, const struct failure *f));

/* vm_session.c */
void vm_pump(struct vm *vm);       /* whatever can go on, goes on */
void vm_pump_later(struct vm *vm); /* from the loop */
void vm_pump_after(struct vm *vm, unsigned ms);
void vm_move_waiting(struct vm *vm, struct vm *to);               /* stays, that is */
void vm_refuse_waiting(struct vm *vm, const struct failure *why); /* stays that are not in a session yet */
void vm_end_session(struct vm *vm);
void vm_session_done(struct vm *vm); /* frees what is left of one */

extern const struct session_ops vm_session_ops;

/* vm_start.c: somebody waits, and there is no session: goes on with whatever one needs to start. */
void vm_start_session(struct vm *vm);

/* vm_session.c: says it to all who are in the session, or wait for it. */
void vm_session_tell(struct vm *vm, const struct failure *why);
struct vm_stay *vm_first_stay(struct vm *vm, int state);
/* Its callback may leave, enter or free anything: whoever loops over stays begins again from the front after it. */
void vm_refuse(struct vm_stay *stay, const struct failure *why);
/* A stay's end, without a word: it was never in, or is a lease's. */
void vm_session_remove(struct vm_stay *stay);

/* vm_lease.c */
bool vm_lease_admits(const struct vm *vm, const struct vm_stay *stay); /* into the session that stands */
bool vm_lease_refuse_strays(struct vm *vm, struct vm_stay **ret_stay); /* one that its session is gone from */
int vm_lease_check(const struct vm *vm, const struct vm_stay *stay, const struct disk_list *disks, struct failure *f);
size_t vm_lease_since(const struct disk_list *disks, const char **since, size_t n, size_t most);
void vm_lease_notice(struct vm *vm);                                      /* somebody came or left */
bool vm_lease_decides(const struct vm *vm, const char *disk, bool *keep); /* false: as ever */
void vm_lease_down(struct vm *vm, struct json_object *last, const struct failure *problems);

/* vm_notes.c */
int vm_notes_load(struct vm *vm); /* waits for the disk */
void vm_notes_done(struct vm *vm);
/* A note for a record that has just been made; vm_notes_write() comes after it. */
int vm_notes_add(struct vm *vm, const struct note_spec *spec, struct failure *f);
void vm_notes_write(struct vm *vm, struct vm_note_wait *wait,
                    void (*cb)(struct vm_note_wait *, const struct failure *));
int vm_notes_may_rename(const struct vm *vm, struct failure *f);         /* -EEXIST: it has notes of its own */
int vm_notes_rename(struct vm *vm, const char *from, struct failure *f); /* vm_notes_write() comes after it */
void vm_notes_of_session(struct vm *vm);                                 /* which is down: what it has kept */

/* vm_events.c: data and disks are given. They reach clients later: nothing of ours is called back from here. */
void vm_tell(struct vm *vm, const char *event, struct json_object *data);
void vm_tell_checkpoint(struct vm *vm, const char *event, const char *name, struct json_object *disks);
void vm_tell_broken(struct vm *vm, const struct disk_list *was, const struct disk_list *now);

/* Reason, step and disk of a session's failure. */
void vm_add_failure(struct vm *vm, struct json_object *o);
void vm_tell_up(struct vm *vm);
void vm_tell_lost(struct vm *vm);
/* The session is down: counts how it ended, tells, and adds that to the status of the last session. */
void vm_tell_down(struct vm *vm, struct json_object *last, const struct failure *problems);

/* vm_checkpoint.c */
void vm_retire(struct vm *vm); /* drops the oldest checkpoints where there are more than keep_checkpoints */

/* vm_commit.c */
bool vm_is_committing(const struct vm *vm);
bool vm_commit_is_news(const struct vm *vm); /* it has ended, and who asks now and then may not know yet */
bool vm_commit_may_ask(const struct vm *vm); /* whether QEMU may be asked about its disks */
bool vm_commit_refuses(struct vm *vm);       /* those who wait for a session; says whether one may not begin */
void vm_commit_stop(struct vm *vm);          /* cancels; vm_stop_if_idle() comes after it */
void vm_commit_done(struct vm *vm);          /* frees what is left of it */

/* vm_capabilities.c */
void vm_ask_capabilities(struct vm *vm); /* ends in vm_settle() */
bool vm_engine_refuses(struct vm *vm);   /* those who wait for a session */
/* vm_quiesce.c */
int vm_quiesce_new(struct vm *vm, const struct vm_config *config);
void vm_quiesce_tell_up(const struct vm *vm, char *buf, size_t size); /* for the log: ", quiesced for 12 ms" */
void vm_quiesce_to_json(const struct vm *vm, struct json_object *o);
/* vm_life.c */
void vm_life_watch(struct vm *vm);
void vm_life_connected(struct vm *vm); /* to a QEMU, perhaps another one */
void vm_life_session_down(struct vm *vm);
/* The connection is lost, as why says: the sentence for those whose session ends with it. Returns why->err. */
int vm_life_last_words(const struct vm *vm, const struct failure *why, struct failure *f);

/* vm_doctor.c */
void vm_tell_tested(struct vm *vm, const struct failure *f /* NULL: well */);

/* vm_ask.c */
void vm_ask_if_waiting(struct vm *vm);
void vm_refuse_questions(struct vm *vm, const struct failure *f); /* those that wait */

/* vm.c */
bool vm_is_leaving(const struct vm *vm); /* vm_shut() was said, and nothing keeps it but questions */
void vm_settle(struct vm *vm);           /* a sweep, a self-test or the question for capabilities has ended */
void vm_sweep(struct vm *vm);
void vm_sweep_when_idle(struct vm *vm); /* at once, or when what is under way has ended */
void vm_test(struct vm *vm);            /* ends in vm_pump() */
void vm_stop_if_idle(struct vm *vm);

#endif
