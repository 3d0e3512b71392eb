/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pull.h"
#include "config.h"
#include "nbd/limits.h"

#include <assert.h>

/* One READ. Freed when it is answered and no piece of it is being read. */
struct pull_job {
    struct pull *pull;
    struct nbd_request *request; /* borrowed from nbd; NULL: answered */
    struct pull_job *next, *prev;
    uint64_t at, end;      /* bytes: what is not asked for yet */
    uint64_t left;         /* bytes not handed to nbd yet */
    uint64_t send_at;      /* ordered: where the next chunk must begin */
    struct piece *arrived; /* owned: by offset: pieces that wait for their turn to be sent */
    int err;               /* of a read; waits for its turn, too */
    unsigned nreading;     /* pieces being read */
    bool ordered;          /* chunks must ascend */
};

/* A part of a READ on its way: from the source into its buffer, then out of it to the client. */
struct piece {
    struct source_read read;
    struct nbd_payload payload;
    struct pull *pull;
    struct pull_job *job; /* NULL once handed to nbd */
    struct piece *next;
    void *buffer; /* owned: from the budget; NULL: the bytes are lent by the source, or not there yet */
};

static void pump(struct pull *p);
static void flush(struct pull *p);

static void piece_free(struct piece *piece)
{
    struct pull *p = piece->pull;
    size_t length = piece->read.length;

    p->window -= length;
    if (piece->read.loan) {
        p->nlent--;
        piece->read.loan->end(piece->read.loan);
    }
    budget_give(p->c.budget, &p->user, piece->buffer, length);
    free(piece);
}

/* The client has the bytes, or never will. */
static void piece_release(struct nbd_payload *payload)
{
    struct piece *piece = container_of(payload, struct piece, payload);
    struct pull *p = piece->pull;

    p->unsent -= payload->len;
    p->ntaken += payload->len;
    if (p->c.give_back_read && p->c.source && !p->stopped)
        source_give_back(p->c.source, piece->read.offset, piece->read.length);
    piece_free(piece);
    flush(p);
    pump(p);
}

static void job_drop_arrived(struct pull_job *job)
{
    while (job->arrived) {
        struct piece *piece = job->arrived;
        job->arrived = piece->next;
        piece_free(piece);
    }
}

static void job_try_free(struct pull_job *job)
{
    struct pull *p = job->pull;

    if (job->request || job->nreading > 0)
        return;
    if (p->unstarted == job)
        p->unstarted = job->next;
    *(job->prev ? &job->prev->next : &p->first) = job->next;
    *(job->next ? &job->next->prev : &p->last) = job->prev;
    free(job);
}

static void job_fail(struct pull_job *job, int err, const char *sentence)
{
    struct pull *p = job->pull;
    struct nbd_request *r = TAKE_PTR(job->request);

    assert(r);
    p->read_failed = true;
    p->wanted -= job->left;
    if (p->open == job)
        p->open = NULL;
    if (p->unstarted == job)
        p->unstarted = job->next;
    job->at = job->end;
    job_drop_arrived(job);
    job_try_free(job);
    nbd_reply_error(r, err, sentence);
}

/*
 * Turns. Structured chunks may mix as they like, but a reply that is one chunk, or a simple one, must not have anything
 * in its middle: it is opened when no older request is unanswered, and until its last byte everybody else waits.
 * (Pieces are started in the order of requests: so the open one never waits for memory that a waiting one holds.)
 */
static bool has_turn(const struct pull_job *job)
{
    const struct pull *p = job->pull;

    if (p->open)
        return p->open == job;
    if (!job->ordered)
        return true;
    for (const struct pull_job *older = p->first; older != job; older = older->next)
        if (older->request)
            return false;
    return true;
}

/* Hands a piece to nbd. The job is gone afterwards if it was the last one. */
static void piece_send(struct piece *piece)
{
    struct pull_job *job = piece->job;
    struct pull *p = job->pull;
    struct nbd_request *r = job->request;
    bool pumping = p->pumping;

    piece->job = NULL;
    job->left -= piece->read.length;
    p->wanted -= piece->read.length;
    job->send_at += piece->read.length;
    p->nbytes += piece->read.length;
    p->unsent += piece->read.length;
    p->c.counters->client_bytes += piece->read.length;
    if (job->ordered)
        p->open = job->left > 0 ? job : NULL;
    if (job->left == 0) {
        job->request = NULL;
        job_try_free(job);
    }
    piece->payload = (struct nbd_payload){piece->read.buffer, piece->read.length, piece_release};
    p->pumping = true; /* it may be sent and released at once; who called pumps */
    nbd_reply_data(r, piece->read.offset, &piece->payload);
    p->pumping = pumping;
}

