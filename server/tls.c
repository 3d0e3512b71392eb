/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "tls_internal.h"

#include <assert.h>
#include <errno.h>

#define RECORD_MAX 16384u /* bytes of plain text; RFC 8446 5.1 */
#define BOX_SLACK 8192u   /* bytes: headers and tags of the records of one part, unless a client wants tiny ones */

/* -- boxes --------------------------------------------------------------------------------------------------------- */
static struct tls_box *box_new(size_t size)
{
    struct tls_box *box = calloc(1, sizeof *box);

    if (!box)
        return NULL;
    box->data = malloc(size);
    if (!box->data) {
        free(box);
        return NULL;
    }
    box->size = size;
    return box;
}

static void box_free(struct tls_box *box)
{
    if (box)
        free(box->data);
    free(box);
}

/* Counts it; every box comes through here before it waits for the socket. */
static void box_charge(struct tls_server *s, struct tls_box *box)
{
    s->sealed += box->size - box->charged;
    box->charged = box->size;
}

static struct tls_box *box_take(struct tls_server *s, size_t part)
{
    size_t size = part + TLS_INLINE + BOX_SLACK;
    struct tls_box *box;

    if (part == TLS_PART && s->spare) {
        box = s->spare;
        s->spare = box->next;
        s->nspare--;
        box->next = NULL;
        box->at = box->len = 0;
    } else {
        box = box_new(size);
    }
    if (box)
        box_charge(s, box);
    return box;
}

static void box_give(struct tls_server *s, struct tls_box *box)
{
    if (!box)
        return;
    s->sealed -= box->charged;
    box->charged = 0;
    if (box->size != TLS_PART + TLS_INLINE + BOX_SLACK || s->nspare == TLS_SPARE_BOXES) {
        box_free(box);
        return;
    }
    box->next = s->spare;
    s->spare = box;
    s->nspare++;
}

/* -- gnutls' transport: memory, on whichever thread has the session ------------------------------------------------ */
static ssize_t on_pull(gnutls_transport_ptr_t arg, void *to, size_t len)
{
    struct tls *t = arg;

    len = MIN(len, t->in_len - t->in_at);
    if (len == 0) {
        gnutls_transport_set_errno(t->session, EAGAIN);
        return -1;
    }
    memcpy(to, t->in + t->in_at, len);
    t->in_at += len;
    if (t->in_at == t->in_len)
        t->in_at = t->in_len = 0;
    return (ssize_t)len;
}

static bool make_space(struct tls *t, size_t len)
{
    struct tls_box *box = t->out;
    uint8_t *data;
    size_t size;

    if (!box)
        box = t->out = box_new(MAX(len, 4096));
    if (!box)
        return false;
    if (box->size - box->len >= len)
        return true;
    size = MAX(box->size * 2, box->len + len);
    if (size > 2u * TLS_PART + TLS_HANDSHAKE_OUT)
        return false;
    data = realloc(box->data, size);
    if (!data)
        return false;
    box->data = data;
    box->size = size;
    return true;
}

static ssize_t on_push(gnutls_transport_ptr_t arg, const void *from, size_t len)
{
    struct tls *t = arg;

    if (!make_space(t, len)) {
        gnutls_transport_set_errno(t->session, ENOMEM);
        return -1;
    }
    memcpy(t->out->data + t->out->len, from, len);
    t->out->len += len;
    return (ssize_t)len;
}

