/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "run.h"

#include "die.h"
#include "proxy.h"
#include "qmp/commands.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PATIENT_MS 20000   /* deadline of calls where none is meant to pass */
#define SHORT_MS 400       /* … where one is */
#define RUN_MS 60000       /* a run that takes longer hangs */
#define SWEEP_NQUESTIONS 4 /* what a sweep cannot do without: it looks before it undoes */
#define SMALL_SCRATCH (6 * GUEST_CLUSTER)
#define FLOOD 40       /* writes that it cannot hold */
#define SETTLE_MS 2000 /* QEMU closes a dead NBD connection when its loop comes to it */

static const char *const names[] = {
    [FAULT_NONE] = "none",           [FAULT_REFUSED] = "refused", [FAULT_REFUSED_ALWAYS] = "refused-always",
    [FAULT_LOST] = "lost",           [FAULT_DROPPED] = "dropped", [FAULT_CUT] = "cut",
    [FAULT_CUT_AFTER] = "cut-after", [FAULT_STOP] = "stop",       [FAULT_STOP_TWICE] = "stop-twice",
    [FAULT_KILLED] = "killed",
};
static_assert(ARRAY_SIZE(names) == FAULT_NFAULTS, "every fault has a name");

const char *fault_name(enum fault f)
{
    return names[f];
}

struct stand {
    const struct scenario *scenario;
    const char *program;
    uv_loop_t loop;
    struct guest guest;
    struct proxy *proxy;
    char path[64]; /* of the proxy */
    bool narrow;
    int foreign; /* listening socket of the foreign NBD server's file, -1: none */
    bool warm;   /* what a first run leaves open for good (threads, random numbers) is open */
    /* the run under way */
    struct run run;
    struct daemon daemon;
    pid_t child;
    bool armed; /* commands count */
    unsigned ncommands;
    char hit[128];
    const char *kill_at;            /* pattern of a command at which it is killed; NULL: by number */
    char *sabotaged;                /* owned: the command that is refused for good */
    bool made[GUEST_MAX_DISKS];     /* the command that makes the checkpoint reached QEMU */
    bool made_hit[GUEST_MAX_DISKS]; /* … and is the one that the fault hit */
    bool cut;
    bool paused; /* by scenario->pause_at */
    struct stand *next_abandoned;
};

/* -- the proxy's questions ----------------------------------------------------------------------------------------- */

/* keep.c's last transaction: adds the checkpoint itself. Its disk, or -1. */
static int makes_checkpoint(const char *name, struct json_object *args)
{
    struct json_object *actions = qmp_get(args, "actions"), *data;
    const char *node, *bitmap;

    if (strcmp(name, "transaction") != 0 || qmp_array_length(actions) == 0)
        return -1;
    data = qmp_get(json_object_array_get_idx(actions, 0), "data");
    node = qmp_get_string(data, "node");
    bitmap = qmp_get_string(data, "name");
    return node && bitmap && strcmp(bitmap, GUEST_CHECKPOINT) == 0 && node[0] == 'd' ? node[1] - '0' : -1;
}

/* job_steps.c's transaction: the freeze. */
static bool begins_jobs(const char *name, struct json_object *args)
{
    struct json_object *actions = qmp_get(args, "actions");
    const char *type;

    if (strcmp(name, "transaction") != 0 || qmp_array_length(actions) == 0)
        return false;
    type = qmp_get_string(json_object_array_get_idx(actions, 0), "type");
    return type && strcmp(type, "blockdev-backup") == 0;
}

static enum verdict spoil(struct stand *st, const char *text)
{
    switch (st->run.fault) {
    case FAULT_REFUSED:
        return VERDICT_REFUSE;
    case FAULT_REFUSED_ALWAYS:
        free(st->sabotaged);
        st->sabotaged = strdup(text);
        return VERDICT_REFUSE;
    case FAULT_LOST:
        return VERDICT_LOSE;
    case FAULT_DROPPED:
        return VERDICT_DROP;
    case FAULT_CUT:
        return VERDICT_CUT;
    case FAULT_CUT_AFTER:
    case FAULT_KILLED:
        return VERDICT_CUT_AFTER;
    case FAULT_STOP:
    case FAULT_STOP_TWICE:
        daemon_stop(&st->daemon);
        return VERDICT_PASS;
    default:
        return VERDICT_PASS;
    }
}

