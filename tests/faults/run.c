/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "run.h"

#include "die.h"
#include "qmp/commands.h"
#include "stand.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define RUN_MS 60000       /* a run that takes longer hangs */
#define REAL_RUN_MS 400000 /* … where calls may take as long as in earnest */
#define SMALL_SCRATCH (6 * GUEST_CLUSTER)
#define FLOOD 40 /* writes that it cannot hold */
/* Flushes that take long are repeated: another run may have fewer commands, by this part of them at most. */
#define FEWER 8u

static const char *const names[] = {
    [FAULT_NONE] = "none",
    [FAULT_REFUSED] = "refused",
    [FAULT_REFUSED_ALWAYS] = "refused-always",
    [FAULT_LOST] = "lost",
    [FAULT_DROPPED] = "dropped",
    [FAULT_CUT] = "cut",
    [FAULT_CUT_AFTER] = "cut-after",
    [FAULT_STOP] = "stop",
    [FAULT_STOP_TWICE] = "stop-twice",
    [FAULT_KILLED] = "killed",
    [FAULT_KILLED_BEFORE] = "killed-before",
    [FAULT_STALLED] = "stalled",
    [FAULT_QEMU_DIES] = "qemu-dies",
    [FAULT_QEMU_DIES_AFTER] = "qemu-dies-after",
};
static_assert(ARRAY_SIZE(names) == FAULT_NFAULTS, "every fault has a name");

const char *fault_name(enum fault f)
{
    return names[f];
}

/* -- a daemon to be killed ----------------------------------------------------------------------------------------- */

static const char *const tasks[] = {
    [DAEMON_SESSION] = "session", [DAEMON_SELFTEST] = "selftest", [DAEMON_SWEEP] = "sweep"};

static void exec_daemon(const struct stand *st)
{
    char ndisks[16], narrow[16], ask[16], job[16];

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)snprintf(ndisks, sizeof(ndisks), "%u", st->guest.ndisks);
    (void)snprintf(narrow, sizeof(narrow), "%d", st->narrow);
    (void)snprintf(ask, sizeof(ask), "%d", st->scenario->ask);
    (void)snprintf(job, sizeof(job), "%d", st->scenario->job);
    (void)execl(st->program, st->program, "--as-daemon", st->path, st->guest.scratch, st->guest.state, ndisks,
                tasks[st->daemon.config.task], narrow, ask, job, (char *)NULL);
    _exit(127);
}

int run_as_daemon(char **argv)
{
    static struct daemon d;
    static struct guest g;
    uv_loop_t loop;
    struct daemon_config config = {.timeout_ms = strike_timeout_ms(&(struct run){.fault = FAULT_KILLED}), .keep = ~0u};

    if (uv_loop_init(&loop) < 0)
        return 1;
    (void)strncat(g.scratch, argv[1], sizeof(g.scratch) - 1);
    (void)strncat(g.state, argv[2], sizeof(g.state) - 1);
    g.ndisks = (unsigned)strtoul(argv[3], NULL, 10);
    while (config.task < DAEMON_SWEEP && strcmp(argv[4], tasks[config.task]) != 0)
        config.task++;
    config.narrow_reads = strcmp(argv[5], "1") == 0;
    config.ask = strcmp(argv[6], "1") == 0;
    config.job = strcmp(argv[7], "1") == 0;
    daemon_start(&d, &loop, argv[0], &g, NULL, &config);
    while (!daemon_is_over(&d))
        (void)uv_run(&loop, UV_RUN_ONCE);
    _exit(0); /* with all that it has: as if killed after its last command */
}

/* -- waiting ------------------------------------------------------------------------------------------------------- */

static void on_alarm(uv_timer_t *t)
{
    *(bool *)t->data = true;
}

/* Runs the loop until *done (or, NULL, until no handle but the proxy's is left). */
static int wait_until(struct stand *st, bool (*done)(struct stand *st), const char *what, struct failure *f)
{
    unsigned limit_ms = st->run.real_stalls ? REAL_RUN_MS : RUN_MS;
    bool late = false;
    uv_timer_t alarm;

    (void)uv_timer_init(&st->loop, &alarm);
    alarm.data = &late;
    (void)uv_timer_start(&alarm, on_alarm, limit_ms, 0);
    while (!late && !done(st))
        (void)uv_run(&st->loop, UV_RUN_ONCE);
    uv_close((uv_handle_t *)&alarm, NULL);
    (void)uv_run(&st->loop, UV_RUN_NOWAIT);
    return late ? failure_set(f, -ETIMEDOUT, "within %u s this has not come: %s", limit_ms / 1000, what) : 0;
}

