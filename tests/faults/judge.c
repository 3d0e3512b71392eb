/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/commands.h"
#include "stand.h"

#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SETTLE_MS 2000 /* QEMU closes a dead NBD connection when its loop comes to it */
#define QEMU_WARM_RUNS 4
#define NOTICE_MS 10000 /* so soon a session is over when QEMU is gone, on a machine that runs other things */

bool judge_is_excused(const struct stand *st)
{
    return st->cut || st->run.fault == FAULT_REFUSED_ALWAYS || st->run.fault == FAULT_STALLED;
}

/* A checkpoint that is not kept leaves nothing behind. */
static bool is_about_checkpoint(const struct daemon *d)
{
    return strncmp(d->problems.text, "checkpoint ", strlen("checkpoint ")) == 0;
}

/* Where the answer that it was made is lost, nobody can know; the next pull of that name is told that it exists. */
static bool is_uncertain(const struct stand *st, unsigned disk)
{
    /* While QEMU stands still the answers to all commands in flight are late. */
    return st->made_hit[disk] || st->cut || st->run.fault == FAULT_STALLED ||
           strstr(st->daemon.problems.text, "was not answered within");
}

bool judge_is_suspect(const struct stand *st)
{
    enum fault fault = st->run.fault;

    if (fault == FAULT_KILLED || fault == FAULT_KILLED_BEFORE || st->cut)
        return true;
    if (st->scenario->swept)
        return st->daemon.failure.err != 0;
    return st->daemon.problems.err && (judge_is_excused(st) || !is_about_checkpoint(&st->daemon));
}

int judge_session(struct stand *st, struct failure *f)
{
    const struct daemon *d = &st->daemon;
    enum fault fault = st->run.fault;

    if (d->ndown != 1 || d->nup > 1 || d->nfailed > 1 || d->nlate)
        return failure_set(f, -EPROTO, "on_up came %u times, on_failed %u, on_down %u, after session_stop() %u", d->nup,
                           d->nfailed, d->ndown, d->nlate);
    if (d->check.err)
        return failure_copy(f, &d->check);
    if (st->scenario->foreign_server) {
        if (d->nup)
            return failure_set(f, -EPROTO, "it came up although the NBD server is somebody else's");
    } else if (fault == FAULT_NONE &&
               (d->nup != 1 || (d->problems.err && !st->scenario->small_scratch) || d->nfailed)) {
        return failure_set(f, -EPROTO, "without a fault it does not come up and go down: %s %s", d->failure.text,
                           d->problems.text);
    }
    if ((fault == FAULT_STOP || fault == FAULT_STOP_TWICE) && (d->nfailed || d->problems.err) &&
        !st->scenario->foreign_server && !st->scenario->small_scratch)
        return failure_set(f, -EPROTO, "a stop alone is no failure, but: %s %s", d->failure.text, d->problems.text);
    /* What cannot be undone may be told only of what was sabotaged; that a checkpoint was not kept may always be. */
    if (d->problems.err && !judge_is_excused(st) && !is_about_checkpoint(d))
        return failure_set(f, -EPROTO, "one sabotaged command should not leave this: %s", d->problems.text);
    return 0;
}

int judge_selftest(struct stand *st, struct failure *f)
{
    const struct daemon *d = &st->daemon;

    if (d->nended != 1)
        return failure_set(f, -EPROTO, "the self-test ended %u times", d->nended);
    if (st->run.fault == FAULT_NONE && (d->failure.err || d->problems.err))
        return failure_set(f, -EPROTO, "the self-test fails without a fault: %s %s", d->failure.text, d->problems.text);
    if (!d->failure.err && st->warm && d->narrow != st->narrow)
        return failure_set(f, -EPROTO, "the self-test says narrow=%d, and without a fault %d", d->narrow, st->narrow);
    if (d->problems.err && !judge_is_excused(st))
        return failure_set(f, -EPROTO, "one sabotaged command should not leave this: %s", d->problems.text);
    return 0;
}

/* Who waits for QEMU is told in time, and what lay on the host is gone with it. What a dead daemon has left there goes
 * with the next QEMU's sweep. */
int judge_death(struct stand *st, struct failure *f)
{
    const struct daemon *d = &st->daemon;
    uint64_t took_ms = (uv_hrtime() - st->died_ns) / 1000000;
    _cleanup_free_ char *files = NULL;

    if (d->config.task == DAEMON_SESSION && d->nup + d->nfailed == 0 && !st->late_stop)
        return failure_set(f, -EPROTO, "QEMU has died, and nobody was told");
    if (d->config.task == DAEMON_SESSION && !d->nfailed && !d->nbroken && !d->finished && !st->late_stop)
        return failure_set(f, -EPROTO, "QEMU has died under a session that was up, and nobody was told");
    if (d->nlate || d->ndown + d->nended != 1)
        return failure_set(f, -EPROTO, "QEMU has died: it ended %u times, %u calls came late", d->ndown + d->nended,
                           d->nlate);
    if (took_ms > NOTICE_MS)
        return failure_set(f, -ETIMEDOUT, "QEMU has died, and that was over after %llu ms only",
                           (unsigned long long)took_ms);
    if (d->config.task == DAEMON_SWEEP)
        return 0;
    files = guest_files(&st->guest);
    return *files ? failure_set(f, -EEXIST, "QEMU has died, and this is left:\n%s", files) : 0;
}

