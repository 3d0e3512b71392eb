/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * transmit: the transmission phase: requests in, the replies to them out, in the form that was negotiated: simple,
 * structured, or structured with extended headers. The export is read-only.
 */
#include "nbd/internal.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>

#define CONTEXT_ID_FIRST 1u      /* 0 is what LIST_META_CONTEXT says */
#define REPLY_BUFFER_SIZE 65536u /* bytes of extents encoded before they go out: 8,000 of them in one write */

/* -- the export ---------------------------------------------------------------------------------------------------- */

int transmit_init(struct nbd *n, const struct nbd_export *e)
{
    assert((transmit_min_block(e) & (transmit_min_block(e) - 1)) == 0);
    n->requests = calloc(NBD_INFLIGHT_MAX, sizeof(*n->requests));
    if (!n->requests)
        return -ENOMEM;
    for (size_t i = 0; i < NBD_INFLIGHT_MAX; i++) {
        n->requests[i].next = n->idle;
        n->idle = &n->requests[i];
    }
    n->size = e->size;
    n->min_block = transmit_min_block(e);
    n->max_block = transmit_max_block(e);
    n->trim = e->trim;
    return 0;
}

uint16_t transmit_flags(const struct nbd *n, const struct nbd_export *e)
{
    uint16_t flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_CACHE;

    if (n->structured)
        flags |= NBD_FLAG_SEND_DF;
    if (e->multi_conn)
        flags |= NBD_FLAG_CAN_MULTI_CONN;
    if (e->trim)
        flags |= NBD_FLAG_SEND_TRIM;
    return flags;
}

uint32_t transmit_min_block(const struct nbd_export *e)
{
    return MAX(e->min_block, 1);
}

uint32_t transmit_max_block(const struct nbd_export *e)
{
    return e->max_block ? MIN(e->max_block, NBD_BLOCK_MAX) : NBD_BLOCK_DEFAULT;
}

uint32_t transmit_context_id(size_t i)
{
    return (uint32_t)i + CONTEXT_ID_FIRST;
}

/* -- reply headers and errors -------------------------------------------------------------------------------------- */

