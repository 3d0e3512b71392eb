/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The contract of source.h, run for every source there is. */
#include "lib/loop.h"
#include "lib/test.h"
#include "nbd_servers.h"
#include "qmp/base.h"
#include "qmp/unix.h"
#include "source/ahead.h"
#include "source/giveback.h"
#include "source/memory.h"
#include "source/nbd.h"
#include "source/vhost.h"

#include <time.h>

#define TICK_MS 5u

/* Not a multiple of any cluster or request size. */
#define DATA_SIZE (((size_t)10 << 20) + (size_t)3 * 512)

#define NREADS 250
#define READ_MAX ((size_t)8 << 20)
#define NLOANS 5u

static unsigned char data[DATA_SIZE];

static unsigned seed; /* replays a failure: QPULL_TEST_SEED=… */

static uint64_t random_below(uint64_t limit)
{
    static uint64_t state;

    if (state == 0)
        state = seed ? seed : 1;
    /* xorshift64, Marsaglia 2003 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return limit > 0 ? state % limit : 0;
}

/* One source, and what it told us. */
struct rig {
    const struct kind *kind;
    uv_loop_t loop;
    uv_timer_t tick; /* UV_RUN_ONCE goes to wait for I/O even after a timer did what we wait for: not for long */
    struct server server;
    const unsigned char *data; /* borrowed: what the disk holds */
    struct source *source;
    bool inside;    /* a call of ours is in progress: no callback may come */
    unsigned nlost; /* on_lost calls */
    unsigned nanswered, nfailed;
    bool closed;
    void (*on_answer)(struct rig *rig, struct source_read *r, int err); /* what the test does then; may be NULL */
    struct source_read *reads;                                          /* owned, NREADS */
    unsigned *answers;                                                  /* owned, how often each was answered */
    struct source_loan *loans[NLOANS];                                  /* kept for a while, and past the end */
    unsigned nlent;
};

/* How a kind of source is opened, and lost while reads are in flight. */
struct kind {
    const char *program; /* NULL: none */
    const char *command;
    const char *export_name;
    uint32_t cluster;
    void (*open)(struct rig *rig);
    void (*stall)(struct rig *rig); /* answers stop … */
    void (*lose)(struct rig *rig);  /* … and never come */
};

static void on_lost(void *arg, const struct failure *why)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    assert_true(why->err < 0);
    assert_true(strlen(why->text) > 0);
    rig->nlost++;
}

static void memory_open(struct rig *rig)
{
    assert_int_equal(source_memory_new(&rig->loop, rig->data, DATA_SIZE, on_lost, rig, &rig->source), 0);
}

static void memory_stall(struct rig *rig)
{
    source_memory_hold(rig->source, true);
}

static void memory_lose(struct rig *rig)
{
    source_memory_lose(rig->source);
}

static void on_open(void *arg, struct source *s, const struct failure *f)
{
    struct rig *rig = arg;

    if (f)
        fail_msg("%s", f->text);
    rig->source = s;
}

static void nbd_open(struct rig *rig)
{
    struct source_nbd_config config = {
        .socket_path = rig->server.path,
        .export_name = rig->kind->export_name,
        .cluster = rig->kind->cluster,
    };

    server_start(&rig->server, rig->kind->command);
    assert_int_equal(source_nbd_open(&rig->loop, &config, on_lost, on_open, rig, NULL), 0);
    assert_null(rig->source);
    loop_until(&rig->loop, rig->source);
}

static void giveback_open(struct rig *rig)
{
    struct source_nbd_config config = {.socket_path = rig->server.path, .export_name = rig->kind->export_name};

    nbd_open(rig);
    assert_int_equal(giveback_new(&rig->loop, &config, 65536, rig->source, &rig->source), 0);
    giveback_begin(rig->source);
}

static struct ahead_pool pool = {AHEAD_POOL};

static void ahead_giveback_open(struct rig *rig)
{
    giveback_open(rig);
    assert_int_equal(ahead_new(&rig->loop, &pool, rig->source, &rig->source), 0);
}

static void nbd_stall(struct rig *rig)
{
    server_stop(&rig->server);
}

static void nbd_lose(struct rig *rig)
{
    server_kill(&rig->server);
}

