/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/vhost.h"

#include "source/read_list.h"
#include "source/vhost_talk.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

/* A slot is the memory for one block of the disk, and a request reads at most one block, so that large reads overlap.
 */
#define VHOST_SLOT (256u << 10)
/* QEMU works on all that the queue holds; more than 16 blocks at a time brought nothing (measured). */
#define VHOST_SLOTS 16u
/* Where little room is left: what one of very many needs, who each get only so much of the loop and of the disks. */
#define VHOST_SLOTS_LEAST 4u
/* Slots that one request may fill, where reads are neighbours: each costs QEMU a thread's waking, however long it is.
 */
#define VHOST_MERGED 4u
/* Requests of a slot where reads must not cross a cluster of 64 KiB. */
#define VHOST_PARTS 4u

#define VHOST_TIMEOUT_MS 30000u
/* Where the device believes our memory to be: anything will do, but 0 looks like a mistake. */
#define VHOST_ADDRESS (1ull << 20)

/* The state only moves down this list. */
enum vhost_source_state {
    VHOST_OPENING, /* the open callback is owed: -> OPEN, CLOSING */
    VHOST_OPEN,    /* serves reads: -> LOST, CLOSING */
    VHOST_LOST,    /* reads are refused: -> CLOSING */
    VHOST_CLOSING, /* the handles close; the last one answers what is left and frees */
};

struct slot {
    struct source_read *read; /* borrowed; NULL: free */
    uint64_t offset;          /* bytes of the disk that the memory stands for: whole sectors … */
    size_t length;
    size_t skip, take; /* … and what of them belongs to the read, at … */
    char *to;          /* … this place of its buffer */
    unsigned npending; /* requests */
    int err;
    unsigned next; /* the free slot after this one, or that of the same request; VHOST_SLOTS: none */
};

struct vhost_loan {
    struct source_loan loan;
    struct vhost_memory *memory;
    unsigned slot;
};

/* What is shared: the ring, then the slots. It stands as long as any of it is lent. */
struct vhost_memory {
    int fd; /* owned */
    unsigned char *base;
    size_t bytes, ring_bytes;
    unsigned nslots;
    struct vhost_room *room;     /* borrowed; NULL: none */
    struct vhost_source *source; /* borrowed; NULL: closed */
    unsigned nlent;
    struct vhost_loan loans[VHOST_SLOTS];
};

struct source_vhost_open {
    source_vhost_open_cb cb; /* NULL once called */
    void *arg;
    struct failure why;
};

struct vhost_source {
    struct source source;
    struct source_vhost_open open;
    enum vhost_source_state state;
    int fd, call_fd, kick_fd;    /* owned */
    struct vhost_memory *memory; /* owned, as far as nothing is lent */
    uint32_t cluster;
    unsigned timeout_ms;
    struct vhost_talk talk;
    struct ring ring;
    uv_poll_t socket, called;
    uv_timer_t deadline;
    uv_prepare_t ask; /* active while reads wait: what came in one turn of the loop is asked for at once */
    unsigned nhandles;
    uint64_t nanswers, nanswers_seen; /* progress, as the deadline sees it */
    struct slot slots[VHOST_SLOTS];
    unsigned
        free_slot; /* the last one used comes first: its memory is in the cache, and others need never be touched */
    struct read_list waiting; /* something is still to be asked for */
    struct read_list asked;   /* everything is */
    source_lost_cb on_lost;
    void *lost_arg;
    source_close_cb on_close;
    void *close_arg;
};

static struct vhost_source *to_vhost(struct source *s)
{
    return container_of(s, struct vhost_source, source);
}

static unsigned char *slot_memory(const struct vhost_source *s, unsigned i)
{
    return s->memory->base + s->memory->ring_bytes + (size_t)i * VHOST_SLOT;
}

/* -- asking -------------------------------------------------------------------------------------------------------- */

