/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/disks.h"

#include "backup/names.h"
#include "qmp/commands.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>

#define NS_PER_S INT64_C(1000000000)

static const struct {
    const char *name, *text;
} reasons[] = {
    [REASON_NONE] = {"NONE", "usable"},
    [REASON_NO_SUCH_CHECKPOINT] = {"NO_SUCH_CHECKPOINT", "no bitmap of that name on this disk"},
    [REASON_INCONSISTENT] = {"INCONSISTENT",
                             "QEMU stopped uncleanly, the record has holes; delete it and start from a full backup"},
    [REASON_GAP] = {"GAP", "a layer of the image has no record of that name, changes in it are not known"},
    [REASON_RESIZED] = {"RESIZED", "the disk has another size than when the record began"},
    [REASON_NOT_TRACKED] = {"NOT_TRACKED", "the image format keeps no bitmaps"},
    [REASON_BUSY] = {"BUSY", "the bitmap is in use by another operation, or does not record"},
};
static_assert(ARRAY_SIZE(reasons) == REASON_BUSY + 1, "every reason has a name and a text");

const char *reason_name(enum reason r)
{
    return reasons[r].name;
}

const char *reason_text(enum reason r)
{
    return reasons[r].text;
}

/* -- the graph ----------------------------------------------------------------------------------------------------- */

static struct json_object *graph_driver(struct json_object *graph, const char *name)
{
    struct json_object *nodes = qmp_get(graph, "nodes");

    for (size_t i = 0; i < qmp_array_length(nodes); i++) {
        struct json_object *n = json_object_array_get_idx(nodes, i);
        const char *type = qmp_get_string(n, "type"), *n_name = qmp_get_string(n, "name");

        if (name && n_name && type && strcmp(type, "block-driver") == 0 && strcmp(n_name, name) == 0)
            return n;
    }
    return NULL;
}

struct json_object *graph_node_of_id(struct json_object *graph, int64_t id)
{
    struct json_object *nodes = qmp_get(graph, "nodes");

    for (size_t i = 0; i < qmp_array_length(nodes); i++) {
        struct json_object *n = json_object_array_get_idx(nodes, i);

        if (qmp_get_int(n, "id") == id)
            return n;
    }
    return NULL;
}

const char *graph_child(struct json_object *graph, const char *node, const char *role)
{
    struct json_object *parent = graph_driver(graph, node), *edges = qmp_get(graph, "edges");

    for (size_t i = 0; parent && i < qmp_array_length(edges); i++) {
        struct json_object *e = json_object_array_get_idx(edges, i);
        const char *name = qmp_get_string(e, "name");

        if (name && strcmp(name, role) == 0 && qmp_get_int(e, "parent") == qmp_get_int(parent, "id"))
            return qmp_get_string(graph_node_of_id(graph, qmp_get_int(e, "child")), "name");
    }
    return NULL;
}

/* A graph that goes in circles is not QEMU's; this bounds the walk all the same. */
#define GRAPH_MAX_DEPTH 256

const char *graph_first_foreign(struct json_object *graph, const char *node)
{
    for (unsigned i = 0; node && names_is_ours(node); i++)
        node = i < GRAPH_MAX_DEPTH ? graph_child(graph, node, "file") : NULL;
    return node;
}

char *qdev_to_qom_path(const char *qdev)
{
    char *path = NULL;

    if (qdev[0] == '/')
        return strdup(qdev);
    return asprintf(&path, "/machine/peripheral/%s", qdev) < 0 ? NULL : path;
}

/* -- nodes and layers ---------------------------------------------------------------------------------------------- */

struct json_object *graph_named(struct json_object *named, const char *node)
{
    for (size_t i = 0; node && i < qmp_array_length(named); i++) {
        struct json_object *n = json_object_array_get_idx(named, i);
        const char *name = qmp_get_string(n, "node-name");

        if (name && strcmp(name, node) == 0)
            return n;
    }
    return NULL;
}

/*
 * A device stands on that node, perhaps by way of filters: query-block does not tell of those that a job of others puts
 * between them. What has a BlockBackend without a name is no device, but a job or an export.
 */
