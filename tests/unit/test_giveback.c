/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What is given back is freed at the server, in whole clusters, after older reads; and cannot be read any more. */
#include "lib/loop.h"
#include "lib/test.h"
#include "nbd_servers.h"
#include "qmp/base.h"
#include "source/giveback.h"
#include "source/memory.h"

#include <sys/stat.h>

#define CLUSTER 65536u
#define NCLUSTERS 32u
#define SIZE (NCLUSTERS * CLUSTER + 3 * 512) /* the last one is no whole one */
#define QUIET_MS 300                         /* in which nothing is to happen */

#define SERVER "exec qemu-nbd -t -f raw --discard=unmap -x '' disk"

static unsigned char data[SIZE];

struct rig {
    uv_loop_t loop;
    uv_timer_t tick;
    struct server server;
    struct source *below, *source;
    struct source_read read;
    unsigned char *buffer; /* owned */
    unsigned nread;
    int err;
    bool closed, quiet;
};

static void on_tick(uv_timer_t *tick)
{
}

static int set_up(void **state)
{
    struct rig *rig = calloc(1, sizeof(*rig));

    assert_non_null(rig);
    loop_init(&rig->loop);
    assert_int_equal(uv_timer_init(&rig->loop, &rig->tick), 0);
    assert_int_equal(uv_timer_start(&rig->tick, on_tick, 5, 5), 0);
    server_init(&rig->server, 8);
    server_write_file(&rig->server, "disk", data, sizeof(data));
    rig->buffer = malloc(sizeof(data));
    assert_non_null(rig->buffer);
    *state = rig;
    return 0;
}

static void on_closed(void *arg)
{
    ((struct rig *)arg)->closed = true;
}

static int tear_down(void **state)
{
    struct rig *rig = *state;

    if (rig->source) {
        source_close(rig->source, on_closed, rig);
        loop_until(&rig->loop, rig->closed);
    }
    uv_close((uv_handle_t *)&rig->tick, NULL);
    loop_done(&rig->loop);
    server_done(&rig->server);
    free(rig->buffer);
    free(rig);
    return 0;
}

static void on_lost(void *arg, const struct failure *why)
{
    fail_msg("%s", why->text);
}

static struct rig *open_rig(void **state, const char *command)
{
    struct rig *rig = *state;
    struct source_nbd_config config = {.socket_path = rig->server.path, .export_name = ""};

    need_program("qemu-nbd");
    server_start(&rig->server, command);
    assert_int_equal(source_memory_new(&rig->loop, data, SIZE, on_lost, rig, &rig->below), 0);
    assert_int_equal(giveback_new(&rig->loop, &config, CLUSTER, rig->below, &rig->source), 0);
    giveback_begin(rig->source);
    return rig;
}

static void on_read(struct source_read *r, int err)
{
    struct rig *rig = r->arg;

    rig->nread++;
    rig->err = err;
}

static int start_read(struct rig *rig, uint64_t offset, size_t length)
{
    rig->read =
        (struct source_read){.offset = offset, .length = length, .buffer = rig->buffer, .cb = on_read, .arg = rig};
    return source_read(rig->source, &rig->read);
}

static void assert_reads(struct rig *rig, uint64_t offset, size_t length)
{
    unsigned before = rig->nread;

    assert_int_equal(start_read(rig, offset, length), 0);
    loop_until(&rig->loop, rig->nread > before);
    assert_int_equal(rig->err, 0);
    assert_memory_equal(rig->buffer, data + offset, length);
}

/* How many clusters of the server's file are holes, and which is the first and the last. */
static unsigned count_holes(const struct rig *rig, unsigned *ret_first, unsigned *ret_last)
{
    char path[128];
    unsigned n = 0;
    int fd;

    (void)snprintf(path, sizeof(path), "%s/disk", rig->server.dir);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    assert_true(fd >= 0);
    for (unsigned i = 0; i < NCLUSTERS; i++) {
        if (lseek(fd, (off_t)i * CLUSTER, SEEK_DATA) < (off_t)(i + 1) * CLUSTER &&
            lseek(fd, (off_t)i * CLUSTER, SEEK_DATA) >= 0)
            continue;
        if (n++ == 0)
            *ret_first = i;
        *ret_last = i;
    }
    (void)close(fd);
    return n;
}

static void on_quiet(uv_timer_t *t)
{
    ((struct rig *)t->data)->quiet = true;
}

static void let_pass(struct rig *rig)
{
    uv_timer_t t = {.data = rig};

    rig->quiet = false;
    (void)uv_timer_init(&rig->loop, &t);
    (void)uv_timer_start(&t, on_quiet, QUIET_MS, 0);
    loop_until(&rig->loop, rig->quiet);
    uv_close((uv_handle_t *)&t, NULL);
    (void)uv_run(&rig->loop, UV_RUN_NOWAIT);
}

static void whole_clusters_are_freed_and_cannot_be_read(void **state)
{
    struct rig *rig = open_rig(state, SERVER);
    unsigned first = 0, last = 0;

    source_give_back(rig->source, 4 * CLUSTER + 1, 4 * CLUSTER); /* 5, 6, 7 are whole */
    loop_until(&rig->loop, count_holes(rig, &first, &last) == 3);
    assert_int_equal(first, 5);
    assert_int_equal(last, 7);
    assert_int_equal(start_read(rig, 5 * CLUSTER, 1), -ENODATA);
    assert_int_equal(start_read(rig, 8 * CLUSTER - 1, 1), -ENODATA);
    assert_int_equal(start_read(rig, 4 * CLUSTER, 2 * CLUSTER), -ENODATA);
    assert_int_equal(start_read(rig, 0, SIZE), -ENODATA);
    assert_int_equal(rig->nread, 0);
    assert_reads(rig, 4 * CLUSTER, CLUSTER);
    assert_reads(rig, 8 * CLUSTER, 2 * CLUSTER);
}

