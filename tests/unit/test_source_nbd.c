/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What source/nbd promises beyond the contract of test_source.c: connecting, failing, deadlines, maps, pokes. */
#include "lib/loop.h"
#include "lib/test.h"
#include "nbd/nbd.h"
#include "nbd_servers.h"
#include "qmp/base.h"
#include "source/nbd.h"

#include <dirent.h>

#define MIB ((uint64_t)1 << 20)
#define TICK_MS 5u

#define SHORT_MS 300u /* a deadline that is meant to pass */

struct rig {
    uv_loop_t loop;
    uv_timer_t tick; /* UV_RUN_ONCE goes to wait for I/O even after a timer did what we wait for: not for long */
    struct server server;
    struct source_nbd_config config;
    unsigned nfds; /* open before the test */
    /* What the callbacks brought. */
    bool inside; /* a call of ours is in progress: no callback may come */
    unsigned nopened, nmapped, npoked, nlost, nclosed;
    struct source *source;
    struct map *map;
    struct failure failure;
};

static unsigned count_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned n = 0;

    assert_non_null(dir);
    while (readdir(dir))
        n++;
    assert_int_equal(closedir(dir), 0);
    return n;
}

static void on_tick(uv_timer_t *tick)
{
    (void)tick; /* ends a turn of the loop */
}

static int set_up(void **state)
{
    struct rig *rig = calloc(1, sizeof(*rig));

    assert_non_null(rig);
    loop_init(&rig->loop);
    assert_int_equal(uv_timer_init(&rig->loop, &rig->tick), 0);
    assert_int_equal(uv_timer_start(&rig->tick, on_tick, TICK_MS, TICK_MS), 0);
    server_init(&rig->server, SOMAXCONN);
    rig->config = (struct source_nbd_config){.socket_path = rig->server.path, .export_name = ""};
    rig->nfds = count_fds();
    *state = rig;
    return 0;
}

static void on_close(void *arg)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    rig->nclosed++;
}

static int tear_down(void **state)
{
    struct rig *rig = *state;

    if (rig->source) {
        source_close(TAKE_PTR(rig->source), on_close, rig);
        loop_until(&rig->loop, rig->nclosed);
    }
    map_free(rig->map);
    uv_close((uv_handle_t *)&rig->tick, NULL);
    loop_done(&rig->loop);
    server_done(&rig->server);
    free(rig);
    return 0;
}

static void on_lost(void *arg, const struct failure *why)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    rig->nlost++;
    rig->failure = *why;
}

static void on_open(void *arg, struct source *s, const struct failure *f)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    assert_true(!s == !!f);
    rig->nopened++;
    rig->source = s;
    if (f)
        rig->failure = *f;
}

static void on_map(void *arg, struct map *map, const struct failure *f)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    assert_true(!map == !!f);
    assert_true(count_fds() <= rig->nfds); /* "closes that connection before cb" */
    rig->nmapped++;
    map_free(rig->map);
    rig->map = map;
    if (f)
        rig->failure = *f;
}

static void on_poke(void *arg, const struct failure *f)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    assert_true(count_fds() <= rig->nfds);
    rig->npoked++;
    if (f)
        rig->failure = *f;
}

static struct source_nbd_open *start_open(struct rig *rig)
{
    struct source_nbd_open *open = NULL;

    rig->inside = true;
    assert_int_equal(source_nbd_open(&rig->loop, &rig->config, on_lost, on_open, rig, &open), 0);
    rig->inside = false;
    assert_non_null(open);
    return open;
}

static void expect_open(struct rig *rig)
{
    (void)start_open(rig);
    loop_until(&rig->loop, rig->nopened);
    if (!rig->source)
        fail_msg("%s", rig->failure.text);
}

static void expect_open_failure(struct rig *rig, int err, const char *word)
{
    (void)start_open(rig);
    loop_until(&rig->loop, rig->nopened);
    assert_null(rig->source);
    assert_int_equal(rig->failure.err, err);
    if (!strstr(rig->failure.text, word))
        fail_msg("no \"%s\" in: %s", word, rig->failure.text);
}

static void get_map(struct rig *rig, const char *context)
{
    rig->nmapped = 0;
    rig->inside = true;
    assert_int_equal(source_nbd_map(&rig->loop, &rig->config, context, on_map, rig, NULL), 0);
    rig->inside = false;
    loop_until(&rig->loop, rig->nmapped);
}

static void expect_map(struct rig *rig, const char *context)
{
    get_map(rig, context);
    if (!rig->map)
        fail_msg("%s", rig->failure.text);
}