static bool is_stood_on(struct json_object *named, struct json_object *graph, const char *node)
{
    struct json_object *edges = qmp_get(graph, "edges");
    const char *below = graph_see_through(named, graph, node);

    for (size_t i = 0; below && i < qmp_array_length(edges); i++) {
        struct json_object *e = json_object_array_get_idx(edges, i),
                           *parent = graph_node_of_id(graph, qmp_get_int(e, "parent"));
        const char *type = qmp_get_string(parent, "type"), *name = qmp_get_string(parent, "name"),
                   *child = qmp_get_string(graph_node_of_id(graph, qmp_get_int(e, "child")), "name");

        if (!type || strcmp(type, "block-backend") != 0 || !name || !*name || !child)
            continue;
        child = graph_see_through(named, graph, child);
        if (child && strcmp(child, below) == 0)
            return true;
    }
    return false;
}

bool answers_agree(struct json_object *query_block, struct json_object *named_nodes, struct json_object *graph)
{
    struct json_object *nodes = qmp_get(graph, "nodes");
    size_t n = 0;

    for (size_t i = 0; i < qmp_array_length(nodes); i++) {
        struct json_object *node = json_object_array_get_idx(nodes, i);
        const char *type = qmp_get_string(node, "type");

        if (!type || strcmp(type, "block-driver") != 0)
            continue;
        if (!graph_named(named_nodes, qmp_get_string(node, "name")))
            return false;
        n++;
    }
    for (size_t i = 0; i < qmp_array_length(query_block); i++) {
        const char *root = qmp_get_string(qmp_get(json_object_array_get_idx(query_block, i), "inserted"), "node-name");

        if (root && !is_stood_on(named_nodes, graph, root))
            return false;
    }
    return n == qmp_array_length(named_nodes);
}

/* Filters of others that pass offsets through unchanged, so that what is below them records the same writes. */
static bool is_plain_filter(const char *driver)
{
    static const char *const filters[] = {"throttle",          "copy-on-read", "compress",  "preallocate",
                                          "copy-before-write", "mirror_top",   "commit_top"};

    for (size_t i = 0; driver && i < ARRAY_SIZE(filters); i++) {
        if (strcmp(driver, filters[i]) == 0)
            return true;
    }
    return false;
}

/* *ret_nfilters: how many nodes were seen through. */
static const char *see_through(struct json_object *named, struct json_object *graph, const char *node,
                               unsigned *ret_nfilters)
{
    const char *child;

    for (unsigned i = 0; node && i < GRAPH_MAX_DEPTH; i++) {
        *ret_nfilters = i;
        if (!names_is_ours(node) && !is_plain_filter(qmp_get_string(graph_named(named, node), "drv")))
            return node;
        child = graph_child(graph, node, "file");
        node = child ? child : graph_child(graph, node, "backing"); /* commit_top, mirror_top: of QEMU's jobs */
    }
    return NULL;
}

const char *graph_see_through(struct json_object *named, struct json_object *graph, const char *node)
{
    unsigned nfilters;

    return see_through(named, graph, node, &nfilters);
}

struct json_object *named_bitmap(struct json_object *named_node, const char *name)
{
    struct json_object *bitmaps = qmp_get(named_node, "dirty-bitmaps");

    for (size_t i = 0; i < qmp_array_length(bitmaps); i++) {
        struct json_object *b = json_object_array_get_idx(bitmaps, i);
        const char *b_name = qmp_get_string(b, "name"); /* QEMU 7.2 lists nameless ones of its own, too */

        if (b_name && strcmp(b_name, name) == 0)
            return b;
    }
    return NULL;
}

bool checkpoint_count_allocation(struct checkpoint *c, const struct image *i)
{
    if (i->level >= sizeof(c->allocation_levels) * CHAR_BIT)
        return false;
    c->allocation_levels |= UINT64_C(1) << i->level;
    return true;
}

enum reason bitmap_reason(struct json_object *b)
{
    if (qmp_get_bool(b, "inconsistent"))
        return REASON_INCONSISTENT;
    if (!qmp_get_bool(b, "recording") || qmp_get_bool(b, "busy"))
        return REASON_BUSY;
    return REASON_NONE;
}

