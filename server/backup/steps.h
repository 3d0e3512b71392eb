/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * steps: the table by which a session goes up and down, and its inside. Only session.c, steps.c, job_steps.c, still.c
 * and the files of single steps include this. The order of the rows is mandatory (docs/decisions/0002-freeze.md) and
 * every row's undo makes its things absent.
 */
#ifndef QPULL_BACKUP_STEPS_H
#define QPULL_BACKUP_STEPS_H

#include "backup/reopen.h"
#include "backup/rig.h"
#include "backup/session.h"
#include "source/ahead.h"
#include "source/nbd.h"

/* The copy granularity of a copy-before-write node over a raw file (QEMU: BLOCK_COPY_CLUSTER_SIZE_DEFAULT,
 * block/block-copy.c). */
#define COPY_CLUSTER 65536u

/* From the end of an export until the monitor must have said why; then the session fails without knowing. */
#define SESSION_LAST_WORDS_MS 1000u

#define DIRTY_CONTEXT "qemu:dirty-bitmap:"
#define ALLOCATION_CONTEXT "base:allocation"
#define DEPTH_CONTEXT "qemu:allocation-depth"

struct named_map {
    char *context;   /* owned */
    struct map *map; /* owned */
    bool ready;      /* clients may have it */
};

struct session_disk {
    const struct disk *disk; /* borrowed from the session's list */
    int scratch_fd;          /* -1: none */
    int64_t fdset_id;
    uint32_t cluster; /* bytes that QEMU copies at once; 0: it does not say */
    bool lost;        /* its frozen view can no longer be read */
    bool keep;        /* its part of the checkpoint is to be kept */
    bool keepable;    /* keep.c: the first half of keeping went well */
    char *keep_node;  /* owned: where the checkpoint's bitmap is made */
    struct source *source;
    struct source *bare;   /* part of source: what never answers from memory; for looks at the frozen view */
    struct source *ahead;  /* part of source: what reads ahead; NULL: nothing does */
    struct source *giving; /* part of source: what gives back; NULL: nothing does */
    struct source_nbd_open *opening;
    struct {
        int listen_fd, fd;   /* owned; -1: none. QEMU's end, until QEMU has it, and ours, until the source has it */
        bool serves;         /* reads go through it */
        bool closing;        /* the step under way waits for opening to end */
        struct source *pair; /* borrowed: is in source */
        struct source_vhost_open *opening;
    } vhost;             /* shared.c */
    struct map *layers;  /* owned: at which depth, from 1, the live disk has its data; NULL: not needed */
    struct map *below;   /* owned: what is allocated in backing files only; NULL: not known yet */
    struct map *written; /* owned: what the guest may have written before the maps were read; NULL: not needed */
    size_t nmaps;
    struct named_map *maps; /* owned */
    /* the probe before a checkpoint is kept */
    struct source_read probe;
    char probe_buffer[512];
    /* the same while it is up: look.c */
    struct source_read look;
    char look_buffer[512];
    bool looking;
    struct session *session; /* borrowed: ours */
};

struct session {
    struct rig rig;              /* walks the table */
    struct rig late;             /* reads maps (late.h); same id */
    bool late_running;           /* only at the table's top */
    bool mapping;                /* it is the first of these walks, which reads all maps of the freeze */
    bool mapped;                 /* all of them are there but for the depth's */
    bool wants_depth;            /* somebody asks for that one, too: it costs QEMU as much as all others together … */
    bool depth_pass;             /* … and comes, or has come, in a walk of its own */
    bool merged;                 /* of it: what the guest has written may be merged into bitmaps of ours */
    struct session_ask *asks;    /* queue; the first is under way */
    struct session_ask stand_in; /* for one that was forgotten while under way */
    struct failure ask_failure;
    struct map *late_map; /* of an ask */
    struct source_nbd_map *late_reading;

    enum session_status status;
    const struct session_ops *ops;
    void *arg;
    bool failed, stop_wanted;
    bool walked;        /* the walk is over, and with it the last callback of the sequence */
    uv_timer_t tell;    /* tells the owner of a failure from the loop */
    uv_timer_t look;    /* look.c */
    unsigned timeout_s; /* 0: none */
    struct failure failure;
    struct failure problems;

