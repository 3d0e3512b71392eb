/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Metadata contexts and STARTTLS in the handshake of server/nbd, byte by byte. */
#include "lib/nbd_talk.h"
#include "lib/test.h"
#include "nbd/limits.h"

#include <errno.h>
#include <stdio.h>

/* -- metadata contexts --------------------------------------------------------------------------------------------- */

static void asked_for_contexts_of_vdb(struct peer *p)
{
    assert_int_equal(p->ask, NBD_ASK_CONTEXTS);
    assert_string_equal(p->ask_name, "vm/vdb");
}

static void contexts_need_structured_replies(void **state)
{
    static const uint32_t opts[] = {NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT};
    struct talk t = talk_begin();

    for (size_t i = 0; i < ARRAY_SIZE(opts); i++) {
        say_meta(&t.in, opts[i], "vm/vda", 0, NULL);
        want_reply_text(&t.want, opts[i], NBD_REP_ERR_INVALID,
                        "Metadata contexts need structured replies or extended headers first");
    }
    talk_hold(&t);
}

/* Which of the four contexts a list of queries brings; ids are 0 for LIST, 1 up for SET. */
static void queries_bring(uint32_t option, size_t nqueries, const char *const *queries, unsigned which)
{
    struct talk t = talk_structured();
    uint32_t id = option == NBD_OPT_SET_META_CONTEXT ? 1 : 0;

    say_meta(&t.in, option, "vm/vdb", nqueries, queries);
    for (size_t i = 0; i < ARRAY_SIZE(talk_contexts); i++) {
        if (which & (1u << i)) {
            want_context(&t.want, option, id, talk_contexts[i]);
            id += option == NBD_OPT_SET_META_CONTEXT;
        }
    }
    want_reply(&t.want, option, NBD_REP_ACK, NULL);
    t.after = asked_for_contexts_of_vdb;
    talk_hold(&t);
}
static void listing_contexts_understands_wild_cards(void **state)
{
    const uint32_t list = NBD_OPT_LIST_META_CONTEXT;

    queries_bring(list, 0, NULL, 0xf);
    queries_bring(list, TALK_QUERIES("base:"), 0x1);
    queries_bring(list, TALK_QUERIES("qemu:"), 0xe);
    queries_bring(list, TALK_QUERIES("qemu:dirty-bitmap:"), 0xc);
    queries_bring(list, TALK_QUERIES("base:", "qemu:dirty-bitmap:monday", "base:allocation"), 0x5);
    queries_bring(list, TALK_QUERIES("qemu:allocation-depth"), 0x2);
    queries_bring(list, TALK_QUERIES("qemu:dirty-bitmap:mon", "x-other:", "base", "qemu", ":", ""), 0);
}

static void setting_contexts_takes_exact_names_only(void **state)
{
    const uint32_t set = NBD_OPT_SET_META_CONTEXT;

    queries_bring(set, 0, NULL, 0);
    queries_bring(set, TALK_QUERIES("base:", "qemu:", "qemu:dirty-bitmap:", "x-other:foo", "nothing"), 0);
    queries_bring(set, TALK_QUERIES("base:allocation"), 0x1);
    queries_bring(set, TALK_QUERIES("qemu:dirty-bitmap:tuesday", "base:allocation", "base:allocation"), 0x9);
    queries_bring(set,
                  TALK_QUERIES("qemu:dirty-bitmap:tuesday", "qemu:dirty-bitmap:monday", "qemu:allocation-depth",
                               "base:allocation"),
                  0xf);
}

static void contexts_of_an_unknown_export_are_an_error(void **state)
{
    static const uint32_t opts[] = {NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT};

    for (size_t i = 0; i < ARRAY_SIZE(opts); i++) {
        struct talk t = talk_structured();

        t.peer.refusal = (struct failure){-ENOENT, "No such disk"};
        say_meta(&t.in, opts[i], "vm/vdz", 0, NULL);
        want_reply_text(&t.want, opts[i], NBD_REP_ERR_UNKNOWN, "No such disk");
        talk_hold(&t);
    }
}