/* -- on a worker --------------------------------------------------------------------------------------------------- */
static void explain(struct tls *t, int r)
{
    gnutls_datum_t words = {0};

    if (r == GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR &&
        gnutls_certificate_verification_status_print(gnutls_session_get_verify_cert_status(t->session), GNUTLS_CRT_X509,
                                                     &words, 0) == 0)
        (void)failure_set(&t->trouble, -EACCES, "the client's certificate is refused: %s", (const char *)words.data);
    else if (r == GNUTLS_E_FATAL_ALERT_RECEIVED)
        (void)failure_set(&t->trouble, -EPROTO, "the client ended TLS: %s",
                          gnutls_alert_get_name(gnutls_alert_get(t->session)));
    else if (t->job == TLS_JOB_HANDSHAKE)
        (void)failure_set(&t->trouble, -EPROTO, "the TLS handshake failed: %s", gnutls_strerror(r));
    else
        (void)failure_set(&t->trouble, -EPROTO, "TLS failed: %s", gnutls_strerror(r));
    gnutls_free(words.data);
}

static void shake_hands(struct tls *t)
{
    unsigned nalerts = 0;
    int r;

    do {
        r = gnutls_handshake(t->session);
    } while (r < 0 && r != GNUTLS_E_AGAIN && !gnutls_error_is_fatal(r) && ++nalerts < TLS_ALERTS_MAX);
    if (r == 0)
        r = tls_creds_identify(t);
    t->result = r;
    if (r == 0 || r == GNUTLS_E_AGAIN)
        return;
    explain(t, r);
    (void)gnutls_alert_send_appropriate(t->session, r); /* best effort: it has failed anyhow */
}