/* A bitmap is as long as its node, and QEMU merges only bitmaps of one length. */
static enum reason judge_bitmap(struct json_object *named_node, struct json_object *b, uint64_t disk_size)
{
    enum reason reason = bitmap_reason(b);

    if (reason != REASON_INCONSISTENT &&
        (uint64_t)qmp_get_int(qmp_get(named_node, "image"), "virtual-size") != disk_size)
        reason = REASON_RESIZED;
    return reason;
}

static int checkpoint_add_layer(struct checkpoint *c, const char *node, unsigned depth, struct json_object *bitmap,
                                enum reason reason)
{
    struct layer *layers = realloc(c->layers, (c->nlayers + 1) * sizeof(*layers));

    if (!layers)
        return -ENOMEM;
    c->layers = layers;
    layers += c->nlayers;
    *layers = (struct layer){
        .node = strdup(node),
        .depth = depth,
        .merge = reason == REASON_NONE,
        .inconsistent = reason == REASON_INCONSISTENT,
        .stopped = reason != REASON_INCONSISTENT && !qmp_get_bool(bitmap, "recording"),
        .granularity = (uint64_t)qmp_get_int(bitmap, "granularity"),
        .dirty = (uint64_t)qmp_get_int(bitmap, "count"),
    };
    if (!layers->node)
        return -ENOMEM;
    c->nlayers++;
    c->reason = reason; /* the deepest one's counts: for those above it their allocation can stand in */
    c->dirty += layers->dirty;
    c->granularity = MAX(c->granularity, layers->granularity);
    return 0;
}

/*
 * Every layer that has a record is part of the answer. All layers above the deepest of them came after the checkpoint,
 * so what they have allocated is what changed in them, and it counts even where they have a record of that name:
 * nothing in QEMU tells whether that one began with the layer, or later.
 */
static int judge_checkpoint(struct json_object *named, const struct disk *d, struct checkpoint *c)
{
    unsigned deepest = 0;

    for (unsigned depth = 0; depth < d->nimages; depth++) {
        struct json_object *node = graph_named(named, d->images[depth].node), *bitmap = named_bitmap(node, c->name);
        int r = bitmap
                    ? checkpoint_add_layer(c, d->images[depth].node, depth, bitmap, judge_bitmap(node, bitmap, d->size))
                    : 0;

        if (r < 0)
            return r;
        deepest = bitmap ? depth : deepest;
    }
    for (unsigned depth = 0; depth < deepest; depth++) {
        if (!checkpoint_count_allocation(c, &d->images[depth]) && c->reason == REASON_NONE)
            c->reason = REASON_GAP;
    }
    c->dirty = MIN(c->dirty, INT64_MAX);
    return 0;
}

static int compare_checkpoints(const void *a, const void *b)
{
    return strcmp(((const struct checkpoint *)a)->name, ((const struct checkpoint *)b)->name);
}

static int add_checkpoint(struct disk *d, const char *name)
{
    struct checkpoint *c;

    if (disk_checkpoint(d, name))
        return 0;
    c = realloc(d->checkpoints, (d->ncheckpoints + 1) * sizeof(*c));
    if (!c)
        return -ENOMEM;
    d->checkpoints = c;
    c += d->ncheckpoints;
    memset(c, 0, sizeof(*c));
    if (!(c->name = strdup(name)))
        return -ENOMEM;
    d->ncheckpoints++;
    return 0;
}

/* A format's own name may be a whole JSON document. */
/* The node at the end of "file" below a node. */
static struct json_object *bottom(struct json_object *named, struct json_object *graph, const char *node)
{
    const char *below = graph_child(graph, node, "file");

    for (unsigned i = 0; below && i < GRAPH_MAX_DEPTH; i++) {
        node = below;
        below = graph_child(graph, node, "file");
    }
    return graph_named(named, node);
}

const char *graph_file(struct json_object *named, struct json_object *graph, const char *node)
{
    return qmp_get_string(qmp_get(bottom(named, graph, node), "image"), "filename") ?: "";
}