/* What is with nbd cannot be had back: it is little. */
static bool may_send(const struct pull *p, const struct piece *piece)
{
    return p->unsent == 0 || p->unsent + piece->read.length <= CONN_PIECE;
}

/* Sends what has its turn; false: nothing has. Errors go at once, data waits for data that came before. */
static bool flush_one(struct pull *p)
{
    bool full = false;

    for (struct pull_job *job = p->first; job; job = job->next) {
        struct piece *piece = job->arrived;

        if (!job->request || (!job->err && !piece) || !has_turn(job))
            continue;
        if (job->err) {
            job_fail(job, job->err == -ENODATA ? -EIO : job->err,
                     job->err == -ENODATA ? "these bytes were given back by a client of this session, and are not kept "
                                            "for a second read (--give-back)"
                     : job->err == -ENOMEM ? "the server has no memory for this read"
                                           : "reading the frozen disk failed");
            return true;
        }
        if (full || (job->ordered && piece->read.offset != job->send_at))
            continue;
        if (!may_send(p, piece)) {
            full = true;
            continue;
        }
        job->arrived = piece->next;
        piece_send(piece);
        return true;
    }
    return false;
}

/* Sending may bring releases, which come here again: the outermost call does the work. */
static void flush(struct pull *p)
{
    if (p->flushing)
        return;
    p->flushing = true;
    while (flush_one(p))
        ;
    p->flushing = false;
}

/* The rest need not be read any more; the client is told when the request has its turn. */
static void job_break(struct pull_job *job, int err)
{
    struct pull *p = job->pull;

    if (job->err)
        return;
    job->err = err == -ENOMEM || err == -ENODATA ? err : -EIO;
    job->at = job->end;
    if (p->unstarted == job)
        p->unstarted = job->next;
}

static void piece_arrived(struct piece *piece, int err)
{
    struct pull_job *job = piece->job;
    struct pull *p = job->pull;
    struct piece **at;

    if (!job->request || err) {
        if (err)
            job_break(job, err);
        piece_free(piece);
        job_try_free(job);
    } else {
        for (at = &job->arrived; *at && (*at)->read.offset < piece->read.offset; at = &(*at)->next)
            ;
        piece->next = *at;
        *at = piece;
    }
    flush(p);
}

static void on_source_read(struct source_read *read, int err);

/* Into a buffer of our own. */
static int piece_read_copy(struct piece *piece)
{
    struct pull *p = piece->pull;
    int r;

    if (!p->c.source || p->stopped)
        return -EIO;
    if (!piece->buffer)
        piece->buffer = budget_buffer(p->c.budget, piece->read.length);
    if (!piece->buffer)
        return -ENOMEM;
    piece->read.buffer = piece->buffer;
    piece->read.borrow = false;
    r = source_read(p->c.source, &piece->read);
    return r == -ENOBUFS ? -EIO : r;
}

/* Straight from the source's memory, if it lends it. */
static int piece_read(struct piece *piece)
{
    int r;

    piece->read.borrow = true;
    r = source_read(piece->pull->c.source, &piece->read);
    return r == -ENOBUFS ? piece_read_copy(piece) : r;
}

/*
 * What is lent is sent at once as a rule. A client that does not take it so soon may keep a few loans, and none where
 * they are scarce: the rest is copied, so that nobody waits for a source because of somebody else.
 */
static void piece_borrowed(struct piece *piece)
{
    struct pull *p = piece->pull;
    struct source_loan *loan;

    p->nlent++;
    if (p->nlent <= CONN_LOANS && !piece->read.loan->scarce)
        return;
    piece->buffer = budget_buffer(p->c.budget, piece->read.length);
    if (!piece->buffer)
        return;
    memcpy(piece->buffer, piece->read.buffer, piece->read.length);
    piece->read.buffer = piece->buffer;
    p->nlent--;
    p->ncopied++;
    loan = TAKE_PTR(piece->read.loan);
    loan->end(loan);
}

static void on_source_read(struct source_read *read, int err)
{
    struct piece *piece = container_of(read, struct piece, read);
    struct pull *p = piece->pull;

    if (err == -ENOBUFS && (err = piece_read_copy(piece)) == 0)
        return; /* it goes on */
    if (!err && read->loan)
        piece_borrowed(piece);
    fair_read_done(p->c.fair);
    p->nreading--;
    piece->job->nreading--;
    p->lost = p->lost || err == -ESTALE;
    if (!err)
        p->c.counters->qemu_bytes += read->length;
    p->pumping = true; /* what comes back from nbd now must not free the job at hand */
    piece_arrived(piece, err);
    p->pumping = false;
    pump(p);
    if (p->c.on_read)
        p->c.on_read(p->c.arg);
}

