/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/stream.h"

#include <errno.h>
#include <stdbool.h>

/* json-c counts in 32-bit ints, per call and per document; slices and this cap keep both far from the edge. */
#define SLICE_MAX ((size_t)64 << 10)
#define DOCUMENT_CAP ((size_t)1 << 30)

/* json-c counts the scalars inside the innermost container as one more level. */
#define TOKENER_DEPTH (QMP_STREAM_MAX_DEPTH + 1)

/*
 * Trailing characters are the next document's. Not JSON_TOKENER_STRICT: with it json-c 0.17 and 0.18 take every byte
 * above 0x7f for a control character; comments and trailing commas pass without it, and do not hurt. Not
 * JSON_TOKENER_VALIDATE_UTF8: it forgets a character that is split between two feeds (json-c 0.16).
 */
#define TOKENER_FLAGS JSON_TOKENER_ALLOW_TRAILING_CHARS

void qmp_stream_init(struct qmp_stream *s, size_t max_document)
{
    *s = (struct qmp_stream){.max_document = max_document ? MIN(max_document, DOCUMENT_CAP) : QMP_STREAM_MAX_DOCUMENT};
}

static void end_document(struct qmp_stream *s)
{
    if (s->tokener)
        json_tokener_free(TAKE_PTR(s->tokener));
    s->used = 0;
}

void qmp_stream_reset(struct qmp_stream *s)
{
    end_document(s);
    s->err = 0;
}

void qmp_stream_done(struct qmp_stream *s)
{
    end_document(s);
    s->err = -EPIPE;
}

static bool is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static int not_json(struct failure *f, enum json_tokener_error e)
{
    if (e == json_tokener_error_depth)
        return failure_set(f, -EMSGSIZE, "a document nests deeper than %d levels", QMP_STREAM_MAX_DEPTH);
    /* json-c 0.16 has no code of its own for memory that is not there. */
    return failure_set(f, -EPROTO, "not a JSON document: %s", json_tokener_error_desc(e));
}

/* Gives the tokener what it can take of a document that is under way. Stores how many bytes it took. */
static int feed_document(struct qmp_stream *s, const char *bytes, size_t len, size_t *ret_taken,
                         struct json_object **ret_doc, struct failure *f)
{
    size_t room = s->max_document - s->used;
    size_t slice = MIN(len, MIN(room, SLICE_MAX));
    struct json_object *doc;
    enum json_tokener_error e;

    if (room == 0)
        return failure_set(f, -EMSGSIZE, "a document is longer than %zu bytes", s->max_document);
    if (!s->tokener) {
        s->tokener = json_tokener_new_ex(TOKENER_DEPTH);
        if (!s->tokener)
            return failure_set(f, -ENOMEM, "out of memory");
        json_tokener_set_flags(s->tokener, TOKENER_FLAGS);
    }

    doc = json_tokener_parse_ex(s->tokener, bytes, (int)slice);
    e = json_tokener_get_error(s->tokener);
    if (e == json_tokener_continue) {
        s->used += slice;
        *ret_taken = slice;
        *ret_doc = NULL;
        return 0;
    }
    if (e != json_tokener_success || !doc)
        return not_json(f, e);

    *ret_taken = json_tokener_get_parse_end(s->tokener);
    *ret_doc = doc;
    end_document(s);
    return 0;
}

static int stream_fail(struct qmp_stream *s, int err)
{
    s->err = err;
    return err;
}

int qmp_stream_feed(struct qmp_stream *s, const char *bytes, size_t len, qmp_stream_cb cb, void *arg, struct failure *f)
{
    /* To json-c 0 is the end of its input: in a comment behind a value it makes a whole document of that value. */
    const char *zero = len > 0 ? memchr(bytes, 0, len) : NULL;

    if (s->err)
        return failure_set(f, s->err, "the stream has failed before");

    len = zero ? (size_t)(zero - bytes) : len;
    while (len > 0) {
        struct json_object *doc = NULL;
        size_t taken = 0;
        int r;

        if (s->used == 0) {
            if (is_space(*bytes)) {
                bytes++;
                len--;
                continue;
            }
            if (*bytes != '{')
                return stream_fail(
                    s, failure_set(f, -EPROTO, "not a JSON object: it begins with byte 0x%02x", (unsigned char)*bytes));
        }
        r = feed_document(s, bytes, len, &taken, &doc, f);
        if (r < 0)
            return stream_fail(s, r);
        bytes += taken;
        len -= taken;
        if (!doc)
            continue;
        r = cb(arg, doc);
        json_object_put(doc);
        if (r != 0)
            return stream_fail(s, r);
    }
    return zero ? stream_fail(s, failure_set(f, -EPROTO, "not a JSON document: a byte 0x00")) : 0;
}