/* Takes the next slot for the next bytes of r, which waits. Returns it. */
static unsigned fill_slot(struct vhost_source *s, struct source_read *r)
{
    unsigned i = s->free_slot;
    struct slot *slot = &s->slots[i];
    uint64_t from = r->offset + r->issued, end;
    size_t take = MIN(r->length - r->issued, VHOST_SLOT - (size_t)(from % VHOST_SLOT));

    s->free_slot = slot->next;
    slot->next = VHOST_SLOTS;
    slot->read = r;
    slot->offset = from - from % RING_SECTOR;
    end = (from + take + RING_SECTOR - 1) / RING_SECTOR * RING_SECTOR;
    slot->length = (size_t)(end - slot->offset);
    slot->skip = (size_t)(from - slot->offset);
    slot->take = take;
    slot->to = r->borrow ? NULL : (char *)r->buffer + r->issued;
    slot->err = 0;
    slot->npending = 1;
    r->npending++;
    r->issued += take;
    read_list_remove(&s->waiting, r);
    read_list_append(r->issued < r->length ? &s->waiting : &s->asked, r); /* a turn each */
    return i;
}

static struct ring_segment segment_of(const struct vhost_source *s, unsigned i)
{
    uint64_t at = (uint64_t)(slot_memory(s, i) - s->memory->base);

    return (struct ring_segment){.to = VHOST_ADDRESS + at, .length = (uint32_t)s->slots[i].length};
}

/* Of those that wait: whose next bytes are these. */
static struct source_read *waiting_at(const struct vhost_source *s, uint64_t offset)
{
    struct source_read *r = s->waiting.first;

    while (r && r->offset + r->issued != offset)
        r = r->next;
    return r;
}

/* One slot, in requests that do not cross clusters. */
static void ask_narrow(struct vhost_source *s, struct source_read *r)
{
    unsigned i = fill_slot(s, r), part = i * VHOST_PARTS;
    struct slot *slot = &s->slots[i];
    struct ring_segment to = segment_of(s, i);
    uint64_t at = slot->offset, end = at + slot->length;

    for (slot->npending = 0; at < end; slot->npending++) {
        to.length = (uint32_t)MIN(end - at, s->cluster - at % s->cluster);
        ring_read(&s->ring, part++, at / RING_SECTOR, &to, 1);
        to.to += to.length;
        at += to.length;
    }
}

/* One request, for as many slots as there are neighbours. */
static void ask_wide(struct vhost_source *s, struct source_read *r)
{
    unsigned first = fill_slot(s, r), last = first, n = 0;
    struct ring_segment to[VHOST_MERGED];
    uint64_t end;

    to[n++] = segment_of(s, first);
    end = s->slots[first].offset + s->slots[first].length;
    while (n < VHOST_MERGED && s->free_slot < VHOST_SLOTS && (r = waiting_at(s, end)) && end % VHOST_SLOT == 0) {
        s->slots[last].next = s->free_slot;
        last = fill_slot(s, r);
        to[n++] = segment_of(s, last);
        end = s->slots[last].offset + s->slots[last].length;
    }
    ring_read(&s->ring, first * VHOST_PARTS, s->slots[first].offset / RING_SECTOR, to, n);
}

static void kick(struct vhost_source *s)
{
    const uint64_t one = 1;

    /* A full counter is a kick that the device has not looked at yet. */
    if (ring_publish(&s->ring))
        (void)!write(s->kick_fd, &one, sizeof(one));
}

static void on_deadline(uv_timer_t *t);

static void ask(struct vhost_source *s)
{
    struct source_read *r;

    while (s->free_slot < VHOST_SLOTS && (r = s->waiting.first)) {
        if (s->cluster)
            ask_narrow(s, r);
        else
            ask_wide(s, r);
    }
    kick(s);
    if (s->ring.nbusy && !uv_is_active((uv_handle_t *)&s->deadline)) {
        s->nanswers_seen = s->nanswers;
        (void)uv_timer_start(&s->deadline, on_deadline, s->timeout_ms, 0);
    }
}

