/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "frozen.h"

#include "nbd/nbd.h"
#include "qmp/base.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* base:allocation and qemu:dirty-bitmap, as the NBD protocol and QEMU number them; nbdkit's types are the former. */
#define TYPE_HOLE 1u
#define TYPE_ZERO 2u
#define DIRTY 1u

#define CHUNK 256u /* runs looked at in one go */

static const char *const view_names[] = {
    [VIEW_ALLOCATION] = "allocation", [VIEW_DIRTY] = "dirty", [VIEW_BOTH] = "both"};
static_assert(ARRAY_SIZE(view_names) == VIEW_COUNT, "every view has a name");

const char *view_name(enum view v)
{
    return view_names[v];
}

int view_parse(const char *name, enum view *ret_view)
{
    for (size_t i = 0; i < ARRAY_SIZE(view_names); i++) {
        if (strcmp(view_names[i], name) == 0) {
            *ret_view = (enum view)i;
            return 0;
        }
    }
    return -EINVAL;
}

/* -- the view ------------------------------------------------------------------------------------------------------ */

static uint32_t type_of(enum view view, uint64_t allocation, bool dirty)
{
    switch (view) {
    case VIEW_DIRTY:
        return !dirty ? TYPE_HOLE | TYPE_ZERO : allocation & TYPE_ZERO ? TYPE_ZERO : 0;
    case VIEW_BOTH:
        return dirty ? 0 : TYPE_HOLE | TYPE_ZERO;
    default:
        return (uint32_t)allocation & (TYPE_HOLE | TYPE_ZERO);
    }
}

/* Both maps cover the disk, but their runs end at different places. */
static int see(enum view view, uint64_t size, const struct map *allocation, const struct map *dirty, struct map *to)
{
    struct map_extent a[CHUNK], d[CHUNK];
    uint64_t at = 0;
    int r = 0;

    while (r == 0 && at < size) {
        size_t na = map_extents(allocation, at, size - at, a, CHUNK), nd, ia = 0, id = 0;

        d[0] = (struct map_extent){.length = size - at, .flags = DIRTY};
        nd = dirty ? map_extents(dirty, at, size - at, d, CHUNK) : 1;
        if (na == 0 || nd == 0)
            return -EINVAL;
        while (r == 0 && ia < na && id < nd) {
            uint64_t length = MIN(a[ia].length, d[id].length);

            r = map_append(to, length, type_of(view, a[ia].flags, d[id].flags & DIRTY));
            at += length;
            if ((a[ia].length -= length) == 0)
                ia++;
            if ((d[id].length -= length) == 0)
                id++;
        }
    }
    return r;
}

static int copy_map(uint64_t size, const struct map *from, struct map **ret_map)
{
    struct map_extent extents[CHUNK];
    uint64_t at = 0;
    int r = map_new(ret_map);

    while (r == 0 && at < size) {
        size_t n = map_extents(from, at, size - at, extents, CHUNK);

        if (n == 0)
            return -EINVAL;
        for (size_t i = 0; r == 0 && i < n; at += extents[i++].length)
            r = map_append(*ret_map, extents[i].length, extents[i].flags);
    }
    return r;
}

int frozen_new(const char *disk, const char *session, uint64_t size, enum view view, const struct map *allocation,
               const struct map *dirty, struct frozen **ret_frozen)
{
    struct frozen *f = calloc(1, sizeof(*f));
    int r;

    if (!f)
        return -ENOMEM;
    (void)pthread_mutex_init(&f->lock, NULL);
    f->size = size;
    (void)strncat(f->session, session, sizeof(f->session) - 1);
    f->disk = strdup(disk);
    r = f->disk ? map_new(&f->types) : -ENOMEM;
    if (r == 0)
        r = see(view, size, allocation, dirty, f->types);
    if (r == 0 && view != VIEW_ALLOCATION)
        r = copy_map(size, allocation, &f->allocation);
    if (r == 0 && dirty)
        r = copy_map(size, dirty, &f->dirty);
    if (r < 0) {
        frozen_free(f);
        return r;
    }
    *ret_frozen = f;
    return 0;
}

