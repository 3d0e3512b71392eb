/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* nbd_line: a connection in the transmission phase, in one of its three forms, with what the client says and is to
 * hear. */
#ifndef QPULL_TEST_NBD_LINE_H
#define QPULL_TEST_NBD_LINE_H

#include "lib/nbd_peer.h"
#include "nbd/wire.h"

#define LINE_SIZE UINT64_C(0x2000000000) /* 128 GiB: more than 32 bits of bytes */
#define LINE_MAX_BLOCK 4194304
#define LINE_COOKIE UINT64_C(0x1122334455667788)

enum form { SIMPLE, STRUCTURED, EXTENDED };
/* NOLINTBEGIN(bugprone-macro-parentheses): a variable that is declared cannot stand in parentheses */
#define EACH_FORM(form) for (enum form form = SIMPLE; form <= EXTENDED; form++)
#define EACH_CHUNK_FORM(form) for (enum form form = STRUCTURED; form <= EXTENDED; form++)
/* NOLINTEND(bugprone-macro-parentheses) */

/* A connection in transmission, with what the client says next and what it is to hear. */
struct line {
    struct peer peer;
    enum form form;
    struct bytes in, want;
};

/* Opens the export "" (its size is LINE_SIZE unless peer.export says else) with the first ncontexts of two contexts. */
void line_open(struct line *l, enum form form, size_t ncontexts);
void line_close(struct line *l);

void line_say(struct line *l, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint64_t length);
void line_feed(struct line *l, enum feeding how); /* what was said */
/* Says and feeds one request that reaches the owner, and takes it. */
struct nbd_request *line_request(struct line *l, uint16_t flags, uint16_t type, uint64_t offset, uint64_t length);
void line_give(struct line *l, struct nbd_request *r, uint64_t offset, const char *text); /* nbd_reply_data() */

/* offset: the request's, told with extended headers. */
void line_want_head(struct line *l, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset, uint32_t length);
void line_want_error(struct line *l, uint64_t cookie, uint64_t offset, uint32_t error, const char *sentence);
void line_want_done(struct line *l, uint64_t cookie, uint64_t offset);
void line_want_data(struct line *l, uint16_t flags, uint64_t cookie, uint64_t asked, uint64_t offset, const char *text);

void line_expect(struct line *l);
void line_expect_alive(struct line *l);
void line_expect_end(struct line *l, enum nbd_end end, const char *why);

#endif
