/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What nbdkit calls. All the state there is stands at the top; nbdkit has one plugin a process, and so have we. */
#include "door.h"
#include "log.h"

#include <stdio.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#define BLOCK_MIN 1u          /* bytes: any */
#define BLOCK_PREFERRED 4096u /* likewise: a page */
#define BLOCK_MAX (32u << 20) /* likewise: no client asks for more, and QEMU refuses more */
#define RUNS_MAX 4096u        /* extents in one answer; nbdkit asks again for more */
#define RUNS_AT_ONCE 256u

static struct options options;
static struct loop loop;
static struct door *door;        /* owned; NULL: not started, or ended */
static bool runs;                /* the loop */
static struct failure not_begun; /* why there is no door */

static pthread_mutex_t handles_lock = PTHREAD_MUTEX_INITIALIZER;
static struct handle *handles; /* open ones */

static int refuse(const struct failure *f)
{
    nbdkit_error("%s", f->text);
    nbdkit_set_error(-f->err);
    return -1;
}

/* People see what went wrong without -v; the rest is for who asks. */
static void on_log(enum log_level level, const char *line)
{
    if (level <= LOG_LEVEL_WARNING)
        nbdkit_error("%s: %s", log_level_name(level), line);
    else
        nbdkit_debug("qpull: %s", line);
}

/* -- before the fork ----------------------------------------------------------------------------------------------- */

static void qpull_load(void)
{
    options_init(&options);
    log_init_sink(LOG_LEVEL_DEBUG, on_log);
}

static int qpull_config(const char *key, const char *value)
{
    struct failure f = {0};

    return options_set(&options, key, value, &f) < 0 ? refuse(&f) : 0;
}

static int qpull_config_complete(void)
{
    struct failure f = {0};

    return options_complete(&options, &f) < 0 ? refuse(&f) : 0;
}

static void qpull_dump_plugin(void)
{
    (void)printf("qpull_version=" QPULL_VERSION "\n");
    (void)printf("qpull_maps=");
    for (enum view v = 0; v < VIEW_COUNT; v++)
        (void)printf("%s%s", v ? " " : "", view_name(v));
    (void)printf("\nqpull_server=unix\n");
}

/* -- life ---------------------------------------------------------------------------------------------------------- */

/*
 * A failure here would leave the command of --run with a socket that nobody accepts at, for ever (nbdkit 1.32). So it
 * is told now, and to every client that comes.
 */
static int qpull_after_fork(void)
{
    int r = loop_start(&loop);

    if (r < 0)
        (void)failure_set(&not_begun, r, "cannot begin: %s", strerror(-r));
    runs = r == 0;
    if (runs && options.server)
        (void)through_new(&options, &loop, &door, &not_begun);
    else if (runs)
        (void)own_new(&options, &loop, &door, &not_begun);
    if (!door)
        nbdkit_error("%s", not_begun.text);
    return 0;
}

static void add_handle(struct handle *h)
{
    (void)pthread_mutex_lock(&handles_lock);
    h->next = handles;
    handles = h;
    (void)pthread_mutex_unlock(&handles_lock);
}

/* False: it was left to the end of nbdkit, which has come. */
static bool remove_handle(struct handle *h)
{
    struct handle **at = &handles;
    bool found;

    (void)pthread_mutex_lock(&handles_lock);
    while (*at && *at != h)
        at = &(*at)->next;
    found = *at;
    if (found)
        *at = h->next;
    (void)pthread_mutex_unlock(&handles_lock);
    return found;
}

/*
 * nbdkit (1.32) closes no handle any more once it has been told to end, which --run does as soon as its command has
 * ended: those of clients that have said goodbye just before are closed here. All its threads are gone, or (after some
 * seconds) given up on: who still reads then is left to the end of the session.
 */
static void close_the_rest(void)
{
    struct handle *h;

    (void)pthread_mutex_lock(&handles_lock);
    h = TAKE_PTR(handles);
    (void)pthread_mutex_unlock(&handles_lock);
    while (h) {
        struct handle *next = h->next;

        if (!door_is_busy(h))
            h->door->ops->close(h);
        h = next;
    }
}

