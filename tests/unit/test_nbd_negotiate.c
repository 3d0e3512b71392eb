/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The handshake of server/nbd, byte by byte: what a client says, what it must hear. Every talk is held with the bytes
 * at once, one by one and split at random, and with asks answered at once and later; the server must say the same each
 * time.
 */
#include "lib/nbd_talk.h"
#include "lib/test.h"
#include "nbd/limits.h"

#include <errno.h>
#include <stdio.h>

/* -- flags --------------------------------------------------------------------------------------------------------- */

static void unknown_client_flags_end_the_connection(void **state)
{
    struct talk t = talk_with_flags(4 | TALK_FLAGS);

    talk_ends(&t, NBD_END_PROTOCOL, "The client set unknown handshake flags: 0x00000007");
    talk_hold(&t);
}

static void only_export_name_goes_without_fixed_newstyle(void **state)
{
    struct talk t = talk_with_flags(NBD_FLAG_C_NO_ZEROES);

    say_option(&t.in, NBD_OPT_LIST, NULL);
    talk_ends(&t, NBD_END_PROTOCOL, "The client sent option 3 without fixed newstyle negotiation");
    talk_hold(&t);

    t = talk_with_flags(NBD_FLAG_C_NO_ZEROES);
    say_option(&t.in, 4711, NULL);
    talk_ends(&t, NBD_END_PROTOCOL, "The client sent option 4711 without fixed newstyle negotiation");
    talk_hold(&t);

    t = talk_with_flags(NBD_FLAG_C_NO_ZEROES);
    say_option_text(&t.in, NBD_OPT_EXPORT_NAME, "vm/vda");
    put64(&t.want, TALK_SIZE);
    put16(&t.want, TALK_SIMPLE);
    t.after = talk_is_in_transmission;
    talk_hold(&t);
}

static void something_that_is_no_option_ends_the_connection(void **state)
{
    struct talk t = talk_begin();

    put_text(&t.in, "GET / HTTP/1.1\r\n");
    talk_ends(&t, NBD_END_PROTOCOL, "The client sent something that is not an NBD option");
    talk_hold(&t);
}

/* -- EXPORT_NAME --------------------------------------------------------------------------------------------------- */

static void asked_to_open_default(struct peer *p)
{
    assert_int_equal(p->ask, NBD_ASK_OPEN);
    assert_true(p->ask_has_name);
    assert_string_equal(p->ask_name, "");
    assert_int_equal(p->ask_ncontexts, 0);
    talk_is_in_transmission(p);
}

static void export_name_is_answered_with_zeroes_unless_the_client_wants_none(void **state)
{
    struct talk t = talk_with_flags(NBD_FLAG_C_FIXED_NEWSTYLE);

    say_option_text(&t.in, NBD_OPT_EXPORT_NAME, "");
    put64(&t.want, TALK_SIZE);
    put16(&t.want, TALK_SIMPLE);
    put_fill(&t.want, 0, 124);
    t.after = asked_to_open_default;
    talk_hold(&t);

    t = talk_begin();
    t.peer.export.multi_conn = true;
    say_option_text(&t.in, NBD_OPT_EXPORT_NAME, "");
    put64(&t.want, TALK_SIZE);
    put16(&t.want, TALK_SIMPLE | NBD_FLAG_CAN_MULTI_CONN);
    t.after = asked_to_open_default;
    talk_hold(&t);
}

static void export_name_of_an_unknown_export_hangs_up_with_the_owners_sentence(void **state)
{
    struct talk t = talk_begin();

    t.peer.refusal = (struct failure){-ENOENT, "There is no disk of that name"};
    say_option_text(&t.in, NBD_OPT_EXPORT_NAME, "vm/vdz");
    talk_ends(&t, NBD_END_LOST, "There is no disk of that name");
    talk_hold(&t);
}

static void broken_export_names_hang_up(void **state)
{
    struct bytes name = {0};
    struct talk t = talk_begin();

    put_raw(&name, "a\0b", 3);
    say_option(&t.in, NBD_OPT_EXPORT_NAME, &name);
    talk_ends(&t, NBD_END_PROTOCOL, "The export name contains a NUL byte");
    talk_hold(&t);
    bytes_done(&name);

    t = talk_begin();
    put_fill(&name, 'x', 4097);
    say_option(&t.in, NBD_OPT_EXPORT_NAME, &name);
    talk_ends(&t, NBD_END_PROTOCOL, "The export name is longer than 4096 bytes");
    talk_hold(&t);
    bytes_done(&name);

    t = talk_begin();
    say_option(&t.in, NBD_OPT_EXTENDED_HEADERS, NULL);
    want_reply(&t.want, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, NULL);
    say_option_text(&t.in, NBD_OPT_EXPORT_NAME, "vm/vda");
    talk_ends(&t, NBD_END_PROTOCOL, "NBD_OPT_EXPORT_NAME does not go with extended headers");
    talk_hold(&t);
}

