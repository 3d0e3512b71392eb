/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/giveback.h"

#include "source/upstream.h"

/* One request's length: the protocol has 32 bits for it, and it is a multiple of every cluster. */
#define REQUEST_MAX (UINT64_C(1) << 30)

struct range {
    uint64_t at, end; /* bytes */
};

struct ranges {
    struct range all[GIVEBACK_RANGES];
    size_t n;
};

struct giveback {
    struct source source;
    struct source *below; /* owned */
    uint32_t cluster;
    uint64_t nclusters; /* whole ones */
    uint8_t *given;     /* owned: a bit each */

    /*
     * A batch may only go when no read that began before it was closed is under way any more: those may be of what it
     * gives back, and those that begin later are refused. Reads are counted by the generation they began in; closing a
     * batch begins the next one.
     */
    unsigned generation; /* 0 or 1 */
    size_t nreading[2];
    struct ranges next, batch;
    size_t asked; /* of the batch */
    bool on_way;  /* the batch is closed, and not answered wholly */
    uv_timer_t timer;

    struct upstream upstream;
    bool begun;    /* QEMU may be told */
    bool up, dead; /* dead: QEMU does not want to, or is not there */
    unsigned nflying;
    uint64_t since_ms; /* upstream_now() of the last request or answer */

    unsigned nclosing; /* callbacks that close waits for; 0: it is open */
    source_close_cb on_close;
    void *close_arg;
};

static struct giveback *to_giveback(struct source *s)
{
    return container_of(s, struct giveback, source);
}

static struct giveback *of_upstream(const struct upstream *u)
{
    return container_of(u, struct giveback, upstream);
}

/* -- batches ------------------------------------------------------------------------------------------------------- */

static void on_time(uv_timer_t *t);

static int compare(const void *a, const void *b)
{
    const struct range *x = a, *y = b;

    return x->at < y->at ? -1 : x->at > y->at;
}

/* Sorts, and joins neighbours. */
static void tidy(struct ranges *r)
{
    size_t n = 0;

    qsort(r->all, r->n, sizeof(*r->all), compare);
    for (size_t i = 0; i < r->n; i++) {
        if (n && r->all[i].at <= r->all[n - 1].end)
            r->all[n - 1].end = MAX(r->all[n - 1].end, r->all[i].end);
        else
            r->all[n++] = r->all[i];
    }
    r->n = n;
}

/* Inside libnbd. 1: it may forget the command. */
static int on_answered(void *arg, int *error)
{
    struct giveback *g = arg;

    g->nflying--;
    g->since_ms = upstream_now();
    g->dead |= *error != 0;
    return 1;
}

static void ask_one(struct giveback *g)
{
    struct range *r = &g->batch.all[g->asked];
    uint64_t length = MIN(r->end - r->at, REQUEST_MAX);
    nbd_completion_callback done = {.callback = on_answered, .user_data = g};

    g->nflying++;
    g->since_ms = upstream_now();
    if (nbd_aio_trim(g->upstream.nbd, length, r->at, done, 0) < 0) {
        g->dead = true;
        return;
    }
    r->at += length;
    g->asked += r->at == r->end;
}

/* Whatever can be asked of QEMU now, is. */
static void pump(struct giveback *g)
{
    if (g->nclosing || g->dead || !g->up || !g->begun || !g->on_way || g->nreading[!g->generation])
        return;
    while (g->asked < g->batch.n && g->nflying < GIVEBACK_FLYING && !g->dead)
        ask_one(g);
    upstream_sent(&g->upstream);
    if (g->asked < g->batch.n || g->nflying)
        return;
    g->on_way = false;
    if (g->next.n)
        (void)uv_timer_start(&g->timer, on_time, GIVEBACK_BATCH_MS, 0);
}

static void on_time(uv_timer_t *t)
{
    struct giveback *g = container_of(t, struct giveback, timer);

    if (g->on_way || g->dead)
        return;
    tidy(&g->next);
    g->batch = g->next;
    g->next.n = g->asked = 0;
    g->on_way = true;
    g->generation = !g->generation;
    pump(g);
}

static void add_range(struct giveback *g, struct range r)
{
    struct ranges *all = &g->next;

    if (g->dead)
        return;
    if (all->n && all->all[all->n - 1].end == r.at) {
        all->all[all->n - 1].end = r.end;
    } else {
        if (all->n == GIVEBACK_RANGES)
            tidy(all);
        if (all->n < GIVEBACK_RANGES)
            all->all[all->n++] = r;
    }
    if (!g->on_way && !uv_is_active((uv_handle_t *)&g->timer))
        (void)uv_timer_start(&g->timer, on_time, GIVEBACK_BATCH_MS, 0);
}

/* -- what QEMU's connection says ----------------------------------------------------------------------------------- */

static void on_up(struct upstream *u)
{
    struct giveback *g = of_upstream(u);

    g->up = true;
    pump(g);
}

static void on_moved(struct upstream *u)
{
    pump(of_upstream(u));
}

