/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * disk_list_parse() on what QEMU 7.2.22 itself answered (disks-7.2.json: query-block, query-named-block-nodes flat, and
 * x-debug-query-block-graph for each situation; only directories were renamed and throttle limits left out).
 */
#include "backup/disks.h"
#include "lib/test.h"
#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>

#define MIB ((uint64_t)1 << 20)
#define VDA_PATH "/machine/peripheral/vda/virtio-backend"

static struct json_object *captures;

static int load_captures(void **state)
{
    const char *slash = strrchr(__FILE__, '/');
    char path[512];

    (void)snprintf(path, sizeof(path), "%.*sdisks-7.2.json", slash ? (int)(slash + 1 - __FILE__) : 0, __FILE__);
    captures = json_object_from_file(path);
    if (!captures)
        print_error("%s: %s\n", path, json_util_get_last_err());
    return captures ? 0 : -1;
}

static int drop_captures(void **state)
{
    json_object_put(captures);
    return 0;
}

static struct disk_list *parse(const char *situation)
{
    struct json_object *c = qmp_get(captures, situation);
    struct disk_list *l = NULL;
    struct failure f = {0};

    assert_non_null(c);
    if (disk_list_parse(qmp_get(c, "query-block"), qmp_get(c, "query-named-block-nodes"),
                        qmp_get(c, "x-debug-query-block-graph"), &l, &f) < 0)
        fail_msg("%s: %s", situation, f.text);
    assert_non_null(l);
    return l;
}

static void expect_checkpoint(const struct disk *d, const char *name, enum reason reason, const char *layers)
{
    const struct checkpoint *c = disk_checkpoint(d, name);
    char text[256] = "";

    if (!c)
        fail_msg("disk %s has no checkpoint '%s'", d->name, name);
    for (size_t i = 0; i < c->nlayers; i++) {
        strcat(text, i ? " " : "");
        strcat(text, c->layers[i].node);
    }
    if (c->reason != reason || strcmp(text, layers) != 0)
        fail_msg("checkpoint '%s' is %s on '%s', and not %s on '%s'", name, reason_name(c->reason), text,
                 reason_name(reason), layers);
}

static void a_disk_is_described_as_it_is(void **state)
{
    struct disk_list *l = parse("one");
    const struct disk *d = &l->disks[0];

    assert_int_equal(l->ndisks, 1);
    assert_string_equal(d->name, "vda");
    assert_string_equal(d->qdev, VDA_PATH);
    assert_string_equal(d->qom_path, VDA_PATH);
    assert_string_equal(d->node, "d0");
    assert_string_equal(d->top, "d0");
    assert_string_equal(d->format, "qcow2");
    assert_int_equal(d->size, 4 * MIB);
    assert_true(d->tracked);
    assert_int_equal(d->ncheckpoints, 0);
    assert_ptr_equal(disk_list_find(l, "vda"), d);
    assert_null(disk_list_find(l, "d0"));
    assert_null(disk_checkpoint(d, "monday"));
    disk_list_free(l);
}

/* The file's own cache counts: a format node above it may have been given another one. */
static void only_a_host_cache_makes_a_flush_slow(void **state)
{
    static const char *const without[] = {"direct", "no-flush"};
    struct disk_list *l = parse("one");

    assert_true(l->disks[0].host_cache);
    disk_list_free(l);
    for (size_t i = 0; i < ARRAY_SIZE(without); i++) {
        struct json_object *named = qmp_get(qmp_get(captures, "one"), "query-named-block-nodes"),
                           *cache = qmp_get(graph_named(named, "#block073"), "cache");

        (void)json_object_object_add(cache, without[i], json_object_new_boolean(true));
        l = parse("one");
        assert_false(l->disks[0].host_cache);
        disk_list_free(l);
        (void)json_object_object_add(cache, without[i], json_object_new_boolean(false));
    }
}

static void only_persistent_bitmaps_are_checkpoints(void **state)
{
    struct disk_list *l = parse("bitmaps");
    const struct disk *d = &l->disks[0];

    assert_int_equal(d->ncheckpoints, 3); /* by name; "passing" would not outlive QEMU */
    assert_string_equal(d->checkpoints[0].name, "coarse");
    assert_string_equal(d->checkpoints[1].name, "mon");
    assert_string_equal(d->checkpoints[2].name, "off");
    expect_checkpoint(d, "mon", REASON_NONE, "d0");
    assert_int_equal(disk_checkpoint(d, "mon")->granularity, 65536);
    assert_int_equal(disk_checkpoint(d, "mon")->dirty, 65536);
    assert_int_equal(disk_checkpoint(d, "coarse")->granularity, 131072);
    assert_int_equal(disk_checkpoint(d, "coarse")->dirty, 131072);
    disk_list_free(l);
}

