/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/vhost_talk.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* Requests, and bits of features and flags: vhost-user.rst, "Front-end message types" and after it. */
enum {
    REQUEST_GET_FEATURES = 1,
    REQUEST_SET_FEATURES = 2,
    REQUEST_SET_OWNER = 3,
    REQUEST_SET_MEM_TABLE = 5,
    REQUEST_SET_VRING_NUM = 8,
    REQUEST_SET_VRING_ADDR = 9,
    REQUEST_SET_VRING_BASE = 10,
    REQUEST_SET_VRING_KICK = 12,
    REQUEST_SET_VRING_CALL = 13,
    REQUEST_GET_PROTOCOL_FEATURES = 15,
    REQUEST_SET_PROTOCOL_FEATURES = 16,
    REQUEST_SET_VRING_ENABLE = 18,
    REQUEST_GET_CONFIG = 24,
};
#define FEATURE_PROTOCOL_FEATURES (1ull << 30) /* VHOST_USER_F_PROTOCOL_FEATURES */
#define PROTOCOL_REPLY_ACK (1ull << 3)
#define PROTOCOL_CONFIG (1ull << 9)
#define FLAG_VERSION 1u
#define FLAG_REPLY (1u << 2)
#define FLAG_NEED_REPLY (1u << 3)

#define NEEDED_FEATURES (FEATURE_PROTOCOL_FEATURES | 1ull << VIRTIO_F_VERSION_1)
#define NEEDED_PROTOCOL (PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG)

struct header {
    uint32_t request, flags, size;
};

struct config {
    uint32_t offset, size, flags;
    unsigned char space[sizeof(uint64_t)]; /* the capacity is what the configuration begins with (virtio 1.2, 5.2.4) */
};

struct memory_table {
    uint32_t nregions, padding;
    uint64_t guest_address, size, user_address, offset;
};

struct vring_state {
    uint32_t index, value;
};

struct vring_address {
    uint32_t index, flags;
    uint64_t desc, used, avail, log;
};

/* The socket is new and the messages are small: what does not go out at once never will. */
static int say(int sock, uint32_t request, uint32_t flags, const void *payload, size_t size, int fd)
{
    struct header h = {.request = request, .flags = FLAG_VERSION | flags, .size = (uint32_t)size};
    struct iovec iov[] = {{&h, sizeof(h)}, {(void *)payload, size}};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = ARRAY_SIZE(iov)};
    ssize_t n;

    if (fd >= 0) {
        struct cmsghdr *c = &control.align;

        m.msg_control = control.bytes;
        m.msg_controllen = sizeof(control.bytes);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    }
    do
        n = sendmsg(sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return -errno;
    return (size_t)n == sizeof(h) + size ? 0 : -EIO;
}

static int say_number(int sock, uint32_t request, uint64_t n, int fd)
{
    return say(sock, request, 0, &n, sizeof(n), fd);
}

int vhost_talk_begin(struct vhost_talk *t, int fd)
{
    int r = say(fd, REQUEST_SET_OWNER, 0, NULL, 0, -1);

    memset(t, 0, sizeof(*t));
    if (r == 0)
        r = say(fd, REQUEST_GET_FEATURES, 0, NULL, 0, -1);
    if (r == 0)
        r = say(fd, REQUEST_GET_PROTOCOL_FEATURES, 0, NULL, 0, -1);
    return r;
}

int vhost_talk_set_up(struct vhost_talk *t, int fd, const struct vhost_setup *s)
{
    const uint64_t base = (uint64_t)(uintptr_t)s->memory;
    const struct ring_layout at = ring_layout(s->ring);
    const struct memory_table table = {
        .nregions = 1,
        .guest_address = s->ring->address,
        .size = s->memory_bytes,
        .user_address = base,
    };
    const struct vring_state num = {.value = s->ring->num}, zero = {0}, on = {.value = 1};
    const struct vring_address address = {.desc = base + at.desc, .used = base + at.used, .avail = base + at.avail};
    const struct config config = {.size = sizeof(config.space)};
    const uint64_t features = NEEDED_FEATURES | (t->event_index ? 1ull << VIRTIO_RING_F_EVENT_IDX : 0);
    int r = say_number(fd, REQUEST_SET_PROTOCOL_FEATURES, NEEDED_PROTOCOL, -1);

    if (r == 0)
        r = say_number(fd, REQUEST_SET_FEATURES, features, -1);
    if (r == 0)
        r = say(fd, REQUEST_GET_CONFIG, 0, &config, sizeof(config), -1);
    if (r == 0)
        r = say(fd, REQUEST_SET_MEM_TABLE, 0, &table, sizeof(table), s->memory_fd);
    if (r == 0)
        r = say(fd, REQUEST_SET_VRING_NUM, 0, &num, sizeof(num), -1);
    if (r == 0)
        r = say(fd, REQUEST_SET_VRING_BASE, 0, &zero, sizeof(zero), -1);
    if (r == 0)
        r = say(fd, REQUEST_SET_VRING_ADDR, 0, &address, sizeof(address), -1);
    if (r == 0)
        r = say_number(fd, REQUEST_SET_VRING_CALL, 0, s->call_fd);
    if (r == 0)
        r = say_number(fd, REQUEST_SET_VRING_KICK, 0, s->kick_fd);
    if (r == 0)
        r = say(fd, REQUEST_SET_VRING_ENABLE, FLAG_NEED_REPLY, &on, sizeof(on), -1);
    return r;
}

