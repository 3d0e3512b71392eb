/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/engine.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>

static const char *const names[] = {
    [ENGINE_AUTO] = "auto",
    [ENGINE_CBW] = "copy-before-write",
    [ENGINE_JOB] = "backup-job",
};
static_assert(ARRAY_SIZE(names) == ENGINE_COUNT, "every engine has a name");

/* What each cannot do without. Without on-cbw-error and cbw-timeout the guest's writes fail or wait with the copies. */
static const enum capability cbw_needs[] = {
    CAPABILITY_GRAPH, CAPABILITY_EXPORT,       CAPABILITY_SNAPSHOT_ACCESS, CAPABILITY_REOPEN,
    CAPABILITY_CBW,   CAPABILITY_CBW_ON_ERROR, CAPABILITY_CBW_TIMEOUT,
};
static const enum capability job_needs[] = {
    CAPABILITY_GRAPH,
    CAPABILITY_EXPORT,
    CAPABILITY_SNAPSHOT_ACCESS,
    CAPABILITY_JOB,
};

const char *engine_name(enum engine e)
{
    return names[e];
}

int engine_parse(const char *name, enum engine *ret_engine)
{
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (strcmp(names[i], name) == 0) {
            *ret_engine = (enum engine)i;
            return 0;
        }
    }
    return -EINVAL;
}

#define MISSING_SIZE 384

/* What is missing, in words; false: nothing. */
static bool lacks(const struct capabilities *c, const enum capability *needs, size_t nneeds, char out[MISSING_SIZE])
{
    size_t used = 0;

    out[0] = '\0';
    for (size_t i = 0; i < nneeds && used < MISSING_SIZE; i++) {
        if (!c->has[needs[i]])
            used += (size_t)snprintf(out + used, MISSING_SIZE - used, "%s%s (QEMU %s)", used ? ", " : "",
                                     capability_name(needs[i]), capability_since(needs[i]));
    }
    return used;
}

static const char *risk_of(enum engine e, const struct capabilities *c)
{
    if (e == ENGINE_CBW)
        return NULL;
    return c->has[CAPABILITY_JOB_ON_ERROR]
               ? "a guest's write waits for scratch that hangs as long as it hangs, and discards are dropped"
               : "scratch that is full pauses the guest or hands it an error, a guest's write waits for scratch that "
                 "hangs as long as it hangs, and discards are dropped";
}

int engine_choose(const struct capabilities *c, enum engine wish, const char *qemu, struct engine_choice *ret_choice,
                  struct failure *f)
{
    char no_cbw[MISSING_SIZE], no_job[MISSING_SIZE];
    bool cbw = !lacks(c, cbw_needs, ARRAY_SIZE(cbw_needs), no_cbw),
         job = !lacks(c, job_needs, ARRAY_SIZE(job_needs), no_job);
    struct engine_choice choice = {.engine = wish, .why = "--engine names it"};

    if (wish == ENGINE_AUTO && !cbw && !job)
        return failure_set(f, -ENOTSUP, "QEMU %s cannot freeze disks: it lacks %s; update QEMU to 7.1 or later", qemu,
                           no_job);
    if (wish != ENGINE_AUTO && !(wish == ENGINE_CBW ? cbw : job))
        return failure_set(f, -ENOTSUP, "QEMU %s cannot do --engine=%s: it lacks %s; say --engine=auto, or update QEMU",
                           qemu, names[wish], wish == ENGINE_CBW ? no_cbw : no_job);
    if (wish == ENGINE_AUTO) {
        choice.engine = cbw ? ENGINE_CBW : ENGINE_JOB;
        choice.why = cbw ? "QEMU has all that it needs" : "QEMU's copy-before-write lacks on-cbw-error or cbw-timeout";
    }
    choice.risk = risk_of(choice.engine, c);
    *ret_choice = choice;
    return 0;
}