static void a_record_that_does_not_record_is_busy(void **state)
{
    struct disk_list *l = parse("busy");

    expect_checkpoint(&l->disks[0], "off", REASON_BUSY, "d0");  /* disabled */
    expect_checkpoint(&l->disks[0], "idle", REASON_BUSY, "d0"); /* in an export, too */
    expect_checkpoint(&l->disks[0], "mon", REASON_NONE, "d0");
    disk_list_free(l);
}

static void records_of_a_killed_qemu_are_inconsistent(void **state)
{
    struct disk_list *l = parse("inconsistent");

    assert_true(l->disks[0].ncheckpoints >= 3);
    for (size_t i = 0; i < l->disks[0].ncheckpoints; i++)
        expect_checkpoint(&l->disks[0], l->disks[0].checkpoints[i].name, REASON_INCONSISTENT, "d0");
    disk_list_free(l);
}

static void a_backup_by_somebody_else_does_not_hide_the_disk(void **state)
{
    struct disk_list *l = parse("foreign_backup"); /* the job's filter, with nameless bitmaps, is the device's root */

    assert_int_equal(l->ndisks, 1);
    assert_string_equal(l->disks[0].name, "vda");
    assert_int_equal(l->disks[0].size, 4 * MIB);
    disk_list_free(l);
}

static void disks_are_named_by_device_else_drive_else_node(void **state)
{
    static const struct {
        const char *name, *qom_path, *format;
        bool tracked;
    } want[] = {
        {"drv4", "/machine/peripheral-anon/device[2]/virtio-backend", "qcow2", true},
        {"drv7", "/machine/peripheral-anon/device[1]", "raw", false},
        {"vda", VDA_PATH, "qcow2", true},
        {"sda", "/machine/peripheral/sda", "raw", false},
        {"hda", "/machine/peripheral/hda", "qcow2", false}, /* version 2 stores no bitmaps */
        {"stick", "/machine/peripheral/stick/stick.0/legacy[0]", "qcow2", true},
        {"d6", "/machine/peripheral-anon/device[0]/virtio-backend", "qcow2", true},
    };
    struct disk_list *l = parse("buses"); /* and a read-only disk, an empty CD drive, and a node without a device */

    assert_int_equal(l->ndisks, ARRAY_SIZE(want));
    for (size_t i = 0; i < ARRAY_SIZE(want); i++) {
        assert_string_equal(l->disks[i].name, want[i].name);
        assert_string_equal(l->disks[i].qom_path, want[i].qom_path);
        assert_string_equal(l->disks[i].format, want[i].format);
        assert_int_equal(l->disks[i].tracked, want[i].tracked);
        assert_int_equal(l->disks[i].size, 4 * MIB);
    }
    disk_list_free(l);
}

static void two_disks_never_have_one_name(void **state)
{
    struct disk_list *l = parse("alike"); /* a drive "vda" in a nameless device, and a device "vda" */

    assert_int_equal(l->ndisks, 2);
    assert_string_not_equal(l->disks[0].name, l->disks[1].name);
    assert_ptr_equal(disk_list_find(l, l->disks[0].name), &l->disks[0]);
    assert_ptr_equal(disk_list_find(l, l->disks[1].name), &l->disks[1]);
    disk_list_free(l);
}

static void what_layers_above_the_deepest_record_have_allocated_counts(void **state)
{
    struct disk_list *l = parse("overlays");

    assert_string_equal(l->disks[0].node, "top");
    assert_int_equal(l->disks[0].ncheckpoints, 3);
    expect_checkpoint(&l->disks[0], "both", REASON_NONE, "top d0");
    expect_checkpoint(&l->disks[0], "only-top", REASON_NONE, "top");
    expect_checkpoint(&l->disks[0], "below", REASON_NONE, "d0");
    assert_int_equal(disk_checkpoint(&l->disks[0], "both")->allocation_levels, 1);
    assert_int_equal(disk_checkpoint(&l->disks[0], "only-top")->allocation_levels, 0); /* nothing is above it */
    assert_int_equal(disk_checkpoint(&l->disks[0], "below")->allocation_levels, 1);
    assert_int_equal(l->disks[0].nimages, 2);
    assert_string_equal(l->disks[0].images[1].node, "d0");
    assert_true(l->disks[0].images[1].read_only);
    assert_false(l->disks[0].images[0].read_only);
    assert_non_null(strstr(l->disks[0].images[1].file, ".qcow2"));
    assert_int_equal(disk_checkpoint(&l->disks[0], "both")->layers[1].depth, 1);
    disk_list_free(l);
    l = parse("three_layers");
    expect_checkpoint(&l->disks[0], "both", REASON_NONE, "top2 top d0");
    expect_checkpoint(&l->disks[0], "only-top", REASON_NONE, "top2 top");
    expect_checkpoint(&l->disks[0], "below", REASON_NONE, "top2 d0");
    assert_int_equal(disk_checkpoint(&l->disks[0], "below")->allocation_levels, 3);
    disk_list_free(l);
}

