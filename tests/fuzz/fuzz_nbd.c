/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzzes server/nbd: a hostile client and a fickle owner. An input ends in a byte that says how many bytes before it
 * are decisions (how the client's bytes are cut, what the owner answers and when); the rest is what the client says.
 * Bits of the first decision choose TLS and a ready-made handshake, so that requests are reached without finding the
 * way to them.
 *
 * Besides what the machine asserts and the sanitizers see: hangup comes once and last, payloads are released, chunks
 * are well-formed, every request is finished by exactly one final chunk.
 */
#include "fuzz.h"

#include "nbd/codec.h"
#include "nbd/nbd.h"
#include "nbd/wire.h"

#include <errno.h>
#include <stdio.h>

#define EXPORT_SIZE (UINT64_C(1) << 33) /* more than 32 bits */
#define HELD_MAX 64
#define EXTENTS_MAX 8
/* A whole read is served up to here; a fuzzer that copies megabytes is slow and finds nothing by it. */
#define DATA_MAX 65536

/* First decision. */
enum { TLS_MASK = 3, FORM_SHIFT = 2, FORM_MASK = 3, CONTEXTS = 16, LATER = 32, ALIGNED = 64 };
enum form { FORM_NONE, FORM_SIMPLE, FORM_STRUCTURED, FORM_EXTENDED };

struct fuzz {
    struct nbd *nbd;
    const uint8_t *decisions;
    size_t ndecisions;
    bool later; /* asks and requests are answered outside of their callbacks */
    bool asked;
    enum nbd_ask_type ask;
    size_t ncontexts;
    struct nbd_request *held[HELD_MAX];
    size_t nheld;
    unsigned nhangups;
    int npayloads;
    bool tls_waits;
    /* the output, where it is chunks */
    enum form form;
    uint8_t head[NBD_EXTENDED_REPLY_SIZE];
    size_t head_len;
    uint64_t chunk_left;
    unsigned nfinal, nfinished;
};

static uint8_t decide(struct fuzz *f)
{
    if (f->ndecisions == 0)
        return 0;
    f->ndecisions--;
    return *f->decisions++;
}

/* -- output -------------------------------------------------------------------------------------------------------- */

static void check_chunk(struct fuzz *f)
{
    bool wide = f->form == FORM_EXTENDED;
    uint16_t flags = codec_get16(f->head + 4), type = codec_get16(f->head + 6);
    uint64_t length = wide ? codec_get64(f->head + 24) : codec_get32(f->head + 16);

    CHECK(codec_get32(f->head) == (wide ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC));
    CHECK((flags & ~NBD_REPLY_FLAG_DONE) == 0);
    switch (type) {
    case NBD_REPLY_TYPE_NONE:
        CHECK(length == 0 && flags & NBD_REPLY_FLAG_DONE);
        break;
    case NBD_REPLY_TYPE_OFFSET_DATA:
        CHECK(length > 8);
        break;
    case NBD_REPLY_TYPE_OFFSET_HOLE:
        CHECK(length == 12);
        break;
    case NBD_REPLY_TYPE_BLOCK_STATUS:
        CHECK(!wide && length >= 12 && (length - 4) % 8 == 0);
        break;
    case NBD_REPLY_TYPE_BLOCK_STATUS_EXT:
        CHECK(wide && length >= 24 && (length - 8) % 16 == 0);
        break;
    case NBD_REPLY_TYPE_ERROR:
        CHECK(length >= 6);
        break;
    case NBD_REPLY_TYPE_ERROR_OFFSET:
        CHECK(length >= 14);
        break;
    default:
        CHECK(false);
    }
    f->chunk_left = length;
    f->nfinal += flags & NBD_REPLY_FLAG_DONE;
}

static void take_output(struct fuzz *f, const uint8_t *p, size_t len)
{
    size_t want = f->form == FORM_EXTENDED ? NBD_EXTENDED_REPLY_SIZE : NBD_STRUCTURED_REPLY_SIZE;

    if (f->form < FORM_STRUCTURED || !nbd_in_transmission(f->nbd))
        return;
    while (len > 0) {
        size_t piece;

        if (f->chunk_left > 0) {
            piece = MIN(len, f->chunk_left);
            f->chunk_left -= piece;
        } else {
            piece = MIN(len, want - f->head_len);
            memcpy(f->head + f->head_len, p, piece);
            f->head_len += piece;
            if (f->head_len == want) {
                f->head_len = 0;
                check_chunk(f);
            }
        }
        p += piece;
        len -= piece;
    }
}

/* -- the owner ----------------------------------------------------------------------------------------------------- */

static void answer(struct fuzz *f)
{
    static const char *const contexts[] = {"base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:a"};
    static const struct nbd_list_entry entries[] = {{"vm/vda", "a disk"}, {"vm/vdb", NULL}};
    static const int errors[] = {-ENOENT, -EACCES, -ESHUTDOWN, -EINVAL, -EIO};
    uint8_t how = decide(f);
    struct nbd_export e = {.name = "vm/vda",
                           .description = how & 2 ? "words" : NULL,
                           .size = EXPORT_SIZE,
                           .min_block = how & 4 ? 512 : 1,
                           .max_block = how & 8 ? 0 : UINT32_MAX,
                           .multi_conn = how & 16,
                           .trim = how & 32};
    struct failure why = {errors[how % ARRAY_SIZE(errors)], "The owner does not want to"};

    f->asked = false;
    if (how & 1) {
        nbd_answer_error(f->nbd, &why);
        return;
    }
    switch (f->ask) {
    case NBD_ASK_LIST:
        nbd_answer_list(f->nbd, entries, ARRAY_SIZE(entries));
        break;
    case NBD_ASK_CONTEXTS:
        nbd_answer_contexts(f->nbd, contexts, ARRAY_SIZE(contexts));
        break;
    case NBD_ASK_EXPORT:
    case NBD_ASK_OPEN:
        nbd_answer_export(f->nbd, &e);
        break;
    }
}

static void on_ask(void *arg, const struct nbd_ask *ask)
{
    struct fuzz *f = arg;

    CHECK(!f->asked && f->nhangups == 0);
    CHECK((ask->export_name == NULL) == (ask->type == NBD_ASK_LIST));
    CHECK(!ask->export_name || strlen(ask->export_name) <= NBD_NAME_MAX);
    f->asked = true;
    f->ask = ask->type;
    if (ask->type == NBD_ASK_OPEN)
        f->ncontexts = ask->ncontexts;
    if (!f->later)
        answer(f);
}

static void release(struct nbd_payload *payload)
{
    struct fuzz **owner = (struct fuzz **)(payload + 1);

    (*owner)->npayloads--;
    free(payload);
}

static void give(struct fuzz *f, struct nbd_request *r, uint64_t offset, size_t len)
{
    static const uint8_t zeros[DATA_MAX];
    struct nbd_payload *payload = malloc(sizeof(*payload) + sizeof(struct fuzz *));

    CHECK(payload);
    *payload = (struct nbd_payload){.data = zeros, .len = len, .release = release};
    *(struct fuzz **)(payload + 1) = f;
    f->npayloads++;
    nbd_reply_data(r, offset, payload);
}

static void serve_read(struct fuzz *f, struct nbd_request *r)
{
    uint64_t offset = r->offset, left = r->length;
    bool ordered = r->in_order || r->df;
    uint8_t how;

    CHECK(left > 0 && offset <= EXPORT_SIZE && left <= EXPORT_SIZE - offset);
    for (;;) {
        uint64_t piece;

        how = decide(f);
        piece = how & 0x80 ? MIN(left, 1 + (how & 0x3f) * 512u) : left;
        if ((how & 7) == 1 || (ordered && piece > DATA_MAX)) {
            nbd_reply_error(r, -EIO, how & 8 ? "words" : NULL);
            return;
        }
        /* Chunks from the back, the others from the front. */
        if (!ordered && ((how & 7) == 2 || piece > DATA_MAX))
            nbd_reply_hole(r, offset + left - piece, (uint32_t)piece);
        else if (!ordered)
            give(f, r, offset + left - piece, piece);
        else
            give(f, r, offset + r->length - left, piece);
        left -= piece;
        if (left == 0)
            return;
    }
}

static void serve_status(struct fuzz *f, struct nbd_request *r)
{
    uint64_t starts[EXTENTS_MAX + 1] = {0};
    uint32_t flags[EXTENTS_MAX];
    struct nbd_status status[64];
    uint8_t how = decide(f);

    CHECK(nbd_status_max_extents(r) > 0 && f->ncontexts <= ARRAY_SIZE(status));
    for (size_t i = 0; i < EXTENTS_MAX; i++)
        starts[i + 1] = starts[i] + (UINT64_C(1) << (decide(f) % 40));
    for (uint32_t i = 0; i < EXTENTS_MAX; i++)
        flags[i] = i;
    for (size_t i = 0; i < f->ncontexts; i++) {
        size_t nruns = how & 0x80 ? decide(f) % (EXTENTS_MAX + 1) : EXTENTS_MAX;

        status[i] = (struct nbd_status){starts, flags, nruns, starts[nruns]};
    }
    nbd_reply_status(r, status, f->ncontexts);
}

static void serve(struct fuzz *f, struct nbd_request *r)
{
    f->nfinished++;
    switch (r->command) {
    case NBD_COMMAND_READ:
        serve_read(f, r);
        break;
    case NBD_COMMAND_STATUS:
        serve_status(f, r);
        break;
    case NBD_COMMAND_CACHE:
    case NBD_COMMAND_TRIM:
        if (decide(f) & 1)
            nbd_reply_error(r, -ENOTSUP, "words");
        else
            nbd_reply_done(r);
        break;
    }
}

static void on_request(void *arg, struct nbd_request *r)
{
    struct fuzz *f = arg;

    CHECK(f->nhangups == 0 && nbd_in_transmission(f->nbd) && !nbd_is_ending(f->nbd));
    CHECK(!r->owner);
    r->owner = f;
    if (!f->later) {
        serve(f, r);
        return;
    }
    CHECK(f->nheld < HELD_MAX);
    f->held[f->nheld++] = r;
}

static void on_send(void *arg, const void *head, size_t len, struct nbd_payload *payload)
{
    struct fuzz *f = arg;

    CHECK(f->nhangups == 0);
    take_output(f, head, len);
    if (payload) {
        take_output(f, payload->data, payload->len);
        payload->release(payload);
    }
}

static void on_hangup(void *arg, enum nbd_end end, const struct failure *why)
{
    struct fuzz *f = arg;

    CHECK(f->nhangups++ == 0);
    CHECK(nbd_inflight(f->nbd) == 0);
    CHECK((why->err == 0) == (end == NBD_END_DISC || end == NBD_END_ABORT));
}

static void on_starttls(void *arg)
{
    struct fuzz *f = arg;

    f->tls_waits = true;
}

static const struct nbd_ops ops = {on_ask, on_request, on_send, on_hangup, on_starttls};

/* -- the client ---------------------------------------------------------------------------------------------------- */

static void feed_option(struct fuzz *f, uint32_t option, const char *data, size_t len)
{
    uint8_t bytes[128];
    uint8_t *p = codec_put64(bytes, NBD_OPTION_MAGIC);

    p = codec_put32(p, option);
    p = codec_put32(p, (uint32_t)len);
    p = codec_put_bytes(p, data, len);
    CHECK(nbd_feed(f->nbd, bytes, (size_t)(p - bytes)) == (size_t)(p - bytes));
}

static void shake_hands(struct fuzz *f, bool contexts)
{
    static const char meta[] = "\0\0\0\0\0\0\0\2\0\0\0\17base:allocation\0\0\0\23qemu:dirty-bitmap:a";

    CHECK(nbd_feed(f->nbd, "\0\0\0\1", 4) == 4);
    if (f->form == FORM_STRUCTURED)
        feed_option(f, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
    if (f->form == FORM_EXTENDED)
        feed_option(f, NBD_OPT_EXTENDED_HEADERS, NULL, 0);
    if (contexts)
        feed_option(f, NBD_OPT_SET_META_CONTEXT, meta, sizeof(meta) - 1);
    feed_option(f, NBD_OPT_GO, "\0\0\0\0\0\0", 6);
}

/* One thing that happens next, other than input. */
static void act(struct fuzz *f, uint8_t what)
{
    static const struct failure lost = {-EIO, "The disk is lost"};

    if (what & 1 && f->asked)
        answer(f);
    if (what & 2 && f->nheld > 0) {
        size_t i = (what >> 4) % f->nheld;
        struct nbd_request *r = f->held[i];

        f->held[i] = f->held[--f->nheld];
        serve(f, r);
    }
    if (what & 4 && f->tls_waits) {
        f->tls_waits = false;
        nbd_tls_ready(f->nbd);
    }
    if (what == 0xf8)
        nbd_feed_eof(f->nbd);
    if (what == 0xf0)
        nbd_fail(f->nbd, &lost);
}

static void feed(struct fuzz *f, const uint8_t *data, size_t size)
{
    while (size > 0) {
        uint8_t cut = decide(f);
        size_t len = cut ? MIN(size, cut) : size;
        bool more = nbd_has_more(f->nbd), transmitting = nbd_in_transmission(f->nbd);
        size_t taken = nbd_feed(f->nbd, data, len);

        CHECK(taken <= len);
        data += taken;
        size -= taken;
        if (taken < len && !more && transmitting == nbd_in_transmission(f->nbd) && !f->asked && f->nheld == 0 &&
            !f->tls_waits)
            CHECK(false); /* it takes no more, but waits for nothing */
        act(f, taken < len ? 7 : decide(f));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz f = {0};
    uint8_t first;
    bool whole;

    if (size < 2)
        return 0;
    f.ndecisions = MIN(data[size - 1], size - 1);
    size -= 1 + f.ndecisions;
    f.decisions = data + size;
    first = decide(&f);
    CHECK(nbd_new(&ops, &f, &f.nbd) == 0);
    f.form = (first >> FORM_SHIFT) & FORM_MASK;
    if (f.form == FORM_NONE) {
        f.later = first & LATER;
        nbd_offer_tls(f.nbd, MIN(first & TLS_MASK, NBD_TLS_REQUIRED));
        nbd_start(f.nbd);
    } else {
        struct fuzz quiet = f;

        f.ndecisions = 0; /* every answer is a good one */
        nbd_start(f.nbd);
        shake_hands(&f, first & CONTEXTS && f.form >= FORM_STRUCTURED);
        f.ndecisions = quiet.ndecisions;
        f.later = first & LATER;
        CHECK(nbd_in_transmission(f.nbd));
    }
    feed(&f, data, size);
    whole = f.ndecisions == 0 || decide(&f) != 0xff; /* else the machine is freed in the midst of things */
    if (whole) {
        nbd_feed_eof(f.nbd);
        while (f.nheld > 0)
            act(&f, 2);
        CHECK(f.nhangups == 1);
        CHECK(f.form < FORM_STRUCTURED || (f.chunk_left == 0 && f.head_len == 0 && f.nfinal >= f.nfinished));
    }
    nbd_free(f.nbd);
    CHECK(f.npayloads == 0);
    return 0;
}