static void qpull_cleanup(void)
{
    struct door *last = TAKE_PTR(door);

    (void)failure_set(&not_begun, -ESHUTDOWN, "nbdkit is ending");
    if (last) {
        close_the_rest();
        last->ops->stop(last);
    }
    if (runs && loop_stop(&loop) < 0)
        nbdkit_error("qpull: something was left open on the loop");
    runs = false;
}

/* Where after_fork failed, cleanup does not come. */
static void qpull_unload(void)
{
    qpull_cleanup();
    options_done(&options);
}

/* -- exports ------------------------------------------------------------------------------------------------------- */

static uint64_t deadline(void)
{
    return door_now_ms() + options.timeout_s * 1000ull;
}

static int names_of(uint64_t deadline_ms, struct names *ret_names, struct failure *f)
{
    if (!door)
        return failure_copy(f, &not_begun);
    for (size_t i = 0; i < options.ndisks; i++) {
        if (names_add(ret_names, options.disks[i]) < 0)
            return failure_set(f, -ENOMEM, "out of memory");
    }
    return options.ndisks > 0 ? 0 : door->ops->list(door, deadline_ms, ret_names, f);
}

static int qpull_list_exports(int readonly, int is_tls, struct nbdkit_exports *exports)
{
    _cleanup_(names_free) struct names names = {0};
    struct failure f = {0};

    if (names_of(deadline(), &names, &f) < 0)
        return refuse(&f);
    for (size_t i = 0; i < names.nnames; i++) {
        if (nbdkit_add_export(exports, names.names[i], NULL) < 0)
            return -1;
    }
    return 0;
}

/* The first named disk, or the only one there is. NULL and a sentence. */
static char *default_disk(uint64_t deadline_ms, struct failure *f)
{
    _cleanup_(names_free) struct names names = {0};

    if (names_of(deadline_ms, &names, f) < 0)
        return NULL;
    if (options.ndisks == 0 && names.nnames != 1) {
        (void)failure_set(f, -ENOENT,
                          "VM '%s' has %zu disks that can be frozen; name one, as export or by disk=", options.vm,
                          names.nnames);
        return NULL;
    }
    return strdup(names.names[0]);
}

/*
 * nbdkit asks this for a client's list, too: that there is no such disk is only an error where it is opened. Who has
 * waited in vain for an answer shall not wait once more for open to find the same.
 */
static const char *qpull_default_export(int readonly, int is_tls)
{
    struct failure f = {0};
    _cleanup_free_ char *disk = default_disk(deadline(), &f);

    if (disk)
        return nbdkit_strdup_intern(disk);
    if (f.err == -ENOENT)
        return "";
    (void)refuse(&f);
    return NULL;
}

/* To a qpulld an "@" would be the wish for a checkpoint: that is for who starts nbdkit, not for its clients. */
static int check_disk(const char *disk, struct failure *f)
{
    for (size_t i = 0; i < options.ndisks; i++) {
        if (strcmp(options.disks[i], disk) == 0)
            return 0;
    }
    if (options.ndisks > 0)
        return failure_set(f, -ENOENT, "there is no export '%s': disk= does not name it", disk);
    if (options.server && strchr(disk, '@'))
        return failure_set(f, -ENOENT, "there is no export '%s': no disk has a name with '@'", disk);
    return 0;
}

/* -- a connection -------------------------------------------------------------------------------------------------- */

static int write_dirty_map(struct handle *h, struct failure *f)
{
    _cleanup_free_ char *path = options.dirty_map ? options_dirty_map_path(&options, h->frozen->disk) : NULL;
    int r;

    if (!options.dirty_map)
        return 0;
    if (!path)
        return failure_set(f, -ENOMEM, "out of memory");
    r = frozen_write_dirty_map(h->frozen, path);
    return r < 0 ? failure_set(f, r, "dirty-map=%s cannot be written: %s", path, strerror(-r)) : 0;
}

static void *qpull_open(int readonly)
{
    struct failure f = {0};
    uint64_t until = deadline();
    const char *name = nbdkit_export_name();
    _cleanup_free_ char *disk = name && *name ? strdup(name) : default_disk(until, &f);
    struct handle *h = NULL;

    if (!door)
        (void)failure_copy(&f, &not_begun);
    if (!disk)
        (void)failure_set(&f, -ENOMEM, "out of memory");
    if (f.err || !disk || check_disk(disk, &f) < 0 || door->ops->open(door, disk, until, &h, &f) < 0) {
        (void)refuse(&f);
        return NULL;
    }
    if (write_dirty_map(h, &f) < 0) {
        frozen_read_failed(h->frozen);
        door->ops->close(h);
        (void)refuse(&f);
        return NULL;
    }
    add_handle(h);
    return h;
}