static void the_first_cluster_and_a_broken_last_one_stay(void **state)
{
    struct rig *rig = open_rig(state, SERVER);
    unsigned first = 0, last = 0;

    source_give_back(rig->source, 0, SIZE);
    loop_until(&rig->loop, count_holes(rig, &first, &last) == NCLUSTERS - 1);
    assert_int_equal(first, 1);
    assert_reads(rig, 0, CLUSTER);
    assert_reads(rig, NCLUSTERS * CLUSTER, SIZE - NCLUSTERS * CLUSTER);
    source_give_back(rig->source, SIZE, 1); /* nonsense is no harm */
    source_give_back(rig->source, 0, UINT64_MAX);
    source_give_back(rig->source, UINT64_MAX, 2);
}

static void older_reads_come_to_their_end_first(void **state)
{
    struct rig *rig = open_rig(state, SERVER);
    unsigned first = 0, last = 0;

    source_memory_hold(rig->below, true);
    assert_int_equal(start_read(rig, 9 * CLUSTER, CLUSTER), 0);
    source_give_back(rig->source, 9 * CLUSTER, CLUSTER);
    let_pass(rig);
    assert_int_equal(count_holes(rig, &first, &last), 0);
    assert_int_equal(rig->nread, 0);
    source_memory_hold(rig->below, false);
    loop_until(&rig->loop, rig->nread == 1);
    assert_int_equal(rig->err, 0);
    assert_memory_equal(rig->buffer, data + 9 * CLUSTER, CLUSTER);
    loop_until(&rig->loop, count_holes(rig, &first, &last) == 1);
    assert_int_equal(first, 9);
}

/* One by one, backwards, with reads between: batches follow each other. */
static void everything_comes_to_be_freed_in_any_order(void **state)
{
    struct rig *rig = open_rig(state, SERVER);
    unsigned first = 0, last = 0;

    for (unsigned i = NCLUSTERS; i-- > 1;) {
        assert_reads(rig, (uint64_t)i * CLUSTER, CLUSTER);
        source_give_back(rig->source, (uint64_t)i * CLUSTER, CLUSTER);
        if (i % 8 == 0)
            let_pass(rig);
    }
    loop_until(&rig->loop, count_holes(rig, &first, &last) == NCLUSTERS - 1);
}

/* Eight clusters are marked at a time where that goes: exactly these are given, wherever a range begins and ends. */
static void what_is_given_ends_where_it_was_said_to(void **state)
{
    static const struct {
        unsigned first, n;
    } ranges[] = {{9, 1}, {13, 2}, {8, 8}, {23, 1}, {17, 9}, {30, 2}, {5, 25}};
    struct rig *rig = open_rig(state, SERVER);
    bool given[NCLUSTERS] = {false};

    for (size_t k = 0; k < ARRAY_SIZE(ranges); k++) {
        source_give_back(rig->source, (uint64_t)ranges[k].first * CLUSTER, (uint64_t)ranges[k].n * CLUSTER);
        for (unsigned i = 0; i < ranges[k].n; i++)
            given[ranges[k].first + i] = true;
        for (unsigned i = 0; i < NCLUSTERS; i++)
            if (given[i])
                assert_int_equal(start_read(rig, (uint64_t)i * CLUSTER, CLUSTER), -ENODATA);
            else
                assert_reads(rig, (uint64_t)i * CLUSTER, CLUSTER);
    }
}

static void a_server_that_does_not_want_to_changes_nothing(void **state)
{
    struct rig *rig = open_rig(state, "exec qemu-nbd -r -t -f raw -x '' disk");
    unsigned first = 0, last = 0;

    source_give_back(rig->source, CLUSTER, CLUSTER);
    let_pass(rig);
    source_give_back(rig->source, 2 * CLUSTER, CLUSTER);
    let_pass(rig);
    assert_int_equal(count_holes(rig, &first, &last), 0);
    assert_int_equal(start_read(rig, CLUSTER, 1), -ENODATA); /* it was said, and it stays so */
    assert_reads(rig, 3 * CLUSTER, CLUSTER);
}

static void a_server_that_dies_changes_nothing(void **state)
{
    struct rig *rig = open_rig(state, SERVER);

    server_kill(&rig->server);
    source_give_back(rig->source, CLUSTER, CLUSTER);
    let_pass(rig);
    source_give_back(rig->source, 2 * CLUSTER, CLUSTER);
    let_pass(rig);
    assert_reads(rig, 3 * CLUSTER, CLUSTER);
}

static void it_can_be_closed_while_a_server_stalls(void **state)
{
    struct rig *rig = open_rig(state, SERVER);
    unsigned first = 0, last = 0;

    source_give_back(rig->source, CLUSTER, CLUSTER);
    loop_until(&rig->loop, count_holes(rig, &first, &last) == 1);
    server_stop(&rig->server);
    source_give_back(rig->source, 2 * CLUSTER, 8 * CLUSTER);
    let_pass(rig);
    assert_reads(rig, 12 * CLUSTER, CLUSTER); /* reads never wait */
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(whole_clusters_are_freed_and_cannot_be_read), TEST(the_first_cluster_and_a_broken_last_one_stay),
        TEST(older_reads_come_to_their_end_first),         TEST(everything_comes_to_be_freed_in_any_order),
        TEST(what_is_given_ends_where_it_was_said_to),     TEST(a_server_that_does_not_want_to_changes_nothing),
        TEST(a_server_that_dies_changes_nothing),          TEST(it_can_be_closed_while_a_server_stalls),
    };

    fill_pattern(data, sizeof(data));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