static void inconsistent_lengths_in_context_queries_are_refused(void **state)
{
    static const uint32_t opts[] = {NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT};
    static const char query[] = "A metadata query is longer than the option that holds it";

    for (size_t i = 0; i < ARRAY_SIZE(opts); i++) {
        struct bytes d = {0};

        TALK_REFUSED(opts[i], "\0\0", "The option is too short for an export name");
        TALK_REFUSED(opts[i], "\0\0\0\2a", "The export name is longer than the option that holds it");
        TALK_REFUSED(opts[i], "\0\0\0\2a\0\0\0\0\0", "The export name contains a NUL byte");
        TALK_REFUSED(opts[i], "\0\0\0\1a", "The option is too short for the number of queries");
        TALK_REFUSED(opts[i], "\0\0\0\1a\0\0\0", "The option is too short for the number of queries");
        TALK_REFUSED(opts[i], "\0\0\0\1a\0\0\0\1", query);
        TALK_REFUSED(opts[i], "\0\0\0\1a\0\0\0\1\0\0\0\5base", query);
        TALK_REFUSED(opts[i], "\0\0\0\1a\0\0\0\2\0\0\0\5base:", query);
        TALK_REFUSED(opts[i],
                     "\0\0\0\1a\0\0\0\1\xff\xff\xff\xff"
                     "base:",
                     query);
        TALK_REFUSED(opts[i], "\0\0\0\1a\0\0\0\1\0\0\0\5base:!", "The option is longer than its metadata queries");
        put32(&d, 0);
        put32(&d, 1);
        put32(&d, 4097);
        put_fill(&d, 'x', 4097);
        talk_refused(opts[i], (const char *)d.data, d.len, "A metadata query is longer than 4096 bytes");
        bytes_done(&d);
    }
}

