/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * disks: what a QEMU says about its disks and their checkpoints, read out of query-block, query-named-block-nodes and
 * x-debug-query-block-graph. A snapshot of knowledge: asked anew whenever it matters. No I/O here. Any one thread.
 */
#ifndef QPULL_BACKUP_DISKS_H
#define QPULL_BACKUP_DISKS_H

#include "backup/names.h"
#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>

/* Why a checkpoint's record on one disk cannot carry an incremental; the names are the contract's. */
enum reason {
    REASON_NONE, /* usable */
    REASON_NO_SUCH_CHECKPOINT,
    REASON_INCONSISTENT, /* unclean stop of QEMU */
    REASON_GAP,          /* a layer of the image without the record, and nothing to fill it in from */
    REASON_RESIZED,
    REASON_NOT_TRACKED, /* the format keeps no bitmaps */
    REASON_BUSY,        /* in use by another operation, or not recording */
};
const char *reason_name(enum reason r); /* "NONE" for usable */
/* One sentence for people. */
const char *reason_text(enum reason r);

/* A node that holds a bitmap of a checkpoint's name. */
struct layer {
    char *node;           /* owned */
    unsigned depth;       /* in disk.images */
    bool merge;           /* its record can be read; else its allocation stands in for it, or nothing can */
    bool inconsistent;    /* QEMU stopped uncleanly */
    bool stopped;         /* somebody disabled it: it does not record */
    uint64_t granularity; /* bytes */
    uint64_t dirty;       /* bytes */
};

struct checkpoint {
    char *name; /* owned */
    enum reason reason;
    const char *text;     /* static: more than reason_text() could say, or NULL */
    uint64_t granularity; /* bytes */
    uint64_t dirty;       /* bytes changed since, upper bound; of the bitmaps alone */
    size_t nlayers;
    struct layer *layers; /* owned: top first */
    /*
     * Bit k: what the image at level k (0: the top) has allocated is part of the record. So it is for every layer above
     * the deepest one with a bitmap of this name: it came after the checkpoint, whatever was written since is allocated
     * in it, and a bitmap of that name in it may have begun later than the layer.
     */
    uint64_t allocation_levels;
};

/* One layer of a disk: an image file without the filters above it. */
struct image {
    char *node;     /* owned */
    unsigned level; /* where qemu:allocation-depth, from 0, tells of it: filters between images above it are counted */
    char *file;     /* owned: as QEMU calls what it has open, "" when it says nothing */
    bool read_only;
    /* Of the file, where it can be seen from here (disk_list_stat()), else 0. */
    uint64_t dev, ino;
    int64_t born_ns;
};

/* false: it lies too deep. */
bool checkpoint_count_allocation(struct checkpoint *c, const struct image *i);

struct disk {
    char *name;     /* owned: qdev id, else drive id, else node name */
    char *qdev;     /* owned: as query-block says it */
    char *qom_path; /* owned: absolute, for qom-set */
    char *node;     /* owned: the device's root node; the filters of a session go on top of it */
    char *top;      /* owned: the first node below filters of others (throttle, …): its bitmaps are the checkpoints */
    char *format;   /* owned: driver of top, e.g. "qcow2" */
    uint64_t size;  /* bytes */
    bool host_cache; /* what the guest writes may wait in the host's memory for a flush: a flush may take long */
    bool tracked;    /* can keep a checkpoint over a restart */
    bool iothread;   /* its I/O runs in an iothread, as far as QEMU tells */
    char session[NAMES_ID_SIZE]; /* whose node is the device's root now, "" where it is none of ours */
    size_t nimages;
    struct image *images; /* owned: top first; images[0].node is top */
    size_t ncheckpoints;
    struct checkpoint *checkpoints; /* owned, by name */
};

struct disk_list {
    size_t ndisks;
    struct disk *disks; /* owned, in QEMU's order */
};

/*
 * Reads the three answers (borrowed). Writable devices with a medium count; names are unique ("vda", else the node name
 * is added). Nodes of ours (backup/names) are seen through: a disk under a session is shown with its own node. -EPROTO,
 * -ENOMEM.
 */
int disk_list_parse(struct json_object *query_block, struct json_object *named_nodes, struct json_object *graph,
                    struct disk_list **ret_list, struct failure *f);
void disk_list_free(struct disk_list *l); /* NULL is fine */
/*
 * Whether the answers speak of the same nodes, and of devices on the same ones (query_block NULL: those of images,
 * which QEMU did not give): if not, one came before a change and one after it; ask anew.
 */
bool answers_agree(struct json_object *query_block, struct json_object *named_nodes, struct json_object *graph);

/* Looks after the files of all images. This waits for file systems: for a worker thread. */
void disk_list_stat(struct disk_list *l);
void image_stat(struct image *i);

/* Keeps the first n disks. */
void disk_list_truncate(struct disk_list *l, size_t n);
/* A copy of its own, e.g. for a session. NULL: out of memory. */
struct disk_list *disk_list_copy(const struct disk_list *l);

const struct disk *disk_list_find(const struct disk_list *l, const char *name);
const struct checkpoint *disk_checkpoint(const struct disk *d, const char *name); /* NULL: none of that name */
/* Why it can or cannot be used, one sentence. */
const char *checkpoint_text(const struct checkpoint *c);

/*
 * x-debug-query-block-graph, asked by name: the child of `node` in that role ("file", "backing", "target", …), or NULL.
 * Borrowed from graph.
 */
const char *graph_child(struct json_object *graph, const char *node, const char *role);
/* Its node of that number (an edge's "parent" or "child"), jobs and devices included. Borrowed, or NULL. */
struct json_object *graph_node_of_id(struct json_object *graph, int64_t id);
/*
 * Whether qemu:allocation-depth, asked of d's top, tells of all images at the levels that are known: no layer and no
 * filter, of a job perhaps, has come between them or gone.
 */
bool graph_has_levels(struct json_object *graph, const struct disk *d);
/* Below `node` along "file": the first node that is not ours; `node` itself if it is not. NULL: there is none. */
const char *graph_first_foreign(struct json_object *graph, const char *node);
/* The name of the file at the end of "file" below a node, "" when QEMU does not say. Borrowed from named_nodes. */
const char *graph_file(struct json_object *named_nodes, struct json_object *graph, const char *node);
/* query-named-block-nodes: the node of that name. Borrowed from named, or NULL. */
struct json_object *graph_named(struct json_object *named, const char *node);
/* `node` itself, or the first below it that is neither ours nor a filter that leaves offsets alone. NULL: none. */
const char *graph_see_through(struct json_object *named, struct json_object *graph, const char *node);
/* Of a node out of query-named-block-nodes: its bitmap of that name, borrowed, or NULL; and whether it stores them. */
struct json_object *named_bitmap(struct json_object *named_node, const char *name);
bool named_keeps_bitmaps(struct json_object *named_node);
enum reason bitmap_reason(struct json_object *bitmap);
/* The absolute QOM path of query-block's "qdev". Owned by the caller; NULL: out of memory. */
char *qdev_to_qom_path(const char *qdev);

#endif
