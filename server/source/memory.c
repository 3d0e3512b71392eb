/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/memory.h"

#include "source/read_list.h"

enum memory_state {
    MEMORY_OPEN,    /* serves reads */
    MEMORY_LOSING,  /* refuses reads; the idle callback answers those in flight and tells the owner: -> LOST */
    MEMORY_LOST,    /* refuses reads, nothing in flight; waits for source_close() */
    MEMORY_CLOSING, /* source_close() was called; the handle's close callback answers the rest and frees */
};

struct memory_source {
    struct source source;
    enum memory_state state;
    bool hold;
    const unsigned char *data; /* borrowed until closed */
    struct read_list reads;
    uv_idle_t idle; /* active while there is something to tell */
    source_lost_cb on_lost;
    void *lost_arg;
    source_close_cb on_close;
    void *close_arg;
};

static struct memory_source *to_memory(struct source *s)
{
    return container_of(s, struct memory_source, source);
}

/* Answers what is queued now, until a callback closes, loses or holds the source: then that goes on in another way. */
static void memory_answer(struct memory_source *s, int err)
{
    enum memory_state state = s->state;
    struct read_list reads = s->reads;
    struct source_read *r;

    /* Reads that a callback starts wait for the next round, so that a busy caller cannot keep the loop here. */
    s->reads = (struct read_list){0};
    while (s->state == state && !(s->hold && err == 0) && (r = read_list_pop(&reads))) {
        if (err == 0)
            memcpy(r->buffer, s->data + r->offset, r->length);
        r->cb(r, err);
    }
    while ((r = read_list_pop(&reads)))
        read_list_append(&s->reads, r);
}

static void on_idle(uv_idle_t *idle)
{
    struct memory_source *s = container_of(idle, struct memory_source, idle);
    struct failure why = {0};

    if (s->state == MEMORY_OPEN) {
        memory_answer(s, 0);
        if (s->state == MEMORY_OPEN && (s->hold || !s->reads.first))
            (void)uv_idle_stop(idle); /* never fails */
        return;
    }
    memory_answer(s, -EIO);
    if (s->state != MEMORY_LOSING)
        return;
    s->state = MEMORY_LOST;
    (void)uv_idle_stop(idle); /* never fails */
    failure_set(&why, -EIO, "the memory source was told to lose its data");
    if (s->on_lost)
        s->on_lost(s->lost_arg, &why);
}

/* Starting an initialised idle handle that has a callback does not fail. */
static void memory_wake(struct memory_source *s)
{
    (void)uv_idle_start(&s->idle, on_idle);
}

static int memory_read(struct source *source, struct source_read *r)
{
    struct memory_source *s = to_memory(source);

    if (s->state != MEMORY_OPEN)
        return -ENOTCONN;
    read_list_append(&s->reads, r);
    if (!s->hold)
        memory_wake(s);
    return 0;
}

static void on_closed(uv_handle_t *handle)
{
    struct memory_source *s = container_of((uv_idle_t *)handle, struct memory_source, idle);
    source_close_cb on_close = s->on_close;
    void *arg = s->close_arg;

    memory_answer(s, -ECANCELED);
    free(s);
    if (on_close)
        on_close(arg);
}

static void memory_close(struct source *source, source_close_cb cb, void *arg)
{
    struct memory_source *s = to_memory(source);

    s->state = MEMORY_CLOSING;
    s->on_close = cb;
    s->close_arg = arg;
    uv_close((uv_handle_t *)&s->idle, on_closed);
}

static const struct source_ops memory_ops = {.read = memory_read, .close = memory_close};

int source_memory_new(uv_loop_t *loop, const void *data, uint64_t size, source_lost_cb on_lost, void *arg,
                      struct source **ret_source)
{
    struct memory_source *s = calloc(1, sizeof(*s));

    if (!s)
        return -ENOMEM;
    s->source = (struct source){.ops = &memory_ops, .size = size};
    s->data = data;
    s->on_lost = on_lost;
    s->lost_arg = arg;
    (void)uv_idle_init(loop, &s->idle); /* never fails */
    *ret_source = &s->source;
    return 0;
}

void source_memory_hold(struct source *source, bool hold)
{
    struct memory_source *s = to_memory(source);

    s->hold = hold;
    if (s->state == MEMORY_OPEN && hold)
        (void)uv_idle_stop(&s->idle); /* never fails */
    else if (s->state == MEMORY_OPEN && s->reads.first)
        memory_wake(s);
}

void source_memory_lose(struct source *source)
{
    struct memory_source *s = to_memory(source);

    if (s->state != MEMORY_OPEN)
        return;
    s->state = MEMORY_LOSING;
    memory_wake(s);
}
