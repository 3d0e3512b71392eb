/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * source_rig: one loop, one server and one use of source/nbd, with what its callbacks brought. Every callback checks
 * that it comes from the loop, and those of closed connections that no descriptor is left. For the tests of source/nbd.
 */
#ifndef QPULL_TEST_SOURCE_RIG_H
#define QPULL_TEST_SOURCE_RIG_H

#include "lib/loop.h"
#include "lib/test.h"
#include "nbd_servers.h"
#include "qmp/base.h"
#include "source/nbd.h"

#include <dirent.h>

#define MIB ((uint64_t)1 << 20)
#define TICK_MS 5u
#define SHORT_MS 300u /* a deadline that is meant to pass … */
#define LONG_MS 2000u /* … and one that is not, on a loaded machine either */

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

static inline unsigned count_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned n = 0;

    assert_non_null(dir);
    while (readdir(dir))
        n++;
    assert_int_equal(closedir(dir), 0);
    return n;
}

static inline void on_tick(uv_timer_t *tick)
{
    (void)tick; /* ends a turn of the loop */
}

static inline int set_up(void **state)
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

static inline void on_close(void *arg)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    rig->nclosed++;
}

static inline int tear_down(void **state)
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

static inline void on_lost(void *arg, const struct failure *why)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    rig->nlost++;
    rig->failure = *why;
}

static inline void on_open(void *arg, struct source *s, const struct failure *f)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    assert_true(!s == !!f);
    rig->nopened++;
    rig->source = s;
    if (f)
        rig->failure = *f;
}

static inline void on_map(void *arg, struct map *map, const struct failure *f)
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

static inline void on_poke(void *arg, const struct failure *f)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    assert_true(count_fds() <= rig->nfds);
    rig->npoked++;
    if (f)
        rig->failure = *f;
}

static inline struct source_nbd_open *start_open(struct rig *rig)
{
    struct source_nbd_open *open = NULL;

    rig->inside = true;
    assert_int_equal(source_nbd_open(&rig->loop, &rig->config, on_lost, on_open, rig, &open), 0);
    rig->inside = false;
    assert_non_null(open);
    return open;
}

static inline void await_opened(struct rig *rig)
{
    loop_until(&rig->loop, rig->nopened);
}

static inline void expect_open(struct rig *rig)
{
    (void)start_open(rig);
    await_opened(rig);
    if (!rig->source)
        fail_msg("%s", rig->failure.text);
}

static inline void expect_open_failure(struct rig *rig, int err, const char *word)
{
    (void)start_open(rig);
    loop_until(&rig->loop, rig->nopened);
    assert_null(rig->source);
    assert_int_equal(rig->failure.err, err);
    if (!strstr(rig->failure.text, word))
        fail_msg("no \"%s\" in: %s", word, rig->failure.text);
}

static inline void await_mapped(struct rig *rig)
{
    loop_until(&rig->loop, rig->nmapped);
}

static inline void get_map(struct rig *rig, const char *context)
{
    rig->nmapped = 0;
    rig->inside = true;
    assert_int_equal(source_nbd_map(&rig->loop, &rig->config, context, on_map, rig, NULL), 0);
    rig->inside = false;
    await_mapped(rig);
}

static inline void expect_map(struct rig *rig, const char *context)
{
    get_map(rig, context);
    if (!rig->map)
        fail_msg("%s", rig->failure.text);
}

static inline void expect_map_failure(struct rig *rig, const char *context, int err, const char *word)
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

static inline void on_read(struct source_read *r, int err)
{
    struct read *read = r->arg;

    assert_int_equal(read->order, 0);
    read->order = ++nreads_answered;
    read->err = err;
}

static inline void start_reads(struct rig *rig, struct read *reads, size_t n, size_t length)
{
    nreads_answered = 0;
    for (size_t i = 0; i < n; i++) {
        reads[i] = (struct read){.r = {.offset = i * length, .length = length, .cb = on_read, .arg = &reads[i]}};
        reads[i].r.buffer = malloc(length);
        assert_non_null(reads[i].r.buffer);
        assert_int_equal(source_read(rig->source, &reads[i].r), 0);
    }
}

static inline void free_reads(struct read *reads, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(reads[i].r.buffer);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

#endif
