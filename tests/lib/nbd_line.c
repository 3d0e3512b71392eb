/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/nbd_line.h"
#include "lib/test.h"

static const char *const contexts[] = {"base:allocation", "qemu:dirty-bitmap:monday"};

/* The handshake, its bytes not looked at; ncontexts of the above are selected. */
void line_open(struct line *l, enum form form, size_t ncontexts)
{
    struct bytes in = {0};

    if (l->peer.export.size == 0)
        l->peer.export.size = LINE_SIZE;
    if (l->peer.export.max_block == 0)
        l->peer.export.max_block = LINE_MAX_BLOCK;
    l->peer.contexts = contexts;
    l->peer.ncontexts = ARRAY_SIZE(contexts);
    l->form = form;
    say_flags(&in, NBD_FLAG_C_FIXED_NEWSTYLE);
    if (form == STRUCTURED)
        say_option(&in, NBD_OPT_STRUCTURED_REPLY, NULL);
    if (form == EXTENDED)
        say_option(&in, NBD_OPT_EXTENDED_HEADERS, NULL);
    if (ncontexts > 0)
        say_meta(&in, NBD_OPT_SET_META_CONTEXT, "", ncontexts, contexts);
    say_info(&in, NBD_OPT_GO, "", 0, NULL);
    peer_start(&l->peer);
    peer_feed(&l->peer, &in, FEED_WHOLE);
    assert_true(nbd_in_transmission(l->peer.nbd));
    bytes_done(&in);
    bytes_done(&l->peer.out);
}

void line_close(struct line *l)
{
    bytes_done(&l->in);
    bytes_done(&l->want);
    peer_done(&l->peer);
}

void line_say(struct line *l, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint64_t length)
{
    if (l->form == EXTENDED)
        say_request_ext(&l->in, flags, type, cookie, offset, length);
    else
        say_request(&l->in, flags, type, cookie, offset, (uint32_t)length);
}

void line_feed(struct line *l, enum feeding how)
{
    peer_feed(&l->peer, &l->in, how);
    bytes_done(&l->in);
}

/* Chunk header in the form of the line; offset is the request's. */
void line_want_head(struct line *l, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint32_t length)
{
    if (l->form == EXTENDED)
        want_chunk_ext(&l->want, flags, type, cookie, offset, length);
    else
        want_chunk(&l->want, flags, type, cookie, length);
}

void line_want_error(struct line *l, uint64_t cookie, uint64_t offset, uint32_t error, const char *sentence)
{
    if (l->form == SIMPLE) {
        want_simple(&l->want, error, cookie);
        return;
    }
    line_want_head(l, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, cookie, offset, (uint32_t)(6 + strlen(sentence)));
    put32(&l->want, error);
    put16(&l->want, (uint16_t)strlen(sentence));
    put_text(&l->want, sentence);
}

void line_want_done(struct line *l, uint64_t cookie, uint64_t offset)
{
    if (l->form == SIMPLE)
        want_simple(&l->want, 0, cookie);
    else
        line_want_head(l, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, cookie, offset, 0);
}

void line_want_data(struct line *l, uint16_t flags, uint64_t cookie, uint64_t asked, uint64_t offset, const char *text)
{
    line_want_head(l, flags, NBD_REPLY_TYPE_OFFSET_DATA, cookie, asked, (uint32_t)(8 + strlen(text)));
    put64(&l->want, offset);
    put_text(&l->want, text);
}

void line_expect(struct line *l)
{
    peer_expect(&l->peer, &l->want);
}

void line_expect_alive(struct line *l)
{
    line_expect(l);
    assert_int_equal(l->peer.nhangups, 0);
    assert_false(nbd_is_ending(l->peer.nbd));
    assert_int_equal(nbd_inflight(l->peer.nbd), l->peer.nheld);
}

void line_expect_end(struct line *l, enum nbd_end end, const char *why)
{
    line_expect(l);
    assert_int_equal(l->peer.nhangups, 1);
    assert_int_equal(l->peer.end, end);
    assert_string_equal(l->peer.why.text, why ? why : "");
    assert_int_equal(l->peer.why.err != 0, why != NULL);
    assert_true(nbd_is_ending(l->peer.nbd));
    assert_false(nbd_in_transmission(l->peer.nbd));
    assert_int_equal(nbd_feed(l->peer.nbd, "ignored", 7), 7);
}

/* One request that reaches the owner. */
struct nbd_request *line_request(struct line *l, uint16_t flags, uint16_t type, uint64_t offset, uint64_t length)
{
    line_say(l, flags, type, LINE_COOKIE, offset, length);
    line_feed(l, FEED_RANDOM);
    assert_int_equal(l->peer.nheld, 1);
    assert_int_equal(l->peer.held[0]->offset, offset);
    assert_int_equal(l->peer.held[0]->length, length);
    return peer_take(&l->peer, 0);
}

void line_give(struct line *l, struct nbd_request *r, uint64_t offset, const char *text)
{
    nbd_reply_data(r, offset, peer_payload(&l->peer, text, strlen(text)));
}
