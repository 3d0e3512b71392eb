/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/ahead.h"

#include "nbd/nbd.h"
#include "source/read_list.h"

#define LOOK_EXTENTS 32u /* runs of a map that are looked at for the next one on the way */

struct path {
    const struct map *map; /* borrowed */
    uint64_t mask, value;
};

/* One read ahead. Free: no buffer. */
struct piece {
    struct ahead *owner;
    uint64_t at, end; /* bytes of the disk; what is before `at` was given back */
    uint64_t begin;   /* where buffer[0] is */
    char *buffer;     /* owned: AHEAD_PIECE bytes of the pool */
    bool flying;
    bool stale;               /* nobody is to get it any more */
    struct source_read read;  /* while flying */
    struct read_list waiting; /* reads of clients that it will answer */
};

struct ahead {
    struct source source;
    struct source *below;    /* owned */
    struct ahead_pool *pool; /* borrowed */
    struct piece pieces[AHEAD_PIECES];
    unsigned nflying;
    struct path paths[AHEAD_PATHS];
    size_t npaths;
    const struct path *path; /* the client's, as far as we know; NULL: all bytes */
    uint64_t next;           /* where its next read begins if it goes on */
    unsigned norder;         /* reads in order, one at a time */
    size_t nreads, nbytes;   /* of clients, not answered */
    bool broken;             /* the snapshot is: nothing is kept, nothing read ahead */
    struct read_list done;   /* answered in the next turn of the loop, from memory */
    uv_timer_t timer;
    unsigned nclosing; /* callbacks that close waits for; 0: it is open */
    source_close_cb on_close;
    void *close_arg;
};

static struct ahead *to_ahead(struct source *s)
{
    return container_of(s, struct ahead, source);
}

/* -- pieces -------------------------------------------------------------------------------------------------------- */

static void piece_free(struct piece *p)
{
    free(TAKE_PTR(p->buffer));
    p->owner->pool->left += AHEAD_PIECE;
}

/* One that is flying is freed when it lands. */
static void piece_drop(struct piece *p)
{
    p->stale = true;
    if (p->buffer && !p->flying)
        piece_free(p);
}

static void drop_all(struct ahead *a)
{
    for (size_t i = 0; i < AHEAD_PIECES; i++)
        piece_drop(&a->pieces[i]);
}

static struct piece *find_piece(struct ahead *a, uint64_t offset, uint64_t length)
{
    for (size_t i = 0; i < AHEAD_PIECES; i++) {
        struct piece *p = &a->pieces[i];

        if (p->buffer && !p->stale && p->at <= offset && offset + length <= p->end)
            return p;
    }
    return NULL;
}

/* -- answers ------------------------------------------------------------------------------------------------------- */

static void on_done(uv_timer_t *t)
{
    struct ahead *a = container_of(t, struct ahead, timer);
    struct read_list done = a->done;
    struct source_read *r;

    a->done = (struct read_list){0};
    while ((r = read_list_pop(&done))) {
        a->nreads--;
        a->nbytes -= r->length;
        r->cb(r, r->err);
    }
}

static void answer_later(struct ahead *a, struct source_read *r, int err)
{
    r->err = err;
    read_list_append(&a->done, r);
    if (!a->nclosing)
        (void)uv_timer_start(&a->timer, on_done, 0, 0);
}

static void take(const struct piece *p, struct source_read *r)
{
    memcpy(r->buffer, p->buffer + (r->offset - p->begin), r->length);
}

static void on_read(struct source_read *r, int err)
{
    struct ahead *a = to_ahead(r->ahead);

    a->nreads--;
    a->nbytes -= r->length;
    if (err == -ESTALE) {
        a->broken = true;
        drop_all(a);
    }
    r->cb = r->ahead_told;
    r->cb(r, err);
}

/* As source_read(). */
static int pass(struct ahead *a, struct source_read *r)
{
    int result;

    r->ahead = &a->source;
    r->ahead_told = r->cb;
    r->cb = on_read;
    result = source_read(a->below, r);
    if (result < 0)
        r->cb = r->ahead_told;
    return result;
}

