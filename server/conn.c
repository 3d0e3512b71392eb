/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conn_internal.h"

#include <assert.h>
#include <malloc.h>
#include <stdio.h>

static const char *const state_names[] = {
    [CONN_TALKING] = "TALKING",
    [CONN_FLUSHING] = "FLUSHING",
    [CONN_SHUT] = "SHUT",
    [CONN_CLOSING] = "CLOSING",
};
static_assert(ARRAY_SIZE(state_names) == CONN_CLOSING + 1, "a state without a name");

static uint64_t now_ms(const struct conn *c)
{
    return uv_now(c->set->loop);
}

static void set_state(struct conn *c, enum conn_state state)
{
    assert(state > c->state); /* only down */
    log_debug("c%llu: %s -> %s", (unsigned long long)c->id, state_names[c->state], state_names[state]);
    if (c->state == CONN_TALKING)
        c->set->nconns--;
    c->state = state;
}

/* -- the end ------------------------------------------------------------------------------------------------------- */
static size_t chunk_cost(const struct conn_chunk *chunk)
{
    return chunk->len + CONN_CHUNK_COST;
}

static void chunk_free(struct conn *c, struct conn_chunk *chunk)
{
    c->head_bytes -= chunk_cost(chunk);
    c->set->head_bytes -= chunk_cost(chunk);
    if (chunk->payload && chunk->payload->release)
        chunk->payload->release(chunk->payload);
    free(chunk);
}

static void drop_queue(struct conn *c)
{
    while (c->queue) {
        struct conn_chunk *chunk = c->queue;
        c->queue = chunk->next;
        chunk_free(c, chunk);
    }
    c->queue_last = NULL;
}

static void log_end(struct conn *c)
{
    static const char *const ends[] = {
        [NBD_END_DISC] = "done",
        [NBD_END_ABORT] = "the client gave up negotiating",
        [NBD_END_PROTOCOL] = "the client broke the protocol",
        [NBD_END_EOF] = "the client left without a word",
        [NBD_END_LOST] = "closed by us",
    };
    double seconds = (double)(uv_hrtime() - c->born_ns) / 1e9;
    const char *colon = c->why.err ? ": " : "", *why = c->why.err ? c->why.text : "";

    if (c->quiet)
        return;
    if (c->export_name)
        log_info("c%llu leaves %s: %s%s%s; %llu bytes served in %.1f s%s", (unsigned long long)c->id, c->export_name,
                 ends[c->end], colon, why, (unsigned long long)(c->pulling ? c->pull.nbytes : 0), seconds,
                 c->pulling && c->pull.read_failed ? ", with read errors" : "");
    else
        log_info("c%llu leaves: %s%s%s; after %.1f s", (unsigned long long)c->id, ends[c->end], colon, why, seconds);
}

static void note_end(struct conn *c, enum nbd_end end, const struct failure *why)
{
    c->end = end;
    c->end_ms = now_ms(c);
    if (why)
        c->why = *why;
    log_end(c);
}

/* From here on nothing goes out any more; what is with libuv comes back with an error or when the socket is closed. */
static void shut(struct conn *c, bool await_eof)
{
    set_state(c, CONN_SHUT);
    c->await_eof = await_eof && !c->input_eof;
    c->shut_ms = now_ms(c);
    conn_ask_forget(c);
    if (c->pulling)
        pull_drop(&c->pull);
    c->unmapped = NULL;
    nbd_free(TAKE_PTR(c->nbd));
    drop_queue(c);
    if (c->tls)
        tls_stop(c->tls);
}

void conn_kill(struct conn *c, int err, const char *fmt, ...)
{
    struct failure why = {0};
    char text[sizeof why.text];
    uv_os_fd_t fd;
    va_list ap;

    if (c->state >= CONN_SHUT) {
        c->await_eof = false;
        return;
    }
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    (void)failure_set(&why, err, "%s", text);
    if (c->state == CONN_TALKING)
        note_end(c, NBD_END_LOST, &why);
    else
        log_debug("c%llu: %s", (unsigned long long)c->id, text);
    /* A good end that could not be flushed stays a good end: the client said DISC after it had all its answers. */
    shut(c, /* await_eof= */ false);
    if (uv_fileno(&c->sock.handle, &fd) == 0)
        (void)shutdown(
            fd, SHUT_RDWR); /* the peer learns at once, even while we wait for the source; a dead socket refuses */
}

