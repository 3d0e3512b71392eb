/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/agent_reader.h"

#include <errno.h>

void agent_reader_init(struct agent_reader *r, agent_reader_cb cb, void *arg)
{
    *r = (struct agent_reader){.cb = cb, .arg = arg};
    qmp_stream_init(&r->stream, AGENT_MAX_DOCUMENT);
}

void agent_reader_done(struct agent_reader *r)
{
    qmp_stream_done(&r->stream);
}

void agent_reader_begin(struct agent_reader *r, int64_t sync_id)
{
    r->sync_id = sync_id;
    r->state = AGENT_SKIPS;
    r->nbytes = 0;
}

static int on_document(void *arg, struct json_object *doc)
{
    struct agent_reader *r = arg;
    struct json_object *v;

    if (r->state == AGENT_SYNCING) {
        if (!json_object_object_get_ex(doc, "return", &v) || !json_object_is_type(v, json_type_int) ||
            json_object_get_int64(v) != r->sync_id)
            return 0; /* of a client before us */
        r->state = AGENT_SYNCED;
        r->cb(r->arg, NULL);
    } else if (r->state == AGENT_SYNCED) {
        if (!json_object_object_get_ex(doc, "return", &v) && !json_object_object_get_ex(doc, "error", &v))
            return 0;
        r->state = AGENT_IDLE;
        r->cb(r->arg, doc);
    }
    return 0;
}

static void delimiter(struct agent_reader *r)
{
    /* A flood of delimiters costs nothing: a stream between documents is as new. */
    if (r->stream.used || r->stream.err)
        qmp_stream_reset(&r->stream);
    if (r->state == AGENT_SKIPS)
        r->state = AGENT_SYNCING;
}

/* Bytes without a delimiter in them. */
static int feed_part(struct agent_reader *r, const char *bytes, size_t len, struct failure *f)
{
    struct failure why = {0};
    int result;

    if (len == 0 || r->state == AGENT_IDLE || r->state == AGENT_SKIPS)
        return 0;
    result = qmp_stream_feed(&r->stream, bytes, len, on_document, r, &why);
    if (result == 0 || r->state == AGENT_IDLE)
        return 0;
    if (r->state == AGENT_SYNCED) {
        r->state = AGENT_IDLE;
        return failure_set(f, result, "the guest agent says what is no answer: %s", why.text);
    }
    r->state = AGENT_SKIPS; /* the rest of what a client before us did not read */
    return 0;
}

int agent_reader_feed(struct agent_reader *r, const char *bytes, size_t len, struct failure *f)
{
    while (len > 0 && r->state != AGENT_IDLE) {
        const char *end = memchr(bytes, (unsigned char)AGENT_DELIMITER, len);
        size_t part = end ? (size_t)(end - bytes) : len;
        int result;

        r->nbytes += part + (end ? 1 : 0);
        if (r->nbytes > AGENT_MAX_BYTES) {
            r->state = AGENT_IDLE;
            return failure_set(f, -EMSGSIZE, "the guest agent says more than %u bytes and not the answer",
                               AGENT_MAX_BYTES);
        }
        result = feed_part(r, bytes, part, f);
        if (result < 0)
            return result;
        if (end)
            delimiter(r);
        part += end ? 1 : 0;
        bytes += part;
        len -= part;
    }
    return 0;
}
