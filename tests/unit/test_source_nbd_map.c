/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Maps, pokes and flushes of source/nbd, against real servers and what nbdinfo says. */
#include "nbd/nbd.h"
#include "source_rig.h"

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
        /* offset, length, type and its description */
        char *end = line;
        uint64_t offset = strtoull(end, &end, 10), length = strtoull(end, &end, 10), flags = strtoull(end, &end, 10);

        assert_int_equal(offset, map_length(m));
        assert_int_equal(map_append(m, length, flags), 0);
    }
    assert_int_equal(pclose(out), 0);
    return m;
}

static void assert_same_map(const struct map *a, const struct map *b)
{
    struct map_extent *x = calloc(map_nruns(a), sizeof(*x)), *y = calloc(map_nruns(b), sizeof(*y));

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
#define ODD_SIZE (64 * MIB + UINT64_C(3) * 512)

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
    assert_int_equal(ODD_SIZE - map_count(rig->map, NBD_STATE_ZERO), 3 * MIB + 65536 + 65536 + UINT64_C(3) * 512);
}

static void depth_equals_what_nbdinfo_sees(void **state)
{
    struct rig *rig = *state;
    struct map_extent extent;

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
    assert_int_equal(map_count(rig->map, NBD_STATE_DIRTY), MIB + 65536 + 65536 + UINT64_C(3) * 512);
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
        await_mapped(rig);
        assert_null(rig->map);
        assert_int_equal(rig->failure.err, -ECANCELED);
        loop_turn(&rig->loop, 3);
        assert_int_equal(rig->nmapped, 1);
    }
}

#define NDIRTY ((size_t)100000)

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
    for (size_t i = 0; i < NDIRTY - 1; i++)
        (void)fprintf(script, "write -q -z %zuk 64k\n", i * 128);
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
    assert_int_equal(map_count(rig->map, NBD_STATE_DIRTY), NDIRTY << 16);
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

static void await_poked(struct rig *rig)
{
    loop_until(&rig->loop, rig->npoked);
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
        await_poked(rig);
        assert_int_equal(rig->failure.err, -ECANCELED);
        loop_turn(&rig->loop, 3);
        assert_int_equal(rig->npoked, 1);
    }
}

#define EVAL "exec nbdkit -f eval get_size='echo 1M' pread='dd if=/dev/zero bs=$3 count=1' "

static void flush(struct rig *rig, const char *server)
{
    server_start(&rig->server, server);
    rig->npoked = 0;
    rig->failure = (struct failure){0};
    rig->inside = true;
    assert_int_equal(source_nbd_flush(&rig->loop, &rig->config, on_poke, rig), 0);
    rig->inside = false;
    loop_until(&rig->loop, rig->npoked);
}

static void a_flush_reaches_the_server(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    flush(rig, EVAL "can_flush='exit 0' flush='echo flushed >flushed'");
    assert_string_equal(rig->failure.text, "");
    server_shell(&rig->server, "grep -q flushed flushed");
}

static void a_flush_that_the_server_refuses_fails(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    flush(rig, EVAL "can_flush='exit 0' flush='echo ENOSPC full >&2; exit 1'");
    assert_int_equal(rig->failure.err, -ENOSPC);
}

static void a_flush_that_the_server_does_not_know_fails(void **state)
{
    struct rig *rig = *state;

    need_program("nbdkit");
    flush(rig, EVAL "can_flush='exit 3'");
    assert_true(rig->failure.err < 0);
    assert_true(strlen(rig->failure.text) > 0);
}

static void a_flush_of_a_silent_server_meets_the_deadline(void **state)
{
    struct rig *rig = *state;

    rig->config.timeout_ms = SHORT_MS;
    rig->inside = true;
    assert_int_equal(source_nbd_flush(&rig->loop, &rig->config, on_poke, rig), 0);
    rig->inside = false;
    loop_until(&rig->loop, rig->npoked);
    assert_int_equal(rig->failure.err, -ETIMEDOUT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
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
        TEST(a_flush_reaches_the_server),
        TEST(a_flush_that_the_server_refuses_fails),
        TEST(a_flush_that_the_server_does_not_know_fails),
        TEST(a_flush_of_a_silent_server_meets_the_deadline),
    };

    if (!have_program("nbdkit") && !have_program("qemu-nbd")) {
        (void)fputs("skipped: neither nbdkit nor qemu-nbd is here\n", stderr);
        return TEST_SKIPPED;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
