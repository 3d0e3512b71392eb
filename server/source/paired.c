/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/paired.h"

struct paired_source {
    struct source source;
    struct source *sure; /* owned; NULL: closing */
    struct source *fast; /* owned; NULL: none (yet, or any more) */
    unsigned nclosing;   /* of the two, and one for the pair itself until it is being closed */
    source_close_cb on_close;
    void *close_arg;
};

static struct paired_source *to_paired(struct source *s)
{
    return container_of(s, struct paired_source, source);
}

/* Whoever has answered, the caller gets its own callback back. */
static void on_fast_read(struct source_read *r, int err)
{
    struct paired_source *s = r->arg;

    r->cb = r->own_cb;
    r->arg = r->own_arg;
    if (err < 0 && s->sure && r->borrow) {
        err = -ENOBUFS; /* the sure one has nothing to lend */
    } else if (err < 0 && s->sure) {
        if (source_read(s->sure, r) == 0)
            return;
        err = -EIO; /* lost, too */
    }
    r->cb(r, err);
}

static int paired_read(struct source *source, struct source_read *r)
{
    struct paired_source *s = to_paired(source);

    if (s->fast && !r->sure && r->offset + r->length <= s->fast->size) {
        r->own_cb = r->cb;
        r->own_arg = r->arg;
        r->cb = on_fast_read;
        r->arg = s;
        if (source_read(s->fast, r) == 0)
            return 0;
        r->cb = r->own_cb;
        r->arg = r->own_arg;
    }
    if (r->borrow)
        return -ENOBUFS;
    return source_read(s->sure, r);
}

static void on_closed(void *arg)
{
    struct paired_source *s = arg;
    source_close_cb closed = s->on_close;

    if (--s->nclosing)
        return;
    arg = s->close_arg;
    free(s);
    if (closed)
        closed(arg);
}

void source_paired_lost(struct source *pair)
{
    struct paired_source *s = to_paired(pair);
    struct source *fast = TAKE_PTR(s->fast);

    if (!fast)
        return;
    s->nclosing++;
    source_close(fast, on_closed, s);
}

static void paired_close(struct source *source, source_close_cb cb, void *arg)
{
    struct paired_source *s = to_paired(source);

    s->on_close = cb;
    s->close_arg = arg;
    source = TAKE_PTR(s->sure);
    source_paired_lost(&s->source);
    source_close(source, on_closed, s);
}

static const struct source_ops paired_ops = {.read = paired_read, .close = paired_close};

int source_paired_new(struct source *sure, struct source **ret_source)
{
    struct paired_source *s = calloc(1, sizeof(*s));

    if (!s)
        return -ENOMEM;
    s->source = (struct source){.ops = &paired_ops, .size = sure->size};
    s->sure = sure;
    s->nclosing = 1;
    *ret_source = &s->source;
    return 0;
}

void source_paired_add(struct source *pair, struct source *fast)
{
    to_paired(pair)->fast = fast;
    pair->lends = fast->lends;
}