static void on_ask(uv_prepare_t *p)
{
    (void)uv_prepare_stop(p);
    ask(container_of(p, struct vhost_source, ask));
}

/* Before the loop waits: what else comes until then may be a neighbour, and costs no kick of its own. */
static void ask_soon(struct vhost_source *s)
{
    if (s->waiting.first && s->free_slot < VHOST_SLOTS)
        (void)uv_prepare_start(&s->ask, on_ask); /* nothing where it is started */
}

static int vhost_read(struct source *source, struct source_read *r)
{
    struct vhost_source *s = to_vhost(source);

    if (s->state != VHOST_OPEN)
        return -ENOTCONN;
    if (r->borrow && r->offset % VHOST_SLOT + r->length > VHOST_SLOT)
        return -ENOBUFS;
    r->issued = 0;
    r->npending = 0;
    r->err = 0;
    read_list_append(&s->waiting, r);
    ask_soon(s);
    return 0;
}

/* -- loans --------------------------------------------------------------------------------------------------------- */

static void memory_free(struct vhost_memory *m)
{
    if (m->base)
        (void)munmap(m->base, m->bytes);
    if (m->fd >= 0)
        (void)close(m->fd);
    if (m->room)
        m->room->used -= m->bytes;
    free(m);
}

static void free_slot(struct vhost_source *s, unsigned i)
{
    s->slots[i].next = s->free_slot;
    s->free_slot = i;
}

static void loan_end(struct source_loan *l)
{
    struct vhost_loan *loan = container_of(l, struct vhost_loan, loan);
    struct vhost_memory *m = loan->memory;

    m->nlent--;
    if (m->source) {
        free_slot(m->source, loan->slot);
        if (m->source->state == VHOST_OPEN)
            ask_soon(m->source);
    } else if (m->nlent == 0) {
        memory_free(m);
    }
}

static void lend(struct vhost_source *s, unsigned i, struct source_read *r)
{
    struct vhost_memory *m = s->memory;

    m->nlent++;
    m->loans[i] = (struct vhost_loan){.loan = {.end = loan_end}, .memory = m, .slot = i};
    m->loans[i].loan.scarce = m->nlent > m->nslots - m->nslots / 4; /* a quarter is always at work */
    r->buffer = slot_memory(s, i) + s->slots[i].skip;
    r->loan = &m->loans[i].loan;
}

/* -- answers ------------------------------------------------------------------------------------------------------- */

/* The slot's requests have all ended, or never will: it is free again. Returns its read. */
static struct source_read *settle(struct vhost_source *s, struct slot *slot)
{
    struct source_read *r = TAKE_PTR(slot->read);
    unsigned i = (unsigned)(slot - s->slots);

    if (slot->err == 0 && !r->borrow)
        memcpy(slot->to, slot_memory(s, i) + slot->skip, slot->take);
    slot->npending = 0;
    if (slot->err == 0 && r->borrow)
        lend(s, i, r);
    else
        free_slot(s, i);
    r->npending--;
    if (slot->err < 0 && r->err == 0) {
        r->err = slot->err;
        if (r->issued < r->length) { /* no use in the rest of it */
            r->issued = r->length;
            read_list_remove(&s->waiting, r);
            read_list_append(&s->asked, r);
        }
    }
    return r;
}

/* Answers all reads with err, until a callback closes the source: then that goes on. */
static void answer_all(struct vhost_source *s, int err)
{
    enum vhost_source_state state = s->state;
    struct source_read *r;

    for (unsigned i = 0; i < VHOST_SLOTS; i++) {
        if (s->slots[i].read) {
            s->slots[i].err = err;
            (void)settle(s, &s->slots[i]);
        }
    }
    while (s->state == state) {
        r = read_list_pop(&s->asked);
        if (!r && (r = read_list_pop(&s->waiting)))
            r->err = err;
        if (!r)
            return;
        r->cb(r, r->err);
    }
}

static void close_handles(struct vhost_source *s);