/* Connected before the server has its socket: the connection waits in the backlog. */
static void vhost_open(struct rig *rig)
{
    struct source_vhost_config config = {.cluster = rig->kind->cluster};

    assert_int_equal(unix_connect(rig->server.path, &config.fd), 0);
    server_start(&rig->server, rig->kind->command);
    assert_int_equal(source_vhost_open(&rig->loop, &config, on_lost, on_open, rig, NULL), 0);
    assert_null(rig->source);
    loop_until(&rig->loop, rig->source);
}

static struct kind memory_kind = {.open = memory_open, .stall = memory_stall, .lose = memory_lose};
static struct kind qemu_kind = {
    .program = "qemu-nbd",
    .command = "exec qemu-nbd -r -t -f raw -x '' disk",
    .export_name = "",
    .open = nbd_open,
    .stall = nbd_stall,
    .lose = nbd_lose,
};
static struct kind daemon_kind = {
    .program = "qemu-storage-daemon",
    .command = "exec qemu-storage-daemon --blockdev file,node-name=d,filename=disk,read-only=on "
               "--nbd-server addr.type=fd,addr.str=3 --export nbd,id=e,node-name=d,name=frozen",
    .export_name = "frozen",
    .open = nbd_open,
    .stall = nbd_stall,
    .lose = nbd_lose,
};
static struct kind narrow_kind = {
    .program = "qemu-nbd",
    .command = "exec qemu-nbd -r -t -f raw -x '' disk",
    .export_name = "",
    .cluster = 65536,
    .open = nbd_open,
    .stall = nbd_stall,
    .lose = nbd_lose,
};
static struct kind giveback_kind = {
    .program = "qemu-nbd",
    .command = "exec qemu-nbd -r -t -e 2 -f raw -x '' disk",
    .export_name = "",
    .open = giveback_open,
    .stall = nbd_stall,
    .lose = nbd_lose,
};
static struct kind ahead_kind = {
    .program = "qemu-nbd",
    .command = "exec qemu-nbd -r -t -e 2 -f raw -x '' disk",
    .export_name = "",
    .open = ahead_giveback_open,
    .stall = nbd_stall,
    .lose = nbd_lose,
};
static struct kind nbdkit_kind = {
    .program = "nbdkit",
    .command = "exec nbdkit -f -r file disk",
    .export_name = "",
    .open = nbd_open,
    .stall = nbd_stall,
    .lose = nbd_lose,
};

static struct kind vhost_kind = {
    .program = "qemu-storage-daemon",
    .command = "exec qemu-storage-daemon --blockdev file,node-name=d,filename=disk,read-only=on "
               "--export vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=3",
    .open = vhost_open,
    .stall = nbd_stall,
    .lose = nbd_lose,
};
static struct kind narrow_vhost_kind = {
    .program = "qemu-storage-daemon",
    .command = "exec qemu-storage-daemon --blockdev file,node-name=d,filename=disk,read-only=on "
               "--export vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=3",
    .cluster = 65536,
    .open = vhost_open,
    .stall = nbd_stall,
    .lose = nbd_lose,
};

static void on_tick(uv_timer_t *tick)
{
    (void)tick; /* ends a turn of the loop */
}

static int set_up(void **state)
{
    const struct kind *kind = *state;
    struct rig *rig = calloc(1, sizeof(*rig));

    assert_non_null(rig);
    rig->kind = kind;
    rig->data = data;
    rig->reads = calloc(NREADS, sizeof(*rig->reads));
    rig->answers = calloc(NREADS, sizeof(*rig->answers));
    assert_true(rig->reads && rig->answers);
    loop_init(&rig->loop);
    assert_int_equal(uv_timer_init(&rig->loop, &rig->tick), 0);
    assert_int_equal(uv_timer_start(&rig->tick, on_tick, TICK_MS, TICK_MS), 0);
    server_init(&rig->server, SOMAXCONN);
    if (kind->program && have_program(kind->program))
        server_write_file(&rig->server, "disk", rig->data, DATA_SIZE);
    *state = rig;
    return 0;
}

static void on_close(void *arg)
{
    struct rig *rig = arg;

    assert_false(rig->inside);
    assert_false(rig->closed);
    rig->closed = true;
}

static void close_source(struct rig *rig)
{
    bool inside = rig->inside;

    rig->inside = true;
    source_close(TAKE_PTR(rig->source), on_close, rig);
    rig->inside = inside;
}