static bool is_over(struct stand *st)
{
    return daemon_is_over(&st->daemon);
}

static bool is_closed(struct stand *st)
{
    return st->daemon.closed && !proxy_has_client(st->proxy);
}

static bool is_killed(struct stand *st)
{
    if (st->child > 0 && waitpid(st->child, NULL, WNOHANG) == st->child)
        st->child = 0; /* by itself: then nothing was hit */
    return st->child == 0 && !proxy_has_client(st->proxy);
}

static void on_handle(uv_handle_t *h, void *arg)
{
    unsigned *n = arg;

    *n += !uv_is_closing(h);
}

static unsigned count_handles(struct stand *st)
{
    unsigned n = 0;

    uv_walk(&st->loop, on_handle, &n);
    return n;
}

static unsigned count_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned n = 0;

    while (dir && readdir(dir))
        n++;
    if (dir)
        (void)closedir(dir);
    return n;
}
/* -- one run ------------------------------------------------------------------------------------------------------- */

static bool is_killed_fault(enum fault f)
{
    return f == FAULT_KILLED || f == FAULT_KILLED_BEFORE;
}

static int sweep(struct stand *st, bool armed, struct failure *f)
{
    struct run calm = {.fault = FAULT_NONE};
    struct daemon_config config = {
        .task = DAEMON_SWEEP,
        .timeout_ms = strike_timeout_ms(armed ? &st->run : &calm),
        .verbose = st->run.verbose,
    };

    daemon_start(&st->daemon, &st->loop, st->path, &st->guest, NULL, &config);
    st->armed = armed;
    if (wait_until(st, is_over, "the end of the sweep", f) < 0)
        return f->err;
    st->armed = false;
    strike_resume(st);
    if (st->died_ns)
        return 0;
    daemon_close(&st->daemon);
    if (wait_until(st, is_closed, "the end of the sweep's connection", f) < 0)
        return f->err;
    if (!armed && st->daemon.failure.err)
        return failure_set(f, -EPROTO, "the sweep fails: %s", st->daemon.failure.text);
    if (armed && st->daemon.failure.err && !judge_is_excused(st) && st->run.at >= SWEEP_NQUESTIONS)
        return failure_set(f, -EPROTO, "one sabotaged command should not make the sweep fail: %s",
                           st->daemon.failure.text);
    return 0;
}

static int run_killed(struct stand *st, enum daemon_task task, struct failure *f)
{
    memset(&st->daemon, 0, sizeof(st->daemon));
    st->daemon.config.task = task;
    st->armed = true;
    st->child = fork();
    if (st->child < 0)
        die("fork: %s", strerror(errno));
    if (st->child == 0)
        exec_daemon(st);
    if (wait_until(st, is_killed, "the command at which the daemon is killed", f) < 0) {
        strike_kill_daemon(st);
        return f->err;
    }
    st->armed = false;
    if (st->cut || st->kill_at || st->ncommands > st->run.at || st->run.at - st->ncommands > st->run.at / FEWER)
        return st->cut ? 0 : failure_set(f, -EPROTO, "the daemon that was to be killed has ended by itself");
    st->cut = true;
    (void)strcpy(st->hit, "its end");
    return 0;
}

static void flood(void *arg)
{
    struct stand *st = arg;

    for (unsigned i = 0; i < FLOOD && !st->died_ns; i++)
        guest_write(&st->guest);
}

static int check_task(struct stand *st, struct failure *f)
{
    return st->scenario->task == DAEMON_SELFTEST ? judge_selftest(st, f) : judge_session(st, f);
}

static int run_living(struct stand *st, struct failure *f)
{
    const struct scenario *s = st->scenario;
    enum fault fault = st->run.fault;
    struct daemon_config config = {
        .task = s->task,
        .keep = s->keep,
        .ask = s->ask,
        .job = s->job,
        .narrow_reads = st->narrow,
        .timeout_ms = strike_timeout_ms(&st->run),
        .at_top = s->small_scratch ? flood : NULL,
        .arg = st,
        .impatient = strike_is_slow(fault) || fault == FAULT_QEMU_DIES || fault == FAULT_QEMU_DIES_AFTER,
        .verbose = st->run.verbose,
    };

    daemon_start(&st->daemon, &st->loop, st->path, &st->guest, &st->guest, &config);
    st->armed = true;
    if (wait_until(st, is_over, "the end of the session", f) < 0)
        return f->err;
    st->armed = false;
    strike_resume(st);
    if (st->died_ns)
        return 0;
    daemon_close(&st->daemon);
    if (wait_until(st, is_closed, "the end of the connection", f) < 0)
        return f->err;
    return check_task(st, f);
}

