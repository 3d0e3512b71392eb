/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * covered: which bytes of a disk have been handed out, as a sorted list of ranges that do not touch. Ranges that come
 * from the front to the back, as copying programs read, stay few; a reader that leaves more than COVERED_MAX gaps is
 * not followed any further, and then the disk never counts as whole. Any one thread at a time.
 */
#ifndef QPULL_PLUGIN_COVERED_H
#define QPULL_PLUGIN_COVERED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define COVERED_MAX 65536u /* ranges: 1 MiB of memory */

struct covered {
    struct covered_range {
        uint64_t from, to; /* bytes; to is past the end */
    } * ranges;            /* owned */
    size_t nranges, nallocated;
    bool lost; /* too many, or no memory */
};

void covered_done(struct covered *c); /* a zeroed one is empty */
void covered_add(struct covered *c, uint64_t offset, uint64_t length);
bool covered_whole(const struct covered *c, uint64_t size);

#endif
