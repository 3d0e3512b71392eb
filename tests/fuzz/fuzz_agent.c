/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The guest agent's reader under any bytes, in any pieces, for one question after another: at most one answer to each,
 * never before its sync, and what is read for one stays within its limit.
 */
#include "qmp/agent_reader.h"

#include <errno.h>

#define SYNC_ID 7
#define QUESTIONS_MAX 8

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len);

struct world {
    struct agent_reader reader;
    unsigned nsyncs, nanswers, nquestions;
};

static void on_heard(void *arg, struct json_object *doc)
{
    struct world *w = arg;

    if (!doc) {
        w->nsyncs++;
        return;
    }
    w->nanswers++;
    if (w->nanswers > w->nsyncs || !json_object_is_type(doc, json_type_object))
        abort();
    (void)json_object_to_json_string_ext(doc, JSON_C_TO_STRING_PLAIN);
    if (w->nquestions < QUESTIONS_MAX) {
        w->nquestions++;
        agent_reader_begin(&w->reader, SYNC_ID);
    }
}

/* The first byte says how long the pieces are. */
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len)
{
    struct world w = {0};
    size_t piece;

    if (len < 2)
        return 0;
    piece = (size_t)bytes[0] + 1;
    agent_reader_init(&w.reader, on_heard, &w);
    agent_reader_begin(&w.reader, SYNC_ID);
    for (size_t i = 1; i < len; i += piece) {
        int r = agent_reader_feed(&w.reader, (const char *)bytes + i, MIN(piece, len - i), NULL);

        if (r != 0 && r != -EPROTO && r != -EMSGSIZE)
            abort();
        if (w.reader.stream.used > AGENT_MAX_DOCUMENT || w.nsyncs > w.nquestions + 1)
            abort();
    }
    agent_reader_done(&w.reader);
    return 0;
}
