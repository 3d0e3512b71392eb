/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/nbd.h"

#include "source/read_list.h"
#include "source/upstream.h"

#include <sys/queue.h>

/*
 * Requests in flight upstream. QEMU works on 16 of a connection at a time (MAX_NBD_REQUESTS, nbd/server.c); the others
 * wait in the socket, so that it finds the next one as soon as it has answered one.
 */
#define SOURCE_NBD_SLOTS 32u

/* One upstream request's size. QEMU reads a request into one buffer and then sends it: large ones overlap nothing. */
#define SOURCE_NBD_PIECE (256u << 10)

/* What a read may ask for before the next one has its turn, so that a large one does not hold up all the small ones. */
#define SOURCE_NBD_TURN SOURCE_NBD_PIECE

/* The state only moves down this list. */
enum source_state {
    SOURCE_OPENING, /* no source yet, the open callback is owed: -> OPEN, CLOSING */
    SOURCE_OPEN,    /* serves reads: -> LOST, CLOSING */
    SOURCE_LOST,    /* the connection is gone; reads are refused: -> CLOSING */
    SOURCE_CLOSING, /* reads are refused; on_closed() answers what is left and frees */
};

/* slot.err where there is no answer */
#define SLOT_IDLE 1   /* none is expected */
#define SLOT_FLYING 2 /* none has come */

/* An upstream request: one piece of one read. */
struct slot {
    struct nbd_source *owner;
    struct source_read *read; /* borrowed while the slot is not idle */
    uint64_t since_ms;        /* upstream_now() of the request */
    uint64_t next;            /* where in the disk the next byte of the answer belongs … */
    uint64_t end;             /* … and where the last one does not any more */
    int err;                  /* 0, negative errno, SLOT_IDLE or SLOT_FLYING */
    TAILQ_ENTRY(slot) link;   /* on one of the three lists */
};

TAILQ_HEAD(slot_list, slot);

struct source_nbd_open {
    source_nbd_open_cb cb; /* NULL once called */
    void *arg;
    struct failure why;
};

struct nbd_source {
    struct source source;
    struct source_nbd_open open;
    struct upstream upstream;
    enum source_state state;
    uint32_t flags;           /* of a request: see on_chunk() */
    uint32_t piece;           /* bytes, a power of two: no request crosses a multiple of it */
    struct read_list waiting; /* reads of which something is still to be asked for */
    struct read_list asked;   /* reads of which everything is, and that wait for answers */
    size_t turn;              /* bytes that the first of waiting has asked for in this turn */
    struct slot slots[SOURCE_NBD_SLOTS];
    struct slot_list idle, flying, landed; /* flying: the oldest first; landed: answered, not yet settled */
    source_lost_cb on_lost;
    void *lost_arg;
    source_close_cb on_close;
    void *close_arg;
};

static struct nbd_source *to_nbd_source(struct source *s)
{
    return container_of(s, struct nbd_source, source);
}

static struct nbd_source *of_upstream(const struct upstream *u)
{
    return container_of(u, struct nbd_source, upstream);
}

/* -- pieces -------------------------------------------------------------------------------------------------------- */

/* Called inside libnbd, and perhaps twice for a request that it refuses. 1: libnbd may forget the command. */
static int on_landed(void *arg, int *error)
{
    struct slot *slot = arg;
    struct nbd_source *s = slot->owner;

    /* nbd_close() of libnbd from 1.16 on ends what is in flight with an error; that of 1.14 is silent. */
    if (slot->err == SLOT_FLYING && s->state != SOURCE_CLOSING) {
        if (*error == EINVAL)
            slot->err = -ESTALE; /* a broken snapshot's answer, see source.h */
        else
            slot->err = *error || slot->next != slot->end ? -EIO : 0;
        TAILQ_REMOVE(&s->flying, slot, link);
        TAILQ_INSERT_TAIL(&s->landed, slot, link);
    }
    return 1;
}

/*
 * libnbd has put these bytes where they belong; it does not see to it that all come (1.14). A hole in the answer would
 * hand on whatever the buffer held before, so they must come without one, in order as QEMU sends them.
 *
 * Requests say "in one chunk" (NBD_CMD_FLAG_DF), which pread_structured alone can say: else QEMU asks for the block
 * status of each request before it reads, to send holes, which our own frozen map knows already.
 */