/* -- replies ------------------------------------------------------------------------------------------------------- */

static int hear_features(struct vhost_talk *t, uint64_t features, struct failure *f)
{
    if ((features & NEEDED_FEATURES) != NEEDED_FEATURES)
        return failure_set(f, -EPROTO, "the vhost-user export lacks features that we need (it has %#llx)",
                           (unsigned long long)features);
    t->event_index = features & 1ull << VIRTIO_RING_F_EVENT_IDX;
    return 0;
}

static int hear_protocol(uint64_t features, struct failure *f)
{
    if ((features & NEEDED_PROTOCOL) != NEEDED_PROTOCOL)
        return failure_set(f, -EPROTO, "the vhost-user export lacks protocol features that we need (it has %#llx)",
                           (unsigned long long)features);
    return 0;
}

static int hear_config(struct vhost_talk *t, const struct config *c, struct failure *f)
{
    uint64_t sectors;

    memcpy(&sectors, c->space, sizeof(sectors));
    sectors = le64toh(sectors);
    if (c->size != sizeof(c->space) || sectors > INT64_MAX / RING_SECTOR)
        return failure_set(f, -EPROTO, "the vhost-user export does not tell its size");
    t->capacity = sectors * RING_SECTOR;
    return 0;
}

static int hear_ack(uint64_t refused, struct failure *f)
{
    return refused ? failure_set(f, -EPROTO, "the vhost-user export refuses to begin") : 0;
}

/* The replies that come, in order. */
static const struct {
    uint32_t request;
    enum vhost_state state, next;
    size_t size;
} replies[] = {
    {REQUEST_GET_FEATURES, VHOST_ASKING, VHOST_ASKING, sizeof(uint64_t)},
    {REQUEST_GET_PROTOCOL_FEATURES, VHOST_ASKING, VHOST_SETTING, sizeof(uint64_t)},
    {REQUEST_GET_CONFIG, VHOST_SETTING, VHOST_SETTING, sizeof(struct config)},
    {REQUEST_SET_VRING_ENABLE, VHOST_SETTING, VHOST_READY, sizeof(uint64_t)},
};

static int hear(struct vhost_talk *t, const struct header *h, const unsigned char *payload, struct failure *f)
{
    uint64_t n = 0;
    struct config c;
    int r = 0;

    if (t->heard == ARRAY_SIZE(replies) || h->request != replies[t->heard].request ||
        t->state != replies[t->heard].state || !(h->flags & FLAG_REPLY) || h->size != replies[t->heard].size)
        return failure_set(f, -EPROTO, "the vhost-user export answers what was not asked (%u, %u bytes)", h->request,
                           h->size);
    memcpy(&n, payload, sizeof(n));
    switch (h->request) {
    case REQUEST_GET_FEATURES:
        r = hear_features(t, n, f);
        break;
    case REQUEST_GET_PROTOCOL_FEATURES:
        r = hear_protocol(n, f);
        break;
    case REQUEST_GET_CONFIG:
        memcpy(&c, payload, sizeof(c));
        r = hear_config(t, &c, f);
        break;
    case REQUEST_SET_VRING_ENABLE:
        r = hear_ack(n, f);
        break;
    }
    if (r < 0)
        return r;
    r = replies[t->heard].next != t->state;
    t->state = replies[t->heard++].next;
    return r;
}

int vhost_talk_feed(struct vhost_talk *t, const void *bytes, size_t len, size_t *ret_used, struct failure *f)
{
    struct header h;
    size_t want = sizeof(h), n;
    int r;

    *ret_used = 0;
    while (*ret_used < len) {
        if (t->have >= sizeof(h)) {
            memcpy(&h, t->input, sizeof(h));
            if (h.size > sizeof(t->input) - sizeof(h))
                return failure_set(f, -EPROTO, "the vhost-user export sends %u bytes at once", h.size);
            want = sizeof(h) + h.size;
        }
        n = MIN(want - t->have, len - *ret_used);
        memcpy(t->input + t->have, (const char *)bytes + *ret_used, n);
        t->have += n;
        *ret_used += n;
        if (t->have < sizeof(h))
            continue;
        memcpy(&h, t->input, sizeof(h));
        if (t->have < sizeof(h) + h.size)
            continue;
        t->have = 0;
        want = sizeof(h);
        r = hear(t, &h, t->input + sizeof(h), f);
        if (r != 0)
            return r;
    }
    return 0;
}
