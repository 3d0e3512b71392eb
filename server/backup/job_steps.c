/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The table of a session by QEMU's backup jobs (docs/decisions/0011-engines.md). A job with sync=none copies nothing by
 * itself; it puts a copy-before-write filter over the disk, below the device, and takes it away when it ends. Several
 * jobs in one transaction begin at one instant, and the records' merges belong to it: so there is neither a reopen nor
 * a pass-through, and no device is touched.
 *
 * The filter bears the name of our copy-before-write node, so all that comes after the freeze is the other engine's.
 */
#include "backup/hold.h"
#include "backup/steps.h"

#include "qmp/commands.h"

#include <errno.h>

/* -- the freeze ---------------------------------------------------------------------------------------------------- */

static void add_job(struct session *s, unsigned i, struct json_object *args)
{
    char job[NAMES_SIZE], scratch[NAMES_SIZE], cbw[NAMES_SIZE];

    qmp_action_backup(args, names_make(job, s->rig.id, NAMES_JOB, i), s->disks[i].disk->node,
                      names_make(scratch, s->rig.id, NAMES_SCRATCH, i), names_make(cbw, s->rig.id, NAMES_CBW, i),
                      s->job_breaks);
}

/*
 * "written" is the provisional checkpoint, as with the other engine. The checkpoint's records are kept on the scratch
 * node, which has the disk's size, until the frozen view stands: that node is made of the filter, which is made here.
 */
static void add_records(struct session *s, unsigned i, struct json_object *args)
{
    char cbw[NAMES_SIZE], scratch[NAMES_SIZE], name[NAMES_SIZE];
    struct qmp_bitmap written = {names_make(cbw, s->rig.id, NAMES_CBW, i),
                                 names_make(name, s->rig.id, NAMES_WRITTEN, 0)};

    if (s->checkpoint || s->narrow_reads)
        qmp_action_bitmap_add(args, written, s->narrow_reads ? COPY_CLUSTER : 0, false, false);
    names_make(scratch, s->rig.id, NAMES_SCRATCH, i);
    for (unsigned k = 0; k < s->nsince; k++) {
        const struct checkpoint *c = session_usable_since(s, i, s->since[k]);
        struct qmp_bitmap target = {scratch, names_make(name, s->rig.id, NAMES_SINCE, k)};

        if (c)
            qmp_action_bitmap_add(args, target, c->granularity, false, true);
        for (size_t l = 0; c && l < c->nlayers; l++) {
            struct qmp_bitmap source = {c->layers[l].node, c->name};

            if (c->layers[l].merge)
                qmp_action_bitmap_merge(args, target, &source, 1);
        }
    }
}

/*
 * The jobs first: only a backup action keeps its disk drained to the transaction's end (all versions), so the records
 * that are merged after it are those of the freeze, exactly. QEMU itself refuses a scratch file of another size.
 */
static int freeze_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    struct json_object *args = qmp_args_transaction();

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        add_job(s, i, args);
    for (unsigned i = 0; i < s->rig.ndisks; i++)
        add_records(s, i, args);
    s->cut.ns = uv_hrtime();
    calls_add(&s->rig.calls, "transaction", args, QMP_NO_FD, 0, session_on_frozen);
    return rig_wait(&s->rig, f);
}

static int access_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    char scratch[NAMES_SIZE], since[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        session_add_view(s, i, NAMES_SCRATCH);
        for (unsigned k = 0; k < s->nsince; k++) {
            if (session_usable_since(s, i, s->since[k]))
                calls_add(&s->rig.calls, "block-dirty-bitmap-remove",
                          qmp_args_strings("node", names_make(scratch, s->rig.id, NAMES_SCRATCH, i), "name",
                                           names_make(since, s->rig.id, NAMES_SINCE, k), NULL),
                          QMP_NO_FD, i, NULL);
        }
    }
    return rig_wait(&s->rig, f);
}

/* -- the table ----------------------------------------------------------------------------------------------------- */

/*
 * "compare layers" comes after the freeze: a snapshot of others right before it would have put the filter on what is a
 * backing image by now, where no write of the guest comes by. The frozen view goes before the job: QEMU would put it on
 * the disk itself.
 */
const struct seq_step session_job_steps[] = {
    {"hold", rig_hold, rig_no_hold, NULL},
    {"ask run state", step_run_state, NULL, NULL},
    {"ask guest agent", step_agent_up, step_agent_down, NULL},
    {"pass scratch files", step_scratch_up, rig_no_fds, NULL},
    {"add scratch nodes", step_scratch_nodes_up, rig_no_scratch_nodes, NULL},
    {"compare disks", step_compare_disks, NULL, NULL},
    {"mark guest", step_mark_up, step_mark_down, NULL},
    {"quiesce guest", step_quiesce_up, step_quiesce_down, NULL},
    {"freeze", freeze_up, rig_no_jobs, NULL},
    {"thaw guest", step_thaw_up, NULL, NULL},
    {"unmark guest", step_unmark_up, NULL, NULL},
    {"compare layers", step_compare_layers, step_let_go, NULL},
    {"add snapshot-access", access_up, rig_no_access, NULL},
    {"start NBD server", rig_server_up, rig_server_down, NULL},
    {"drop sockets", NULL, step_vhost_sockets_down, NULL},
    {"add exports", step_exports_up, rig_no_exports, NULL},
    {"open sources", step_sources_up, step_close_sources, step_probe_and_close},
    {"let go of scratch", NULL, step_let_go, step_let_go},
    {"keep checkpoint", NULL, step_keep_undo, step_keep},
};
const unsigned session_njob_steps = ARRAY_SIZE(session_job_steps);
