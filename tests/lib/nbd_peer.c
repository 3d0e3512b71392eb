/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/nbd_peer.h"
#include "lib/test.h"

#include <stdio.h>
#include <time.h>

/* -- bytes --------------------------------------------------------------------------------------------------------- */

void bytes_done(struct bytes *b)
{
    free(b->data);
    *b = (struct bytes){0};
}

void put_raw(struct bytes *b, const void *data, size_t len)
{
    if (b->len + len > b->room) {
        b->room = 2 * (b->len + len);
        b->data = realloc(b->data, b->room);
        assert_non_null(b->data);
    }
    if (len > 0)
        memcpy(b->data + b->len, data, len);
    b->len += len;
}

void put8(struct bytes *b, uint8_t v)
{
    put_raw(b, &v, 1);
}

void put16(struct bytes *b, uint16_t v)
{
    put8(b, v >> 8);
    put8(b, v & 0xff);
}

void put32(struct bytes *b, uint32_t v)
{
    put16(b, v >> 16);
    put16(b, v & 0xffff);
}

void put64(struct bytes *b, uint64_t v)
{
    put32(b, v >> 32);
    put32(b, v & 0xffffffff);
}

void put_text(struct bytes *b, const char *text)
{
    put_raw(b, text, strlen(text));
}

void put_fill(struct bytes *b, uint8_t v, size_t len)
{
    while (len-- > 0)
        put8(b, v);
}

void say_flags(struct bytes *b, uint32_t flags)
{
    put32(b, flags);
}

void say_option(struct bytes *b, uint32_t option, const struct bytes *data)
{
    put_text(b, "IHAVEOPT");
    put32(b, option);
    put32(b, data ? (uint32_t)data->len : 0);
    if (data)
        put_raw(b, data->data, data->len);
}

void say_option_text(struct bytes *b, uint32_t option, const char *data)
{
    struct bytes d = {0};

    put_text(&d, data);
    say_option(b, option, &d);
    bytes_done(&d);
}

void say_info(struct bytes *b, uint32_t option, const char *name, size_t ninfos, const uint16_t *infos)
{
    struct bytes d = {0};

    put32(&d, (uint32_t)strlen(name));
    put_text(&d, name);
    put16(&d, (uint16_t)ninfos);
    for (size_t i = 0; i < ninfos; i++)
        put16(&d, infos[i]);
    say_option(b, option, &d);
    bytes_done(&d);
}

void say_meta(struct bytes *b, uint32_t option, const char *name, size_t nqueries, const char *const *queries)
{
    struct bytes d = {0};

    put32(&d, (uint32_t)strlen(name));
    put_text(&d, name);
    put32(&d, (uint32_t)nqueries);
    for (size_t i = 0; i < nqueries; i++) {
        put32(&d, (uint32_t)strlen(queries[i]));
        put_text(&d, queries[i]);
    }
    say_option(b, option, &d);
    bytes_done(&d);
}

void say_request(struct bytes *b, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint32_t length)
{
    put32(b, 0x25609513);
    put16(b, flags);
    put16(b, type);
    put64(b, cookie);
    put64(b, offset);
    put32(b, length);
}

void say_request_ext(struct bytes *b, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint64_t length)
{
    put32(b, 0x21e41c71);
    put16(b, flags);
    put16(b, type);
    put64(b, cookie);
    put64(b, offset);
    put64(b, length);
}

void want_greeting(struct bytes *b)
{
    put_text(b, "NBDMAGICIHAVEOPT");
    put16(b, 3);
}

void want_reply(struct bytes *b, uint32_t option, uint32_t type, const struct bytes *data)
{
    put64(b, 0x0003e889045565a9);
    put32(b, option);
    put32(b, type);
    put32(b, data ? (uint32_t)data->len : 0);
    if (data)
        put_raw(b, data->data, data->len);
}

void want_reply_text(struct bytes *b, uint32_t option, uint32_t type, const char *text)
{
    struct bytes d = {0};

    put_text(&d, text);
    want_reply(b, option, type, &d);
    bytes_done(&d);
}

