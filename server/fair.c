/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "fair.h"
#include "config.h"

#include <assert.h>
#include <errno.h>

/* QEMU of a VM, which those who read from it share. */
struct fair_vm {
    struct fair_vm *next, *prev;
    size_t nclients, nreading;
    char name[];
};

/* A client, of one queue; in that of reads, of one VM. */
struct fair_client {
    struct fair *fair;
    struct fair_vm *vm; /* NULL in the queue of requests */
    struct fair_client *next, *prev;
    bool reading; /* has reads in flight or waiting; counted in fair->nreading and vm->nreading */
    size_t nmembers, nreads;
    struct fair_list waiting;
    char name[];
};

/* -- lists --------------------------------------------------------------------------------------------------------- */

static void append(struct fair_member *m, enum fair_queue q)
{
    struct fair_list *l = &m->client[q]->waiting;

    m->queued[q] = true;
    m->next[q] = NULL;
    m->prev[q] = l->last;
    *(l->last ? &l->last->next[q] : &l->first) = m;
    l->last = m;
}

static void drop(struct fair_member *m, enum fair_queue q)
{
    struct fair_list *l = &m->client[q]->waiting;

    *(m->prev[q] ? &m->prev[q]->next[q] : &l->first) = m->next[q];
    *(m->next[q] ? &m->next[q]->prev[q] : &l->last) = m->prev[q];
    m->queued[q] = false;
}

static void count_reading(struct fair_client *c)
{
    bool is = c->nreads || c->waiting.first;
    size_t more = (size_t)is - (size_t)c->reading;

    c->fair->nreading += more;
    c->vm->nreading += more;
    c->reading = is;
}

/* -- requests ------------------------------------------------------------------------------------------------------ */

/* One member of each client; nobody leaves meanwhile (fair.h). */
static void on_idle(uv_idle_t *idle)
{
    struct fair *f = container_of(idle, struct fair, idle);

    for (struct fair_client *c = f->clients; c; c = c->next) {
        struct fair_member *m = c->waiting.first;

        if (!m || c->vm)
            continue;
        drop(m, FAIR_QUEUE_REQUESTS);
        f->nready--;
        m->on_requests(m);
    }
    if (f->nready == 0)
        (void)uv_idle_stop(idle); /* never fails */
}

void fair_queue(struct fair_member *m)
{
    struct fair_client *c = m->client[FAIR_QUEUE_REQUESTS];

    if (!c || m->queued[FAIR_QUEUE_REQUESTS])
        return;
    append(m, FAIR_QUEUE_REQUESTS);
    if (c->fair->nready++ == 0)
        (void)uv_idle_start(&c->fair->idle, on_idle); /* never fails for one that has a callback */
}

/* -- reads --------------------------------------------------------------------------------------------------------- */

static size_t reads_of(const struct fair_client *c)
{
    return c->vm->nreading <= 1 ? SIZE_MAX : MAX(FAIR_READS / c->vm->nreading, (size_t)FAIR_READS_LEAST);
}

bool fair_may_read(struct fair_member *m)
{
    struct fair_client *c = m->client[FAIR_QUEUE_READS];

    if (!c || c->nreads < reads_of(c))
        return true;
    if (!m->queued[FAIR_QUEUE_READS])
        append(m, FAIR_QUEUE_READS);
    return false;
}

void fair_read_begun(struct fair_member *m)
{
    struct fair_client *c = m->client[FAIR_QUEUE_READS];

    if (!c)
        return;
    c->nreads++;
    m->nreads++;
    count_reading(c);
}

void fair_read_done(struct fair_member *m)
{
    struct fair_client *c = m->client[FAIR_QUEUE_READS];

    if (!c)
        return;
    c->nreads--;
    m->nreads--;
    while ((m = c->waiting.first) && c->nreads < reads_of(c)) {
        drop(m, FAIR_QUEUE_READS);
        m->on_read(m); /* asks again if it cannot begin all that it has */
    }
    count_reading(c);
}

size_t fair_part(const struct fair_member *m, size_t all)
{
    const struct fair_client *c = m->client[FAIR_QUEUE_READS];

    return !c || c->fair->nreading <= 1 ? all : all / c->fair->nreading / c->nmembers;
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

static int vm_of(struct fair *f, const char *name, struct fair_vm **found)
{
    struct fair_vm *v = f->vms;

    while (v && strcmp(v->name, name) != 0)
        v = v->next;
    if (!v) {
        v = calloc(1, sizeof(*v) + strlen(name) + 1);
        if (!v)
            return -ENOMEM;
        memcpy(v->name, name, strlen(name) + 1);
        v->next = f->vms;
        if (v->next)
            v->next->prev = v;
        f->vms = v;
    }
    *found = v;
    return 0;
}

static void vm_try_free(struct fair *f, struct fair_vm *v)
{
    if (!v || v->nclients)
        return;
    *(v->prev ? &v->prev->next : &f->vms) = v->next;
    if (v->next)
        v->next->prev = v->prev;
    free(v);
}

static int join(struct fair *f, struct fair_member *m, enum fair_queue q, const char *name, struct fair_vm *vm)
{
    struct fair_client *c = f->clients;

    while (c && (c->vm != vm || strcmp(c->name, name) != 0))
        c = c->next;
    if (!c) {
        c = calloc(1, sizeof(*c) + strlen(name) + 1);
        if (!c)
            return -ENOMEM;
        memcpy(c->name, name, strlen(name) + 1);
        c->fair = f;
        c->vm = vm;
        c->next = f->clients;
        if (c->next)
            c->next->prev = c;
        f->clients = c;
        *(vm ? &vm->nclients : &f->nclients) += 1;
    }
    c->nmembers++;
    m->client[q] = c;
    return 0;
}

static void leave(struct fair_member *m, enum fair_queue q)
{
    struct fair_client *c = m->client[q];
    struct fair *f;

    if (!c)
        return;
    f = c->fair;
    if (m->queued[q]) {
        drop(m, q);
        if (q == FAIR_QUEUE_REQUESTS)
            f->nready--;
        else
            count_reading(c);
    }
    m->client[q] = NULL;
    if (--c->nmembers)
        return;
    *(c->prev ? &c->prev->next : &f->clients) = c->next;
    if (c->next)
        c->next->prev = c->prev;
    *(c->vm ? &c->vm->nclients : &f->nclients) -= 1;
    vm_try_free(f, c->vm);
    free(c);
}

int fair_join(struct fair *f, struct fair_member *m, const char *client)
{
    return join(f, m, FAIR_QUEUE_REQUESTS, client, NULL);
}

int fair_join_reads(struct fair *f, struct fair_member *m, const char *vm)
{
    const struct fair_client *me = m->client[FAIR_QUEUE_REQUESTS];
    struct fair_vm *v;
    int r;

    leave(m, FAIR_QUEUE_READS);
    if (!me)
        return 0;
    r = vm_of(f, vm, &v);
    if (r < 0)
        return r;
    r = join(f, m, FAIR_QUEUE_READS, me->name, v);
    if (r < 0)
        vm_try_free(f, v);
    return r;
}

void fair_leave(struct fair_member *m)
{
    assert(m->nreads == 0);
    leave(m, FAIR_QUEUE_READS);
    leave(m, FAIR_QUEUE_REQUESTS);
}