static void on_closed(uv_handle_t *handle)
{
    struct conn *c = handle->data;
    struct conn_set *s = c->set;

    if (c->tls && c->batch) /* tls_stop() left it to us */
        conn_batch_done(c, UV_ECANCELED);
    tls_free(c->tls);
    assert(!c->queue && !c->batch && c->stay_state == STAY_NONE);
    if (c->pulling)
        pull_done(&c->pull);
    fair_leave(&c->fair);
    access_who_done(&c->who);
    conn_ask_done(c);
    *(c->prev ? &c->prev->next : &s->first) = c->next;
    *(c->next ? &c->next->prev : &s->last) = c->prev;
    free(c);
    if (--s->nopen == 0) {
        (void)uv_timer_stop(&s->tick);
        budget_done(&s->budget); /* the spare pieces; glibc keeps what is freed unless it is told */
        if (s->tls)
            tls_server_trim(s->tls);
        (void)malloc_trim(0);
        if (s->on_empty)
            s->on_empty(s->arg);
    }
}

static void on_shutdown(uv_shutdown_t *req, int status)
{
    struct conn *c = req->data;

    c->shutting = false;
    conn_settle(c);
}

/* -- output -------------------------------------------------------------------------------------------------------- */
static void conn_output(struct conn *c);

void conn_batch_done(struct conn *c, int status)
{
    struct conn_chunk *done = TAKE_PTR(c->batch), *next;

    if (status < 0 && status != UV_ECANCELED) /* else we are closing */
        conn_kill(c, status, "sending failed: %s", uv_strerror(status));
    /* A release may bring new data, and with it the next batch. */
    for (; done; done = next) {
        next = done->next;
        chunk_free(c, done);
    }
    if (status == 0) {
        c->active_ms = c->progress_ms = now_ms(c);
        conn_output(c);
    }
}

static void on_written(uv_write_t *req, int status)
{
    struct conn *c = req->data;

    conn_batch_done(c, status);
    conn_settle(c);
}

/* What is left to be sent of a chunk: the number of vectors, at most two. */
static unsigned chunk_bufs(struct conn_chunk *chunk, uv_buf_t *bufs)
{
    size_t head = MIN(chunk->sent, chunk->len), payload = chunk->sent - head;
    unsigned n = 0;

    if (head < chunk->len)
        bufs[n++] = uv_buf_init(chunk->head + head, (unsigned)(chunk->len - head));
    if (chunk->payload)
        bufs[n++] = uv_buf_init((char *)chunk->payload->data + payload, (unsigned)(chunk->payload->len - payload));
    return n;
}

/* Hands the next batch to libuv, or to TLS. One batch at a time: what comes meanwhile makes up the next one. */
static void conn_output(struct conn *c)
{
    struct conn_chunk **at = &c->queue;
    size_t bytes = 0;
    unsigned n = 0, nchunks = 0;
    int r;

    if (c->batch || !c->queue || (c->tls && tls_state(c->tls) != TLS_UP))
        return;
    while (*at && nchunks < CONN_BATCH_CHUNKS && bytes < CONN_BATCH_BYTES) {
        struct conn_chunk *chunk = *at;
        for (unsigned end = n + chunk_bufs(chunk, c->bufs + n); n < end; n++)
            bytes += c->bufs[n].len;
        nchunks++;
        at = &chunk->next;
    }
    c->batch = c->queue;
    c->queue = *at;
    *at = NULL;
    if (!c->queue)
        c->queue_last = NULL;
    c->submitted += bytes;
    c->progress_ms = now_ms(c);
    if (c->tls) {
        tls_write(c->tls, c->bufs, n);
        return;
    }
    c->write.data = c;
    r = uv_write(&c->write, &c->sock.stream, c->bufs, n, on_written);
    /* Fails for want of memory only; the chunks return to the queue, and the deadline for unsent bytes ends it. */
    if (r < 0) {
        *at = c->queue;
        c->queue = TAKE_PTR(c->batch);
        for (c->queue_last = c->queue; c->queue_last->next; c->queue_last = c->queue_last->next)
            ;
        c->submitted -= bytes;
    }
}

/*
 * Sends what is worth a system call of its own straight away, as far as the socket takes it: its memory is free again
 * before the next reply comes, and the loop need not turn for it. Returns how many bytes went.
 */