static int tear_down(void **state)
{
    struct rig *rig = *state;

    if (rig->source) {
        close_source(rig);
        loop_until(&rig->loop, rig->closed);
    }
    for (unsigned i = 0; i < NLOANS; i++) {
        if (rig->loans[i])
            rig->loans[i]->end(rig->loans[i]);
    }
    uv_close((uv_handle_t *)&rig->tick, NULL);
    loop_done(&rig->loop);
    server_done(&rig->server);
    for (size_t i = 0; i < NREADS; i++)
        free(rig->reads[i].buffer);
    free(rig->reads);
    free(rig->answers);
    free(rig);
    return 0;
}

static struct rig *open_rig(void **state)
{
    struct rig *rig = *state;

    if (rig->kind->program)
        need_program(rig->kind->program);
    rig->kind->open(rig);
    assert_int_equal(rig->source->size, DATA_SIZE);
    return rig;
}

/* What is lent is kept while NLOANS more are, and given back from within an answer. */
static void keep_loan(struct rig *rig, struct source_read *r)
{
    struct source_loan **place = &rig->loans[rig->nlent++ % NLOANS];

    if (*place)
        (*place)->end(*place);
    *place = TAKE_PTR(r->loan);
    r->buffer = NULL;
}

static void on_read(struct source_read *r, int err)
{
    struct rig *rig = r->arg;

    assert_false(rig->inside);
    assert_true(!r->loan || (r->borrow && err == 0));
    rig->answers[r - rig->reads]++;
    rig->nanswered++;
    if (err == 0)
        assert_memory_equal(r->buffer, rig->data + r->offset, r->length);
    else
        rig->nfailed++;
    if (r->loan)
        keep_loan(rig, r);
    if (rig->on_answer)
        rig->on_answer(rig, r, err);
}

static int start_read(struct rig *rig, size_t i, uint64_t offset, size_t length)
{
    struct source_read *r = &rig->reads[i];
    int err;

    free(r->buffer);
    /* Dirty everywhere: a source sets its private members itself. */
    memset(r, 0xa5, sizeof(*r));
    r->offset = offset;
    r->length = length;
    r->buffer = NULL;
    r->borrow = random_below(2);
    r->sure = random_below(2);
    r->cb = on_read;
    r->arg = rig;
    rig->inside = true;
    err = r->borrow ? source_read(rig->source, r) : -ENOBUFS;
    if (err == -ENOBUFS) {
        r->borrow = false;
        r->buffer = malloc(length + 1); /* length 0 is tried, too */
        assert_non_null(r->buffer);
        err = source_read(rig->source, r);
    }
    rig->inside = false;
    return err;
}

/* 1 byte to 8 MiB, more small ones than large ones, at any alignment. */
static void start_random_read(struct rig *rig, size_t i)
{
    uint64_t nbits = 1 + random_below(24);
    uint64_t most = (uint64_t)1 << random_below(nbits);
    size_t length = 1 + random_below(MIN(READ_MAX, most));

    assert_int_equal(start_read(rig, i, random_below(DATA_SIZE - length + 1), length), 0);
}

static void start_random_reads(struct rig *rig)
{
    for (size_t i = 0; i < NREADS; i++)
        start_random_read(rig, i);
}

static void assert_each_answered_once(const struct rig *rig)
{
    assert_int_equal(rig->nanswered, NREADS);
    for (size_t i = 0; i < NREADS; i++)
        assert_int_equal(rig->answers[i], 1);
}

static void random_reads_equal_the_data(void **state)
{
    struct rig *rig = open_rig(state);

    start_random_reads(rig);
    assert_int_equal(rig->nanswered, 0);
    loop_until(&rig->loop, rig->nanswered == NREADS);
    assert_each_answered_once(rig);
    assert_int_equal(rig->nfailed, 0);
    assert_int_equal(rig->nlost, 0);
}

static void reads_at_the_very_edges_work(void **state)
{
    struct rig *rig = open_rig(state);

    assert_int_equal(start_read(rig, 0, 0, 1), 0);
    assert_int_equal(start_read(rig, 1, DATA_SIZE - 1, 1), 0);
    assert_int_equal(start_read(rig, 2, 0, DATA_SIZE), 0);
    assert_int_equal(start_read(rig, 3, 65535, 2), 0);
    loop_until(&rig->loop, rig->nanswered == 4);
    assert_int_equal(rig->nfailed, 0);
}

