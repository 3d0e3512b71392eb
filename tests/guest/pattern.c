/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pattern.h"

#include <string.h>

#define ORDER_MAGIC 0x5152444f4c4c5551ULL /* "QULLODRQ", anything that is not a pattern by accident */
#define GOLDEN 0x9e3779b97f4a7c15ULL      /* 2^64 / golden ratio, the step of splitmix64 (Steele, Lea, Flood 2014) */

struct order_record {
    uint64_t magic, n, seed, disk, sum;
};

/* The finaliser of splitmix64: every bit of x moves about half of the answer's bits. */
static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

static uint64_t word_at(uint64_t key, uint64_t offset)
{
    return mix(key + (offset / 8 + 1) * GOLDEN);
}

void pattern_fill(void *buf, uint64_t seed, uint64_t offset, size_t len)
{
    uint64_t key = mix(seed + GOLDEN), word;
    uint8_t *p = buf;

    for (size_t i = 0; i < len; i += sizeof(word)) {
        word = word_at(key, offset + i);
        memcpy(p + i, &word, sizeof(word));
    }
}

bool pattern_matches(const void *buf, uint64_t seed, uint64_t offset, size_t len)
{
    uint64_t key = mix(seed + GOLDEN), word;
    const uint8_t *p = buf;

    for (size_t i = 0; i < len; i += sizeof(word)) {
        memcpy(&word, p + i, sizeof(word));
        if (word != word_at(key, offset + i))
            return false;
    }
    return true;
}

uint64_t pattern_sum(const void *buf, size_t len, uint64_t before)
{
    const uint8_t *p = buf;
    uint64_t sum = before, word;

    for (size_t i = 0; i < len; i += sizeof(word)) {
        memcpy(&word, p + i, sizeof(word));
        sum = mix(sum + GOLDEN + word);
    }
    return sum;
}

void load_op_at(const struct load_plan *plan, uint64_t n, struct load_op *ret_op)
{
    uint64_t key = mix(mix(plan->seed + GOLDEN) + (n + 1) * GOLDEN);
    uint64_t units = plan->size / plan->unit, longest = plan->max / plan->unit, len;
    uint32_t kind;

    /* Half of the operations are writes where they are allowed: a load that mostly discards touches little. */
    kind = (uint32_t)(mix(key + 1) % (2 * LOAD_NKINDS));
    if (kind >= LOAD_NKINDS)
        kind = LOAD_WRITE;
    while (!(plan->kinds & (1u << kind)))
        kind = (kind + 1) % LOAD_NKINDS;
    if (longest > units)
        longest = units;
    len = 1 + mix(key + 2) % longest;
    ret_op->kind = kind;
    ret_op->len = (uint32_t)(len * plan->unit);
    ret_op->offset = plan->from + mix(key + 3) % (units - len + 1) * plan->unit;
    ret_op->seed = mix(key + 4);
}

void model_write(uint8_t *image, uint8_t *known, uint64_t offset, uint64_t len, uint64_t seed)
{
    pattern_fill(image + offset, seed, offset, len);
    memset(known + offset / SECTOR, 1, len / SECTOR);
}

static void model_apply(uint8_t *image, uint8_t *known, const struct load_op *op)
{
    switch ((enum load_kind)op->kind) {
    case LOAD_WRITE:
        model_write(image, known, op->offset, op->len, op->seed);
        break;
    case LOAD_ZERO:
        memset(image + op->offset, 0, op->len);
        memset(known + op->offset / SECTOR, 1, op->len / SECTOR);
        break;
    case LOAD_DISCARD:
        memset(known + op->offset / SECTOR, 0, op->len / SECTOR);
        break;
    case LOAD_READ:
    case LOAD_FLUSH:
    case LOAD_NKINDS:
        break;
    }
}

void model_replay(uint8_t *image, uint8_t *known, const struct load_plan *plan, uint64_t from, uint64_t to)
{
    struct load_op op;

    for (uint64_t n = from; n < to; n++) {
        load_op_at(plan, n, &op);
        model_apply(image, known, &op);
    }
}

static uint64_t ndifferent(const uint8_t *image, const uint8_t *known, const uint8_t *other, uint64_t from, uint64_t to,
                           uint64_t *ret_first)
{
    uint64_t n = 0;

    for (uint64_t o = from; o < to; o += SECTOR) {
        if (!known[o / SECTOR] || memcmp(image + o, other + o, SECTOR) == 0)
            continue;
        if (n++ == 0 && ret_first)
            *ret_first = o;
    }
    return n;
}

uint64_t model_compare(const uint8_t *image, const uint8_t *known, const uint8_t *other, uint64_t size,
                       uint64_t *ret_first)
{
    return ndifferent(image, known, other, 0, size, ret_first);
}

int64_t model_find_cut(uint8_t *image, uint8_t *known, const uint8_t *other, uint64_t size,
                       const struct load_plan *plan, uint64_t from, uint64_t to, uint64_t *ret_least)
{
    uint64_t bad = ndifferent(image, known, other, 0, size, NULL), end;
    struct load_op op;

    *ret_least = bad;
    for (uint64_t n = from; bad > 0 && n < to; n++) {
        load_op_at(plan, n, &op);
        end = op.offset + op.len;
        bad -= ndifferent(image, known, other, op.offset, end, NULL);
        model_apply(image, known, &op);
        bad += ndifferent(image, known, other, op.offset, end, NULL);
        if (bad < *ret_least)
            *ret_least = bad;
        if (bad == 0)
            return (int64_t)(n + 1);
    }
    return bad == 0 ? (int64_t)from : -1;
}

void order_fill(void *buf, size_t block, uint64_t seed, uint64_t n, uint32_t disk)
{
    struct order_record r = {.magic = ORDER_MAGIC, .n = n, .seed = seed, .disk = disk};
    uint8_t *p = buf;

    pattern_fill(p + sizeof(r), seed ^ mix(n), (uint64_t)disk << 32, block - sizeof(r));
    r.sum = pattern_sum(p + sizeof(r), block - sizeof(r), mix(n) ^ disk);
    memcpy(p, &r, sizeof(r));
}

/* Which record a block holds; 0: none, only zeroes; -1: damaged. */
static int64_t order_read(const uint8_t *p, size_t block, uint64_t seed, uint32_t disk)
{
    struct order_record r;

    if (p[0] == 0 && memcmp(p, p + 1, block - 1) == 0)
        return 0;
    memcpy(&r, p, sizeof(r));
    if (r.magic != ORDER_MAGIC || r.seed != seed || r.disk != disk || r.n == 0 || r.n > INT64_MAX ||
        r.sum != pattern_sum(p + sizeof(r), block - sizeof(r), mix(r.n) ^ disk))
        return -1;
    return (int64_t)r.n;
}

int64_t order_scan(const uint8_t *area, size_t block, uint32_t ring, uint64_t seed, uint32_t disk)
{
    int64_t high = 0, n, expected;

    for (uint32_t i = 0; i < ring; i++) {
        n = order_read(area + (size_t)i * block, block, seed, disk);
        if (n < 0 || (n > 0 && n % ring != i))
            return -(int64_t)(1 + i);
        if (n > high)
            high = n;
    }
    for (uint32_t i = 0; i < ring; i++) {
        n = order_read(area + (size_t)i * block, block, seed, disk);
        expected = high - (high - i + (int64_t)ring) % ring; /* the last record up to high that belongs in block i */
        if (n != (expected > 0 ? expected : 0))
            return -(int64_t)(1 + i);
    }
    return high;
}
