/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * engine: by which of QEMU's means a session freezes disks, and which of them it is for a QEMU
 * (docs/decisions/0011-engines.md). The tables of steps are in backup/steps.c and backup/job_steps.c. Any thread.
 */
#ifndef QPULL_BACKUP_ENGINE_H
#define QPULL_BACKUP_ENGINE_H

#include "backup/capabilities.h"

enum engine {
    ENGINE_AUTO, /* a wish only */
    ENGINE_CBW,  /* copy-before-write nodes, put in by one blockdev-reopen */
    ENGINE_JOB,  /* backup jobs with sync=none, begun in one transaction */
    ENGINE_COUNT
};
const char *engine_name(enum engine e); /* "auto", "copy-before-write", "backup-job" */
/* -EINVAL: no such name */
int engine_parse(const char *name, enum engine *ret_engine);

struct engine_choice {
    enum engine engine; /* never ENGINE_AUTO */
    const char *why;    /* static, a part of a sentence */
    const char *risk;   /* likewise: what the guest may suffer with it; NULL: nothing that is known */
};
/* -ENOTSUP: the sentence says what this QEMU (a version) lacks, and what to do. */
int engine_choose(const struct capabilities *c, enum engine wish, const char *qemu, struct engine_choice *ret_choice,
                  struct failure *f);

#endif
