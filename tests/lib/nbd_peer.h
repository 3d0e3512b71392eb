/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * nbd_peer: both neighbours of a `struct nbd` under test: the client, whose bytes are built and fed in every way a
 * socket could cut them, and the owner, who answers asks and requests at once or later and records what is sent. Bytes
 * are built by hand here, not by nbd/codec, so that a mistake there shows.
 */
#ifndef QPULL_TEST_NBD_PEER_H
#define QPULL_TEST_NBD_PEER_H

#include "nbd/nbd.h"

/* -- bytes --------------------------------------------------------------------------------------------------------- */
struct bytes {
    uint8_t *data; /* owned */
    size_t len, room;
};
void bytes_done(struct bytes *b);
void put_raw(struct bytes *b, const void *data, size_t len);
void put8(struct bytes *b, uint8_t v);
void put16(struct bytes *b, uint16_t v);
void put32(struct bytes *b, uint32_t v);
void put64(struct bytes *b, uint64_t v);
void put_text(struct bytes *b, const char *text); /* without the NUL */
void put_fill(struct bytes *b, uint8_t v, size_t len);

/* What a client says. */
void say_flags(struct bytes *b, uint32_t flags);
void say_option(struct bytes *b, uint32_t option, const struct bytes *data /* NULL: none */);
void say_option_text(struct bytes *b, uint32_t option, const char *data);
/* infos: ninfos numbers */
void say_info(struct bytes *b, uint32_t option, const char *name, size_t ninfos, const uint16_t *infos);
void say_meta(struct bytes *b, uint32_t option, const char *name, size_t nqueries, const char *const *queries);
void say_request(struct bytes *b, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint32_t length);
void say_request_ext(struct bytes *b, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint64_t length);

/* What the server is to answer. */
void want_greeting(struct bytes *b);
void want_reply(struct bytes *b, uint32_t option, uint32_t type, const struct bytes *data /* NULL: none */);
void want_reply_text(struct bytes *b, uint32_t option, uint32_t type, const char *text);
void want_info_export(struct bytes *b, uint32_t option, uint64_t size, uint16_t flags);
void want_info_text(struct bytes *b, uint32_t option, uint16_t info, const char *text);
void want_block_sizes(struct bytes *b, uint32_t option, uint32_t min, uint32_t preferred, uint32_t max);
void want_context(struct bytes *b, uint32_t option, uint32_t id, const char *name);
void want_simple(struct bytes *b, uint32_t error, uint64_t cookie);
void want_chunk(struct bytes *b, uint16_t flags, uint16_t type, uint64_t cookie, uint32_t length);
void want_chunk_ext(struct bytes *b, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint64_t length);

/* -- the owner ----------------------------------------------------------------------------------------------------- */
#define PEER_HELD_MAX 128

struct peer {
    struct nbd *nbd; /* owned */
    bool answer_at_once;
    /* what it answers */
    struct nbd_export export;
    const struct nbd_list_entry *entries;
    size_t nentries;
    const char *const *contexts;
    size_t ncontexts;
    struct failure refusal; /* err != 0: the answer to every ask */
    enum nbd_tls tls;
    /* serves requests; NULL: they are held */
    void (*serve)(struct peer *p, struct nbd_request *r);
    /* what it saw */
    struct bytes out;
    bool asked; /* an ask waits */
    enum nbd_ask_type ask;
    char ask_name[NBD_NAME_MAX + 1]; /* of the last one */
    bool ask_has_name;
    size_t ask_ncontexts;
    char ask_contexts[64][64];
    unsigned nasks, nstarttls;
    struct nbd_request *held[PEER_HELD_MAX];
    size_t nheld;
    unsigned nhangups;
    enum nbd_end end;
    struct failure why;
    int npayloads; /* given and not released */
};

void peer_start(struct peer *p); /* makes the machine; p is filled in by the test before */
void peer_done(struct peer *p);
void peer_answer(struct peer *p); /* the ask that waits */
/* Takes the i-th held request away from the list, for the test to reply to. */
struct nbd_request *peer_take(struct peer *p, size_t i);
/* A copy of bytes as payload, counted in npayloads. */
struct nbd_payload *peer_payload(struct peer *p, const void *data, size_t len);

/* How the client's bytes arrive. */
enum feeding { FEED_WHOLE, FEED_BYTEWISE, FEED_RANDOM };
/* Feeds all; where the machine takes no more, answers what waits. In the end nothing waits. */
void peer_feed(struct peer *p, const struct bytes *b, enum feeding how);
unsigned peer_random(void); /* seed: QPULL_TEST_SEED, else the clock; printed at the first use */

/* out equals want, byte by byte; says where not. Forgets both. */
void peer_expect(struct peer *p, struct bytes *want);

#endif
