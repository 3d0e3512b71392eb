/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading, and the end of a connection, in the transmission phase of server/nbd, byte by byte, in its three forms:
 * simple replies, structured replies, extended headers. What is the same in all of them is tested in all of them.
 */
#include "lib/nbd_line.h"
#include "lib/test.h"
#include "nbd/limits.h"

#include <errno.h>
#include <stdio.h>

/* -- reading ------------------------------------------------------------------------------------------------------- */

static void a_simple_read_is_one_header_and_the_data(void **state)
{
    struct line l = {0};
    struct nbd_request *r;

    line_open(&l, SIMPLE, 0);
    r = line_request(&l, 0, NBD_CMD_READ, LINE_SIZE - 6, 6);
    assert_int_equal(r->command, NBD_COMMAND_READ);
    assert_true(r->in_order);
    assert_false(r->df);
    line_give(&l, r, LINE_SIZE - 6, "abcdef");
    want_simple(&l.want, 0, LINE_COOKIE);
    put_text(&l.want, "abcdef");
    line_expect_alive(&l);

    r = line_request(&l, 0, NBD_CMD_READ, 100, 6);
    line_give(&l, r, 100, "a");
    line_give(&l, r, 101, "bcd");
    want_simple(&l.want, 0, LINE_COOKIE);
    put_text(&l.want, "abcd");
    line_expect(&l);
    assert_int_equal(nbd_inflight(l.peer.nbd), 1);
    line_give(&l, r, 104, "ef");
    put_text(&l.want, "ef");
    line_expect_alive(&l);
    line_close(&l);
}