/* The daemon is killed with everything standing: when the export of one more map has been added. */
static int run_swept(struct stand *st, struct failure *f)
{
    struct run wanted = st->run;
    int r;

    st->run.fault = FAULT_KILLED;
    st->run.at = UINT_MAX;
    st->kill_at = "block-export-add {\"type\":\"nbd\",\"id\":\"qpull-*-late0\",*";
    r = run_killed(st, DAEMON_SESSION, f);
    st->kill_at = NULL;
    st->run = wanted;
    st->ncommands = 0;
    st->cut = false;
    (void)strcpy(st->hit, "-");
    if (r < 0)
        return r;
    return is_killed_fault(wanted.fault) ? run_killed(st, DAEMON_SWEEP, f) : sweep(st, true, f);
}

static void start_foreign_server(struct stand *st)
{
    if (st->scenario->foreign_server)
        json_object_put(guest_call(
            &st->guest, NULL,
            "{'execute':'nbd-server-start','arguments':{'addr':{'type':'unix','data':{'path':'%s/foreign.sock'}}}}",
            st->guest.dir));
}

static void forget_run(struct stand *st)
{
    st->ncommands = 0;
    st->cut = st->paused = st->stops = false;
    st->died_ns = 0;
    memset(st->made, 0, sizeof(st->made));
    memset(st->made_hit, 0, sizeof(st->made_hit));
    guest_begin_run(&st->guest);
    for (unsigned i = 0; i < 3; i++)
        guest_write(&st->guest);
}

/* What a sweep under which QEMU died has not come to lies there until the next one, and is no part of the picture. */
static char *picture_to_be(struct stand *st)
{
    char path[160], aside[160];
    char *picture;

    (void)snprintf(path, sizeof(path), "%s/" DAEMON_SERVER_SOCKET, st->guest.state);
    (void)snprintf(aside, sizeof(aside), "%s/socket-aside", st->guest.dir);
    if (st->daemon.config.task != DAEMON_SWEEP || rename(path, aside) < 0)
        return guest_picture(&st->guest);
    picture = guest_picture(&st->guest);
    (void)rename(aside, path);
    return picture;
}

/* QEMU has died under the daemon. Another one comes up at the same path, and the same daemon does its work there. */
static int run_again(struct stand *st, struct failure *f)
{
    _cleanup_free_ char *before = NULL;
    struct run wanted = st->run;
    int r = judge_death(st, f);

    if (r < 0)
        return r;
    guest_replace(&st->guest);
    st->nqemu_runs = st->qemu_nfds = 0;
    st->run.fault = FAULT_NONE;
    forget_run(st);
    st->paused = true; /* nobody stops this one */
    start_foreign_server(st);
    before = picture_to_be(st);
    daemon_again(&st->daemon);
    st->armed = true;
    if (wait_until(st, is_over, "the end of the session with the next QEMU", f) < 0)
        return f->err;
    st->armed = false;
    daemon_close(&st->daemon);
    if (wait_until(st, is_closed, "the end of the connection to the next QEMU", f) < 0)
        return f->err;
    if (st->daemon.config.task == DAEMON_SWEEP)
        r = st->daemon.failure.err ? failure_copy(f, &st->daemon.failure) : 0;
    else
        r = check_task(st, f);
    if (r == 0 && guest_undo_snapshots(&st->guest, f) < 0)
        r = f->err;
    if (r == 0 && st->daemon.config.task != DAEMON_SWEEP)
        r = judge_checkpoints(st, f);
    if (r == 0)
        r = judge_picture(st, before, "with the next QEMU", f);
    st->run = wanted;
    return r;
}