/* A chunk's header, in the form negotiated (structured, extended). offset is the request's. */
static uint8_t *put_chunk(const struct nbd *n, uint8_t *p, uint16_t flags, uint16_t type, uint64_t cookie,
                          uint64_t offset, uint32_t length)
{
    p = codec_put32(p, n->extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
    p = codec_put16(p, flags);
    p = codec_put16(p, type);
    p = codec_put64(p, cookie);
    if (!n->extended)
        return codec_put32(p, length);
    p = codec_put64(p, offset);
    return codec_put64(p, length);
}

static uint8_t *put_simple(uint8_t *p, uint32_t error, uint64_t cookie)
{
    p = codec_put32(p, NBD_SIMPLE_REPLY_MAGIC);
    p = codec_put32(p, error);
    return codec_put64(p, cookie);
}

static uint32_t wire_error(int err)
{
    switch (err) {
    case -EPERM:
    case -EACCES:
    case -EROFS:
        return NBD_EPERM;
    case -ENOMEM:
        return NBD_ENOMEM;
    case -EINVAL:
        return NBD_EINVAL;
    case -ENOSPC:
    case -EDQUOT:
    case -EFBIG:
        return NBD_ENOSPC;
    case -EOVERFLOW:
        return NBD_EOVERFLOW;
    case -ENOTSUP:
        return NBD_ENOTSUP;
    case -ESHUTDOWN:
        return NBD_ESHUTDOWN;
    default:
        return NBD_EIO;
    }
}

/* at: NULL, or the offset of the error (spec: NBD_REPLY_TYPE_ERROR_OFFSET). */
static void send_error(struct nbd *n, uint64_t cookie, uint64_t offset, int err, const char *text, const uint64_t *at)
{
    uint8_t head[NBD_EXTENDED_REPLY_SIZE + 4 + 2 + NBD_MESSAGE_MAX + 8];
    uint8_t *p = head;
    size_t len = text ? codec_cut(text, NBD_MESSAGE_MAX) : 0;

    if (!n->structured) {
        p = put_simple(p, wire_error(err), cookie);
    } else {
        p = put_chunk(n, p, NBD_REPLY_FLAG_DONE, at ? NBD_REPLY_TYPE_ERROR_OFFSET : NBD_REPLY_TYPE_ERROR, cookie,
                      offset, (uint32_t)(4 + 2 + len + (at ? 8 : 0)));
        p = codec_put32(p, wire_error(err));
        p = codec_put16(p, (uint16_t)len);
        p = codec_put_bytes(p, text, len);
        if (at)
            p = codec_put64(p, *at);
    }
    nbd_send(n, head, (size_t)(p - head), NULL);
}

/* Success without data. */
static void send_done(struct nbd *n, uint64_t cookie, uint64_t offset)
{
    uint8_t head[NBD_EXTENDED_REPLY_SIZE];
    uint8_t *p = n->structured ? put_chunk(n, head, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, cookie, offset, 0)
                               : put_simple(head, 0, cookie);

    nbd_send(n, head, (size_t)(p - head), NULL);
}

/* -- requests ------------------------------------------------------------------------------------------------------ */

/* What is wrong with a request: err 0: nothing. */
struct verdict {
    int err;
    const char *text; /* a literal */
};

static struct verdict check_range(const struct nbd *n, const struct wire_request *w)
{
    if (w->length == 0)
        return (struct verdict){-EINVAL, "A request of length 0 means nothing here"};
    if (w->offset > n->size || w->length > n->size - w->offset)
        return (struct verdict){-EINVAL, "The request reaches beyond the end of the export"};
    if ((w->offset | w->length) & (n->min_block - 1))
        return (struct verdict){-EINVAL, "The request is not aligned to the minimum block size"};
    return (struct verdict){0};
}

static struct verdict check_block(const struct nbd *n, const struct wire_request *w)
{
    struct verdict v = check_range(n, w);

    if (v.err == 0 && w->length > n->max_block)
        return (struct verdict){-EINVAL, "The request is longer than the maximum block size"};
    return v;
}

static struct verdict check_read(const struct nbd *n, const struct wire_request *w)
{
    struct verdict v = check_block(n, w);

    if (w->flags & NBD_CMD_FLAG_DF && !n->structured)
        return (struct verdict){-EINVAL, "NBD_CMD_FLAG_DF needs structured replies"};
    if (v.err == 0 && w->flags & NBD_CMD_FLAG_DF && w->length > NBD_DF_MAX)
        return (struct verdict){-EOVERFLOW, "The read is too long to be answered in one chunk"};
    return v;
}

static struct verdict check_status(const struct nbd *n, const struct wire_request *w)
{
    if (n->ncontexts == 0)
        return (struct verdict){-EINVAL, "No metadata context was negotiated for this export"};
    return check_range(n, w);
}

static struct verdict check_write(const struct nbd *n, const struct wire_request *w)
{
    return (struct verdict){-EPERM, "This export is read-only"};
}

static struct verdict check_trim(const struct nbd *n, const struct wire_request *w)
{
    if (!n->trim)
        return check_write(n, w);
    if (w->flags)
        return (struct verdict){-EINVAL, "The request has a flag that does not go with its command"};
    return check_range(n, w);
}

static const struct command {
    uint16_t type;
    uint16_t flags; /* allowed */
    enum nbd_command command;
    struct verdict (*check)(const struct nbd *n, const struct wire_request *w);
} commands[] = {
    {NBD_CMD_READ, NBD_CMD_FLAG_DF, NBD_COMMAND_READ, check_read},
    {NBD_CMD_CACHE, 0, NBD_COMMAND_CACHE, check_block},
    {NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, NBD_COMMAND_STATUS, check_status},
    {NBD_CMD_TRIM, UINT16_MAX, NBD_COMMAND_TRIM, check_trim},
    /* Never handed on, so the command does not matter; any flag is read-only's fault, too. */
    {NBD_CMD_WRITE, UINT16_MAX, NBD_COMMAND_READ, check_write},
    {NBD_CMD_WRITE_ZEROES, UINT16_MAX, NBD_COMMAND_READ, check_write},
};

static const struct command *find_command(uint16_t type)
{
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        if (commands[i].type == type)
            return &commands[i];
    }
    return NULL;
}

