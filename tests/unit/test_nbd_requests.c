/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Requests that server/nbd refuses, and CACHE and BLOCK_STATUS, byte by byte, in all three forms of transmission. */
#include "lib/nbd_line.h"
#include "lib/test.h"
#include "nbd/limits.h"

#include <errno.h>
#include <stdio.h>

/* -- requests that are refused ------------------------------------------------------------------------------------- */

/* Every way to feed it brings this error, and the connection goes on. */
static void refused_in(enum form form, size_t ncontexts, const struct nbd_export *export, uint16_t flags, uint16_t type,
                       uint64_t offset, uint64_t length, uint32_t error, const char *sentence)
{
    for (enum feeding how = FEED_WHOLE; how <= FEED_RANDOM; how++) {
        struct line l = {0};

        if (export)
            l.peer.export = *export;
        line_open(&l, form, ncontexts);
        line_say(&l, flags, type, LINE_COOKIE, offset, length);
        line_want_error(&l, LINE_COOKIE, offset, error, sentence);
        line_say(&l, 0, NBD_CMD_CACHE, 2, 0, 4096); /* works */
        line_feed(&l, how);
        nbd_reply_done(peer_take(&l.peer, 0));
        line_want_done(&l, 2, 0);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void ranges_are_checked(void **state)
{
    static const struct nbd_export aligned = {.size = 1048576, .min_block = 512, .max_block = 65536};
    static const char end[] = "The request reaches beyond the end of the export";
    static const char alignment[] = "The request is not aligned to the minimum block size";
    static const char zero[] = "A request of length 0 means nothing here";
    static const char max[] = "The request is longer than the maximum block size";
    static const uint16_t types[] = {NBD_CMD_READ, NBD_CMD_CACHE, NBD_CMD_BLOCK_STATUS};

    EACH_FORM(form)
    {
        for (size_t i = 0; i < ARRAY_SIZE(types); i++) {
            if (types[i] == NBD_CMD_BLOCK_STATUS && form == SIMPLE)
                continue;
            refused_in(form, form != SIMPLE, NULL, 0, types[i], 0, 0, NBD_EINVAL, zero);
            refused_in(form, form != SIMPLE, NULL, 0, types[i], LINE_SIZE, 1, NBD_EINVAL, end);
            refused_in(form, form != SIMPLE, NULL, 0, types[i], LINE_SIZE - 511, 512, NBD_EINVAL, end);
            refused_in(form, form != SIMPLE, NULL, 0, types[i], UINT64_MAX, 512, NBD_EINVAL, end);
            refused_in(form, form != SIMPLE, NULL, 0, types[i], UINT64_MAX - 511, 512, NBD_EINVAL, end);
            refused_in(form, form != SIMPLE, &aligned, 0, types[i], 511, 512, NBD_EINVAL, alignment);
            refused_in(form, form != SIMPLE, &aligned, 0, types[i], 512, 513, NBD_EINVAL, alignment);
        }
        refused_in(form, 0, NULL, 0, NBD_CMD_READ, 0, LINE_MAX_BLOCK + 1, NBD_EINVAL, max);
        refused_in(form, 0, NULL, 0, NBD_CMD_CACHE, 0, LINE_MAX_BLOCK + 1, NBD_EINVAL, max);
    }
    refused_in(EXTENDED, 0, NULL, 0, NBD_CMD_READ, 1, UINT64_MAX, NBD_EINVAL, end);
    refused_in(EXTENDED, 0, NULL, 0, NBD_CMD_READ, 0, UINT64_C(1) << 32, NBD_EINVAL, max);
}

static void dont_fragment_has_its_own_limit_and_needs_structured_replies(void **state)
{
    struct line l = {0};

    EACH_CHUNK_FORM(form)
    {
        refused_in(form, 0, NULL, NBD_CMD_FLAG_DF, NBD_CMD_READ, 0, NBD_DF_MAX + 1, NBD_EOVERFLOW,
                   "The read is too long to be answered in one chunk");
    }
    refused_in(SIMPLE, 0, NULL, NBD_CMD_FLAG_DF, NBD_CMD_READ, 0, 512, NBD_EINVAL,
               "NBD_CMD_FLAG_DF needs structured replies");
    assert_true(NBD_DF_MAX >= 65536); /* spec */
    line_open(&l, STRUCTURED, 0);
    nbd_reply_error(line_request(&l, NBD_CMD_FLAG_DF, NBD_CMD_READ, 0, NBD_DF_MAX), -EIO, "");
    line_want_error(&l, LINE_COOKIE, 0, NBD_EIO, "");
    line_expect_alive(&l);
    line_close(&l);
}

static void flags_and_commands_that_are_not_ours_are_invalid(void **state)
{
    static const char flag[] = "The request has a flag that does not go with its command";
    static const char command[] = "This server does not know that command";

    EACH_FORM(form)
    {
        refused_in(form, 0, NULL, 1 /* FUA, not advertised */, NBD_CMD_READ, 0, 512, NBD_EINVAL, flag);
        refused_in(form, 0, NULL, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_READ, 0, 512, NBD_EINVAL, flag);
        refused_in(form, 0, NULL, 0x8000, NBD_CMD_CACHE, 0, 512, NBD_EINVAL, flag);
        refused_in(form, 0, NULL, NBD_CMD_FLAG_DF, NBD_CMD_BLOCK_STATUS, 0, 512, NBD_EINVAL, flag);
        refused_in(form, 0, NULL, 0, NBD_CMD_FLUSH, 0, 0, NBD_EINVAL, command);
        refused_in(form, 0, NULL, 0, 8 /* RESIZE */, 0, 512, NBD_EINVAL, command);
        refused_in(form, 0, NULL, 0, UINT16_MAX, 0, 512, NBD_EINVAL, command);
        refused_in(form, 0, NULL, 0, NBD_CMD_BLOCK_STATUS, 0, 512, NBD_EINVAL,
                   "No metadata context was negotiated for this export");
    }
    EACH_FORM(form)
    {
        if (form != EXTENDED) /* only there it means something */
            refused_in(form, 0, NULL, NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_READ, 0, 512, NBD_EINVAL, flag);
    }
}

static void trimming_and_zeroing_are_not_permitted(void **state)
{
    EACH_FORM(form)
    {
        refused_in(form, 0, NULL, 0, NBD_CMD_TRIM, 0, 512, NBD_EPERM, "This export is read-only");
        refused_in(form, 0, NULL, 2 /* NO_HOLE */, NBD_CMD_WRITE_ZEROES, 0, 512, NBD_EPERM, "This export is read-only");
        refused_in(form, 0, NULL, 0, NBD_CMD_WRITE_ZEROES, LINE_SIZE, 512, NBD_EPERM, "This export is read-only");
    }
    /* Without the flag that says so, no payload follows. */
    refused_in(EXTENDED, 0, NULL, 0, NBD_CMD_WRITE, 0, 512, NBD_EPERM, "This export is read-only");
}

static void payload_is_skipped(enum form form, uint16_t flags, uint16_t type, size_t length, uint32_t error,
                               const char *sentence)
{
    for (enum feeding how = FEED_WHOLE; how <= FEED_RANDOM; how++) {
        struct line l = {0};

        if (how == FEED_BYTEWISE && length > 65536)
            continue;
        line_open(&l, form, 0);
        line_say(&l, flags, type, LINE_COOKIE, 4096, length);
        put_fill(&l.in, 0x25, length);
        line_want_error(&l, LINE_COOKIE, 4096, error, sentence);
        line_say(&l, 0, NBD_CMD_TRIM, 2, 0, 1);
        line_want_error(&l, 2, 0, NBD_EPERM, "This export is read-only");
        line_feed(&l, how);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void payloads_are_skipped_before_the_refusal(void **state)
{
    static const char flag[] = "The request has a flag that does not go with its command";
    const uint16_t payload = NBD_CMD_FLAG_PAYLOAD_LEN;

    payload_is_skipped(SIMPLE, 0, NBD_CMD_WRITE, 5, NBD_EPERM, "This export is read-only");
    payload_is_skipped(STRUCTURED, 1, NBD_CMD_WRITE, 5000, NBD_EPERM, "This export is read-only");
    payload_is_skipped(STRUCTURED, 0, NBD_CMD_WRITE, 3000000, NBD_EPERM, "This export is read-only");
    payload_is_skipped(EXTENDED, payload, NBD_CMD_WRITE, 5000, NBD_EPERM, "This export is read-only");
    payload_is_skipped(EXTENDED, payload, NBD_CMD_READ, 512, NBD_EINVAL, flag);
    payload_is_skipped(EXTENDED, payload, NBD_CMD_BLOCK_STATUS, 12, NBD_EINVAL, flag);
    payload_is_skipped(EXTENDED, payload, 4711, 12, NBD_EINVAL, "This server does not know that command");
}

static void a_giant_payload_ends_the_connection(void **state)
{
    struct line l = {0};

    line_open(&l, SIMPLE, 0);
    line_say(&l, 0, NBD_CMD_WRITE, LINE_COOKIE, 0, NBD_PAYLOAD_SKIP_MAX + 1);
    line_feed(&l, FEED_BYTEWISE);
    line_expect_end(&l, NBD_END_PROTOCOL, "The client announced a payload of 67108865 bytes on a read-only export");
    line_close(&l);

    l = (struct line){0};
    line_open(&l, EXTENDED, 0);
    line_say(&l, NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_READ, LINE_COOKIE, 0, UINT64_MAX);
    line_feed(&l, FEED_WHOLE);
    line_expect_end(&l, NBD_END_PROTOCOL,
                    "The client announced a payload of 18446744073709551615 bytes on a read-only export");
    line_close(&l);
}

static void a_wrong_magic_ends_the_connection_once_requests_in_flight_are_answered(void **state)
{
    EACH_FORM(form)
    {
        struct line l = {0};
        struct nbd_request *r;

        line_open(&l, form, 0);
        r = line_request(&l, 0, NBD_CMD_CACHE, 0, 512);
        if (form == EXTENDED) /* the other form's magic is wrong, too */
            say_request(&l.in, 0, NBD_CMD_READ, 2, 0, 512);
        else
            say_request_ext(&l.in, 0, NBD_CMD_READ, 2, 0, 512);
        put_fill(&l.in, 0, 100);
        line_feed(&l, FEED_BYTEWISE);
        assert_int_equal(l.peer.nhangups, 0);
        assert_true(nbd_is_ending(l.peer.nbd));
        nbd_reply_done(r);
        line_want_done(&l, LINE_COOKIE, 0);
        line_expect_end(&l, NBD_END_PROTOCOL, "The client sent something that is not an NBD request");
        line_close(&l);
    }
}

/* -- CACHE and BLOCK_STATUS ---------------------------------------------------------------------------------------- */

static void a_cache_request_is_just_answered(void **state)
{
    EACH_FORM(form)
    {
        struct line l = {0};
        struct nbd_request *r;

        line_open(&l, form, 0);
        r = line_request(&l, 0, NBD_CMD_CACHE, 8192, LINE_MAX_BLOCK);
        assert_int_equal(r->command, NBD_COMMAND_CACHE);
        nbd_reply_done(r);
        line_want_done(&l, LINE_COOKIE, 8192);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void want_status_head(struct line *l, uint16_t flags, uint64_t offset, uint32_t id, uint32_t count)
{
    if (l->form == EXTENDED) {
        line_want_head(l, flags, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, LINE_COOKIE, offset, 8 + 16 * count);
        put32(&l->want, id);
        put32(&l->want, count);
    } else {
        line_want_head(l, flags, NBD_REPLY_TYPE_BLOCK_STATUS, LINE_COOKIE, offset, 4 + 8 * count);
        put32(&l->want, id);
    }
}

static void want_extent(struct line *l, uint64_t length, uint64_t flags)
{
    if (l->form == EXTENDED) {
        put64(&l->want, length);
        put64(&l->want, flags);
    } else {
        put32(&l->want, (uint32_t)length);
        put32(&l->want, (uint32_t)flags);
    }
}

static const struct nbd_status allocation = {(const uint64_t[]){0, 4608, 12800},
                                             (const uint32_t[]){0, NBD_STATE_HOLE | NBD_STATE_ZERO, NBD_STATE_ZERO}, 3,
                                             1u << 30};
static const struct nbd_status dirty = {(const uint64_t[]){0, 65536}, (const uint32_t[]){NBD_STATE_DIRTY, 0}, 2,
                                        131072};

static void block_status_is_one_chunk_a_context_clipped_to_the_request(void **state)
{
    const struct nbd_status both[] = {allocation, dirty};

    EACH_CHUNK_FORM(form)
    {
        struct line l = {0};
        struct nbd_request *r;

        line_open(&l, form, 1);
        r = line_request(&l, 0, NBD_CMD_BLOCK_STATUS, 512, 20000);
        assert_int_equal(r->command, NBD_COMMAND_STATUS);
        assert_false(r->one);
        assert_int_equal(nbd_status_max_extents(r), NBD_EXTENTS_MAX);
        nbd_reply_status(r, both, 1);
        want_status_head(&l, NBD_REPLY_FLAG_DONE, 512, 1, 3);
        want_extent(&l, 4096, 0);
        want_extent(&l, 8192, 3);
        want_extent(&l, 20000 - 4096 - 8192, 2);
        line_expect_alive(&l);
        line_close(&l);

        l = (struct line){0};
        line_open(&l, form, 2);
        r = line_request(&l, 0, NBD_CMD_BLOCK_STATUS, 0, 65536);
        assert_int_equal(nbd_status_max_extents(r), NBD_EXTENTS_MAX / 2);
        nbd_reply_status(r, both, 2);
        want_status_head(&l, 0, 0, 1, 3);
        want_extent(&l, 4608, 0);
        want_extent(&l, 8192, 3);
        want_extent(&l, 65536 - 4608 - 8192, 2);
        want_status_head(&l, NBD_REPLY_FLAG_DONE, 0, 2, 1); /* the second extent lies behind the request */
        want_extent(&l, 65536, 1);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void a_map_may_say_less_than_was_asked(void **state)
{
    struct nbd_status status = allocation;

    status.nruns = 1;
    status.end = 4096;
    EACH_CHUNK_FORM(form)
    {
        struct line l = {0};

        line_open(&l, form, 1);
        nbd_reply_status(line_request(&l, 0, NBD_CMD_BLOCK_STATUS, 0, 1048576), &status, 1);
        want_status_head(&l, NBD_REPLY_FLAG_DONE, 0, 1, 1);
        want_extent(&l, 4096, 0);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void one_extent_is_sent_where_one_was_asked_for(void **state)
{
    const struct nbd_status both[] = {allocation, dirty};

    EACH_CHUNK_FORM(form)
    {
        struct line l = {0};
        struct nbd_request *r;

        line_open(&l, form, 2);
        r = line_request(&l, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_BLOCK_STATUS, 0, 6000);
        assert_true(r->one);
        assert_int_equal(nbd_status_max_extents(r), 1);
        nbd_reply_status(r, both, 2);
        want_status_head(&l, 0, 0, 1, 1);
        want_extent(&l, 4608, 0);
        want_status_head(&l, NBD_REPLY_FLAG_DONE, 0, 2, 1);
        want_extent(&l, 6000, 1);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void lengths_have_64_bits_with_extended_headers_only(void **state)
{
    const struct nbd_status status = {(const uint64_t[]){0}, (const uint32_t[]){UINT32_MAX}, 1, LINE_SIZE};
    struct line l = {0};

    line_open(&l, EXTENDED, 1);
    nbd_reply_status(line_request(&l, 0, NBD_CMD_BLOCK_STATUS, 0, LINE_SIZE), &status, 1);
    want_status_head(&l, NBD_REPLY_FLAG_DONE, 0, 1, 1);
    want_extent(&l, LINE_SIZE, UINT32_MAX);
    line_expect_alive(&l);
    line_close(&l);

    l = (struct line){0};
    line_open(&l, STRUCTURED, 1);
    nbd_reply_status(line_request(&l, 0, NBD_CMD_BLOCK_STATUS, 0, UINT32_MAX), &status, 1);
    want_status_head(&l, NBD_REPLY_FLAG_DONE, 0, 1, 1);
    want_extent(&l, UINT32_MAX, UINT32_MAX);
    line_expect_alive(&l);
    line_close(&l);
}

static void a_long_map_is_cut_at_the_limit(void **state)
{
    static uint64_t starts[NBD_EXTENTS_MAX + 5];
    static uint32_t flags[ARRAY_SIZE(starts)];
    const struct nbd_status status = {starts, flags, ARRAY_SIZE(starts), 512 * ARRAY_SIZE(starts)};

    for (uint32_t i = 0; i < ARRAY_SIZE(starts); i++) {
        starts[i] = i * UINT64_C(512);
        flags[i] = i;
    }
    EACH_CHUNK_FORM(form)
    {
        struct line l = {0};

        line_open(&l, form, 1);
        nbd_reply_status(line_request(&l, 0, NBD_CMD_BLOCK_STATUS, 0, 1u << 30), &status, 1);
        want_status_head(&l, NBD_REPLY_FLAG_DONE, 0, 1, NBD_EXTENTS_MAX);
        for (size_t i = 0; i < NBD_EXTENTS_MAX; i++)
            want_extent(&l, 512, i);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void a_map_without_the_first_byte_is_an_error(void **state)
{
    const struct nbd_status none = {0}, later = {(const uint64_t[]){1024}, (const uint32_t[]){1}, 1, 4096},
                            before = {(const uint64_t[]){0}, (const uint32_t[]){1}, 1, 512},
                            over = {(const uint64_t[]){0, 512}, (const uint32_t[]){1, 0}, 2, 4096};
    const struct nbd_status *bad[] = {&none, &later, &before, &over};

    EACH_CHUNK_FORM(form)
    {
        struct line l = {0};

        line_open(&l, form, 2);
        for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
            const struct nbd_status both[] = {dirty, *bad[i]};

            nbd_reply_status(line_request(&l, 0, NBD_CMD_BLOCK_STATUS, 512, 512), both, 2);
            line_want_error(&l, LINE_COOKIE, 512, NBD_EIO, "The map of this disk ends too early");
            nbd_reply_status(line_request(&l, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_BLOCK_STATUS, 512, 512), both, 2);
            line_want_error(&l, LINE_COOKIE, 512, NBD_EIO, "The map of this disk ends too early");
        }
        nbd_reply_error(line_request(&l, 0, NBD_CMD_BLOCK_STATUS, 0, 512), -EIO, "no map");
        line_want_error(&l, LINE_COOKIE, 0, NBD_EIO, "no map");
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void trim_is_taken_where_it_is_offered_and_nothing_else_that_writes(void **state)
{
    static const struct nbd_export trimmed = {.size = LINE_SIZE, .trim = true};

    EACH_FORM(form)
    {
        refused_in(form, 0, &trimmed, 0, NBD_CMD_WRITE_ZEROES, 0, 512, NBD_EPERM, "This export is read-only");
        refused_in(form, 0, &trimmed, 0, NBD_CMD_TRIM, LINE_SIZE, 1, NBD_EINVAL,
                   "The request reaches beyond the end of the export");
        refused_in(form, 0, &trimmed, 0, NBD_CMD_TRIM, 0, 0, NBD_EINVAL, "A request of length 0 means nothing here");
        refused_in(form, 0, &trimmed, 1, NBD_CMD_TRIM, 0, 512, NBD_EINVAL,
                   "The request has a flag that does not go with its command");
        for (enum feeding how = FEED_WHOLE; how <= FEED_RANDOM; how++) {
            struct line l = {.peer.export = trimmed};
            struct nbd_request *r;

            line_open(&l, form, 0);
            line_say(&l, 0, NBD_CMD_TRIM, LINE_COOKIE, 512, NBD_BLOCK_MAX + 512ull);
            line_feed(&l, how);
            r = peer_take(&l.peer, 0);
            assert_int_equal(r->command, NBD_COMMAND_TRIM);
            assert_int_equal(r->offset, 512);
            assert_int_equal(r->length, NBD_BLOCK_MAX + 512ull); /* no payload: it may be long */
            nbd_reply_done(r);
            line_want_done(&l, LINE_COOKIE, 512);
            line_expect_alive(&l);
            line_close(&l);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranges_are_checked),
        cmocka_unit_test(dont_fragment_has_its_own_limit_and_needs_structured_replies),
        cmocka_unit_test(flags_and_commands_that_are_not_ours_are_invalid),
        cmocka_unit_test(trimming_and_zeroing_are_not_permitted),
        cmocka_unit_test(payloads_are_skipped_before_the_refusal),
        cmocka_unit_test(a_giant_payload_ends_the_connection),
        cmocka_unit_test(a_wrong_magic_ends_the_connection_once_requests_in_flight_are_answered),
        cmocka_unit_test(a_cache_request_is_just_answered),
        cmocka_unit_test(block_status_is_one_chunk_a_context_clipped_to_the_request),
        cmocka_unit_test(a_map_may_say_less_than_was_asked),
        cmocka_unit_test(one_extent_is_sent_where_one_was_asked_for),
        cmocka_unit_test(lengths_have_64_bits_with_extended_headers_only),
        cmocka_unit_test(a_long_map_is_cut_at_the_limit),
        cmocka_unit_test(a_map_without_the_first_byte_is_an_error),
        cmocka_unit_test(trim_is_taken_where_it_is_offered_and_nothing_else_that_writes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