static int on_chunk(void *arg, const void *bytes, size_t count, uint64_t offset, unsigned status, int *error)
{
    struct slot *slot = arg;

    if (status != LIBNBD_READ_ERROR && offset == slot->next)
        slot->next += count;
    return 0;
}

static void ask_piece(struct nbd_source *s, struct source_read *r)
{
    struct slot *slot = TAILQ_FIRST(&s->idle);
    uint64_t offset = r->offset + r->issued;
    size_t length = MIN(r->length - r->issued, s->piece - (size_t)(offset & (s->piece - 1)));
    nbd_completion_callback done = {.callback = on_landed, .user_data = slot};
    nbd_chunk_callback chunk = {.callback = on_chunk, .user_data = slot};
    char *buffer = (char *)r->buffer + r->issued;
    int error = EIO;

    TAILQ_REMOVE(&s->idle, slot, link);
    TAILQ_INSERT_TAIL(&s->flying, slot, link);
    slot->read = r;
    slot->next = offset;
    slot->end = offset + length;
    slot->err = SLOT_FLYING;
    slot->since_ms = upstream_now();
    r->npending++;
    r->issued += length;
    s->turn += length;
    if (nbd_aio_pread_structured(s->upstream.nbd, buffer, length, offset, chunk, done, s->flags) < 0) {
        (void)on_landed(slot, &error);
        upstream_kick(&s->upstream);
    }
}

/* Asks for pieces as long as there are free slots, turn by turn. */
static void ask_pieces(struct nbd_source *s)
{
    struct source_read *r;

    while (!TAILQ_EMPTY(&s->idle) && (r = s->waiting.first)) {
        ask_piece(s, r);
        if (r->issued < r->length && s->turn < SOURCE_NBD_TURN)
            continue;
        s->turn = 0;
        read_list_remove(&s->waiting, r);
        read_list_append(r->issued < r->length ? &s->waiting : &s->asked, r);
    }
    upstream_sent(&s->upstream);
}

/* Gives an answered (or forgotten) piece's slot back. Returns the read, which may be complete now. */
static struct source_read *settle_piece(struct nbd_source *s, struct slot_list *list, struct slot *slot)
{
    struct source_read *r = slot->read;

    TAILQ_REMOVE(list, slot, link);
    TAILQ_INSERT_HEAD(&s->idle, slot, link);
    r->npending--;
    if (slot->err < 0 && r->err == 0) {
        r->err = slot->err;
        if (r->issued < r->length) {
            /* No use in the rest of it. */
            r->issued = r->length;
            read_list_remove(&s->waiting, r);
            read_list_append(&s->asked, r);
        }
    }
    slot->err = SLOT_IDLE;
    return r;
}

static void on_moved(struct upstream *u)
{
    struct nbd_source *s = of_upstream(u);
    struct slot *slot;

    while (s->state == SOURCE_OPEN && (slot = TAILQ_FIRST(&s->landed))) {
        struct source_read *r = settle_piece(s, &s->landed, slot);

        if (r->npending == 0 && r->issued == r->length) {
            read_list_remove(&s->asked, r);
            r->cb(r, r->err);
        }
    }
    if (s->state == SOURCE_OPEN)
        ask_pieces(s);
}

static uint64_t oldest(const struct upstream *u)
{
    struct nbd_source *s = of_upstream(u);

    return TAILQ_EMPTY(&s->flying) ? UPSTREAM_IDLE : TAILQ_FIRST(&s->flying)->since_ms;
}

/*
 * Answers all reads: those whose pieces have all come with what came, the others with err. libnbd is gone already, so
 * nobody writes into their buffers. Stops when a callback closes the source: then on_closed() goes on.
 */
static void answer_all(struct nbd_source *s, int err)
{
    enum source_state state = s->state;
    struct source_read *r;
    struct slot *slot;

    while ((slot = TAILQ_FIRST(&s->landed)))
        (void)settle_piece(s, &s->landed, slot);
    while ((slot = TAILQ_FIRST(&s->flying))) {
        slot->err = err;
        (void)settle_piece(s, &s->flying, slot);
    }
    while (s->state == state) {
        r = read_list_pop(&s->asked);
        if (!r && (r = read_list_pop(&s->waiting)))
            r->err = err;
        if (!r)
            return;
        r->cb(r, r->err);
    }
}

/* -- life ---------------------------------------------------------------------------------------------------------- */