static int find_images(struct json_object *named, struct json_object *graph, struct disk *d)
{
    const char *node = d->top;
    unsigned level = 0, nfilters = 0;

    while (node && d->nimages < GRAPH_MAX_DEPTH) {
        struct image *images = realloc(d->images, (d->nimages + 1) * sizeof(*images));

        if (!images)
            return -ENOMEM;
        d->images = images;
        images += d->nimages++;
        *images = (struct image){
            .level = level,
            .node = strdup(node),
            .file = strdup(graph_file(named, graph, node)),
            .read_only = qmp_get_bool(graph_named(named, node), "ro"),
        };
        if (!images->node || !images->file)
            return -ENOMEM;
        level += nfilters + 1; /* what is allocated right below filters QEMU finds at the first of them */
        node = see_through(named, graph, graph_child(graph, node, "backing"), &nfilters);
    }
    return 0;
}

bool graph_has_levels(struct json_object *graph, const struct disk *d)
{
    const char *node = d->top;
    unsigned level = 0;

    for (size_t k = 1; k < d->nimages; k++) {
        for (unsigned i = 0; i == 0 || (node && strcmp(node, d->images[k].node) != 0); i++) {
            const char *below = graph_child(graph, node, "backing");

            node = below ? below : graph_child(graph, node, "file"); /* of filters */
            if (++level > GRAPH_MAX_DEPTH || !node || (i == 0 && level != d->images[k].level))
                return false;
        }
    }
    return true;
}

static int find_checkpoints(struct json_object *named, struct disk *d)
{
    int r;

    for (size_t k = 0; k < d->nimages; k++) {
        struct json_object *bitmaps = qmp_get(graph_named(named, d->images[k].node), "dirty-bitmaps");

        for (size_t i = 0; i < qmp_array_length(bitmaps); i++) {
            struct json_object *b = json_object_array_get_idx(bitmaps, i);
            const char *name = qmp_get_string(b, "name");

            /* A transient bitmap of somebody's job is no checkpoint: it would not outlive QEMU. */
            if (!name || names_is_ours(name) || !qmp_get_bool(b, "persistent"))
                continue;
            if ((r = add_checkpoint(d, name)) < 0)
                return r;
        }
    }
    for (size_t i = 0; i < d->ncheckpoints; i++) {
        if ((r = judge_checkpoint(named, d, &d->checkpoints[i])) < 0)
            return r;
    }
    if (d->ncheckpoints)
        qsort(d->checkpoints, d->ncheckpoints, sizeof(*d->checkpoints), compare_checkpoints);
    return 0;
}

/* -- disks --------------------------------------------------------------------------------------------------------- */

/* "/machine/peripheral/vda/virtio-backend" is known to its user as vda; a nameless device's path says nothing to
 * anybody. */
static char *name_of_qdev(const char *qdev)
{
    static const char prefix[] = "/machine/peripheral/";
    const char *id = qdev;

    if (strncmp(qdev, prefix, strlen(prefix)) == 0)
        id = qdev + strlen(prefix);
    else if (qdev[0] == '/')
        return NULL;
    return strndup(id, strcspn(id, "/"));
}

/* For a device without an id: its drive's, else the node's, longer where somebody has that name already. */
static char *choose_name(const struct disk_list *l, const char *drive, const char *node)
{
    const char *name = drive && *drive ? drive : node;
    char *longer = NULL;

    if (!disk_list_find(l, name))
        return strdup(name);
    return asprintf(&longer, "%s-%s", name, node) < 0 ? NULL : longer;
}

/* qcow2 v3 ("compat": "1.1") is the one format in QEMU that stores bitmaps. */
bool named_keeps_bitmaps(struct json_object *named_node)
{
    struct json_object *specific = qmp_get(qmp_get(named_node, "image"), "format-specific");
    const char *type = qmp_get_string(specific, "type"), *compat = qmp_get_string(qmp_get(specific, "data"), "compat");

    return type && strcmp(type, "qcow2") == 0 && compat && strcmp(compat, "0.10") != 0;
}

