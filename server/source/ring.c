/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/ring.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>

#define RING_MAX 1024u /* descriptors: what libvhost-user takes (VIRTQUEUE_MAX_SIZE) */
#define RING_PAGE 4096u

/* virtio 1.2, 5.2.6: the head of a request. Little-endian, as all of the ring. */
struct ring_head {
    uint32_t type, reserved;
    uint64_t sector;
};

static size_t align_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

static unsigned descriptors_for(unsigned nrequests)
{
    unsigned num = 1;

    while (num < nrequests * RING_DESCRIPTORS)
        num *= 2;
    return num;
}

/* Offsets of the parts, in the order and with the alignment that virtio 1.2, 2.7 asks for. */
struct parts {
    size_t avail, used, heads, status, end;
};

static struct parts parts_of(unsigned nrequests)
{
    unsigned num = descriptors_for(nrequests);
    struct parts p;

    p.avail = num * sizeof(struct vring_desc);
    p.used = align_up(p.avail + sizeof(struct vring_avail) + (num + 1) * sizeof(uint16_t), RING_PAGE);
    p.heads =
        align_up(p.used + sizeof(struct vring_used) + num * sizeof(struct vring_used_elem) + sizeof(uint16_t), 64);
    p.status = p.heads + nrequests * sizeof(struct ring_head);
    p.end = align_up(p.status + nrequests, RING_PAGE);
    return p;
}

size_t ring_bytes(unsigned nrequests)
{
    return parts_of(nrequests).end;
}

struct ring_layout ring_layout(const struct ring *r)
{
    struct parts p = parts_of(r->nrequests);

    return (struct ring_layout){.desc = 0, .avail = p.avail, .used = p.used};
}

/* Fields of the "event index" extension: behind the arrays (virtio 1.2, 2.7.7 and 2.7.10). */
static uint16_t *used_event(const struct ring *r)
{
    return &r->avail->ring[r->num];
}

static const uint16_t *avail_event(const struct ring *r)
{
    return (const uint16_t *)&r->used->ring[r->num];
}

int ring_init(struct ring *r, unsigned nrequests, void *memory, uint64_t address, bool event_index)
{
    unsigned num = descriptors_for(nrequests);
    struct parts p = parts_of(nrequests);
    unsigned char *at = memory;

    if (nrequests == 0 || num > RING_MAX)
        return -EINVAL;
    *r = (struct ring){
        .nrequests = nrequests,
        .num = num,
        .desc = memory,
        .avail = (void *)(at + p.avail),
        .used = (void *)(at + p.used),
        .heads = (void *)(at + p.heads),
        .status = at + p.status,
        .address = address,
        .event_index = event_index,
        .busy = calloc(nrequests, sizeof(bool)),
    };
    return r->busy ? 0 : -ENOMEM;
}

void ring_done(struct ring *r)
{
    free(TAKE_PTR(r->busy));
}

void ring_read(struct ring *r, unsigned n, uint64_t sector, const struct ring_segment *to, unsigned nsegments)
{
    struct parts p = parts_of(r->nrequests);
    uint16_t first = (uint16_t)(n * RING_DESCRIPTORS);
    struct vring_desc *d = &r->desc[first];

    r->busy[n] = true;
    r->nbusy++;
    r->heads[n] = (struct ring_head){.type = htole32(VIRTIO_BLK_T_IN), .sector = htole64(sector)};
    r->status[n] = 0xff; /* not a status: the device has to write one */
    /* All are written anew each time: the device could have changed them. */
    d[0] = (struct vring_desc){
        .addr = htole64(r->address + p.heads + n * sizeof(struct ring_head)),
        .len = htole32(sizeof(struct ring_head)),
        .flags = htole16(VRING_DESC_F_NEXT),
        .next = htole16((uint16_t)(first + 1)),
    };
    for (unsigned i = 0; i < nsegments; i++) {
        d[1 + i] = (struct vring_desc){
            .addr = htole64(to[i].to),
            .len = htole32(to[i].length),
            .flags = htole16(VRING_DESC_F_NEXT | VRING_DESC_F_WRITE),
            .next = htole16((uint16_t)(first + 2 + i)),
        };
    }
    d[1 + nsegments] = (struct vring_desc){
        .addr = htole64(r->address + p.status + n),
        .len = htole32(1),
        .flags = htole16(VRING_DESC_F_WRITE),
    };
    r->avail->ring[r->avail_next++ % r->num] = htole16(first);
}

bool ring_publish(struct ring *r)
{
    uint16_t was = r->avail_kicked;

    if (r->avail_next == was)
        return false;
    __atomic_store_n(&r->avail->idx, htole16(r->avail_next), __ATOMIC_RELEASE);
    r->avail_kicked = r->avail_next;
    /* Our index before its wish: else both sides could wait for each other (virtio 1.2, 2.7.13.4.1). */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (r->event_index)
        return vring_need_event(le16toh(__atomic_load_n(avail_event(r), __ATOMIC_RELAXED)), r->avail_next, was);
    return !(le16toh(__atomic_load_n(&r->used->flags, __ATOMIC_RELAXED)) & VRING_USED_F_NO_NOTIFY);
}

static uint16_t used_now(const struct ring *r)
{
    return le16toh(__atomic_load_n(&r->used->idx, __ATOMIC_ACQUIRE));
}

int ring_next(struct ring *r, bool *ret_ok)
{
    struct vring_used_elem *e;
    uint32_t id;

    if (used_now(r) == r->used_next) {
        /* Says when to call, then looks again: what ended in between is not called for. */
        __atomic_store_n(used_event(r), htole16(r->used_next), __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (used_now(r) == r->used_next)
            return -EAGAIN;
    }
    if ((uint16_t)(used_now(r) - r->used_next) > r->nbusy)
        return -EPROTO;
    e = &r->used->ring[r->used_next++ % r->num];
    id = le32toh(__atomic_load_n(&e->id, __ATOMIC_RELAXED));
    if (id % RING_DESCRIPTORS || id / RING_DESCRIPTORS >= r->nrequests || !r->busy[id / RING_DESCRIPTORS])
        return -EPROTO;
    id /= RING_DESCRIPTORS;
    r->busy[id] = false;
    r->nbusy--;
    *ret_ok = __atomic_load_n(&r->status[id], __ATOMIC_RELAXED) == VIRTIO_BLK_S_OK;
    return (int)id;
}
