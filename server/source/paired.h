/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * source/paired: two sources of one frozen disk as one: reads go through the fast one as long as it lives, and through
 * the sure one where the fast one does not reach (the end of a disk of odd size), fails, or has been lost. Nobody who
 * reads notices. What the sure one says of a read is the truth (it tells a broken snapshot from another error), and
 * only its loss is the pair's. A read that is marked so (source_read.sure) goes to it alone.
 *
 * Loop thread only.
 */
#ifndef QPULL_SOURCE_PAIRED_H
#define QPULL_SOURCE_PAIRED_H

#include "source/source.h"

/* sure is given on success. Whoever opened it hears of its loss as before. -ENOMEM. */
int source_paired_new(struct source *sure, struct source **ret_source);
/* fast is given; whoever opened it tells of its loss by the next function. Once. */
void source_paired_add(struct source *pair, struct source *fast);
/* It serves no more reads: it is closed. Not from within a callback of a read. */
void source_paired_lost(struct source *pair);

#endif