static void asked_long_name(struct peer *p)
{
    assert_int_equal(strlen(p->ask_name), 4096);
    talk_is_in_transmission(p);
}

static void the_longest_name_is_taken(void **state)
{
    struct bytes name = {0};
    struct talk t = talk_begin();

    put_fill(&name, 'x', 4096);
    say_option(&t.in, NBD_OPT_EXPORT_NAME, &name);
    put64(&t.want, TALK_SIZE);
    put16(&t.want, TALK_SIMPLE);
    t.after = asked_long_name;
    talk_hold(&t);
    bytes_done(&name);
}

/* -- ABORT, LIST --------------------------------------------------------------------------------------------------- */

static void abort_is_acknowledged_and_ends_the_connection(void **state)
{
    struct talk t = talk_begin();

    say_option(&t.in, NBD_OPT_ABORT, NULL);
    want_reply(&t.want, NBD_OPT_ABORT, NBD_REP_ACK, NULL);
    say_option(&t.in, NBD_OPT_LIST, NULL); /* nobody listens any more */
    talk_ends(&t, NBD_END_ABORT, NULL);
    talk_hold(&t);

    t = talk_begin();
    say_option_text(&t.in, NBD_OPT_ABORT, "spec: the server ignores data");
    want_reply(&t.want, NBD_OPT_ABORT, NBD_REP_ACK, NULL);
    talk_ends(&t, NBD_END_ABORT, NULL);
    talk_hold(&t);
}

static void list_names_every_export_with_its_description(void **state)
{
    char too_long[NBD_NAME_MAX + 2] = {0};
    const struct nbd_list_entry entries[] = {
        {"vm/vda", "first disk"}, {too_long, "not listed: nobody could open it"}, {"vm/vdb", NULL}, {"", ""}};
    struct bytes d = {0};
    struct talk t = talk_begin();

    memset(too_long, 'x', NBD_NAME_MAX + 1);
    t.peer.entries = entries;
    t.peer.nentries = ARRAY_SIZE(entries);
    say_option(&t.in, NBD_OPT_LIST, NULL);
    put32(&d, 6);
    put_text(&d, "vm/vdafirst disk");
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_SERVER, &d);
    bytes_done(&d);
    put32(&d, 6);
    put_text(&d, "vm/vdb");
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_SERVER, &d);
    bytes_done(&d);
    put32(&d, 0);
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_SERVER, &d);
    bytes_done(&d);
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_ACK, NULL);
    t.after = talk_is_negotiating;
    talk_hold(&t);
}

static void list_may_be_empty_or_forbidden(void **state)
{
    struct talk t = talk_begin();

    say_option(&t.in, NBD_OPT_LIST, NULL);
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_ACK, NULL);
    talk_hold(&t);

    t = talk_begin();
    t.peer.refusal = (struct failure){-EPERM, "Listing is not for you"};
    say_option(&t.in, NBD_OPT_LIST, NULL);
    want_reply_text(&t.want, NBD_OPT_LIST, NBD_REP_ERR_POLICY, "Listing is not for you");
    talk_hold(&t);
}

/* Options without data, and an unknown one, then one that works: the stream has kept its place. */
static void data_where_none_belongs_is_refused_and_skipped(void **state)
{
    static const uint32_t without[] = {NBD_OPT_LIST, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY,
                                       NBD_OPT_EXTENDED_HEADERS};
    struct talk t = talk_begin();

    for (size_t i = 0; i < ARRAY_SIZE(without); i++) {
        say_option_text(&t.in, without[i], "IHAVEOPT and more");
        want_reply_text(&t.want, without[i], NBD_REP_ERR_INVALID, "This option takes no data");
    }
    say_option(&t.in, NBD_OPT_LIST, NULL);
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_ACK, NULL);
    talk_hold(&t);
}

