/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/jobs.h"

#include "backup/disks.h"
#include "backup/names.h"
#include "qmp/commands.h"

#include <errno.h>

/* The roles of a job's nodes (QEMU 7.2: block_job_add_bdrv() in block/stream.c, commit.c, mirror.c). */
#define ROLE_ACTIVE "active node" /* of stream alone */
#define ROLE_INTERMEDIATE "intermediate node"
#define ROLE_BASE "base"
#define ROLE_SOURCE "source"
#define ROLE_TARGET "target"

static int add_from(struct job *j, const char *node)
{
    char **from = reallocarray(j->from, j->nfrom + 1, sizeof(*from));

    if (!from)
        return -ENOMEM;
    j->from = from;
    from[j->nfrom] = strdup(node);
    return from[j->nfrom] ? (void)j->nfrom++, 0 : -ENOMEM;
}

static int set_to(struct job *j, const char *node, enum job_kind kind)
{
    free(j->to);
    j->to = strdup(node);
    j->kind = kind;
    return j->to ? 0 : -ENOMEM;
}

/* A mirror's source is its base, too, in some versions' words: the target decides. */
static int add_edge(struct job *j, const char *role, const char *node)
{
    if (strcmp(role, ROLE_ACTIVE) == 0)
        return set_to(j, node, JOB_STREAM);
    if (strcmp(role, ROLE_TARGET) == 0)
        return set_to(j, node, JOB_MIRROR);
    if (strcmp(role, ROLE_BASE) == 0 && !j->to)
        return set_to(j, node, JOB_COMMIT);
    if (strcmp(role, ROLE_INTERMEDIATE) == 0 || strcmp(role, ROLE_SOURCE) == 0)
        return add_from(j, node);
    return 0;
}

static void job_done(struct job *j)
{
    for (size_t i = 0; i < j->nfrom; i++)
        free(j->from[i]);
    free(j->from);
    free(j->to);
    free(j->id);
}

static int parse_job(struct json_object *graph, int64_t id, struct job *j)
{
    struct json_object *edges = qmp_get(graph, "edges");

    for (size_t i = 0; i < qmp_array_length(edges); i++) {
        struct json_object *e = json_object_array_get_idx(edges, i);
        const char *role = qmp_get_string(e, "name"),
                   *node = qmp_get_string(graph_node_of_id(graph, qmp_get_int(e, "child")), "name");

        if (qmp_get_int(e, "parent") == id && role && node && add_edge(j, role, node) < 0)
            return -ENOMEM;
    }
    return 0;
}

int jobs_parse(struct json_object *graph, struct job_list *ret_list)
{
    struct json_object *nodes = qmp_get(graph, "nodes");
    size_t n = qmp_array_length(nodes);
    struct job_list l = {0};

    if (!(l.jobs = calloc(n + 1, sizeof(*l.jobs))))
        return -ENOMEM;
    for (size_t i = 0; i < n; i++) {
        struct json_object *node = json_object_array_get_idx(nodes, i);
        const char *type = qmp_get_string(node, "type"), *name = qmp_get_string(node, "name");
        struct job *j = &l.jobs[l.njobs];

        if (!type || strcmp(type, "block-job") != 0 || !name || names_is_ours(name))
            continue;
        l.njobs++;
        if (!(j->id = strdup(name)) || parse_job(graph, qmp_get_int(node, "id"), j) < 0) {
            jobs_done(&l);
            return -ENOMEM;
        }
        if (!j->to || !j->nfrom) {
            job_done(j);
            memset(j, 0, sizeof(*j));
            l.njobs--;
        }
    }
    *ret_list = l;
    return 0;
}

void jobs_done(struct job_list *l)
{
    for (size_t i = 0; i < l->njobs; i++)
        job_done(&l->jobs[i]);
    free(l->jobs);
    *l = (struct job_list){0};
}

const struct job *jobs_find(const struct job_list *l, const char *id)
{
    for (size_t i = 0; i < l->njobs; i++) {
        if (strcmp(l->jobs[i].id, id) == 0)
            return &l->jobs[i];
    }
    return NULL;
}
