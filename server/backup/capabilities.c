/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/capabilities.h"

#include "qmp/commands.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>

/* 2^32 ns are 4.29 s. Fixed in QEMU 9.1: "block/copy-before-write: use uint64_t for timeout in nanoseconds". */
#define CBW_TIMEOUT_32_BITS_S 4u

/* First versions: QEMU's docs ("Since:" in its QMP reference). */
static const struct {
    const char *name, *since;
} table[] = {
    [CAPABILITY_GRAPH] = {"x-debug-query-block-graph", "4.0"},
    [CAPABILITY_EXPORT] = {"block-export-add", "5.2"},
    [CAPABILITY_SNAPSHOT_ACCESS] = {"snapshot-access", "7.0"},
    [CAPABILITY_REOPEN] = {"blockdev-reopen", "6.1"},
    [CAPABILITY_CBW] = {"copy-before-write", "6.2"},
    [CAPABILITY_CBW_ON_ERROR] = {"copy-before-write:on-cbw-error", "7.1"},
    [CAPABILITY_CBW_TIMEOUT] = {"copy-before-write:cbw-timeout", "7.1"},
    [CAPABILITY_JOB] = {"blockdev-backup:filter-node-name", "4.2"},
    [CAPABILITY_JOB_ON_ERROR] = {"blockdev-backup:on-cbw-error", "10.1"},
    [CAPABILITY_JOB_DISCARD] = {"blockdev-backup:discard-source", "9.1"},
    [CAPABILITY_SET_ACTION] = {"set-action", "6.0"},
    [CAPABILITY_VHOST] = {"block-export-add:vhost-user-blk", "5.2"},
};
static_assert(ARRAY_SIZE(table) == CAPABILITY_COUNT, "every capability has a name");

const char *capability_name(enum capability c)
{
    return table[c].name;
}

const char *capability_since(enum capability c)
{
    return table[c].since;
}

/*
 * The schema is a list of entries. Commands have their own names, types have numbers that mean nothing beyond this
 * answer; an object type lists its members, and, where it is a union, for each case the type with its further members.
 */
static struct json_object *find(struct json_object *list, const char *key, const char *value)
{
    for (size_t i = 0; value && i < qmp_array_length(list); i++) {
        struct json_object *o = json_object_array_get_idx(list, i);
        const char *text = qmp_get_string(o, key);

        if (text && strcmp(text, value) == 0)
            return o;
    }
    return NULL;
}

static struct json_object *type_of(struct json_object *schema, struct json_object *o, const char *key)
{
    return find(schema, "name", qmp_get_string(o, key));
}

static struct json_object *member(struct json_object *type, const char *name)
{
    return find(qmp_get(type, "members"), "name", name);
}

static struct json_object *command(struct json_object *schema, const char *name)
{
    struct json_object *c = find(schema, "name", name);
    const char *kind = qmp_get_string(c, "meta-type");

    return kind && strcmp(kind, "command") == 0 ? c : NULL;
}

static struct json_object *variant(struct json_object *type, const char *name)
{
    return find(qmp_get(type, "variants"), "case", name);
}

int capabilities_parse(struct json_object *schema, struct capabilities *ret_capabilities, struct failure *f)
{
    struct json_object *drivers = type_of(schema, command(schema, "blockdev-add"), "arg-type");
    struct json_object *cbw = type_of(schema, variant(drivers, "copy-before-write"), "type");
    struct json_object *backup = type_of(schema, command(schema, "blockdev-backup"), "arg-type");
    struct json_object *transaction = type_of(schema, command(schema, "transaction"), "arg-type");
    struct json_object *list = type_of(schema, member(transaction, "actions"), "type");
    struct json_object *action = type_of(schema, list, "element-type");
    struct json_object *export = type_of(schema, command(schema, table[CAPABILITY_EXPORT].name), "arg-type");
    struct capabilities c = {0};

    if (!drivers)
        return failure_set(f, -EPROTO, "QEMU's answer to query-qmp-schema has no 'blockdev-add'");
    c.has[CAPABILITY_GRAPH] = command(schema, table[CAPABILITY_GRAPH].name);
    c.has[CAPABILITY_EXPORT] = command(schema, table[CAPABILITY_EXPORT].name);
    c.has[CAPABILITY_SNAPSHOT_ACCESS] = variant(drivers, table[CAPABILITY_SNAPSHOT_ACCESS].name);
    c.has[CAPABILITY_REOPEN] = command(schema, table[CAPABILITY_REOPEN].name);
    c.has[CAPABILITY_CBW] = cbw;
    c.has[CAPABILITY_CBW_ON_ERROR] = member(cbw, "on-cbw-error");
    c.has[CAPABILITY_CBW_TIMEOUT] = member(cbw, "cbw-timeout");
    c.has[CAPABILITY_JOB] = member(backup, "filter-node-name") && variant(action, "blockdev-backup");
    c.has[CAPABILITY_JOB_ON_ERROR] = member(backup, "on-cbw-error");
    c.has[CAPABILITY_JOB_DISCARD] = member(backup, "discard-source");
    c.has[CAPABILITY_SET_ACTION] = command(schema, table[CAPABILITY_SET_ACTION].name);
    c.has[CAPABILITY_VHOST] = variant(export, "vhost-user-blk");
    *ret_capabilities = c;
    return 0;
}

const char *capabilities_text(const struct capabilities *c, char out[CAPABILITIES_TEXT_SIZE])
{
    size_t used = 0;

    out[0] = '\0';
    for (unsigned i = 0; i < CAPABILITY_COUNT && used < CAPABILITIES_TEXT_SIZE; i++) {
        if (c->has[i])
            used +=
                (size_t)snprintf(out + used, CAPABILITIES_TEXT_SIZE - used, "%s%s", used ? ", " : "", table[i].name);
    }
    if (!out[0])
        (void)snprintf(out, CAPABILITIES_TEXT_SIZE, "nothing that is asked for");
    return out;
}

struct json_object *capabilities_to_json(const struct capabilities *c)
{
    struct json_object *o = json_object_new_object();

    for (unsigned i = 0; i < CAPABILITY_COUNT; i++)
        (void)json_object_object_add(o, table[i].name, json_object_new_boolean(c->has[i]));
    return o;
}

unsigned capabilities_cbw_timeout(const char *version, unsigned wish_s)
{
    char *rest;
    unsigned long major = strtoul(version, &rest, 10);

    if (*rest == '.' && (major > 9 || (major == 9 && strtoul(rest + 1, NULL, 10) >= 1)))
        return wish_s;
    return MIN(wish_s, CBW_TIMEOUT_32_BITS_S);
}
