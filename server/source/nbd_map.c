/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/nbd.h"

#include "source/upstream.h"

/*
 * One block status request's length, aligned to every cluster and granularity. For a bitmap QEMU answers from memory:
 * as much as the protocol's 32 bits can say. For other
 * contexts it looks into the image, some 2 to 8 ms for 1 GiB, and its main loop does nothing else meanwhile: neither
 * for the guest nor for who reads data just then.
 */
#define MAP_STEP_BITMAP ((UINT64_C(1) << 32) - (UINT64_C(1) << 26))
#define MAP_STEP (UINT64_C(1) << 28)
#define MAP_BITMAPS "qemu:dirty-bitmap:"

/* Runs that we keep, at 12 bytes and some slack each. 4 TiB in which every other 64 KiB differs; the guest decides
 * that. */
#define MAP_RUNS_MAX ((size_t)32 << 20)

struct source_nbd_map {
    struct upstream upstream;
    struct map *map;   /* owned until cb */
    char *context;     /* owned */
    uint64_t size;     /* bytes of the export */
    uint64_t step;     /* bytes of one question */
    uint64_t since_ms; /* upstream_now() of the request in flight */
    bool flying;       /* a request is */
    bool reported;     /* our context's extents of the request in flight came */
    bool closing;
    int err; /* what stopped the request */
    struct failure why;
    source_nbd_map_cb cb;
    void *arg;
};

static struct source_nbd_map *of_upstream(const struct upstream *u)
{
    return container_of(u, struct source_nbd_map, upstream);
}

static void map_op_freep(struct source_nbd_map **m)
{
    if (!*m)
        return;
    map_free((*m)->map);
    free((*m)->context);
    free(*m);
}

/* The last extent may reach past what was asked for and past the disk's end (spec: NBD_REPLY_TYPE_BLOCK_STATUS). */
static void take_extent(struct source_nbd_map *m, uint64_t length, uint64_t flags)
{
    uint64_t left = m->size - map_length(m->map);

    if (m->err < 0 || left == 0)
        return;
    m->err = length == 0                         ? -EPROTO
             : map_nruns(m->map) >= MAP_RUNS_MAX ? -EFBIG
                                                 : map_append(m->map, MIN(length, left), flags);
}

/* Whether these extents are what was asked for; a context is reported once per request. */
static bool expect_extents(struct source_nbd_map *m, const char *context, size_t n)
{
    if (strcmp(context, m->context) != 0)
        return false;
    if (m->reported || n == 0)
        m->err = m->err < 0 ? m->err : -EPROTO;
    m->reported = true;
    return m->err == 0;
}

/* Inside libnbd, as is on_answered(). */
#ifdef LIBNBD_HAVE_NBD_AIO_BLOCK_STATUS_64
static int on_extents(void *arg, const char *context, uint64_t offset, nbd_extent *entries, size_t n, int *error)
{
    struct source_nbd_map *m = arg;

    if (expect_extents(m, context, n)) {
        for (size_t i = 0; i < n; i++)
            take_extent(m, entries[i].length, entries[i].flags);
    }
    return 0;
}
#else
/* entries are pairs of length and flags; n counts words. */
static int on_extents(void *arg, const char *context, uint64_t offset, uint32_t *entries, size_t n, int *error)
{
    struct source_nbd_map *m = arg;

    if (expect_extents(m, context, n)) {
        for (size_t i = 0; i + 1 < n; i += 2)
            take_extent(m, entries[i], entries[i + 1]);
    }
    return 0;
}
#endif

static int on_answered(void *arg, int *error)
{
    struct source_nbd_map *m = arg;

    m->flying = false;
    if (*error && m->err == 0)
        m->err = -EIO;
    return 1;
}

/* The map is complete, or m->why says why there is none. */
static void finish(struct source_nbd_map *m)
{
    m->closing = true;
    upstream_close(&m->upstream);
}

static void fail(struct source_nbd_map *m, int err, const char *sentence)
{
    char text[256];

    (void)snprintf(text, sizeof(text), "context %.128s at offset %llu: %s", m->context,
                   (unsigned long long)map_length(m->map), sentence); /* cutting a sentence short is fine */
    upstream_failure(&m->upstream, &m->why, err, text);
    finish(m);
}

