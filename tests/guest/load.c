/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "load.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* Of how long operations took: 16 steps for each power of two microseconds, so a figure is at most 6 % too high. */
#define LATENCY_STEPS 16u
#define LATENCY_SHIFT 4u
#define LATENCY_BUCKETS (40u * LATENCY_STEPS)

#define CONTENT_UNKNOWN 0
#define CONTENT_ZERO UINT32_MAX

struct load {
    char disk[NAME_LEN];
    int fd;
    pthread_t thread;
    struct load_plan plan;
    uint64_t limit;
    uint32_t pause_us;
    uint32_t *content; /* owned; per sector of the area: 1 + number of the write that filled it, or CONTENT_… */
    void *buf;         /* owned */
    atomic_bool stop, ended;
    atomic_ullong ndone, nerrors, nbad, slowest_us;
    atomic_uint latency[LATENCY_BUCKETS];
};

struct order {
    char disks[MAX_DISKS][NAME_LEN];
    int fds[MAX_DISKS];
    unsigned ndisks;
    pthread_t thread;
    uint64_t seed, at;
    uint32_t block, ring;
    void *buf; /* owned */
    atomic_bool stop;
    atomic_ullong ndone, nerrors, slowest_us;
};

static struct load *loads[MAX_DISKS];
static struct order *the_order;

uint64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void note_slowest(atomic_ullong *slowest, uint64_t took_us)
{
    if (took_us > atomic_load(slowest))
        atomic_store(slowest, took_us);
}

static unsigned latency_bucket(uint64_t us)
{
    unsigned power, bucket;

    if (us < LATENCY_STEPS)
        return (unsigned)us;
    power = 63 - (unsigned)__builtin_clzll(us);
    bucket = (power - LATENCY_SHIFT + 1) * LATENCY_STEPS + (unsigned)(us >> (power - LATENCY_SHIFT)) % LATENCY_STEPS;
    return bucket < LATENCY_BUCKETS ? bucket : LATENCY_BUCKETS - 1;
}

/* The longest time that belongs to a bucket. */
static uint64_t latency_of(unsigned bucket)
{
    unsigned shift;

    if (bucket < LATENCY_STEPS)
        return bucket;
    shift = bucket / LATENCY_STEPS - 1;
    return (((uint64_t)LATENCY_STEPS + bucket % LATENCY_STEPS + 1) << shift) - 1;
}

/* So many operations of 1,000 took no longer. */
static uint64_t latency_permille(struct load *l, unsigned permille)
{
    uint64_t all = 0, seen = 0, slowest = atomic_load(&l->slowest_us);

    for (unsigned i = 0; i < LATENCY_BUCKETS; i++)
        all += atomic_load(&l->latency[i]);
    for (unsigned i = 0; i < LATENCY_BUCKETS; i++) {
        seen += atomic_load(&l->latency[i]);
        if (seen * 1000 >= all * permille && seen > 0)
            return latency_of(i) < slowest ? latency_of(i) : slowest;
    }
    return 0;
}

int disk_zero(int fd, uint64_t offset, uint64_t len)
{
    uint64_t range[2] = {offset, len};

    return ioctl(fd, BLKZEROOUT, range) < 0 ? -errno : 0;
}

int disk_discard(int fd, uint64_t offset, uint64_t len)
{
    uint64_t range[2] = {offset, len};

    return ioctl(fd, BLKDISCARD, range) < 0 ? -errno : 0;
}

static int full_io(ssize_t n, size_t len)
{
    if (n < 0)
        return -errno;
    return (size_t)n == len ? 0 : -EIO;
}

/* Compares what is on the disk with what this load last wrote there; sectors of unknown content are passed over. */
static int load_verify(struct load *l, const struct load_op *op)
{
    const struct load_plan *plan = &l->plan;
    uint8_t *buf = l->buf;
    struct load_op write;
    int error;

    error = full_io(pread(l->fd, buf, op->len, (off_t)op->offset), op->len);
    if (error)
        return error;
    for (uint64_t i = 0; i < op->len; i += SECTOR) {
        uint32_t content = l->content[(op->offset - plan->from + i) / SECTOR];
        bool good = true;

        if (content == CONTENT_ZERO) {
            good = buf[i] == 0 && memcmp(buf + i, buf + i + 1, SECTOR - 1) == 0;
        } else if (content != CONTENT_UNKNOWN) {
            load_op_at(plan, content - 1, &write);
            good = pattern_matches(buf + i, write.seed, op->offset + i, SECTOR);
        }
        if (!good && atomic_fetch_add(&l->nbad, 1) == 0)
            fprintf(stderr, "qpull-guest: wrong data on %s at %llu\n", l->disk, (unsigned long long)(op->offset + i));
    }
    return 0;
}

