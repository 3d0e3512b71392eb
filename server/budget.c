/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "budget.h"

/* What stands at the head of a spare buffer. */
struct budget_spare {
    struct budget_spare *next;
};

void budget_init(struct budget *b, size_t limit, size_t piece, size_t max_spare)
{
    *b = (struct budget){.limit = limit, .piece = piece, .max_spare = max_spare};
}

static struct budget_spare *take_spare(struct budget *b)
{
    struct budget_spare *s = b->spare;

    b->spare = s->next;
    b->nspare--;
    return s;
}

void budget_done(struct budget *b)
{
    while (b->spare)
        free(take_spare(b));
}

size_t budget_spare_bytes(const struct budget *b)
{
    return b->nspare * b->piece;
}

static void unlink_user(struct budget *b, struct budget_user *u)
{
    if (!u->waiting)
        return;
    *(u->prev ? &u->prev->next : &b->first) = u->next;
    *(u->next ? &u->next->prev : &b->last) = u->prev;
    u->next = u->prev = NULL;
    u->waiting = false;
    b->nwaiting--;
}

static void wait_for_room(struct budget *b, struct budget_user *u)
{
    if (u->waiting)
        return;
    u->waiting = true;
    b->nwaiting++;
    u->next = NULL;
    u->prev = b->last;
    *(b->last ? &b->last->next : &b->first) = u;
    b->last = u;
}

void budget_forget(struct budget *b, struct budget_user *u)
{
    unlink_user(b, u);
}

bool budget_is_short(const struct budget *b)
{
    return b->used + b->piece > b->limit;
}

bool budget_reserve(struct budget *b, struct budget_user *u, size_t size)
{
    bool others_wait = b->first && b->first != u && b->turn != u;

    if (u->held > 0 && (others_wait || b->used + size > b->limit)) {
        wait_for_room(b, u);
        return false;
    }
    if (b->turn == u)
        b->turn = NULL;
    u->held += size;
    b->used += size;
    b->most = MAX(b->most, b->used);
    return true;
}

void *budget_buffer(struct budget *b, size_t size)
{
    void *buffer;

    if (size == b->piece && b->spare) {
        buffer = take_spare(b);
    } else {
        while (b->spare && b->used + b->nspare * b->piece > b->limit) /* they count, too */
            free(take_spare(b));
        buffer = malloc(MAX(size, sizeof(struct budget_spare)));
    }
    return buffer;
}

void budget_give(struct budget *b, struct budget_user *u, void *buffer, size_t size)
{
    u->held -= size;
    b->used -= size;
    if (buffer && size == b->piece && b->nspare < b->max_spare && b->used + (b->nspare + 1) * b->piece <= b->limit) {
        struct budget_spare *s = buffer;
        s->next = b->spare;
        b->spare = s;
        b->nspare++;
    } else {
        free(buffer);
    }
    if (b->calling)
        return;
    /* One piece for each in turn: who wants more goes to the end of the queue by itself. */
    b->calling = true;
    for (bool progress = true; progress;) {
        progress = false;
        for (size_t n = b->nwaiting; n > 0 && b->first && b->used + b->piece <= b->limit; n--) {
            struct budget_user *next = b->first;
            size_t before = b->used;

            unlink_user(b, next);
            b->turn = next;
            next->on_room(next);
            b->turn = NULL;
            progress = progress || b->used > before;
        }
    }
    b->calling = false;
}