/* What could not be read ahead is read for who waits for it, who is told what is wrong. */
static void on_piece(struct source_read *read, int err)
{
    struct piece *p = container_of(read, struct piece, read);
    struct ahead *a = p->owner;
    struct read_list waiting = p->waiting;
    struct source_read *r;

    a->nflying--;
    p->flying = false;
    p->waiting = (struct read_list){0};
    if (err == -ESTALE) {
        a->broken = true;
        drop_all(a);
    }
    while ((r = read_list_pop(&waiting))) {
        int result;

        if (!err && !a->broken && p->at <= r->offset) {
            take(p, r);
            answer_later(a, r, 0);
        } else if (a->nclosing) {
            answer_later(a, r, -ECANCELED);
        } else if ((result = pass(a, r)) < 0) {
            answer_later(a, r, result);
        }
    }
    if ((err || p->stale || a->broken || a->nclosing) && p->buffer)
        piece_free(p);
}

/* -- where the client goes ----------------------------------------------------------------------------------------- */

/* The first byte from `at` on that is on the way, and the end of that run; the disk's size if there is none near. */
static uint64_t step(const struct ahead *a, const struct path *path, uint64_t at, uint64_t *ret_end)
{
    struct map_extent e[LOOK_EXTENTS];
    size_t n;

    *ret_end = a->source.size;
    if (!path || at >= a->source.size)
        return at;
    n = map_extents(path->map, at, a->source.size - at, e, LOOK_EXTENTS);
    for (size_t i = 0; i < n; i++) {
        if ((e[i].flags & path->mask) == path->value) {
            *ret_end = at + e[i].length;
            return at;
        }
        at += e[i].length;
    }
    return a->source.size;
}

static bool goes_on(struct ahead *a, uint64_t offset)
{
    uint64_t end;

    if (offset == a->next)
        return true;
    for (size_t i = 0; i < a->npaths; i++) {
        if (offset == step(a, &a->paths[i], a->next, &end)) {
            a->path = &a->paths[i];
            return true;
        }
    }
    return false;
}

/*
 * Reads that come while others are in flight are pieces of one request, as long as they are few enough for that. A
 * client that has asked for more does not wait for answers; but where it may have so little in flight that nothing
 * would be merged, reading ahead does it for it: a copy in memory costs less than waking QEMU for each piece.
 */
static void watch(struct ahead *a, const struct source_read *r)
{
    size_t in_flight = a->nbytes + r->length;

    if (!goes_on(a, r->offset)) {
        a->norder = 0;
        a->path = NULL;
        drop_all(a);
    } else if (in_flight > (r->wanted > AHEAD_REQUEST ? AHEAD_MERGED : AHEAD_REQUEST)) {
        a->norder = 0;
    } else if (a->nreads == 0 && a->norder < AHEAD_BEGIN) {
        a->norder++;
    }
    a->next = r->offset + r->length;
}

static struct piece *new_piece(struct ahead *a)
{
    for (size_t i = 0; i < AHEAD_PIECES; i++) {
        struct piece *p = &a->pieces[i];

        if (p->buffer && !p->flying && p->end <= a->next) /* it was read, or stepped over */
            piece_drop(p);
        if (p->buffer)
            continue;
        if (a->pool->left < AHEAD_PIECE || !(p->buffer = malloc(AHEAD_PIECE)))
            return NULL;
        a->pool->left -= AHEAD_PIECE;
        return p;
    }
    return NULL;
}

static bool start_piece(struct ahead *a, uint64_t at, uint64_t end)
{
    struct piece *p = new_piece(a);

    if (!p)
        return false;
    p->owner = a;
    p->begin = p->at = at;
    p->end = end;
    p->stale = false;
    p->read = (struct source_read){.offset = at, .length = end - at, .buffer = p->buffer, .cb = on_piece};
    if (source_read(a->below, &p->read) < 0) {
        piece_free(p);
        return false;
    }
    p->flying = true;
    a->nflying++;
    return true;
}