/* Length of the run of zeros at job->at that need not be read; 0: data. */
static uint64_t zeros_at(const struct pull_job *job)
{
    uint64_t left = job->end - job->at;
    struct map_extent e;

    if (!job->pull->c.allocation || map_extents(job->pull->c.allocation, job->at, left, &e, 1) < 1)
        return 0;
    if (!(e.flags & NBD_STATE_ZERO) || e.length < MIN(left, (uint64_t)CONN_PIECE))
        return 0;
    return e.length;
}

static void send_hole(struct pull_job *job, uint64_t length)
{
    struct nbd_request *r = job->request;
    uint64_t at = job->at;

    job->at += length;
    job->left -= length;
    job->pull->wanted -= length;
    if (job->at == job->end)
        job->pull->unstarted = job->next;
    if (job->left == 0) {
        job->request = NULL;
        job_try_free(job);
    }
    nbd_reply_hole(r, at, (uint32_t)length);
}

/*
 * A client that is slow has no need of more than it may keep on loan: what came besides would be copied. And it gets
 * that in one go when nearly all is sent, so that QEMU is woken once for several pieces.
 */
static bool is_resting(struct pull *p)
{
    size_t held = p->nlent + p->nreading;

    if (!p->slow || held <= 1)
        p->resting = false;
    else if (held >= CONN_LOANS)
        p->resting = true;
    return p->resting;
}

/* Starts the next piece; false: nothing to do, or nothing possible now. */
static bool start_piece(struct pull *p)
{
    struct pull_job *job;
    uint64_t zeros, length;
    struct piece *piece;
    size_t most;
    int r;

    while (p->unstarted && p->unstarted->at == p->unstarted->end) /* behind one that begins again: give_up_one() */
        p->unstarted = p->unstarted->next;
    job = p->unstarted;
    if (!job)
        return false;
    zeros = zeros_at(job);
    if (zeros > 0 && !job->ordered) {
        if (p->open)
            return false;
        send_hole(job, zeros); /* at most a request's length, which fits 32 bits */
        return true;
    }
    /* Pieces end where multiples of their size are, so that neighbours do not share clusters. */
    most = MIN(budget_is_short(p->c.budget) ? CONN_PIECE_SHORT : CONN_PIECE, rate_piece(&p->rate));
    length = MIN(job->end - job->at, most - job->at % most);
    if (p->window > 0 && p->window + length > p->allowed)
        return false;
    if (zeros == 0 && is_resting(p))
        return false;
    if (zeros == 0 && !fair_may_read(p->c.fair))
        return false;
    if (!rate_may(&p->rate) || !budget_reserve(p->c.budget, &p->user, length))
        return false;
    piece = calloc(1, sizeof *piece);
    if (piece && zeros > 0)
        piece->buffer = budget_buffer(p->c.budget, length);
    if (!piece || (zeros > 0 && !piece->buffer)) {
        budget_give(p->c.budget, &p->user, NULL, length);
        free(piece);
        job_break(job, -ENOMEM);
        flush(p);
        return true;
    }
    rate_spend(&p->rate, length);
    piece->pull = p;
    piece->job = job;
    piece->read = (struct source_read){.offset = job->at, .length = length, .wanted = p->wanted, .cb = on_source_read};
    p->window += length;
    job->at += length;
    if (job->at == job->end)
        p->unstarted = job->next;
    if (zeros > 0) {
        memset(piece->buffer, 0, length);
        piece->read.buffer = piece->buffer;
        piece_arrived(piece, 0);
        return true;
    }
    r = piece_read(piece);
    if (r < 0) {
        piece_arrived(piece, r);
        return true;
    }
    fair_read_begun(p->c.fair);
    p->nreading++;
    job->nreading++;
    return true;
}

/* Replies may bring releases and new requests, which come here again: the outermost call does the work. */
static void pump(struct pull *p)
{
    if (p->pumping || p->stopped) {
        p->again = true;
        return;
    }
    p->pumping = true;
    do {
        p->again = false;
        while (start_piece(p))
            ;
    } while (p->again);
    p->pumping = false;
}

void pull_go_on(struct pull *p)
{
    pump(p);
}

/*
 * The last piece that was begun, if it is here and nowhere else: its memory goes, and it is read again in its turn.
 * Always the last one, so that what is here is what comes first, and no reply waits for memory that a later one holds.
 */
static bool give_up_one(struct pull *p)
{
    for (struct pull_job *job = p->unstarted ? p->unstarted : p->last; job; job = job->prev) {
        struct piece **at;

        if (!job->request || job->err || job->at == job->request->offset)
            continue;
        for (at = &job->arrived; *at && (*at)->next; at = &(*at)->next)
            ;
        if (!*at || (*at)->read.offset + (*at)->read.length != job->at)
            return false;
        job->at = (*at)->read.offset;
        p->unstarted = job;
        piece_free(TAKE_PTR(*at));
        return true;
    }
    return false;
}