static void unknown_options_are_refused_and_skipped(void **state)
{
    static const uint32_t unknown[] = {0, 4 /* PEEK_EXPORT */, 12, UINT32_MAX};
    struct talk t = talk_begin();

    for (size_t i = 0; i < ARRAY_SIZE(unknown); i++) {
        say_option_text(&t.in, unknown[i], i % 2 ? "IHAVEOPT" : "");
        want_reply_text(&t.want, unknown[i], NBD_REP_ERR_UNSUP, "This server does not know that option");
    }
    say_option(&t.in, NBD_OPT_LIST, NULL);
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_ACK, NULL);
    talk_hold(&t);
}

static void too_much_data_is_skipped_or_hung_up_on(void **state)
{
    struct bytes d = {0};
    struct talk t = talk_begin();

    put_fill(&d, 'x', NBD_META_DATA_MAX + 1);
    say_option(&t.in, NBD_OPT_GO, &d);
    want_reply_text(&t.want, NBD_OPT_GO, NBD_REP_ERR_TOO_BIG, "The option has more data than this server takes");
    say_option(&t.in, NBD_OPT_LIST_META_CONTEXT, &d);
    want_reply_text(&t.want, NBD_OPT_LIST_META_CONTEXT, NBD_REP_ERR_TOO_BIG,
                    "The option has more data than this server takes");
    say_option(&t.in, NBD_OPT_LIST, NULL);
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_ACK, NULL);
    talk_hold(&t);
    bytes_done(&d);

    t = talk_begin();
    put_text(&t.in, "IHAVEOPT");
    put32(&t.in, 4711);
    put32(&t.in, NBD_OPTION_SKIP_MAX + 1);
    talk_ends(&t, NBD_END_PROTOCOL, "Option 4711 has too much data: 1048577 bytes");
    talk_hold(&t);

    t = talk_begin();
    put_text(&t.in, "IHAVEOPT");
    put32(&t.in, NBD_OPT_ABORT);
    put32(&t.in, UINT32_MAX);
    talk_ends(&t, NBD_END_PROTOCOL, "Option 2 has too much data: 4294967295 bytes");
    talk_hold(&t);
}

static void endless_haggling_ends_the_connection(void **state)
{
    struct talk t = talk_begin();

    for (unsigned i = 0; i < NBD_OPTIONS_MAX; i++) {
        say_option(&t.in, 99, NULL);
        want_reply_text(&t.want, 99, NBD_REP_ERR_UNSUP, "This server does not know that option");
    }
    say_option(&t.in, NBD_OPT_LIST, NULL);
    talk_ends(&t, NBD_END_PROTOCOL, "The client sent more than 1024 options");
    talk_hold(&t);
}

/* -- INFO and GO --------------------------------------------------------------------------------------------------- */

static void info_tells_what_was_asked_for_and_goes_on(void **state)
{
    static const uint16_t all[] = {NBD_INFO_BLOCK_SIZE, 4, NBD_INFO_NAME, 0xffff, NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT,
                                   NBD_INFO_NAME};
    struct talk t = talk_begin();

    say_info(&t.in, NBD_OPT_INFO, "", 0, NULL);
    want_info_export(&t.want, NBD_OPT_INFO, TALK_SIZE, TALK_SIMPLE);
    want_reply(&t.want, NBD_OPT_INFO, NBD_REP_ACK, NULL);
    say_info(&t.in, NBD_OPT_INFO, "", ARRAY_SIZE(all), all);
    want_info_export(&t.want, NBD_OPT_INFO, TALK_SIZE, TALK_SIMPLE);
    want_info_text(&t.want, NBD_OPT_INFO, NBD_INFO_NAME, "vm/vda");
    want_info_text(&t.want, NBD_OPT_INFO, NBD_INFO_DESCRIPTION, "a disk");
    want_block_sizes(&t.want, NBD_OPT_INFO, 1, 65536, 33554432);
    want_reply(&t.want, NBD_OPT_INFO, NBD_REP_ACK, NULL);
    t.after = talk_is_negotiating;
    talk_hold(&t);
}

