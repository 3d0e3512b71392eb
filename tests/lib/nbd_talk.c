/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/nbd_talk.h"
#include "lib/test.h"

const char *const talk_contexts[] = {"base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:monday",
                                     "qemu:dirty-bitmap:tuesday"};

struct talk talk_with_flags(uint32_t flags)
{
    struct talk t = {
        .peer = {.export = {.name = "vm/vda",
                            .description = "a disk",
                            .size = TALK_SIZE,
                            .min_block = 1,
                            .preferred_block = 65536,
                            .max_block = 33554432},
                 .contexts = talk_contexts,
                 .ncontexts = ARRAY_SIZE(talk_contexts)},
    };

    say_flags(&t.in, flags);
    want_greeting(&t.want);
    return t;
}

struct talk talk_begin(void)
{
    return talk_with_flags(TALK_FLAGS);
}

void talk_ends(struct talk *t, enum nbd_end end, const char *why)
{
    t->ends = true;
    t->end = end;
    t->why = why;
}

void talk_hold_once(struct talk *t, enum feeding how, bool at_once)
{
    struct peer p = t->peer;
    struct bytes want = {0};

    p.answer_at_once = at_once;
    put_raw(&want, t->want.data, t->want.len);
    peer_start(&p);
    peer_feed(&p, &t->in, how);
    peer_expect(&p, &want);
    assert_int_equal(p.nhangups, t->ends ? 1 : 0);
    if (t->ends) {
        assert_int_equal(p.end, t->end);
        assert_string_equal(p.why.text, t->why ? t->why : "");
        assert_int_equal(p.why.err != 0, t->why != NULL);
        assert_true(nbd_is_ending(p.nbd));
        assert_false(nbd_in_transmission(p.nbd));
    }
    if (t->after)
        t->after(&p);
    peer_done(&p);
}

void talk_hold(struct talk *t)
{
    for (enum feeding how = FEED_WHOLE; how <= FEED_RANDOM; how++) {
        talk_hold_once(t, how, true);
        talk_hold_once(t, how, false);
    }
    bytes_done(&t->in);
    bytes_done(&t->want);
}

void talk_is_in_transmission(struct peer *p)
{
    assert_true(nbd_in_transmission(p->nbd));
    assert_false(nbd_is_ending(p->nbd));
}

void talk_is_negotiating(struct peer *p)
{
    assert_false(nbd_in_transmission(p->nbd));
    assert_false(nbd_is_ending(p->nbd));
}

struct talk talk_structured(void)
{
    struct talk t = talk_begin();

    say_option(&t.in, NBD_OPT_STRUCTURED_REPLY, NULL);
    want_reply(&t.want, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    return t;
}

void talk_refused(uint32_t option, const char *data, size_t len, const char *sentence)
{
    struct bytes d = {0};
    struct talk t = talk_begin();

    say_option(&t.in, NBD_OPT_STRUCTURED_REPLY, NULL);
    want_reply(&t.want, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    put_raw(&d, data, len);
    say_option(&t.in, option, &d);
    want_reply_text(&t.want, option, NBD_REP_ERR_INVALID, sentence);
    say_option(&t.in, NBD_OPT_LIST, NULL);
    want_reply(&t.want, NBD_OPT_LIST, NBD_REP_ACK, NULL);
    talk_hold(&t);
    bytes_done(&d);
}