static void on_down(struct upstream *u, const struct failure *why)
{
    struct giveback *g = of_upstream(u);

    g->dead = true;
    g->up = false;
}

static uint64_t oldest(const struct upstream *u)
{
    const struct giveback *g = of_upstream(u);

    return g->nflying ? g->since_ms : UPSTREAM_IDLE;
}

static void part_closed(struct giveback *g)
{
    source_close_cb cb = g->on_close;
    void *arg = g->close_arg;

    if (--g->nclosing)
        return;
    free(g->given);
    free(g);
    if (cb)
        cb(arg);
}

static void on_upstream_closed(struct upstream *u)
{
    part_closed(of_upstream(u));
}

static const struct upstream_ops upstream_ops = {
    .up = on_up,
    .moved = on_moved,
    .down = on_down,
    .closed = on_upstream_closed,
    .oldest = oldest,
};

/* -- the source ---------------------------------------------------------------------------------------------------- */

static bool is_given(const struct giveback *g, uint64_t cluster)
{
    return cluster < g->nclusters && g->given[cluster / 8] & 1u << cluster % 8;
}

static void on_read(struct source_read *r, int err)
{
    struct giveback *g = to_giveback(r->via);

    g->nreading[r->generation]--;
    r->cb = r->told;
    pump(g);
    r->cb(r, err);
}

static int giveback_read(struct source *s, struct source_read *r)
{
    struct giveback *g = to_giveback(s);
    int result;

    for (uint64_t i = r->offset / g->cluster; i <= (r->offset + r->length - 1) / g->cluster; i++) {
        if (is_given(g, i))
            return -ENODATA;
    }
    r->via = s;
    r->generation = g->generation;
    r->told = r->cb;
    r->cb = on_read;
    result = source_read(g->below, r);
    if (result < 0)
        r->cb = r->told;
    else
        g->nreading[r->generation]++;
    return result;
}

/* True: any of them was not given back yet. A whole disk may be named, and named again: eight at a time. */
static bool mark_given(struct giveback *g, uint64_t first, uint64_t last)
{
    uint8_t all = UINT8_MAX;
    bool any = false;

    for (; first < last && first % 8 != 0; first++) {
        any |= !is_given(g, first);
        g->given[first / 8] |= (uint8_t)(1u << first % 8);
    }
    for (uint64_t i = first / 8; i < last / 8; i++) {
        all &= g->given[i];
        g->given[i] = UINT8_MAX;
    }
    for (first = MAX(first, last / 8 * 8); first < last; first++) {
        any |= !is_given(g, first);
        g->given[first / 8] |= (uint8_t)(1u << first % 8);
    }
    return any || all != UINT8_MAX;
}

static void giveback_give(struct source *s, uint64_t offset, uint64_t length)
{
    struct giveback *g = to_giveback(s);
    uint64_t first = offset / g->cluster + (offset % g->cluster != 0), last = (offset + length) / g->cluster;

    first = MAX(first, 1);
    last = MIN(last, g->nclusters);
    if (first < last && mark_given(g, first, last))
        add_range(g, (struct range){first * g->cluster, last * g->cluster});
}

static void on_below_closed(void *arg)
{
    part_closed(arg);
}

static void on_timer_closed(uv_handle_t *h)
{
    part_closed(container_of((uv_timer_t *)h, struct giveback, timer));
}

static void giveback_close(struct source *s, source_close_cb cb, void *arg)
{
    struct giveback *g = to_giveback(s);

    g->nclosing = 3;
    g->on_close = cb;
    g->close_arg = arg;
    uv_close((uv_handle_t *)&g->timer, on_timer_closed);
    upstream_close(&g->upstream);
    source_close(g->below, on_below_closed, g);
}

static const struct source_ops giveback_ops = {
    .read = giveback_read, .close = giveback_close, .give_back = giveback_give};

int giveback_new(uv_loop_t *loop, const struct source_nbd_config *export, uint32_t cluster, struct source *below,
                 struct source **ret_source)
{
    struct giveback *g;
    int r;

    if (cluster == 0 || cluster & (cluster - 1) || REQUEST_MAX % cluster)
        return -EINVAL;
    g = calloc(1, sizeof(*g));
    if (!g)
        return -ENOMEM;
    g->source = (struct source){.ops = &giveback_ops, .size = below->size, .lends = true /* what is below decides */};
    g->below = below;
    g->cluster = cluster;
    g->nclusters = below->size / cluster;
    g->given = calloc(g->nclusters / 8 + 1, 1);
    r = g->given ? upstream_start(&g->upstream, loop, &upstream_ops, export, /* context= */ NULL) : -ENOMEM;
    if (r < 0) {
        free(g->given);
        free(g);
        return r;
    }
    (void)uv_timer_init(loop, &g->timer); /* never fails */
    *ret_source = &g->source;
    return 0;
}

void giveback_begin(struct source *s)
{
    struct giveback *g = to_giveback(s);

    g->begun = true;
    pump(g);
}
