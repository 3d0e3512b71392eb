/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * capabilities_parse() on what real QEMUs answered to query-qmp-schema (schemas.json: the entries that are looked at,
 * as they were), and engine_choose() on what comes of it.
 */
#include "backup/engine.h"
#include "lib/test.h"
#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>

static struct json_object *schemas;

static int load_schemas(void **state)
{
    const char *slash = strrchr(__FILE__, '/');
    char path[512];

    (void)snprintf(path, sizeof(path), "%.*sschemas.json", slash ? (int)(slash + 1 - __FILE__) : 0, __FILE__);
    schemas = json_object_from_file(path);
    if (!schemas)
        print_error("%s: %s\n", path, json_util_get_last_err());
    return schemas ? 0 : -1;
}

static int drop_schemas(void **state)
{
    json_object_put(schemas);
    return 0;
}

static struct capabilities parse(const char *version)
{
    struct capabilities c;
    struct failure f = {0};

    if (capabilities_parse(qmp_get(schemas, version), &c, &f) < 0)
        fail_msg("%s: %s", version, f.text);
    return c;
}

static void expect(const char *version, const char *text)
{
    struct capabilities c = parse(version);
    char out[CAPABILITIES_TEXT_SIZE];

    assert_string_equal(capabilities_text(&c, out), text);
}

#define COMMON                                                                                           \
    "x-debug-query-block-graph, block-export-add, snapshot-access, blockdev-reopen, copy-before-write, " \
    "copy-before-write:on-cbw-error, copy-before-write:cbw-timeout, blockdev-backup:filter-node-name, "

static void what_each_qemu_can_do_is_read_out_of_its_schema(void **state)
{
    expect("7.2.22", COMMON "set-action");
    expect("10.0.13", COMMON "blockdev-backup:discard-source, set-action");
    expect("11.1.3", COMMON "blockdev-backup:on-cbw-error, blockdev-backup:discard-source, set-action");
}

/* Removes the entry of a list of {key: value}, or fails. */
static void drop(struct json_object *list, const char *key, const char *value)
{
    for (size_t i = 0; i < qmp_array_length(list); i++) {
        if (strcmp(qmp_get_string(json_object_array_get_idx(list, i), key), value) == 0) {
            assert_int_equal(json_object_array_del_idx(list, i, 1), 0);
            return;
        }
    }
    fail_msg("there is no %s '%s'", key, value);
}

static struct json_object *entry(struct json_object *schema, const char *name)
{
    for (size_t i = 0; i < qmp_array_length(schema); i++) {
        struct json_object *o = json_object_array_get_idx(schema, i);

        if (strcmp(qmp_get_string(o, "name"), name) == 0)
            return o;
    }
    fail_msg("there is no '%s'", name);
    return NULL;
}

/* The recorded answer without something, by the way on which it is found. */
static struct capabilities parse_without(const char *version, const char *command, const char *driver, const char *name)
{
    struct json_object *copy = NULL, *type;
    struct capabilities c;
    struct failure f = {0};

    assert_int_equal(json_object_deep_copy(qmp_get(schemas, version), &copy, NULL), 0);
    if (!name) {
        drop(copy, "name", command);
    } else {
        type = entry(copy, qmp_get_string(entry(copy, command), "arg-type"));
        for (size_t i = 0; driver && i < qmp_array_length(qmp_get(type, "variants")); i++) {
            struct json_object *v = json_object_array_get_idx(qmp_get(type, "variants"), i);

            if (strcmp(qmp_get_string(v, "case"), driver) == 0) {
                type = entry(copy, qmp_get_string(v, "type"));
                break;
            }
        }
        drop(qmp_get(type, "members"), "name", name);
    }
    assert_int_equal(capabilities_parse(copy, &c, &f), 0);
    json_object_put(copy);
    return c;
}

static void what_is_taken_out_of_a_schema_is_missed_and_nothing_else(void **state)
{
    static const struct {
        const char *command, *driver, *name;
        enum capability is_gone;
    } rows[] = {
        {"x-debug-query-block-graph", NULL, NULL, CAPABILITY_GRAPH},
        {"block-export-add", NULL, NULL, CAPABILITY_EXPORT},
        {"blockdev-reopen", NULL, NULL, CAPABILITY_REOPEN},
        {"set-action", NULL, NULL, CAPABILITY_SET_ACTION},
        {"transaction", NULL, NULL, CAPABILITY_JOB},
        {"blockdev-add", "copy-before-write", "on-cbw-error", CAPABILITY_CBW_ON_ERROR},
        {"blockdev-add", "copy-before-write", "cbw-timeout", CAPABILITY_CBW_TIMEOUT},
        {"blockdev-backup", NULL, "filter-node-name", CAPABILITY_JOB},
        {"blockdev-backup", NULL, "on-cbw-error", CAPABILITY_JOB_ON_ERROR},
        {"blockdev-backup", NULL, "discard-source", CAPABILITY_JOB_DISCARD},
    };
    const struct capabilities all = parse("11.1.3");

    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        struct capabilities c = parse_without("11.1.3", rows[i].command, rows[i].driver, rows[i].name);

        for (unsigned k = 0; k < CAPABILITY_COUNT; k++) {
            if (c.has[k] != (all.has[k] && k != rows[i].is_gone))
                fail_msg("without %s %s: %s is %d", rows[i].command, rows[i].name ? rows[i].name : "",
                         capability_name((enum capability)k), c.has[k]);
        }
    }
}