    char *vm, *checkpoint, *scratch_dir; /* owned */
    struct scratch_place *scratch;       /* borrowed, or NULL */
    const struct place *place;           /* borrowed, or NULL: no files of ours, and no limits */
    unsigned next_place;                 /* the disk whose place is being opened */
    struct scratch_user scratch_user;    /* inside while the files stand */
    struct scratch_file *scratch_files;  /* owned; list->ndisks */
    char *server_socket;                 /* owned */
    struct disk_list *list;              /* owned */
    struct session_disk *disks;          /* owned; list->ndisks */
    size_t nsince;
    char **since;                /* owned */
    bool still;                  /* walks session_still_steps */
    struct reopen reopen;        /* of them */
    enum engine engine;          /* of what is not still: CBW walks session_steps, JOB session_job_steps */
    struct qmp_watch jobs_watch; /* JOB: somebody else may end a job of ours */
    bool job_breaks;             /* QEMU's backup job has on-cbw-error */
    struct quiesce *quiesce;     /* borrowed, or NULL */
    bool marked;                 /* quiesce_steps.c: the mark may stand in QEMU */
    bool quiesced;
    struct failure not_quiesced; /* why not; err 0: it is, or has not been tried yet, or was not wanted */
    unsigned quiesced_ms;
    struct vhost_room *vhost_room; /* borrowed; NULL: nothing is shared with this QEMU */
    bool vhost_fd_passed;          /* QEMU may still have a socket of ours under its name */
    bool shared_noted;
    bool narrow_reads;
    unsigned cbw_timeout_s;
    bool give_back;
    struct ahead_pool ahead_pool;
    unsigned npending; /* opens, maps, closes of the step under way */
    struct failure step_failure;
    struct {
        uint64_t step_ns, round_ns; /* when these began */
        uint64_t all_ns;            /* spent in all steps */
        unsigned nrounds;           /* of the step under way */
        unsigned slowest;           /* disk, in the last round */
        bool ahead;                 /* it is not the one right before the freeze */
        unsigned nmissed;           /* disks whose file could not be synced in the last round */
    } flush;
    unsigned max_pause_ms; /* 0: any */
    struct {
        enum session_way way;
        struct failure refusal; /* what QEMU said to blockdev-reopen */
        uint64_t ns;            /* when the command was sent that stops the guest's I/O */
        unsigned nset;
        bool stopped, resumed;  /* what was heard: STOP at all, RESUME before the last device was switched */
        bool running;           /* query-status: before stop, or at the end of what others have stopped */
        char status[24];        /* of the stopped guest */
        struct qmp_watch watch; /* of all events */
    } cut;
    uint64_t pause_us;
    int64_t frozen_at_ms;
    uint64_t began_ns, up_ns;
    char step_text[96];
    char failed_step[96]; /* where it was when it failed */
};

static inline struct session *session_of_seq(struct seq *s)
{
    return container_of(rig_of_seq(s), struct session, rig);
}

static inline struct session *session_of_calls(struct calls *c)
{
    return container_of(rig_of_calls(c), struct session, rig);
}

extern const struct seq_step session_steps[];
extern const unsigned session_nsteps;
/* job_steps.c: by QEMU's backup jobs. */
extern const struct seq_step session_job_steps[];
extern const unsigned session_njob_steps;
/* still.c: of images that nobody writes to. */
extern const struct seq_step session_still_steps[];
extern const unsigned session_nstill_steps;

/* Whether that disk's record since session->since[k] can carry an incremental. */
const struct checkpoint *session_usable_since(const struct session *s, unsigned disk, const char *since);
/* Somebody took a snapshot: the layer is not `was->top` any more. now: NULL: none. -ESTALE */
int session_other_layer(const struct disk *was, const char *now, struct failure *f);
/* Whether some usable checkpoint of that disk has to be filled in from what upper layers have allocated. */
bool session_needs_allocation(const struct session *s, unsigned disk);
/* The node that is exported: the frozen view, or the image itself. Returns name, or what is borrowed from the disk. */
const char *session_view(const struct session *s, unsigned disk, char name[NAMES_SIZE]);
/* A step's waits on sources and maps: one ends. */
void session_one_done(struct session *s, const struct failure *f);
/* All that a step wanted to start was started, or has left its failure: what the step function returns. */
int session_begun(struct session *s, struct failure *f);
int session_add_map(struct session *s, unsigned disk, const char *context, struct map *map /* given */);
/* Also one that is not finished yet; or NULL. */
const struct map *session_any_map(const struct session_disk *d, const char *context);