void pull_allow(struct pull *p, size_t bytes)
{
    bool more = bytes > p->allowed;

    p->allowed = bytes;
    while (p->window > p->allowed && give_up_one(p))
        ;
    if (more)
        pump(p);
}

static void on_room(struct budget_user *u)
{
    pump(container_of(u, struct pull, user));
}

static void on_rate(struct rate_user *u)
{
    pump(container_of(u, struct pull, rate));
}

int pull_init(struct pull *p, const struct pull_config *config)
{
    *p = (struct pull){.c = *config,
                       .user.on_room = on_room,
                       .rate.on_room = on_rate,
                       .allowed = CONN_WINDOW,
                       .max_extents = SIZE_MAX};
    p->c.contexts = NULL;
    p->maps = calloc(config->ncontexts + 1, sizeof(struct map *));
    if (!p->maps)
        return -ENOMEM;
    if (config->contexts)
        pull_set_maps(p, config->contexts);
    return 0;
}

void pull_set_maps(struct pull *p, const struct map *const *contexts)
{
    for (size_t i = 0; i < p->c.ncontexts; i++)
        p->maps[i] = contexts[i];
}

void pull_done(struct pull *p)
{
    if (!p->maps)
        return;
    assert(!p->first && p->nreading == 0 && p->window == 0);
    budget_forget(p->c.budget, &p->user);
    rate_leave(&p->rate);
    free(p->maps);
    p->maps = NULL;
}

static void read_start(struct pull *p, struct nbd_request *r)
{
    struct pull_job *job = calloc(1, sizeof *job);

    if (!job) {
        p->read_failed = true;
        nbd_reply_error(r, -ENOMEM, "the server has no memory for this read");
        return;
    }
    *job = (struct pull_job){
        .pull = p,
        .request = r,
        .prev = p->last,
        .at = r->offset,
        .end = r->offset + r->length,
        .left = r->length,
        .send_at = r->offset,
        .ordered = r->in_order || r->df,
    };
    *(p->last ? &p->last->next : &p->first) = job;
    p->last = job;
    p->wanted += r->length;
    if (!p->unstarted)
        p->unstarted = job;
    pump(p);
}

static void status_answer(struct pull *p, struct nbd_request *r)
{
    struct nbd_status status[NBD_CONTEXTS_MAX];
    size_t most = p->max_extents / MAX(p->c.ncontexts, (size_t)1);
    size_t max = MAX(MIN(nbd_status_max_extents(r), most), (size_t)1);

    for (size_t i = 0; i < p->c.ncontexts; i++) {
        if (!map_status(p->maps[i], r->offset, r->length, max, &status[i])) {
            nbd_reply_error(r, -EIO, "the map ends before the disk does");
            return;
        }
    }
    nbd_reply_status(r, status, p->c.ncontexts);
}

void pull_request(struct pull *p, struct nbd_request *r)
{
    if (p->stopped) {
        p->read_failed = p->read_failed || r->command == NBD_COMMAND_READ;
        nbd_reply_error(r, -EIO, "the frozen disk is lost");
        return;
    }
    switch (r->command) {
    case NBD_COMMAND_READ:
        read_start(p, r);
        return;
    case NBD_COMMAND_STATUS:
        status_answer(p, r);
        return;
    case NBD_COMMAND_TRIM:
        source_give_back(p->c.source, r->offset, r->length);
        nbd_reply_done(r);
        return;
    case NBD_COMMAND_CACHE: /* a hint; the source reads when it is asked */
        nbd_reply_done(r);
        return;
    }
}

void pull_fail(struct pull *p, const struct failure *why)
{
    struct pull_job *job;

    if (!p->maps)
        return;
    p->stopped = true;
    budget_forget(p->c.budget, &p->user);
    rate_forget(&p->rate);
    if (p->open) /* what is begun comes to an end before others are told */
        job_fail(p->open, -EIO, why->text);
    do { /* a reply may change the list: begin anew after each */
        for (job = p->first; job && !job->request; job = job->next)
            ;
        if (job)
            job_fail(job, -EIO, why->text);
    } while (job);
}

void pull_drop(struct pull *p)
{
    struct pull_job *next;

    if (!p->maps)
        return;
    p->stopped = true;
    budget_forget(p->c.budget, &p->user);
    rate_forget(&p->rate);
    for (struct pull_job *job = p->first; job; job = next) {
        next = job->next;
        job->request = NULL;
        job_drop_arrived(job);
        job_try_free(job);
    }
    p->unstarted = p->open = NULL;
}
