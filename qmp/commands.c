/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/commands.h"

#include <stdio.h>
#include <string.h>

static void put(struct json_object *o, const char *key, struct json_object *value)
{
    (void)json_object_object_add(o, key, value); /* out of memory leaves the key out and QEMU refuses */
}

static void put_string(struct json_object *o, const char *key, const char *value)
{
    put(o, key, json_object_new_string(value));
}

/*
 * What is false by default is not said: QEMU reads its monitor one byte at a time, each at the price of some system
 * calls and a turn of poll() (monitor_can_read(), 7.0 to 11.1).
 */
static void put_true(struct json_object *o, const char *key, bool value)
{
    if (value)
        put(o, key, json_object_new_boolean(true));
}

static struct json_object *new_args(const char *key, const char *value)
{
    struct json_object *o = json_object_new_object();

    if (o && key)
        put_string(o, key, value);
    return o;
}

struct json_object *qmp_args_strings(const char *key, ...)
{
    struct json_object *o = json_object_new_object();
    va_list ap;

    va_start(ap, key);
    for (const char *k = key; k; k = va_arg(ap, const char *))
        put_string(o, k, va_arg(ap, const char *));
    va_end(ap);
    return o;
}

/* -- file descriptors ---------------------------------------------------------------------------------------------- */

struct json_object *qmp_args_add_fd(const char *opaque)
{
    return new_args("opaque", opaque); /* no fdset-id: QEMU makes a new set, so that nobody's is hit */
}

struct json_object *qmp_args_remove_fd(int64_t fdset_id)
{
    struct json_object *o = new_args(NULL, NULL);

    put(o, "fdset-id", json_object_new_int64(fdset_id));
    return o;
}

/* -- nodes --------------------------------------------------------------------------------------------------------- */

static struct json_object *new_node(const char *driver, const char *node, const char *file)
{
    struct json_object *o = new_args("driver", driver);

    put_string(o, "node-name", node);
    if (file)
        put_string(o, "file", file);
    return o;
}

static void put_fdset(struct json_object *file, int64_t fdset_id)
{
    char path[64];

    (void)snprintf(path, sizeof(path), "/dev/fdset/%lld", (long long)fdset_id);
    put_string(file, "filename", path);
    put_string(file, "locking", "off"); /* an unlinked file of our own: nobody else can open it */
}

struct json_object *qmp_args_blockdev_add_file(const char *node, int64_t fdset_id)
{
    struct json_object *o = new_node("file", node, NULL);

    put_fdset(o, fdset_id);
    put_string(o, "discard", "unmap");
    return o;
}

struct json_object *qmp_args_blockdev_add_image(const char *node, const char *driver, const char *protocol,
                                                const char *path)
{
    struct json_object *o = new_node(driver, node, NULL), *file = new_args("driver", protocol);

    put_string(file, "filename", path);
    /*
     * A raw node, exported for reading, lets others write to its file (all versions): a guest could start under our
     * pull. The formats with metadata of their own do not. blkdebug is QEMU's one filter that takes a wish for this.
     */
    if (strcmp(driver, "raw") == 0) {
        struct json_object *guard = new_args("driver", "blkdebug"), *unshared = json_object_new_array();

        (void)json_object_array_add(unshared, json_object_new_string("write"));
        (void)json_object_array_add(unshared, json_object_new_string("resize"));
        put(guard, "unshare-child-perms", unshared);
        put(guard, "image", file);
        file = guard;
    }
    put(o, "file", file);
    put(o, "read-only", json_object_new_boolean(true));
    return o;
}

struct json_object *qmp_args_blockdev_add_cbw(const char *node, const char *file, struct json_object *target,
                                              unsigned timeout_s)
{
    struct json_object *o = new_node("copy-before-write", node, file);

    put(o, "target", target);
    /* The guest's write goes on whatever happens to the scratch file: the snapshot is given up instead. */
    put_string(o, "on-cbw-error", "break-snapshot");
    put(o, "cbw-timeout", json_object_new_int64(timeout_s));
    put_string(o, "discard", "unmap"); /* else the guest's discards are dropped for the time of the session */
    return o;
}

struct json_object *qmp_args_blockdev_add_null(const char *node)
{
    return new_node("null-co", node, NULL);
}

struct json_object *qmp_args_blockdev_add_empty(const char *node, const char *format, int64_t fdset_id,
                                                const char *backing)
{
    struct json_object *o = new_node(format, node, NULL), *file = new_args("driver", "file");

    put_fdset(file, fdset_id);
    put(o, "file", file);
    put_string(o, "backing", backing);
    put(o, "read-only", json_object_new_boolean(true));
    return o;
}

struct json_object *qmp_args_blockdev_add_raw(const char *node, const char *file)
{
    struct json_object *o = new_node("raw", node, file);