void frozen_free(struct frozen *f)
{
    map_free(f->types);
    map_free(f->allocation);
    map_free(f->dirty);
    covered_done(&f->covered);
    (void)pthread_mutex_destroy(&f->lock);
    free(f->disk);
    free(f);
}

/* -- what is handed out -------------------------------------------------------------------------------------------- */

size_t frozen_tell(struct frozen *f, uint64_t offset, uint64_t length, struct frozen_run *runs, size_t max)
{
    struct map_extent extents[CHUNK];
    size_t n = map_extents(f->types, offset, length, extents, MIN(max, (size_t)CHUNK));

    (void)pthread_mutex_lock(&f->lock);
    for (size_t i = 0; i < n; i++) {
        runs[i] = (struct frozen_run){.length = extents[i].length, .type = (uint32_t)extents[i].flags};
        if (runs[i].type & TYPE_ZERO)
            covered_add(&f->covered, offset, runs[i].length);
        offset += runs[i].length;
    }
    (void)pthread_mutex_unlock(&f->lock);
    return n;
}

bool frozen_is_zero(const struct frozen *f, uint64_t offset, uint64_t length)
{
    struct map_extent extent;

    return map_extents(f->allocation ? f->allocation : f->types, offset, length, &extent, 1) == 1 &&
           extent.flags & TYPE_ZERO && extent.length == length;
}

void frozen_was_read(struct frozen *f, uint64_t offset, uint64_t length)
{
    (void)pthread_mutex_lock(&f->lock);
    covered_add(&f->covered, offset, length);
    (void)pthread_mutex_unlock(&f->lock);
}

void frozen_read_failed(struct frozen *f)
{
    (void)pthread_mutex_lock(&f->lock);
    f->failed = true;
    (void)pthread_mutex_unlock(&f->lock);
}

bool frozen_is_whole(struct frozen *f)
{
    bool whole;

    (void)pthread_mutex_lock(&f->lock);
    whole = !f->failed && covered_whole(&f->covered, f->size);
    (void)pthread_mutex_unlock(&f->lock);
    return whole;
}

/* -- the dirty map as a file --------------------------------------------------------------------------------------- */

static int write_runs(FILE *out, const struct map *map, uint64_t size)
{
    struct map_extent extents[CHUNK];
    const char *before = "[\n";

    for (uint64_t at = 0; at < size;) {
        size_t n = map_extents(map, at, size - at, extents, CHUNK);

        if (n == 0)
            return -EINVAL;
        for (size_t i = 0; i < n; at += extents[i++].length) {
            bool dirty = extents[i].flags & DIRTY;

            (void)fprintf(
                out, "%s{ \"offset\": %" PRIu64 ", \"length\": %" PRIu64 ", \"type\": %d, \"description\": \"%s\"}",
                before, at, extents[i].length, dirty, dirty ? "dirty" : "clean");
            before = ",\n";
        }
    }
    return fputs(size > 0 ? "\n]\n" : "[]\n", out) < 0 ? -EIO : 0;
}

static int write_file(const struct map *map, uint64_t size, const char *path)
{
    _cleanup_free_ char *temporary = NULL;
    FILE *out = NULL;
    int fd, r;

    if (asprintf(&temporary, "%s.XXXXXX", path) < 0) {
        temporary = NULL;
        return -ENOMEM;
    }
    fd = mkostemp(temporary, O_CLOEXEC);
    if (fd < 0)
        return -errno;
    (void)fchmod(fd, 0644);
    out = fdopen(fd, "w");
    if (!out) {
        (void)close(fd);
        r = -ENOMEM;
    } else {
        r = write_runs(out, map, size);
        if (fflush(out) != 0 && r == 0)
            r = -errno;
        if (ferror(out) && r == 0)
            r = -EIO;
        if (fclose(out) != 0 && r == 0)
            r = -errno;
    }
    if (r == 0 && rename(temporary, path) < 0)
        r = -errno;
    if (r < 0)
        (void)unlink(temporary);
    return r;
}

int frozen_write_dirty_map(struct frozen *f, const char *path)
{
    int r = 0;

    (void)pthread_mutex_lock(&f->lock);
    if (!f->map_written) {
        r = write_file(f->dirty, f->size, path);
        f->map_written = r == 0;
    }
    (void)pthread_mutex_unlock(&f->lock);
    return r;
}