static void note_made(struct stand *st, const char *name, struct json_object *args, enum verdict verdict, bool hit)
{
    int disk = makes_checkpoint(name, args);

    if (disk < 0 || disk >= GUEST_MAX_DISKS)
        return;
    st->made[disk] |= verdict == VERDICT_PASS || verdict == VERDICT_LOSE || verdict == VERDICT_CUT_AFTER;
    st->made_hit[disk] |= hit;
}

/* This QEMU never gets to see it. */
static enum verdict without_reopen(enum verdict verdict)
{
    switch (verdict) {
    case VERDICT_LOSE:
        return VERDICT_DROP;
    case VERDICT_CUT_AFTER:
        return VERDICT_CUT;
    case VERDICT_PASS:
        return VERDICT_REFUSE;
    default:
        return verdict;
    }
}

/* The stopped guest's disks are frozen one after the other, and its writes end with the first of them. */
static bool freezes(const struct stand *st, const char *name, struct json_object *args)
{
    const char *node = qmp_get_string(args, "value");

    if (!st->scenario->no_reopen)
        return strcmp(name, "blockdev-reopen") == 0 || begins_jobs(name, args);
    return strcmp(name, "qom-set") == 0 && node && fnmatch("qpull-*-cbw0", node, 0) == 0;
}

static enum verdict on_command(void *arg, const char *name, struct json_object *args)
{
    struct stand *st = arg;
    _cleanup_free_ char *text = NULL;
    enum verdict verdict = VERDICT_PASS;
    bool hit;

    if (st->run.verbose)
        (void)fprintf(stderr, "      %s %s\n", name, args ? json_object_to_json_string(args) : "");
    if (!st->armed)
        return VERDICT_PASS;
    /* The questions about disks before the session's first step are not the session's. */
    if (st->ncommands == 0 && st->daemon.config.task != DAEMON_SWEEP && strcmp(name, "add-fd") != 0)
        return VERDICT_PASS;
    if (asprintf(&text, "%s %s", name, args ? json_object_to_json_string_ext(args, JSON_C_TO_STRING_PLAIN) : "") < 0)
        die("out of memory");
    if (st->scenario->snapshot_at && st->armed && st->ncommands && fnmatch(st->scenario->snapshot_at, text, 0) == 0)
        guest_take_snapshots(&st->guest);
    if (st->scenario->pause_at && !st->paused && fnmatch(st->scenario->pause_at, text, 0) == 0) {
        json_object_put(guest_call(&st->guest, NULL, "{'execute':'stop'}"));
        st->paused = true;
    }
    if (st->run.writing && !st->scenario->small_scratch && (!st->scenario->no_reopen || guest_runs(&st->guest)))
        guest_write(&st->guest);
    hit = (st->ncommands == st->run.at && st->run.fault != FAULT_NONE) ||
          (st->kill_at && fnmatch(st->kill_at, text, 0) == 0);
    if (hit) {
        (void)snprintf(st->hit, sizeof(st->hit), "%.*s", (int)sizeof(st->hit) - 1, text);
        verdict = spoil(st, text);
    } else if (st->run.fault == FAULT_STOP_TWICE && st->ncommands == st->run.at + 1) {
        daemon_stop(&st->daemon);
    } else if (st->sabotaged && strcmp(st->sabotaged, text) == 0) {
        verdict = VERDICT_REFUSE;
    }
    if (st->scenario->no_reopen && strcmp(name, "blockdev-reopen") == 0)
        verdict = without_reopen(verdict);
    st->ncommands++;
    note_made(st, name, args, verdict, hit && st->run.fault != FAULT_STOP && st->run.fault != FAULT_STOP_TWICE);
    if (freezes(st, name, args))
        guest_freezes(&st->guest);
    return verdict;
}

static void kill_child(struct stand *st)
{
    if (st->child <= 0)
        return;
    (void)kill(st->child, SIGKILL);
    (void)waitpid(st->child, NULL, 0);
    st->child = 0;
}

static void on_cut(void *arg)
{
    struct stand *st = arg;

    st->cut = true;
    if (st->run.fault == FAULT_KILLED)
        kill_child(st);
}

