/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "fair.h"
#include "config.h"

#include <assert.h>
#include <errno.h>

enum { REQUESTS, READS }; /* index of a member's queues */

struct fair_client {
    struct fair *fair;
    struct fair_client *next, *prev;
    bool reading; /* counted in fair->nreading */
    size_t nmembers, nreads;
    struct fair_list waiting[2];
    char name[];
};

/* -- lists --------------------------------------------------------------------------------------------------------- */

static void append(struct fair_member *m, int q)
{
    struct fair_list *l = &m->client->waiting[q];

    m->queued[q] = true;
    m->next[q] = NULL;
    m->prev[q] = l->last;
    *(l->last ? &l->last->next[q] : &l->first) = m;
    l->last = m;
}

static void drop(struct fair_client *c, struct fair_member *m, int q)
{
    struct fair_list *l = &c->waiting[q];

    *(m->prev[q] ? &m->prev[q]->next[q] : &l->first) = m->next[q];
    *(m->next[q] ? &m->next[q]->prev[q] : &l->last) = m->prev[q];
    m->queued[q] = false;
}

static void count_reading(struct fair_client *c)
{
    bool is = c->nreads || c->waiting[READS].first;

    c->fair->nreading += (size_t)is - (size_t)c->reading;
    c->reading = is;
}

/* -- requests ------------------------------------------------------------------------------------------------------ */

/* One member of each client; nobody leaves meanwhile (fair.h). */
static void on_idle(uv_idle_t *idle)
{
    struct fair *f = container_of(idle, struct fair, idle);

    for (struct fair_client *c = f->clients; c; c = c->next) {
        struct fair_member *m = c->waiting[REQUESTS].first;

        if (!m)
            continue;
        drop(c, m, REQUESTS);
        f->nready--;
        m->on_requests(m);
    }
    if (f->nready == 0)
        (void)uv_idle_stop(idle); /* never fails */
}

void fair_queue(struct fair_member *m)
{
    if (!m->client || m->queued[REQUESTS])
        return;
    append(m, REQUESTS);
    if (m->client->fair->nready++ == 0)
        (void)uv_idle_start(&m->client->fair->idle, on_idle); /* never fails for one that has a callback */
}

/* -- reads --------------------------------------------------------------------------------------------------------- */

static size_t part_of(const struct fair *f)
{
    return f->nreading <= 1 ? SIZE_MAX : MAX(FAIR_READS / f->nreading, (size_t)FAIR_READS_LEAST);
}

bool fair_may_read(struct fair_member *m)
{
    struct fair_client *c = m->client;

    if (!c || c->nreads < part_of(c->fair))
        return true;
    if (!m->queued[READS])
        append(m, READS);
    return false;
}

void fair_read_begun(struct fair_member *m)
{
    if (!m->client)
        return;
    m->client->nreads++;
    m->nreads++;
    count_reading(m->client);
}

void fair_read_done(struct fair_member *m)
{
    struct fair_client *c = m->client;

    if (!c)
        return;
    c->nreads--;
    m->nreads--;
    while ((m = c->waiting[READS].first) && c->nreads < part_of(c->fair)) {
        drop(c, m, READS);
        m->on_read(m); /* asks again if it cannot begin all that it has */
    }
    count_reading(c);
}

/* -- clients ------------------------------------------------------------------------------------------------------- */

int fair_init(struct fair *f, uv_loop_t *loop)
{
    *f = (struct fair){0};
    return uv_idle_init(loop, &f->idle);
}

void fair_close(struct fair *f, uv_close_cb cb)
{
    assert(!f->clients);
    uv_close((uv_handle_t *)&f->idle, cb);
}

int fair_join(struct fair *f, struct fair_member *m, const char *client)
{
    struct fair_client *c = f->clients;

    while (c && strcmp(c->name, client) != 0)
        c = c->next;
    if (!c) {
        c = calloc(1, sizeof(*c) + strlen(client) + 1);
        if (!c)
            return -ENOMEM;
        memcpy(c->name, client, strlen(client) + 1);
        c->fair = f;
        c->next = f->clients;
        if (c->next)
            c->next->prev = c;
        f->clients = c;
        f->nclients++;
    }
    c->nmembers++;
    m->client = c;
    return 0;
}

void fair_leave(struct fair_member *m)
{
    struct fair_client *c = TAKE_PTR(m->client);
    struct fair *f;

    if (!c)
        return;
    f = c->fair;
    assert(m->nreads == 0);
    if (m->queued[REQUESTS]) {
        drop(c, m, REQUESTS);
        f->nready--;
    }
    if (m->queued[READS])
        drop(c, m, READS);
    count_reading(c);
    if (--c->nmembers)
        return;
    *(c->prev ? &c->prev->next : &f->clients) = c->next;
    if (c->next)
        c->next->prev = c->prev;
    f->nclients--;
    free(c);
}