static void expect_map_failure(struct rig *rig, const char *context, int err, const char *word)
{
    get_map(rig, context);
    assert_null(rig->map);
    assert_int_equal(rig->failure.err, err);
    if (!strstr(rig->failure.text, word))
        fail_msg("no \"%s\" in: %s", word, rig->failure.text);
}

/* -- reads --------------------------------------------------------------------------------------------------------- */

struct read {
    struct source_read r;
    unsigned order; /* 0: not answered; else the how-manieth answer it was */
    int err;
};

static unsigned nreads_answered;

static void on_read(struct source_read *r, int err)
{
    struct read *read = r->arg;

    assert_int_equal(read->order, 0);
    read->order = ++nreads_answered;
    read->err = err;
}

static void start_reads(struct rig *rig, struct read *reads, size_t n, size_t length)
{
    nreads_answered = 0;
    for (size_t i = 0; i < n; i++) {
        reads[i] = (struct read){.r = {.offset = i * length, .length = length, .cb = on_read, .arg = &reads[i]}};
        reads[i].r.buffer = malloc(length);
        assert_non_null(reads[i].r.buffer);
        assert_int_equal(source_read(rig->source, &reads[i].r), 0);
    }
}

static void free_reads(struct read *reads, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(reads[i].r.buffer);
}

/* -- opening ------------------------------------------------------------------------------------------------------- */

static void a_missing_socket_is_told_later_and_in_words(void **state)
{
    struct rig *rig = *state;

    rig->config.socket_path = "/nonexistent/nbd.sock";
    expect_open_failure(rig, -ENOENT, "/nonexistent/nbd.sock");
}

static void a_socket_that_nobody_serves_is_refused(void **state)
{
    struct rig *rig = *state;

    (void)close(rig->server.listener);
    rig->server.listener = -1;
    expect_open_failure(rig, -ECONNREFUSED, rig->server.path);
}

static void a_path_too_long_for_a_socket_is_refused_at_once(void **state)
{
    struct rig *rig = *state;
    char path[200];

    memset(path, 'x', sizeof(path) - 1);
    path[sizeof(path) - 1] = '\0';
    rig->config.socket_path = path;
    assert_int_equal(source_nbd_open(&rig->loop, &rig->config, on_lost, on_open, rig, NULL), -EINVAL);
    assert_int_equal(source_nbd_map(&rig->loop, &rig->config, "base:allocation", on_map, rig, NULL), -EINVAL);
    assert_int_equal(source_nbd_poke(&rig->loop, &rig->config, 0, "x", 1, on_poke, rig, NULL), -EINVAL);
}

static void a_cluster_that_is_no_power_of_two_is_refused_at_once(void **state)
{
    struct rig *rig = *state;

    rig->config.cluster = 65537;
    assert_int_equal(source_nbd_open(&rig->loop, &rig->config, on_lost, on_open, rig, NULL), -EINVAL);
}

static void an_unknown_export_is_told_by_name(void **state)
{
    struct rig *rig = *state;

    need_program("qemu-nbd");
    server_shell(&rig->server, "truncate -s 1M disk");
    server_start(&rig->server, "exec qemu-nbd -r -t -f raw -x here disk");
    rig->config.export_name = "elsewhere";
    expect_open_failure(rig, -ENOENT, "elsewhere");
}

static void a_server_that_never_greets_meets_the_deadline(void **state)
{
    struct rig *rig = *state;

    rig->config.timeout_ms = SHORT_MS;
    expect_open_failure(rig, -ETIMEDOUT, "did not answer");
}

static void a_server_that_never_negotiates_meets_the_deadline(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=delay memory 1M delay-open=60");
    rig->config.timeout_ms = SHORT_MS;
    expect_open_failure(rig, -ETIMEDOUT, "did not answer");
}

static void a_server_that_hangs_up_is_a_failure(void **state)
{
    struct rig *rig = *state;
    int fd;

    (void)start_open(rig);
    fd = accept(rig->server.listener, NULL, NULL);
    assert_true(fd >= 0);
    assert_int_equal(close(fd), 0);
    loop_until(&rig->loop, rig->nopened);
    assert_null(rig->source);
    assert_true(rig->failure.err < 0);
    assert_true(strlen(rig->failure.text) > 0);
}

static void a_server_that_speaks_something_else_is_a_failure(void **state)
{
    struct rig *rig = *state;
    static const char banner[] = "220 mail.example.com ESMTP, and much more of it than NBD's greeting is long\r\n";
    int fd;

    (void)start_open(rig);
    fd = accept(rig->server.listener, NULL, NULL);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, banner, strlen(banner)), strlen(banner));
    loop_until(&rig->loop, rig->nopened);
    assert_null(rig->source);
    assert_true(rig->failure.err < 0);
    assert_int_equal(close(fd), 0);
}

