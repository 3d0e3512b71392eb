/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What happens to each record when layers are committed, for layers written down as text: one word for each layer, the
 * live one first: "." no record, "r" a whole one, "i" an inconsistent one, "o" one that does not record, "b" a busy
 * one; after it, where they are not as usual, "R": raw, and "+": larger than the others.
 */
#include "backup/commit_plan.h"
#include "lib/test.h"
#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>

#define KIB 1024

static struct json_object *bitmap_of(char kind)
{
    struct json_object *b = qmp_args_strings("name", "ck", NULL);

    json_object_object_add(b, "granularity", json_object_new_int(64 * KIB));
    json_object_object_add(b, "count", json_object_new_int(192 * KIB));
    json_object_object_add(b, "persistent", json_object_new_boolean(true));
    json_object_object_add(b, "recording", json_object_new_boolean(kind != 'o'));
    json_object_object_add(b, "busy", json_object_new_boolean(kind == 'b'));
    if (kind == 'i')
        json_object_object_add(b, "inconsistent", json_object_new_boolean(true));
    return b;
}

static struct json_object *node_of(const char *name, const char *word)
{
    bool raw = strchr(word, 'R');
    struct json_object *n = qmp_args_strings("node-name", name, "drv", raw ? "raw" : "qcow2", "file", name, NULL);
    struct json_object *image = json_object_new_object(), *bitmaps = json_object_new_array();

    json_object_object_add(image, "virtual-size", json_object_new_int(strchr(word, '+') ? 2 * KIB * KIB : KIB * KIB));
    if (!raw)
        json_object_object_add(image, "format-specific",
                               json_tokener_parse("{\"type\": \"qcow2\", \"data\": {\"compat\": \"1.1\"}}"));
    if (word[0] != '.')
        json_object_array_add(bitmaps, bitmap_of(word[0]));
    json_object_object_add(n, "image", image);
    json_object_object_add(n, "dirty-bitmaps", bitmaps);
    return n;
}

static void add_graph_node(struct json_object *graph, int id, const char *type, const char *name)
{
    struct json_object *n = qmp_args_strings("type", type, "name", name, NULL);

    json_object_object_add(n, "id", json_object_new_int(id));
    json_object_array_add(qmp_get(graph, "nodes"), n);
}

static void add_edge(struct json_object *graph, int parent, const char *role, int child)
{
    struct json_object *e = qmp_args_strings("name", role, NULL);

    json_object_object_add(e, "parent", json_object_new_int(parent));
    json_object_object_add(e, "child", json_object_new_int(child));
    json_object_array_add(qmp_get(graph, "edges"), e);
}

/* A filter of a commit job stands above layer `filter`; -1: none. */
static void make_chain(struct chain *c, const char *layers, int filter)
{
    struct json_object *named = json_object_new_array(), *graph = json_object_new_object();
    char text[128], name[16], *rest = text;
    struct failure f = {0};
    int n = 0;

    json_object_object_add(graph, "nodes", json_object_new_array());
    json_object_object_add(graph, "edges", json_object_new_array());
    (void)snprintf(text, sizeof(text), "%s", layers);
    for (char *word; (word = strsep(&rest, " ")); n++) {
        (void)snprintf(name, sizeof(name), "n%d", n);
        json_object_array_add(named, node_of(name, word));
        add_graph_node(graph, n + 1, "block-driver", name);
        if (n > 0 && n != filter)
            add_edge(graph, n, "backing", n + 1);
    }
    if (filter > 0) {
        json_object_array_add(named, qmp_args_strings("node-name", "#block1", "drv", "commit_top", NULL));
        add_graph_node(graph, 100, "block-driver", "#block1");
        add_graph_node(graph, 101, "block-job", "theirs");
        add_edge(graph, filter, "backing", 100);
        add_edge(graph, 100, "backing", filter + 1);
        add_edge(graph, 101, "main node", 100);
    }
    assert_int_equal(chain_init(c, named, graph, "n0", &f), 0);
    assert_int_equal(c->nlayers, n);
    json_object_put(named);
    json_object_put(graph);
}

static const char *const action_names[] = {[COMMIT_LEAVE] = "leave",
                                           [COMMIT_MERGE] = "merge",
                                           [COMMIT_MAKE] = "make",
                                           [COMMIT_HUSK] = "husk",
                                           [COMMIT_DROP] = "drop"};

static const struct {
    const char *layers;
    size_t top, base;
    const char *expected; /* action, then " marks", " store" */
    const char *sources;
} cases[] = {
    /* begun above what is committed */
    {"r . .", 1, 2, "leave", ""},
    {"r r . .", 2, 3, "leave", ""},
    /* begun in a committed layer */
    {"r .", 0, 1, "make", "n0"},
    {"r r .", 0, 2, "make marks", "n0 n1"}, /* the upper one may be younger than its layer */
    {"r r .", 1, 2, "make", "n1"},
    {". r .", 0, 2, "make marks", "n1"},
    {"i r .", 0, 2, "make marks", "n1"},
    {"r o r .", 0, 3, "make marks", "n0 n2"},
    {"r r r .", 2, 3, "make store", "n2"},
    {"r . r .", 2, 3, "make", "n2"},
    {"r r . r .", 2, 4, "make marks store", "n3"},
    /* … and without use */
    {"i .", 0, 1, "leave", ""},
    {"r i .", 1, 2, "husk", ""},
    {"r r i .", 2, 3, "husk store", ""},
    {"r o .", 1, 2, "husk", ""},
    {"r i .", 0, 2, "leave", "n0"},
    /* begun in base, or below */
    {"r r", 0, 1, "merge", "n0"},
    {". r", 0, 1, "merge", ""},
    {"r i", 0, 1, "leave", "n0"},
    {"r r r r", 1, 2, "merge", "n1"},
    {"r . r", 0, 1, "leave", "n0"},
    {"r i r", 0, 1, "leave", "n0"},
    {"r r i", 0, 1, "merge", "n0"},
    /* another size: the layer's allocation stands in */
    {"r+ r .", 0, 2, "make marks", "n0"},
    {"r+ r", 0, 1, "merge", "n0"},
    {". r+ r .", 1, 3, "make marks", "n1"},
    /* a base without bitmaps */
    {"r .R", 0, 1, "drop", "n0"},
    {". .R", 0, 1, "", ""},
    {"r . .R", 1, 2, "leave", ""},
    {"i .R", 0, 1, "leave", ""},
    {"r i .R", 1, 2, "drop", ""},
    {"r r r .R", 2, 3, "drop store", "n2"},
};