static void reads_past_the_end_are_refused(void **state)
{
    struct rig *rig = open_rig(state);

    assert_int_equal(start_read(rig, 0, DATA_SIZE, 1), -EINVAL);
    assert_int_equal(start_read(rig, 1, DATA_SIZE - 1, 2), -EINVAL);
    assert_int_equal(start_read(rig, 2, UINT64_MAX, 1), -EINVAL);
    assert_int_equal(start_read(rig, 3, UINT64_MAX - 10, 100), -EINVAL);
    assert_int_equal(start_read(rig, 4, 0, 0), -EINVAL);
    loop_turn(&rig->loop, 10);
    assert_int_equal(rig->nanswered, 0);
}

static void closing_answers_every_read_in_flight_once(void **state)
{
    struct rig *rig = open_rig(state);

    start_random_reads(rig);
    close_source(rig);
    assert_int_equal(rig->nanswered, 0);
    loop_until(&rig->loop, rig->closed);
    assert_each_answered_once(rig);
    assert_int_equal(rig->nlost, 0);
}

static void assert_cancelled(struct rig *rig, struct source_read *r, int err)
{
    assert_int_equal(err, -ECANCELED);
}

static void closing_cancels_what_did_not_finish(void **state)
{
    struct rig *rig = open_rig(state);

    rig->kind->stall(rig);
    rig->on_answer = assert_cancelled;
    start_random_reads(rig);
    loop_turn(&rig->loop, 10);
    close_source(rig);
    loop_until(&rig->loop, rig->closed);
    assert_each_answered_once(rig);
}

static void try_another_read(struct rig *rig, struct source_read *r, int err)
{
    struct source_read more = *r;

    if (rig->source)
        assert_int_equal(source_read(rig->source, &more), -ENOTCONN);
}

static void a_lost_source_answers_everything_then_refuses(void **state)
{
    struct rig *rig = open_rig(state);

    rig->kind->stall(rig);
    start_random_reads(rig);
    loop_turn(&rig->loop, 10);
    assert_int_equal(rig->nanswered, 0);
    rig->on_answer = try_another_read;
    rig->kind->lose(rig);
    loop_until(&rig->loop, rig->nlost > 0);
    assert_each_answered_once(rig);
    assert_int_equal(rig->nfailed, NREADS);
    assert_int_equal(start_read(rig, 0, 0, 512), -ENOTCONN);
    loop_turn(&rig->loop, 10);
    assert_int_equal(rig->nlost, 1);
    assert_int_equal(rig->nanswered, NREADS);
}

static void a_source_is_lost_without_any_read(void **state)
{
    struct rig *rig = open_rig(state);

    rig->kind->lose(rig);
    loop_until(&rig->loop, rig->nlost > 0);
    assert_int_equal(start_read(rig, 0, 0, 512), -ENOTCONN);
}

static void close_on_the_third(struct rig *rig, struct source_read *r, int err)
{
    if (rig->nanswered == 3 && rig->source)
        close_source(rig);
}

static void a_read_callback_may_close_the_source(void **state)
{
    struct rig *rig = open_rig(state);

    rig->on_answer = close_on_the_third;
    start_random_reads(rig);
    loop_until(&rig->loop, rig->closed);
    assert_each_answered_once(rig);
    assert_int_equal(rig->nlost, 0);
}

static void close_on_the_third_failure(struct rig *rig, struct source_read *r, int err)
{
    assert_true(err == -EIO || err == -ECANCELED);
    close_on_the_third(rig, r, err);
}

static void a_failed_read_callback_may_close_the_source(void **state)
{
    struct rig *rig = open_rig(state);

    rig->kind->stall(rig);
    rig->on_answer = close_on_the_third_failure;
    start_random_reads(rig);
    loop_turn(&rig->loop, 10);
    rig->kind->lose(rig);
    loop_until(&rig->loop, rig->closed);
    assert_each_answered_once(rig);
    assert_int_equal(rig->nlost, 0); /* not after source_close() */
}

/* Each answer frees its buffer and starts the next read in the very same struct. */
static void read_again(struct rig *rig, struct source_read *r, int err)
{
    assert_int_equal(err, 0);
    if (rig->nanswered <= 20 * NREADS) {
        size_t i = (size_t)(r - rig->reads), length = 1 + random_below(100000);

        assert_int_equal(start_read(rig, i, random_below(DATA_SIZE - length + 1), length), 0);
    }
}

