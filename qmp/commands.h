/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * commands: one builder of "arguments" for each QMP command that we use, so that QEMU's spelling stands in one place.
 * Each returns a new object that the caller owns (and hands to qmp_call_start()), or NULL when memory ran out, which
 * qmp_call_start() of a command that needs arguments turns into QEMU's own refusal. Any thread.
 */
#ifndef QPULL_QMP_COMMANDS_H
#define QPULL_QMP_COMMANDS_H

#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>

/* A dirty bitmap by the node that holds it. */
struct qmp_bitmap {
    const char *node, *name;
};

/* {KEY: value, …}: pairs of strings, ended by NULL. */
struct json_object *qmp_args_strings(const char *key, ...);

struct json_object *qmp_args_add_fd(const char *opaque);
struct json_object *qmp_args_remove_fd(int64_t fdset_id);

struct json_object *qmp_args_blockdev_add_file(const char *node, int64_t fdset_id);
/* An image for reading that nobody else may write to meanwhile; protocol: "file" or "host_device". */
struct json_object *qmp_args_blockdev_add_image(const char *node, const char *driver, const char *protocol,
                                                const char *path);
/* target: given, a node's name or what makes one. */
struct json_object *qmp_args_blockdev_add_cbw(const char *node, const char *file, struct json_object *target,
                                              unsigned timeout_s);
/* A node that is nothing but its name. */
struct json_object *qmp_args_blockdev_add_null(const char *node);
struct json_object *qmp_args_blockdev_add_raw(const char *node, const char *file);
/* discards: they may come, through an export that is writable. */
struct json_object *qmp_args_blockdev_add_snapshot_access(const char *node, const char *file, bool discards);
/* An image of an fdset, read-only, over another node. */
struct json_object *qmp_args_blockdev_add_empty(const char *node, const char *format, int64_t fdset_id,
                                                const char *backing);
/* {"options": []}; entries are added by qmp_args_reopen_raw(). */
struct json_object *qmp_args_reopen(void);
void qmp_args_reopen_raw(struct json_object *args, const char *node, const char *file);
/* One image, made writable or read-only; its children must be said again, each by qmp_args_reopen_child(). */
struct json_object *qmp_args_reopen_image(const char *node, const char *driver, bool writable);
void qmp_args_reopen_child(struct json_object *args, const char *role, const char *child);
struct json_object *qmp_args_qom_set_drive(const char *path, const char *node);

/* {"actions": []}; entries are added by the qmp_action_* functions below. */
struct json_object *qmp_args_transaction(void);
void qmp_action_bitmap_add(struct json_object *args, struct qmp_bitmap b, uint64_t granularity, bool persistent,
                           bool disabled);
void qmp_action_bitmap_merge(struct json_object *args, struct qmp_bitmap target, const struct qmp_bitmap *sources,
                             size_t nsources);
void qmp_action_bitmap_clear(struct json_object *args, struct qmp_bitmap b);
void qmp_action_bitmap_remove(struct json_object *args, struct qmp_bitmap b);
/*
 * A backup job that copies nothing but what is about to be overwritten, and goes when it has ended. break_snapshot: its
 * on-cbw-error, which not every QEMU has.
 */
void qmp_action_backup(struct json_object *args, const char *job, const char *device, const char *target,
                       const char *filter, bool break_snapshot);
struct json_object *qmp_args_bitmap_add(struct qmp_bitmap b, uint64_t granularity, bool persistent, bool disabled);
struct json_object *qmp_args_bitmap_merge(struct qmp_bitmap target, const struct qmp_bitmap *sources, size_t nsources);

/* speed: bytes a second, 0: as fast as it goes. The job stays when it has ended, until it is dismissed. */
struct json_object *qmp_args_block_commit(const char *job, const char *device, const char *top, const char *base,
                                          bool auto_finalize, uint64_t speed);

/*
 * blockdev-create: an empty qcow2 image over another, of the same kind as `like` (BlockNodeInfo's "image"), in an open
 * file.
 */
struct json_object *qmp_args_create_overlay(const char *job, const char *file_node, const char *backing,
                                            const char *backing_format, struct json_object *like);

/* human-monitor-command: QMP has no flush. It answers with what went wrong, or "". */
struct json_object *qmp_args_flush(const char *node);

struct json_object *qmp_args_nbd_server_start_fd(const char *fdname);
#define QMP_EXPORT_WRITABLE 1u
#define QMP_EXPORT_DEPTH 2u /* has the context "qemu:allocation-depth" */
/* name: clients say it; NULL: that of the node. */
struct json_object *qmp_args_export_add(const char *id, const char *node, const char *name, unsigned flags,
                                        const struct qmp_bitmap *bitmaps, size_t nbitmaps);
/* fdname: of a listening socket (getfd). */
struct json_object *qmp_args_export_add_vhost(const char *id, const char *node, const char *fdname);
struct json_object *qmp_args_export_del(const char *id);
struct json_object *qmp_args_query_named_block_nodes(void);

/* Reading answers: borrowed from o, or the default when the key is not there or of another type. o may be NULL. */
struct json_object *qmp_get(struct json_object *o, const char *key);
const char *qmp_get_string(struct json_object *o, const char *key); /* NULL */
int64_t qmp_get_int(struct json_object *o, const char *key);        /* 0 */
bool qmp_get_bool(struct json_object *o, const char *key);          /* false */
size_t qmp_array_length(struct json_object *a);                     /* 0 when a is no array */

#endif