static void expect_plan(size_t i, int filter)
{
    char text[64] = "", sources[64] = "";
    struct commit_plan p = {0};
    const struct commit_record *r;
    struct chain c;
    struct failure f = {0};

    make_chain(&c, cases[i].layers, filter);
    if (commit_plan_make(&p, &c, cases[i].top, cases[i].base, &f) < 0)
        fail_msg("'%s': %s", cases[i].layers, f.text);
    r = commit_plan_find(&p, "ck");
    if (r)
        (void)snprintf(text, sizeof(text), "%s%s%s", action_names[r->action],
                       r->needs_marks && r->action == COMMIT_MAKE ? " marks" : "", r->needs_store ? " store" : "");
    for (size_t k = 0; r && k < r->nsources; k++) {
        if (r->action == COMMIT_HUSK || (r->action == COMMIT_DROP && r->reason != REASON_NONE))
            continue;
        (void)snprintf(sources + strlen(sources), sizeof(sources) - strlen(sources), "%s%s", k ? " " : "",
                       r->sources[k]);
    }
    if (strcmp(text, cases[i].expected) != 0 || strcmp(sources, cases[i].sources) != 0)
        fail_msg("'%s', %zu into %zu: \"%s\" of \"%s\", not \"%s\" of \"%s\"", cases[i].layers, cases[i].top,
                 cases[i].base, text, sources, cases[i].expected, cases[i].sources);
    commit_plan_done(&p);
    chain_done(&c);
}

static void every_spread_of_records_has_its_plan(void **state)
{
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        expect_plan(i, -1);
        expect_plan(i, (int)cases[i].base); /* a job's filter is no layer */
    }
}

static void a_record_in_use_is_waited_for(void **state)
{
    struct failure f = {0};
    struct commit_plan p;
    struct chain c;

    make_chain(&c, "r b . .", -1);
    assert_int_equal(commit_plan_make(&p, &c, 1, 2, &f), -EBUSY);
    assert_non_null(strstr(f.text, "'ck' on node 'n1' is in use"));
    assert_int_equal(commit_plan_make(&p, &c, 2, 3, &f), 0); /* what is above top is nobody's business */
    commit_plan_done(&p);
    chain_done(&c);
}

static void a_merged_record_says_at_least_what_its_parts_say(void **state)
{
    struct failure f = {0};
    struct commit_plan p;
    struct chain c;

    make_chain(&c, "r r .", -1);
    assert_int_equal(commit_plan_make(&p, &c, 0, 2, &f), 0);
    assert_int_equal(commit_plan_find(&p, "ck")->granularity, 64 * KIB);
    assert_int_equal(commit_plan_find(&p, "ck")->least, 128 * KIB); /* the last piece may be cut by the disk's end */
    assert_null(commit_plan_find(&p, "other"));
    commit_plan_done(&p);
    chain_done(&c);
}

static void what_is_left_of_a_deleted_checkpoint_is_no_record(void **state)
{
    static const char *const dead[] = {"other", "ck"};
    struct failure f = {0};
    struct commit_plan p;
    struct chain c;

    make_chain(&c, "r b r .R", -1); /* in use or not, usable or not, and whatever base can keep */
    c.dead = dead;
    c.ndead = 1;
    assert_int_equal(commit_plan_make(&p, &c, 0, 3, &f), -EBUSY);
    c.ndead = ARRAY_SIZE(dead);
    assert_int_equal(commit_plan_make(&p, &c, 0, 3, &f), 0);
    assert_null(commit_plan_find(&p, "ck"));
    commit_plan_done(&p);
    chain_done(&c);
}

static void layers_are_found_by_node_and_by_file(void **state)
{
    struct failure f = {0};
    struct chain c;
    size_t layer = 9;

    make_chain(&c, ". . .", -1);
    assert_int_equal(chain_find(&c, "n1", &layer, &f), 0);
    assert_int_equal(layer, 1);
    assert_int_equal(chain_find(&c, "nobody", &layer, &f), -ENOENT);
    assert_null(chain_job(&c, NULL));
    chain_done(&c);
    make_chain(&c, ". . .", 1);
    assert_string_equal(chain_job(&c, NULL), "theirs");
    assert_null(chain_job(&c, "theirs"));
    chain_done(&c);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_spread_of_records_has_its_plan),
        cmocka_unit_test(a_record_in_use_is_waited_for),
        cmocka_unit_test(a_merged_record_says_at_least_what_its_parts_say),
        cmocka_unit_test(what_is_left_of_a_deleted_checkpoint_is_no_record),
        cmocka_unit_test(layers_are_found_by_node_and_by_file),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