static void on_closed(struct upstream *u)
{
    struct nbd_source *s = of_upstream(u);
    source_nbd_open_cb opened = TAKE_PTR(s->open.cb);
    source_close_cb closed = s->on_close;
    struct failure why = s->open.why;
    void *arg = opened ? s->open.arg : s->close_arg;

    answer_all(s, -ECANCELED);
    free(s);
    if (opened)
        opened(arg, NULL, &why);
    else if (closed)
        closed(arg);
}

static void give_up_open(struct nbd_source *s)
{
    s->state = SOURCE_CLOSING;
    upstream_close(&s->upstream);
}

static void on_up(struct upstream *u)
{
    struct nbd_source *s = of_upstream(u);
    source_nbd_open_cb opened = TAKE_PTR(s->open.cb);
    int64_t size = nbd_get_size(u->nbd);

    if (size < 0) {
        s->open.cb = opened;
        upstream_failure(u, &s->open.why, -EPROTO, NULL);
        give_up_open(s);
        return;
    }
    s->source.size = (uint64_t)size;
    s->flags = nbd_can_df(u->nbd) > 0 ? LIBNBD_CMD_FLAG_DF : 0;
    s->state = SOURCE_OPEN;
    opened(s->open.arg, &s->source, NULL);
}

static void on_down(struct upstream *u, const struct failure *why)
{
    struct nbd_source *s = of_upstream(u);

    if (s->state == SOURCE_OPENING) {
        (void)failure_copy(&s->open.why, why);
        give_up_open(s);
        return;
    }
    s->state = SOURCE_LOST;
    answer_all(s, -EIO);
    if (s->state == SOURCE_LOST && s->on_lost)
        s->on_lost(s->lost_arg, why);
}

static const struct upstream_ops upstream_ops = {
    .up = on_up,
    .moved = on_moved,
    .down = on_down,
    .closed = on_closed,
    .oldest = oldest,
};

static int source_nbd_read(struct source *source, struct source_read *r)
{
    struct nbd_source *s = to_nbd_source(source);

    if (s->state != SOURCE_OPEN)
        return -ENOTCONN;
    r->issued = 0;
    r->npending = 0;
    r->err = 0;
    read_list_append(&s->waiting, r);
    ask_pieces(s);
    return 0;
}

static void source_nbd_close(struct source *source, source_close_cb cb, void *arg)
{
    struct nbd_source *s = to_nbd_source(source);

    s->state = SOURCE_CLOSING;
    s->on_close = cb;
    s->close_arg = arg;
    upstream_close(&s->upstream);
}

static const struct source_ops source_nbd_ops = {.read = source_nbd_read, .close = source_nbd_close};

int source_nbd_open(uv_loop_t *loop, const struct source_nbd_config *config, source_lost_cb on_lost,
                    source_nbd_open_cb cb, void *arg, struct source_nbd_open **ret_open)
{
    _cleanup_free_ struct nbd_source *s = calloc(1, sizeof(*s));
    int r;

    if (!s)
        return -ENOMEM;
    if (config->cluster & (config->cluster - 1))
        return -EINVAL;
    s->source.ops = &source_nbd_ops;
    s->open = (struct source_nbd_open){.cb = cb, .arg = arg};
    s->piece = config->cluster ? MIN(config->cluster, SOURCE_NBD_PIECE) : SOURCE_NBD_PIECE;
    s->on_lost = on_lost;
    s->lost_arg = arg;
    TAILQ_INIT(&s->idle);
    TAILQ_INIT(&s->flying);
    TAILQ_INIT(&s->landed);
    for (size_t i = 0; i < ARRAY_SIZE(s->slots); i++) {
        s->slots[i].owner = s;
        s->slots[i].err = SLOT_IDLE;
        TAILQ_INSERT_TAIL(&s->idle, &s->slots[i], link);
    }
    r = upstream_start(&s->upstream, loop, &upstream_ops, config, /* context= */ NULL);
    if (r < 0)
        return r;
    if (ret_open)
        *ret_open = &s->open;
    TAKE_PTR(s);
    return 0;
}

void source_nbd_open_cancel(struct source_nbd_open *o)
{
    struct nbd_source *s = container_of(o, struct nbd_source, open);

    if (s->state != SOURCE_OPENING)
        return; /* it is failing already */
    failure_set(&o->why, -ECANCELED, "opening the source was cancelled");
    give_up_open(s);
}