static void ask(struct source_nbd_map *m)
{
    uint64_t offset = map_length(m->map), length = MIN(m->step, m->size - offset);
    nbd_completion_callback done = {.callback = on_answered, .user_data = m};
    int64_t r;

    m->flying = true;
    m->reported = false;
    m->since_ms = upstream_now();
#ifdef LIBNBD_HAVE_NBD_AIO_BLOCK_STATUS_64
    nbd_extent64_callback extents = {.callback = on_extents, .user_data = m};

    r = nbd_aio_block_status_64(m->upstream.nbd, length, offset, extents, done, 0);
#else
    nbd_extent_callback extents = {.callback = on_extents, .user_data = m};

    r = nbd_aio_block_status(m->upstream.nbd, length, offset, extents, done, 0);
#endif
    if (r < 0) {
        upstream_failure(&m->upstream, &m->why, -EIO, NULL);
        finish(m);
        return;
    }
    upstream_sent(&m->upstream);
}

static void on_moved(struct upstream *u)
{
    struct source_nbd_map *m = of_upstream(u);

    if (m->flying)
        return;
    switch (m->err) {
    case 0:
        break;
    case -EIO:
        fail(m, m->err, "the server failed to tell the block status");
        return;
    case -EFBIG:
        fail(m, m->err, "the disk is too fragmented to keep a map of it");
        return;
    case -ENOMEM:
        fail(m, m->err, "no memory for the map");
        return;
    default:
        fail(m, m->err, "the server's block status makes no sense");
        return;
    }
    if (!m->reported)
        fail(m, -EPROTO, "the server's block status says nothing about it");
    else if (map_length(m->map) == m->size)
        finish(m);
    else
        ask(m);
}

static void on_up(struct upstream *u)
{
    struct source_nbd_map *m = of_upstream(u);
    int64_t size = nbd_get_size(u->nbd);

    if (size < 0 || (uint64_t)size > INT64_MAX) {
        upstream_failure(u, &m->why, -EPROTO, NULL);
        finish(m);
        return;
    }
    m->size = (uint64_t)size;
    if (nbd_can_meta_context(u->nbd, m->context) != 1)
        fail(m, -ENOENT, "the export has no such metadata context");
    else if (size == 0)
        finish(m);
    else
        ask(m);
}

static void on_down(struct upstream *u, const struct failure *why)
{
    struct source_nbd_map *m = of_upstream(u);

    (void)failure_copy(&m->why, why);
    finish(m);
}

static void on_closed(struct upstream *u)
{
    _cleanup_(map_op_freep) struct source_nbd_map *m = of_upstream(u);
    struct map *map = m->why.err ? NULL : TAKE_PTR(m->map);

    m->cb(m->arg, map, map ? NULL : &m->why);
}

static uint64_t oldest(const struct upstream *u)
{
    const struct source_nbd_map *m = of_upstream(u);

    return m->flying ? m->since_ms : UPSTREAM_IDLE;
}

static const struct upstream_ops upstream_ops = {
    .up = on_up,
    .moved = on_moved,
    .down = on_down,
    .closed = on_closed,
    .oldest = oldest,
};

int source_nbd_map(uv_loop_t *loop, const struct source_nbd_config *config, const char *context, source_nbd_map_cb cb,
                   void *arg, struct source_nbd_map **ret_map)
{
    _cleanup_(map_op_freep) struct source_nbd_map *m = calloc(1, sizeof(*m));
    int r;

    if (!m)
        return -ENOMEM;
    m->cb = cb;
    m->arg = arg;
    m->step = strncmp(context, MAP_BITMAPS, strlen(MAP_BITMAPS)) == 0 ? MAP_STEP_BITMAP : MAP_STEP;
    m->context = strdup(context);
    if (!m->context)
        return -ENOMEM;
    r = map_new(&m->map);
    if (r < 0)
        return r;
    r = upstream_start(&m->upstream, loop, &upstream_ops, config, context);
    if (r < 0)
        return r;
    if (ret_map)
        *ret_map = m;
    TAKE_PTR(m);
    return 0;
}

void source_nbd_map_cancel(struct source_nbd_map *m)
{
    if (m->closing)
        return; /* the callback is on its way */
    failure_set(&m->why, -ECANCELED, "reading the map was cancelled");
    finish(m);
}
