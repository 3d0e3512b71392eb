/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * state_file: small files in the state directory, replaced as a whole: written beside the old one, synced, and renamed
 * over it. And how a name that somebody chose becomes a file's name. No objects; these functions wait for the disk:
 * worker threads, or at start.
 */
#ifndef QPULL_BACKUP_STATE_FILE_H
#define QPULL_BACKUP_STATE_FILE_H

#include "qmp/base.h"

#include <limits.h>
#include <stdbool.h>
#include <unistd.h>

#define STATE_HASH_DIGITS 16 /* of state_hash(), in hex */

static inline void state_closep(const int *fd)
{
    if (*fd >= 0)
        (void)close(*fd);
}
#define _cleanup_fd_ _cleanup_(state_closep)

uint64_t state_hash(const char *text);
/* The file's name of a name: "NAME" and suffix, the same on every file system and harmless on every terminal. */
const char *state_name(const char *name, const char *suffix, char out[NAME_MAX + 1]);
/* The name again; false: it is not such a file, or it was too long to be told from it. */
bool state_name_parse(const char *file, const char *suffix, char out[NAME_MAX + 1]);
/* A new name for what is made beside and renamed at once. */
#define STATE_TEMP_SIZE 32
void state_temp_name(char out[STATE_TEMP_SIZE]);
/* A file of an interrupted state_replace(). */
bool state_is_temp(const char *file);

/* A directory below `at`, to read and to sync; negative errno. */
int state_open_dir(int at, const char *name);
/* Makes it if it is not there, so that it stays after a loss of power. */
int state_make_dir(int at, const char *name);

/* A regular file of at most max bytes, *ret_text owned by the caller, not terminated. -ENOENT is not told in f. */
int state_read(int dir, const char *file, size_t max, char **ret_text, size_t *ret_len, struct failure *f);
/* The directory is not synced yet. */
int state_replace(int dir, const char *file, const char *text, size_t len);

#endif