static size_t send_now(struct conn *c, const void *head, size_t len, const struct nbd_payload *payload)
{
    uv_buf_t bufs[2];
    unsigned n = 0;
    int sent;

    /* Nothing goes past TLS, from the moment on in which it was asked for. */
    if (c->tls || c->tls_wanted || c->queue || c->batch || c->state >= CONN_SHUT ||
        (payload ? payload->len : len) < CONN_NOW_LEAST)
        return 0;
    if (len > 0)
        bufs[n++] = uv_buf_init((char *)head, (unsigned)len);
    if (payload)
        bufs[n++] = uv_buf_init((char *)payload->data, (unsigned)payload->len);
    sent = uv_try_write(&c->sock.stream, bufs, n);
    if (sent <= 0)
        return 0; /* what went wrong comes again when it is written in its turn */
    c->submitted += (size_t)sent;
    c->active_ms = c->progress_ms = now_ms(c);
    return (size_t)sent;
}

static void on_nbd_send(void *arg, const void *head, size_t len, struct nbd_payload *payload)
{
    struct conn *c = arg;
    size_t sent = send_now(c, head, len, payload);
    struct conn_chunk *chunk;

    if (sent > 0 && sent == len + (payload ? payload->len : 0)) {
        if (payload && payload->release)
            payload->release(payload);
        return;
    }
    chunk = c->state < CONN_SHUT ? malloc(sizeof *chunk + len) : NULL;
    if (!chunk) {
        /* Without this chunk the stream makes no sense any more: the client must not see what comes behind it. */
        if (payload && payload->release)
            payload->release(payload);
        c->broken = true;
        return;
    }
    *chunk = (struct conn_chunk){.payload = payload, .len = len, .sent = sent};
    if (len > 0)
        memcpy(chunk->head, head, len);
    if (c->queue_last)
        c->queue_last->next = chunk;
    else
        c->queue = chunk;
    c->queue_last = chunk;
    c->head_bytes += chunk_cost(chunk);
    c->set->head_bytes += chunk_cost(chunk);
    conn_output(c);
}

/* -- input --------------------------------------------------------------------------------------------------------- */
/*
 * Requests are fed one by one, so that a full input buffer cannot make us queue more than the limits say, and nbd
 * answers nothing (errors, maps) in the middle of a reply that must stay in one piece.
 */
#define FEED_STEP 28 /* bytes: the shortest request (spec: compact header), so that no step brings two of them */

static bool may_feed(const struct conn *c)
{
    return c->state == CONN_TALKING && !c->tls_wanted && !conn_is_full(c) && !c->parked && !c->unmapped &&
           nbd_inflight(c->nbd) < CONN_MAX_REQUESTS && !(c->pulling && pull_reply_is_open(&c->pull));
}

bool conn_is_full(const struct conn *c)
{
    return c->head_bytes >= (c->set->head_bytes < CONN_UNSENT_TOTAL ? CONN_MAX_UNSENT : CONN_LEAST_UNSENT);
}

/* All that came before is with nbd, and looked at: what comes next, be it the end, has its turn. */
static bool has_room(const struct conn *c)
{
    return c->input_len == 0 && may_feed(c) && !nbd_has_more(c->nbd);
}

/* Gives nbd what is in the input buffer, as far as it may have it, and as far as this client's turn goes. */
static void conn_input(struct conn *c)
{
    unsigned left_of_turn = FAIR_REQUESTS;
    bool alone = fair_is_alone(&c->set->fair);

    while (may_feed(c) && (c->input_at < c->input_len || nbd_has_more(c->nbd))) {
        if (!alone && (!c->has_turn || left_of_turn-- == 0)) {
            fair_queue(&c->fair);
            break;
        }
        bool more = nbd_has_more(c->nbd);
        size_t left = c->input_len - c->input_at;
        size_t taken =
            nbd_feed(c->nbd, c->input + c->input_at, nbd_in_transmission(c->nbd) ? MIN(left, FEED_STEP) : left);
        c->input_at += taken;
        if (taken == 0 && !more)
            break;
    }
    c->has_turn = false;
    if (c->input_at == c->input_len)
        c->input_at = c->input_len = 0;
}

static void on_turn(struct fair_member *m)
{
    struct conn *c = container_of(m, struct conn, fair);

    c->has_turn = true;
    conn_settle(c);
    c->has_turn = false;
}

