/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * vm_watch: what others do to a VM's disks. Each look at the disks is compared with the memory of the looks before it
 * (backup/lineage), which is kept in the state directory; and while a block job of others takes a layer away, the
 * records in it are carried over to the layer that stays, where that can be done rightly.
 *
 * Embedded in its VM, loop thread only; files are touched by worker threads.
 */
#ifndef QPULL_VM_WATCH_H
#define QPULL_VM_WATCH_H

#include "vm.h"

#include "backup/calls.h"
#include "backup/jobs.h"
#include "backup/lineage.h"

/* Answered once, later, when all that is remembered by now is on disk, or cannot be written. */
struct vm_watch_wait {
    void (*cb)(struct vm_watch_wait *w, const struct failure *f);
    struct vm_watch_wait *next;
};

/* What was remembered under another name of the VM, on its way in (vm_inherit.c). */
struct vm_heir {
    uv_work_t work;
    char *from;             /* owned; NULL: nothing is on its way */
    struct lineage *old;    /* owned */
    struct failure failure; /* it could not be read */
    struct vm_watch_wait wait;
    void (*cb)(struct vm *vm, void *arg, const struct failure *f, const struct failure *warning);
    void *arg;
};

struct vm_watch {
    struct lineage *lineage; /* owned, or the keeper's: a twin has the same disks */

    /* the look under way */
    struct look *look;
    void (*on_looked)(struct vm *vm, struct disk_list *list /* given */, const struct failure *f);
    uv_timer_t deadline;

    /* the file */
    uv_work_t save;
    bool saving;
    char *text; /* owned */
    struct failure save_failure;
    struct vm_watch_wait *waits;
    struct vm_heir heir;

    /* looks of our own, and what comes of them */
    struct qmp_watch job_changed;
    struct vm_query query;
    bool wanted, jobs_wanted;
    struct disk_list *last; /* owned: as at the last look */
    struct job_list jobs;   /* as at the last look */
    struct image *targets;  /* owned: of the jobs */

    /* records being carried over; what the cargo points to stands until the last of it */
    bool carrying;
    struct calls calls;
    struct disk_list *disks; /* owned */
    struct job_list carry_jobs;
    struct image *carry_targets; /* owned */
    struct json_object *status;  /* owned: query-block-jobs */
    struct failure carry_failure;
    size_t ncargo, at;
    unsigned npromises;  /* so far */
    struct cargo *cargo; /* owned */
};

/* Reads the memory: this waits for the disk, at start only. -ENOMEM */
int vm_watch_load(struct vm *vm);
/* With the QMP client made, or the images. */
void vm_watch_init(struct vm *vm);
/* After it vm_watch_done() may be called, when cb has come; not while vm_watch_is_busy(). */
void vm_watch_close(struct vm *vm, uv_close_cb cb);
void vm_watch_done(struct vm *vm);
bool vm_watch_is_busy(const struct vm *vm);

/* Judges the disks that QEMU told of just now; cb comes once, later, unless -ENOMEM. The list is given on success. */
int vm_watch_look(struct vm *vm, struct disk_list *list, struct json_object *named_nodes, struct json_object *graph,
                  void (*cb)(struct vm *vm, struct disk_list *list, const struct failure *f));
/* Something may have changed: look, now or as soon as possible. */
void vm_watch_wake(struct vm *vm);
/* There is no connection (any more). */
void vm_watch_lost(struct vm *vm);

/* SEQ_DONE: it is on disk; 0: cb comes when it is. -ENOMEM. */
int vm_watch_store(struct vm *vm, struct vm_watch_wait *wait,
                   void (*cb)(struct vm_watch_wait *w, const struct failure *f));

/*
 * The VM was called `from` before: what was remembered then counts. cb comes once, later, when all is stored (f NULL),
 * perhaps with a warning: the old memory was damaged. The old file stays: lineage_remove(). -EBUSY: not two at once.
 */
int vm_inherit_start(struct vm *vm, const char *from,
                     void (*cb)(struct vm *vm, void *arg, const struct failure *f, const struct failure *warning),
                     void *arg);

/* Whatever comes under that name on any disk is a new checkpoint. */
void vm_watch_forget(struct vm *vm, const char *checkpoint);
/* Our own commit may have moved its record: lineage_moved(). */
void vm_watch_moved(struct vm *vm, const char *disk, const char *checkpoint);
/* The checkpoint was removed from this disk, as far as its layers can be written; d is as it was before. */
void vm_watch_deleted(struct vm *vm, const struct disk *d, const char *checkpoint);

/* -- between vm_watch.c and vm_carry.c ----------------------------------------------------------------------------- */

void vm_watch_drop_jobs(struct job_list *jobs, struct image **targets);
void vm_carry_drop(struct vm_watch *w);
/* Of a look of our own (a vm_query's cb): the jobs that it saw. */
void vm_carry_on_look(struct vm_query *q, const struct disk_list *disks, const struct failure *f);
/* A job has begun to work. */
void vm_carry_meet_jobs(struct vm *vm);

#endif
