/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * options: what nbdkit's command line tells the plugin: key=value pairs, checked one by one and then as a whole. Every
 * refusal is a sentence. Written before nbdkit forks, read-only after that.
 */
#ifndef QPULL_PLUGIN_OPTIONS_H
#define QPULL_PLUGIN_OPTIONS_H

#include "backup/place.h"
#include "backup/quiesce.h"
#include "frozen.h"
#include "qmp/base.h"

#include <stdbool.h>

#define OPTIONS_DISKS_MAX 1024u     /* as the daemon's disks= */
#define OPTIONS_SECONDS_MAX 604800u /* of timeout=, linger= and max-pause= */
#define OPTIONS_TIMEOUT_S 60u       /* default: QEMU's monitor, a quiesced guest and a freeze, on a busy machine */

struct options {
    char *qmp, *qga, *server; /* owned: paths of sockets, absolute; of qmp and server just one is set */
    char *vm;                 /* owned: name, for sentences and notes */
    char *scratch;            /* owned: directory, or … */
    struct place *place;      /* … owned: another place */
    char *state;              /* owned: directory */
    char *dirty_map;          /* owned: file, or NULL; absolute */
    char *checkpoint, *since; /* owned: names, or NULL */
    char **disks;             /* owned: named ones, none: all */
    size_t ndisks;
    enum view view;
    enum quiesce_mode quiesce;
    unsigned timeout_s, linger_s, max_pause_s;
    char *watchdog; /* owned: the program that thaws when we are dead; only where quiesce is not off */
    /* private: what was said, for options that have a default or exclude each other */
    bool view_said, quiesce_said, timeout_said, linger_said, max_pause_said;
};

void options_init(struct options *o);
void options_done(struct options *o);
/* One pair. -EINVAL and a sentence. */
int options_set(struct options *o, const char *key, const char *value, struct failure *f);
/* After the last pair: what does not go together, and paths. Makes the default state directory. */
int options_complete(struct options *o, struct failure *f);
/* The file for this disk's dirty map: owned by the caller, NULL: out of memory. */
char *options_dirty_map_path(const struct options *o, const char *disk);

extern const char options_help[];

#endif