int judge_checkpoints(struct stand *st, struct failure *f)
{
    const struct daemon *d = &st->daemon;
    bool killed = st->run.fault == FAULT_KILLED || st->run.fault == FAULT_KILLED_BEFORE;

    for (unsigned i = 0; i < st->guest.ndisks; i++) {
        bool exists = false, wanted = killed || (d->wants_checkpoint && (st->run.scenario->keep & (1u << i)));
        uint64_t surplus = 0;
        char denial[64];

        if (guest_check_checkpoint(&st->guest, i, &exists, &surplus, f) < 0)
            return f->err;
        if (exists && st->scenario->small_scratch)
            return failure_set(f, -EPROTO, "disk %u has the checkpoint, but its frozen view was lost before the end",
                               i);
        if (exists && (!wanted || !st->made[i]))
            return failure_set(f, -EPROTO, "disk %u has the checkpoint, but %s", i,
                               wanted ? "it was never made" : "its pull did not end well");
        if (!exists && wanted && !killed && !d->problems.err)
            return failure_set(f, -EPROTO, "disk %u has no checkpoint although nothing went wrong", i);
        (void)snprintf(denial, sizeof(denial), "of disk 'v%u' is not kept", i);
        if (exists && !killed && strstr(d->problems.text, denial) && !is_uncertain(st, i))
            return failure_set(f, -EPROTO, "disk %u has the checkpoint, and the session says: %s", i, d->problems.text);
        if (exists && st->run.fault == FAULT_NONE && surplus)
            return failure_set(f, -EPROTO, "the checkpoint of disk %u claims %llu bytes too many", i,
                               (unsigned long long)surplus);
    }
    return 0;
}

static void nap_for_qemu(void)
{
    static const struct timespec ms5 = {.tv_nsec = 5000000};

    (void)nanosleep(&ms5, NULL);
}

/*
 * Whom nobody else stopped goes on, at the latest by a sweep; whom somebody stopped is still stopped, and let go on by
 * the test. A daemon that was killed in the moment between its look and its mark cannot be told from one that stopped
 * the guest: then the test goes first.
 */
int judge_pause(struct stand *st, bool suspect, struct failure *f)
{
    bool runs = guest_runs(&st->guest);

    if (st->paused && runs)
        return failure_set(f, -EPROTO, "somebody had stopped the guest, and it was let go on");
    if (!st->paused && !suspect && !runs)
        return failure_set(f, -EPROTO, "the guest is left stopped, and no problem was reported");
    if (st->paused)
        json_object_put(guest_call(&st->guest, NULL, "{'execute':'cont'}"));
    return 0;
}

int judge_picture(struct stand *st, const char *before, const char *when, struct failure *f)
{
    uint64_t end = uv_hrtime() + SETTLE_MS * UINT64_C(1000000);

    for (;;) {
        _cleanup_free_ char *after = guest_picture(&st->guest), *difference = guest_difference(before, after);

        if (!difference)
            return 0;
        if (uv_hrtime() > end)
            return failure_set(f, -EEXIST, "%s the block layer is not as before:\n%s", when, difference);
        nap_for_qemu();
    }
}

int judge_fds(struct stand *st, struct failure *f)
{
    uint64_t end = uv_hrtime() + SETTLE_MS * UINT64_C(1000000);
    unsigned n;

    /* A pair of eventfds more comes in one of the first runs, and stays. */
    if (st->nqemu_runs++ < QEMU_WARM_RUNS)
        st->qemu_nfds = MAX(st->qemu_nfds, guest_count_fds(&st->guest));
    while ((n = guest_count_fds(&st->guest)) > st->qemu_nfds) {
        if (uv_hrtime() > end)
            return failure_set(f, -EMFILE, "QEMU has %u descriptors, after its first runs it had %u", n, st->qemu_nfds);
        nap_for_qemu();
    }
    return 0;
}

int judge_server(struct stand *st, struct failure *f)
{
    struct failure refusal = {0};
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    int fd, r;

    if (!st->scenario->foreign_server) {
        struct json_object *ret = guest_call(&st->guest, &refusal, "{'execute':'nbd-server-stop'}");

        json_object_put(ret);
        return ret ? failure_set(f, -EEXIST, "QEMU's NBD server was still running") : 0;
    }
    (void)snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/foreign.sock", st->guest.dir);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    r = connect(fd, (const struct sockaddr *)&sa, sizeof(sa));
    (void)close(fd);
    return r < 0 ? failure_set(f, -ENOENT, "somebody else's NBD server was stopped") : 0;
}
