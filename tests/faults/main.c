/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The fault sweep: every QMP command of a session, of the self-test and of the sweep x every fault, against a real
 * QEMU.
 *
 *   faults SCENARIO… [--every N] [--slow-every N] [--offset M] [--fault NAME] [--at K] [--seed S] [--failures N]
 *          [--real-stalls] [--verbose]
 *
 * Without a scenario: all. --every N takes each N-th of the runs, beginning with the M-th; --slow-every N thins out
 * once more those that wait for deadlines and repetitions. --fault and --at narrow it to what a failed run named.
 * --real-stalls: where QEMU stands still, deadlines are those of the program (30 s), and it does so for longer.
 */
#include "die.h"
#include "run.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>

#define TEST_SKIPPED 77
/* The first command after the freeze that adds exports: those of the live disks are before it. */
#define EXPORTS "block-export-add {\"type\":\"nbd\",\"id\":\"qpull-*-export0\"*"

static const struct scenario scenarios[] = {
    {.name = "one-disk", .ndisks = 1, .keep = 1, .ask = true},
    {.name = "one-disk-dropped", .ndisks = 1},
    {.name = "three-disks", .ndisks = 3, .keep = 5},
    {.name = "snapshot", .ndisks = 1, .ask = true, .snapshot_at = EXPORTS},
    {.name = "job", .ndisks = 1, .keep = 1, .ask = true, .job = true},
    {.name = "job-three-disks", .ndisks = 3, .keep = 5, .job = true},
    {.name = "job-snapshot", .ndisks = 1, .ask = true, .snapshot_at = EXPORTS, .job = true},
    {.name = "job-sweep", .ndisks = 3, .ask = true, .swept = true, .job = true},
    {.name = "no-reopen", .ndisks = 1, .keep = 1, .no_reopen = true},
    {.name = "no-reopen-three", .ndisks = 3, .keep = 5, .no_reopen = true},
    {.name = "paused", .ndisks = 1, .no_reopen = true, .pause_at = "blockdev-add {\"driver\":\"null-co\"*"},
    {.name = "full-scratch", .ndisks = 1, .keep = 1, .small_scratch = true},
    {.name = "foreign-server", .ndisks = 1, .keep = 1, .foreign_server = true},
    {.name = "selftest", .ndisks = 1, .task = DAEMON_SELFTEST},
    {.name = "sweep", .ndisks = 1, .ask = true, .swept = true},
};

static struct options {
    unsigned every, slow_every, offset, max_failures; /* after so many more of the same teach nothing */
    int fault, at;                                    /* -1: all */
    uint64_t seed;
    bool real_stalls, verbose;
} options = {.every = 1, .slow_every = 1, .max_failures = 10, .fault = -1, .at = -1, .seed = 1};

static char where[256] = "at the start";

void die(const char *fmt, ...)
{
    va_list ap;

    (void)fflush(stdout);
    (void)fprintf(stderr, "%s: ", where);
    va_start(ap, fmt);
    (void)vfprintf(stderr, fmt, ap);
    va_end(ap);
    (void)fputc('\n', stderr);
    exit(EXIT_FAILURE);
}

static bool applies(const struct scenario *s, enum fault f)
{
    bool stops = f == FAULT_STOP || f == FAULT_STOP_TWICE;

    if (s->swept)
        return f != FAULT_NONE && !stops;
    if (s->small_scratch && (f == FAULT_KILLED || f == FAULT_KILLED_BEFORE))
        return false; /* the daemon to be killed has no guest that fills its scratch */
    return f != FAULT_NONE && !(stops && s->task != DAEMON_SESSION);
}

/* One QEMU serves all runs of a scenario, until one goes wrong. */
struct series {
    const struct scenario *scenario;
    const char *program;
    struct stand *stand;
    unsigned nruns, nfailures, ncommands, slowest_ms;
};

static unsigned total_runs;
static bool may_mount;

static void run_one(struct series *s, enum fault fault, unsigned at)
{
    struct run run = {
        .scenario = s->scenario,
        .fault = fault,
        .at = at,
        .writing = fault == FAULT_NONE || (at + (unsigned)fault) % 2,
        .real_stalls = options.real_stalls,
        .verbose = options.verbose,
    };
    struct failure f = {0};
    unsigned ncommands = 0;
    int r;

    (void)snprintf(where, sizeof(where), "%s --fault %s --at %u --seed %llu", s->scenario->name, fault_name(fault), at,
                   (unsigned long long)options.seed);
    if (!s->stand)
        s->stand = stand_new(s->scenario, s->program, options.seed);
    s->nruns++;
    total_runs++;
    r = stand_run(s->stand, &run, &ncommands, &f);
    s->slowest_ms = MAX(s->slowest_ms, stand_slowest_ms(s->stand));
    if (r == 0) {
        if (fault == FAULT_NONE)
            s->ncommands = ncommands;
        if (options.verbose)
            (void)printf("  ok: %s (%s)\n", where, stand_hit(s->stand));
        return;
    }
    s->nfailures++;
    (void)printf("FAILED: %s\n  hit: %s\n  %s\n", where, stand_hit(s->stand), f.text);
    (void)fflush(stdout);
    stand_abandon(TAKE_PTR(s->stand));
}