/* session.c: QEMU has closed the connection to its export. The session fails as soon as the monitor says why. */
void session_lost_export(struct session_disk *d, const char *why);
/* session.c: the scratch files stand; from now on they are watched. */
void session_watch_scratch(struct session *s);

/* steps.c: shared with job_steps.c */
int step_scratch_up(struct seq *q, struct failure *f);
int step_scratch_nodes_up(struct seq *q, struct failure *f);
int step_run_state(struct seq *q, struct failure *f);      /* is it this QEMU that has the disks? */
int step_compare_disks(struct seq *q, struct failure *f);  /* before the freeze: node and size */
int step_compare_layers(struct seq *q, struct failure *f); /* device, node and top are those that we were told of */
/* A calls_ret_cb of the command that freezes. */
int session_on_frozen(struct calls *c, unsigned index, struct json_object *ret, struct failure *f);
/* Sends for the frozen view of one disk and for its temporary bitmaps, which `holder` has kept from the freeze on. */
void session_add_view(struct session *s, unsigned disk, enum names_kind holder);

/* look.c: from now on, until session_stop(), the session is looked after. */
void session_look_start(struct session *s);
void session_look_stop(struct session *s);

/* steps.c: shared with job_steps.c and still.c */
int step_exports_up(struct seq *q, struct failure *f);
int step_sources_up(struct seq *q, struct failure *f);

/* shared.c: the views are read through shared memory, too, where QEMU does it */
int step_vhost_sockets_down(struct seq *q, struct failure *f); /* on the way down, after the exports */
void session_pair_source(struct session_disk *d);
void session_close_vhost(struct session_disk *d); /* adds to npending what has to be waited for */

/* flush.c */
int step_live_exports_up(struct seq *q, struct failure *f);
int step_flush_ahead_up(struct seq *q, struct failure *f);
int step_flush_up(struct seq *q, struct failure *f);

/* cut.c */
void session_set_drives(struct session *s, enum names_kind kind, calls_ret_cb on_ret); /* adds to rig.calls */
int step_freeze_up(struct seq *q, struct failure *f);
int step_settle_up(struct seq *q, struct failure *f);

/* maps.c: the maps of the freeze are read while the session is up already. */
void session_maps_start(struct session *s);
void session_late_next(struct session *s);   /* late.c: begins what waits */
void session_late_cancel(struct session *s); /* asks.c */
/* session.c: a walk of these has ended; a stop may be waiting for that. */
void session_late_idle(struct session *s);

/* quiesce_steps.c: rows for any engine's table */
int step_agent_up(struct seq *q, struct failure *f); /* before anything is built */
int step_agent_down(struct seq *q, struct failure *f);
int step_mark_up(struct seq *q, struct failure *f); /* right before the cut: these two */
int step_mark_down(struct seq *q, struct failure *f);
int step_quiesce_up(struct seq *q, struct failure *f);
int step_quiesce_down(struct seq *q, struct failure *f);
int step_thaw_up(struct seq *q, struct failure *f); /* right after the cut: these two */
int step_unmark_up(struct seq *q, struct failure *f);
/* scratch_steps.c */
int step_places_up(struct seq *q, struct failure *f); /* scratch nodes that are no files of ours */
int step_let_go(struct seq *q, struct failure *f);    /* nothing in QEMU waits for scratch any more */

/* keep.c */
int step_probe_and_close(struct seq *q, struct failure *f);
int step_close_sources(struct seq *q, struct failure *f);
int step_keep(struct seq *q, struct failure *f);
int step_keep_undo(struct seq *q, struct failure *f);
/* This disk's checkpoint will not be: the sentence goes to the session's problems. */
void session_drop_keep(struct session *s, struct session_disk *d, const char *why);

#endif