    put_string(o, "discard", "unmap");
    return o;
}

struct json_object *qmp_args_blockdev_add_snapshot_access(const char *node, const char *file, bool discards)
{
    struct json_object *o = new_node("snapshot-access", node, file);

    if (discards)
        put_string(o, "discard", "unmap");
    return o;
}

struct json_object *qmp_args_reopen(void)
{
    struct json_object *o = new_args(NULL, NULL);

    put(o, "options", json_object_new_array());
    return o;
}

void qmp_args_reopen_raw(struct json_object *args, const char *node, const char *file)
{
    (void)json_object_array_add(qmp_get(args, "options"), qmp_args_blockdev_add_raw(node, file));
}

struct json_object *qmp_args_reopen_image(const char *node, const char *driver, bool writable)
{
    struct json_object *args = qmp_args_reopen(), *o = new_node(driver, node, NULL);

    put(o, "read-only", json_object_new_boolean(!writable));
    (void)json_object_array_add(qmp_get(args, "options"), o);
    return args;
}

void qmp_args_reopen_child(struct json_object *args, const char *role, const char *child)
{
    put_string(json_object_array_get_idx(qmp_get(args, "options"), 0), role, child);
}

struct json_object *qmp_args_qom_set_drive(const char *path, const char *node)
{
    return qmp_args_strings("path", path, "property", "drive", "value", node, NULL);
}

/* -- bitmaps ------------------------------------------------------------------------------------------------------- */

struct json_object *qmp_args_transaction(void)
{
    struct json_object *o = new_args(NULL, NULL);

    put(o, "actions", json_object_new_array());
    return o;
}

static void put_action(struct json_object *args, const char *type, struct json_object *data)
{
    struct json_object *action = new_args("type", type);

    put(action, "data", data);
    (void)json_object_array_add(qmp_get(args, "actions"), action);
}

struct json_object *qmp_args_bitmap_add(struct qmp_bitmap b, uint64_t granularity, bool persistent, bool disabled)
{
    struct json_object *data = qmp_args_strings("node", b.node, "name", b.name, NULL);

    if (granularity)
        put(data, "granularity", json_object_new_int64((int64_t)granularity));
    put_true(data, "persistent", persistent);
    put_true(data, "disabled", disabled);
    return data;
}

void qmp_action_bitmap_add(struct json_object *args, struct qmp_bitmap b, uint64_t granularity, bool persistent,
                           bool disabled)
{
    put_action(args, "block-dirty-bitmap-add", qmp_args_bitmap_add(b, granularity, persistent, disabled));
}

struct json_object *qmp_args_bitmap_merge(struct qmp_bitmap target, const struct qmp_bitmap *sources, size_t nsources)
{
    struct json_object *data = qmp_args_strings("node", target.node, "target", target.name, NULL);
    struct json_object *list = json_object_new_array();

    for (size_t i = 0; i < nsources; i++)
        (void)json_object_array_add(list, qmp_args_strings("node", sources[i].node, "name", sources[i].name, NULL));
    put(data, "bitmaps", list);
    return data;
}

void qmp_action_bitmap_merge(struct json_object *args, struct qmp_bitmap target, const struct qmp_bitmap *sources,
                             size_t nsources)
{
    put_action(args, "block-dirty-bitmap-merge", qmp_args_bitmap_merge(target, sources, nsources));
}

void qmp_action_bitmap_clear(struct json_object *args, struct qmp_bitmap b)
{
    put_action(args, "block-dirty-bitmap-clear", qmp_args_strings("node", b.node, "name", b.name, NULL));
}

void qmp_action_bitmap_remove(struct json_object *args, struct qmp_bitmap b)
{
    put_action(args, "block-dirty-bitmap-remove", qmp_args_strings("node", b.node, "name", b.name, NULL));
}

/* -- jobs ---------------------------------------------------------------------------------------------------------- */

void qmp_action_backup(struct json_object *args, const char *job, const char *device, const char *target,
                       const char *filter, bool break_snapshot)
{
    struct json_object *data = qmp_args_strings("job-id", job, "device", device, "target", target, "sync", "none",
                                                "filter-node-name", filter, NULL);

    if (break_snapshot)
        put_string(data, "on-cbw-error", "break-snapshot");
    put_action(args, "blockdev-backup", data);
}

struct json_object *qmp_args_block_commit(const char *job, const char *device, const char *top, const char *base,
                                          bool auto_finalize, uint64_t speed)
{
    struct json_object *o = qmp_args_strings("job-id", job, "device", device, "top-node", top, "base-node", base, NULL);

    put(o, "auto-finalize", json_object_new_boolean(auto_finalize));
    put(o, "auto-dismiss", json_object_new_boolean(false));
    put(o, "speed", json_object_new_int64((int64_t)speed));
    return o;
}

