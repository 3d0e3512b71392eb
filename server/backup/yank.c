/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Scratch at the other end of a network connection: it is cut where it stands, so that no copy hangs on it any more.
 * Whatever drains waits for copies in flight, and the guest stands still meanwhile, for as long as the other end likes
 * (all versions). Nobody needs the data any more by then.
 */
#include "backup/rig.h"
#include "qmp/commands.h"

#define NODES_MAX 256u /* that our scratch nodes are made of; what is past it is not cut */
#define INSTANCES 0    /* r->answers: of query-yank */
#define GRAPH 2        /* and of x-debug-query-block-graph */

struct parts {
    int64_t ids[NODES_MAX];
    const char *names[NODES_MAX]; /* borrowed from the graph */
    unsigned n;
};

static bool is_part(const struct parts *p, int64_t id)
{
    for (unsigned i = 0; i < p->n; i++) {
        if (p->ids[i] == id)
            return true;
    }
    return false;
}

static void add_part(struct parts *p, struct json_object *node)
{
    int64_t id = qmp_get_int(node, "id");

    if (p->n == NODES_MAX || is_part(p, id))
        return;
    p->ids[p->n] = id;
    p->names[p->n++] = qmp_get_string(node, "name");
}

static struct json_object *node_of_id(struct json_object *nodes, int64_t id)
{
    for (size_t i = 0; i < qmp_array_length(nodes); i++) {
        if (qmp_get_int(json_object_array_get_idx(nodes, i), "id") == id)
            return json_object_array_get_idx(nodes, i);
    }
    return NULL;
}

/* The scratch nodes of this rig, and what came with them: a node that has a name was made by somebody else. */
static void find_parts(const struct rig *r, struct parts *p)
{
    struct json_object *nodes = qmp_get(r->answers[GRAPH], "nodes"), *edges = qmp_get(r->answers[GRAPH], "edges");
    unsigned before;

    for (size_t i = 0; i < qmp_array_length(nodes); i++) {
        struct json_object *node = json_object_array_get_idx(nodes, i);
        char id[NAMES_ID_SIZE];
        enum names_kind kind;
        unsigned n;

        if (names_parse(qmp_get_string(node, "name"), id, &kind, &n) && kind == NAMES_SCRATCH && strcmp(id, r->id) == 0)
            add_part(p, node);
    }
    do {
        before = p->n;
        for (size_t i = 0; i < qmp_array_length(edges); i++) {
            struct json_object *e = json_object_array_get_idx(edges, i),
                               *child = node_of_id(nodes, qmp_get_int(e, "child"));
            const char *name = qmp_get_string(child, "name");

            if (is_part(p, qmp_get_int(e, "parent")) && name && *name == '#')
                add_part(p, child);
        }
    } while (p->n > before);
}

static void on_yanked(struct calls *c, const struct failure *f)
{
    rig_step_done(c, NULL); /* a connection that went by itself meanwhile is as good */
}

static void on_looked_up(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    _cleanup_free_ struct parts *p = calloc(1, sizeof(*p));
    struct json_object *instances = json_object_new_array(), *args;
    struct failure next = {0};

    if (!f && p)
        find_parts(r, p);
    for (size_t i = 0; !f && p && i < qmp_array_length(r->answers[INSTANCES]); i++) {
        struct json_object *instance = json_object_array_get_idx(r->answers[INSTANCES], i);
        const char *node = qmp_get_string(instance, "node-name");

        for (unsigned k = 0; node && k < p->n; k++) {
            if (p->names[k] && strcmp(p->names[k], node) == 0)
                (void)json_object_array_add(instances, json_object_get(instance));
        }
    }
    rig_drop_answers(r);
    if (qmp_array_length(instances) == 0) {
        json_object_put(instances);
        rig_step_done(c, NULL);
        return;
    }
    args = json_object_new_object();
    (void)json_object_object_add(args, "instances", instances);
    calls_add(&r->calls, "yank", args, QMP_NO_FD, 0, NULL);
    if (calls_wait(&r->calls, on_yanked, &next) != 0)
        rig_step_done(c, NULL);
}

/* What cannot be asked is not cut: what comes after it says what is wrong. */
int rig_cut_scratch(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);

    rig_drop_answers(r);
    calls_add(&r->calls, "query-yank", NULL, QMP_NO_FD, INSTANCES, rig_keep_answer);
    calls_add(&r->calls, "x-debug-query-block-graph", NULL, QMP_NO_FD, GRAPH, rig_keep_answer);
    return calls_wait(&r->calls, on_looked_up, f);
}
