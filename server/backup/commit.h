/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * commit: a block commit through which checkpoints stay right: the data of the layers from top down to above base goes
 * into base by QEMU's job, and so do their records (docs/decisions/0007-commit.md). It needs a QMP connection and the
 * name of the disk's node, nothing more: a running QEMU and a qemu-storage-daemon are alike to it.
 *
 * The caller sees to it that nothing else of ours works on the disk, and owns the commit from commit_start() to
 * commit_free(), which may come in or after on_end. Loop thread only.
 */
#ifndef QPULL_BACKUP_COMMIT_H
#define QPULL_BACKUP_COMMIT_H

#include "qmp/client.h"

#include <uv.h>

struct commit;

#define COMMIT_NEW_ENDING ".qpull-new" /* of a file that is to take the place of the one that it is named after */

/* What has become of one checkpoint. */
enum commit_state {
    COMMIT_KEPT,     /* as usable as it was */
    COMMIT_UNUSABLE, /* as unusable as it was */
    COMMIT_BROKEN,   /* this commit has spoiled it: to be marked so */
};

struct commit_result {
    char *checkpoint; /* owned by the commit */
    enum commit_state state;
    struct failure why; /* not of KEPT */
};

struct commit_config {
    uv_loop_t *loop;
    struct qmp_client *qmp;
    const char *node;       /* the disk's root node */
    const char *top, *base; /* node or file names; NULL: the live image, and the deepest (shallow: the one below top) */
    bool shallow;
    bool active; /* must be said exactly when top is the live image: the guest goes on in base */
    bool delete; /* the merged images' files, when all is done */
    bool force;  /* checkpoints may be lost where base keeps no bitmaps */
    /* Checkpoints that were deleted: what layers hold of them goes with the layer, and out of base. */
    const char *const *dead;
    size_t ndead;
    unsigned timeout_ms; /* of one QMP command */
    /*
     * The images are those of a powered-off VM: a qemu-storage-daemon holds them for reading, and its NBD server
     * listens at that name in that directory (an O_PATH descriptor). NULL: a running QEMU.
     */
    const char *still_socket;
    int still_dir;
};

struct commit_ops {
    /* The wishes make sense and are possible; the job begins. Comes at most once. */
    void (*on_started)(void *arg);
    /* The last touch. f NULL: committed. problems->err: something of ours is left in QEMU, or a file was not deleted.
     */
    void (*on_end)(void *arg, const struct failure *f, const struct failure *problems);
    void (*on_trace)(void *arg, const char *text); /* debug */
};

/* config is borrowed for the call, its strings are copied; loop, qmp and ops for the commit's life. */
int commit_start(const struct commit_config *config, const struct commit_ops *ops, void *arg, struct commit **ret,
                 struct failure *f);
/* At any time, and twice. Once the graph is about to change it is too late, and the commit ends well. */
void commit_cancel(struct commit *c);
void commit_free(struct commit *c); /* NULL is fine */

const char *commit_job(const struct commit *c); /* the job's id in QEMU, and everywhere */
/* For people: "5/9 copy". Borrowed until the next call. */
const char *commit_step(struct commit *c);
/*
 * Whether QEMU may be asked about its disks now: it copies, and the end of the job is ours to call; or that is past.
 * QEMU 7.2 crashes on query-block when a commit ends just then.
 */
bool commit_may_ask(const struct commit *c);
/* Bytes of QEMU's own reckoning; total may grow while the guest writes. */
void commit_progress(const struct commit *c, uint64_t *ret_current, uint64_t *ret_total);
/* Known from on_started on; borrowed. */
const char *commit_base_node(const struct commit *c), *commit_base_file(const struct commit *c);
const char *commit_top_node(const struct commit *c), *commit_top_file(const struct commit *c);
/* For people: the node of a running QEMU, the file of a powered-off VM. */
const char *commit_base_name(const struct commit *c), *commit_top_name(const struct commit *c);
/* The node that was asked for is gone, whatever became of it: the images are to be opened anew. */
bool commit_has_closed(const struct commit *c);
/* The image that a powered-off VM is started with, which is an empty overlay on base now; NULL: there is none. */
const char *commit_emptied(const struct commit *c);
/* By checkpoint; whole when the commit has ended well, else empty. */
size_t commit_nresults(const struct commit *c);
const struct commit_result *commit_result_at(const struct commit *c, size_t i);
/* Files that were deleted. */
size_t commit_ndeleted(const struct commit *c);
const char *commit_deleted_at(const struct commit *c, size_t i);

#endif