static void fail(struct vhost_source *s, const struct failure *why)
{
    (void)uv_poll_stop(&s->socket);
    (void)uv_poll_stop(&s->called);
    (void)uv_timer_stop(&s->deadline);
    (void)uv_prepare_stop(&s->ask);
    if (s->state == VHOST_OPENING) {
        (void)failure_copy(&s->open.why, why);
        close_handles(s);
        return;
    }
    s->state = VHOST_LOST;
    answer_all(s, -EIO);
    if (s->state == VHOST_LOST && s->on_lost)
        s->on_lost(s->lost_arg, why);
}

/* While reads are in flight: an export that ends none of them for so long is gone. */
static void on_deadline(uv_timer_t *t)
{
    struct vhost_source *s = container_of(t, struct vhost_source, deadline);
    struct failure f = {0};

    if (s->state == VHOST_OPEN && s->ring.nbusy == 0)
        return;
    if (s->state == VHOST_OPEN && s->nanswers != s->nanswers_seen) {
        s->nanswers_seen = s->nanswers;
        (void)uv_timer_start(&s->deadline, on_deadline, s->timeout_ms, 0);
        return;
    }
    (void)failure_set(&f, -ETIMEDOUT, "the vhost-user export does not answer within %u ms", s->timeout_ms);
    fail(s, &f);
}

/* The slots of a request that has ended. A callback may close the source, or lose it. */
static void request_ended(struct vhost_source *s, unsigned i, bool ok)
{
    struct source_read *r;
    unsigned next;

    for (; s->state == VHOST_OPEN && i < VHOST_SLOTS; i = next) {
        struct slot *slot = &s->slots[i];

        next = slot->next;
        if (!ok)
            slot->err = -EIO;
        if (--slot->npending)
            return; /* others of a narrow slot, which is one of its own */
        r = settle(s, slot);
        if (r->npending == 0 && r->issued == r->length) {
            read_list_remove(&s->asked, r);
            r->cb(r, r->err);
        }
    }
}

static void on_called(uv_poll_t *p, int status, int events)
{
    struct vhost_source *s = container_of(p, struct vhost_source, called);
    struct failure f = {0};
    uint64_t count;
    bool ok;
    int n;

    (void)!read(s->call_fd, &count, sizeof(count));
    while (s->state == VHOST_OPEN && (n = ring_next(&s->ring, &ok)) >= 0) {
        s->nanswers++;
        request_ended(s, (unsigned)n / VHOST_PARTS, ok);
    }
    if (s->state != VHOST_OPEN)
        return;
    if (n == -EPROTO) {
        (void)failure_set(&f, -EPROTO, "the vhost-user export ends requests that it was not given");
        fail(s, &f);
        return;
    }
    ask_soon(s);
}

/* -- opening ------------------------------------------------------------------------------------------------------- */

static size_t bytes_of(unsigned nslots)
{
    return ring_bytes(nslots * VHOST_PARTS) + (size_t)nslots * VHOST_SLOT;
}

/* Half of the room goes to sources with all slots, a quarter to some with half of them, the rest to the smallest. */
static unsigned slots_for(const struct vhost_room *room)
{
    size_t left, for_smaller;

    if (!room)
        return VHOST_SLOTS;
    left = room->limit > room->used ? room->limit - room->used : 0;
    for (unsigned n = VHOST_SLOTS; n >= VHOST_SLOTS_LEAST; n /= 2) {
        for_smaller = n > VHOST_SLOTS_LEAST ? room->limit / VHOST_SLOTS / 2 * n : 0;
        if (bytes_of(n) <= left && left > for_smaller)
            return n;
    }
    return 0;
}

