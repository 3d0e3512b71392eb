/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The flush ahead (docs/decisions/0012-pause.md). blockdev-reopen flushes the disks while they are drained, and the
 * guest's I/O waits for that; so does every drain on the way there that meets a flush of the guest's own. What the host
 * holds back of their images is therefore written out before, while the guest works, in two parts:
 *
 * - the file itself, by a sync of our own past QEMU (backup/sync), where we can open it: all of the bulk;
 * - what QEMU holds back, by NBD flushes through temporary exports of the live disks, the one flush of QEMU's that its
 *   main loop does not stand still for. qcow2 keeps its lock meanwhile, so its reads and writes wait: best when the
 *   first part has left little to do.
 */
#include "backup/steps.h"
#include "backup/sync.h"
#include "qmp/commands.h"

#include <errno.h>

/* Each round has what was written during the last one; one that takes so long, or less, leaves nothing to gain. */
#define FLUSH_WORTH_MS 20u
#define FLUSH_ROUNDS_MAX 8u /* of either kind */
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

static unsigned ms_since(uint64_t ns)
{
    return (unsigned)((uv_hrtime() - ns) / 1000000);
}

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

static void flush_over(struct session *s, const struct failure *f)
{
    s->flush.all_ns += uv_hrtime() - s->flush.step_ns;
    seq_done(&s->rig.seq, f);
}

/* Something is left to gain, and may be tried. */
static bool is_worth_it(const struct session *s, unsigned took_ms)
{
    return !s->stop_wanted && took_ms > FLUSH_WORTH_MS && s->flush.nrounds < FLUSH_ROUNDS_MAX &&
           ms_since(s->flush.step_ns) < FLUSH_ALL_MS;
}

static int begin_syncs(struct session *s, struct failure *f);

/* -- what QEMU holds back ------------------------------------------------------------------------------------------ */

static void flushes_over(struct session *s)
{
    unsigned took_ms = ms_since(s->flush.round_ns);
    struct failure f = s->step_failure;

    memset(&s->step_failure, 0, sizeof(s->step_failure));
    s->flush.nrounds++;
    if (!f.err && is_worth_it(s, took_ms) && begin_syncs(s, &f) == 0)
        return;
    if (!f.err)
        (void)judge(s, took_ms, &f);
    flush_over(s, &f);
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
        flushes_over(s);
}

/* Returns as a step function does. */
static int begin_flushes(struct session *s, struct failure *f)
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

/* -- what the kernel holds back ------------------------------------------------------------------------------------ */

static void syncs_over(struct session *s)
{
    struct failure f = s->step_failure;
    int r;

    memset(&s->step_failure, 0, sizeof(s->step_failure));
    s->flush.nrounds++;
    if (f.err)
        flush_over(s, &f);
    else if (is_worth_it(s, ms_since(s->flush.round_ns)) && begin_syncs(s, &f) == 0)
        return;
    else if (s->flush.ahead && !s->flush.nmissed && ms_since(s->flush.round_ns) <= FLUSH_WORTH_MS)
        flush_over(s, NULL); /* hardly anything was held back, so what QEMU holds is for the flush before the freeze */
    else if ((r = s->stop_wanted ? SEQ_DONE : begin_flushes(s, &f)) != 0)
        flush_over(s, r < 0 ? &f : NULL);
}

/* A file that we cannot open, or not sync, is flushed by QEMU alone, which tells what is wrong with it. */
static void on_synced(void *arg, int err)
{
    struct session_disk *d = arg;
    struct session *s = d->session;

    if (err == -ETIMEDOUT)
        (void)failure_set(&s->step_failure, err,
                          "the storage of disk '%s' has not written back within %u s what the host holds of '%s'; the "
                          "freeze would stop the guest's I/O for as long",
                          d->disk->name, FLUSH_ALL_MS / 1000, d->disk->images[0].file);
    s->flush.nmissed += err != 0;
    if (--s->npending == 0)
        syncs_over(s);
}

/* Returns as a step function does; the flushes follow. */
static int begin_syncs(struct session *s, struct failure *f)
{
    s->flush.round_ns = uv_hrtime();
    s->flush.nmissed = 0;
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        const struct disk *d = s->disks[i].disk;

        /* Other names ("nbd://…", "json:…") are of no file. One that cannot begin is flushed by QEMU alone. */
        if (d->host_cache && d->nimages && d->images[0].file[0] == '/' &&
            sync_start(s->rig.loop, d->images[0].file, FLUSH_ALL_MS, on_synced, &s->disks[i]) == 0)
            s->npending++;
        else
            s->flush.nmissed += d->host_cache;
    }
    return s->npending ? 0 : begin_flushes(s, f);
}

static int flush(struct session *s, bool ahead, struct failure *f)
{
    s->flush.ahead = ahead;
    s->flush.nrounds = 0;
    s->flush.step_ns = uv_hrtime();
    return begin_syncs(s, f);
}

int step_flush_ahead_up(struct seq *q, struct failure *f)
{
    return flush(session_of_seq(q), true, f);
}

int step_flush_up(struct seq *q, struct failure *f)
{
    return flush(session_of_seq(q), false, f);
}