static void a_full_backlog_is_tried_again(void **state)
{
    struct rig *rig = *state;
    struct server crowded;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fds[16];
    size_t n = 0;

    need_program("nbdkit");
    server_init(&crowded, 0);
    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", crowded.path);
    for (; n < ARRAY_SIZE(fds); n++) {
        fds[n] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (connect(fds[n], (const struct sockaddr *)&address, sizeof(address)) < 0)
            break;
    }
    assert_true(n < ARRAY_SIZE(fds));
    rig->config.socket_path = crowded.path;
    (void)start_open(rig);
    for (int i = 0; i < 3; i++)
        (void)uv_run(&rig->loop, UV_RUN_ONCE);
    assert_int_equal(rig->nopened, 0);
    server_start(&crowded, "exec nbdkit -f memory 1M");
    loop_until(&rig->loop, rig->nopened);
    assert_non_null(rig->source);
    for (size_t i = 0; i <= n; i++)
        assert_int_equal(close(fds[i]), 0);
    server_done(&crowded);
}

static void an_unlinked_socket_is_reached_through_its_descriptor(void **state)
{
    struct rig *rig = *state;
    char path[32];
    int fd = open(rig->server.path, O_PATH | O_CLOEXEC);

    need_program("qemu-nbd");
    assert_true(fd >= 0);
    server_shell(&rig->server, "truncate -s 1M disk");
    server_start(&rig->server, "exec qemu-nbd -r -t -f raw -x '' disk");
    assert_int_equal(unlink(rig->server.path), 0);
    (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    rig->config.socket_path = path;
    (void)start_open(rig);
    /* Borrowed for the call only. */
    assert_int_equal(close(fd), 0);
    memset(path, 'x', sizeof(path) - 1);
    loop_until(&rig->loop, rig->nopened);
    assert_non_null(rig->source);
    assert_int_equal(rig->source->size, MIB);
}

static void opening_can_be_cancelled_at_any_time(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f memory 1M");
    for (unsigned turns = 0; turns < 12; turns++) {
        struct source_nbd_open *open = start_open(rig);

        rig->nopened = 0;
        rig->failure = (struct failure){0};
        for (unsigned i = 0; i < turns && !rig->nopened; i++)
            (void)uv_run(&rig->loop, UV_RUN_ONCE);
        if (!rig->nopened) {
            rig->inside = true;
            source_nbd_open_cancel(open);
            source_nbd_open_cancel(open);
            rig->inside = false;
            loop_until(&rig->loop, rig->nopened);
            assert_int_equal(rig->failure.err, -ECANCELED);
            assert_null(rig->source);
            assert_int_equal(count_fds(), rig->nfds - 1); /* less the listener */
        } else if (rig->source) {
            source_close(TAKE_PTR(rig->source), NULL, NULL);
        }
        loop_turn(&rig->loop, 3);
        assert_int_equal(rig->nopened, 1);
    }
}

static void the_socket_is_closed_before_the_callback(void **state)
{
    struct rig *rig = *state;
    unsigned nfds;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f memory 1M");
    nfds = count_fds();
    expect_open(rig);
    assert_true(count_fds() > nfds);
    source_close(TAKE_PTR(rig->source), on_close, rig);
    assert_int_equal(count_fds(), nfds);
    loop_until(&rig->loop, rig->nclosed);
    assert_int_equal(rig->nclosed, 1);
}

/* A quick server can bring libnbd through the handshake before we first wait: now and then, so try often. */
static void connecting_again_and_again_always_works(void **state)
{
    struct rig *rig = *state;

    need_program("qemu-nbd");
    server_shell(&rig->server, "truncate -s 1M disk");
    server_start(&rig->server, "exec qemu-nbd -r -t -e 9 -f raw -x '' disk");
    rig->config.timeout_ms = 10000;
    for (int i = 0; i < 300; i++)
        expect_map_failure(rig, "nobody:knows", -ENOENT, "nobody:knows");
}

static void an_empty_disk_opens_and_has_an_empty_map(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f memory 0");
    expect_open(rig);
    assert_int_equal(rig->source->size, 0);
    source_close(TAKE_PTR(rig->source), on_close, rig);
    loop_until(&rig->loop, rig->nclosed);
    expect_map(rig, "base:allocation");
    assert_int_equal(map_length(rig->map), 0);
}

/* -- failing reads ------------------------------------------------------------------------------------------------- */

static void a_failed_piece_fails_its_read_alone(void **state)
{
    struct rig *rig = *state;
    struct read reads[4];

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f eval get_size='echo 4M' "
                               "pread='if [ $4 -le 1600000 ] && [ $(($4 + $3)) -gt 1600000 ]; then "
                               "echo EIO sick >&2; exit 1; fi; head -c $3 /dev/zero'");
    expect_open(rig);
    start_reads(rig, reads, ARRAY_SIZE(reads), MIB);
    loop_until(&rig->loop, nreads_answered == ARRAY_SIZE(reads));
    for (size_t i = 0; i < ARRAY_SIZE(reads); i++)
        assert_int_equal(reads[i].err, i == 1 ? -EIO : 0);
    assert_int_equal(rig->nlost, 0);
    free_reads(reads, ARRAY_SIZE(reads));
}