static struct verdict check_request(const struct nbd *n, const struct wire_request *w, const struct command *c)
{
    if (!c) /* NBD_CMD_FLUSH, too: it is not advertised */
        return (struct verdict){-EINVAL, "This server does not know that command"};
    if (w->flags & ~c->flags)
        return (struct verdict){-EINVAL, "The request has a flag that does not go with its command"};
    return c->check(n, w);
}

/* Bytes that follow the request's header. */
static uint64_t payload_length(const struct nbd *n, const struct wire_request *w)
{
    bool payload = n->extended ? w->flags & NBD_CMD_FLAG_PAYLOAD_LEN : w->type == NBD_CMD_WRITE;

    return payload ? w->length : 0;
}

static void parse_request(const struct nbd *n, struct wire_request *w)
{
    w->flags = codec_get16(n->head + 4);
    w->type = codec_get16(n->head + 6);
    w->cookie = codec_get64(n->head + 8);
    w->offset = codec_get64(n->head + 16);
    w->length = n->extended ? codec_get64(n->head + 24) : codec_get32(n->head + 24);
}

static void hand_on(struct nbd *n, const struct wire_request *w, enum nbd_command command)
{
    struct nbd_request *r = n->idle;

    assert(r); /* transmit_step() waits until there is one */
    n->idle = r->next;
    n->ninflight++;
    *r = (struct nbd_request){
        .command = command,
        .offset = w->offset,
        .length = w->length,
        .df = w->flags & NBD_CMD_FLAG_DF,
        .one = w->flags & NBD_CMD_FLAG_REQ_ONE,
        .in_order = !n->structured,
        .nbd = n,
        .cookie = w->cookie,
    };
    n->ops->request(n->arg, r);
}

static void on_request(struct nbd *n)
{
    struct wire_request w;
    const struct command *c;
    struct verdict v;

    if (codec_get32(n->head) != (n->extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC)) {
        nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "The client sent something that is not an NBD request");
        return;
    }
    parse_request(n, &w);
    if (w.type == NBD_CMD_DISC) {
        nbd_finish(n, NBD_END_DISC, 0, NULL);
        return;
    }
    c = find_command(w.type);
    v = check_request(n, &w, c);
    n->skip_left = payload_length(n, &w);
    if (n->skip_left > NBD_PAYLOAD_SKIP_MAX) {
        nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "The client announced a payload of %llu bytes on a read-only export",
                   (unsigned long long)n->skip_left);
    } else if (n->skip_left > 0) {
        assert(v.err < 0); /* no command that we know takes a payload */
        n->skipped = w;
        n->skipped_err = v.err;
        n->skipped_text = v.text;
        nbd_set_state(n, STATE_REQ_SKIP);
    } else if (v.err < 0) {
        send_error(n, w.cookie, w.offset, v.err, v.text, NULL);
    } else {
        hand_on(n, &w, c->command);
    }
}

bool transmit_step(struct nbd *n, struct nbd_input *in)
{
    switch (n->state) {
    case STATE_REQ_HEADER:
        if (n->ninflight == NBD_INFLIGHT_MAX)
            return false; /* back-pressure: goes on with the next final reply */
        if (!nbd_collect(n, in, n->extended ? NBD_EXTENDED_REQUEST_SIZE : NBD_REQUEST_SIZE))
            return false;
        on_request(n);
        return true;
    case STATE_REQ_SKIP:
        if (!nbd_skip(n, in))
            return false;
        send_error(n, n->skipped.cookie, n->skipped.offset, n->skipped_err, n->skipped_text, NULL);
        nbd_set_state(n, STATE_REQ_HEADER);
        return true;
    default:
        return false;
    }
}

