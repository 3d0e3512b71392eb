/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * session: one frozen instant of a VM's disks. Goes up by the step table (backup/steps), gives each disk a source and
 * its frozen maps, goes down the same table backwards. It knows no client: who may join, how long to linger and what
 * "ended well" means for a connection is the VM's business (server/vm).
 *
 * Loop thread only. Owned by the VM until session_stop(), then by itself: on_down is the last touch.
 */
#ifndef QPULL_BACKUP_SESSION_H
#define QPULL_BACKUP_SESSION_H

#include "backup/disks.h"
#include "backup/engine.h"
#include "backup/place.h"
#include "backup/quiesce.h"
#include "backup/scratch.h"
#include "qmp/client.h"
#include "source/map.h"
#include "source/source.h"

#include <uv.h>

struct session;
struct vhost_room; /* source/vhost.h */

enum session_status { SESSION_GOING_UP, SESSION_UP, SESSION_GOING_DOWN, SESSION_DOWN };
const char *session_status_name(enum session_status s);

struct session_ops {
    /* All disks are frozen and can be read. Comes at most once, never after session_stop(). */
    void (*on_up)(void *arg);
    /* There are more maps than before (session_map). Any number of times, after on_up, never after on_failed or
     * session_stop(). */
    void (*on_maps)(void *arg);
    /*
     * The frozen view is lost (set-up failed, QEMU gone, snapshot broken). Reads answer -EIO from now on. The owner
     * lets its clients go and calls session_stop(); at most once, never after it.
     */
    void (*on_failed)(void *arg, const struct failure *why);
    /* Everything is undone as far as it can be; the session is freed when this returns. problems->err != 0: something
     * may be left in QEMU, the sentence names it. */
    void (*on_down)(void *arg, const struct failure *problems);
    /* What people should hear although nothing has failed. May be NULL. */
    void (*on_note)(void *arg, const char *text);
    /* A state change or a step for the log: "GOING_UP -> UP", "step 7/12 \"add export\": …". At debug level. */
    void (*on_trace)(void *arg, const char *text);
};

struct session_config {
    uv_loop_t *loop;
    struct qmp_client *qmp;        /* borrowed until on_down */
    const char *vm;                /* name, for sentences */
    const struct disk_list *disks; /* fresh; copied */
    const char *checkpoint;        /* NAME of the provisional checkpoint, or NULL */
    const char *const *since;      /* checkpoints whose dirty maps are wanted, for all disks that have them */
    size_t nsince;
    const char *scratch_dir;       /* unused where still_socket is set, and where the next one is set */
    struct scratch_place *scratch; /* borrowed until on_down: the limits of the place; NULL: scratch_dir, without any */
    const struct place *place;     /* borrowed until on_down: scratch is made of it, and the two above are unused */
    int state_dir; /* O_PATH descriptor, borrowed until on_down: the socket of QEMU's NBD server lives there */
    /*
     * Set: the disks are images that a qemu-storage-daemon of ours holds for reading, and its NBD server listens here
     * already (file name in state_dir). Nobody can write to them, so nothing is frozen and there is no scratch.
     */
    const char *still_socket;
    enum engine engine; /* AUTO: CBW */
    bool job_breaks;    /* QEMU's backup job has on-cbw-error: ENGINE_JOB sets it to break-snapshot */
    bool narrow_reads;  /* QEMU 7.0-7.2: see source/nbd.h; also the allocation map is corrected */
    unsigned cbw_timeout_s;
    unsigned max_pause_ms;         /* how long the guest's I/O may stand still for the freeze; 0: any time */
    struct vhost_room *vhost_room; /* borrowed until all reads have ended; frozen disks are read through memory that is
                                      shared with QEMU, as far as there is room. NULL: over NBD only */
    bool give_back;                /* parts of the frozen disks may be given back (source/giveback.h) */
    unsigned call_timeout_ms;
    struct quiesce *quiesce; /* borrowed until on_down; NULL: nothing is to be quiesced */
    bool hold_shutdown;      /* QEMU is not to end before the session when its guest shuts down (backup/hold) */
    unsigned timeout_s;      /* a session that has been up for so long is given up; 0: never */
};

/* config is borrowed for the call. -EEXIST: a disk has that checkpoint already; -ENOTSUP: see the sentence. */
int session_start(const struct session_config *config, const struct session_ops *ops, void *arg,
                  struct session **ret_session, struct failure *f);

/* At any time, and twice. Waits for the call in flight, then walks back. */
void session_stop(struct session *s);
/* QEMU's monitor is lost, or the owner gives the session up: on_failed comes, later, unless it has failed already. */
void session_fail(struct session *s, const struct failure *why);
/* The frozen view of a disk is gone: session_fail() with a sentence, and no checkpoint for it. err: -ESTALE: the
 * snapshot is broken; -ENOTCONN: QEMU does not serve it any more. */
