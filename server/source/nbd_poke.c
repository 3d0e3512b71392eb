/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/nbd.h"

#include "source/upstream.h"

struct source_nbd_poke {
    struct upstream upstream;
    uint64_t offset;  /* bytes */
    const void *data; /* borrowed until cb */
    size_t length;    /* bytes; 0: a flush */
    uint64_t since_ms;
    bool flying, closing;
    struct failure why;
    source_nbd_poke_cb cb;
    void *arg;
};

static struct source_nbd_poke *of_upstream(const struct upstream *u)
{
    return container_of(u, struct source_nbd_poke, upstream);
}

static void finish(struct source_nbd_poke *p)
{
    p->closing = true;
    upstream_close(&p->upstream);
}

/* Inside libnbd. */
static int on_answered(void *arg, int *error)
{
    struct source_nbd_poke *p = arg;

    p->flying = false;
    if (*error)
        upstream_failure(&p->upstream, &p->why, -*error, strerror(*error));
    return 1;
}

static void on_up(struct upstream *u)
{
    struct source_nbd_poke *p = of_upstream(u);
    nbd_completion_callback done = {.callback = on_answered, .user_data = p};
    int64_t sent;

    p->flying = true;
    p->since_ms = upstream_now();
    sent = p->length ? nbd_aio_pwrite(u->nbd, p->data, p->length, p->offset, done, 0) : nbd_aio_flush(u->nbd, done, 0);
    if (sent < 0) {
        upstream_failure(u, &p->why, -EIO, NULL);
        finish(p);
        return;
    }
    upstream_sent(u);
}

static void on_moved(struct upstream *u)
{
    struct source_nbd_poke *p = of_upstream(u);

    if (!p->flying)
        finish(p);
}

static void on_down(struct upstream *u, const struct failure *why)
{
    struct source_nbd_poke *p = of_upstream(u);

    (void)failure_copy(&p->why, why);
    finish(p);
}

static void on_closed(struct upstream *u)
{
    _cleanup_free_ struct source_nbd_poke *p = of_upstream(u);

    p->cb(p->arg, p->why.err ? &p->why : NULL);
}

static uint64_t oldest(const struct upstream *u)
{
    const struct source_nbd_poke *p = of_upstream(u);

    return p->flying ? p->since_ms : UPSTREAM_IDLE;
}

static const struct upstream_ops upstream_ops = {
    .up = on_up,
    .moved = on_moved,
    .down = on_down,
    .closed = on_closed,
    .oldest = oldest,
};

static int start(uv_loop_t *loop, const struct source_nbd_config *config, uint64_t offset, const void *data,
                 size_t length, source_nbd_poke_cb cb, void *arg, struct source_nbd_poke **ret_poke)
{
    _cleanup_free_ struct source_nbd_poke *p = calloc(1, sizeof(*p));
    int r;

    if (!p)
        return -ENOMEM;
    p->offset = offset;
    p->data = data;
    p->length = length;
    p->cb = cb;
    p->arg = arg;
    r = upstream_start(&p->upstream, loop, &upstream_ops, config, /* context= */ NULL);
    if (r < 0)
        return r;
    if (ret_poke)
        *ret_poke = p;
    TAKE_PTR(p);
    return 0;
}

int source_nbd_poke(uv_loop_t *loop, const struct source_nbd_config *config, uint64_t offset, const void *data,
                    size_t length, source_nbd_poke_cb cb, void *arg, struct source_nbd_poke **ret_poke)
{
    return length ? start(loop, config, offset, data, length, cb, arg, ret_poke) : -EINVAL;
}

int source_nbd_flush(uv_loop_t *loop, const struct source_nbd_config *config, source_nbd_poke_cb cb, void *arg)
{
    return start(loop, config, 0, NULL, 0, cb, arg, NULL);
}

void source_nbd_poke_cancel(struct source_nbd_poke *p)
{
    if (p->closing)
        return; /* the callback is on its way */
    failure_set(&p->why, -ECANCELED, "the write was cancelled");
    finish(p);
}
