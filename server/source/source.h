/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * source: where the frozen bytes of one disk come from. An interface {size, read, close}; source/memory serves tests,
 * source/nbd is a libnbd client of QEMU's private export. A source knows no session and no QMP, and it does not log.
 *
 * Loop thread only. Owned by the session; a connection borrows it while the session is up. A read's buffer belongs to
 * the caller and must stay until its callback.
 */
#ifndef QPULL_SOURCE_SOURCE_H
#define QPULL_SOURCE_SOURCE_H

#include "qmp/base.h"

#include <errno.h>
#include <stdbool.h>

struct source;
struct source_read;

/*
 * Memory of the source's own that a read was answered with. Given back by whoever has the read, at any time, also after
 * the source was closed; until then there is less for other reads.
 */
struct source_loan {
    void (*end)(struct source_loan *l); /* from the loop */
    bool scarce;                        /* little is left: copy what it holds and give it back */
};

/* err: 0, or negative errno (-ESTALE: the snapshot is lost: QEMU tells it by EINVAL, which is EACCES inside QEMU; -EIO:
 * QEMU failed the read; -ECANCELED: the source is closing; -ENOBUFS: nothing could be lent: read again into a buffer).
 * The struct may be reused or freed from within. */
typedef void (*source_read_cb)(struct source_read *r, int err);

struct source_read {
    uint64_t offset; /* bytes; offset + length <= size */
    size_t length;   /* bytes, > 0 */
    void *buffer;    /* borrowed from the caller until cb … */
    bool borrow; /* … or, with this, nothing: then, where err is 0, the source has set it to memory of its own, and
                    loan to what the caller has to end */
    struct source_loan *loan;
    uint64_t wanted; /* bytes that the client has asked for and does not have, these among them; 0: not known */
    bool sure;       /* of a pair: the sure source is to answer (source/paired.h) */
    source_read_cb cb;
    void *arg; /* the caller's */
    /* private to the source */
    struct source_read *next, *prev;
    size_t issued;     /* bytes asked for upstream so far */
    unsigned npending; /* pieces asked for and not answered */
    int err;
    source_read_cb own_cb; /* source/paired: whom to tell in the end */
    void *own_arg;
    /* private to source/ahead, which stands on all others */
    struct source *ahead;
    source_read_cb ahead_told;
    /* private to a source that stands on another one (source/giveback) */
    struct source *via;
    source_read_cb told;
    unsigned generation;
};

typedef void (*source_close_cb)(void *arg);
/* Told once, when the source can serve no more reads; those in flight are answered with -EIO before. Not after
 * source_close(). */
typedef void (*source_lost_cb)(void *arg, const struct failure *why);

struct source_ops {
    int (*read)(struct source *s, struct source_read *r);
    void (*close)(struct source *s, source_close_cb cb, void *arg);
    void (*give_back)(struct source *s, uint64_t offset, uint64_t length); /* NULL: it cannot */
};

struct source {
    const struct source_ops *ops;
    uint64_t size; /* bytes */
    bool lends;    /* may answer reads with memory of its own */
};

/* 0: r->cb comes exactly once, later, never from inside this call. Negative (-ENOTCONN: lost or closing, -ENOMEM,
 * -EINVAL: out of range, -ENODATA: it was given back, -ENOBUFS: nothing can be lent, give a buffer): it never comes. */
static inline int source_read(struct source *s, struct source_read *r)
{
    if (r->length == 0 || r->offset > s->size || r->length > s->size - r->offset)
        return -EINVAL;
    r->loan = NULL;
    if (r->borrow && !s->lends)
        return -ENOBUFS;
    return s->ops->read(s, r);
}

/* Nobody reads these bytes any more: what holds them may be freed. Reads under way may still have them. A hint where
 * the source cannot, or where it is not its granularity. */
static inline void source_give_back(struct source *s, uint64_t offset, uint64_t length)
{
    if (s->ops->give_back && offset <= s->size && length <= s->size - offset)
        s->ops->give_back(s, offset, length);
}

/* Answers what is in flight (-ECANCELED where it did not finish), then frees the source; cb (may be NULL) comes later,
 * as the last touch. */
static inline void source_close(struct source *s, source_close_cb cb, void *arg)
{
    s->ops->close(s, cb, arg);
}

#endif