static void a_reply_that_does_not_come_loses_the_source(void **state)
{
    struct rig *rig = *state;
    struct read reads[100];
    uint64_t start;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=delay memory 100M delay-read=60");
    rig->config.timeout_ms = SHORT_MS;
    expect_open(rig);
    start = uv_hrtime();
    start_reads(rig, reads, ARRAY_SIZE(reads), MIB);
    loop_until(&rig->loop, rig->nlost);
    assert_true(uv_hrtime() - start >= (SHORT_MS - 50) * UINT64_C(1000000));
    assert_int_equal(nreads_answered, ARRAY_SIZE(reads));
    for (size_t i = 0; i < ARRAY_SIZE(reads); i++)
        assert_int_equal(reads[i].err, -EIO);
    assert_int_equal(rig->failure.err, -ETIMEDOUT);
    assert_non_null(strstr(rig->failure.text, "did not answer"));
    free_reads(reads, ARRAY_SIZE(reads));
}

static void a_slow_server_that_answers_in_time_is_not_lost(void **state)
{
    struct rig *rig = *state;
    struct read reads[60];

    need_program("nbdkit");
    /* Ten at a time: the last ones wait for longer than the deadline, each of them upstream for less. */
    server_start(&rig->server, "exec nbdkit -f -t 10 --filter=delay memory 100M delay-read=100ms");
    rig->config.timeout_ms = 3 * SHORT_MS;
    expect_open(rig);
    start_reads(rig, reads, ARRAY_SIZE(reads), MIB);
    loop_until(&rig->loop, rig->nlost || nreads_answered == ARRAY_SIZE(reads));
    assert_int_equal(rig->nlost, 0);
    for (size_t i = 0; i < ARRAY_SIZE(reads); i++)
        assert_int_equal(reads[i].err, 0);
    free_reads(reads, ARRAY_SIZE(reads));
}

static void on_nap_over(uv_timer_t *nap)
{
    (void)nap; /* inactive is what the test waits for */
}

static void a_quiet_source_has_no_deadline(void **state)
{
    struct rig *rig = *state;
    struct read reads[1];
    uv_timer_t nap;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f memory 1M");
    rig->config.timeout_ms = SHORT_MS;
    expect_open(rig);
    for (int i = 0; i < 2; i++) {
        start_reads(rig, reads, 1, 512);
        loop_until(&rig->loop, nreads_answered == 1);
        assert_int_equal(reads[0].err, 0);
        free_reads(reads, 1);
        assert_int_equal(uv_timer_init(&rig->loop, &nap), 0);
        assert_int_equal(uv_timer_start(&nap, on_nap_over, 2 * SHORT_MS, 0), 0);
        loop_until(&rig->loop, !uv_is_active((uv_handle_t *)&nap));
        uv_close((uv_handle_t *)&nap, NULL);
        loop_turn(&rig->loop, 1);
    }
    assert_int_equal(rig->nlost, 0);
}

static void a_server_is_not_blamed_for_our_own_sleep(void **state)
{
    struct rig *rig = *state;
    struct read reads[50];

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=delay memory 100M delay-read=50ms");
    rig->config.timeout_ms = SHORT_MS;
    expect_open(rig);
    /* With requests in flight; and before any, which leaves the loop's idea of time behind. */
    start_reads(rig, reads, ARRAY_SIZE(reads), MIB);
    loop_turn(&rig->loop, 1);
    uv_sleep(SHORT_MS + 1500);
    loop_until(&rig->loop, rig->nlost || nreads_answered == ARRAY_SIZE(reads));
    assert_int_equal(rig->nlost, 0);
    free_reads(reads, ARRAY_SIZE(reads));
    uv_sleep(SHORT_MS + 100);
    start_reads(rig, reads, ARRAY_SIZE(reads), MIB);
    loop_until(&rig->loop, rig->nlost || nreads_answered == ARRAY_SIZE(reads));
    assert_int_equal(rig->nlost, 0);
    free_reads(reads, ARRAY_SIZE(reads));
}

