/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "source/map.h"

#include "nbd/nbd.h"
#include "qmp/base.h"

#include <errno.h>

/* Lengths and offsets stay below this, as off_t's do. */
#define MAP_LENGTH_MAX ((uint64_t)INT64_MAX)

/* First allocation, in runs; later ones grow by an eighth, because a map is written once and kept for a whole session.
 */
#define MAP_CAPACITY_MIN 64u
#define MAP_GROWTH_SHIFT 3u

/*
 * Run i covers [starts[i], starts[i + 1]), the last one ends at length. Two arrays instead of one of structs: 12 bytes
 * a run instead of 16, and the binary search touches nothing but starts. Neighbours differ in flags.
 */
struct map {
    uint64_t *starts; /* owned */
    uint32_t *flags;  /* owned */
    size_t nruns, capacity;
    uint64_t length;
};

int map_new(struct map **ret_map)
{
    struct map *m = calloc(1, sizeof(*m));

    if (!m)
        return -ENOMEM;
    *ret_map = m;
    return 0;
}

void map_free(struct map *m)
{
    if (!m)
        return;
    free(m->starts);
    free(m->flags);
    free(m);
}

static void map_freep(struct map **m)
{
    map_free(*m);
}

static int map_grow(struct map *m)
{
    size_t capacity = MAX(m->capacity + (m->capacity >> MAP_GROWTH_SHIFT), m->capacity + MAP_CAPACITY_MIN);
    uint64_t *starts;
    uint32_t *flags;

    if (capacity > SIZE_MAX / sizeof(*starts))
        return -ENOMEM;
    starts = realloc(m->starts, capacity * sizeof(*starts));
    if (!starts)
        return -ENOMEM;
    m->starts = starts;
    flags = realloc(m->flags, capacity * sizeof(*flags));
    if (!flags)
        return -ENOMEM; /* starts is longer than capacity says, which hurts nobody */
    m->flags = flags;
    m->capacity = capacity;
    return 0;
}

int map_append(struct map *m, uint64_t length, uint64_t flags)
{
    if (length == 0 || length > MAP_LENGTH_MAX - m->length)
        return -EINVAL;
    if (flags > UINT32_MAX)
        return -E2BIG;
    if (m->nruns == 0 || m->flags[m->nruns - 1] != flags) {
        int r = m->nruns == m->capacity ? map_grow(m) : 0;

        if (r < 0)
            return r;
        m->starts[m->nruns] = m->length;
        m->flags[m->nruns] = (uint32_t)flags;
        m->nruns++;
    }
    m->length += length;
    return 0;
}

int map_new_uniform(uint64_t length, uint64_t flags, struct map **ret_map)
{
    _cleanup_(map_freep) struct map *m = NULL;
    int r = map_new(&m);

    if (r < 0)
        return r;
    if (length > 0) {
        r = map_append(m, length, flags);
        if (r < 0)
            return r;
    }
    *ret_map = TAKE_PTR(m);
    return 0;
}

uint64_t map_length(const struct map *m)
{
    return m->length;
}

size_t map_nruns(const struct map *m)
{
    return m->nruns;
}

size_t map_memory(const struct map *m)
{
    return sizeof(*m) + m->capacity * (sizeof(*m->starts) + sizeof(*m->flags));
}

static uint64_t map_run_end(const struct map *m, size_t i)
{
    return i + 1 < m->nruns ? m->starts[i + 1] : m->length;
}

uint64_t map_count(const struct map *m, uint64_t mask)
{
    uint64_t count = 0;

    for (size_t i = 0; i < m->nruns; i++) {
        if (m->flags[i] & mask)
            count += map_run_end(m, i) - m->starts[i];
    }
    return count;
}

/* The run that holds offset, which is inside the map. */
static size_t map_find(const struct map *m, uint64_t offset)
{
    size_t low = 0, high = m->nruns; /* starts[low] <= offset < starts[high] */

    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;

        if (m->starts[middle] <= offset)
            low = middle;
        else
            high = middle;
    }
    return low;
}

size_t map_extents(const struct map *m, uint64_t offset, uint64_t length, struct map_extent *extents, size_t max)
{
    uint64_t end;
    size_t n = 0;

    if (offset >= m->length)
        return 0;
    end = offset + MIN(length, m->length - offset);
    for (size_t i = map_find(m, offset); offset < end && n < max; i++, n++) {
        uint64_t stop = i + 1 < m->nruns ? MIN(m->starts[i + 1], end) : end;

        extents[n] = (struct map_extent){.length = stop - offset, .flags = m->flags[i]};
        offset = stop;
    }
    return n;
}

bool map_status(const struct map *m, uint64_t offset, uint64_t length, size_t max, struct nbd_status *status)
{
    uint64_t last;
    size_t i, n;

    if (length == 0 || offset >= m->length)
        return false;
    last = offset + MIN(length, m->length - offset) - 1;
    i = map_find(m, offset);
    n = MIN(map_find(m, last) - i + 1, max);
    *status = (struct nbd_status){m->starts + i, m->flags + i, n, map_run_end(m, i + n - 1)};
    return true;
}

int map_overlay(const struct map *m, const struct map *mask, uint64_t value, struct map **ret_map)
{
    _cleanup_(map_freep) struct map *merged = NULL;
    size_t i = 0, j = 0; /* the runs of m and mask that hold merged->length */
    int r;

    if (m->length != mask->length)
        return -EINVAL;
    r = map_new(&merged);
    while (r == 0 && merged->length < m->length) {
        uint64_t m_end = map_run_end(m, i), mask_end = map_run_end(mask, j);

        r = map_append(merged, MIN(m_end, mask_end) - merged->length, mask->flags[j] ? value : m->flags[i]);
        i += m_end <= mask_end;
        j += mask_end <= m_end;
    }
    if (r < 0)
        return r;
    *ret_map = TAKE_PTR(merged);
    return 0;
}

int map_pick(const struct map *m, uint64_t numbers, struct map **ret_map)
{
    _cleanup_(map_freep) struct map *picked = NULL;
    int r = map_new(&picked);

    for (size_t i = 0; r == 0 && picked->length < m->length; i++) {
        uint64_t number = m->flags[i];

        r = map_append(picked, map_run_end(m, i) - picked->length,
                       number >= 1 && number <= 64 && (numbers >> (number - 1)) & 1);
    }
    if (r < 0)
        return r;
    *ret_map = TAKE_PTR(picked);
    return 0;
}
