/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * pattern: what the test guest writes, as pure functions, so that the guest (init.c) and the tests on the host (through
 * ctypes, see tests/qemu/harness.py) agree on every byte without talking about it.
 *
 * Not I/O and not state: a caller owns every buffer. Any thread. Offsets and lengths of patterns are multiples of 8,
 * those of load operations multiples of SECTOR.
 */
#ifndef QPULL_GUEST_PATTERN_H
#define QPULL_GUEST_PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SECTOR 512

/* Byte o of a disk written with seed s is the same whatever the size of the write that brought it. Never all zero. */
void pattern_fill(void *buf, uint64_t seed, uint64_t offset, size_t len);
bool pattern_matches(const void *buf, uint64_t seed, uint64_t offset, size_t len);
/* A sum over bytes; start with 0 and pass the answer on for the next piece. */
uint64_t pattern_sum(const void *buf, size_t len, uint64_t before);

/*
 * A load is an endless list of operations on one disk, each a pure function of its number: who knows how many were done
 * knows the disk.
 */
enum load_kind {
    LOAD_WRITE,
    LOAD_ZERO,
    LOAD_DISCARD, /* content unknown afterwards */
    LOAD_READ,    /* reads and compares with what it wrote itself */
    LOAD_FLUSH,
    LOAD_NKINDS,
};

struct load_plan {
    uint64_t seed;
    uint64_t from, size; /* the area of the disk, multiples of unit */
    uint32_t unit;       /* offsets and lengths are multiples of this, itself a multiple of SECTOR */
    uint32_t max;        /* longest operation */
    uint32_t kinds;      /* bits 1 << LOAD_… */
};

struct load_op {
    uint32_t kind;
    uint32_t len;
    uint64_t offset;
    uint64_t seed; /* of a write's pattern */
};

void load_op_at(const struct load_plan *plan, uint64_t n, struct load_op *ret_op);

/*
 * The host's model of a disk: image is its bytes, known one byte per sector (0: content unknown, not compared).
 */
void model_write(uint8_t *image, uint8_t *known, uint64_t offset, uint64_t len, uint64_t seed);
void model_replay(uint8_t *image, uint8_t *known, const struct load_plan *plan, uint64_t from, uint64_t to);
/* Number of known sectors that differ; ret_first: byte offset of the first one. */
uint64_t model_compare(const uint8_t *image, const uint8_t *known, const uint8_t *other, uint64_t size,
                       uint64_t *ret_first);
/*
 * The number of operations n in [from, to] after which the model equals other, or -1. The model stands at `from` when
 * called; afterwards it stands at n, or at `to` when there is none. ret_least: fewest sectors that differed.
 */
int64_t model_find_cut(uint8_t *image, uint8_t *known, const uint8_t *other, uint64_t size,
                       const struct load_plan *plan, uint64_t from, uint64_t to, uint64_t *ret_least);

/*
 * Numbered records over several disks: record n (from 1) goes to block n % ring of the first disk and is flushed, then
 * of the next, and so on, then comes n + 1. A cut at one instant therefore holds high numbers that never rise from one
 * disk to the next and differ by one at most.
 */
void order_fill(void *buf, size_t block, uint64_t seed, uint64_t n, uint32_t disk);
/*
 * The highest record in an area of `ring` blocks, 0 if there is none. Negative: -(1 + block index) of a block that is
 * torn, or stale, or should be there and is not.
 */
int64_t order_scan(const uint8_t *area, size_t block, uint32_t ring, uint64_t seed, uint32_t disk);

#endif