static int parse_disk(struct json_object *entry, struct json_object *named, struct json_object *graph, struct disk *d)
{
    struct json_object *inserted = qmp_get(entry, "inserted"), *top_node, *cache;
    const char *qdev = qmp_get_string(entry, "qdev"), *node = qmp_get_string(inserted, "node-name");
    enum names_kind kind;
    unsigned n;
    int r;

    if (!names_parse(node, d->session, &kind, &n))
        d->session[0] = '\0';
    node = graph_first_foreign(graph, node);
    if (!node)
        return -EPROTO;
    top_node = graph_named(named, graph_see_through(named, graph, node));
    if (!top_node)
        top_node = graph_named(named, node);
    if (!top_node)
        return -EPROTO;
    d->name = name_of_qdev(qdev);
    d->qdev = strdup(qdev);
    d->qom_path = qdev_to_qom_path(qdev);
    d->node = strdup(node);
    d->top = strdup(qmp_get_string(top_node, "node-name"));
    d->format = strdup(qmp_get_string(top_node, "drv") ?: "unknown");
    d->size = (uint64_t)qmp_get_int(qmp_get(graph_named(named, node), "image"), "virtual-size");
    d->tracked = named_keeps_bitmaps(top_node);
    cache = qmp_get(bottom(named, graph, d->top), "cache");
    d->host_cache = !qmp_get_bool(cache, "direct") && !qmp_get_bool(cache, "no-flush");
    if (!d->qdev || !d->qom_path || !d->node || !d->top || !d->format)
        return -ENOMEM;
    if ((r = find_images(named, graph, d)) < 0)
        return r;
    return find_checkpoints(named, d);
}

static void disk_done(struct disk *d)
{
    for (size_t i = 0; i < d->ncheckpoints; i++) {
        for (size_t k = 0; k < d->checkpoints[i].nlayers; k++)
            free(d->checkpoints[i].layers[k].node);
        free(d->checkpoints[i].layers);
        free(d->checkpoints[i].name);
    }
    for (size_t i = 0; i < d->nimages; i++) {
        free(d->images[i].node);
        free(d->images[i].file);
    }
    free(d->images);
    free(d->checkpoints);
    free(d->name);
    free(d->qdev);
    free(d->qom_path);
    free(d->node);
    free(d->top);
    free(d->format);
}

void disk_list_free(struct disk_list *l)
{
    if (!l)
        return;
    for (size_t i = 0; i < l->ndisks; i++)
        disk_done(&l->disks[i]);
    free(l->disks);
    free(l);
}

void disk_list_truncate(struct disk_list *l, size_t n)
{
    while (l->ndisks > n)
        disk_done(&l->disks[--l->ndisks]);
}

static void disk_list_freep(struct disk_list **l)
{
    disk_list_free(*l);
}

/* Writable devices with a medium; what has no device ("qdev") is nobody's disk. */
static bool takes_part(struct json_object *entry)
{
    struct json_object *inserted = qmp_get(entry, "inserted");

    return inserted && qmp_get_string(entry, "qdev") && qmp_get_string(inserted, "node-name") &&
           !qmp_get_bool(inserted, "ro");
}

/* Ids of devices come first: a drive that is called as another device's id does not take its name. */
static int name_the_nameless(struct json_object *query_block, struct disk_list *l)
{
    size_t k = 0;

    for (size_t i = 0; i < qmp_array_length(query_block); i++) {
        struct json_object *entry = json_object_array_get_idx(query_block, i);
        struct disk *d = &l->disks[k];

        if (!takes_part(entry))
            continue;
        k++;
        assert(d->node); /* parse_disk() */
        if (!d->name && !(d->name = choose_name(l, qmp_get_string(entry, "device"), d->node)))
            return -ENOMEM;
    }
    return 0;
}

int disk_list_parse(struct json_object *query_block, struct json_object *named_nodes, struct json_object *graph,
                    struct disk_list **ret_list, struct failure *f)
{
    _cleanup_(disk_list_freep) struct disk_list *l = calloc(1, sizeof(*l));
    size_t n = qmp_array_length(query_block);

    if (!l || !(l->disks = calloc(n + 1, sizeof(*l->disks))))
        return failure_set(f, -ENOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) {
        struct json_object *entry = json_object_array_get_idx(query_block, i);
        int r;

        if (!takes_part(entry))
            continue;
        if (l->ndisks >= NAMES_MAX_DISKS)
            return failure_set(f, -E2BIG, "more than %d disks", NAMES_MAX_DISKS);
        r = parse_disk(entry, named_nodes, graph, &l->disks[l->ndisks]);
        l->ndisks++;
        if (r < 0)
            return failure_set(f, r, "QEMU's answer about device '%s' is not understood: its node is in no list",
                               qmp_get_string(entry, "qdev"));
    }
    if (name_the_nameless(query_block, l) < 0)
        return failure_set(f, -ENOMEM, "out of memory");
    *ret_list = TAKE_PTR(l);
    return 0;
}