static int run_and_judge(struct stand *st, struct failure *f)
{
    _cleanup_free_ char *before = guest_picture(&st->guest);
    unsigned nfds = count_fds(), nhandles = count_handles(st);
    unsigned ncommands, at;
    bool suspect;
    int r;

    if (st->scenario->swept)
        r = run_swept(st, f);
    else if (is_killed_fault(st->run.fault))
        r = run_killed(st, st->scenario->task, f);
    else
        r = run_living(st, f);
    if (r < 0)
        return r;
    ncommands = st->ncommands;
    at = st->run.at;
    if (st->died_ns) {
        if (run_again(st, f) < 0)
            return f->err;
    } else {
        suspect = judge_is_suspect(st);
        if (judge_pause(st, suspect, f) < 0)
            return f->err;
        suspect |= st->paused;
        /* Once nothing of ours is in the way, what somebody else built goes, too. */
        if (!suspect && guest_undo_snapshots(&st->guest, f) < 0)
            return f->err;
        if (!suspect && judge_picture(st, before, "with no problem reported", f) < 0)
            return f->err;
        if (!st->scenario->swept && judge_checkpoints(st, f) < 0)
            return f->err;
        st->run.fault = FAULT_NONE;
        if (suspect && (sweep(st, false, f) < 0 || guest_undo_snapshots(&st->guest, f) < 0 ||
                        judge_picture(st, before, "after the sweep", f) < 0))
            return f->err;
        if (!guest_runs(&st->guest))
            return failure_set(f, -EPROTO, "the guest is left stopped");
    }
    st->ncommands = ncommands;
    st->run.at = at;
    if (judge_server(st, f) < 0 || judge_fds(st, f) < 0 || guest_check_writes(&st->guest, f) < 0)
        return f->err;
    if (st->warm && (count_fds() != nfds || count_handles(st) != nhandles))
        return failure_set(f, -EMFILE, "%u descriptors and %u handles of ours are open, before it were %u and %u",
                           count_fds(), count_handles(st), nfds, nhandles);
    return 0;
}

int stand_run(struct stand *st, const struct run *run, unsigned *ret_ncommands, struct failure *f)
{
    int r;

    st->run = *run;
    (void)strcpy(st->hit, "-");
    free(TAKE_PTR(st->sabotaged));
    forget_run(st);
    r = run_and_judge(st, f);
    if (r < 0)
        return r;
    if (st->scenario->task == DAEMON_SELFTEST && run->fault == FAULT_NONE)
        st->narrow = st->daemon.narrow;
    guest_write(&st->guest);
    guest_end_run(&st->guest);
    st->warm = true;
    *ret_ncommands = st->ncommands;
    return 0;
}

const char *stand_hit(const struct stand *st)
{
    return st->hit;
}

unsigned stand_slowest_ms(const struct stand *st)
{
    return st->guest.slowest_ms;
}

int stand_check_data(struct stand *st, struct failure *f)
{
    return guest_check_data(&st->guest, f);
}
/* -- QEMU and proxy ------------------------------------------------------------------------------------------------ */

static void find_out_narrow(struct stand *st)
{
    struct scenario selftest = {.name = "self-test", .task = DAEMON_SELFTEST};
    const struct scenario *mine = st->scenario;
    struct run run = {.scenario = &selftest};
    struct failure f = {0};
    unsigned ncommands;

    st->scenario = &selftest;
    if (stand_run(st, &run, &ncommands, &f) < 0)
        die("the self-test: %s", f.text);
    st->narrow = st->daemon.narrow;
    st->scenario = mine;
}

/* Wakes the loop: the socket of a child that ends is closed before it can be waited for. */
static void on_child(uv_signal_t *handle, int signum)
{
    (void)handle;
    (void)signum;
}

struct stand *stand_new(const struct scenario *s, const char *program, uint64_t seed)
{
    struct stand *st = calloc(1, sizeof(*st));

    if (!st || uv_loop_init(&st->loop) < 0)
        die("out of memory");
    st->scenario = s;
    st->program = program;
    (void)uv_timer_init(&st->loop, &st->resume);
    (void)uv_signal_init(&st->loop, &st->children);
    (void)uv_signal_start(&st->children, on_child, SIGCHLD);
    guest_start(&st->guest, s->ndisks, s->small_scratch ? SMALL_SCRATCH : 0, seed);
    (void)snprintf(st->path, sizeof(st->path), "%s/proxy", st->guest.dir);
    st->proxy = proxy_new(&st->loop, st->path, st->guest.monitor, &strike_ops, st);
    find_out_narrow(st);
    start_foreign_server(st);
    return st;
}

static struct stand *abandoned; /* still reachable for the leak checker: its loop never runs again */

void stand_abandon(struct stand *st)
{
    st->next_abandoned = abandoned;
    abandoned = st;
    strike_kill_daemon(st);
    guest_done(&st->guest);
}

void stand_free(struct stand *st)
{
    strike_kill_daemon(st);
    proxy_free(st->proxy);
    uv_close((uv_handle_t *)&st->resume, NULL);
    uv_close((uv_handle_t *)&st->children, NULL);
    (void)uv_run(&st->loop, UV_RUN_DEFAULT);
    if (uv_loop_close(&st->loop) != 0)
        die("the loop still has handles");
    guest_done(&st->guest);
    free(st->sabotaged);
    free(st);
}
