/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * source/giveback: a source over another one, parts of which can be given back (source_give_back): QEMU frees what it
 * has copied of them, and what the guest overwrites there is not copied any more. From then on those parts cannot be
 * read: the answer is -ENODATA, and it is ours. QEMU says EINVAL for them, as for a snapshot that is broken, and is
 * never asked.
 *
 * Only whole clusters are given back, never the first one (what stands of the frozen view is probed there), nor one at
 * the end that is no whole one. QEMU hears of it over a connection of its own, in batches, one at a time and after the
 * reads that were under way: reads never wait for it. Where QEMU does not want to, nothing is freed, that is all. Block
 * status of what was given back is EINVAL, too: so QEMU hears of nothing before its maps have been read
 * (giveback_begin).
 *
 * Loop thread only. It keeps a bit for each cluster: 2 MiB for a disk of 1 TiB and clusters of 64 KiB.
 */
#ifndef QPULL_SOURCE_GIVEBACK_H
#define QPULL_SOURCE_GIVEBACK_H

#include "source/nbd.h"

#define GIVEBACK_BATCH_MS 50u /* from the first range of a batch to its way */
#define GIVEBACK_RANGES 1024u /* of a batch; what is past it is not read any more, and not freed */
#define GIVEBACK_FLYING 4u    /* requests in flight; their answers have no payload */

/*
 * export: a writable export of the frozen view, borrowed for the call. cluster: QEMU's granularity there, a power of
 * two: QEMU 7.2 aborts where a request is not aligned to it. below is given, unless this fails (-ENOMEM, -EINVAL).
 */
int giveback_new(uv_loop_t *loop, const struct source_nbd_config *export, uint32_t cluster, struct source *below,
                 struct source **ret_source);

/* From now on QEMU is told. Once. */
void giveback_begin(struct source *s);

#endif
