/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The flush ahead. blockdev-reopen flushes the disks while they are drained, and the guest's I/O waits for that; so
 * does every drain on the way there that meets a flush of the guest's own. What the host holds back of their images is
 * therefore written out before, while the guest works: by NBD flushes through temporary exports of the live disks, the
 * one flush of QEMU's that its main loop does not stand still for (docs/decisions/0012-pause.md).
 */
#include "backup/steps.h"
#include "qmp/commands.h"

#include <errno.h>

/* Each round has what was written during the last one; one that takes so long, or less, leaves nothing to gain. */
#define FLUSH_WORTH_MS 20u
#define FLUSH_ROUNDS_MAX 5u
#define FLUSH_ALL_MS 30000u /* no round begins after so long */

int step_live_exports_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);
    char export[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (!s->disks[i].disk->host_cache)
            continue;
        names_make(export, s->rig.id, NAMES_LIVE, i);
        calls_add(&s->rig.calls, "block-export-add",
                  qmp_args_export_add(export, s->disks[i].disk->node, export, false, NULL, 0), QMP_NO_FD, i, NULL);
    }
    return rig_wait(&s->rig, f);
}

void session_drop_live_exports(struct session *s)
{
    char export[NAMES_SIZE];

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (s->disks[i].disk->host_cache)
            calls_add(&s->rig.calls, "block-export-del",
                      qmp_args_export_del(names_make(export, s->rig.id, NAMES_LIVE, i)), QMP_NO_FD, i, NULL);
    }
}

static unsigned ms_since(uint64_t ns)
{
    return (unsigned)((uv_hrtime() - ns) / 1000000);
}

static int begin_round(struct session *s, struct failure *f);

/* Whether the freeze may take as long as the last flush did, which is all that is known of it. */
static int judge(const struct session *s, unsigned took_ms, struct failure *f)
{
    if (s->max_pause_ms == 0 || took_ms <= s->max_pause_ms)
        return 0;
    return failure_set(f, -EBUSY,
                       "the guest's I/O would stand still for about %u ms, longer than the %u that --max-pause allows: "
                       "so long takes a flush of disk '%s' at the %u. try; pull when the guest writes less, use a "
                       "cache mode without host cache (none, directsync) for it, or raise --max-pause",
                       took_ms, s->max_pause_ms, s->disks[s->flush.slowest].disk->name, s->flush.nrounds);
}

static void round_over(struct session *s)
{
    unsigned took_ms = ms_since(s->flush.round_ns);
    struct failure f = s->step_failure;

    memset(&s->step_failure, 0, sizeof(s->step_failure));
    s->flush.nrounds++;
    if (!f.err && !s->stop_wanted && took_ms > FLUSH_WORTH_MS && s->flush.nrounds < FLUSH_ROUNDS_MAX &&
        ms_since(s->flush.step_ns) < FLUSH_ALL_MS && begin_round(s, &f) == 0)
        return;
    s->flush.all_ns += uv_hrtime() - s->flush.step_ns;
    if (!f.err)
        (void)judge(s, took_ms, &f);
    seq_done(&s->rig.seq, &f);
}

static void on_flushed(void *arg, const struct failure *f)
{
    struct session_disk *d = arg;
    struct session *s = d->session;

    if (f)
        (void)failure_set(&s->step_failure, f->err, "disk '%s' cannot be flushed before the freeze: %s", d->disk->name,
                          f->text);
    s->flush.slowest = (unsigned)(d - s->disks);
    if (--s->npending == 0)
        round_over(s);
}

/* Returns as a step function does. */
static int begin_round(struct session *s, struct failure *f)
{
    char export[NAMES_SIZE];

    s->flush.round_ns = uv_hrtime();
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct source_nbd_config config = {
            .socket_path = s->rig.server_address,
            .export_name = names_make(export, s->rig.id, NAMES_LIVE, i),
            .timeout_ms = s->rig.timeout_ms,
        };
        int r;

        if (!s->disks[i].disk->host_cache)
            continue;
        r = source_nbd_flush(s->rig.loop, &config, on_flushed, &s->disks[i]);
        if (r < 0)
            (void)failure_set(&s->step_failure, r, "cannot flush disk '%s': %s", s->disks[i].disk->name, strerror(-r));
        else
            s->npending++;
    }
    return session_begun(s, f);
}

int step_flush_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    s->flush.nrounds = 0;
    s->flush.step_ns = uv_hrtime();
    return begin_round(s, f);
}