void image_stat(struct image *i)
{
    struct statx st;

    i->dev = i->ino = 0;
    i->born_ns = 0;
    if (i->file[0] != '/' || statx(AT_FDCWD, i->file, AT_STATX_DONT_SYNC, STATX_INO | STATX_BTIME, &st) < 0)
        return;
    i->dev = (uint64_t)st.stx_dev_major << 32 | st.stx_dev_minor;
    i->ino = st.stx_ino;
    if (st.stx_mask & STATX_BTIME)
        i->born_ns = st.stx_btime.tv_sec * NS_PER_S + st.stx_btime.tv_nsec;
}

void disk_list_stat(struct disk_list *l)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        for (size_t k = 0; k < l->disks[i].nimages; k++)
            image_stat(&l->disks[i].images[k]);
    }
}

const struct disk *disk_list_find(const struct disk_list *l, const char *name)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        if (l->disks[i].name && strcmp(l->disks[i].name, name) == 0)
            return &l->disks[i];
    }
    return NULL;
}

const struct checkpoint *disk_checkpoint(const struct disk *d, const char *name)
{
    for (size_t i = 0; i < d->ncheckpoints; i++) {
        if (strcmp(d->checkpoints[i].name, name) == 0)
            return &d->checkpoints[i];
    }
    return NULL;
}

const char *checkpoint_text(const struct checkpoint *c)
{
    return c->text ?: reason_text(c->reason);
}

static int copy_checkpoint(struct checkpoint *to, const struct checkpoint *from)
{
    *to = *from;
    to->nlayers = 0;
    to->name = strdup(from->name);
    to->layers = calloc(from->nlayers + 1, sizeof(*to->layers));
    if (!to->name || !to->layers)
        return -ENOMEM;
    for (; to->nlayers < from->nlayers; to->nlayers++) {
        to->layers[to->nlayers] = from->layers[to->nlayers];
        if (!(to->layers[to->nlayers].node = strdup(from->layers[to->nlayers].node)))
            return -ENOMEM;
    }
    return 0;
}

static int copy_disk(struct disk *to, const struct disk *from)
{
    *to = *from;
    to->ncheckpoints = to->nimages = 0;
    to->name = strdup(from->name);
    to->qdev = strdup(from->qdev);
    to->qom_path = strdup(from->qom_path);
    to->node = strdup(from->node);
    to->top = strdup(from->top);
    to->format = strdup(from->format);
    to->images = calloc(from->nimages + 1, sizeof(*to->images));
    to->checkpoints = calloc(from->ncheckpoints + 1, sizeof(*to->checkpoints));
    if (!to->name || !to->qdev || !to->qom_path || !to->node || !to->top || !to->format || !to->images ||
        !to->checkpoints)
        return -ENOMEM;
    while (to->nimages < from->nimages) {
        size_t i = to->nimages++;

        to->images[i] = from->images[i];
        to->images[i].node = strdup(from->images[i].node);
        to->images[i].file = strdup(from->images[i].file);
        if (!to->images[i].node || !to->images[i].file)
            return -ENOMEM;
    }
    while (to->ncheckpoints < from->ncheckpoints) {
        size_t i = to->ncheckpoints++;

        if (copy_checkpoint(&to->checkpoints[i], &from->checkpoints[i]) < 0)
            return -ENOMEM;
    }
    return 0;
}

struct disk_list *disk_list_copy(const struct disk_list *l)
{
    _cleanup_(disk_list_freep) struct disk_list *copy = calloc(1, sizeof(*copy));

    if (!copy || !(copy->disks = calloc(l->ndisks + 1, sizeof(*copy->disks))))
        return NULL;
    while (copy->ndisks < l->ndisks) {
        size_t i = copy->ndisks++;

        if (copy_disk(&copy->disks[i], &l->disks[i]) < 0)
            return NULL;
    }
    return TAKE_PTR(copy);
}
