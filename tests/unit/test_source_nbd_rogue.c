/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* source/nbd against a server that breaks the protocol after a correct handshake: nothing worse than an error follows.
 */
#include "nbd/nbd.h"
#include "nbd/wire.h"
#include "source_rig.h"

#include <endian.h>

#define ROGUE_SIZE (4 * MIB)
#define CONTEXT "base:allocation"
#define CONTEXT_ID 7u

enum crime {
    /* block status */
    STATUS_PAST_THE_END, /* not a crime: the last extent may do that */
    STATUS_IN_STEPS,     /* nor is this: each answer covers a part only */
    STATUS_OF_NOTHING,   /* an extent of length 0 */
    STATUS_MISSING,      /* success, without a word about the context */
    STATUS_TWICE,
    STATUS_OF_ANOTHER, /* of a context that nobody asked for */
    /* read */
    READ_SHORT,    /* success with only a part of the bytes */
    READ_STRANGER, /* a reply to a request that nobody made */
    READ_GARBAGE,
    READ_TOO_MUCH, /* more bytes than were asked for */
    /* farewell */
    HANGS_UP_LATE, /* not a crime, a sign of work */
    HANGS_UP_NEVER,
};

#define LATE_MS 150u
#define FAREWELL_MAX_MS 4000u /* far more than source/upstream.c waits for, far less than for ever */

/* -- the server: a child process that blocks and trusts ------------------------------------------------------------ */

static void get(int fd, void *data, size_t length)
{
    if (length > 0 && recv(fd, data, length, MSG_WAITALL) != (ssize_t)length)
        _exit(0);
}

static void put(int fd, const void *data, size_t length)
{
    if (send(fd, data, length, MSG_NOSIGNAL) != (ssize_t)length)
        _exit(0);
}

static void put16(int fd, uint16_t n)
{
    n = htobe16(n);
    put(fd, &n, sizeof(n));
}

static void put32(int fd, uint32_t n)
{
    n = htobe32(n);
    put(fd, &n, sizeof(n));
}

static void put64(int fd, uint64_t n)
{
    n = htobe64(n);
    put(fd, &n, sizeof(n));
}

static void put_option_reply(int fd, uint32_t option, uint32_t type, uint32_t length)
{
    put64(fd, NBD_OPTION_REPLY_MAGIC);
    put32(fd, option);
    put32(fd, type);
    put32(fd, length);
}