static void filters_of_others_are_seen_through_for_records_only(void **state)
{
    struct disk_list *l = parse("throttle");
    const struct disk *d = &l->disks[0];

    assert_string_equal(d->node, "thr"); /* ours go on top of it */
    assert_string_equal(d->top, "d0");
    assert_string_equal(d->format, "qcow2");
    assert_true(d->tracked);
    expect_checkpoint(d, "mon", REASON_NONE, "d0");
    disk_list_free(l);
}

static void a_session_of_ours_is_seen_through(void **state)
{
    static const char *const situations[] = {"inserted", "live"}; /* before the cut, and after */

    for (size_t i = 0; i < ARRAY_SIZE(situations); i++) {
        struct disk_list *l = parse(situations[i]);

        assert_int_equal(l->ndisks, 1);
        assert_string_equal(l->disks[0].node, "d0");
        assert_string_equal(l->disks[0].top, "d0");
        assert_true(l->disks[0].tracked);
        assert_int_equal(l->disks[0].size, 4 * MIB);
        assert_int_equal(l->disks[0].ncheckpoints, 1); /* none of ours, none without a name */
        expect_checkpoint(&l->disks[0], "mon", REASON_NONE, "d0");
        disk_list_free(l);
    }
}

static void a_session_of_ours_is_seen_through_with_others_in_between(void **state)
{
    struct disk_list *l = parse("live_snapshot"); /* somebody took a snapshot under our filter */

    assert_string_equal(l->disks[0].node, "top");
    expect_checkpoint(&l->disks[0], "mon", REASON_NONE, "d0");
    assert_int_equal(disk_checkpoint(&l->disks[0], "mon")->allocation_levels, 1);
    disk_list_free(l);
    l = parse("live_throttle");
    assert_string_equal(l->disks[0].node, "thr");
    assert_string_equal(l->disks[0].top, "d0");
    expect_checkpoint(&l->disks[0], "mon", REASON_NONE, "d0");
    disk_list_free(l);
}

static void children_are_found_by_role(void **state)
{
    struct json_object *graph = qmp_get(qmp_get(captures, "live"), "x-debug-query-block-graph");

    assert_string_equal(graph_child(graph, "qpull-0123abcd-access0", "file"), "qpull-0123abcd-cbw0");
    assert_string_equal(graph_child(graph, "qpull-0123abcd-cbw0", "file"), "d0");
    assert_string_equal(graph_child(graph, "qpull-0123abcd-cbw0", "target"), "qpull-0123abcd-scratch0");
    assert_null(graph_child(graph, "d0", "backing"));
    assert_null(graph_child(graph, "nobody", "file"));
    assert_null(graph_child(NULL, "d0", "file"));
    assert_string_equal(graph_first_foreign(graph, "qpull-0123abcd-cbw0"), "d0");
    assert_string_equal(graph_first_foreign(graph, "d0"), "d0");
    assert_null(graph_first_foreign(graph, "qpull-0123abcd-scratch0")); /* it has no child */
    assert_null(graph_first_foreign(graph, NULL));
}

