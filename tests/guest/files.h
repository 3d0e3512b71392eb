/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * files: a program of the guest that works with files: writes new ones, stores them, renames them over older ones and
 * removes some, for ever. One thread; any thread may ask how it goes, and does not wait for it.
 */
#ifndef QPULL_GUEST_FILES_H
#define QPULL_GUEST_FILES_H

#include <stddef.h>

#define FILES_DIR "/files"

int files_start(char *answer, size_t len);
/* "ops= errors= slowest-us= idle-us=": how long the longest operation took, and since when none has ended. */
int files_status(char *answer, size_t len);

#endif
