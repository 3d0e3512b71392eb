/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/test.h"
#include "qmp/stream.h"

#include <errno.h>
#include <stdio.h>

#define MAX_DOCUMENT 64 /* small, so that a test reaches it */

/* Everything the stream said, one document per line. */
struct heard {
    char text[4096];
    unsigned ndocuments;
    int answer;         /* what the callback returns … */
    unsigned answer_at; /* … at this document, counting from 1 */
};

static int on_document(void *arg, struct json_object *doc)
{
    struct heard *h = arg;
    size_t len = strlen(h->text);

    (void)snprintf(h->text + len, sizeof(h->text) - len, "%s\n",
                   json_object_to_json_string_ext(doc, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
    h->ndocuments++;
    return h->ndocuments == h->answer_at ? h->answer : 0;
}

/* Feeds text in pieces of piece bytes into a new stream. */
static int feed_in(const char *text, size_t len, size_t piece, size_t max_document, struct heard *h, struct failure *f)
{
    struct qmp_stream s;
    int r = 0;

    *h = (struct heard){0};
    qmp_stream_init(&s, max_document);
    for (size_t i = 0; r == 0 && i < len; i += piece) {
        /* A copy of its own for each piece lets the sanitizer see a read beyond it. */
        size_t n = MIN(piece, len - i);
        _cleanup_free_ char *copy = malloc(n);

        assert_non_null(copy);
        memcpy(copy, text + i, n);
        r = qmp_stream_feed(&s, copy, n, on_document, h, f);
    }
    if (r < 0) {
        char more[] = "{}";

        assert_int_equal(qmp_stream_feed(&s, more, 2, on_document, h, NULL), r);
    }
    qmp_stream_done(&s);
    qmp_stream_done(&s);
    return r;
}

static void expect(const char *text, const char *documents)
{
    for (size_t piece = 1; piece <= strlen(text); piece++) {
        struct failure f = {0};
        struct heard h;

        assert_int_equal(feed_in(text, strlen(text), piece, /* max_document= */ 0, &h, &f), 0);
        assert_string_equal(h.text, documents);
        assert_int_equal(f.err, 0);
    }
}

static void expect_error_of(const char *text, size_t len, int err)
{
    for (size_t piece = 1; piece <= len; piece++) {
        struct failure f = {0};
        struct heard h;

        assert_int_equal(feed_in(text, len, piece, MAX_DOCUMENT, &h, &f), err);
        assert_int_equal(f.err, err);
        assert_true(strlen(f.text) > 0);
    }
}

static void expect_error(const char *text, int err)
{
    expect_error_of(text, strlen(text), err);
}

static void documents_may_be_split_anywhere(void **state)
{
    expect("{\"return\": {\"a\": [1, -2.5, true, null], \"b\": \"\\u00e9\\ud83d\\ude00 \xc3\xa9\"}, \"id\": 17}\r\n",
           "{\"return\":{\"a\":[1,-2.5,true,null],\"b\":\"\xc3\xa9\xf0\x9f\x98\x80 \xc3\xa9\"},\"id\":17}\n");
}

static void several_documents_may_come_at_once(void **state)
{
    expect("{\"a\":1}\r\n{\"b\":2}\r\n{\"c\":{}}\r\n", "{\"a\":1}\n{\"b\":2}\n{\"c\":{}}\n");
}

static void documents_need_no_white_space_between_them(void **state)
{
    expect("{}{\"a\":1}{}", "{}\n{\"a\":1}\n{}\n");
}

static void white_space_alone_is_nothing(void **state)
{
    expect(" \r\n\t\n  ", "");
}

static void half_a_document_is_not_reported(void **state)
{
    expect("{\"a\":1}{\"b\":", "{\"a\":1}\n");
}

static void numbers_keep_all_64_bits(void **state)
{
    expect("{\"a\":18446744073709551615,\"b\":-9223372036854775808}",
           "{\"a\":18446744073709551615,\"b\":-9223372036854775808}\n");
}

static void rubbish_is_a_protocol_error(void **state)
{
    static const char *const rubbish[] = {
        "hello",    "[]",      "1",         "\"a\"",       "null",        "}",
        "{]",       "{a:1}",   "{\"a\" 1}", "{\"a\":01x}", "{\"a\":tru}", "{} x",
        "/* */ {}", "{\"a\"}", "{\"a\":}",  "{\"a\":1 2}", "\xff{}",      "\xef\xbb\xbf{}",
    };

    for (size_t i = 0; i < ARRAY_SIZE(rubbish); i++)
        expect_error(rubbish[i], -EPROTO);
}

static void a_nul_byte_is_a_protocol_error(void **state)
{
    static const char in_string[] = "{\"a\":\"x\0y\"}", between[] = "{}\0{}", in_space[] = "{ \0}", first[] = "\0{}";
    /* json-c 0.16 takes the value before such a comment for the whole document. */
    static const char in_comment[] = "{\"a\":[\"b\"//\0", in_long_comment[] = "{\"a\":[{\"b\":1}/*\0*/]}";

    expect_error_of(in_string, sizeof(in_string) - 1, -EPROTO);
    expect_error_of(between, sizeof(between) - 1, -EPROTO);
    expect_error_of(in_space, sizeof(in_space) - 1, -EPROTO);
    expect_error_of(first, sizeof(first) - 1, -EPROTO);
    expect_error_of(in_comment, sizeof(in_comment) - 1, -EPROTO);
    expect_error_of(in_long_comment, sizeof(in_long_comment) - 1, -EPROTO);
}

/* {"a":"000…"} of len bytes in all */
static char *document_of(size_t len)
{
    char *text = malloc(len + 1);

    assert_non_null(text);
    (void)snprintf(text, len + 1, "{\"a\":\"%0*d\"}", (int)len - 8, 0);
    return text;
}

static void a_document_may_be_as_long_as_the_limit_and_no_longer(void **state)
{
    _cleanup_free_ char *fits = document_of(MAX_DOCUMENT), *too_long = document_of(MAX_DOCUMENT + 1);

    for (size_t piece = 1; piece <= MAX_DOCUMENT; piece++) {
        struct heard h;

        assert_int_equal(feed_in(fits, MAX_DOCUMENT, piece, MAX_DOCUMENT, &h, NULL), 0);
        assert_int_equal(h.ndocuments, 1);
    }
    expect_error(too_long, -EMSGSIZE);
}

static void the_limit_counts_for_each_document_anew(void **state)
{
    char text[4 * MAX_DOCUMENT + 1] = "";
    struct heard h;

    for (unsigned i = 0; i < 4; i++) {
        _cleanup_free_ char *document = document_of(MAX_DOCUMENT);

        memcpy(text + (size_t)i * MAX_DOCUMENT, document, MAX_DOCUMENT);
    }
    for (size_t piece = 1; piece < sizeof(text); piece++) {
        assert_int_equal(feed_in(text, strlen(text), piece, MAX_DOCUMENT, &h, NULL), 0);
        assert_int_equal(h.ndocuments, 4);
    }
}

static void endless_input_keeps_bounded_memory(void **state)
{
    char spaces[4096];
    struct qmp_stream s;
    struct heard h = {0};
    int r = 0;

    memset(spaces, ' ', sizeof(spaces));
    qmp_stream_init(&s, MAX_DOCUMENT);
    /* Between documents white space is free … */
    for (unsigned i = 0; i < 100; i++)
        assert_int_equal(qmp_stream_feed(&s, spaces, sizeof(spaces), on_document, &h, NULL), 0);
    /* … inside one it counts. */
    assert_int_equal(qmp_stream_feed(&s, "{", 1, on_document, &h, NULL), 0);
    for (unsigned i = 0; i < MAX_DOCUMENT && r == 0; i++)
        r = qmp_stream_feed(&s, spaces, 1, on_document, &h, NULL);
    assert_int_equal(r, -EMSGSIZE);
    qmp_stream_done(&s);
}

/* {"a":{"a":…1…}} */
static char *nested(unsigned depth)
{
    char *text = calloc(1, depth * 6 + 2);
    char *p = text;

    assert_non_null(text);
    for (unsigned i = 0; i < depth; i++)
        p = stpcpy(p, "{\"a\":");
    p = stpcpy(p, "1");
    for (unsigned i = 0; i < depth; i++)
        p = stpcpy(p, "}");
    return text;
}

static void a_document_may_be_as_deep_as_the_limit_and_no_deeper(void **state)
{
    _cleanup_free_ char *fits = nested(QMP_STREAM_MAX_DEPTH), *too_deep = nested(QMP_STREAM_MAX_DEPTH + 1);
    struct failure f = {0};
    struct heard h;

    assert_int_equal(feed_in(fits, strlen(fits), 1, /* max_document= */ 0, &h, &f), 0);
    assert_int_equal(h.ndocuments, 1);
    assert_int_equal(feed_in(too_deep, strlen(too_deep), 1, /* max_document= */ 0, &h, &f), -EMSGSIZE);
    assert_non_null(strstr(f.text, "deeper"));
}

static void a_document_longer_than_a_slice_arrives_whole(void **state)
{
    const size_t len = 1u << 20;
    _cleanup_free_ char *text = document_of(len);
    const size_t pieces[] = {len, 65536, 65537, 1000};

    for (size_t i = 0; i < ARRAY_SIZE(pieces); i++) {
        struct heard h;

        assert_int_equal(feed_in(text, len, pieces[i], /* max_document= */ 0, &h, NULL), 0);
        assert_int_equal(h.ndocuments, 1);
    }
}

static void the_callback_can_stop_the_feed(void **state)
{
    static const char text[] = "{\"a\":1}{\"b\":2}{\"c\":3}";
    struct heard h = {.answer = -ECANCELED, .answer_at = 2};
    struct failure f = {0};
    struct qmp_stream s;

    qmp_stream_init(&s, /* max_document= */ 0);
    assert_int_equal(qmp_stream_feed(&s, text, sizeof(text) - 1, on_document, &h, &f), -ECANCELED);
    assert_string_equal(h.text, "{\"a\":1}\n{\"b\":2}\n");
    assert_int_equal(f.err, 0);
    qmp_stream_done(&s);
}

static int on_document_to_keep(void *arg, struct json_object *doc)
{
    *(struct json_object **)arg = json_object_get(doc);
    return 0;
}

static void a_document_can_be_kept(void **state)
{
    struct json_object *kept = NULL;
    struct qmp_stream s;

    qmp_stream_init(&s, /* max_document= */ 0);
    assert_int_equal(qmp_stream_feed(&s, "{\"a\":1}", 7, on_document_to_keep, &kept, NULL), 0);
    qmp_stream_done(&s);
    assert_string_equal(json_object_to_json_string_ext(kept, JSON_C_TO_STRING_PLAIN), "{\"a\":1}");
    json_object_put(kept);
}

/* An idle QEMU costs next to nothing. */
static void between_documents_nothing_is_kept(void **state)
{
    struct heard h = {0};
    struct qmp_stream s;

    qmp_stream_init(&s, /* max_document= */ 0);
    assert_null(s.tokener);
    assert_int_equal(qmp_stream_feed(&s, "{}{", 3, on_document, &h, NULL), 0);
    assert_non_null(s.tokener);
    assert_int_equal(qmp_stream_feed(&s, "} ", 2, on_document, &h, NULL), 0);
    assert_null(s.tokener);
    assert_int_equal(h.ndocuments, 2);
    qmp_stream_done(&s);
}

static void a_stream_that_is_done_takes_nothing(void **state)
{
    struct heard h = {0};
    struct qmp_stream s;

    qmp_stream_init(&s, /* max_document= */ 0);
    qmp_stream_done(&s);
    assert_true(qmp_stream_feed(&s, "{}", 2, on_document, &h, NULL) < 0);
    assert_int_equal(h.ndocuments, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(documents_may_be_split_anywhere),
        cmocka_unit_test(several_documents_may_come_at_once),
        cmocka_unit_test(documents_need_no_white_space_between_them),
        cmocka_unit_test(white_space_alone_is_nothing),
        cmocka_unit_test(half_a_document_is_not_reported),
        cmocka_unit_test(numbers_keep_all_64_bits),
        cmocka_unit_test(rubbish_is_a_protocol_error),
        cmocka_unit_test(a_nul_byte_is_a_protocol_error),
        cmocka_unit_test(a_document_may_be_as_long_as_the_limit_and_no_longer),
        cmocka_unit_test(the_limit_counts_for_each_document_anew),
        cmocka_unit_test(endless_input_keeps_bounded_memory),
        cmocka_unit_test(a_document_may_be_as_deep_as_the_limit_and_no_deeper),
        cmocka_unit_test(a_document_longer_than_a_slice_arrives_whole),
        cmocka_unit_test(the_callback_can_stop_the_feed),
        cmocka_unit_test(a_document_can_be_kept),
        cmocka_unit_test(between_documents_nothing_is_kept),
        cmocka_unit_test(a_stream_that_is_done_takes_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
