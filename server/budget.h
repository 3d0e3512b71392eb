/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * budget: the memory for payload of all connections together. Each user may always hold one buffer, so that none
 * starves; past that all share BUDGET_TOTAL, and users who had to wait are called in turn when memory returns. Free
 * buffers that are kept count, too.
 *
 * Loop thread only. The budget is the server's, a user is embedded in whoever reads (server/pull).
 */
#ifndef QPULL_BUDGET_H
#define QPULL_BUDGET_H

#include "qmp/base.h"

#include <stdbool.h>

struct budget_user {
    /* There may be room again. Called from within somebody's budget_give(), never from budget_reserve(). */
    void (*on_room)(struct budget_user *u);
    /* private */
    size_t held; /* bytes */
    bool waiting;
    struct budget_user *next, *prev;
};

struct budget {
    size_t limit;     /* bytes */
    size_t piece;     /* bytes; buffers of this size are kept for the next taker */
    size_t max_spare; /* how many of them */
    size_t used;      /* bytes held by users */
    size_t most;      /* the highest `used` ever */
    /* private */
    struct budget_spare *spare; /* owned */
    size_t nspare;
    struct budget_user *first, *last; /* waiting, in turn */
    size_t nwaiting;
    bool calling;
    struct budget_user *turn; /* may take one buffer although others wait */
};

void budget_init(struct budget *b, size_t limit, size_t piece, size_t max_spare);
/* Frees the spare buffers; the budget can be used on. */
void budget_done(struct budget *b);
size_t budget_spare_bytes(const struct budget *b);

/*
 * Room for size bytes (at most `piece`), the user's until budget_give(). false: there is none; on_room comes when there
 * is. A user that holds nothing is never refused.
 */
bool budget_reserve(struct budget *b, struct budget_user *u, size_t size);
/* Memory for what was reserved, once, given to the caller until budget_give(). NULL: out of memory. */
void *budget_buffer(struct budget *b, size_t size);
/* No room for a piece: who holds nothing should take less than one. */
bool budget_is_short(const struct budget *b);
/* Both; buffer may be NULL: none was needed. */
void budget_give(struct budget *b, struct budget_user *u, void *buffer, size_t size);
/* No on_room any more. */
void budget_forget(struct budget *b, struct budget_user *u);

#endif
