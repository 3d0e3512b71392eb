/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/commit_plan.h"

#include "backup/names.h"
#include "qmp/commands.h"

#include <errno.h>

/* -- the chain ----------------------------------------------------------------------------------------------------- */

int chain_init(struct chain *c, struct json_object *named, struct json_object *graph, const char *root,
               struct failure *f)
{
    const char *node = graph_see_through(named, graph, root);

    memset(c, 0, sizeof(*c));
    if (!node)
        return failure_set(f, -EPROTO, "QEMU knows no image below node '%s'", root);
    c->named = json_object_get(named);
    c->graph = json_object_get(graph);
    while (node) {
        struct json_object *layer = graph_named(named, node);

        if (c->nlayers == CHAIN_MAX_LAYERS || !layer) {
            chain_done(c);
            return layer ? failure_set(f, -E2BIG, "node '%s' has more than %d layers", root, CHAIN_MAX_LAYERS)
                         : failure_set(f, -EPROTO, "QEMU does not list node '%s'", node);
        }
        c->layers[c->nlayers++] = layer;
        node = graph_see_through(named, graph, graph_child(graph, node, "backing"));
    }
    return 0;
}

void chain_done(struct chain *c)
{
    json_object_put(c->named);
    json_object_put(c->graph);
    memset(c, 0, sizeof(*c));
}

const char *chain_node(const struct chain *c, size_t layer)
{
    return qmp_get_string(c->layers[layer], "node-name");
}

const char *chain_file(const struct chain *c, size_t layer)
{
    const char *protocol = graph_child(c->graph, chain_node(c, layer), "file"), *name;

    /* A node whose backing was given by hand is called "json:{…}"; the node of its file has the plain name. */
    name = qmp_get_string(graph_named(c->named, protocol), "file");
    if (!name)
        name = qmp_get_string(c->layers[layer], "file");
    return name ? name : "";
}

uint64_t chain_size(const struct chain *c, size_t layer)
{
    return (uint64_t)qmp_get_int(qmp_get(c->layers[layer], "image"), "virtual-size");
}

bool chain_is_read_only(const struct chain *c, size_t layer)
{
    return qmp_get_bool(c->layers[layer], "ro");
}

int chain_find(const struct chain *c, const char *what, size_t *ret_layer, struct failure *f)
{
    size_t nfound = 0, found = 0;

    for (size_t i = 0; i < c->nlayers; i++) {
        if (strcmp(chain_node(c, i), what) == 0) {
            *ret_layer = i;
            return 0;
        }
        if (strcmp(chain_file(c, i), what) == 0) {
            nfound++;
            found = i;
        }
    }
    if (nfound > 1)
        return failure_set(f, -ENOTUNIQ, "%zu images of the disk are called '%s'; name the node", nfound, what);
    if (nfound == 0)
        return failure_set(f, -ENOENT, "the disk has no image '%s' (neither a node nor a file is called so)", what);
    *ret_layer = found;
    return 0;
}

static bool is_layer(const struct chain *c, const char *node)
{
    for (size_t i = 0; node && i < c->nlayers; i++) {
        if (strcmp(chain_node(c, i), node) == 0)
            return true;
    }
    return false;
}

const char *chain_job(const struct chain *c, const char *except)
{
    struct json_object *edges = qmp_get(c->graph, "edges");

    for (size_t i = 0; i < qmp_array_length(edges); i++) {
        struct json_object *e = json_object_array_get_idx(edges, i);
        struct json_object *parent = graph_node_of_id(c->graph, qmp_get_int(e, "parent"));
        const char *type = qmp_get_string(parent, "type"), *id = qmp_get_string(parent, "name");
        const char *child = qmp_get_string(graph_node_of_id(c->graph, qmp_get_int(e, "child")), "name");

        if (type && strcmp(type, "block-job") == 0 && id && (!except || strcmp(id, except) != 0) &&
            is_layer(c, graph_see_through(c->named, c->graph, child)))
            return id;
    }
    return NULL;
}

/* -- the records --------------------------------------------------------------------------------------------------- */

void commit_plan_done(struct commit_plan *p)
{
    for (size_t i = 0; i < p->nrecords; i++) {
        free(p->records[i].name);
        free(p->records[i].sources);
    }
    free(p->records);
    memset(p, 0, sizeof(*p));
}

struct commit_record *commit_plan_find(const struct commit_plan *p, const char *name)
{
    for (size_t i = 0; i < p->nrecords; i++) {
        if (strcmp(p->records[i].name, name) == 0)
            return &p->records[i];
    }
    return NULL;
}

static int add_record(struct commit_plan *p, const char *name)
{
    struct commit_record *records;

    if (commit_plan_find(p, name))
        return 0;
    records = realloc(p->records, (p->nrecords + 1) * sizeof(*records));
    if (!records)
        return -ENOMEM;
    p->records = records;
    memset(&records[p->nrecords], 0, sizeof(*records));
    if (!(records[p->nrecords].name = strdup(name)))
        return -ENOMEM;
    p->nrecords++;
    return 0;
}

