/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What source/nbd promises beyond the contract of test_source.c: connecting, failing, deadlines, fairness. */
#include "source_rig.h"

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
            await_opened(rig);
            assert_int_equal(rig->failure.err, -ECANCELED);
            assert_null(rig->source);
            assert_int_equal(count_fds(), rig->nfds - 1); /* less the listener */
        } else if (rig->source) {
            rig->nclosed = 0;
            source_close(TAKE_PTR(rig->source), on_close, rig);
            loop_until(&rig->loop, rig->nclosed);
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
    loop_until(&rig->loop, rig->nclosed);
    assert_int_equal(count_fds(), nfds);
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

/* That is how QEMU answers for a frozen disk that it could not keep frozen. */
static void a_read_refused_as_invalid_says_that_the_snapshot_is_lost(void **state)
{
    struct rig *rig = *state;
    struct read reads[2];

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=error memory 4M error-pread=EINVAL error-pread-rate=1");
    expect_open(rig);
    start_reads(rig, reads, ARRAY_SIZE(reads), MIB);
    loop_until(&rig->loop, nreads_answered == ARRAY_SIZE(reads));
    assert_int_equal(reads[0].err, -ESTALE);
    assert_int_equal(reads[1].err, -ESTALE);
    assert_int_equal(rig->nlost, 0); /* the connection stands, and whoever reads knows what to do */
    free_reads(reads, ARRAY_SIZE(reads));
}

/* To come up takes a server as long as it takes: only then deadlines are for its answers. */
static void await_server(struct rig *rig)
{
    expect_open(rig);
    source_close(TAKE_PTR(rig->source), on_close, rig);
    loop_until(&rig->loop, rig->nclosed);
    rig->nopened = rig->nclosed = 0;
}

static void a_reply_that_does_not_come_loses_the_source(void **state)
{
    struct rig *rig = *state;
    struct read reads[100];
    uint64_t start;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=delay memory 100M delay-read=60");
    await_server(rig);
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
    server_start(&rig->server, "exec nbdkit -f -t 10 --filter=delay memory 100M delay-read=200ms");
    await_server(rig);
    rig->config.timeout_ms = LONG_MS;
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

static void take_nap(struct rig *rig, unsigned ms)
{
    uv_timer_t nap;

    assert_int_equal(uv_timer_init(&rig->loop, &nap), 0);
    assert_int_equal(uv_timer_start(&nap, on_nap_over, ms, 0), 0);
    loop_until(&rig->loop, !uv_is_active((uv_handle_t *)&nap));
    uv_close((uv_handle_t *)&nap, NULL);
    loop_turn(&rig->loop, 1);
}

static void expect_good_read(struct rig *rig)
{
    struct read reads[1];

    start_reads(rig, reads, 1, 512);
    loop_until(&rig->loop, nreads_answered == 1);
    assert_int_equal(reads[0].err, 0);
    free_reads(reads, 1);
}

static void a_quiet_source_has_no_deadline(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f memory 1M");
    await_server(rig);
    rig->config.timeout_ms = LONG_MS;
    expect_open(rig);
    expect_good_read(rig);
    take_nap(rig, LONG_MS + SHORT_MS);
    expect_good_read(rig);
    assert_int_equal(rig->nlost, 0);
}

static void a_server_is_not_blamed_for_our_own_sleep(void **state)
{
    struct rig *rig = *state;
    struct read reads[50];

    need_program("nbdkit");
    server_start(&rig->server, "exec nbdkit -f --filter=delay memory 100M delay-read=50ms");
    await_server(rig);
    rig->config.timeout_ms = LONG_MS;
    expect_open(rig);
    /* With requests in flight; and before any, which leaves the loop's idea of time behind. */
    start_reads(rig, reads, ARRAY_SIZE(reads), MIB);
    loop_turn(&rig->loop, 1);
    uv_sleep(LONG_MS + 1500);
    loop_until(&rig->loop, rig->nlost || nreads_answered == ARRAY_SIZE(reads));
    assert_int_equal(rig->nlost, 0);
    free_reads(reads, ARRAY_SIZE(reads));
    uv_sleep(LONG_MS + 100);
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
        const char *where = strstr(line, " offset="), *size = strstr(line, " count=");
        uint64_t offset, count;

        if (!strstr(line, " Read ") || !where || !size)
            continue;
        offset = strtoull(where + strlen(" offset="), NULL, 0);
        count = strtoull(size + strlen(" count="), NULL, 0);
        assert_int_equal(offset / 65536, (offset + count - 1) / 65536);
        nrequests++;
    }
    assert_int_equal(fclose(log), 0);
    assert_int_equal(nrequests, 16); /* 1,001,000 bytes, rounded up */
}

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
        TEST(a_read_refused_as_invalid_says_that_the_snapshot_is_lost),
        TEST(a_reply_that_does_not_come_loses_the_source),
        TEST(a_slow_server_that_answers_in_time_is_not_lost),
        TEST(a_quiet_source_has_no_deadline),
        TEST(a_server_is_not_blamed_for_our_own_sleep),
        TEST(a_connection_that_dies_in_mid_read_loses_the_source_once),
        TEST(a_large_read_does_not_hold_up_a_small_one),
        TEST(narrow_reads_never_cross_a_cluster),
    };

    if (!have_program("nbdkit") && !have_program("qemu-nbd")) {
        (void)fputs("skipped: neither nbdkit nor qemu-nbd is here\n", stderr);
        return TEST_SKIPPED;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