static void info_leaves_out_what_the_owner_does_not_tell(void **state)
{
    static const uint16_t all[] = {NBD_INFO_BLOCK_SIZE, NBD_INFO_NAME, NBD_INFO_DESCRIPTION};
    struct talk t = talk_begin();

    t.peer.export = (struct nbd_export){.size = TALK_SIZE};
    say_info(&t.in, NBD_OPT_INFO, "x", ARRAY_SIZE(all), all);
    want_info_export(&t.want, NBD_OPT_INFO, TALK_SIZE, TALK_SIMPLE);
    want_block_sizes(&t.want, NBD_OPT_INFO, 1, 1, 33554432);
    want_reply(&t.want, NBD_OPT_INFO, NBD_REP_ACK, NULL);
    talk_hold(&t);
}

static void asked_to_open_vdb(struct peer *p)
{
    assert_int_equal(p->ask, NBD_ASK_OPEN);
    assert_string_equal(p->ask_name, "vm/vdb");
    talk_is_in_transmission(p);
}

static void go_tells_the_same_and_begins_transmission(void **state)
{
    static const uint16_t blocks[] = {NBD_INFO_BLOCK_SIZE};
    struct talk t =
        talk_with_flags(NBD_FLAG_C_FIXED_NEWSTYLE); /* spec: no zeroes after GO, whatever was said of them */

    t.peer.export.multi_conn = true;
    say_option(&t.in, NBD_OPT_STRUCTURED_REPLY, NULL);
    want_reply(&t.want, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    say_info(&t.in, NBD_OPT_GO, "vm/vdb", 1, blocks);
    want_info_export(&t.want, NBD_OPT_GO, TALK_SIZE, TALK_STRUCTURED | NBD_FLAG_CAN_MULTI_CONN);
    want_block_sizes(&t.want, NBD_OPT_GO, 1, 65536, 33554432);
    want_reply(&t.want, NBD_OPT_GO, NBD_REP_ACK, NULL);
    t.after = asked_to_open_vdb;
    talk_hold(&t);
}

static void errors_reach_the_client_by_kind_and_in_words(void **state)
{
    static const struct {
        int err;
        uint32_t reply;
    } kinds[] = {
        {-ENOENT, NBD_REP_ERR_UNKNOWN},  {-EACCES, NBD_REP_ERR_POLICY},      {-EPERM, NBD_REP_ERR_POLICY},
        {-EBUSY, NBD_REP_ERR_POLICY},    {-ESHUTDOWN, NBD_REP_ERR_SHUTDOWN}, {-EINVAL, NBD_REP_ERR_INVALID},
        {-ENOMEM, NBD_REP_ERR_PLATFORM}, {-EIO, NBD_REP_ERR_PLATFORM},
    };
    static const uint32_t opts[] = {NBD_OPT_INFO, NBD_OPT_GO};

    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
        struct talk t = talk_begin();

        t.peer.refusal = (struct failure){kinds[i].err, "VM \"a\": no"};
        for (size_t k = 0; k < ARRAY_SIZE(opts); k++) {
            say_info(&t.in, opts[k], "a/b", 0, NULL);
            want_reply_text(&t.want, opts[k], kinds[i].reply, "VM \"a\": no");
        }
        t.after = talk_is_negotiating;
        talk_hold(&t);
    }
}

static void inconsistent_lengths_in_info_and_go_are_refused(void **state)
{
    static const uint32_t opts[] = {NBD_OPT_INFO, NBD_OPT_GO};
    static const char numbers[] = "The number of information requests does not fit the option's length";

    for (size_t i = 0; i < ARRAY_SIZE(opts); i++) {
        struct bytes d = {0};

        TALK_REFUSED(opts[i], "", "The option is too short for an export name");
        TALK_REFUSED(opts[i], "\0\0\0", "The option is too short for an export name");
        TALK_REFUSED(opts[i], "\0\0\0\4abc", "The export name is longer than the option that holds it");
        TALK_REFUSED(opts[i],
                     "\xff\xff\xff\xff"
                     "abc\0\0",
                     "The export name is longer than the option that holds it");
        TALK_REFUSED(opts[i], "\0\0\0\3abc", numbers);
        TALK_REFUSED(opts[i], "\0\0\0\3abc\0", numbers);
        TALK_REFUSED(opts[i], "\0\0\0\3abc\0\1", numbers);
        TALK_REFUSED(opts[i], "\0\0\0\3abc\0\1\0", numbers);
        TALK_REFUSED(opts[i], "\0\0\0\3abc\0\1\0\3!", numbers);
        TALK_REFUSED(opts[i], "\0\0\0\3abc\xff\xff\0\3", numbers);
        TALK_REFUSED(opts[i], "\0\0\0\3a\0c\0\0", "The export name contains a NUL byte");
        put32(&d, 4097);
        put_fill(&d, 'x', 4097);
        put16(&d, 0);
        talk_refused(opts[i], (const char *)d.data, d.len, "The export name is longer than 4096 bytes");
        bytes_done(&d);
    }
}