static void on_may_read(struct fair_member *m)
{
    struct conn *c = container_of(m, struct conn, fair);

    if (c->pulling)
        pull_go_on(&c->pull);
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
    struct conn *c = handle->data;

    *buf = c->tls && c->state == CONN_TALKING ? tls_room(c->tls) : uv_buf_init(c->input, sizeof c->input);
}

static void on_read(uv_stream_t *stream, ssize_t nread, const uv_buf_t *buf)
{
    struct conn *c = stream->data;

    if (nread == 0)
        return;
    if (nread < 0) {
        (void)uv_read_stop(stream);
        c->reading = false;
        c->input_eof = true;
        c->await_eof = false;
        if (nread != UV_EOF)
            conn_kill(c, (int)nread, "the connection broke: %s", uv_strerror((int)nread));
        else if (c->state == CONN_TALKING && c->tls)
            tls_received_eof(c->tls);
        else if (c->state == CONN_TALKING)
            nbd_feed_eof(c->nbd);
    } else if (c->state == CONN_TALKING && c->tls) {
        tls_received(c->tls, (size_t)nread);
    } else if (c->state == CONN_TALKING) {
        /* A request counts when it is whole: a client that sends one byte now and then asks for nothing. */
        c->input_at = 0;
        c->input_len = (size_t)nread;
        conn_input(c);
    }
    conn_settle(c);
}

static void set_reading(struct conn *c, bool wanted)
{
    if (c->reading == wanted || c->input_eof)
        return;
    if (wanted)
        wanted = uv_read_start(&c->sock.stream, on_alloc, on_read) == 0;
    else
        (void)uv_read_stop(&c->sock.stream);
    c->reading = wanted;
}

/* -- nbd's callbacks ----------------------------------------------------------------------------------------------- */
static void on_nbd_ask(void *arg, const struct nbd_ask *ask)
{
    conn_ask(arg, ask);
}

static void on_nbd_request(void *arg, struct nbd_request *r)
{
    struct conn *c = arg;

    c->active_ms = now_ms(c);
    /* What is asked for when the memory of all is short is answered in small parts. */
    c->pull.max_extents = c->set->head_bytes < CONN_UNSENT_TOTAL / 2 ? SIZE_MAX : CONN_EXTENTS_SHORT;
    if (r->command == NBD_COMMAND_STATUS && !c->mapped)
        c->unmapped = r;
    else
        pull_request(&c->pull, r);
}

static void on_nbd_hangup(void *arg, enum nbd_end end, const struct failure *why)
{
    struct conn *c = arg;

    note_end(c, end, c->hushed ? NULL : why);
    set_state(c, CONN_FLUSHING);
}

static void on_nbd_starttls(void *arg)
{
    conn_tls_starttls(arg);
}

static const struct nbd_ops nbd_ops = {
    .ask = on_nbd_ask,
    .request = on_nbd_request,
    .send = on_nbd_send,
    .hangup = on_nbd_hangup,
    .starttls = on_nbd_starttls,
};

/* A handshake has nothing to do with nbd; else what comes must have somewhere to go. */
static bool wants_bytes(const struct conn *c)
{
    if (c->tls && tls_room(c->tls).len == 0)
        return false;
    return c->tls && tls_state(c->tls) == TLS_HANDSHAKE ? true : has_room(c);
}

/* -- moving on ----------------------------------------------------------------------------------------------------- */
void conn_settle(struct conn *c)
{
    if (c->broken)
        conn_kill(c, -ENOMEM, "out of memory");
    if (c->state == CONN_TALKING) {
        if (c->parked && !conn_is_full(c))
            conn_ask_parked(c);
        conn_ask_mapped(c);
        conn_input(c);
        conn_limit_settle(c);
        conn_tls_settle(c);
        while (c->tls && has_room(c) && conn_tls_input(c))
            conn_input(c);
        if (c->broken)
            conn_kill(c, -ENOMEM, "out of memory");
    }
    if (c->state == CONN_TALKING) {
        set_reading(c, wants_bytes(c));
        return;
    }
    if (c->state == CONN_FLUSHING) {
        conn_tls_settle(c);
        conn_ask_forget(c);
    }
    if (!conn_try_leave(c) && c->state > CONN_FLUSHING)
        return;
    if (c->state == CONN_FLUSHING && c->tls && !conn_is_sending(c))
        tls_bye(c->tls);
    if (c->state == CONN_FLUSHING && !conn_is_sending(c)) {
        /* A client that we hang up on may still be sending: closing now would take our last words from it (RST). */
        bool await_eof = c->end != NBD_END_DISC && c->end != NBD_END_EOF;

        shut(c, await_eof);
        c->shutdown.data = c;
        c->shutting = uv_shutdown(&c->shutdown, &c->sock.stream, on_shutdown) == 0;
        if (c->await_eof)
            set_reading(c, true);
    }
    if (c->state == CONN_SHUT && !c->shutting && !c->await_eof && conn_try_leave(c) &&
        !(c->tls && tls_is_busy(c->tls))) {
        set_state(c, CONN_CLOSING);
        uv_close(&c->sock.handle, on_closed);
    }
}