struct json_object *qmp_args_create_overlay(const char *job, const char *file_node, const char *backing,
                                            const char *backing_format, struct json_object *like)
{
    struct json_object *data = qmp_get(qmp_get(like, "format-specific"), "data"), *o = new_args("job-id", job);
    const char *compat = qmp_get_string(data, "compat"), *compression = qmp_get_string(data, "compression-type");
    bool old = compat && strcmp(compat, "0.10") == 0; /* knows none of what follows */
    struct json_object *options = qmp_args_strings("driver", "qcow2", "file", file_node, "backing-file", backing,
                                                   "backing-fmt", backing_format, "version", old ? "v2" : "v3", NULL);

    put(options, "size", json_object_new_int64(qmp_get_int(like, "virtual-size")));
    put(options, "cluster-size", json_object_new_int64(qmp_get_int(like, "cluster-size")));
    if (!old) {
        put(options, "refcount-bits", json_object_new_int64(qmp_get_int(data, "refcount-bits")));
        put(options, "lazy-refcounts", json_object_new_boolean(qmp_get_bool(data, "lazy-refcounts")));
        put(options, "extended-l2", json_object_new_boolean(qmp_get_bool(data, "extended-l2")));
    }
    if (!old && compression)
        put_string(options, "compression-type", compression);
    put(o, "options", options);
    return o;
}

struct json_object *qmp_args_flush(const char *node)
{
    char line[64];

    /* Node names are letters, digits, '-', '.', '_' and '#', at most 31 of them: nothing to quote. */
    (void)snprintf(line, sizeof(line), "qemu-io %.31s flush", node);
    return new_args("command-line", line);
}

/* -- exports ------------------------------------------------------------------------------------------------------- */

struct json_object *qmp_args_nbd_server_start_fd(const char *fdname)
{
    struct json_object *o = new_args(NULL, NULL), *addr = new_args("type", "fd");

    put(addr, "data", new_args("str", fdname));
    put(o, "addr", addr);
    /* We are the only client; a connection per disk and context is made at once, and the default is 100. */
    put(o, "max-connections", json_object_new_int(0));
    return o;
}

struct json_object *qmp_args_export_add(const char *id, const char *node, const char *name, unsigned flags,
                                        const struct qmp_bitmap *bitmaps, size_t nbitmaps)
{
    struct json_object *o = qmp_args_strings("type", "nbd", "id", id, "node-name", node, NULL);

    if (name)
        put_string(o, "name", name);
    put_true(o, "writable", flags & QMP_EXPORT_WRITABLE);
    put_true(o, "allocation-depth", flags & QMP_EXPORT_DEPTH);
    if (nbitmaps) {
        struct json_object *list = json_object_new_array();

        for (size_t i = 0; i < nbitmaps; i++)
            (void)json_object_array_add(list, qmp_args_strings("node", bitmaps[i].node, "name", bitmaps[i].name, NULL));
        put(o, "bitmaps", list);
    }
    return o;
}

struct json_object *qmp_args_export_add_vhost(const char *id, const char *node, const char *fdname)
{
    struct json_object *o = qmp_args_strings("type", "vhost-user-blk", "id", id, "node-name", node, NULL);

    put(o, "addr", qmp_args_strings("type", "fd", "str", fdname, NULL));
    return o;
}

struct json_object *qmp_args_export_del(const char *id)
{
    return qmp_args_strings("id", id, "mode", "hard", NULL);
}

struct json_object *qmp_args_query_named_block_nodes(void)
{
    struct json_object *o = new_args(NULL, NULL);

    put(o, "flat", json_object_new_boolean(true)); /* without every backing image again below every node */
    return o;
}

/* -- reading answers ----------------------------------------------------------------------------------------------- */

struct json_object *qmp_get(struct json_object *o, const char *key)
{
    struct json_object *value = NULL;

    if (!json_object_is_type(o, json_type_object) || !json_object_object_get_ex(o, key, &value))
        return NULL;
    return value;
}

const char *qmp_get_string(struct json_object *o, const char *key)
{
    struct json_object *value = qmp_get(o, key);

    return json_object_is_type(value, json_type_string) ? json_object_get_string(value) : NULL;
}

int64_t qmp_get_int(struct json_object *o, const char *key)
{
    struct json_object *value = qmp_get(o, key);

    return json_object_is_type(value, json_type_int) ? json_object_get_int64(value) : 0;
}

bool qmp_get_bool(struct json_object *o, const char *key)
{
    struct json_object *value = qmp_get(o, key);

    return json_object_is_type(value, json_type_boolean) && json_object_get_boolean(value);
}

size_t qmp_array_length(struct json_object *a)
{
    return json_object_is_type(a, json_type_array) ? json_object_array_length(a) : 0;
}
