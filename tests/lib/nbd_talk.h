/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * nbd_talk: a conversation during the handshake, and what the server must have said in the end. It is held with the
 * bytes at once, one by one and split at random, and with asks answered at once and later; the server must say the same
 * each time.
 */
#ifndef QPULL_TEST_NBD_TALK_H
#define QPULL_TEST_NBD_TALK_H

#include "lib/nbd_peer.h"
#include "nbd/wire.h"

/* The export that talk_begin() offers, and its transmission flags. */
#define TALK_SIZE UINT64_C(0x123456789a00)
#define TALK_SIMPLE (NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_CACHE)
#define TALK_STRUCTURED (TALK_SIMPLE | NBD_FLAG_SEND_DF)
#define TALK_FLAGS (NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)

extern const char *const talk_contexts[4]; /* "base:allocation", "qemu:allocation-depth", dirty monday, dirty tuesday */

/* One conversation and its outcome. */
struct talk {
    struct peer peer; /* a template */
    struct bytes in, want;
    bool ends;
    enum nbd_end end;
    const char *why;                  /* sentence, NULL: none */
    void (*after)(struct peer *peer); /* looks at the peer in the end; may be NULL */
};

struct talk talk_with_flags(uint32_t flags); /* the client's; the export is vm/vda, "a disk" */
struct talk talk_begin(void);                /* with both flags */
struct talk talk_structured(void);           /* structured replies negotiated, too */
void talk_ends(struct talk *t, enum nbd_end end, const char *why);
void talk_hold_once(struct talk *t, enum feeding how, bool at_once);
void talk_hold(struct talk *t); /* in every way; frees it */

/* For after. */
void talk_is_in_transmission(struct peer *p);
void talk_is_negotiating(struct peer *p);

/* An option with this data is refused as invalid, and the talk goes on. */
void talk_refused(uint32_t option, const char *data, size_t len, const char *sentence);
#define TALK_REFUSED(option, literal, sentence) talk_refused(option, literal, sizeof(literal) - 1, sentence)

/* Number and list of queries for say_meta(). */
#define TALK_QUERIES(...)                                                              \
    sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *), (const char *const[]) \
    {                                                                                  \
        __VA_ARGS__                                                                    \
    }

#endif