/* -- reply forms --------------------------------------------------------------------------------------------------- */

static void structured_replies_may_be_asked_for_twice_but_not_after_extended_headers(void **state)
{
    struct talk t = talk_begin();

    for (unsigned i = 0; i < 2; i++) {
        say_option(&t.in, NBD_OPT_STRUCTURED_REPLY, NULL);
        want_reply(&t.want, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    }
    for (unsigned i = 0; i < 2; i++) {
        say_option(&t.in, NBD_OPT_EXTENDED_HEADERS, NULL);
        want_reply(&t.want, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, NULL);
        say_option(&t.in, NBD_OPT_STRUCTURED_REPLY, NULL);
        want_reply_text(&t.want, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_EXT_HEADER_REQD,
                        "Extended headers are negotiated already and take precedence");
    }
    say_info(&t.in, NBD_OPT_GO, "", 0, NULL);
    want_info_export(&t.want, NBD_OPT_GO, TALK_SIZE, TALK_STRUCTURED);
    want_reply(&t.want, NBD_OPT_GO, NBD_REP_ACK, NULL);
    t.after = talk_is_in_transmission;
    talk_hold(&t);
}

static void extended_headers_imply_structured_replies(void **state)
{
    struct talk t = talk_begin();

    say_option(&t.in, NBD_OPT_EXTENDED_HEADERS, NULL);
    want_reply(&t.want, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, NULL);
    say_meta(&t.in, NBD_OPT_SET_META_CONTEXT, "", 1, (const char *const[]){"base:allocation"});
    want_context(&t.want, NBD_OPT_SET_META_CONTEXT, 1, "base:allocation");
    want_reply(&t.want, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
    talk_hold(&t);
}

/* -- waiting, leaving, failing ------------------------------------------------------------------------------------- */

static void while_an_ask_waits_a_bounded_amount_is_taken_and_used_after_the_answer(void **state)
{
    struct peer p = {.export = {.size = TALK_SIZE}};
    struct talk t = talk_begin();
    size_t asks_at, len;

    say_option(&t.in, NBD_OPT_LIST, NULL);
    asks_at = t.in.len;
    for (unsigned i = 0; i < 100; i++)
        say_option(&t.in, NBD_OPT_STRUCTURED_REPLY, NULL);
    peer_start(&p);
    len = nbd_feed(p.nbd, t.in.data, t.in.len);
    assert_int_equal(len, asks_at + NBD_STASH_MAX);
    assert_int_equal(nbd_feed(p.nbd, t.in.data + len, t.in.len - len), 0);
    peer_expect(&p, &t.want); /* nothing but the greeting */
    peer_answer(&p);
    assert_int_equal(nbd_feed(p.nbd, t.in.data + len, t.in.len - len), t.in.len - len);
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_ACK, NULL);
    for (unsigned i = 0; i < 100; i++)
        want_reply(&t.want, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    peer_expect(&p, &t.want);
    bytes_done(&t.in);
    peer_done(&p);
}

/* The answers that may still come from an owner who does not know yet that the client has gone. */
static void answers_are_ignored(struct peer *p)
{
    const struct failure f = {-EIO, "too late"};

    nbd_answer_list(p->nbd, NULL, 0);
    nbd_answer_contexts(p->nbd, talk_contexts, 1);
    nbd_answer_export(p->nbd, &p->export);
    nbd_answer_error(p->nbd, &f);
    nbd_feed_eof(p->nbd);
    nbd_fail(p->nbd, &f);
    nbd_tls_ready(p->nbd);
    assert_int_equal(nbd_feed(p->nbd, "more", 4), 4);
    assert_int_equal(p->nhangups, 1);
    assert_int_equal(p->out.len, 0);
}

/* How far a client has come when it leaves, or when we give up: bytes of a handshake that opens an export in the end.
 */
static void end_at(size_t len, bool eof)
{
    const struct failure f = {-ESHUTDOWN, "The server goes down"};
    struct peer p = {.export = {.size = TALK_SIZE}};
    struct talk t = talk_begin();

    say_option(&t.in, NBD_OPT_STRUCTURED_REPLY, NULL);
    say_option_text(&t.in, 99, "skipped");
    say_info(&t.in, NBD_OPT_GO, "vm/vda", 0, NULL);
    assert_true(len <= t.in.len);
    peer_start(&p);
    assert_int_equal(nbd_feed(p.nbd, t.in.data, len), len);
    assert_int_equal(p.asked, len == t.in.len);
    assert_int_equal(p.nhangups, 0);
    if (eof)
        nbd_feed_eof(p.nbd);
    else
        nbd_fail(p.nbd, &f);
    assert_int_equal(p.nhangups, 1);
    assert_int_equal(p.end, eof ? NBD_END_EOF : NBD_END_LOST);
    assert_string_equal(p.why.text,
                        eof ? "The client closed the connection without saying so" : "The server goes down");
    bytes_done(&p.out);
    answers_are_ignored(&p);
    bytes_done(&t.in);
    bytes_done(&t.want);
    peer_done(&p);
}

static void a_client_may_leave_and_the_server_may_fail_at_every_byte(void **state)
{
    for (size_t len = 0; len <= 4 + 16 + 23 + 28; len++) {
        end_at(len, true);
        end_at(len, false);
    }
}

static void failing_before_the_start_hangs_up(void **state)
{
    static const struct failure f = {-ESHUTDOWN, "The server goes down"};
    struct peer p = {0};

    peer_start(&p);
    bytes_done(&p.out);
    nbd_fail(p.nbd, &f);
    assert_int_equal(p.nhangups, 1);
    assert_int_equal(p.end, NBD_END_LOST);
    peer_done(&p);
    nbd_free(NULL);
}

static void requests_sent_too_early_are_served_after_the_answer(void **state)
{
    struct talk t = talk_begin();

    say_info(&t.in, NBD_OPT_GO, "", 0, NULL);
    want_info_export(&t.want, NBD_OPT_GO, TALK_SIZE, TALK_SIMPLE);
    want_reply(&t.want, NBD_OPT_GO, NBD_REP_ACK, NULL);
    say_request(&t.in, 0, NBD_CMD_TRIM, 77, 0, 512);
    want_simple(&t.want, NBD_EPERM, 77);
    say_request(&t.in, 0, NBD_CMD_DISC, 78, 0, 0);
    talk_ends(&t, NBD_END_DISC, NULL);
    talk_hold(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(unknown_client_flags_end_the_connection),
        cmocka_unit_test(only_export_name_goes_without_fixed_newstyle),
        cmocka_unit_test(something_that_is_no_option_ends_the_connection),
        cmocka_unit_test(export_name_is_answered_with_zeroes_unless_the_client_wants_none),
        cmocka_unit_test(export_name_of_an_unknown_export_hangs_up_with_the_owners_sentence),
        cmocka_unit_test(broken_export_names_hang_up),
        cmocka_unit_test(the_longest_name_is_taken),
        cmocka_unit_test(abort_is_acknowledged_and_ends_the_connection),
        cmocka_unit_test(list_names_every_export_with_its_description),
        cmocka_unit_test(list_may_be_empty_or_forbidden),
        cmocka_unit_test(data_where_none_belongs_is_refused_and_skipped),
        cmocka_unit_test(unknown_options_are_refused_and_skipped),
        cmocka_unit_test(too_much_data_is_skipped_or_hung_up_on),
        cmocka_unit_test(endless_haggling_ends_the_connection),
        cmocka_unit_test(info_tells_what_was_asked_for_and_goes_on),
        cmocka_unit_test(info_leaves_out_what_the_owner_does_not_tell),
        cmocka_unit_test(go_tells_the_same_and_begins_transmission),
        cmocka_unit_test(errors_reach_the_client_by_kind_and_in_words),
        cmocka_unit_test(inconsistent_lengths_in_info_and_go_are_refused),
        cmocka_unit_test(structured_replies_may_be_asked_for_twice_but_not_after_extended_headers),
        cmocka_unit_test(extended_headers_imply_structured_replies),
        cmocka_unit_test(while_an_ask_waits_a_bounded_amount_is_taken_and_used_after_the_answer),
        cmocka_unit_test(a_client_may_leave_and_the_server_may_fail_at_every_byte),
        cmocka_unit_test(failing_before_the_start_hangs_up),
        cmocka_unit_test(requests_sent_too_early_are_served_after_the_answer),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