static void check_data(struct series *s)
{
    struct failure f = {0};

    if (!s->stand || stand_check_data(s->stand, &f) == 0)
        return;
    s->nfailures++;
    (void)printf("FAILED: %s, at the latest after %s\n  %s\n", s->scenario->name, where, f.text);
    stand_abandon(TAKE_PTR(s->stand));
}

static bool is_slow(enum fault f)
{
    return f == FAULT_REFUSED_ALWAYS || f == FAULT_LOST || f == FAULT_DROPPED || f == FAULT_STALLED ||
           f == FAULT_QEMU_DIES || f == FAULT_QEMU_DIES_AFTER;
}

static void run_fault(struct series *s, enum fault fault, unsigned *counter)
{
    uint64_t began = uv_hrtime();
    unsigned nruns = s->nruns, every = options.every * (is_slow(fault) ? options.slow_every : 1);

    for (unsigned at = 0; at < s->ncommands && s->nfailures < options.max_failures; at++) {
        if (options.at >= 0 ? at != (unsigned)options.at : (*counter)++ % every != options.offset)
            continue;
        run_one(s, fault, at);
    }
    check_data(s);
    (void)printf("  %-16s %4u runs, %5.1f s\n", fault_name(fault), s->nruns - nruns,
                 (double)(uv_hrtime() - began) / 1e9);
    (void)fflush(stdout);
}

static unsigned run_scenario(const struct scenario *scenario, const char *program)
{
    struct series s = {.scenario = scenario, .program = program};
    unsigned counter = 0;

    if (scenario->small_scratch && !may_mount) {
        (void)printf("%s: skipped, only root may mount a small file system\n", scenario->name);
        return 0;
    }
    run_one(&s, FAULT_NONE, 0);
    run_one(&s, FAULT_NONE, 0);
    (void)printf("%s: %u commands%s; every %u from %u\n", scenario->name, s.ncommands,
                 s.nfailures ? ", and it fails without a fault" : "", options.every, options.offset);
    for (int fault = 0; fault < FAULT_NFAULTS && s.ncommands && s.nfailures < options.max_failures; fault++) {
        if (applies(scenario, (enum fault)fault) && (options.fault < 0 || options.fault == fault))
            run_fault(&s, (enum fault)fault, &counter);
    }
    if (s.stand)
        stand_free(s.stand);
    (void)printf("%s: %u runs, %u failed; the guest's slowest write took %u ms\n", scenario->name, s.nruns, s.nfailures,
                 s.slowest_ms);
    return s.nfailures;
}

static int parse_fault(const char *name)
{
    for (int i = 0; i < FAULT_NFAULTS; i++) {
        if (strcmp(fault_name((enum fault)i), name) == 0)
            return i;
    }
    die("no such fault: %s", name);
}

static void parse(int argc, char **argv)
{
    static const struct option longs[] = {
        {"every", required_argument, NULL, 'e'},    {"slow-every", required_argument, NULL, 'E'},
        {"offset", required_argument, NULL, 'o'},   {"fault", required_argument, NULL, 'f'},
        {"at", required_argument, NULL, 'a'},       {"seed", required_argument, NULL, 's'},
        {"failures", required_argument, NULL, 'n'}, {"real-stalls", no_argument, NULL, 'r'},
        {"verbose", no_argument, NULL, 'v'},        {NULL, 0, NULL, 0},
    };

    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (c) {
        case 'e':
            options.every = (unsigned)strtoul(optarg, NULL, 10);
            break;
        case 'E':
            options.slow_every = (unsigned)strtoul(optarg, NULL, 10);
            break;
        case 'o':
            options.offset = (unsigned)strtoul(optarg, NULL, 10);
            break;
        case 'f':
            options.fault = parse_fault(optarg);
            break;
        case 'a':
            options.at = (int)strtoul(optarg, NULL, 10);
            break;
        case 'n':
            options.max_failures = (unsigned)strtoul(optarg, NULL, 10);
            break;
        case 's':
            options.seed = strtoull(optarg, NULL, 10);
            break;
        case 'r':
            options.real_stalls = true;
            break;
        case 'v':
            options.verbose = true;
            break;
        default:
            exit(2);
        }
    }
    if (options.every == 0 || options.slow_every == 0 || options.offset >= options.every)
        die("--offset is below --every");
}

static bool is_wanted(int argc, char **argv, const char *name)
{
    for (int i = optind; i < argc; i++) {
        if (strcmp(argv[i], name) == 0)
            return true;
    }
    return optind == argc;
}

int main(int argc, char **argv)
{
    uint64_t began = uv_hrtime();
    unsigned nfailures = 0;

    if (argc == 10 && strcmp(argv[1], "--as-daemon") == 0)
        return run_as_daemon(argv + 2);
    parse(argc, argv);
    if (!guest_possible()) {
        (void)printf("skipped: qemu-system-x86_64, qemu-img or stdbuf is missing\n");
        return TEST_SKIPPED;
    }
    may_mount = guest_can_limit_scratch(); /* before there are threads, which would stay outside */
    for (size_t i = 0; i < ARRAY_SIZE(scenarios); i++) {
        if (is_wanted(argc, argv, scenarios[i].name))
            nfailures += run_scenario(&scenarios[i], "/proc/self/exe");
    }
    (void)printf("%u runs, %u failed, %.1f min\n", total_runs, nfailures, (double)(uv_hrtime() - began) / 60e9);
    return nfailures ? EXIT_FAILURE : EXIT_SUCCESS;
}