static void a_connection_that_dies_in_mid_read_loses_the_source_once(void **state)
{
    struct rig *rig = *state;
    struct read reads[60];
    unsigned nfailed = 0;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f -t 4 --filter=delay memory 100M delay-read=20ms");
    expect_open(rig);
    start_reads(rig, reads, ARRAY_SIZE(reads), MIB);
    loop_until(&rig->loop, nreads_answered == 3);
    server_kill(&rig->server);
    loop_until(&rig->loop, rig->nlost);
    assert_int_equal(nreads_answered, ARRAY_SIZE(reads));
    for (size_t i = 0; i < ARRAY_SIZE(reads); i++) {
        assert_true(reads[i].err == 0 || reads[i].err == -EIO);
        nfailed += reads[i].err != 0;
    }
    assert_true(nfailed > 0);
    loop_turn(&rig->loop, 5);
    assert_int_equal(rig->nlost, 1);
    assert_true(rig->failure.err < 0);
    assert_true(strlen(rig->failure.text) > 0);
    free_reads(reads, ARRAY_SIZE(reads));
}

static void a_large_read_does_not_hold_up_a_small_one(void **state)
{
    struct rig *rig = *state;
    struct read reads[2];

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=delay memory 100M delay-read=5ms");
    expect_open(rig);
    start_reads(rig, &reads[0], 1, 64 * MIB);
    start_reads(rig, &reads[1], 1, 512);
    loop_until(&rig->loop, nreads_answered == 2);
    assert_int_equal(reads[1].order, 1);
    assert_int_equal(reads[0].order, 2);
    free_reads(reads, 2);
}

static void narrow_reads_never_cross_a_cluster(void **state)
{
    struct rig *rig = *state;
    struct read read = {.r = {.offset = 1000, .length = 1000000, .cb = on_read, .arg = &read}};
    char path[128], line[512];
    unsigned nrequests = 0;
    FILE *log;

    need_program("nbdkit");
    (void)snprintf(path, sizeof(path), "%s/log", rig->server.dir);
    server_start(&rig->server, "exec nbdkit -f --filter=log memory 100M logfile=log");
    rig->config.cluster = 65536;
    expect_open(rig);
    read.r.buffer = malloc(read.r.length);
    nreads_answered = 0;
    assert_int_equal(source_read(rig->source, &read.r), 0);
    loop_until(&rig->loop, nreads_answered == 1);
    free(read.r.buffer);
    log = fopen(path, "r");
    assert_non_null(log);
    while (fgets(line, sizeof(line), log)) {
        const char *what = strstr(line, " Read ");
        unsigned long long offset, count;

        what = what ? strstr(what, "offset=") : NULL;
        if (!what || sscanf(what, "offset=0x%llx count=0x%llx", &offset, &count) != 2)
            continue;
        assert_int_equal(offset / 65536, (offset + count - 1) / 65536);
        nrequests++;
    }
    assert_int_equal(fclose(log), 0);
    assert_int_equal(nrequests, 16); /* 1,001,000 bytes, rounded up */
}

/* -- maps ---------------------------------------------------------------------------------------------------------- */

/* What nbdinfo says about a context, as a map. */
static struct map *nbdinfo_map(struct rig *rig, const char *context)
{
    char command[256], line[256];
    struct map *m;
    FILE *out;

    (void)snprintf(command, sizeof(command), "nbdinfo --map=%s 'nbd+unix:///?socket=%s'", context, rig->server.path);
    out = popen(command, "r");
    assert_non_null(out);
    assert_int_equal(map_new(&m), 0);
    while (fgets(line, sizeof(line), out)) {
        unsigned long long offset, length, flags;

        assert_int_equal(sscanf(line, "%llu %llu %llu", &offset, &length, &flags), 3);
        assert_int_equal(offset, map_length(m));
        assert_int_equal(map_append(m, length, flags), 0);
    }
    assert_int_equal(pclose(out), 0);
    return m;
}

static void assert_same_map(const struct map *a, const struct map *b)
{
    struct nbd_extent *x = calloc(map_nruns(a), sizeof(*x)), *y = calloc(map_nruns(b), sizeof(*y));

    assert_int_equal(map_length(a), map_length(b));
    assert_int_equal(map_nruns(a), map_nruns(b));
    assert_int_equal(map_extents(a, 0, UINT64_MAX, x, map_nruns(a)), map_nruns(a));
    assert_int_equal(map_extents(b, 0, UINT64_MAX, y, map_nruns(b)), map_nruns(b));
    for (size_t i = 0; i < map_nruns(a); i++) {
        assert_int_equal(x[i].length, y[i].length);
        assert_int_equal(x[i].flags, y[i].flags);
    }
    free(x);
    free(y);
}

static void expect_nbdinfos_map(struct rig *rig, const char *context)
{
    struct map *other = nbdinfo_map(rig, context);

    expect_map(rig, context);
    assert_same_map(rig->map, other);
    map_free(other);
}