/* -- every CONN_TICK_MS ----------------------------------------------------------------------------------------------
 */
static void on_tick(uv_timer_t *timer)
{
    struct conn_set *s = timer->data;

    /* Connections are freed by close callbacks only, so the list stands still here. */
    for (struct conn *c = s->first; c; c = c->next) {
        conn_care(c);
        conn_settle(c);
    }
    if (s->nsilent > 0 && uv_now(s->loop) - s->complained_ms >= LISTEN_COMPLAIN_MS) {
        log_warning("%llu more connections were refused: all %u are taken", (unsigned long long)s->nsilent,
                    s->config->max_connections);
        s->nsilent = 0;
        s->complained_ms = uv_now(s->loop);
    }
}

/* -- the beginning ------------------------------------------------------------------------------------------------- */
static void complain(struct conn_set *s)
{
    s->nrefused++;
    if (uv_now(s->loop) - s->complained_ms < LISTEN_COMPLAIN_MS) {
        s->nsilent++;
        return;
    }
    s->complained_ms = uv_now(s->loop);
    log_warning("a connection was refused: all %u are taken", s->config->max_connections);
}

static struct conn *conn_new(struct conn_set *s, uv_handle_type type)
{
    struct conn *c = calloc(1, sizeof *c);
    int r;

    if (!c)
        return NULL;
    c->set = s;
    c->id = ++s->next_id;
    c->born_ns = uv_hrtime();
    c->since_ms = c->active_ms = c->progress_ms = uv_now(s->loop);
    r = type == UV_NAMED_PIPE ? uv_pipe_init(s->loop, &c->sock.pipe, /* ipc= */ 0) : uv_tcp_init(s->loop, &c->sock.tcp);
    if (r < 0) {
        free(c);
        return NULL;
    }
    c->sock.handle.data = c;
    c->fair.on_requests = on_turn;
    c->fair.on_read = on_may_read;
    c->prev = s->last;
    *(s->last ? &s->last->next : &s->first) = c;
    s->last = c;
    s->nconns++;
    if (s->nopen++ == 0)
        (void)uv_timer_start(&s->tick, on_tick, CONN_TICK_MS, CONN_TICK_MS);
    return c;
}

int conn_accept(struct conn_set *s, uv_stream_t *listener)
{
    bool room = conn_limit_make_room(s);
    struct conn *c;
    char from[128];
    int r;

    conn_limit_farewells(s);
    c = conn_new(s, listener->type);
    if (!c)
        return -ENOMEM;
    r = uv_accept(listener, &c->sock.stream);
    if (r < 0) {
        conn_kill(c, r, "accepting failed: %s", uv_strerror(r));
        conn_settle(c);
        return 0;
    }
    s->ntotal++;
    if (!room) {
        complain(s);
        c->quiet = true;
        conn_kill(c, -EUSERS, "all connections are taken");
        conn_settle(c);
        return 0;
    }
    r = conn_identify(c, from, sizeof from);
    if (r == 0)
        r = nbd_new(&nbd_ops, c, &c->nbd);
    if (r < 0) {
        conn_kill(c, r, "nobody knows who it is: %s", strerror(-r));
        conn_settle(c);
        return 0;
    }
    memcpy(c->identity, c->origin, sizeof c->origin);
    c->quiet = !conn_limit_line(s);
    if (!c->quiet)
        log_info("c%llu connected: %s", (unsigned long long)c->id, from);
    conn_limit_check(c);
    conn_tls_offer(c);
    nbd_start(c->nbd);
    conn_settle(c);
    return 0;
}
