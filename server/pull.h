/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * pull: serves the requests of one NBD connection from one frozen disk: READs are cut into pieces, pieces are read as
 * the window and the budget permit, in the order of the requests, and sent as they come; what the frozen map calls
 * zero is not read at all. It knows no sockets and no sessions.
 *
 * No more than CONN_PIECE of payload waits for the client at a time. What has been read beyond that stays here, where
 * it can be given up and read again: the disk is frozen. So the memory of a client that does not take its replies can
 * be had back at any time (docs/decisions/0015-clients.md).
 *
 * Loop thread only. Embedded in the connection, which keeps it until nreading is 0 and every payload was released.
 */
#ifndef QPULL_PULL_H
#define QPULL_PULL_H

#include "budget.h"
#include "fair.h"
#include "nbd/nbd.h"
#include "rate.h"
#include "source/map.h"
#include "source/source.h"
#include "vm_counters.h"

struct pull_job;

struct pull_config {
    struct nbd *nbd;              /* borrowed until pull_drop() */
    struct source *source;        /* borrowed until nreading is 0 after pull_fail() or pull_drop() */
    const struct map *allocation; /* borrowed likewise; base:allocation of the frozen disk, NULL: every byte is read */
    const struct map *const *contexts; /* borrowed until pull_init() returns, the maps likewise: of the negotiated
                                          contexts, in their order; NULL: pull_set_maps() brings them */
    size_t ncontexts;
    struct budget *budget;        /* borrowed */
    struct fair_member *fair;     /* borrowed: who reads */
    struct vm_counters *counters; /* borrowed: bytes sent and read are added here */
    void (*on_read)(void *arg);   /* a read of the source was answered; comes last in its callback. May be NULL */
    bool give_back_read;          /* what a client has been sent need not be kept */
    void *arg;
};

struct pull {
    struct pull_config c;
    const struct map **maps; /* owned: the array */
    size_t nreading;         /* reads of the source in flight */
    size_t window;           /* bytes being read or sent */
    size_t allowed;          /* bytes: what window may come to; see pull_allow() */
    uint64_t wanted;         /* bytes that READs ask for and nbd has not been handed */
    size_t unsent;           /* bytes handed to nbd that the client has not taken */
    unsigned nlent;          /* pieces that wait in memory of the source's */
    uint64_t ncopied;        /* pieces, ever, whose loan ended before they were sent */
    uint64_t nbytes;         /* payload handed to nbd */
    uint64_t ntaken;         /* of it: what the client has taken */
    size_t max_extents;      /* the connection's to set: in one answer about the disk's status */
    bool slow;               /* the connection's to set: the client takes so little that depth brings nothing */
    bool read_failed;        /* a READ was answered with an error */
    bool lost;               /* the source says that the frozen disk is gone */
    /* private */
    struct budget_user user;
    struct rate_user rate;         /* the connection joins and leaves it */
    struct pull_job *first, *last; /* owned: READs not finally answered, or with reads in flight, in order */
    struct pull_job *unstarted;    /* the first one with bytes not asked for yet */
    struct pull_job *open;         /* its reply is begun, and nothing else may be sent before its end */
    bool resting;                  /* slow, and has enough for now */
    bool pumping, again, flushing, stopped;
};

int pull_init(struct pull *p, const struct pull_config *config);
void pull_done(struct pull *p); /* also if zeroed */

/* As of the configuration, where there was none. */
static inline void pull_set_allocation(struct pull *p, const struct map *allocation)
{
    p->c.allocation = allocation;
}
/* Likewise all the contexts': before the first question about the disk's status. */
void pull_set_maps(struct pull *p, const struct map *const *contexts);

void pull_request(struct pull *p, struct nbd_request *r);

/* The source may go now; replies may still be on their way to the client. */
static inline void pull_let_go(struct pull *p)
{
    p->c.source = NULL;
}

/* A reply is half sent that must stay in one piece: do not feed nbd, which may have to answer at once. */
static inline bool pull_reply_is_open(const struct pull *p)
{
    return p->open != NULL;
}

/* Reads may begin that could not before. */
void pull_go_on(struct pull *p);
/* Sets the window; what has been read beyond it and is not on its way to the client is given up, the last first. */
void pull_allow(struct pull *p, size_t bytes);

/* The disk is lost: answers everything with -EIO, now. */
void pull_fail(struct pull *p, const struct failure *why);
/* nbd is gone or going: forgets its requests. */
void pull_drop(struct pull *p);

#endif