/* -- replies ------------------------------------------------------------------------------------------------------- */

/* r has its final reply and is gone. */
static void request_done(struct nbd_request *r)
{
    struct nbd *n = r->nbd;

    r->nbd = NULL;
    r->next = n->idle;
    n->idle = r;
    n->ninflight--;
    nbd_try_close(n);
}

static void check_piece(const struct nbd_request *r, uint64_t offset, uint64_t length)
{
    assert(r->nbd && r->command == NBD_COMMAND_READ);
    assert(length > 0 && length <= r->length - r->sent);
    assert(offset >= r->offset && offset - r->offset <= r->length - length);
    assert(!(r->in_order || r->df) || offset == r->offset + r->sent);
}

void nbd_reply_data(struct nbd_request *r, uint64_t offset, struct nbd_payload *payload)
{
    uint8_t head[NBD_EXTENDED_REPLY_SIZE + 8];
    uint8_t *p = head;
    struct nbd *n = r->nbd;
    size_t len = payload->len;
    bool first = r->sent == 0, last;

    check_piece(r, offset, len);
    r->sent += len;
    last = r->sent == r->length;
    if (r->in_order) {
        if (first)
            p = put_simple(p, 0, r->cookie);
    } else if (!r->df || first) {
        /* A chunk that is begun with a part of its data only may still fail, so it must not be marked as the last one.
         */
        p = put_chunk(n, p, last ? NBD_REPLY_FLAG_DONE : 0, NBD_REPLY_TYPE_OFFSET_DATA, r->cookie, r->offset,
                      (uint32_t)(8 + (r->df ? r->length : len)));
        p = codec_put64(p, offset);
    }
    nbd_send(n, head, (size_t)(p - head), payload);
    if (!last)
        return;
    if (r->df && !first)
        send_done(n, r->cookie, r->offset);
    request_done(r);
}

void nbd_reply_hole(struct nbd_request *r, uint64_t offset, uint32_t length)
{
    uint8_t head[NBD_EXTENDED_REPLY_SIZE + 8 + 4];
    uint8_t *p = head;
    bool last;

    check_piece(r, offset, length);
    assert(!r->in_order && !r->df);
    r->sent += length;
    last = r->sent == r->length;
    p = put_chunk(r->nbd, p, last ? NBD_REPLY_FLAG_DONE : 0, NBD_REPLY_TYPE_OFFSET_HOLE, r->cookie, r->offset, 8 + 4);
    p = codec_put64(p, offset);
    p = codec_put32(p, length);
    nbd_send(r->nbd, head, (size_t)(p - head), NULL);
    if (last)
        request_done(r);
}

size_t nbd_status_max_extents(const struct nbd_request *r)
{
    return r->one ? 1 : NBD_EXTENTS_MAX / MAX(r->nbd->ncontexts, 1);
}

/* How many of the runs to send: up to the end of the request, and not too many. 0: nothing is known of its first byte.
 */
static size_t count_runs(const struct nbd_request *r, const struct nbd_status *s)
{
    size_t n = MIN(s->nruns, nbd_status_max_extents(r));

    if (n == 0 || s->starts[0] > r->offset || (s->nruns > 1 ? s->starts[1] : s->end) <= r->offset)
        return 0;
    while (n > 1 && s->starts[n - 1] >= r->offset + r->length)
        n--;
    return n;
}

/* A million of these are a map: no call for each number. */
static inline uint8_t *put_extent32(uint8_t *p, uint32_t length, uint32_t flags)
{
    const uint32_t extent_be[2] = {htobe32(length), htobe32(flags)};

    memcpy(p, extent_be, sizeof(extent_be));
    return p + sizeof(extent_be);
}

