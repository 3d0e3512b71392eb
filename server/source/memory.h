/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * memory: a source over bytes in memory, for tests. Answers from the loop (never from inside source_read()) and can be
 * told to fail or to hold its answers back. Loop thread only.
 */
#ifndef QPULL_SOURCE_MEMORY_H
#define QPULL_SOURCE_MEMORY_H

#include "source/source.h"

#include <stdbool.h>
#include <uv.h>

/* data is borrowed until the source is closed. */
int source_memory_new(uv_loop_t *loop, const void *data, uint64_t size, source_lost_cb on_lost, void *arg,
                      struct source **ret_source);

/* Holds answers back until told otherwise. */
void source_memory_hold(struct source *s, bool hold);
/* From now on reads are lost, as when QEMU goes away. */
void source_memory_lose(struct source *s);

#endif