void want_info_export(struct bytes *b, uint32_t option, uint64_t size, uint16_t flags)
{
    struct bytes d = {0};

    put16(&d, 0);
    put64(&d, size);
    put16(&d, flags);
    want_reply(b, option, 3, &d);
    bytes_done(&d);
}

void want_block_sizes(struct bytes *want, uint32_t option, uint32_t min, uint32_t preferred, uint32_t max)
{
    struct bytes d = {0};

    put16(&d, 3);
    put32(&d, min);
    put32(&d, preferred);
    put32(&d, max);
    want_reply(want, option, 3, &d);
    bytes_done(&d);
}

void want_info_text(struct bytes *want, uint32_t option, uint16_t info, const char *text)
{
    struct bytes d = {0};

    put16(&d, info);
    put_text(&d, text);
    want_reply(want, option, 3, &d);
    bytes_done(&d);
}

void want_context(struct bytes *b, uint32_t option, uint32_t id, const char *name)
{
    struct bytes d = {0};

    put32(&d, id);
    put_text(&d, name);
    want_reply(b, option, 4, &d);
    bytes_done(&d);
}

void want_simple(struct bytes *b, uint32_t error, uint64_t cookie)
{
    put32(b, 0x67446698);
    put32(b, error);
    put64(b, cookie);
}

void want_chunk(struct bytes *b, uint16_t flags, uint16_t type, uint64_t cookie, uint32_t length)
{
    put32(b, 0x668e33ef);
    put16(b, flags);
    put16(b, type);
    put64(b, cookie);
    put32(b, length);
}

void want_chunk_ext(struct bytes *b, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint64_t length)
{
    put32(b, 0x6e8a278c);
    put16(b, flags);
    put16(b, type);
    put64(b, cookie);
    put64(b, offset);
    put64(b, length);
}

/* -- the owner ----------------------------------------------------------------------------------------------------- */

static void on_ask(void *arg, const struct nbd_ask *ask)
{
    struct peer *p = arg;

    assert_false(p->asked);
    p->asked = true;
    p->ask = ask->type;
    p->nasks++;
    p->ask_has_name = ask->export_name;
    snprintf(p->ask_name, sizeof(p->ask_name), "%s", ask->export_name ? ask->export_name : "");
    p->ask_ncontexts = ask->ncontexts;
    for (size_t i = 0; i < ask->ncontexts; i++)
        snprintf(p->ask_contexts[i], sizeof(p->ask_contexts[i]), "%s", ask->contexts[i]);
    if (p->answer_at_once)
        peer_answer(p);
}

static void on_request(void *arg, struct nbd_request *r)
{
    struct peer *p = arg;

    assert_null(r->owner);
    if (p->answer_at_once && p->serve) {
        p->serve(p, r);
        return;
    }
    assert_true(p->nheld < PEER_HELD_MAX);
    p->held[p->nheld++] = r;
}

static void on_send(void *arg, const void *head, size_t len, struct nbd_payload *payload)
{
    struct peer *p = arg;

    assert_int_equal(p->nhangups, 0);
    put_raw(&p->out, head, len);
    if (payload) {
        put_raw(&p->out, payload->data, payload->len);
        payload->release(payload);
    }
}

static void on_hangup(void *arg, enum nbd_end end, const struct failure *why)
{
    struct peer *p = arg;

    assert_int_equal(nbd_inflight(p->nbd), 0);
    p->nhangups++;
    p->end = end;
    p->why = *why;
}

static void on_starttls(void *arg)
{
    struct peer *p = arg;

    p->nstarttls++;
}

static const struct nbd_ops peer_ops = {
    .ask = on_ask,
    .request = on_request,
    .send = on_send,
    .hangup = on_hangup,
    .starttls = on_starttls,
};

void peer_start(struct peer *p)
{
    assert_int_equal(nbd_new(&peer_ops, p, &p->nbd), 0);
    nbd_offer_tls(p->nbd, p->tls);
    nbd_start(p->nbd);
}

void peer_done(struct peer *p)
{
    nbd_free(TAKE_PTR(p->nbd));
    bytes_done(&p->out);
    assert_int_equal(p->npayloads, 0);
}

