/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * read_list: a queue of the reads that a source has not answered yet, through their own next and prev. Private to the
 * sources; it owns nothing. A read is on one list at a time. Loop thread only.
 */
#ifndef QPULL_SOURCE_READ_LIST_H
#define QPULL_SOURCE_READ_LIST_H

#include "source/source.h"

struct read_list {
    struct source_read *first, *last; /* borrowed until answered */
};

static inline void read_list_append(struct read_list *l, struct source_read *r)
{
    r->next = NULL;
    r->prev = l->last;
    if (l->last)
        l->last->next = r;
    else
        l->first = r;
    l->last = r;
}

static inline void read_list_remove(struct read_list *l, struct source_read *r)
{
    if (r->prev)
        r->prev->next = r->next;
    else
        l->first = r->next;
    if (r->next)
        r->next->prev = r->prev;
    else
        l->last = r->prev;
    r->next = r->prev = NULL;
}

/* The first read, or NULL. */
static inline struct source_read *read_list_pop(struct read_list *l)
{
    struct source_read *r = l->first;

    if (r)
        read_list_remove(l, r);
    return r;
}

#endif