static int send_all(struct tls *t, const void *from, size_t len)
{
    const uint8_t *p = from;

    while (len > 0) {
        ssize_t n = gnutls_record_send(t->session, p, len);

        if (n < 0)
            return (int)n;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

/*
 * Seals the next t->part bytes of the batch: payload in full records from where it lies, the small things between in
 * records of their own.
 */
static int seal(struct tls *t)
{
    uint8_t stage[RECORD_MAX];
    size_t staged = 0;
    int r = 0;

    while (r == 0 && t->part > 0) {
        const uv_buf_t *b = &t->bufs[t->buf];
        size_t len = MIN(b->len - t->buf_at, t->part);
        const char *from = b->base + t->buf_at;

        if (len >= RECORD_MAX || len > RECORD_MAX - staged) {
            if (staged > 0)
                r = send_all(t, stage, staged);
            staged = 0;
        }
        if (r == 0 && len >= RECORD_MAX) {
            len -= len % RECORD_MAX;
            r = send_all(t, from, len);
        } else if (r == 0) {
            memcpy(stage + staged, from, len);
            staged += len;
        }
        t->part -= len;
        t->left -= len;
        t->buf_at += len;
        if (t->buf_at == b->len) {
            t->buf++;
            t->buf_at = 0;
        }
    }
    if (r == 0 && staged > 0)
        r = send_all(t, stage, staged);
    if (r < 0)
        explain(t, r);
    return r;
}

static void run_job(struct work *w)
{
    struct tls *t = container_of(w, struct tls, work);

    if (t->job == TLS_JOB_HANDSHAKE)
        shake_hands(t);
    else
        t->result = seal(t);
}

/* -- output -------------------------------------------------------------------------------------------------------- */
static void go_on(struct tls *t);

static void fail(struct tls *t, int err, const char *what, const char *why)
{
    if (err)
        (void)failure_set(&t->why, err, "%s: %s", what, why);
    else
        (void)failure_copy(&t->why, &t->trouble);
    if (t->state == TLS_HANDSHAKE && !t->stopped)
        t->server->nfailed++;
    t->state = TLS_FAILED;
    if (t->job != TLS_JOB_SEAL) /* else a worker reads it: on_job_done() */
        t->bufs = NULL;         /* the caller's again */
}

static void drop_queue(struct tls *t)
{
    while (t->queue) {
        struct tls_box *box = t->queue;
        t->queue = box->next;
        box_give(t->server, box);
    }
}

/* What gnutls has put out goes behind what waits. */
static void queue_out(struct tls *t)
{
    struct tls_box *box = TAKE_PTR(t->out), **at = &t->queue;

    if (!box)
        return;
    if (box->len == 0 || t->stopped) {
        box_give(t->server, box);
        return;
    }
    box_charge(t->server, box);
    while (*at)
        at = &(*at)->next;
    *at = box;
}

static void batch_taken(struct tls *t)
{
    t->bufs = NULL;
    t->ops->taken(t->arg);
}

static void write_boxes(struct tls *t, bool later);

static void on_written(uv_write_t *req, int status)
{
    struct tls *t = req->data;

    box_give(t->server, TAKE_PTR(t->writing));
    if (status < 0) {
        drop_queue(t);
        if (t->state != TLS_FAILED)
            fail(t, status, "sending failed", uv_strerror(status));
    } else if (!t->stopped) {
        write_boxes(t, /* later= */ false);
        if (t->state == TLS_UP && t->job == TLS_JOB_NONE && t->bufs && t->left == 0 && !t->writing)
            batch_taken(t);
        go_on(t);
    }
    t->ops->moved(t->arg);
}

/*
 * Gives the socket what it takes at once. later: the caller of ours must not hear of it before it has returned, so
 * libuv tells it.
 */
static void write_boxes(struct tls *t, bool later)
{
    while (t->queue && !t->writing && !t->stopped) {
        struct tls_box *box = t->queue;
        uv_buf_t buf = uv_buf_init((char *)box->data + box->at, (unsigned)(box->len - box->at));
        int r = later ? 0 : uv_try_write(t->stream, &buf, 1);

        if (r < 0 && r != UV_EAGAIN) {
            drop_queue(t);
            if (t->state != TLS_FAILED)
                fail(t, r, "sending failed", uv_strerror(r));
            return;
        }
        t->queue = box->next;
        box->next = NULL;
        box->at += r > 0 ? (size_t)r : 0;
        t->submitted += box->len;
        if (box->at == box->len) {
            box_give(t->server, box);
            continue;
        }
        t->writing = box;
        t->write.data = t;
        buf = uv_buf_init((char *)box->data + box->at, (unsigned)(box->len - box->at));
        r = uv_write(&t->write, t->stream, &buf, 1, on_written);
        if (r < 0) { /* for want of memory */
            box_give(t->server, TAKE_PTR(t->writing));
            fail(t, r, "sending failed", uv_strerror(r));
            return;
        }
    }
}

/* -- jobs ---------------------------------------------------------------------------------------------------------- */
static void on_job_done(struct work *w)
{
    struct tls *t = container_of(w, struct tls, work);
    enum tls_job job = t->job;
    bool bad;

    t->job = TLS_JOB_NONE;
    queue_out(t);
    if (t->stopped) {
        t->ops->moved(t->arg);
        return;
    }
    bad = job == TLS_JOB_SEAL ? t->result < 0 : t->result != 0 && t->result != GNUTLS_E_AGAIN;
    if (t->state == TLS_FAILED) {
        t->bufs = NULL; /* the socket broke meanwhile */
    } else if (bad) {
        fail(t, 0, NULL, NULL);
    } else if (job == TLS_JOB_SEAL) {
        /* The next part is sealed while the kernel copies this one. */
        if (t->left == 0)
            batch_taken(t);
        go_on(t);
    } else if (t->result == 0) {
        t->state = TLS_UP;
    } else if (t->in_eof && t->in_len == 0) {
        fail(t, -ECONNRESET, "the TLS handshake failed", "the client left in its middle");
    }
    write_boxes(t, /* later= */ false);
    go_on(t);
    t->ops->moved(t->arg);
}

static void submit(struct tls *t, enum tls_job job)
{
    t->job = job;
    t->work = (struct work){.run = run_job, .done = on_job_done};
    workers_submit(t->server->workers, &t->work);
}

static void go_on(struct tls *t)
{
    bool crowded = t->server->sealed >= TLS_SEALED_TOTAL;
    size_t most = crowded ? TLS_PART_SHORT : TLS_PART;

    if (t->job != TLS_JOB_NONE || t->stopped)
        return;
    if (t->state == TLS_HANDSHAKE && t->in_len > 0) {
        submit(t, TLS_JOB_HANDSHAKE);
        return;
    }
    if (t->state != TLS_UP || !t->bufs || t->left == 0 || t->writing || (t->queue && (crowded || t->queue->next)))
        return;
    t->part = t->left <= most + TLS_INLINE ? t->left : most; /* what is left of a batch is not worth a turn */
    if (t->part > TLS_INLINE) {
        t->out = box_take(t->server, most);
        submit(t, TLS_JOB_SEAL);
    } else if (!t->queue) {
        if (seal(t) < 0)
            fail(t, 0, NULL, NULL);
        queue_out(t);
        write_boxes(t, /* later= */ true);
    }
}

void tls_write(struct tls *t, const uv_buf_t *bufs, unsigned nbufs)
{
    assert(t->state == TLS_UP && !t->bufs);
    t->bufs = bufs;
    t->nbufs = nbufs;
    t->buf = 0;
    t->buf_at = t->left = 0;
    for (unsigned i = 0; i < nbufs; i++)
        t->left += bufs[i].len;
    assert(t->left > 0);
    go_on(t);
}

void tls_bye(struct tls *t)
{
    if (t->state != TLS_UP || t->bye_said || tls_is_sending(t) || tls_is_busy(t))
        return;
    t->bye_said = true;
    (void)gnutls_bye(t->session, GNUTLS_SHUT_WR); /* it goes to memory; what the client makes of it is not our matter */
    queue_out(t);
    write_boxes(t, /* later= */ true);
}

bool tls_is_sending(const struct tls *t)
{
    return t->job == TLS_JOB_SEAL || t->bufs || t->queue || t->writing;
}

uint64_t tls_progress(const struct tls *t)
{
    return t->submitted - uv_stream_get_write_queue_size(t->stream);
}

/* -- input --------------------------------------------------------------------------------------------------------- */
uv_buf_t tls_room(struct tls *t)
{
    if (t->job == TLS_JOB_HANDSHAKE) /* it is the worker's */
        return uv_buf_init(NULL, 0);
    if (t->in_at > 0) {
        memmove(t->in, t->in + t->in_at, t->in_len - t->in_at);
        t->in_len -= t->in_at;
        t->in_at = 0;
    }
    return uv_buf_init((char *)t->in + t->in_len, (unsigned)(sizeof t->in - t->in_len));
}

void tls_received(struct tls *t, size_t n)
{
    assert(t->job != TLS_JOB_HANDSHAKE && n <= sizeof t->in - t->in_len);
    t->in_len += n;
    t->barren += n;
    if (t->barren > TLS_BARREN_MAX && t->state != TLS_FAILED)
        fail(t, -EPROTO, t->state == TLS_HANDSHAKE ? "the TLS handshake failed" : "TLS failed",
             "the client says too much that is no data");
    go_on(t);
}

void tls_received_eof(struct tls *t)
{
    t->in_eof = true;
    if (t->state == TLS_HANDSHAKE && t->job == TLS_JOB_NONE && t->in_len == 0)
        fail(t, -ECONNRESET, "the TLS handshake failed", "the client left in its middle");
}

ssize_t tls_read(struct tls *t, void *to, size_t size)
{
    if (t->state != TLS_UP)
        return t->state == TLS_FAILED ? t->why.err : -EAGAIN;
    if (t->job != TLS_JOB_NONE || t->bye_said)
        return -EAGAIN;
    for (unsigned nalerts = 0; nalerts < TLS_ALERTS_MAX; nalerts++) {
        ssize_t n = gnutls_record_recv(t->session, to, size);

        if (t->out) { /* an alert */
            queue_out(t);
            write_boxes(t, /* later= */ true);
        }
        if (n > 0)
            t->barren = 0;
        if (n >= 0)
            return n;
        if (n == GNUTLS_E_AGAIN)
            return t->in_eof && t->in_len == 0 ? 0 : -EAGAIN;
        if (gnutls_error_is_fatal((int)n) || n == GNUTLS_E_REHANDSHAKE) {
            explain(t, (int)n);
            (void)gnutls_alert_send_appropriate(t->session, (int)n); /* best effort */
            queue_out(t);
            fail(t, 0, NULL, NULL);
            write_boxes(t, /* later= */ true);
            return t->why.err;
        }
    }
    fail(t, -EPROTO, "TLS failed", "the client sends alerts without end");
    return t->why.err;
}

/* -- life ---------------------------------------------------------------------------------------------------------- */
int tls_new(struct tls_server *server, uv_stream_t *stream, const struct tls_ops *ops, void *arg, struct tls **ret_tls)
{
    struct tls *t = calloc(1, sizeof *t);

    if (!t)
        return -ENOMEM;
    t->server = server;
    t->creds = tls_creds_ref(server->creds);
    t->stream = stream;
    t->ops = ops;
    t->arg = arg;
    /* No tickets, no resumption: each handshake looks at the certificate, and at the revocation list of now. */
    if (gnutls_init(&t->session, GNUTLS_SERVER | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL | GNUTLS_NO_TICKETS) < 0) {
        tls_creds_unref(t->creds);
        free(t);
        return -ENOMEM;
    }
    gnutls_session_set_ptr(t->session, t);
    gnutls_transport_set_ptr(t->session, t);
    gnutls_transport_set_pull_function(t->session, on_pull);
    gnutls_transport_set_push_function(t->session, on_push);
    gnutls_handshake_set_max_packet_length(t->session, TLS_HANDSHAKE_MAX);
    if (tls_creds_apply(t) < 0) {
        tls_free(t);
        return -ENOMEM;
    }
    server->nhandshakes++;
    *ret_tls = t;
    return 0;
}

void tls_stop(struct tls *t)
{
    if (t->state == TLS_HANDSHAKE && !t->stopped)
        t->server->nfailed++;
    t->stopped = true;
    drop_queue(t);
}

bool tls_is_busy(const struct tls *t)
{
    return t->job != TLS_JOB_NONE;
}

void tls_free(struct tls *t)
{
    if (!t)
        return;
    assert(t->job == TLS_JOB_NONE && !t->writing);
    drop_queue(t);
    box_give(t->server, t->out);
    gnutls_deinit(t->session);
    free(t->peer.psk);
    free(t->peer.dn);
    free(t->peer.cn);
    for (size_t i = 0; i < t->peer.nnames; i++)
        free(t->peer.names[i]);
    tls_creds_unref(t->creds);
    free(t);
}

enum tls_state tls_state(const struct tls *t)
{
    return t->state;
}

const struct failure *tls_why(const struct tls *t)
{
    return &t->why;
}

const struct tls_peer *tls_peer(const struct tls *t)
{
    return &t->peer;
}

/* -- what all share ------------------------------------------------------------------------------------------------ */
int tls_server_init(struct tls_server *s, uv_loop_t *loop, unsigned nthreads, struct tls_creds *creds)
{
    int r;

    *s = (struct tls_server){0};
    r = workers_new(loop, nthreads, &s->workers);
    if (r == 0)
        s->creds = creds;
    return r;
}

void tls_server_set_creds(struct tls_server *s, struct tls_creds *creds)
{
    tls_creds_unref(s->creds);
    s->creds = creds;
}

void tls_server_trim(struct tls_server *s)
{
    while (s->spare) {
        struct tls_box *box = s->spare;
        s->spare = box->next;
        box_free(box);
    }
    s->nspare = 0;
}

void tls_server_close(struct tls_server *s, void (*cb)(void *arg), void *arg)
{
    assert(s->sealed == 0);
    tls_server_trim(s);
    tls_creds_unref(TAKE_PTR(s->creds));
    workers_close(TAKE_PTR(s->workers), cb, arg);
}