/* Returns when the client said GO. */
static void negotiate(int fd)
{
    unsigned char header[NBD_OPTION_SIZE], skipped[4096];

    put64(fd, NBD_MAGIC);
    put64(fd, NBD_OPTION_MAGIC);
    put16(fd, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    get(fd, skipped, NBD_CLIENT_FLAGS_SIZE);
    for (;;) {
        uint32_t option, length;

        get(fd, header, sizeof(header));
        memcpy(&option, header + 8, sizeof(option));
        memcpy(&length, header + 12, sizeof(length));
        option = be32toh(option);
        length = be32toh(length);
        if (length > sizeof(skipped))
            _exit(0);
        get(fd, skipped, length);
        if (option == NBD_OPT_SET_META_CONTEXT) {
            put_option_reply(fd, option, NBD_REP_META_CONTEXT, 4 + strlen(CONTEXT));
            put32(fd, CONTEXT_ID);
            put(fd, CONTEXT, strlen(CONTEXT));
        } else if (option == NBD_OPT_GO) {
            put_option_reply(fd, option, NBD_REP_INFO, 12);
            put16(fd, NBD_INFO_EXPORT);
            put64(fd, ROGUE_SIZE);
            put16(fd, NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_DF);
        } else if (option != NBD_OPT_STRUCTURED_REPLY) {
            put_option_reply(fd, option, NBD_REP_ERR_UNSUP, 0);
            continue;
        }
        put_option_reply(fd, option, NBD_REP_ACK, 0);
        if (option == NBD_OPT_GO)
            return;
    }
}

static void put_chunk(int fd, uint16_t flags, uint16_t type, uint64_t cookie, uint32_t length)
{
    put32(fd, NBD_STRUCTURED_REPLY_MAGIC);
    put16(fd, flags);
    put16(fd, type);
    put64(fd, cookie);
    put32(fd, length);
}

static void put_status(int fd, uint16_t flags, uint64_t cookie, uint32_t context, uint32_t length)
{
    put_chunk(fd, flags, NBD_REPLY_TYPE_BLOCK_STATUS, cookie, 12);
    put32(fd, context);
    put32(fd, length);
    put32(fd, NBD_STATE_ZERO);
}

static void put_data(int fd, uint64_t cookie, uint64_t offset, uint32_t length)
{
    static const char zeros[512];

    put_chunk(fd, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA, cookie, 8 + length);
    put64(fd, offset);
    for (uint32_t done = 0; done < length; done += sizeof(zeros))
        put(fd, zeros, MIN(length - done, sizeof(zeros)));
}

static void commit(int fd, enum crime crime, uint64_t cookie, uint64_t offset, uint32_t length)
{
    switch (crime) {
    case STATUS_PAST_THE_END:
        put_status(fd, NBD_REPLY_FLAG_DONE, cookie, CONTEXT_ID, UINT32_MAX);
        break;
    case STATUS_IN_STEPS:
        put_status(fd, NBD_REPLY_FLAG_DONE, cookie, CONTEXT_ID, 65536);
        break;
    case STATUS_OF_NOTHING:
        put_status(fd, NBD_REPLY_FLAG_DONE, cookie, CONTEXT_ID, 0);
        break;
    case STATUS_MISSING:
        put_chunk(fd, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, cookie, 0);
        break;
    case STATUS_TWICE:
        put_status(fd, 0, cookie, CONTEXT_ID, 65536);
        put_status(fd, NBD_REPLY_FLAG_DONE, cookie, CONTEXT_ID, 65536);
        break;
    case STATUS_OF_ANOTHER:
        put_status(fd, NBD_REPLY_FLAG_DONE, cookie, CONTEXT_ID + 1, 65536);
        break;
    case READ_SHORT:
        put_data(fd, cookie, offset, length / 2);
        break;
    case READ_STRANGER:
        put_data(fd, cookie + 1000, offset, length);
        break;
    case READ_GARBAGE:
        for (int i = 0; i < 10; i++)
            put64(fd, UINT64_C(0x0123456789abcdef));
        break;
    case READ_TOO_MUCH:
        put_data(fd, cookie, offset, length + 512);
        break;
    case HANGS_UP_LATE:
    case HANGS_UP_NEVER:
        put_data(fd, cookie, offset, length);
        break;
    }
}

static void rogue_child(int listener, enum crime crime)
{
    unsigned char request[NBD_REQUEST_SIZE];
    int fd;

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    fd = accept(listener, NULL, NULL);
    if (fd < 0)
        _exit(1);
    negotiate(fd);
    for (;;) {
        uint64_t cookie, offset;
        uint32_t length;

        if (crime >= HANGS_UP_LATE && recv(fd, request, 1, MSG_PEEK) == 0) {
            while (crime == HANGS_UP_NEVER)
                (void)pause();
            (void)usleep(LATE_MS * 1000);
            _exit(0);
        }
        get(fd, request, sizeof(request));
        memcpy(&cookie, request + 8, sizeof(cookie));
        memcpy(&offset, request + 16, sizeof(offset));
        memcpy(&length, request + 24, sizeof(length));
        commit(fd, crime, be64toh(cookie), be64toh(offset), be32toh(length));
    }
}

static void start_rogue(struct rig *rig, enum crime crime)
{
    rig->server.pid = fork();
    assert_true(rig->server.pid >= 0);
    if (rig->server.pid == 0)
        rogue_child(rig->server.listener, crime);
    rig->config.timeout_ms = 5000;
}

/* -- maps ---------------------------------------------------------------------------------------------------------- */

/* libnbd from 1.18 on takes it for an error of the server, that of 1.14 leaves it to us. */
static void an_extent_past_the_end_is_cut_or_refused(void **state)
{
    struct rig *rig = *state;

    start_rogue(rig, STATUS_PAST_THE_END);
    get_map(rig, CONTEXT);
    if (!rig->map) {
        assert_int_equal(rig->failure.err, -EIO);
        return;
    }
    assert_int_equal(map_length(rig->map), ROGUE_SIZE);
    assert_int_equal(map_nruns(rig->map), 1);
}

static void a_map_that_comes_in_steps_is_put_together(void **state)
{
    struct rig *rig = *state;

    start_rogue(rig, STATUS_IN_STEPS);
    expect_map(rig, CONTEXT);
    assert_int_equal(map_length(rig->map), ROGUE_SIZE);
    assert_int_equal(map_count(rig->map, NBD_STATE_ZERO), ROGUE_SIZE);
}

static void a_status_without_progress_is_a_failure(void **state)
{
    struct rig *rig = *state;

    start_rogue(rig, STATUS_OF_NOTHING);
    expect_map_failure(rig, CONTEXT, -EPROTO, "makes no sense");
}

static void a_status_without_our_context_is_a_failure(void **state)
{
    struct rig *rig = *state;

    start_rogue(rig, STATUS_MISSING);
    expect_map_failure(rig, CONTEXT, -EPROTO, CONTEXT);
}

/* Taken twice, the map would run ahead of the disk: data would be told to be where there is none, and the reverse. */
static void a_status_told_twice_is_a_failure(void **state)
{
    struct rig *rig = *state;

    start_rogue(rig, STATUS_TWICE);
    expect_map_failure(rig, CONTEXT, -EPROTO, "makes no sense");
}

static void a_status_of_an_unknown_context_is_a_failure(void **state)
{
    struct rig *rig = *state;

    start_rogue(rig, STATUS_OF_ANOTHER);
    get_map(rig, CONTEXT);
    assert_null(rig->map);
    assert_true(rig->failure.err < 0);
}

/* -- reads --------------------------------------------------------------------------------------------------------- */

static void expect_reads_to_fail(struct rig *rig, enum crime crime)
{
    struct read reads[8];

    start_rogue(rig, crime);
    expect_open(rig);
    start_reads(rig, reads, ARRAY_SIZE(reads), 65536);
    loop_until(&rig->loop, nreads_answered == ARRAY_SIZE(reads));
    for (size_t i = 0; i < ARRAY_SIZE(reads); i++)
        assert_int_equal(reads[i].err, -EIO);
    assert_true(rig->nlost <= 1);
    free_reads(reads, ARRAY_SIZE(reads));
}

/* Otherwise the rest of the buffer, which nobody cleared, would go to the client. */
static void a_read_with_too_few_bytes_fails(void **state)
{
    expect_reads_to_fail(*state, READ_SHORT);
}

static void a_reply_that_nobody_asked_for_loses_the_source(void **state)
{
    struct rig *rig = *state;

    expect_reads_to_fail(rig, READ_STRANGER);
    assert_int_equal(rig->nlost, 1);
}

static void garbage_instead_of_a_reply_loses_the_source(void **state)
{
    struct rig *rig = *state;

    expect_reads_to_fail(rig, READ_GARBAGE);
    assert_int_equal(rig->nlost, 1);
}

static void a_read_with_too_many_bytes_never_overruns_the_buffer(void **state)
{
    expect_reads_to_fail(*state, READ_TOO_MUCH);
}

/* -- farewell ------------------------------------------------------------------------------------------------------ */

/* Returns the milliseconds from the close to its callback. */
static unsigned time_to_close(struct rig *rig, enum crime crime)
{
    uint64_t start;

    start_rogue(rig, crime);
    expect_open(rig);
    start = uv_hrtime();
    source_close(TAKE_PTR(rig->source), on_close, rig);
    loop_until(&rig->loop, rig->nclosed);
    return (unsigned)((uv_hrtime() - start) / 1000000);
}

static void a_close_is_told_when_the_server_has_hung_up_too(void **state)
{
    unsigned ms = time_to_close(*state, HANGS_UP_LATE);

    assert_between(ms, LATE_MS - 10, FAREWELL_MAX_MS);
}

static void a_server_that_never_hangs_up_is_waited_for_only_so_long(void **state)
{
    unsigned ms = time_to_close(*state, HANGS_UP_NEVER);

    assert_between(ms, LATE_MS, FAREWELL_MAX_MS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(an_extent_past_the_end_is_cut_or_refused),
        TEST(a_map_that_comes_in_steps_is_put_together),
        TEST(a_status_without_progress_is_a_failure),
        TEST(a_status_without_our_context_is_a_failure),
        TEST(a_status_told_twice_is_a_failure),
        TEST(a_status_of_an_unknown_context_is_a_failure),
        TEST(a_read_with_too_few_bytes_fails),
        TEST(a_reply_that_nobody_asked_for_loses_the_source),
        TEST(garbage_instead_of_a_reply_loses_the_source),
        TEST(a_read_with_too_many_bytes_never_overruns_the_buffer),
        TEST(a_close_is_told_when_the_server_has_hung_up_too),
        TEST(a_server_that_never_hangs_up_is_waited_for_only_so_long),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