void peer_answer(struct peer *p)
{
    assert_true(p->asked);
    p->asked = false;
    if (p->refusal.err) {
        nbd_answer_error(p->nbd, &p->refusal);
        return;
    }
    switch (p->ask) {
    case NBD_ASK_LIST:
        nbd_answer_list(p->nbd, p->entries, p->nentries);
        break;
    case NBD_ASK_CONTEXTS:
        nbd_answer_contexts(p->nbd, p->contexts, p->ncontexts);
        break;
    case NBD_ASK_EXPORT:
    case NBD_ASK_OPEN:
        nbd_answer_export(p->nbd, &p->export);
        break;
    }
}

struct nbd_request *peer_take(struct peer *p, size_t i)
{
    struct nbd_request *r;

    assert_true(i < p->nheld);
    r = p->held[i];
    p->nheld--;
    for (; i < p->nheld; i++)
        p->held[i] = p->held[i + 1];
    return r;
}

struct counted_payload {
    struct nbd_payload payload;
    struct peer *peer;
    uint8_t data[];
};

static void release_payload(struct nbd_payload *payload)
{
    struct counted_payload *c = container_of(payload, struct counted_payload, payload);

    c->peer->npayloads--;
    free(c);
}

struct nbd_payload *peer_payload(struct peer *p, const void *data, size_t len)
{
    struct counted_payload *c = malloc(sizeof(*c) + len);

    assert_non_null(c);
    memcpy(c->data, data, len);
    c->peer = p;
    c->payload = (struct nbd_payload){.data = c->data, .len = len, .release = release_payload};
    p->npayloads++;
    return &c->payload;
}

unsigned peer_random(void)
{
    static unsigned seed;
    static bool seeded;

    if (!seeded) {
        const char *given = getenv("QPULL_TEST_SEED");

        seed = given ? (unsigned)strtoul(given, NULL, 0) : (unsigned)time(NULL);
        seeded = true;
        printf("random splits: QPULL_TEST_SEED=%u repeats this run\n", seed);
    }
    return (unsigned)rand_r(&seed);
}

/* Gives the machine one thing that it may be waiting for; false: it waits for nothing. */
static bool give_something(struct peer *p)
{
    if (p->asked) {
        peer_answer(p);
        return true;
    }
    if (p->nheld > 0 && p->serve) {
        p->serve(p, peer_take(p, 0));
        return true;
    }
    return false;
}

void peer_feed(struct peer *p, const struct bytes *b, enum feeding how)
{
    size_t pos = 0;

    while (pos < b->len) {
        bool more = nbd_has_more(p->nbd), transmitting = nbd_in_transmission(p->nbd);
        size_t len = b->len - pos, taken;
        uint8_t *copy;

        if (how == FEED_BYTEWISE)
            len = 1;
        else if (how == FEED_RANDOM && len > 1)
            len = 1 + peer_random() % MIN(len, 100);
        copy = malloc(len); /* of its own, so that reading beyond it is seen */
        assert_non_null(copy);
        memcpy(copy, b->data + pos, len);
        taken = nbd_feed(p->nbd, copy, len);
        free(copy);
        assert_true(taken <= len);
        pos += taken;
        if (taken < len && !more && transmitting == nbd_in_transmission(p->nbd) && !give_something(p))
            fail_msg("the machine takes no more, but waits for nothing");
        else if (how == FEED_RANDOM && peer_random() % 4 == 0)
            give_something(p);
    }
    while (give_something(p) || nbd_has_more(p->nbd))
        (void)nbd_feed(p->nbd, "", 0);
}

static void print_line(const char *label, const struct bytes *b, size_t from)
{
    printf("%s:", label);
    for (size_t i = from; i < MIN(b->len, from + 48); i++)
        printf(" %02x", b->data[i]);
    printf("\n");
}

void peer_expect(struct peer *p, struct bytes *want)
{
    size_t same = 0;

    while (same < MIN(want->len, p->out.len) && want->data[same] == p->out.data[same])
        same++;
    if (same < want->len || same < p->out.len) {
        printf("%zu bytes are as wanted, of %zu wanted and %zu sent\n", same, want->len, p->out.len);
        print_line("wanted", want, same);
        print_line("sent  ", &p->out, same);
        fail_msg("the server sent something else");
    }
    bytes_done(want);
    bytes_done(&p->out);
}