static const struct proxy_ops proxy_ops = {.on_command = on_command, .on_cut = on_cut};

/* -- a daemon to be killed ----------------------------------------------------------------------------------------- */

static void exec_daemon(const struct stand *st)
{
    char ndisks[16], narrow[16], ask[16], job[16];

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)snprintf(ndisks, sizeof(ndisks), "%u", st->guest.ndisks);
    (void)snprintf(narrow, sizeof(narrow), "%d", st->narrow);
    (void)snprintf(ask, sizeof(ask), "%d", st->scenario->ask);
    (void)snprintf(job, sizeof(job), "%d", st->scenario->job);
    (void)execl(st->program, st->program, "--as-daemon", st->path, st->guest.scratch, st->guest.state, ndisks,
                st->scenario->task == DAEMON_SELFTEST ? "selftest" : "session", narrow, ask, job, (char *)NULL);
    _exit(127);
}

int run_as_daemon(char **argv)
{
    static struct daemon d;
    static struct guest g;
    uv_loop_t loop;
    struct daemon_config config = {.timeout_ms = PATIENT_MS, .keep = ~0u};

    if (uv_loop_init(&loop) < 0)
        return 1;
    (void)strncat(g.scratch, argv[1], sizeof(g.scratch) - 1);
    (void)strncat(g.state, argv[2], sizeof(g.state) - 1);
    g.ndisks = (unsigned)strtoul(argv[3], NULL, 10);
    config.task = strcmp(argv[4], "selftest") == 0 ? DAEMON_SELFTEST : DAEMON_SESSION;
    config.narrow_reads = strcmp(argv[5], "1") == 0;
    config.ask = strcmp(argv[6], "1") == 0;
    config.job = strcmp(argv[7], "1") == 0;
    daemon_start(&d, &loop, argv[0], &g, NULL, &config);
    while (!daemon_is_over(&d))
        (void)uv_run(&loop, UV_RUN_ONCE);
    (void)pause(); /* the end comes from outside */
    return 0;
}

/* -- waiting ------------------------------------------------------------------------------------------------------- */

static void on_alarm(uv_timer_t *t)
{
    *(bool *)t->data = true;
}

/* Runs the loop until *done (or, NULL, until no handle but the proxy's is left). */
static int wait_until(struct stand *st, bool (*done)(struct stand *st), const char *what, struct failure *f)
{
    bool late = false;
    uv_timer_t alarm;

    (void)uv_timer_init(&st->loop, &alarm);
    alarm.data = &late;
    (void)uv_timer_start(&alarm, on_alarm, RUN_MS, 0);
    while (!late && !done(st))
        (void)uv_run(&st->loop, UV_RUN_ONCE);
    uv_close((uv_handle_t *)&alarm, NULL);
    (void)uv_run(&st->loop, UV_RUN_NOWAIT);
    return late ? failure_set(f, -ETIMEDOUT, "within %d s this has not come: %s", RUN_MS / 1000, what) : 0;
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

/* -- the oracle ---------------------------------------------------------------------------------------------------- */

static bool is_excused(const struct stand *st)
{
    return st->cut || st->run.fault == FAULT_REFUSED_ALWAYS;
}

/* A checkpoint that is not kept leaves nothing behind. */
static bool is_about_checkpoint(const struct daemon *d)
{
    return strncmp(d->problems.text, "checkpoint ", strlen("checkpoint ")) == 0;
}

/* Where the answer that it was made is lost, nobody can know; the next pull of that name is told that it exists. */
static bool is_uncertain(const struct stand *st, unsigned disk)
{
    return st->made_hit[disk] || st->cut || strstr(st->daemon.problems.text, "was not answered within");
}

static int check_session(struct stand *st, struct failure *f)
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
    if (d->problems.err && !is_excused(st) && !is_about_checkpoint(d))
        return failure_set(f, -EPROTO, "one sabotaged command should not leave this: %s", d->problems.text);
    return 0;
}

