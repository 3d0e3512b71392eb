/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The QMP stream under any bytes: what it takes whole it takes in pieces, as the same documents, and it never keeps
 * more than the limit. The reverse does not hold: json-c 0.16 lets malformed numbers pass where they are split. Nor is
 * it so with what json-c allows and JSON has not: a comment behind a document holds that back until it ends, unless the
 * document came alone; and a number that ends in ".+" or ".-" keeps that sign or loses it.
 */
#include "qmp/stream.h"

#include <errno.h>
#include <stdbool.h>

#define MAX_DOCUMENT 4096

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len);

struct heard {
    unsigned ndocuments;
    size_t length; /* of all documents, printed */
};

static int on_document(void *arg, struct json_object *doc)
{
    struct heard *h = arg;

    if (!json_object_is_type(doc, json_type_object))
        abort();
    h->ndocuments++;
    h->length += strlen(json_object_to_json_string_ext(doc, JSON_C_TO_STRING_PLAIN));
    return 0;
}

static int feed(const uint8_t *bytes, size_t len, size_t piece, struct heard *h)
{
    struct qmp_stream s;
    int r = 0;

    qmp_stream_init(&s, MAX_DOCUMENT);
    for (size_t i = 0; r == 0 && i < len; i += piece)
        r = qmp_stream_feed(&s, (const char *)bytes + i, MIN(piece, len - i), on_document, h, NULL);
    if (s.used > MAX_DOCUMENT)
        abort();
    qmp_stream_done(&s);
    return r;
}

/* Comments and numbers that JSON has not, or what may be the beginning of one. */
static bool is_lenient(const uint8_t *bytes, size_t len)
{
    bool found = memchr(bytes, '/', len);

    for (size_t i = 1; i < len; i++)
        found |= bytes[i - 1] == '.' && (bytes[i] == '+' || bytes[i] == '-');
    return found;
}

/* The first byte says how long the pieces are. */
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len)
{
    struct heard whole = {0}, pieces = {0};
    bool lenient;
    int r;

    if (len < 2)
        return 0;
    lenient = is_lenient(bytes + 1, len - 1);
    r = feed(bytes + 1, len - 1, len, &whole);
    if (r != 0 && r != -EPROTO && r != -EMSGSIZE)
        abort();
    if (feed(bytes + 1, len - 1, 1 + bytes[0], &pieces) != 0 && r == 0 && !lenient)
        abort();
    if (r == 0 && !lenient && (whole.ndocuments != pieces.ndocuments || whole.length != pieces.length))
        abort();
    return 0;
}