/* A small overlay with a backing file, holes, zeros and two bitmaps; its size is odd. */
#define ODD_SIZE (64 * MIB + 3 * 512)

static void start_qcow2(struct rig *rig)
{
    need_program("qemu-nbd");
    need_program("qemu-img");
    need_program("qemu-io");
    need_program("nbdinfo");
    server_shell(&rig->server, "qemu-img create -q -f qcow2 base 67110400;"
                               "qemu-io -f qcow2 -c 'write -q 0 1M' -c 'write -q 20M 3M' base;"
                               "qemu-img create -q -f qcow2 -b base -F qcow2 disk;"
                               "qemu-img bitmap --add disk monday;"
                               "qemu-io -f qcow2 -c 'write -q 5M 64k' -c 'write -q -z 21M 1M' disk;"
                               "qemu-img bitmap --add -g 4096 disk tuesday;"
                               "qemu-io -f qcow2 -c 'write -q 29M 64k' -c 'write -q 67109888 512' disk");
    server_start(&rig->server, "exec qemu-nbd -r -t -A -B monday -f qcow2 -x '' -e 9 disk");
}

static void allocation_equals_what_nbdinfo_sees(void **state)
{
    struct rig *rig = *state;

    start_qcow2(rig);
    expect_nbdinfos_map(rig, "base:allocation");
    assert_int_equal(map_length(rig->map), ODD_SIZE);
    /* 1 + 3 MiB of base, less 1 MiB of zeros; 64 KiB; and two clusters, the last of them cut by the end of the disk. */
    assert_int_equal(ODD_SIZE - map_count(rig->map, NBD_STATE_ZERO), 3 * MIB + 65536 + 65536 + 3 * 512);
}

static void depth_equals_what_nbdinfo_sees(void **state)
{
    struct rig *rig = *state;
    struct nbd_extent extent;

    start_qcow2(rig);
    expect_nbdinfos_map(rig, "qemu:allocation-depth");
    /* Depths are numbers, not bits: local, in the backing file, nowhere. */
    assert_int_equal(map_extents(rig->map, 5 * MIB, 1, &extent, 1), 1);
    assert_int_equal(extent.flags, 1);
    assert_int_equal(map_extents(rig->map, 20 * MIB, 1, &extent, 1), 1);
    assert_int_equal(extent.flags, 2);
    assert_int_equal(map_extents(rig->map, 40 * MIB, 1, &extent, 1), 1);
    assert_int_equal(extent.flags, 0);
}

static void dirty_bitmap_equals_what_nbdinfo_sees(void **state)
{
    struct rig *rig = *state;

    start_qcow2(rig);
    expect_nbdinfos_map(rig, "qemu:dirty-bitmap:monday");
    assert_int_equal(map_count(rig->map, NBD_STATE_DIRTY), MIB + 65536 + 65536 + 3 * 512);
}

static void allocation_of_a_raw_file_equals_what_nbdinfo_sees(void **state)
{
    struct rig *rig = *state;

    need_program("qemu-nbd");
    need_program("nbdinfo");
    /* More than one request long, with data across the boundary between two. */
    server_shell(&rig->server, "truncate -s 5000000512 disk;"
                               "dd if=/dev/urandom of=disk bs=1M count=4 seek=2046 conv=notrunc status=none");
    server_start(&rig->server, "exec qemu-nbd -r -t -f raw -x '' -e 9 disk");
    expect_nbdinfos_map(rig, "base:allocation");
    assert_int_equal(map_length(rig->map), 5000000512);
    assert_int_equal(map_nruns(rig->map), 3);
}

static void an_unknown_context_is_not_found(void **state)
{
    struct rig *rig = *state;

    start_qcow2(rig);
    expect_map_failure(rig, "qemu:dirty-bitmap:tuesday", -ENOENT, "qemu:dirty-bitmap:tuesday");
    expect_map_failure(rig, "nobody:knows", -ENOENT, "nobody:knows");
}

static void a_map_of_a_silent_server_meets_the_deadline(void **state)
{
    struct rig *rig = *state;

    rig->config.timeout_ms = SHORT_MS;
    expect_map_failure(rig, "base:allocation", -ETIMEDOUT, "did not answer");
}

static void a_map_whose_reply_does_not_come_meets_the_deadline(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=delay memory 100M delay-extents=60");
    rig->config.timeout_ms = SHORT_MS;
    expect_map_failure(rig, "base:allocation", -ETIMEDOUT, "did not answer");
}