static int check_selftest(struct stand *st, struct failure *f)
{
    const struct daemon *d = &st->daemon;

    if (d->nended != 1)
        return failure_set(f, -EPROTO, "the self-test ended %u times", d->nended);
    if (st->run.fault == FAULT_NONE && (d->failure.err || d->problems.err))
        return failure_set(f, -EPROTO, "the self-test fails without a fault: %s %s", d->failure.text, d->problems.text);
    if (!d->failure.err && st->warm && d->narrow != st->narrow)
        return failure_set(f, -EPROTO, "the self-test says narrow=%d, and without a fault %d", d->narrow, st->narrow);
    if (d->problems.err && !is_excused(st))
        return failure_set(f, -EPROTO, "one sabotaged command should not leave this: %s", d->problems.text);
    return 0;
}

static int check_checkpoints(struct stand *st, struct failure *f)
{
    const struct daemon *d = &st->daemon;
    bool killed = st->run.fault == FAULT_KILLED;

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

static int compare_pictures(struct stand *st, const char *before, const char *when, struct failure *f)
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

static int check_server(struct stand *st, struct failure *f)
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

/* -- one run ------------------------------------------------------------------------------------------------------- */

static int sweep(struct stand *st, bool armed, struct failure *f)
{
    struct daemon_config config = {.task = DAEMON_SWEEP, .timeout_ms = PATIENT_MS, .verbose = st->run.verbose};

    if (armed && (st->run.fault == FAULT_LOST || st->run.fault == FAULT_DROPPED))
        config.timeout_ms = SHORT_MS;
    daemon_start(&st->daemon, &st->loop, st->path, &st->guest, NULL, &config);
    st->armed = armed;
    if (wait_until(st, is_over, "the end of the sweep", f) < 0)
        return f->err;
    st->armed = false;
    daemon_close(&st->daemon);
    if (wait_until(st, is_closed, "the end of the sweep's connection", f) < 0)
        return f->err;
    if (!armed && st->daemon.failure.err)
        return failure_set(f, -EPROTO, "the sweep fails: %s", st->daemon.failure.text);
    if (armed && st->daemon.failure.err && !is_excused(st) && st->run.at >= SWEEP_NQUESTIONS)
        return failure_set(f, -EPROTO, "one sabotaged command should not make the sweep fail: %s",
                           st->daemon.failure.text);
    return 0;
}

static int run_killed(struct stand *st, struct failure *f)
{
    memset(&st->daemon, 0, sizeof(st->daemon));
    st->daemon.config.task = st->scenario->task;
    st->armed = true;
    st->child = fork();
    if (st->child < 0)
        die("fork: %s", strerror(errno));
    if (st->child == 0)
        exec_daemon(st);
    if (wait_until(st, is_killed, "the command at which the daemon is killed", f) < 0) {
        kill_child(st);
        return f->err;
    }
    st->armed = false;
    return st->cut ? 0 : failure_set(f, -EPROTO, "the daemon that was to be killed has ended by itself");
}

static void flood(void *arg)
{
    struct stand *st = arg;

    for (unsigned i = 0; i < FLOOD; i++)
        guest_write(&st->guest);
}

static int run_living(struct stand *st, struct failure *f)
{
    const struct scenario *s = st->scenario;
    bool slow = st->run.fault == FAULT_LOST || st->run.fault == FAULT_DROPPED;
    struct daemon_config config = {
        .task = s->task,
        .keep = s->keep,
        .ask = s->ask,
        .job = s->job,
        .narrow_reads = st->narrow,
        .timeout_ms = slow ? SHORT_MS : PATIENT_MS,
        .at_top = s->small_scratch ? flood : NULL,
        .arg = st,
        .impatient = slow,
        .verbose = st->run.verbose,
    };

    daemon_start(&st->daemon, &st->loop, st->path, &st->guest, &st->guest, &config);
    st->armed = true;
    if (wait_until(st, is_over, "the end of the session", f) < 0)
        return f->err;
    st->armed = false;
    daemon_close(&st->daemon);
    if (wait_until(st, is_closed, "the end of the connection", f) < 0)
        return f->err;
    return s->task == DAEMON_SELFTEST ? check_selftest(st, f) : check_session(st, f);
}

/* The daemon is killed with everything standing: when the export of one more map has been added. */
static int run_swept(struct stand *st, struct failure *f)
{
    struct run wanted = st->run;
    int r;

    st->run.fault = FAULT_KILLED;
    st->run.at = UINT_MAX;
    st->kill_at = "block-export-add {\"type\":\"nbd\",\"id\":\"qpull-*-late0\",*";
    r = run_killed(st, f);
    st->kill_at = NULL;
    st->run = wanted;
    st->ncommands = 0;
    st->cut = false;
    (void)strcpy(st->hit, "-");
    return r < 0 ? r : sweep(st, true, f);
}

/*
 * Whom nobody else stopped goes on, at the latest by a sweep; whom somebody stopped is still stopped, and let go on by
 * the test. A daemon that was killed in the moment between its look and its mark cannot be told from one that stopped
 * the guest: then the test goes first.
 */
static int check_pause(struct stand *st, bool suspect, struct failure *f)
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

static int run_and_judge(struct stand *st, struct failure *f)
{
    _cleanup_free_ char *before = guest_picture(&st->guest);
    unsigned nfds = count_fds(), nhandles = count_handles(st);
    unsigned ncommands, at;
    bool suspect;
    int r;

    r = st->scenario->swept ? run_swept(st, f) : st->run.fault == FAULT_KILLED ? run_killed(st, f) : run_living(st, f);
    if (r < 0)
        return r;
    ncommands = st->ncommands;
    at = st->run.at;
    suspect = st->run.fault == FAULT_KILLED || st->cut ||
              (st->scenario->swept ? st->daemon.failure.err != 0
                                   : st->daemon.problems.err && (is_excused(st) || !is_about_checkpoint(&st->daemon)));
    if (check_pause(st, suspect, f) < 0)
        return f->err;
    suspect |= st->paused;
    /* Once nothing of ours is in the way, what somebody else built goes, too. */
    if (!suspect && guest_undo_snapshots(&st->guest, f) < 0)
        return f->err;
    if (!suspect && compare_pictures(st, before, "with no problem reported", f) < 0)
        return f->err;
    if (!st->scenario->swept && check_checkpoints(st, f) < 0)
        return f->err;
    st->run.fault = FAULT_NONE;
    if (suspect && (sweep(st, false, f) < 0 || guest_undo_snapshots(&st->guest, f) < 0 ||
                    compare_pictures(st, before, "after the sweep", f) < 0))
        return f->err;
    if (!guest_runs(&st->guest))
        return failure_set(f, -EPROTO, "the guest is left stopped");
    st->ncommands = ncommands;
    st->run.at = at;
    if (check_server(st, f) < 0 || guest_check_writes(&st->guest, f) < 0)
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
    st->ncommands = 0;
    st->cut = st->paused = false;
    (void)strcpy(st->hit, "-");
    free(TAKE_PTR(st->sabotaged));
    memset(st->made, 0, sizeof(st->made));
    memset(st->made_hit, 0, sizeof(st->made_hit));
    guest_begin_run(&st->guest);
    for (unsigned i = 0; i < 3; i++)
        guest_write(&st->guest);
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

struct stand *stand_new(const struct scenario *s, const char *program, uint64_t seed)
{
    struct stand *st = calloc(1, sizeof(*st));

    if (!st || uv_loop_init(&st->loop) < 0)
        die("out of memory");
    st->scenario = s;
    st->program = program;
    guest_start(&st->guest, s->ndisks, s->small_scratch ? SMALL_SCRATCH : 0, seed);
    (void)snprintf(st->path, sizeof(st->path), "%s/proxy", st->guest.dir);
    st->proxy = proxy_new(&st->loop, st->path, st->guest.monitor, &proxy_ops, st);
    find_out_narrow(st);
    if (s->foreign_server)
        json_object_put(guest_call(
            &st->guest, NULL,
            "{'execute':'nbd-server-start','arguments':{'addr':{'type':'unix','data':{'path':'%s/foreign.sock'}}}}",
            st->guest.dir));
    return st;
}

static struct stand *abandoned; /* still reachable for the leak checker: its loop never runs again */

void stand_abandon(struct stand *st)
{
    st->next_abandoned = abandoned;
    abandoned = st;
    kill_child(st);
    guest_done(&st->guest);
}

void stand_free(struct stand *st)
{
    kill_child(st);
    proxy_free(st->proxy);
    (void)uv_run(&st->loop, UV_RUN_DEFAULT);
    if (uv_loop_close(&st->loop) != 0)
        die("the loop still has handles");
    guest_done(&st->guest);
    free(st->sabotaged);
    free(st);
}
