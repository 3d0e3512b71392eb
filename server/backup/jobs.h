/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * jobs: which block jobs of others are about to take layers away from a disk, read out of x-debug-query-block-graph:
 * QEMU's query-block-jobs tells a job's type, but not its nodes. No I/O here. Any one thread.
 */
#ifndef QPULL_BACKUP_JOBS_H
#define QPULL_BACKUP_JOBS_H

#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>

enum job_kind {
    JOB_STREAM, /* `from` goes into the layer above it */
    JOB_COMMIT, /* `from` goes into a layer below it, under a layer that stays on top */
    JOB_MIRROR, /* `from` is the disk's top; when the job is ready it can change over to another node, or to one below
                 */
};

struct job {
    char *id; /* owned */
    enum job_kind kind;
    char *to; /* owned: the node that stays */
    size_t nfrom;
    char **from; /* owned, and so is each: nodes that go, in no order */
};

struct job_list {
    size_t njobs;
    struct job *jobs; /* owned */
};

/* What QEMU does not tell in these words is no job here (a backup, a job of a newer QEMU). -ENOMEM */
int jobs_parse(struct json_object *graph, struct job_list *ret_list);
void jobs_done(struct job_list *l); /* zeroed is fine */
const struct job *jobs_find(const struct job_list *l, const char *id);

#endif