static void load_remember(struct load *l, const struct load_op *op, uint32_t content)
{
    uint64_t first = (op->offset - l->plan.from) / SECTOR;

    for (uint64_t i = 0; i < op->len / SECTOR; i++)
        l->content[first + i] = content;
}

static int load_do(struct load *l, uint64_t n, const struct load_op *op, const char **ret_what)
{
    int error;

    switch ((enum load_kind)op->kind) {
    case LOAD_WRITE:
        *ret_what = "write";
        pattern_fill(l->buf, op->seed, op->offset, op->len);
        error = full_io(pwrite(l->fd, l->buf, op->len, (off_t)op->offset), op->len);
        load_remember(l, op, error ? CONTENT_UNKNOWN : (uint32_t)n + 1);
        return error;
    case LOAD_ZERO:
        *ret_what = "zero";
        error = disk_zero(l->fd, op->offset, op->len);
        load_remember(l, op, error ? CONTENT_UNKNOWN : CONTENT_ZERO);
        return error;
    case LOAD_DISCARD:
        *ret_what = "discard";
        load_remember(l, op, CONTENT_UNKNOWN);
        return disk_discard(l->fd, op->offset, op->len);
    case LOAD_READ:
        *ret_what = "read";
        return load_verify(l, op);
    case LOAD_FLUSH:
    case LOAD_NKINDS:
        break;
    }
    *ret_what = "flush";
    return fdatasync(l->fd) < 0 ? -errno : 0;
}

static void *load_thread(void *arg)
{
    struct load *l = arg;
    struct load_op op;
    const char *what;

    for (uint64_t n = 0; !atomic_load(&l->stop) && (l->limit == 0 || n < l->limit); n++) {
        uint64_t start = now_us(), took;
        int error;

        load_op_at(&l->plan, n, &op);
        error = load_do(l, n, &op, &what);
        took = now_us() - start;
        note_slowest(&l->slowest_us, took);
        atomic_fetch_add(&l->latency[latency_bucket(took)], 1);
        if (error) {
            atomic_fetch_add(&l->nerrors, 1);
            error_note(l->disk, what, op.offset, error);
        }
        atomic_fetch_add(&l->ndone, 1);
        if (l->pause_us > 0)
            usleep(l->pause_us);
    }
    atomic_store(&l->ended, true);
    return NULL;
}

static void load_free(struct load *l)
{
    if (!l)
        return;
    if (l->fd >= 0)
        close(l->fd);
    free(l->content);
    free(l->buf);
    free(l);
}

static struct load **load_find(const char *disk)
{
    for (unsigned i = 0; i < MAX_DISKS; i++) {
        if (loads[i] && strcmp(loads[i]->disk, disk) == 0)
            return &loads[i];
    }
    return NULL;
}

static void load_report(struct load *l, char *answer, size_t len)
{
    snprintf(answer, len, "ops=%llu errors=%llu bad=%llu slowest-us=%llu p50-us=%llu p99-us=%llu ended=%d",
             atomic_load(&l->ndone), atomic_load(&l->nerrors), atomic_load(&l->nbad), atomic_load(&l->slowest_us),
             (unsigned long long)latency_permille(l, 500), (unsigned long long)latency_permille(l, 990),
             atomic_load(&l->ended));
}

int load_start(const char *disk, struct load_plan *plan, uint64_t limit, uint32_t pause_us, char *answer, size_t len)
{
    unsigned slot = 0;
    struct load *l;
    uint64_t size;

    if (load_find(disk)) {
        snprintf(answer, len, "%s has a load already", disk);
        return -EBUSY;
    }
    while (slot < MAX_DISKS && loads[slot])
        slot++;
    l = calloc(1, sizeof(*l));
    if (!l || slot == MAX_DISKS) {
        snprintf(answer, len, "too many loads");
        free(l);
        return -ENOMEM;
    }
    snprintf(l->disk, sizeof(l->disk), "%s", disk);
    l->fd = disk_open(disk, &size);
    if (l->fd < 0) {
        int error = l->fd;

        snprintf(answer, len, "cannot open %s: %s", disk, strerror(-error));
        load_free(l);
        return error;
    }
    if (plan->size == 0 && plan->unit > 0 && plan->from < size)
        plan->size = (size - plan->from) / plan->unit * plan->unit;
    if (plan->kinds == 0 || plan->unit == 0 || plan->unit % SECTOR || plan->max < plan->unit ||
        plan->max > MAX_LOAD_LEN || plan->from % plan->unit || plan->size < plan->unit ||
        plan->from + plan->size > size) {
        snprintf(answer, len, "bad plan for a disk of %llu bytes", (unsigned long long)size);
        load_free(l);
        return -EINVAL;
    }
    l->plan = *plan;
    l->limit = limit;
    l->pause_us = pause_us;
    l->content = calloc(plan->size / SECTOR, sizeof(*l->content));
    if (!l->content || posix_memalign(&l->buf, IO_ALIGN, MAX_LOAD_LEN) != 0 ||
        pthread_create(&l->thread, NULL, load_thread, l) != 0) {
        snprintf(answer, len, "not enough memory for a load");
        load_free(l);
        return -ENOMEM;
    }
    loads[slot] = l;
    snprintf(answer, len, "from=%llu size=%llu", (unsigned long long)plan->from, (unsigned long long)plan->size);
    return 0;
}

