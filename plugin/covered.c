/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "covered.h"

#include "qmp/base.h"

void covered_done(struct covered *c)
{
    free(TAKE_PTR(c->ranges));
    c->nranges = c->nallocated = 0;
}

/* Index of the first range that ends at offset or behind it. */
static size_t first_at(const struct covered *c, uint64_t offset)
{
    size_t low = 0, high = c->nranges;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (c->ranges[middle].to < offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool make_room(struct covered *c)
{
    size_t n = c->nallocated ? 2 * c->nallocated : 16;
    struct covered_range *ranges;

    if (c->nranges < c->nallocated)
        return true;
    if (c->nranges >= COVERED_MAX)
        return false;
    ranges = realloc(c->ranges, n * sizeof(*ranges));
    if (!ranges)
        return false;
    c->ranges = ranges;
    c->nallocated = n;
    return true;
}

void covered_add(struct covered *c, uint64_t offset, uint64_t length)
{
    struct covered_range new = {.from = offset, .to = offset + length};
    size_t first = first_at(c, offset), last = first;

    if (length == 0 || c->lost)
        return;
    while (last < c->nranges && c->ranges[last].from <= new.to) {
        new.from = MIN(new.from, c->ranges[last].from);
        new.to = MAX(new.to, c->ranges[last].to);
        last++;
    }
    if (first == last && !make_room(c)) {
        c->lost = true;
        covered_done(c);
        return;
    }
    memmove(c->ranges + first + 1, c->ranges + last, (c->nranges - last) * sizeof(*c->ranges));
    c->ranges[first] = new;
    c->nranges = c->nranges + 1 - (last - first);
}

bool covered_whole(const struct covered *c, uint64_t size)
{
    return size == 0 || (c->nranges == 1 && c->ranges[0].from == 0 && c->ranges[0].to >= size);
}
