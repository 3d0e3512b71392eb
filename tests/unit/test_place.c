/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/place.h"
#include "test.h"

#include <errno.h>

static struct place *parsed(const char *text)
{
    struct place *p = NULL;
    struct failure f = {0};

    if (place_parse(text, &p, &f) < 0)
        fail_msg("%s: %s", text, f.text);
    return p;
}

/* The node of disk "vda" of VM "db", session 5f0c21ab. */
static char *node_of(const char *text)
{
    const struct place_names names = {.vm = "db", .disk = "vda", .session = "5f0c21ab"};
    struct json_object *node = NULL;
    struct place *p = parsed(text);
    struct failure f = {0};
    char *out;

    assert_int_equal(place_node(p, &names, &node, &f), 0);
    out = strdup(json_object_to_json_string_ext(node, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
    json_object_put(node);
    place_free(p);
    return out;
}

static void assert_node(const char *text, const char *expected)
{
    _cleanup_free_ char *node = node_of(text);

    assert_string_equal(node, expected);
}

static void assert_refused(const char *text, int err, const char *words)
{
    struct place *p = NULL;
    struct failure f = {0};

    assert_int_equal(place_parse(text, &p, &f), err);
    assert_null(p);
    assert_int_equal(f.err, err);
    if (!strstr(f.text, words))
        fail_msg("'%s' is not in '%s'", words, f.text);
}

static void names_stand_where_they_belong(void **state)
{
    assert_node("{\"driver\": \"file\", \"filename\": \"/s/%v-%d.%s%%20\", \"discard\": \"unmap\"}",
                "{\"driver\":\"file\",\"filename\":\"/s/db-vda.5f0c21ab%20\",\"discard\":\"unmap\"}");
}

static void nested_nodes_get_what_scratch_needs(void **state)
{
    assert_node("{\"driver\":\"luks\",\"key-secret\":\"k\",\"file\":{\"driver\":\"nbd\",\"server\":{\"type\":\"inet\","
                "\"host\":\"h\",\"port\":\"10809\"},\"export\":\"%d\"}}",
                "{\"driver\":\"luks\",\"key-secret\":\"k\",\"file\":{\"driver\":\"nbd\",\"server\":{\"type\":\"inet\","
                "\"host\":\"h\",\"port\":\"10809\"},\"export\":\"vda\",\"discard\":\"unmap\",\"open-timeout\":2},"
                "\"discard\":\"unmap\"}");
}

static void what_is_said_stays_as_it_is(void **state)
{
    assert_node("{\"driver\":\"nbd\",\"open-timeout\":7,\"discard\":\"ignore\",\"server\":{\"type\":\"unix\",\"path\":"
                "\"/x\"},\"a\":[1,true,null,\"%d\"]}",
                "{\"driver\":\"nbd\",\"open-timeout\":7,\"discard\":\"ignore\",\"server\":{\"type\":\"unix\",\"path\":"
                "\"/x\"},\"a\":[1,true,null,\"vda\"]}");
}

/* Cannot be run in every test bed: the shape alone. */
static void a_ceph_rbd_image_has_the_shape_that_qemu_wants(void **state)
{
    assert_node(
        "{\"driver\":\"rbd\",\"pool\":\"scratch\",\"image\":\"%v-%d\",\"user\":\"qpull\",\"key-secret\":\"ceph\"}",
        "{\"driver\":\"rbd\",\"pool\":\"scratch\",\"image\":\"db-vda\",\"user\":\"qpull\",\"key-secret\":\"ceph\","
        "\"discard\":\"unmap\"}");
}

static void it_knows_whose_names_are_in_it(void **state)
{
    static const struct {
        const char *text;
        bool disks, vms;
    } cases[] = {
        {"{\"driver\":\"x\"}", false, false},
        {"{\"driver\":\"x\",\"a\":\"%%d\"}", false, false},
        {"{\"driver\":\"x\",\"a\":\"%d\"}", true, false},
        {"{\"driver\":\"x\",\"a\":{\"b\":[\"%v\"]}}", false, true},
        {"{\"driver\":\"x\",\"a\":\"%s.%d\"}", true, true},
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct place *p = parsed(cases[i].text);

        assert_int_equal(place_tells_disks(p), cases[i].disks);
        assert_int_equal(place_tells_vms(p), cases[i].vms);
        assert_string_equal(place_text(p), cases[i].text);
        place_free(p);
    }
}

static void what_cannot_be_scratch_is_refused_in_words(void **state)
{
    char deep[256] = "{\"driver\":\"x\",\"a\":";
    char longer[PLACE_TEXT_MAX + 2];

    for (int i = 0; i < PLACE_DEPTH_MAX; i++)
        (void)strcat(deep, "[");
    (void)strcat(deep, "1");
    for (int i = 0; i < PLACE_DEPTH_MAX; i++)
        (void)strcat(deep, "]");
    (void)strcat(deep, "}");
    memset(longer, ' ', sizeof(longer));
    longer[0] = '{';
    longer[sizeof(longer) - 1] = '\0';
    assert_refused("{\"driver\":\"null-co\",\"size\":1}", -EINVAL, "keeps nothing");
    assert_refused("{\"driver\":\"raw\",\"file\":{\"driver\":\"null-aio\"}}", -EINVAL, "keeps nothing");
    assert_refused("{\"driver\":\"raw\",\"file\":\"theirs\"}", -EINVAL, "not ours");
    assert_refused("{\"driver\":\"quorum\",\"children\":[\"theirs\"]}", -EINVAL, "not ours");
    assert_refused("{\"driver\":\"blkdebug\",\"image\":\"theirs\"}", -EINVAL, "for tests");
    assert_refused("{\"driver\":\"nbd\",\"node-name\":\"mine\"}", -EINVAL, "\"node-name\"");
    assert_refused("{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"node-name\":\"x\"}}", -EINVAL, "\"node-name\"");
    assert_refused("{\"driver\":\"file\",\"read-only\":true}", -EINVAL, "written to");
    assert_refused("{\"driver\":1}", -EINVAL, "not a string");
    assert_refused("{\"server\":{}}", -EINVAL, "no \"driver\"");
    assert_refused("{\"driver\":\"file\",\"filename\":\"100%\"}", -EINVAL, "another %");
    assert_refused("{\"driver\":\"file\",\"filename\":\"%D\"}", -EINVAL, "another %");
    assert_refused("{\"driver\" \"file\"}", -EINVAL, "no JSON at \"\"file\"}\"");
    assert_refused("{\"driver\":\"x\"} and more", -EINVAL, "no JSON at \"and more\"");
    assert_refused("{\"driver\":\"x\"", -EAGAIN, "no end");
    assert_refused(longer, -EINVAL, "longer than");
    assert_refused(deep, -EINVAL, "in one another");
}

static void a_name_that_leads_elsewhere_is_refused(void **state)
{
    static const char *const bad[] = {"..", ".", "../x", "/dev/sda", "a/b"};
    struct place *p = parsed("{\"driver\":\"file\",\"filename\":\"/s/%d\"}");

    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        const struct place_names names = {.vm = "db", .disk = bad[i], .session = "5f0c21ab"};
        struct json_object *node = NULL;
        struct failure f = {0};

        assert_int_equal(place_node(p, &names, &node, &f), -EINVAL);
        assert_null(node);
        assert_non_null(strstr(f.text, bad[i]));
    }
    place_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_stand_where_they_belong),
        cmocka_unit_test(nested_nodes_get_what_scratch_needs),
        cmocka_unit_test(what_is_said_stays_as_it_is),
        cmocka_unit_test(a_ceph_rbd_image_has_the_shape_that_qemu_wants),
        cmocka_unit_test(it_knows_whose_names_are_in_it),
        cmocka_unit_test(what_cannot_be_scratch_is_refused_in_words),
        cmocka_unit_test(a_name_that_leads_elsewhere_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