int load_status(const char *disk, char *answer, size_t len)
{
    struct load **l = load_find(disk);

    if (!l) {
        snprintf(answer, len, "no load on %s", disk);
        return -ENOENT;
    }
    load_report(*l, answer, len);
    return 0;
}

int load_stop(const char *disk, bool wait, char *answer, size_t len)
{
    struct load **l = load_find(disk);

    if (!l) {
        snprintf(answer, len, "no load on %s", disk);
        return -ENOENT;
    }
    if (!wait)
        atomic_store(&(*l)->stop, true);
    pthread_join((*l)->thread, NULL);
    load_report(*l, answer, len);
    load_free(*l);
    *l = NULL;
    return 0;
}

static int order_write(struct order *o, uint64_t n, unsigned disk)
{
    int error;

    order_fill(o->buf, o->block, o->seed, n, disk);
    error = full_io(pwrite(o->fds[disk], o->buf, o->block, (off_t)(o->at + n % o->ring * o->block)), o->block);
    if (error)
        return error;
    return fdatasync(o->fds[disk]) < 0 ? -errno : 0;
}

static void *order_thread(void *arg)
{
    struct order *o = arg;

    for (uint64_t n = 1; !atomic_load(&o->stop); n++) {
        for (unsigned disk = 0; disk < o->ndisks; disk++) {
            uint64_t start = now_us();
            int error = order_write(o, n, disk);

            note_slowest(&o->slowest_us, now_us() - start);
            if (error) {
                atomic_fetch_add(&o->nerrors, 1);
                error_note(o->disks[disk], "record", n, error);
            }
        }
        atomic_store(&o->ndone, n);
    }
    return NULL;
}

static void order_free(struct order *o)
{
    if (!o)
        return;
    for (unsigned i = 0; i < o->ndisks; i++)
        close(o->fds[i]);
    free(o->buf);
    free(o);
}

int order_start(char *const *disks, unsigned ndisks, uint64_t seed, uint64_t at, uint32_t block, uint32_t ring,
                char *answer, size_t len)
{
    struct order *o;
    uint64_t size;

    if (the_order || ndisks == 0 || ndisks > MAX_DISKS || block < SECTOR || block % SECTOR || ring == 0 ||
        at % SECTOR) {
        snprintf(answer, len, "%s", the_order ? "records are being written already" : "bad arguments");
        return -EINVAL;
    }
    o = calloc(1, sizeof(*o));
    if (!o || posix_memalign(&o->buf, IO_ALIGN, block) != 0) {
        free(o);
        snprintf(answer, len, "not enough memory");
        return -ENOMEM;
    }
    o->seed = seed;
    o->at = at;
    o->block = block;
    o->ring = ring;
    for (unsigned i = 0; i < ndisks; i++) {
        snprintf(o->disks[i], sizeof(o->disks[i]), "%s", disks[i]);
        o->fds[i] = disk_open(disks[i], &size);
        if (o->fds[i] < 0 || at + (uint64_t)block * ring > size) {
            snprintf(answer, len, "cannot use %s: %s", disks[i], o->fds[i] < 0 ? strerror(-o->fds[i]) : "too small");
            o->ndisks = o->fds[i] < 0 ? i : i + 1;
            order_free(o);
            return -EINVAL;
        }
        o->ndisks = i + 1;
    }
    if (pthread_create(&o->thread, NULL, order_thread, o) != 0) {
        snprintf(answer, len, "no thread");
        order_free(o);
        return -ENOMEM;
    }
    the_order = o;
    answer[0] = '\0';
    return 0;
}

int order_status(char *answer, size_t len)
{
    if (!the_order) {
        snprintf(answer, len, "no records are being written");
        return -ENOENT;
    }
    snprintf(answer, len, "records=%llu errors=%llu slowest-us=%llu", atomic_load(&the_order->ndone),
             atomic_load(&the_order->nerrors), atomic_load(&the_order->slowest_us));
    return 0;
}

int order_stop(char *answer, size_t len)
{
    if (!the_order)
        return order_status(answer, len);
    atomic_store(&the_order->stop, true);
    pthread_join(the_order->thread, NULL);
    (void)order_status(answer, len);
    order_free(the_order);
    the_order = NULL;
    return 0;
}
