/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* jobs_parse() on graphs as QEMU 7.2.22 draws them for each kind of job (shortened to what matters). */
#include "backup/jobs.h"
#include "lib/test.h"

#define NODE(id, type, name) "{\"id\": " #id ", \"type\": \"" type "\", \"name\": \"" name "\"}"
#define EDGE(parent, role, child) \
    "{\"parent\": " #parent ", \"name\": \"" role "\", \"child\": " #child ", \"perm\": []}"
#define GRAPH(nodes, edges) "{\"nodes\": [" nodes "], \"edges\": [" edges "]}"
#define LAYERS                     \
    NODE(1, "block-driver", "top") \
    ", " NODE(2, "block-driver", "mid") ", " NODE(3, "block-driver", "base") ", " NODE(4, "block-driver", "tgt")

static const char stream[] =
    GRAPH(LAYERS ", " NODE(9, "block-job", "j"), EDGE(9, "main node", 1) ", " EDGE(9, "active node", 1) ", " EDGE(
                                                     9, "intermediate node", 2) ", " EDGE(1, "backing", 2));
static const char commit[] =
    GRAPH(LAYERS ", " NODE(9, "block-job", "j"),
          EDGE(9, "main node", 1) ", " EDGE(9, "intermediate node", 2) ", " EDGE(9, "base", 3));
static const char mirror[] = GRAPH(LAYERS ", " NODE(9, "block-job", "j"),
                                   EDGE(9, "main node", 2) ", " EDGE(9, "source", 1) ", " EDGE(9, "target", 4));
static const char backup[] =
    GRAPH(LAYERS ", " NODE(9, "block-job", "j"), EDGE(9, "main node", 1) ", " EDGE(9, "target", 4));
static const char ours[] =
    GRAPH(LAYERS ", " NODE(9, "block-job", "qpull-0123abcd-keep0"), EDGE(9, "source", 1) ", " EDGE(9, "target", 4));
static const char strange[] =
    GRAPH("{}, " LAYERS ", " NODE(9, "block-job", "j"), EDGE(9, "source", 77) ", {}, " EDGE(9, "target", 4));

static struct job_list parse(const char *text)
{
    struct json_object *graph = json_tokener_parse(text);
    struct job_list l = {0};

    assert_non_null(graph);
    assert_int_equal(jobs_parse(graph, &l), 0);
    json_object_put(graph);
    return l;
}

static void expect(const char *text, enum job_kind kind, const char *from, const char *to)
{
    struct job_list l = parse(text);
    const struct job *j = jobs_find(&l, "j");

    assert_non_null(j);
    assert_int_equal(l.njobs, 1);
    assert_int_equal(j->kind, kind);
    assert_int_equal(j->nfrom, 1);
    assert_string_equal(j->from[0], from);
    assert_string_equal(j->to, to);
    assert_null(jobs_find(&l, "k"));
    jobs_done(&l);
}

static void each_kind_of_job_is_understood(void **state)
{
    expect(stream, JOB_STREAM, "mid", "top");
    expect(commit, JOB_COMMIT, "mid", "base");
    expect(mirror, JOB_MIRROR, "top", "tgt");
}

static void jobs_that_take_nothing_away_and_ours_are_none(void **state)
{
    static const char *const texts[] = {backup, ours, strange, "{}", "[]"};

    for (size_t i = 0; i < ARRAY_SIZE(texts); i++) {
        struct job_list l = parse(texts[i]);

        assert_int_equal(l.njobs, 0);
        jobs_done(&l);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_kind_of_job_is_understood),
        cmocka_unit_test(jobs_that_take_nothing_away_and_ours_are_none),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