/* Sealed: a device that shrinks it would have us killed by SIGBUS. */
static int make_memory(struct vhost_source *s, struct vhost_room *room)
{
    unsigned nslots = slots_for(room);
    size_t ring = ring_bytes(nslots * VHOST_PARTS), bytes = bytes_of(nslots);
    struct vhost_memory *m;
    void *base;

    if (nslots == 0)
        return -ENOSPC;
    m = calloc(1, sizeof(*m));
    if (!m)
        return -ENOMEM;
    if (room)
        room->used += bytes;
    *m = (struct vhost_memory){.room = room, .source = s, .bytes = bytes, .ring_bytes = ring, .nslots = nslots};
    s->memory = m;
    m->fd = memfd_create("qpull-vhost", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (m->fd < 0 || ftruncate(m->fd, (off_t)bytes) < 0 ||
        fcntl(m->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return -errno;
    base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
    if (base == MAP_FAILED)
        return -errno;
    m->base = base;
    for (unsigned i = 0; i < nslots; i++)
        s->slots[i].next = i + 1 < nslots ? i + 1 : VHOST_SLOTS;
    s->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return s->call_fd < 0 || s->kick_fd < 0 ? -errno : 0;
}

static void drop_fd(int *fd)
{
    if (*fd >= 0)
        (void)close(*fd);
    *fd = -1;
}

static void source_free(struct vhost_source *s)
{
    ring_done(&s->ring);
    if (s->memory)
        s->memory->source = NULL;
    if (s->memory && s->memory->nlent == 0)
        memory_free(s->memory);
    drop_fd(&s->call_fd);
    drop_fd(&s->kick_fd);
    drop_fd(&s->fd);
    free(s);
}

static int set_up(struct vhost_source *s, struct failure *f)
{
    struct vhost_setup setup;
    int r = ring_init(&s->ring, s->memory->nslots * VHOST_PARTS, s->memory->base, VHOST_ADDRESS, s->talk.event_index);

    if (r < 0)
        return failure_set(f, r, "no memory for a virtqueue");
    setup = (struct vhost_setup){
        .memory_fd = s->memory->fd,
        .kick_fd = s->kick_fd,
        .call_fd = s->call_fd,
        .memory = s->memory->base,
        .memory_bytes = s->memory->bytes,
        .ring = &s->ring,
    };
    r = vhost_talk_set_up(&s->talk, s->fd, &setup);
    return r < 0 ? failure_set(f, r, "cannot set up the vhost-user export: %s", strerror(-r)) : 0;
}

static void ready(struct vhost_source *s)
{
    source_vhost_open_cb opened = TAKE_PTR(s->open.cb);

    (void)uv_timer_stop(&s->deadline);
    s->state = VHOST_OPEN;
    s->source.size = s->talk.capacity;
    opened(s->open.arg, &s->source, NULL);
}

/* Replies while it is set up; afterwards the device has nothing to say, and its end is the end. */
static void on_socket(uv_poll_t *p, int status, int events)
{
    struct vhost_source *s = container_of(p, struct vhost_source, socket);
    struct failure f = {0};
    unsigned char bytes[VHOST_REPLY_MAX];
    ssize_t n = recv(s->fd, bytes, sizeof(bytes), MSG_DONTWAIT);
    size_t at = 0, used;
    int r = 0;

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0)
        r = failure_set(&f, -ECONNRESET, "the vhost-user export closed the connection");
    while (r >= 0 && at < (size_t)n) {
        r = vhost_talk_feed(&s->talk, bytes + at, (size_t)n - at, &used, &f);
        at += used;
        if (r == 1 && s->talk.state == VHOST_SETTING)
            r = set_up(s, &f);
    }
    if (r < 0)
        fail(s, &f);
    else if (s->talk.state == VHOST_READY && s->state == VHOST_OPENING)
        ready(s);
}

static void on_handle_closed(struct vhost_source *s)
{
    source_vhost_open_cb opened;
    source_close_cb closed;
    struct failure why;
    void *arg;

    if (--s->nhandles)
        return;
    opened = TAKE_PTR(s->open.cb);
    closed = s->on_close;
    why = s->open.why;
    arg = opened ? s->open.arg : s->close_arg;
    answer_all(s, -ECANCELED);
    source_free(s);
    if (opened)
        opened(arg, NULL, &why);
    else if (closed)
        closed(arg);
}

static void on_socket_closed(uv_handle_t *h)
{
    on_handle_closed(container_of((uv_poll_t *)h, struct vhost_source, socket));
}

static void on_called_closed(uv_handle_t *h)
{
    on_handle_closed(container_of((uv_poll_t *)h, struct vhost_source, called));
}

static void on_deadline_closed(uv_handle_t *h)
{
    on_handle_closed(container_of((uv_timer_t *)h, struct vhost_source, deadline));
}

static void on_ask_closed(uv_handle_t *h)
{
    on_handle_closed(container_of((uv_prepare_t *)h, struct vhost_source, ask));
}

static void close_handles(struct vhost_source *s)
{
    s->state = VHOST_CLOSING;
    uv_close((uv_handle_t *)&s->socket, on_socket_closed);
    uv_close((uv_handle_t *)&s->called, on_called_closed);
    uv_close((uv_handle_t *)&s->deadline, on_deadline_closed);
    uv_close((uv_handle_t *)&s->ask, on_ask_closed);
    drop_fd(&s->fd); /* at once: QEMU's graph may be changed from here on */
}

static void vhost_close(struct source *source, source_close_cb cb, void *arg)
{
    struct vhost_source *s = to_vhost(source);

    s->on_close = cb;
    s->close_arg = arg;
    close_handles(s);
}

static const struct source_ops vhost_ops = {.read = vhost_read, .close = vhost_close};

static int init_handles(struct vhost_source *s, uv_loop_t *loop)
{
    int r = uv_poll_init(loop, &s->socket, s->fd);

    if (r < 0)
        return r;
    r = uv_poll_init(loop, &s->called, s->call_fd); /* an eventfd can always be polled */
    (void)uv_timer_init(loop, &s->deadline);        /* these never fail */
    (void)uv_prepare_init(loop, &s->ask);
    s->nhandles = 4;
    return r;
}

int source_vhost_open(uv_loop_t *loop, const struct source_vhost_config *config, source_lost_cb on_lost,
                      source_vhost_open_cb cb, void *arg, struct source_vhost_open **ret_open)
{
    struct vhost_source *s = calloc(1, sizeof(*s));
    int r;

    if (!s) {
        (void)close(config->fd);
        return -ENOMEM;
    }
    s->source.ops = &vhost_ops;
    s->source.lends = true;
    s->open = (struct source_vhost_open){.cb = cb, .arg = arg};
    s->fd = config->fd;
    s->call_fd = s->kick_fd = -1;
    s->cluster = config->cluster;
    s->timeout_ms = config->timeout_ms ? config->timeout_ms : VHOST_TIMEOUT_MS;
    s->on_lost = on_lost;
    s->lost_arg = arg;
    r = config->cluster & (config->cluster - 1) || (config->cluster && config->cluster < VHOST_SLOT / VHOST_PARTS)
            ? -EINVAL
            : make_memory(s, config->room);
    if (r == 0)
        r = init_handles(s, loop);
    if (r < 0) {
        source_free(s);
        return r;
    }
    (void)uv_timer_start(&s->deadline, on_deadline, s->timeout_ms, 0);
    (void)uv_poll_start(&s->socket, UV_READABLE | UV_DISCONNECT, on_socket);
    (void)uv_poll_start(&s->called, UV_READABLE, on_called);
    r = vhost_talk_begin(&s->talk, s->fd);
    if (r < 0) {
        (void)failure_set(&s->open.why, r, "cannot talk to the vhost-user export: %s", strerror(-r));
        close_handles(s);
    }
    if (ret_open)
        *ret_open = &s->open;
    return 0;
}

void source_vhost_open_cancel(struct source_vhost_open *o)
{
    struct vhost_source *s = container_of(o, struct vhost_source, open);

    if (s->state != VHOST_OPENING)
        return; /* it is failing already */
    (void)failure_set(&o->why, -ECANCELED, "opening the source was cancelled");
    close_handles(s);
}