static bool is_dead(const struct chain *c, const char *name)
{
    for (size_t i = 0; i < c->ndead; i++) {
        if (strcmp(c->dead[i], name) == 0)
            return true;
    }
    return false;
}

/* Every name that some layer holds as a checkpoint's: persistent, not ours, and not the rest of a deleted one. */
static int collect_names(struct commit_plan *p, const struct chain *c, struct failure *f)
{
    for (size_t i = 0; i < c->nlayers; i++) {
        struct json_object *bitmaps = qmp_get(c->layers[i], "dirty-bitmaps");

        for (size_t k = 0; k < qmp_array_length(bitmaps); k++) {
            struct json_object *b = json_object_array_get_idx(bitmaps, k);
            const char *name = qmp_get_string(b, "name");

            if (!name || names_is_ours(name) || !qmp_get_bool(b, "persistent") || is_dead(c, name))
                continue;
            if (i >= p->top && i <= p->base && qmp_get_bool(b, "busy"))
                return failure_set(f, -EBUSY,
                                   "the record of checkpoint '%s' on node '%s' is in use by another operation; try "
                                   "again when that has ended",
                                   name, chain_node(c, i));
            if (add_record(p, name) < 0)
                return failure_set(f, -ENOMEM, "out of memory");
        }
    }
    return 0;
}

static bool is_usable(const struct chain *c, size_t layer, const char *name)
{
    struct json_object *b = named_bitmap(c->layers[layer], name);

    return b && bitmap_reason(b) == REASON_NONE;
}

/*
 * The parts in the committed layers. QEMU merges bitmaps of one size only, and the base will have top's: a record of
 * another size is stood in for by its layer's allocation, as a missing one is.
 */
static int collect_sources(struct commit_record *r, const struct commit_plan *p, const struct chain *c, size_t deepest)
{
    /* NOLINTNEXTLINE(clang-analyzer-optin.portability.UnixAPI): the top is above the base */
    r->sources = calloc(p->base - p->top + 1, sizeof(*r->sources));
    if (!r->sources)
        return -ENOMEM;
    for (size_t i = p->top; i <= deepest && i < p->base; i++) {
        struct json_object *b = named_bitmap(c->layers[i], r->name);
        uint64_t granularity, count;

        /* A record above the deepest may be younger than its layer (0006): allocation counts, as it does in a pull. */
        r->needs_marks |= i < deepest;
        if (!is_usable(c, i, r->name) || chain_size(c, i) != chain_size(c, p->top)) {
            r->needs_marks = true;
            continue;
        }
        granularity = (uint64_t)qmp_get_int(b, "granularity");
        count = (uint64_t)qmp_get_int(b, "count");
        r->sources[r->nsources++] = chain_node(c, i);
        r->granularity = r->granularity ? MIN(r->granularity, granularity) : granularity;
        /* A finer record counts the piece at the disk's end in smaller steps. */
        r->least = MAX(r->least, count > granularity ? count - granularity : 0);
    }
    return 0;
}

static int judge(struct commit_record *r, const struct commit_plan *p, const struct chain *c)
{
    size_t deepest = 0;
    bool stays_read_only = false, tracked = named_keeps_bitmaps(c->layers[p->base]);

    for (size_t i = 0; i < c->nlayers; i++) {
        if (!named_bitmap(c->layers[i], r->name))
            continue;
        deepest = i;
        r->stays_above |= i < p->top;
        r->stays_below |= i > p->base;
        /* QEMU marks the records of an image that it may write to as in use for as long. */
        stays_read_only |= i < p->top && (i > 0 || chain_is_read_only(c, i));
    }
    r->reason = bitmap_reason(named_bitmap(c->layers[deepest], r->name));
    r->action = COMMIT_LEAVE;
    if (deepest < p->top)
        return 0;
    if (collect_sources(r, p, c, deepest) < 0)
        return -ENOMEM;
    if (deepest >= p->base) {
        /* Without a usable one the base's allocation stands in, now as before, and it will hold all that was committed.
         */
        if (is_usable(c, p->base, r->name))
            r->action = COMMIT_MERGE;
        r->needs_marks = false; /* it records from the first byte anyway */
        return 0;
    }
    r->needs_store = stays_read_only;
    if (!tracked && (r->reason == REASON_NONE || r->stays_above))
        r->action = COMMIT_DROP;
    else if (tracked && r->reason == REASON_NONE)
        r->action = COMMIT_MAKE;
    else if (r->stays_above)
        r->action = COMMIT_HUSK;
    return 0;
}

int commit_plan_make(struct commit_plan *p, const struct chain *c, size_t top, size_t base, struct failure *f)
{
    int r;

    memset(p, 0, sizeof(*p));
    p->top = top;
    p->base = base;
    r = collect_names(p, c, f);
    for (size_t i = 0; r == 0 && i < p->nrecords; i++) {
        if ((r = judge(&p->records[i], p, c)) < 0)
            (void)failure_set(f, r, "out of memory");
    }
    if (r < 0)
        commit_plan_done(p);
    return r;
}