static void a_read_in_chunks_may_come_in_any_order_and_the_last_piece_says_done(void **state)
{
    EACH_CHUNK_FORM(form)
    {
        struct line l = {0};
        struct nbd_request *r;

        line_open(&l, form, 0);
        r = line_request(&l, 0, NBD_CMD_READ, 5000000000, 6);
        assert_false(r->in_order);
        line_give(&l, r, 5000000000, "abcdef");
        line_want_data(&l, NBD_REPLY_FLAG_DONE, LINE_COOKIE, 5000000000, 5000000000, "abcdef");
        line_expect_alive(&l);

        r = line_request(&l, 0, NBD_CMD_READ, 100, 20);
        line_give(&l, r, 118, "yz");
        line_give(&l, r, 100, "abc");
        nbd_reply_hole(r, 105, 13);
        line_want_data(&l, 0, LINE_COOKIE, 100, 118, "yz");
        line_want_data(&l, 0, LINE_COOKIE, 100, 100, "abc");
        line_want_head(&l, 0, NBD_REPLY_TYPE_OFFSET_HOLE, LINE_COOKIE, 100, 12);
        put64(&l.want, 105);
        put32(&l.want, 13);
        line_expect(&l);
        assert_int_equal(nbd_inflight(l.peer.nbd), 1);
        line_give(&l, r, 103, "de");
        line_want_data(&l, NBD_REPLY_FLAG_DONE, LINE_COOKIE, 100, 103, "de");
        line_expect_alive(&l);

        r = line_request(&l, 0, NBD_CMD_READ, 0, 4096);
        nbd_reply_hole(r, 0, 4096);
        line_want_head(&l, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_HOLE, LINE_COOKIE, 0, 12);
        put64(&l.want, 0);
        put32(&l.want, 4096);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void an_unfragmented_read_is_one_chunk_however_many_pieces_it_comes_in(void **state)
{
    EACH_CHUNK_FORM(form)
    {
        struct line l = {0};
        struct nbd_request *r;

        line_open(&l, form, 0);
        r = line_request(&l, NBD_CMD_FLAG_DF, NBD_CMD_READ, 100, 6);
        assert_true(r->df);
        line_give(&l, r, 100, "abcdef");
        line_want_data(&l, NBD_REPLY_FLAG_DONE, LINE_COOKIE, 100, 100, "abcdef");
        line_expect_alive(&l);

        r = line_request(&l, NBD_CMD_FLAG_DF, NBD_CMD_READ, 100, 6);
        line_give(&l, r, 100, "ab");
        line_give(&l, r, 102, "c");
        line_give(&l, r, 103, "def");
        line_want_data(&l, 0, LINE_COOKIE, 100, 100, "abcdef");
        line_want_done(&l, LINE_COOKIE, 100);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void a_failed_read_is_told_with_its_sentence(void **state)
{
    EACH_FORM(form)
    {
        struct line l = {0};

        line_open(&l, form, 0);
        nbd_reply_error(line_request(&l, 0, NBD_CMD_READ, 4096, 512), -EIO, "The snapshot is lost");
        line_want_error(&l, LINE_COOKIE, 4096, NBD_EIO, "The snapshot is lost");
        nbd_reply_error(line_request(&l, 0, NBD_CMD_READ, 4096, 512), -ENOMEM, NULL);
        line_want_error(&l, LINE_COOKIE, 4096, NBD_ENOMEM, "");
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void a_read_that_fails_half_way_is_told_where_chunks_allow_it(void **state)
{
    EACH_CHUNK_FORM(form)
    {
        struct line l = {0};
        struct nbd_request *r;

        line_open(&l, form, 0);
        r = line_request(&l, 0, NBD_CMD_READ, 100, 6);
        line_give(&l, r, 103, "def");
        nbd_reply_error(r, -EIO, "gone");
        line_want_data(&l, 0, LINE_COOKIE, 100, 103, "def");
        line_want_error(&l, LINE_COOKIE, 100, NBD_EIO, "gone");
        line_expect_alive(&l);

        /* The chunk that was begun is finished with zeros, then the place of the error is told. */
        r = line_request(&l, NBD_CMD_FLAG_DF, NBD_CMD_READ, 100, 100000);
        line_give(&l, r, 100, "abcd");
        nbd_reply_error(r, -EIO, "gone");
        line_want_head(&l, 0, NBD_REPLY_TYPE_OFFSET_DATA, LINE_COOKIE, 100, 100008);
        put64(&l.want, 100);
        put_text(&l.want, "abcd");
        put_fill(&l.want, 0, 99996);
        line_want_head(&l, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR_OFFSET, LINE_COOKIE, 100, 4 + 2 + 4 + 8);
        put32(&l.want, NBD_EIO);
        put16(&l.want, 4);
        put_text(&l.want, "gone");
        put64(&l.want, 104);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void a_simple_read_that_fails_half_way_silences_the_connection(void **state)
{
    struct line l = {0};
    struct nbd_request *r, *other;

    line_open(&l, SIMPLE, 0);
    line_say(&l, 0, NBD_CMD_READ, 1, 0, 3);
    line_say(&l, 0, NBD_CMD_READ, 2, 0, 6);
    line_feed(&l, FEED_WHOLE);
    other = peer_take(&l.peer, 0);
    r = peer_take(&l.peer, 0);
    line_give(&l, r, 0, "abc");
    nbd_reply_error(r, -EIO, "gone");
    assert_int_equal(l.peer.nhangups, 0); /* one is still in flight */
    assert_true(nbd_is_ending(l.peer.nbd));
    line_give(&l, other, 0, "xyz"); /* released, not sent */
    want_simple(&l.want, 0, 2);
    put_text(&l.want, "abc");
    line_expect_end(&l, NBD_END_LOST, "A read failed after a part of its simple reply was sent: gone");
    line_close(&l);
}

static void a_simple_read_that_fails_half_way_spoils_a_good_end(void **state)
{
    struct line l = {0};
    struct nbd_request *r;

    line_open(&l, SIMPLE, 0);
    r = line_request(&l, 0, NBD_CMD_READ, 0, 6);
    line_say(&l, 0, NBD_CMD_DISC, 2, 0, 0);
    line_feed(&l, FEED_WHOLE);
    line_give(&l, r, 0, "abc");
    nbd_reply_error(r, -EIO, NULL);
    want_simple(&l.want, 0, LINE_COOKIE);
    put_text(&l.want, "abc");
    line_expect_end(&l, NBD_END_LOST, "A read failed after a part of its simple reply was sent: no reason given");
    line_close(&l);
}

static void errors_are_mapped_to_the_protocols_own(void **state)
{
    static const struct {
        int err;
        uint32_t wire;
    } errors[] = {
        {-EPERM, 1},    {-EACCES, 1},      {-EROFS, 1},   {-EIO, 5},       {-ENOMEM, 12},
        {-EINVAL, 22},  {-ENOSPC, 28},     {-EDQUOT, 28}, {-EFBIG, 28},    {-EOVERFLOW, 75},
        {-ENOTSUP, 95}, {-ESHUTDOWN, 108}, {-EPIPE, 5},   {-ETIMEDOUT, 5},
    };
    struct line l = {0};

    line_open(&l, SIMPLE, 0);
    for (size_t i = 0; i < ARRAY_SIZE(errors); i++) {
        nbd_reply_error(line_request(&l, 0, NBD_CMD_READ, 0, 1), errors[i].err, "x");
        want_simple(&l.want, errors[i].wire, LINE_COOKIE);
    }
    line_expect_alive(&l);
    line_close(&l);
}

static void long_sentences_are_cut_between_characters(void **state)
{
    char text[600];
    struct line l = {0};

    memset(text, 'x', sizeof(text));
    memcpy(text + NBD_MESSAGE_MAX - 1, "\xc3\xa9", 2); /* one character on the edge */
    text[sizeof(text) - 1] = '\0';
    line_open(&l, STRUCTURED, 0);
    nbd_reply_error(line_request(&l, 0, NBD_CMD_READ, 0, 1), -EIO, text);
    text[NBD_MESSAGE_MAX - 1] = '\0';
    line_want_error(&l, LINE_COOKIE, 0, NBD_EIO, text);
    line_expect_alive(&l);
    line_close(&l);
}

/* -- many requests, and the end ------------------------------------------------------------------------------------ */

static void say_reads(struct line *l, uint64_t first, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        line_say(l, 0, NBD_CMD_CACHE, first + i, 4096 * (first + i), 4096);
}

static void requests_in_flight_are_bounded_and_go_on_as_they_are_answered(void **state)
{
    EACH_FORM(form)
    {
        struct line l = {0};
        size_t size = form == EXTENDED ? 32 : 28, taken;

        line_open(&l, form, 0);
        say_reads(&l, 0, NBD_INFLIGHT_MAX + 3);
        taken = nbd_feed(l.peer.nbd, l.in.data, l.in.len);
        assert_int_equal(taken, size * NBD_INFLIGHT_MAX);
        assert_int_equal(nbd_inflight(l.peer.nbd), NBD_INFLIGHT_MAX);
        assert_int_equal(nbd_feed(l.peer.nbd, l.in.data + taken, size), 0);
        nbd_reply_done(peer_take(&l.peer, 10)); /* any of them makes room */
        assert_int_equal(nbd_feed(l.peer.nbd, l.in.data + taken, l.in.len - taken), size);
        taken += size;
        while (l.peer.nheld > 0)
            nbd_reply_done(peer_take(&l.peer, l.peer.nheld - 1));
        assert_int_equal(nbd_feed(l.peer.nbd, l.in.data + taken, l.in.len - taken), 2 * size);
        while (l.peer.nheld > 0)
            nbd_reply_done(peer_take(&l.peer, 0));
        assert_int_equal(l.peer.out.len, (NBD_INFLIGHT_MAX + 3) * (form == SIMPLE ? 16 : form == STRUCTURED ? 20 : 32));
        bytes_done(&l.peer.out);
        line_expect_alive(&l);
        line_close(&l);
    }
}

static void the_end_waits_for_requests_in_flight(enum nbd_end end, const char *why)
{
    static const struct failure lost = {-EIO, "The snapshot is lost"};

    EACH_FORM(form)
    {
        struct line l = {0};

        line_open(&l, form, 0);
        say_reads(&l, 0, 3);
        line_feed(&l, FEED_RANDOM);
        if (end == NBD_END_DISC)
            line_say(&l, 0, NBD_CMD_DISC, 99, 0, 0);
        say_reads(&l, 3, end == NBD_END_DISC ? 2 : 0); /* too late */
        line_feed(&l, FEED_BYTEWISE);
        if (end == NBD_END_EOF)
            nbd_feed_eof(l.peer.nbd);
        if (end == NBD_END_LOST)
            nbd_fail(l.peer.nbd, &lost);
        assert_int_equal(l.peer.nheld, 3);
        assert_true(nbd_is_ending(l.peer.nbd));
        assert_true(nbd_in_transmission(l.peer.nbd));
        nbd_reply_done(peer_take(&l.peer, 2));
        line_want_done(&l, 2, 8192);
        nbd_reply_error(peer_take(&l.peer, 0), -ESHUTDOWN, "down");
        line_want_error(&l, 0, 0, NBD_ESHUTDOWN, "down");
        nbd_feed_eof(l.peer.nbd); /* the first end counts */
        nbd_fail(l.peer.nbd, &lost);
        assert_int_equal(l.peer.nhangups, 0);
        nbd_reply_done(peer_take(&l.peer, 0));
        line_want_done(&l, 1, 4096);
        line_expect_end(&l, end, why);
        line_close(&l);
    }
}

static void disconnecting_waits_for_requests_in_flight(void **state)
{
    the_end_waits_for_requests_in_flight(NBD_END_DISC, NULL);
}

static void end_of_file_waits_for_requests_in_flight(void **state)
{
    the_end_waits_for_requests_in_flight(NBD_END_EOF, "The client closed the connection without saying so");
}

static void failing_waits_for_requests_in_flight(void **state)
{
    the_end_waits_for_requests_in_flight(NBD_END_LOST, "The snapshot is lost");
}

/* A header half received, a payload half skipped. */
static void a_client_may_leave_and_the_server_may_fail_at_every_byte(void **state)
{
    static const struct failure lost = {-EIO, "The snapshot is lost"};

    EACH_FORM(form)
    {
        size_t len = 0;

        for (;; len++) {
            struct line l = {0};

            line_open(&l, form, 0);
            line_say(&l, form == EXTENDED ? NBD_CMD_FLAG_PAYLOAD_LEN : 0, NBD_CMD_WRITE, 1, 0, 10);
            put_fill(&l.in, 0, 9);
            if (len > l.in.len) {
                line_close(&l);
                break;
            }
            assert_int_equal(nbd_feed(l.peer.nbd, l.in.data, len), len);
            if (len % 2)
                nbd_feed_eof(l.peer.nbd);
            else
                nbd_fail(l.peer.nbd, &lost);
            line_expect_end(&l, len % 2 ? NBD_END_EOF : NBD_END_LOST,
                            len % 2 ? "The client closed the connection without saying so" : "The snapshot is lost");
            line_close(&l);
        }
        assert_true(len > 28 + 9);
    }
}

static void requests_die_with_the_machine(void **state)
{
    struct line l = {0};

    line_open(&l, STRUCTURED, 0);
    say_reads(&l, 0, 5);
    line_feed(&l, FEED_WHOLE);
    assert_int_equal(nbd_inflight(l.peer.nbd), 5);
    line_close(&l); /* the leak check looks */
}

/* Serves a read from inside the callback, in two pieces where it can. */
static void serve_at_once(struct peer *p, struct nbd_request *r)
{
    static const char data[] = "0123456789";

    if (r->command == NBD_COMMAND_CACHE) {
        nbd_reply_done(r);
    } else if (r->length > 1) {
        uint64_t offset = r->offset;

        nbd_reply_data(r, offset, peer_payload(p, data, 1));
        nbd_reply_data(r, offset + 1, peer_payload(p, data + 1, r->length - 1));
    } else {
        nbd_reply_data(r, r->offset, peer_payload(p, data, 1));
    }
}

static void many_requests_sound_the_same_however_their_bytes_are_cut(void **state)
{
    EACH_FORM(form)
    {
        for (unsigned round = 0; round < 60; round++) {
            struct line l = {.peer = {.answer_at_once = round % 2, .serve = serve_at_once}};

            line_open(&l, form, 0);
            for (uint64_t i = 0; i < 200; i++) {
                if (i % 5 == 4) {
                    line_say(&l, form == EXTENDED ? NBD_CMD_FLAG_PAYLOAD_LEN : 0, NBD_CMD_WRITE, i, i, 7);
                    put_text(&l.in, "payload");
                    line_want_error(&l, i, i, NBD_EPERM, "This export is read-only");
                } else if (i % 5 == 3) {
                    line_say(&l, 0, NBD_CMD_CACHE, i, i, 7);
                    line_want_done(&l, i, i);
                } else {
                    line_say(&l, 0, NBD_CMD_READ, i, i, 10);
                    if (form == SIMPLE) {
                        want_simple(&l.want, 0, i);
                        put_text(&l.want, "0123456789");
                    } else {
                        line_want_data(&l, 0, i, i, i, "0");
                        line_want_data(&l, NBD_REPLY_FLAG_DONE, i, i, i + 1, "123456789");
                    }
                }
                if (!l.peer.answer_at_once) { /* held ones would be overtaken by refusals: go request by request */
                    line_feed(&l, FEED_RANDOM);
                }
            }
            line_say(&l, 0, NBD_CMD_DISC, 0, 0, 0);
            line_feed(&l, FEED_RANDOM);
            line_expect_end(&l, NBD_END_DISC, NULL);
            line_close(&l);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_simple_read_is_one_header_and_the_data),
        cmocka_unit_test(a_read_in_chunks_may_come_in_any_order_and_the_last_piece_says_done),
        cmocka_unit_test(an_unfragmented_read_is_one_chunk_however_many_pieces_it_comes_in),
        cmocka_unit_test(a_failed_read_is_told_with_its_sentence),
        cmocka_unit_test(a_read_that_fails_half_way_is_told_where_chunks_allow_it),
        cmocka_unit_test(a_simple_read_that_fails_half_way_silences_the_connection),
        cmocka_unit_test(a_simple_read_that_fails_half_way_spoils_a_good_end),
        cmocka_unit_test(errors_are_mapped_to_the_protocols_own),
        cmocka_unit_test(long_sentences_are_cut_between_characters),
        cmocka_unit_test(requests_in_flight_are_bounded_and_go_on_as_they_are_answered),
        cmocka_unit_test(disconnecting_waits_for_requests_in_flight),
        cmocka_unit_test(end_of_file_waits_for_requests_in_flight),
        cmocka_unit_test(failing_waits_for_requests_in_flight),
        cmocka_unit_test(a_client_may_leave_and_the_server_may_fail_at_every_byte),
        cmocka_unit_test(requests_die_with_the_machine),
        cmocka_unit_test(many_requests_sound_the_same_however_their_bytes_are_cut),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
