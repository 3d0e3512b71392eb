/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * ring: the driver's side of one split virtqueue that carries virtio-blk reads (virtio 1.2, 2.7 and 5.2), in memory
 * that a device which we do not trust can write to. It does no I/O and knows no sockets: whoever embeds it kicks and is
 * called.
 *
 * Request n of the ring has RING_DESCRIPTORS descriptors for good, from that number on (head, data, status), so there
 * is nothing to allocate and nothing that the device says is believed but "request n is done, with this status".
 *
 * Any one thread. The memory belongs to the caller and stands until ring_done() is not needed: there is nothing to free
 * but what ring_init() allocated.
 */
#ifndef QPULL_SOURCE_RING_H
#define QPULL_SOURCE_RING_H

#include "qmp/base.h"

#include <stdbool.h>

#define RING_SECTOR 512u /* bytes: the unit of virtio-blk's offsets, whatever the block size (virtio 1.2, 5.2.6) */

#define RING_SEGMENTS 4u /* at most, that one request's data goes to */
#define RING_DESCRIPTORS (RING_SEGMENTS + 2)

struct ring_segment {
    uint64_t to; /* device address */
    uint32_t length;
};

struct ring {
    unsigned nrequests;
    unsigned num; /* descriptors, a power of two */
    /* in shared memory */
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    struct ring_head *heads;
    unsigned char *status; /* one byte a request */
    /* what the device cannot touch */
    uint64_t address; /* of the first byte of the shared memory, as the device counts */
    uint16_t avail_next, avail_kicked, used_next;
    bool *busy; /* owned */
    unsigned nbusy;
    bool event_index; /* VIRTIO_RING_F_EVENT_IDX is agreed upon */
};

/* Bytes of shared memory that a ring of so many requests takes (the data's not among them), a multiple of a page. */
size_t ring_bytes(unsigned nrequests);

/*
 * memory is where the ring begins, zeroed, page-aligned, ring_bytes() long; address is how the device calls that byte.
 * -EINVAL: too many requests for a virtqueue; -ENOMEM.
 */
int ring_init(struct ring *r, unsigned nrequests, void *memory, uint64_t address, bool event_index);
void ring_done(struct ring *r);

/* How the three parts are called in VHOST_USER_SET_VRING_ADDR: offsets from the ring's first byte. */
struct ring_layout {
    uint64_t desc, avail, used;
};
struct ring_layout ring_layout(const struct ring *r);

/* Puts request n, which is not busy, on the ring: the bytes from sector on into 1 to RING_SEGMENTS pieces of memory. It
 * is told with the next ring_publish(). */
void ring_read(struct ring *r, unsigned n, uint64_t sector, const struct ring_segment *to, unsigned nsegments);
/* Makes all of them known; true: the device wants a kick. */
bool ring_publish(struct ring *r);

/*
 * The next request that the device has ended: its number, and in ret_ok whether it worked. -EAGAIN: none now, and the
 * device will call when there is. -EPROTO: the device breaks the rules; do not use the ring any more.
 */
int ring_next(struct ring *r, bool *ret_ok);

#endif
