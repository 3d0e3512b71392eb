/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "rate.h"
#include "config.h"

#include <assert.h>
#include <errno.h>

#define NS_PER_S 1e9
#define MS_PER_S 1000u

struct rate_bucket {
    struct rate_set *set; /* borrowed; NULL: nobody has it any more */
    struct rate_bucket *next, *prev;
    uv_timer_t timer;
    uint64_t bytes_per_s;
    int64_t left;                   /* bytes; below 0: a debt */
    uint64_t since_ns;              /* when left was right */
    struct rate_user *first, *last; /* who wait */
    struct rate_user *granted;      /* whose turn it is, within its on_room */
    size_t nusers;
    char session[];
};

/* -- what is there ------------------------------------------------------------------------------------------------- */

/* What was not used is lost, but for RATE_BURST_MS of it. */
static void fill(struct rate_bucket *b)
{
    uint64_t now = uv_hrtime(), ns = now - b->since_ns;
    uint64_t burst = b->bytes_per_s / (MS_PER_S / RATE_BURST_MS);
    double bytes = (double)b->bytes_per_s * (double)ns / NS_PER_S;

    if (bytes < 1)
        return; /* the time goes on to count */
    b->left = bytes < (double)((int64_t)burst - b->left) ? b->left + (int64_t)bytes : (int64_t)burst;
    b->since_ns = now;
}

static void give_turns(uv_timer_t *timer);

static void wait_for_more(struct rate_bucket *b)
{
    double missing = b->left > 0 ? 0 : (double)(1 - b->left);

    if (!b->first || uv_is_active((uv_handle_t *)&b->timer))
        return;
    /* One more: the loop's clock stood still since it looked. */
    (void)uv_timer_start(&b->timer, give_turns, (uint64_t)(missing * MS_PER_S / (double)b->bytes_per_s) + 1, 0);
}

static void append(struct rate_user *u)
{
    struct rate_bucket *b = u->bucket;

    u->queued = true;
    u->next = NULL;
    u->prev = b->last;
    *(b->last ? &b->last->next : &b->first) = u;
    b->last = u;
}

static void drop(struct rate_user *u)
{
    struct rate_bucket *b = u->bucket;

    *(u->prev ? &u->prev->next : &b->first) = u->next;
    *(u->next ? &u->next->prev : &b->last) = u->prev;
    u->queued = false;
}

/* One piece each, as long as there is any; who wants more queues up again. */
static void give_turns(uv_timer_t *timer)
{
    struct rate_bucket *b = timer->data;
    struct rate_user *u;

    for (fill(b); b->left > 0 && (u = b->first); fill(b)) {
        drop(u);
        b->granted = u;
        u->on_room(u);
        b->granted = NULL;
    }
    wait_for_more(b);
}

/* -- users --------------------------------------------------------------------------------------------------------- */

bool rate_may(struct rate_user *u)
{
    struct rate_bucket *b = u->bucket;

    if (!b || b->granted == u)
        return true;
    if (u->queued)
        return false;
    if (!b->first && !b->granted) {
        fill(b);
        if (b->left > 0)
            return true;
    }
    append(u);
    wait_for_more(b);
    return false;
}

void rate_spend(struct rate_user *u, size_t length)
{
    struct rate_bucket *b = u->bucket;

    if (!b)
        return;
    b->left -= (int64_t)length;
    if (b->granted == u)
        b->granted = NULL;
}

size_t rate_piece(const struct rate_user *u)
{
    uint64_t most;

    if (!u->bucket)
        return SIZE_MAX;
    most = u->bucket->bytes_per_s / RATE_PIECES;
    return (size_t)MAX(most - most % CONN_BLOCK_PREFERRED, (uint64_t)CONN_BLOCK_PREFERRED);
}

void rate_forget(struct rate_user *u)
{
    if (u->bucket && u->queued)
        drop(u);
}

static void on_closed(uv_handle_t *handle)
{
    free(handle->data);
}

int rate_join(struct rate_set *s, struct rate_user *u, const char *session, uint64_t bytes_per_s)
{
    struct rate_bucket *b = s->buckets;

    rate_leave(u);
    if (bytes_per_s == 0)
        return 0;
    while (b && strcmp(b->session, session) != 0)
        b = b->next;
    if (!b) {
        b = calloc(1, sizeof(*b) + strlen(session) + 1);
        if (!b)
            return -ENOMEM;
        memcpy(b->session, session, strlen(session) + 1);
        b->set = s;
        b->bytes_per_s = bytes_per_s;
        b->left = 1; /* the first piece goes at once */
        b->since_ns = uv_hrtime();
        b->timer.data = b;
        (void)uv_timer_init(s->loop, &b->timer); /* never fails */
        b->next = s->buckets;
        if (b->next)
            b->next->prev = b;
        s->buckets = b;
    }
    b->nusers++;
    u->bucket = b;
    return 0;
}

void rate_leave(struct rate_user *u)
{
    struct rate_bucket *b = u->bucket;

    if (!b)
        return;
    assert(b->granted != u);
    rate_forget(u);
    u->bucket = NULL;
    if (--b->nusers > 0)
        return;
    *(b->prev ? &b->prev->next : &b->set->buckets) = b->next;
    if (b->next)
        b->next->prev = b->prev;
    uv_close((uv_handle_t *)&b->timer, on_closed);
}