static inline uint8_t *put_extent64(uint8_t *p, uint64_t length, uint64_t flags)
{
    const uint64_t extent_be[2] = {htobe64(length), htobe64(flags)};

    memcpy(p, extent_be, sizeof(extent_be));
    return p + sizeof(extent_be);
}

static void send_status(const struct nbd_request *r, const struct nbd_status *s, size_t count, uint32_t id, bool last)
{
    struct nbd *n = r->nbd;
    uint8_t buffer[REPLY_BUFFER_SIZE];
    uint8_t *p = buffer;
    uint64_t at = r->offset, end = MIN(count < s->nruns ? s->starts[count] : s->end, r->offset + r->length);
    uint32_t size = n->extended ? 16 : 8; /* bytes of one extent */

    p = put_chunk(n, p, last ? NBD_REPLY_FLAG_DONE : 0,
                  n->extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS, r->cookie, r->offset,
                  (n->extended ? 8 : 4) + (uint32_t)count * size);
    p = codec_put32(p, id);
    if (n->extended)
        p = codec_put32(p, (uint32_t)count);
    for (size_t i = 0; i < count; i++) {
        uint64_t stop = i + 1 < count ? s->starts[i + 1] : end;

        if ((size_t)(p - buffer) + size > sizeof(buffer)) {
            nbd_send(n, buffer, (size_t)(p - buffer), NULL);
            p = buffer;
        }
        /* Compact requests have 32 bits: what lies inside them fits. */
        p = n->extended ? put_extent64(p, stop - at, s->flags[i]) : put_extent32(p, (uint32_t)(stop - at), s->flags[i]);
        at = stop;
    }
    nbd_send(n, buffer, (size_t)(p - buffer), NULL);
}

void nbd_reply_status(struct nbd_request *r, const struct nbd_status *status, size_t nstatus)
{
    size_t counts[NBD_CONTEXTS_MAX];

    assert(r->nbd && r->command == NBD_COMMAND_STATUS);
    assert(nstatus == r->nbd->ncontexts);
    for (size_t i = 0; i < nstatus; i++) {
        if ((counts[i] = count_runs(r, &status[i])) == 0) {
            nbd_reply_error(r, -EIO, "The map of this disk ends too early");
            return;
        }
    }
    for (size_t i = 0; i < nstatus; i++)
        send_status(r, &status[i], counts[i], transmit_context_id(i), i + 1 == nstatus);
    request_done(r);
}

void nbd_reply_done(struct nbd_request *r)
{
    assert(r->nbd && (r->command == NBD_COMMAND_CACHE || r->command == NBD_COMMAND_TRIM));
    send_done(r->nbd, r->cookie, r->offset);
    request_done(r);
}

/* The rest of a chunk that was begun. */
static void send_padding(struct nbd *n, uint64_t len)
{
    static const uint8_t zeros[REPLY_BUFFER_SIZE];

    while (len > 0) {
        size_t piece = MIN(len, sizeof(zeros));

        nbd_send(n, zeros, piece, NULL);
        len -= piece;
    }
}

void nbd_reply_error(struct nbd_request *r, int err, const char *sentence)
{
    struct nbd *n = r->nbd;
    uint64_t at = r->offset + r->sent;

    assert(n && err < 0);
    if (r->in_order && r->sent > 0) {
        static const char text[] = "A read failed after a part of its simple reply was sent: %s";

        nbd_finish(n, NBD_END_LOST, err, text, sentence ? sentence : "no reason given");
        if (n->end == NBD_END_DISC) { /* an end that was good until now: the client does not have all its answers */
            n->end = NBD_END_LOST;
            failure_set(&n->why, err, text, sentence ? sentence : "no reason given");
        }
        n->mute = true;
    } else if (r->df && r->sent > 0) {
        send_padding(n, r->length - r->sent);
        send_error(n, r->cookie, r->offset, err, sentence, &at);
    } else {
        send_error(n, r->cookie, r->offset, err, sentence, NULL);
    }
    request_done(r);
}
