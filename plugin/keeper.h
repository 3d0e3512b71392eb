/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * keeper: one connection of its own to a qpulld for as long as a disk is open here. It asks for the dirty map in the
 * session's first negotiation, so that the map is exact, keeps the session alive between connections that carry data,
 * and is the last to leave: its goodbye says whether the pull ended well.
 *
 * nbdkit's threads only: these functions wait, no longer than the deadline. One thread at a time.
 */
#ifndef QPULL_PLUGIN_KEEPER_H
#define QPULL_PLUGIN_KEEPER_H

#include "door.h"

struct keeper;

/* context: of the dirty map, or NULL. Negative errno and the server's own words, as far as libnbd passes them on. */
int keeper_new(const char *socket, const char *export_name, const char *context, uint64_t deadline_ms,
               struct keeper **ret_keeper, struct failure *f);
/* Whether the server has not ended it. */
bool keeper_stands(struct keeper *k);
/* well: NBD's goodbye is said, else the connection just ends. */
void keeper_free(struct keeper *k, bool well);

/* Names of all exports that begin with prefix, without it. */
int keeper_list(const char *socket, const char *prefix, uint64_t deadline_ms, struct names *ret_names,
                struct failure *f);

#endif
