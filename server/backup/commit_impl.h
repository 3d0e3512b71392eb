/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The inside of a commit, shared by commit.c (the table, the job), commit_records.c (checkpoints) and commit_files.c.
 */
#ifndef QPULL_BACKUP_COMMIT_IMPL_H
#define QPULL_BACKUP_COMMIT_IMPL_H

#include "backup/commit.h"
#include "backup/commit_plan.h"
#include "backup/rig.h"
#include "qmp/commands.h"

#include <sys/types.h>

/* An image that is merged away. */
struct commit_file {
    char *path, *node, *protocol; /* owned: protocol is the node of its file, "" if it has none */
    dev_t dev;
    ino_t ino;
    uid_t owner;
    struct failure kept; /* err: why it may not be this disk's, and is not deleted whatever comes */
    bool deleted;
};

struct commit {
    struct rig rig;
    const struct commit_ops *ops;
    void *arg;
    char *node, *top, *base; /* owned: as configured */
    bool shallow, active, delete, force;
    size_t ndead;
    char **dead;        /* owned: deleted checkpoints */
    char *still_socket; /* owned; NULL: a running QEMU */

    /* what the look has found */
    struct chain chain;
    struct commit_plan plan;
    char *top_node, *base_node, *live_node; /* owned */
    char *top_file, *base_file;             /* owned */
    size_t nfiles;
    struct commit_file *files; /* owned: the merged images, top first */
    size_t nopen;
    char **open_files; /* owned: of all nodes, after the commit */

    /* the image that a powered-off VM is started with (commit_live.c) */
    char *live_path, *new_path;     /* owned: of the old file and of the new one, as their folder knows them */
    struct json_object *new_format; /* owned: arguments of blockdev-create, until that is sent */
    char new_node[NAMES_SIZE];
    bool new_made; /* there may be a file at new_path */

    /* the job */
    char job[NAMES_SIZE], step[96];
    struct qmp_watch job_watch;
    struct {
        bool listed;
        char status[16], error[256];
        uint64_t current, total;
    } seen;                 /* by query-jobs */
    const char *wanted;     /* status that ends the wait */
    bool event_seen, armed; /* armed: between two looks at the job, the timer runs */
    bool begun;             /* the job is started, or that is on its way */
    bool finishing;         /* the command that lets the graph change is sent, or about to be */
    bool done;              /* the graph has changed */
    uint64_t changed_at_ms; /* in loop time: when the job last moved */

    /* the records, as they are when the job has copied: one result for each */
    struct chain now;
    struct commit_plan fresh;
    size_t at;
    struct commit_result *results; /* owned, as many as the fresh plan has records */
    char **made;                   /* owned: names of records that base owes to us */
    size_t nmade;

    struct failure failure, problems;
};

static inline struct commit *commit_of_rig(struct rig *r)
{
    return container_of(r, struct commit, rig);
}

static inline struct commit *commit_of_seq(struct seq *s)
{
    return commit_of_rig(rig_of_seq(s));
}

static inline struct commit *commit_of_calls(struct calls *c)
{
    return commit_of_rig(rig_of_calls(c));
}

/* Ends the step under way from a callback: with what calls_wait() or the like returned, unless a wait began. */
void commit_go_on(struct commit *c, int result, const struct failure *f);

/* Ends the wait for the job c->job to have that status. */
int commit_wait_for(struct commit *c, const char *status, struct failure *f);

/* commit_live.c */
bool commit_is_live(const struct commit *c); /* the VM is powered off, and what it is started with is committed */
bool commit_empties(const struct commit *c); /* and goes on as an empty image */
int commit_live_look(struct commit *c, struct failure *f);
int commit_step_new_file(struct seq *s, struct failure *f);
int commit_no_new_file(struct seq *s, struct failure *f);
int commit_step_new_node(struct seq *s, struct failure *f);
int commit_no_new_node(struct seq *s, struct failure *f);
int commit_step_replace(struct seq *s, struct failure *f);
void commit_live_done(struct commit *c);

/* commit_records.c */
bool commit_needs_opening(const struct commit *c);
int commit_step_open(struct seq *s, struct failure *f);
int commit_step_records(struct seq *s, struct failure *f);
int commit_step_check(struct seq *s, struct failure *f);
int commit_withdraw_before(struct seq *s, struct failure *f);
int commit_withdraw_after(struct seq *s, struct failure *f);

/* commit_files.c */
int commit_files_note(struct commit *c, struct failure *f); /* which ones, from the chain */
int commit_files_check(struct commit *c, void (*after)(struct rig *r), struct failure *f); /* waits for the disk */
int commit_step_close(struct seq *s, struct failure *f);
int commit_step_delete(struct seq *s, struct failure *f);
void commit_files_done(struct commit *c);

#endif
