/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * capabilities: what a QEMU can do, of all that our code decides by, read out of query-qmp-schema. Versions say nothing
 * of back-ports; the schema does, but not of bugs: those are the self-test's (backup/selftest). No I/O here. Any one
 * thread.
 */
#ifndef QPULL_BACKUP_CAPABILITIES_H
#define QPULL_BACKUP_CAPABILITIES_H

#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>

enum capability {
    CAPABILITY_GRAPH,           /* x-debug-query-block-graph */
    CAPABILITY_EXPORT,          /* block-export-add */
    CAPABILITY_SNAPSHOT_ACCESS, /* the driver */
    CAPABILITY_REOPEN,          /* blockdev-reopen */
    CAPABILITY_CBW,             /* the driver copy-before-write */
    CAPABILITY_CBW_ON_ERROR,    /* its on-cbw-error … */
    CAPABILITY_CBW_TIMEOUT,     /* … and cbw-timeout */
    CAPABILITY_JOB,             /* blockdev-backup with filter-node-name, as an action of a transaction, too */
    CAPABILITY_JOB_ON_ERROR,    /* its on-cbw-error … */
    CAPABILITY_JOB_DISCARD,     /* … and discard-source */
    CAPABILITY_SET_ACTION,      /* set-action */
    CAPABILITY_COUNT
};
/* As QEMU spells it, e.g. "copy-before-write:on-cbw-error". */
const char *capability_name(enum capability c);
/* The first QEMU with it, e.g. "7.1". */
const char *capability_since(enum capability c);

struct capabilities {
    bool has[CAPABILITY_COUNT];
};

/* schema is QEMU's answer, borrowed. -EPROTO: it is none. What it does not tell in the known way, QEMU has not. */
int capabilities_parse(struct json_object *schema, struct capabilities *ret_capabilities, struct failure *f);

#define CAPABILITIES_TEXT_SIZE 512
/* All that it has, for the log: "x-debug-query-block-graph, block-export-add, …". Returns out. */
const char *capabilities_text(const struct capabilities *c, char out[CAPABILITIES_TEXT_SIZE]);
/* {NAME: bool, …}; the caller owns it. */
struct json_object *capabilities_to_json(const struct capabilities *c);

/*
 * The most of wish_s seconds that this QEMU's cbw-timeout can be; version is its "MAJOR.MINOR…". Before 9.1 it counts
 * nanoseconds in 32 bits, which no schema tells: 4 seconds and the sum begins anew, so that 10 are 1.4.
 */
unsigned capabilities_cbw_timeout(const char *version, unsigned wish_s);

#endif