static void qpull_close(void *handle)
{
    struct handle *h = handle;

    if (remove_handle(h))
        h->door->ops->close(h);
}

static const char *qpull_export_description(void *handle)
{
    const struct handle *h = handle;

    return nbdkit_printf_intern("disk '%s' of VM '%s', frozen%s%s%s%s", h->frozen->disk, options.vm,
                                options.checkpoint ? ", checkpoint " : "", options.checkpoint ? options.checkpoint : "",
                                options.since ? ", changes since " : "", options.since ? options.since : "");
}

static int64_t qpull_get_size(void *handle)
{
    return (int64_t)((struct handle *)handle)->frozen->size;
}

static int qpull_block_size(void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
    *minimum = BLOCK_MIN;
    *preferred = BLOCK_PREFERRED;
    *maximum = BLOCK_MAX;
    return 0;
}

/* All connections see the same frozen disk. */
static int qpull_can_multi_conn(void *handle)
{
    return 1;
}

static int qpull_can_extents(void *handle)
{
    return 1;
}

static int qpull_can_cache(void *handle)
{
    return NBDKIT_CACHE_NATIVE;
}

/* -- requests ------------------------------------------------------------------------------------------------------ */

static int qpull_pread(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
    struct failure f = {0};

    if (door_read(handle, buf, count, offset, &f) == 0)
        return 0;
    f.err = -EIO; /* whatever it was: a client of NBD knows no more */
    return refuse(&f);
}

/* QEMU's host has it in memory then, as far as it keeps it. */
static int qpull_cache(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
    struct failure f = {0};

    if (door_read(handle, /* buffer= */ NULL, count, offset, &f) == 0)
        return 0;
    f.err = -EIO;
    return refuse(&f);
}

static int qpull_extents(void *handle, uint32_t count, uint64_t offset, uint32_t flags, struct nbdkit_extents *extents)
{
    struct handle *h = handle;
    uint64_t end = offset + count;
    size_t nruns = 0, n;

    do {
        struct frozen_run runs_[RUNS_AT_ONCE];

        n = frozen_tell(h->frozen, offset, end - offset, runs_, flags & NBDKIT_FLAG_REQ_ONE ? 1 : RUNS_AT_ONCE);
        for (size_t i = 0; i < n; offset += runs_[i++].length) {
            if (nbdkit_add_extent(extents, offset, runs_[i].length, runs_[i].type) < 0)
                return -1;
        }
        nruns += n;
    } while (n > 0 && offset < end && nruns < RUNS_MAX && !(flags & NBDKIT_FLAG_REQ_ONE));
    return 0;
}

static struct nbdkit_plugin plugin = {
    .name = "qpull",
    .longname = "nbdkit qpull plugin",
    .version = QPULL_VERSION,
    .description = "Frozen disks of a running QEMU, whole or what changed since a checkpoint",
    .config_help = options_help,
    .magic_config_key = "qmp",
    .load = qpull_load,
    .unload = qpull_unload,
    .config = qpull_config,
    .config_complete = qpull_config_complete,
    .dump_plugin = qpull_dump_plugin,
    .after_fork = qpull_after_fork,
    .cleanup = qpull_cleanup,
    .list_exports = qpull_list_exports,
    .default_export = qpull_default_export,
    .open = qpull_open,
    .close = qpull_close,
    .export_description = qpull_export_description,
    .get_size = qpull_get_size,
    .block_size = qpull_block_size,
    .can_multi_conn = qpull_can_multi_conn,
    .can_extents = qpull_can_extents,
    .can_cache = qpull_can_cache,
    .pread = qpull_pread,
    .cache = qpull_cache,
    .extents = qpull_extents,
};

struct nbdkit_plugin *plugin_init(void); /* nbdkit's header does not declare it */
NBDKIT_REGISTER_PLUGIN(plugin)
