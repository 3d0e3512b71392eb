/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A hostile vhost-user back end. The first byte says how many bytes it says while the device is set up, and the second
 * in which pieces; the rest are writes to the memory that it shares with us, which has a ring of requests in it: at any
 * place, or where they hurt most. Whatever it does, a request ends at most once and only if it was given.
 */
#include "source/vhost_talk.h"

#include <errno.h>
#include <linux/virtio_ring.h>

#define NREQUESTS 16u
#define MEMORY ((size_t)64 << 10) /* of the ring, at most */
#define ADDRESS (1ull << 20)
#define WRITE 6u /* bytes: what kind, and its numbers */

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len);

static void talk(const uint8_t *bytes, size_t len, size_t piece)
{
    struct vhost_talk t = {0};
    struct failure f = {0};
    int r = 0;

    for (size_t at = 0, used; r >= 0 && at < len; at += used) {
        r = vhost_talk_feed(&t, bytes + at, MIN(piece, len - at), &used, &f);
        if (r < 0 && (r != -EPROTO || !f.text[0]))
            abort();
        if (r >= 0 && used == 0)
            abort();
        if (t.have > sizeof(t.input))
            abort();
    }
    if (t.state == VHOST_READY && t.capacity % RING_SECTOR)
        abort();
}

static void give(struct ring *r, bool *given)
{
    struct ring_segment to[RING_SEGMENTS];

    for (unsigned i = 0; i < NREQUESTS; i++) {
        if (given[i])
            continue;
        for (unsigned k = 0; k < RING_SEGMENTS; k++)
            to[k] = (struct ring_segment){.to = ADDRESS + MEMORY + k * RING_SECTOR, .length = RING_SECTOR};
        ring_read(r, i, i, to, 1 + i % RING_SEGMENTS);
        given[i] = true;
    }
    (void)ring_publish(r);
}

/* What the device writes: an answer in due form, any bytes of the ring, or a number of answers. */
static void write_memory(struct ring *r, unsigned char *memory, const uint8_t *w, uint16_t *used)
{
    uint16_t at = (uint16_t)(w[1] | w[2] << 8);

    switch (w[0] % 3) {
    case 0:
        r->used->ring[*used % r->num].id = w[3] % 4 ? w[1] % NREQUESTS * RING_DESCRIPTORS : at;
        r->used->idx = ++*used;
        r->status[w[1] % NREQUESTS] = w[4] % 3;
        break;
    case 1:
        memory[at % ring_bytes(NREQUESTS)] = w[3];
        break;
    case 2:
        r->used->idx = *used = at;
        break;
    }
}

static void serve(const uint8_t *bytes, size_t len, bool event_index)
{
    size_t size = ring_bytes(NREQUESTS);
    unsigned char *memory = size <= MEMORY ? aligned_alloc(4096, size) : NULL;
    bool given[NREQUESTS] = {false}, ok;
    struct ring r;
    uint16_t used = 0;
    int n = 0;

    if (!memory)
        abort();
    memset(memory, 0, size);
    if (ring_init(&r, NREQUESTS, memory, ADDRESS, event_index) < 0)
        abort();
    for (; n != -EPROTO && len >= WRITE; bytes += WRITE, len -= WRITE) {
        give(&r, given);
        write_memory(&r, memory, bytes, &used);
        while ((n = ring_next(&r, &ok)) >= 0) {
            if ((unsigned)n >= NREQUESTS || !given[n])
                abort();
            given[n] = false;
        }
        if (n != -EAGAIN && n != -EPROTO)
            abort();
    }
    ring_done(&r);
    free(memory);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len)
{
    size_t said;

    if (len < 2)
        return 0;
    said = MIN((size_t)bytes[0], len - 2);
    talk(bytes + 2, said, 1 + (size_t)bytes[1]);
    serve(bytes + 2 + said, len - 2 - said, bytes[1] & 1);
    return 0;
}