void session_lost(struct session *s, const char *disk, int err, const char *why);
/* What to say where QEMU answers reads with EINVAL. */
#define SESSION_BROKEN                                                                                              \
    "QEMU answers its reads with EINVAL, so its scratch space was full, failed or was too slow, and QEMU gave the " \
    "snapshot up"
/* Before session_stop(): this disk's part of the checkpoint is to be kept (default: dropped). */
void session_keep(struct session *s, const char *disk);

/*
 * Whether QEMU may be asked about its disks. Not while backup jobs go: QEMU up to 7.2 looks at the nodes one after the
 * other and waits in between, and a job that ends just then takes its node away (docs/decisions/0009, "Asking can
 * kill").
 */
bool session_may_ask(const struct session *s);

/* When it is down: whether this disk's part of the checkpoint has been made. */
bool session_kept(const struct session *s, const char *disk);

enum engine session_engine(const struct session *s);
const char *session_id(const struct session *s); /* e.g. "5f0c21ab" */
enum session_status session_status(const struct session *s);
const char *session_checkpoint(const struct session *s); /* or NULL */
const struct disk_list *session_disks(const struct session *s);
/* Step number and name for status pages: "7/12 add export", or "up". Borrowed until the next call. */
const char *session_step(struct session *s);
/* When the freeze was (unix time, ms), 0 before; and how long set-up took in ms. */
int64_t session_frozen_at_ms(const struct session *s);
unsigned session_setup_ms(const struct session *s);
/* Whether the guest's file systems were frozen at the cut, and for how long at most. */
bool session_quiesced(const struct session *s);
unsigned session_quiesced_ms(const struct session *s);
const struct failure *session_not_quiesced(const struct session *s); /* why not, or NULL: they are, or were not to be */
/* How the disks were frozen: all at once, one after the other while we had stopped the guest, or while others had. */
enum session_way {
    SESSION_AS_IT_IS, /* nobody writes to them */
    SESSION_REOPENED,
    SESSION_BY_JOBS,
    SESSION_STOPPED,
    SESSION_WAS_STOPPED
};
enum session_way session_way(const struct session *s);
const char *session_way_name(enum session_way way);
const char *session_way_why(const struct session *s); /* why not without the CPUs; "" */
/* How long the guest's I/O, or its CPUs, stood still for the freeze at most, and how long flushing before it took. */
uint64_t session_pause_us(const struct session *s);
unsigned session_flush_ms(const struct session *s);
/* Whether QEMU would wait now; of a guest that panics, too? */
bool session_holds(const struct session *s, bool panic);
/* Why it does not, although it was wanted; NULL: it does, or nobody wanted it. */
const char *session_hold_refused(const struct session *s);
uint64_t session_scratch_used(const struct session *s); /* bytes on the scratch file system, at the last look */

unsigned session_nshared(const struct session *s); /* disks that are read through shared memory now */

/* After a failure: the step it was at, as session_step() says it, or "up"; and the disk whose frozen view is lost, or
 * NULL. Borrowed until on_down. */
const char *session_failed_step(const struct session *s);
const char *session_lost_disk(const struct session *s);

/* While up: borrowed until session_stop(). NULL: no such disk. */
struct source *session_source(struct session *s, const char *disk);
/*
 * The frozen map of "base:allocation", "qemu:allocation-depth" or "qemu:dirty-bitmap:NAME"; NULL: not read (yet). They
 * are read while the session is up: the dirty maps of its configuration first, then base:allocation.
 */
const struct map *session_map(struct session *s, const char *disk, const char *context);
/* "qemu:allocation-depth" comes, too: it is read for who asks. While up. */
void session_want_depth(struct session *s);
/* It is not there, and on_maps brings it, unless the session fails before. */
bool session_expects_map(struct session *s, const char *disk, const char *context);

/*
 * While up: reads one more dirty map, as it is now (a superset of the frozen truth). Where the disk has no usable
 * record of that name the callback says -ENOENT. Asks queue up; session_stop() answers them with -ECANCELED.
 */
struct session_ask {
    /* private */
    void (*cb)(struct session_ask *a, const struct failure *f);
    struct session_ask *next;
    unsigned disk;
    char *since; /* owned; NULL: what the guest wrote since the freeze */
    struct session *session;
};
int session_ask_start(struct session *s, struct session_ask *a, const char *disk, const char *since,
                      void (*cb)(struct session_ask *a, const struct failure *f));
/* The callback does not come any more. Also if not under way (zeroed). */
void session_ask_forget(struct session_ask *a);

#endif