static void qom_paths_are_absolute(void **state)
{
    static const char *const cases[][2] = {
        {"sda", "/machine/peripheral/sda"},
        {VDA_PATH, VDA_PATH},
        {"/machine/peripheral/stick/stick.0/legacy[0]", "/machine/peripheral/stick/stick.0/legacy[0]"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        char *path = qdev_to_qom_path(cases[i][0]);

        assert_string_equal(path, cases[i][1]);
        free(path);
    }
}

static void expect_equal(const struct disk *a, const struct disk *b)
{
    assert_string_equal(a->name, b->name);
    assert_string_equal(a->qdev, b->qdev);
    assert_string_equal(a->qom_path, b->qom_path);
    assert_string_equal(a->node, b->node);
    assert_string_equal(a->top, b->top);
    assert_string_equal(a->format, b->format);
    assert_int_equal(a->size, b->size);
    assert_int_equal(a->tracked, b->tracked);
    assert_int_equal(a->ncheckpoints, b->ncheckpoints);
    for (size_t i = 0; i < a->ncheckpoints; i++) {
        char layers[256] = "";

        for (size_t k = 0; k < b->checkpoints[i].nlayers; k++) {
            strcat(layers, k ? " " : "");
            strcat(layers, b->checkpoints[i].layers[k].node);
        }
        expect_checkpoint(a, b->checkpoints[i].name, b->checkpoints[i].reason, layers);
        assert_int_equal(a->checkpoints[i].granularity, b->checkpoints[i].granularity);
        assert_int_equal(a->checkpoints[i].dirty, b->checkpoints[i].dirty);
    }
}

static void a_copy_is_equal_and_stands_alone(void **state)
{
    json_object_object_foreach(captures, situation, answers)
    {
        struct disk_list *l = parse(situation), *again = parse(situation), *copy = disk_list_copy(l);

        (void)answers;
        assert_non_null(copy);
        disk_list_free(l); /* under ASan the copy would show what it still borrows */
        assert_int_equal(copy->ndisks, again->ndisks);
        for (size_t i = 0; i < copy->ndisks; i++)
            expect_equal(&copy->disks[i], &again->disks[i]);
        disk_list_free(copy);
        disk_list_free(again);
    }
}

static void the_first_disks_are_kept(void **state)
{
    struct disk_list *l = parse("buses");

    disk_list_truncate(l, 2);
    assert_int_equal(l->ndisks, 2);
    assert_string_equal(l->disks[1].name, "drv7");
    disk_list_truncate(l, 5);
    assert_int_equal(l->ndisks, 2);
    disk_list_truncate(l, 0);
    assert_int_equal(l->ndisks, 0);
    disk_list_free(l);
    disk_list_free(NULL);
}

static int parse_text(const char *query_block, const char *named, const char *graph, struct disk_list **ret_list)
{
    struct json_object *a = query_block ? json_tokener_parse(query_block) : NULL,
                       *b = named ? json_tokener_parse(named) : NULL, *c = graph ? json_tokener_parse(graph) : NULL;
    struct failure f = {0};
    int r = disk_list_parse(a, b, c, ret_list, &f);

    assert_int_equal(r, f.err);
    json_object_put(a);
    json_object_put(b);
    json_object_put(c);
    return r;
}

#define DEVICE(node) "[{'device':'','qdev':'vda','inserted':{'node-name':'" node "','ro':false}}]"

static void answers_that_make_no_sense_are_refused(void **state)
{
    static const char *const nodes[] = {NULL, "[]", "{}", "[{'drv':'raw'}]", "[{'node-name':7}]", "'d0'", "[null]"};
    struct disk_list *l = NULL;

    for (size_t i = 0; i < ARRAY_SIZE(nodes); i++) {
        assert_int_equal(parse_text(DEVICE("d0"), nodes[i], NULL, &l), -EPROTO);
        assert_null(l);
    }
    /* A node of ours with nothing below it, and one that is its own child. */
    assert_int_equal(
        parse_text(DEVICE("qpull-x"), "[{'node-name':'qpull-x','drv':'raw'}]", "{'nodes':[],'edges':[]}", &l), -EPROTO);
    assert_int_equal(parse_text(DEVICE("qpull-x"), "[{'node-name':'qpull-x','drv':'raw'}]",
                                "{'nodes':[{'name':'qpull-x','type':'block-driver','id':1}],"
                                "'edges':[{'name':'file','parent':1,'child':1}]}",
                                &l),
                     -EPROTO);
    assert_null(l);
}

static void answers_without_disks_are_an_empty_list(void **state)
{
    static const char *const answers[] = {NULL,
                                          "[]",
                                          "{}",
                                          "[{}]",
                                          "[null]",
                                          "[{'qdev':'vda'}]",
                                          "[{'qdev':'vda','inserted':{}}]",
                                          "[{'inserted':{'node-name':'d0','ro':false}}]"};

    for (size_t i = 0; i < ARRAY_SIZE(answers); i++) {
        struct disk_list *l = NULL;

        assert_int_equal(parse_text(answers[i], "[]", NULL, &l), 0);
        assert_int_equal(l->ndisks, 0);
        disk_list_free(l);
    }
}

static void a_graph_in_circles_ends(void **state)
{
    struct disk_list *l = NULL;

    assert_int_equal(
        parse_text(
            DEVICE("d0"),
            "[{'node-name':'d0','drv':'qcow2','dirty-bitmaps':[{'name':'mon','persistent':true,'recording':true}]}]",
            "{'nodes':[{'name':'d0','type':'block-driver','id':1}],"
            "'edges':[{'name':'backing','parent':1,'child':1}]}",
            &l),
        0);
    assert_int_equal(l->ndisks, 1);
    assert_int_equal(l->disks[0].ncheckpoints, 1);
    disk_list_free(l);
}

/* A commit of the live layer by others, as query-block, query-named-block-nodes and the graph tell of it. */
#define NODES                                                                                    \
    "{'name':'m','type':'block-driver','id':1},{'name':'top','type':'block-driver','id':2},"     \
    "{'name':'base','type':'block-driver','id':3},{'name':'vda','type':'block-backend','id':4}," \
    "{'name':'','type':'block-backend','id':5}"
#define EDGES                                                                                                     \
    "{'name':'backing','parent':1,'child':2},{'name':'backing','parent':2,'child':3},{'name':'root','parent':5,'" \
    "child':2}"

static bool agree(const char *root, int stands_on)
{
    char graph[1024], query[128];
    struct json_object *a, *b, *c;
    bool r;

    (void)snprintf(query, sizeof(query), "[{'inserted':{'node-name':'%s'}}]", root);
    (void)snprintf(graph, sizeof(graph),
                   "{'nodes':[" NODES "],'edges':[" EDGES ",{'name':'root','parent':4,'child':%d}]}", stands_on);
    a = json_tokener_parse(query);
    b = json_tokener_parse("[{'node-name':'m','drv':'mirror_top'},{'node-name':'top','drv':'qcow2'},"
                           "{'node-name':'base','drv':'qcow2'}]");
    c = json_tokener_parse(graph);
    r = answers_agree(a, b, c);
    json_object_put(a);
    json_object_put(b);
    json_object_put(c);
    return r;
}

static void answers_agree_beside_a_job_and_not_across_its_end(void **state)
{
    assert_true(agree("top", 1));  /* while it runs: its filter is between, and is not told of */
    assert_true(agree("base", 3)); /* afterwards */
    assert_false(agree("top", 3)); /* it ended between the answers; its own back end is no device */
    assert_false(agree("base", 1));
}

static void every_reason_has_a_name_and_a_sentence(void **state)
{
    for (unsigned r = REASON_NONE; r <= REASON_BUSY; r++) {
        assert_non_null(reason_name((enum reason)r));
        assert_true(strlen(reason_text((enum reason)r)) > 0);
    }
    assert_string_equal(reason_name(REASON_NO_SUCH_CHECKPOINT), "NO_SUCH_CHECKPOINT");
    assert_string_equal(reason_name(REASON_INCONSISTENT), "INCONSISTENT");
    assert_string_equal(reason_name(REASON_GAP), "GAP");
    assert_string_equal(reason_name(REASON_RESIZED), "RESIZED");
    assert_string_equal(reason_name(REASON_NOT_TRACKED), "NOT_TRACKED");
    assert_string_equal(reason_name(REASON_BUSY), "BUSY");
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_disk_is_described_as_it_is),
        cmocka_unit_test(only_a_host_cache_makes_a_flush_slow),
        cmocka_unit_test(only_persistent_bitmaps_are_checkpoints),
        cmocka_unit_test(a_record_that_does_not_record_is_busy),
        cmocka_unit_test(records_of_a_killed_qemu_are_inconsistent),
        cmocka_unit_test(a_backup_by_somebody_else_does_not_hide_the_disk),
        cmocka_unit_test(disks_are_named_by_device_else_drive_else_node),
        cmocka_unit_test(two_disks_never_have_one_name),
        cmocka_unit_test(what_layers_above_the_deepest_record_have_allocated_counts),
        cmocka_unit_test(filters_of_others_are_seen_through_for_records_only),
        cmocka_unit_test(a_session_of_ours_is_seen_through),
        cmocka_unit_test(a_session_of_ours_is_seen_through_with_others_in_between),
        cmocka_unit_test(children_are_found_by_role),
        cmocka_unit_test(qom_paths_are_absolute),
        cmocka_unit_test(a_copy_is_equal_and_stands_alone),
        cmocka_unit_test(the_first_disks_are_kept),
        cmocka_unit_test(answers_that_make_no_sense_are_refused),
        cmocka_unit_test(answers_without_disks_are_an_empty_list),
        cmocka_unit_test(a_graph_in_circles_ends),
        cmocka_unit_test(answers_agree_beside_a_job_and_not_across_its_end),
        cmocka_unit_test(every_reason_has_a_name_and_a_sentence),
    };

    return cmocka_run_group_tests(tests, load_captures, drop_captures);
}