static void a_server_that_dies_in_mid_map_is_a_failure(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    /* 500 requests, 5 ms each. */
    server_start(&rig->server, "exec nbdkit -f --filter=delay memory 1T delay-extents=5ms");
    rig->inside = true;
    assert_int_equal(source_nbd_map(&rig->loop, &rig->config, "base:allocation", on_map, rig, NULL), 0);
    rig->inside = false;
    for (int i = 0; i < 40; i++)
        (void)uv_run(&rig->loop, UV_RUN_ONCE);
    assert_int_equal(rig->nmapped, 0);
    server_kill(&rig->server);
    loop_until(&rig->loop, rig->nmapped);
    assert_null(rig->map);
    assert_true(rig->failure.err < 0);
    assert_true(strlen(rig->failure.text) > 0);
}

static void a_failed_status_is_told_with_its_place(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=error memory 100M error-extents=EIO error-extents-rate=1");
    expect_map_failure(rig, "base:allocation", -EIO, "offset 0");
}

static void a_map_can_be_cancelled_at_any_time(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f memory 1T");
    for (unsigned turns = 0; turns < 20; turns++) {
        struct source_nbd_map *map = NULL;

        rig->nmapped = 0;
        assert_int_equal(source_nbd_map(&rig->loop, &rig->config, "base:allocation", on_map, rig, &map), 0);
        for (unsigned i = 0; i < turns; i++)
            (void)uv_run(&rig->loop, UV_RUN_ONCE);
        if (rig->nmapped)
            fail_msg("after %u turns: %s", turns, rig->failure.text);
        rig->inside = true;
        source_nbd_map_cancel(map);
        source_nbd_map_cancel(map);
        rig->inside = false;
        loop_until(&rig->loop, rig->nmapped);
        assert_null(rig->map);
        assert_int_equal(rig->failure.err, -ECANCELED);
        loop_turn(&rig->loop, 3);
        assert_int_equal(rig->nmapped, 1);
    }
}

#define NDIRTY 100000u

static void a_map_of_a_huge_fragmented_disk_is_quick_and_small(void **state)
{
    struct rig *rig = *state;
    char path[128];
    uint64_t start;
    FILE *script;

    need_program("qemu-nbd");
    need_program("qemu-img");
    need_program("qemu-io");
    (void)snprintf(path, sizeof(path), "%s/script", rig->server.dir);
    script = fopen(path, "w");
    assert_non_null(script);
    /* Every other 64 KiB, the last of them at the very end. */
    for (unsigned i = 0; i < NDIRTY - 1; i++)
        (void)fprintf(script, "write -q -z %uk 64k\n", i * 128);
    (void)fprintf(script, "write -q -z 1073741760k 64k\n");
    assert_int_equal(fclose(script), 0);
    server_shell(&rig->server, "qemu-img create -q -f qcow2 disk 1T; qemu-img bitmap --add disk monday;"
                               "qemu-io -t unsafe -f qcow2 disk <script >/dev/null");
    server_start(&rig->server, "exec qemu-nbd -r -t -B monday -f qcow2 -x '' disk");
    start = uv_hrtime();
    expect_map(rig, "qemu:dirty-bitmap:monday");
    print_message("%zu runs of 1 TiB in %llu ms, %zu KiB\n", map_nruns(rig->map),
                  (unsigned long long)((uv_hrtime() - start) / 1000000), map_memory(rig->map) >> 10);
    assert_int_equal(map_length(rig->map), UINT64_C(1) << 40);
    assert_int_equal(map_nruns(rig->map), 2 * NDIRTY - 1);
    assert_int_equal(map_count(rig->map, NBD_STATE_DIRTY), (uint64_t)NDIRTY << 16);
    assert_true(map_memory(rig->map) <= 2 * NDIRTY * 16);
}

/* -- pokes --------------------------------------------------------------------------------------------------------- */

static const char poked[] = "these bytes are written through the server, at an odd place";

static struct source_nbd_poke *start_poke(struct rig *rig, uint64_t offset)
{
    struct source_nbd_poke *poke = NULL;

    rig->npoked = 0;
    rig->failure = (struct failure){0};
    rig->inside = true;
    assert_int_equal(source_nbd_poke(&rig->loop, &rig->config, offset, poked, sizeof(poked), on_poke, rig, &poke), 0);
    rig->inside = false;
    return poke;
}

static void a_poke_writes_what_a_read_then_sees(void **state)
{
    struct rig *rig = *state;
    struct read reads[1];

    need_program("qemu-nbd");
    server_shell(&rig->server, "truncate -s 1M disk");
    server_start(&rig->server, "exec qemu-nbd -t -e 9 -f raw -x '' disk");
    (void)start_poke(rig, 12345);
    loop_until(&rig->loop, rig->npoked);
    assert_string_equal(rig->failure.text, "");
    expect_open(rig);
    start_reads(rig, reads, 1, 100000);
    loop_until(&rig->loop, nreads_answered);
    assert_memory_equal((char *)reads[0].r.buffer + 12345, poked, sizeof(poked));
    free_reads(reads, 1);
}