static void read_ahead(struct ahead *a)
{
    uint64_t at = a->next, end;

    for (unsigned i = 0; i < AHEAD_PIECES; i++) {
        struct piece *p;

        at = step(a, a->path, at, &end);
        if (at >= a->source.size)
            return;
        end = MIN(end, (at / AHEAD_PIECE + 1) * AHEAD_PIECE);
        p = find_piece(a, at, 1);
        if (p)
            end = p->end;
        else if (!start_piece(a, at, end))
            return;
        at = end;
    }
}

/* -- the source ---------------------------------------------------------------------------------------------------- */

static int ahead_read(struct source *s, struct source_read *r)
{
    struct ahead *a = to_ahead(s);
    struct piece *p;
    int result = 0;

    if (a->nclosing)
        return -ENOTCONN;
    p = find_piece(a, r->offset, r->length);
    if (p && r->borrow)
        return -ENOBUFS;                               /* comes again with a buffer: what is kept here is not lent */
    if (r->borrow || r->offset + r->length != a->next) /* else the same once more, because nothing could be lent */
        watch(a, r);
    p = find_piece(a, r->offset, r->length); /* it may have gone */
    if (p && p->flying) {
        read_list_append(&p->waiting, r);
    } else if (p) {
        take(p, r);
        answer_later(a, r, 0);
    } else if ((result = pass(a, r)) < 0) {
        return result;
    }
    a->nreads++;
    a->nbytes += r->length;
    if (a->norder >= AHEAD_BEGIN && !a->broken)
        read_ahead(a);
    return 0;
}

/* What is given back cannot be read any more, from here either. A client does so with what it has just read. */
static void ahead_give_back(struct source *s, uint64_t offset, uint64_t length)
{
    struct ahead *a = to_ahead(s);

    for (size_t i = 0; i < AHEAD_PIECES; i++) {
        struct piece *p = &a->pieces[i];

        if (!p->buffer || offset >= p->end || offset + length <= p->at)
            continue;
        if (offset <= p->at && offset + length < p->end)
            p->at = offset + length;
        else
            piece_drop(p);
    }
    source_give_back(a->below, offset, length);
}

static void part_closed(struct ahead *a)
{
    source_close_cb cb = a->on_close;
    void *arg = a->close_arg;

    if (--a->nclosing)
        return;
    on_done(&a->timer); /* what was in flight has been answered, in this turn of the loop perhaps */
    drop_all(a);
    free(a);
    if (cb)
        cb(arg);
}

static void on_below_closed(void *arg)
{
    part_closed(arg);
}

static void on_timer_closed(uv_handle_t *h)
{
    part_closed(container_of((uv_timer_t *)h, struct ahead, timer));
}

static void ahead_close(struct source *s, source_close_cb cb, void *arg)
{
    struct ahead *a = to_ahead(s);

    a->nclosing = 2;
    a->on_close = cb;
    a->close_arg = arg;
    uv_close((uv_handle_t *)&a->timer, on_timer_closed);
    source_close(a->below, on_below_closed, a);
}

static const struct source_ops ahead_ops = {.read = ahead_read, .close = ahead_close, .give_back = ahead_give_back};

int ahead_new(uv_loop_t *loop, struct ahead_pool *pool, struct source *below, struct source **ret_source)
{
    struct ahead *a = calloc(1, sizeof(*a));

    if (!a)
        return -ENOMEM;
    a->source = (struct source){.ops = &ahead_ops, .size = below->size, .lends = true /* what is below decides */};
    a->below = below;
    a->pool = pool;
    for (size_t i = 0; i < AHEAD_PIECES; i++)
        a->pieces[i].owner = a;
    (void)uv_timer_init(loop, &a->timer); /* never fails */
    *ret_source = &a->source;
    return 0;
}

void ahead_follow(struct source *s, const struct map *map, uint64_t mask, uint64_t value)
{
    struct ahead *a = to_ahead(s);

    if (a->npaths < AHEAD_PATHS && map_length(map) == s->size)
        a->paths[a->npaths++] = (struct path){map, mask, value};
}