static void read_callbacks_may_start_new_reads(void **state)
{
    struct rig *rig = open_rig(state);

    rig->on_answer = read_again;
    for (size_t i = 0; i < NREADS; i++)
        assert_int_equal(start_read(rig, i, i * 1000, 1000), 0);
    loop_until(&rig->loop, rig->nanswered == 21 * NREADS);
    assert_int_equal(rig->nfailed, 0);
}

static void count_open(uv_handle_t *handle, void *arg)
{
    *(unsigned *)arg += !uv_is_closing(handle);
}

static bool all_has_ended(void *arg)
{
    struct rig *rig = arg;
    unsigned nopen = 0;

    uv_walk(&rig->loop, count_open, &nopen);
    return rig->nanswered == NREADS && nopen == 2; /* the tick, and the timer of who waits */
}

static void a_source_may_be_closed_without_a_callback(void **state)
{
    struct rig *rig = open_rig(state);

    start_random_reads(rig);
    source_close(TAKE_PTR(rig->source), NULL, NULL);
    loop_run_until(&rig->loop, all_has_ended, rig); /* giveback ends after its last answer */
    assert_each_answered_once(rig);
}

/* memory alone can be held. */
static void hold_on_the_third(struct rig *rig, struct source_read *r, int err)
{
    if (rig->nanswered == 3)
        source_memory_hold(rig->source, true);
}

static void a_held_source_answers_nothing_until_it_is_let_go(void **state)
{
    struct rig *rig = open_rig(state);

    rig->on_answer = hold_on_the_third;
    start_random_reads(rig);
    loop_turn(&rig->loop, 20);
    assert_int_equal(rig->nanswered, 3);
    source_memory_hold(rig->source, false);
    loop_until(&rig->loop, rig->nanswered == NREADS);
    assert_each_answered_once(rig);
    assert_int_equal(rig->nfailed, 0);
}

#define CONTRACT(kind, label)                                                                                          \
    CONTRACT_TEST(kind, label, random_reads_equal_the_data), CONTRACT_TEST(kind, label, reads_at_the_very_edges_work), \
        CONTRACT_TEST(kind, label, reads_past_the_end_are_refused),                                                    \
        CONTRACT_TEST(kind, label, closing_answers_every_read_in_flight_once),                                         \
        CONTRACT_TEST(kind, label, closing_cancels_what_did_not_finish),                                               \
        CONTRACT_TEST(kind, label, a_lost_source_answers_everything_then_refuses),                                     \
        CONTRACT_TEST(kind, label, a_source_is_lost_without_any_read),                                                 \
        CONTRACT_TEST(kind, label, a_read_callback_may_close_the_source),                                              \
        CONTRACT_TEST(kind, label, a_failed_read_callback_may_close_the_source),                                       \
        CONTRACT_TEST(kind, label, read_callbacks_may_start_new_reads),                                                \
        CONTRACT_TEST(kind, label, a_source_may_be_closed_without_a_callback)
#define CONTRACT_TEST(kind, label, test)                \
    {                                                   \
        label ": " #test, test, set_up, tear_down, kind \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        CONTRACT(&memory_kind, "memory"),
        CONTRACT_TEST(&memory_kind, "memory", a_held_source_answers_nothing_until_it_is_let_go),
        CONTRACT(&qemu_kind, "nbd, qemu-nbd"),
        CONTRACT(&daemon_kind, "nbd, qemu-storage-daemon"),
        CONTRACT(&narrow_kind, "nbd, qemu-nbd, narrow reads"),
        CONTRACT(&nbdkit_kind, "nbd, nbdkit"),
        CONTRACT(&vhost_kind, "vhost, qemu-storage-daemon"),
        CONTRACT(&narrow_vhost_kind, "vhost, qemu-storage-daemon, narrow reads"),
        CONTRACT(&giveback_kind, "giveback over nbd"),
        CONTRACT(&ahead_kind, "ahead over giveback over nbd"),
    };
    const char *replay = getenv("QPULL_TEST_SEED");

    seed = replay ? (unsigned)strtoul(replay, NULL, 0) : (unsigned)time(NULL);
    (void)printf("QPULL_TEST_SEED=%u\n", seed);
    fill_pattern(data, sizeof(data));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