static void a_poke_into_a_read_only_export_fails(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f -r memory 1M");
    (void)start_poke(rig, 0);
    loop_until(&rig->loop, rig->npoked);
    assert_true(rig->failure.err < 0);
    assert_true(strlen(rig->failure.text) > 0);
}

static void a_poke_that_the_server_refuses_fails(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=error memory 1M error-pwrite=ENOSPC error-pwrite-rate=1");
    (void)start_poke(rig, 0);
    loop_until(&rig->loop, rig->npoked);
    assert_int_equal(rig->failure.err, -ENOSPC);
    assert_int_equal(source_nbd_poke(&rig->loop, &rig->config, 0, poked, 0, on_poke, rig, NULL), -EINVAL);
}

static void a_poke_of_a_silent_server_meets_the_deadline(void **state)
{
    struct rig *rig = *state;

    rig->config.timeout_ms = SHORT_MS;
    (void)start_poke(rig, 0);
    loop_until(&rig->loop, rig->npoked);
    assert_int_equal(rig->failure.err, -ETIMEDOUT);
}

static void a_poke_can_be_cancelled_at_any_time(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=delay memory 1M delay-write=60");
    for (unsigned turns = 0; turns < 10; turns++) {
        struct source_nbd_poke *poke = start_poke(rig, 0);

        for (unsigned i = 0; i < turns; i++)
            loop_turn(&rig->loop, 1);
        rig->inside = true;
        source_nbd_poke_cancel(poke);
        source_nbd_poke_cancel(poke);
        rig->inside = false;
        loop_until(&rig->loop, rig->npoked);
        assert_int_equal(rig->failure.err, -ECANCELED);
        loop_turn(&rig->loop, 3);
        assert_int_equal(rig->npoked, 1);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_missing_socket_is_told_later_and_in_words),
        TEST(a_socket_that_nobody_serves_is_refused),
        TEST(a_path_too_long_for_a_socket_is_refused_at_once),
        TEST(a_cluster_that_is_no_power_of_two_is_refused_at_once),
        TEST(an_unknown_export_is_told_by_name),
        TEST(a_server_that_never_greets_meets_the_deadline),
        TEST(a_server_that_never_negotiates_meets_the_deadline),
        TEST(a_server_that_hangs_up_is_a_failure),
        TEST(a_server_that_speaks_something_else_is_a_failure),
        TEST(a_full_backlog_is_tried_again),
        TEST(an_unlinked_socket_is_reached_through_its_descriptor),
        TEST(opening_can_be_cancelled_at_any_time),
        TEST(the_socket_is_closed_before_the_callback),
        TEST(connecting_again_and_again_always_works),
        TEST(an_empty_disk_opens_and_has_an_empty_map),
        TEST(a_failed_piece_fails_its_read_alone),
        TEST(a_reply_that_does_not_come_loses_the_source),
        TEST(a_slow_server_that_answers_in_time_is_not_lost),
        TEST(a_quiet_source_has_no_deadline),
        TEST(a_server_is_not_blamed_for_our_own_sleep),
        TEST(a_connection_that_dies_in_mid_read_loses_the_source_once),
        TEST(a_large_read_does_not_hold_up_a_small_one),
        TEST(narrow_reads_never_cross_a_cluster),
        TEST(allocation_equals_what_nbdinfo_sees),
        TEST(depth_equals_what_nbdinfo_sees),
        TEST(dirty_bitmap_equals_what_nbdinfo_sees),
        TEST(allocation_of_a_raw_file_equals_what_nbdinfo_sees),
        TEST(an_unknown_context_is_not_found),
        TEST(a_map_of_a_silent_server_meets_the_deadline),
        TEST(a_map_whose_reply_does_not_come_meets_the_deadline),
        TEST(a_server_that_dies_in_mid_map_is_a_failure),
        TEST(a_failed_status_is_told_with_its_place),
        TEST(a_map_can_be_cancelled_at_any_time),
        TEST(a_map_of_a_huge_fragmented_disk_is_quick_and_small),
        TEST(a_poke_writes_what_a_read_then_sees),
        TEST(a_poke_into_a_read_only_export_fails),
        TEST(a_poke_that_the_server_refuses_fails),
        TEST(a_poke_of_a_silent_server_meets_the_deadline),
        TEST(a_poke_can_be_cancelled_at_any_time),
    };

    if (!have_program("nbdkit") && !have_program("qemu-nbd")) {
        (void)fputs("skipped: neither nbdkit nor qemu-nbd is here\n", stderr);
        return TEST_SKIPPED;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
