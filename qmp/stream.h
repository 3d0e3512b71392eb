/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * stream: bytes to JSON documents, as they come on a QMP socket. No I/O and no meaning: the
 * client (qmp/client) and the control socket (server/control) both put one in front of themselves.
 * Owned by whoever embeds it; any one thread.
 */
#ifndef QPULL_QMP_STREAM_H
#define QPULL_QMP_STREAM_H

#include "qmp/base.h"

#include <json-c/json.h>

/* A query-qmp-schema answer of QEMU 11.1 is about 300 KiB; query-named-block-nodes grows with disks and bitmaps. */
#define QMP_STREAM_MAX_DOCUMENT (64u << 20)
/*
 * Objects and arrays inside each other. QEMU's own parser allows 1024; its answers nest a dozen, and query-block one more
 * for each backing file: so this allows chains far longer than we work with (256, backup/disks).
 */
#define QMP_STREAM_MAX_DEPTH 512

struct qmp_stream {
    struct json_tokener *tokener; /* owned; NULL between documents: with room for such a depth it is 16 KiB */
    size_t used;                  /* bytes of the document under way, 0: between documents */
    size_t max_document;          /* bytes; a longer document is -EMSGSIZE */
    int err;                      /* a stream that failed stays failed */
};

/* doc is borrowed until the callback returns (json_object_get() keeps it). Non-zero stops the feed and is returned. */
typedef int (*qmp_stream_cb)(void *arg, struct json_object *doc);

/* max_document in bytes, 0: QMP_STREAM_MAX_DOCUMENT. */
void qmp_stream_init(struct qmp_stream *s, size_t max_document);
/* As new: for a peer that says where a document begins. Not from within the callback. */
void qmp_stream_reset(struct qmp_stream *s);
void qmp_stream_done(struct qmp_stream *s); /* or twice; not from within the callback */

/*
 * Feeds len bytes and calls cb once for each document that ends in them, in order. Documents may follow each other
 * with or without white space. Only objects are documents. Returns 0, what cb returned, -EPROTO (not JSON, not an
 * object), -EMSGSIZE (too long or too deep) or -ENOMEM; f (may be NULL) gets the sentence, except for cb's own.
 * The stream must live until the feed returns; what it did not consume by then is lost, so whatever is not 0 is final.
 */
int qmp_stream_feed(struct qmp_stream *s, const char *bytes, size_t len, qmp_stream_cb cb, void *arg,
                    struct failure *f);

#endif