static void too_many_queries_or_contexts_are_refused(void **state)
{
    const char *queries[NBD_QUERIES_MAX + 1], *names[NBD_CONTEXTS_MAX + 1];
    char text[NBD_QUERIES_MAX + 1][32];
    struct talk t = talk_structured();

    for (unsigned i = 0; i <= NBD_QUERIES_MAX; i++) {
        snprintf(text[i], sizeof(text[i]), "qemu:dirty-bitmap:%u", i);
        queries[i] = text[i];
        if (i <= NBD_CONTEXTS_MAX)
            names[i] = text[i];
    }
    t.peer.contexts = names;
    t.peer.ncontexts = NBD_CONTEXTS_MAX + 1;
    say_meta(&t.in, NBD_OPT_SET_META_CONTEXT, "", NBD_QUERIES_MAX + 1, queries);
    want_reply_text(&t.want, NBD_OPT_SET_META_CONTEXT, NBD_REP_ERR_TOO_BIG, "Too many metadata queries in one option");
    say_meta(&t.in, NBD_OPT_SET_META_CONTEXT, "", NBD_CONTEXTS_MAX + 1, queries);
    want_reply_text(&t.want, NBD_OPT_SET_META_CONTEXT, NBD_REP_ERR_TOO_BIG,
                    "Too many metadata contexts for one connection");
    say_meta(&t.in, NBD_OPT_SET_META_CONTEXT, "", NBD_CONTEXTS_MAX, queries);
    for (uint32_t i = 0; i < NBD_CONTEXTS_MAX; i++)
        want_context(&t.want, NBD_OPT_SET_META_CONTEXT, i + 1, names[i]);
    want_reply(&t.want, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
    talk_hold(&t);
}

static void say_go(struct talk *t, const char *name)
{
    say_info(&t->in, NBD_OPT_GO, name, 0, NULL);
    want_info_export(&t->want, NBD_OPT_GO, TALK_SIZE, TALK_STRUCTURED);
    want_reply(&t->want, NBD_OPT_GO, NBD_REP_ACK, NULL);
}

static void set_monday_and_base(struct talk *t, const char *name)
{
    say_meta(&t->in, NBD_OPT_SET_META_CONTEXT, name, TALK_QUERIES("qemu:dirty-bitmap:monday", "base:allocation"));
    want_context(&t->want, NBD_OPT_SET_META_CONTEXT, 1, "base:allocation");
    want_context(&t->want, NBD_OPT_SET_META_CONTEXT, 2, "qemu:dirty-bitmap:monday");
    want_reply(&t->want, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
}

static void opened_with_monday_and_base(struct peer *p)
{
    assert_int_equal(p->ask_ncontexts, 2);
    assert_string_equal(p->ask_contexts[0], "base:allocation");
    assert_string_equal(p->ask_contexts[1], "qemu:dirty-bitmap:monday");
    talk_is_in_transmission(p);
}

static void opened_without_contexts(struct peer *p)
{
    assert_int_equal(p->ask_ncontexts, 0);
    talk_is_in_transmission(p);
}

static void the_selected_contexts_go_with_the_export_they_were_selected_for(void **state)
{
    static const char none[] = "No metadata context was negotiated for this export";
    struct talk t = talk_structured();

    set_monday_and_base(&t, "vm/vda");
    say_meta(&t.in, NBD_OPT_LIST_META_CONTEXT, "vm/vdb", TALK_QUERIES("base:")); /* changes nothing */
    want_context(&t.want, NBD_OPT_LIST_META_CONTEXT, 0, "base:allocation");
    want_reply(&t.want, NBD_OPT_LIST_META_CONTEXT, NBD_REP_ACK, NULL);
    say_go(&t, "vm/vda");
    t.after = opened_with_monday_and_base;
    talk_hold(&t);

    t = talk_structured();
    set_monday_and_base(&t, "vm/vda");
    say_go(&t, "vm/vdb");
    say_request(&t.in, 0, NBD_CMD_BLOCK_STATUS, 7, 0, 512);
    want_chunk(&t.want, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, 7, (uint32_t)(6 + strlen(none)));
    put32(&t.want, NBD_EINVAL);
    put16(&t.want, (uint16_t)strlen(none));
    put_text(&t.want, none);
    t.after = opened_without_contexts;
    talk_hold(&t);
}

static void selecting_again_replaces_even_when_it_fails(void **state)
{
    struct bytes broken = {0};
    struct talk t = talk_structured();

    set_monday_and_base(&t, "vm/vda");
    say_meta(&t.in, NBD_OPT_SET_META_CONTEXT, "vm/vda", 0, NULL);
    want_reply(&t.want, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
    say_go(&t, "vm/vda");
    t.after = opened_without_contexts;
    talk_hold(&t);

    t = talk_structured();
    set_monday_and_base(&t, "vm/vda");
    put_text(&broken, "!");
    say_option(&t.in, NBD_OPT_SET_META_CONTEXT, &broken);
    want_reply_text(&t.want, NBD_OPT_SET_META_CONTEXT, NBD_REP_ERR_INVALID,
                    "The option is too short for an export name");
    say_go(&t, "vm/vda");
    t.after = opened_without_contexts;
    talk_hold(&t);
    bytes_done(&broken);

    t = talk_structured();
    say_meta(&t.in, NBD_OPT_SET_META_CONTEXT, "vm/vda", TALK_QUERIES("qemu:allocation-depth"));
    want_context(&t.want, NBD_OPT_SET_META_CONTEXT, 1, "qemu:allocation-depth");
    want_reply(&t.want, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
    set_monday_and_base(&t, "vm/vdb");
    say_go(&t, "vm/vdb");
    t.after = opened_with_monday_and_base;
    talk_hold(&t);
}

/* -- STARTTLS ------------------------------------------------------------------------------------------------------ */

static void starttls_is_refused_where_it_is_not_offered(void **state)
{
    struct talk t = talk_begin();

    say_option(&t.in, NBD_OPT_STARTTLS, NULL);
    want_reply_text(&t.want, NBD_OPT_STARTTLS, NBD_REP_ERR_UNSUP, "This server does not offer TLS here");
    talk_hold(&t);
}

static void everything_else_waits_for_tls_where_it_is_required(void **state)
{
    static const uint32_t opts[] = {NBD_OPT_LIST,
                                    NBD_OPT_INFO,
                                    NBD_OPT_GO,
                                    NBD_OPT_STRUCTURED_REPLY,
                                    NBD_OPT_SET_META_CONTEXT,
                                    NBD_OPT_LIST_META_CONTEXT,
                                    NBD_OPT_EXTENDED_HEADERS,
                                    99};
    struct talk t = talk_begin();

    t.peer.tls = NBD_TLS_REQUIRED;
    for (size_t i = 0; i < ARRAY_SIZE(opts); i++) {
        say_option_text(&t.in, opts[i], i % 2 ? "whatever" : "");
        want_reply_text(&t.want, opts[i], NBD_REP_ERR_TLS_REQD, "This server requires TLS (NBD_OPT_STARTTLS) first");
    }
    say_option(&t.in, NBD_OPT_ABORT, NULL);
    want_reply(&t.want, NBD_OPT_ABORT, NBD_REP_ACK, NULL);
    talk_ends(&t, NBD_END_ABORT, NULL);
    talk_hold(&t);

    t = talk_begin();
    t.peer.tls = NBD_TLS_REQUIRED;
    say_option_text(&t.in, NBD_OPT_EXPORT_NAME, "vm/vda");
    talk_ends(&t, NBD_END_PROTOCOL, "The client opens an export without TLS, which is required here");
    talk_hold(&t);
}

static void after_starttls_nothing_said_in_the_clear_counts(void **state)
{
    struct peer p = {.answer_at_once = true,
                     .tls = NBD_TLS_ON,
                     .export = {.size = TALK_SIZE},
                     .contexts = talk_contexts,
                     .ncontexts = 4};
    struct talk t = talk_structured();

    set_monday_and_base(&t, "vm/vda");
    say_option(&t.in, NBD_OPT_STARTTLS, NULL);
    want_reply(&t.want, NBD_OPT_STARTTLS, NBD_REP_ACK, NULL);
    peer_start(&p);
    peer_feed(&p, &t.in, FEED_WHOLE);
    peer_expect(&p, &t.want);
    assert_int_equal(p.nstarttls, 1);

    /* What follows is TLS's: not a byte is taken. */
    assert_int_equal(nbd_feed(p.nbd, "IHAVEOPT\0\0\0\2\0\0\0\0", 16), 0);
    nbd_tls_ready(p.nbd);
    bytes_done(&t.in);
    say_option(&t.in, NBD_OPT_STARTTLS, NULL);
    want_reply_text(&t.want, NBD_OPT_STARTTLS, NBD_REP_ERR_INVALID, "TLS is up already");
    say_info(&t.in, NBD_OPT_GO, "vm/vda", 0, NULL);
    want_info_export(&t.want, NBD_OPT_GO, TALK_SIZE, TALK_SIMPLE);
    want_reply(&t.want, NBD_OPT_GO, NBD_REP_ACK, NULL);
    peer_feed(&p, &t.in, FEED_BYTEWISE);
    peer_expect(&p, &t.want);
    opened_without_contexts(&p);
    bytes_done(&t.in);
    peer_done(&p);
}

static void bytes_behind_starttls_are_not_taken(void **state)
{
    struct peer p = {.answer_at_once = true, .tls = NBD_TLS_REQUIRED};
    struct talk t = talk_begin();
    size_t len;

    say_option(&t.in, NBD_OPT_STARTTLS, NULL);
    len = t.in.len;
    say_option(&t.in, NBD_OPT_LIST, NULL);
    peer_start(&p);
    assert_int_equal(nbd_feed(p.nbd, t.in.data, t.in.len), len);
    want_reply(&t.want, NBD_OPT_STARTTLS, NBD_REP_ACK, NULL);
    peer_expect(&p, &t.want);
    bytes_done(&t.in);
    peer_done(&p);
}

static void starttls_sent_before_the_last_answer_ends_the_connection(void **state)
{
    struct peer p = {.tls = NBD_TLS_ON};
    struct talk t = talk_begin();

    say_option(&t.in, NBD_OPT_LIST, NULL);
    say_option(&t.in, NBD_OPT_STARTTLS, NULL);
    peer_start(&p);
    assert_int_equal(nbd_feed(p.nbd, t.in.data, t.in.len), t.in.len);
    peer_answer(&p);
    assert_int_equal(p.nhangups, 1);
    assert_int_equal(p.end, NBD_END_PROTOCOL);
    assert_int_equal(p.nstarttls, 0);
    bytes_done(&t.in);
    bytes_done(&t.want);
    peer_done(&p);
}

static void a_long_talk_sounds_the_same_however_its_bytes_are_cut(void **state)
{
    static const uint16_t infos[] = {NBD_INFO_BLOCK_SIZE, NBD_INFO_NAME};

    for (unsigned round = 0; round < 200; round++) {
        struct talk t = talk_structured();

        say_option_text(&t.in, 4242, "some data that nobody wants");
        want_reply_text(&t.want, 4242, NBD_REP_ERR_UNSUP, "This server does not know that option");
        say_meta(&t.in, NBD_OPT_LIST_META_CONTEXT, "vm/vda", TALK_QUERIES("qemu:dirty-bitmap:"));
        want_context(&t.want, NBD_OPT_LIST_META_CONTEXT, 0, "qemu:dirty-bitmap:monday");
        want_context(&t.want, NBD_OPT_LIST_META_CONTEXT, 0, "qemu:dirty-bitmap:tuesday");
        want_reply(&t.want, NBD_OPT_LIST_META_CONTEXT, NBD_REP_ACK, NULL);
        set_monday_and_base(&t, "vm/vda");
        say_info(&t.in, NBD_OPT_INFO, "vm/vda", ARRAY_SIZE(infos), infos);
        want_info_export(&t.want, NBD_OPT_INFO, TALK_SIZE, TALK_STRUCTURED);
        want_info_text(&t.want, NBD_OPT_INFO, NBD_INFO_NAME, "vm/vda");
        want_block_sizes(&t.want, NBD_OPT_INFO, 1, 65536, 33554432);
        want_reply(&t.want, NBD_OPT_INFO, NBD_REP_ACK, NULL);
        say_go(&t, "vm/vda");
        t.after = opened_with_monday_and_base;
        talk_hold_once(&t, FEED_RANDOM, round % 2);
        bytes_done(&t.in);
        bytes_done(&t.want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(contexts_need_structured_replies),
        cmocka_unit_test(listing_contexts_understands_wild_cards),
        cmocka_unit_test(setting_contexts_takes_exact_names_only),
        cmocka_unit_test(contexts_of_an_unknown_export_are_an_error),
        cmocka_unit_test(inconsistent_lengths_in_context_queries_are_refused),
        cmocka_unit_test(too_many_queries_or_contexts_are_refused),
        cmocka_unit_test(the_selected_contexts_go_with_the_export_they_were_selected_for),
        cmocka_unit_test(selecting_again_replaces_even_when_it_fails),
        cmocka_unit_test(starttls_is_refused_where_it_is_not_offered),
        cmocka_unit_test(everything_else_waits_for_tls_where_it_is_required),
        cmocka_unit_test(after_starttls_nothing_said_in_the_clear_counts),
        cmocka_unit_test(bytes_behind_starttls_are_not_taken),
        cmocka_unit_test(starttls_sent_before_the_last_answer_ends_the_connection),
        cmocka_unit_test(a_long_talk_sounds_the_same_however_its_bytes_are_cut),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