static void an_answer_that_is_no_schema_is_refused(void **state)
{
    static const char *const answers[] = {"[]", "{}", "[1, null, \"x\", {\"name\": 7}]",
                                          "[{\"name\": \"blockdev-add\", \"meta-type\": \"object\"}]",
                                          "[{\"name\": \"blockdev-add\", \"meta-type\": \"command\"}]"};
    struct capabilities c;

    for (size_t i = 0; i < ARRAY_SIZE(answers); i++) {
        struct json_object *o = json_tokener_parse(answers[i]);
        struct failure f = {0};

        assert_int_equal(capabilities_parse(o, &c, &f), -EPROTO);
        assert_non_null(strstr(f.text, "query-qmp-schema"));
        json_object_put(o);
    }
}

static struct engine_choice choose(const struct capabilities *c, enum engine wish)
{
    struct engine_choice choice = {0};
    struct failure f = {0};

    if (engine_choose(c, wish, "9.9.9", &choice, &f) < 0)
        fail_msg("%s", f.text);
    return choice;
}

static void expect_refusal(const struct capabilities *c, enum engine wish, const char *text)
{
    struct engine_choice choice = {0};
    struct failure f = {0};

    assert_int_equal(engine_choose(c, wish, "6.2.0", &choice, &f), -ENOTSUP);
    assert_string_equal(f.text, text);
}

static void copy_before_write_is_taken_wherever_it_can_be_and_bounds_what_the_guest_suffers(void **state)
{
    static const char *const versions[] = {"7.2.22", "10.0.13", "11.1.3"};

    for (size_t i = 0; i < ARRAY_SIZE(versions); i++) {
        struct capabilities c = parse(versions[i]);

        assert_int_equal(choose(&c, ENGINE_AUTO).engine, ENGINE_CBW);
        assert_null(choose(&c, ENGINE_AUTO).risk);
        assert_int_equal(choose(&c, ENGINE_JOB).engine, ENGINE_JOB);
        assert_int_equal(choose(&c, ENGINE_CBW).engine, ENGINE_CBW);
    }
}

static void backup_jobs_are_the_way_out_and_their_risk_is_said(void **state)
{
    struct capabilities old = parse("7.2.22"), new = parse("11.1.3");

    old.has[CAPABILITY_CBW_ON_ERROR] = old.has[CAPABILITY_CBW_TIMEOUT] = false; /* as 7.0 */
    assert_int_equal(choose(&old, ENGINE_AUTO).engine, ENGINE_JOB);
    assert_non_null(strstr(choose(&old, ENGINE_AUTO).risk, "hands it an error"));
    assert_null(strstr(choose(&new, ENGINE_JOB).risk, "hands it an error"));
    expect_refusal(&old, ENGINE_CBW,
                   "QEMU 6.2.0 cannot do --engine=copy-before-write: it lacks copy-before-write:on-cbw-error (QEMU "
                   "7.1), copy-before-write:cbw-timeout (QEMU 7.1); say --engine=auto, or update QEMU");
}

static void a_qemu_that_can_do_neither_is_refused_in_words(void **state)
{
    struct capabilities c = parse("7.2.22");

    c.has[CAPABILITY_SNAPSHOT_ACCESS] = false;
    expect_refusal(&c, ENGINE_AUTO,
                   "QEMU 6.2.0 cannot freeze disks: it lacks snapshot-access (QEMU 7.0); update QEMU to 7.1 or later");
    expect_refusal(&c, ENGINE_JOB,
                   "QEMU 6.2.0 cannot do --engine=backup-job: it lacks snapshot-access (QEMU 7.0); say --engine=auto, "
                   "or update QEMU");
    memset(&c, 0, sizeof(c));
    expect_refusal(
        &c, ENGINE_AUTO,
        "QEMU 6.2.0 cannot freeze disks: it lacks x-debug-query-block-graph (QEMU 4.0), block-export-add "
        "(QEMU 5.2), snapshot-access (QEMU 7.0), blockdev-backup:filter-node-name (QEMU 4.2); update QEMU to "
        "7.1 or later");
}

static void engines_have_the_names_that_the_flag_takes(void **state)
{
    enum engine e = ENGINE_COUNT;

    for (unsigned i = 0; i < ENGINE_COUNT; i++) {
        assert_int_equal(engine_parse(engine_name((enum engine)i), &e), 0);
        assert_int_equal(e, i);
    }
    assert_int_equal(engine_parse("", &e), -EINVAL);
    assert_int_equal(engine_parse("backup", &e), -EINVAL);
}

static void a_timeout_that_old_qemus_cannot_count_is_the_most_they_can(void **state)
{
    assert_int_equal(capabilities_cbw_timeout("7.2.22", 10), 4);
    assert_int_equal(capabilities_cbw_timeout("9.0.4", 3600), 4);
    assert_int_equal(capabilities_cbw_timeout("7.2.22", 3), 3);
    assert_int_equal(capabilities_cbw_timeout("9.1.0", 10), 10);
    assert_int_equal(capabilities_cbw_timeout("10.0.13", 3600), 3600);
    assert_int_equal(capabilities_cbw_timeout("", 10), 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_each_qemu_can_do_is_read_out_of_its_schema),
        cmocka_unit_test(what_is_taken_out_of_a_schema_is_missed_and_nothing_else),
        cmocka_unit_test(an_answer_that_is_no_schema_is_refused),
        cmocka_unit_test(copy_before_write_is_taken_wherever_it_can_be_and_bounds_what_the_guest_suffers),
        cmocka_unit_test(backup_jobs_are_the_way_out_and_their_risk_is_said),
        cmocka_unit_test(a_qemu_that_can_do_neither_is_refused_in_words),
        cmocka_unit_test(a_timeout_that_old_qemus_cannot_count_is_the_most_they_can),
        cmocka_unit_test(engines_have_the_names_that_the_flag_takes),
    };

    return cmocka_run_group_tests(tests, load_schemas, drop_schemas);
}
