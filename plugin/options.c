/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "options.h"

#include "backup/names.h"
#include "config.h"

#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define STATE_BELOW "nbdkit" /* our folder in the daemon's default one: its notes are not ours */
#define DAEMON "qpulld"

const char options_help[] =
    "[qmp=]SOCKET            QMP socket of the running QEMU; or\n"
    "server=unix:SOCKET      a running qpulld's NBD socket, with vm=NAME\n"
    "disk=NAME               a disk to freeze (repeatable; default: all)\n"
    "checkpoint=NAME         the instant of the freeze becomes this checkpoint, if the disk is copied whole\n"
    "since=NAME              an earlier checkpoint: what changed since then is known\n"
    "map=allocation|dirty|both  what clients are told (dirty, both: unchanged areas are holes)\n"
    "dirty-map=FILE          writes the frozen map of changes as JSON\n"
    "scratch=DIR             where overwritten data is kept meanwhile (default " CONFIG_SCRATCH ")\n"
    "quiesce=off|try|require, qga=SOCKET  freeze the guest's file systems through its agent around the freeze\n"
    "max-pause=SECONDS       how long the guest's I/O may stand still for the freeze (default 1)\n"
    "timeout=SECONDS         for the freeze as a whole (default 60)\n"
    "linger=SECONDS          the freeze stays so long without clients (default 10)\n"
    "vm=NAME, state=DIR      name in messages and notes, and where notes are kept";

void options_init(struct options *o)
{
    memset(o, 0, sizeof(*o));
    o->timeout_s = OPTIONS_TIMEOUT_S;
    o->linger_s = CONFIG_LINGER_MS / 1000;
    o->max_pause_s = CONFIG_MAX_PAUSE_MS / 1000;
}

void options_done(struct options *o)
{
    char **strings[] = {&o->qmp,   &o->qga,       &o->server,     &o->vm,    &o->scratch,
                        &o->state, &o->dirty_map, &o->checkpoint, &o->since, &o->watchdog};

    for (size_t i = 0; i < ARRAY_SIZE(strings); i++)
        free(TAKE_PTR(*strings[i]));
    for (size_t i = 0; i < o->ndisks; i++)
        free(o->disks[i]);
    free(TAKE_PTR(o->disks));
    o->ndisks = 0;
    place_free(TAKE_PTR(o->place));
}

/* -- one by one ---------------------------------------------------------------------------------------------------- */

static int set_string(char **to, const char *key, const char *value, struct failure *f)
{
    if (*to)
        return failure_set(f, -EINVAL, "%s= is there twice", key);
    if (!*value)
        return failure_set(f, -EINVAL, "%s= is empty", key);
    *to = strdup(value);
    return *to ? 0 : failure_set(f, -ENOMEM, "out of memory");
}

/* nbdkit changes to / when it goes into the background. */
static int set_path(char **to, const char *key, const char *value, struct failure *f)
{
    _cleanup_free_ char *here = NULL, *path = NULL;

    if (*value == '/' || !*value)
        return set_string(to, key, value, f);
    here = getcwd(NULL, 0);
    if (!here || asprintf(&path, "%s/%s", here, value) < 0) {
        path = NULL;
        return failure_set(f, -ENOMEM, "the current directory is not known, say a whole path in %s=%s", key, value);
    }
    return set_string(to, key, path, f);
}

static int once(bool *said, const char *key, struct failure *f)
{
    if (*said)
        return failure_set(f, -EINVAL, "%s= is there twice", key);
    *said = true;
    return 0;
}

static int set_seconds(unsigned *to, bool *said, const char *key, const char *value, unsigned least, struct failure *f)
{
    char *end;
    unsigned long n;

    if (once(said, key, f) < 0)
        return f->err;
    errno = 0;
    n = strtoul(value, &end, 10);
    if (!isdigit((unsigned char)*value) || *end || errno || n < least || n > OPTIONS_SECONDS_MAX)
        return failure_set(f, -EINVAL, "%s=%s: must be a number of seconds from %u to %u", key, value, least,
                           OPTIONS_SECONDS_MAX);
    *to = (unsigned)n;
    return 0;
}

static int set_checkpoint(char **to, const char *key, const char *value, struct failure *f)
{
    struct failure why = {0};

    if (name_check(value, &why) < 0)
        return failure_set(f, -EINVAL, "%s=%s: %s", key, value, why.text);
    return set_string(to, key, value, f);
}

static int set_scratch(struct options *o, const char *value, struct failure *f)
{
    struct failure why = {0};

    if (o->scratch || o->place)
        return failure_set(f, -EINVAL, "scratch= is there twice");
    if (!place_is_meant(value))
        return set_path(&o->scratch, "scratch", value, f);
    if (place_parse(value, &o->place, &why) < 0)
        return failure_set(f, -EINVAL, "scratch=%s: %s", value, why.text);
    return 0;
}

static int set_quiesce(struct options *o, const char *value, struct failure *f)
{
    if (once(&o->quiesce_said, "quiesce", f) < 0)
        return f->err;
    for (enum quiesce_mode m = QUIESCE_OFF; m <= QUIESCE_REQUIRE; m++) {
        if (strcmp(value, quiesce_mode_name(m)) != 0)
            continue;
        o->quiesce = m;
        return 0;
    }
    return failure_set(f, -EINVAL, "quiesce=%s: must be off, try or require", value);
}

static int add_disk(struct options *o, const char *value, struct failure *f)
{
    char **disks;

    if (!*value)
        return failure_set(f, -EINVAL, "disk= is empty");
    for (size_t i = 0; i < o->ndisks; i++) {
        if (strcmp(o->disks[i], value) == 0)
            return failure_set(f, -EINVAL, "disk=%s is there twice", value);
    }
    if (o->ndisks == OPTIONS_DISKS_MAX)
        return failure_set(f, -EINVAL, "more than %u times disk=", OPTIONS_DISKS_MAX);
    disks = realloc(o->disks, (o->ndisks + 1) * sizeof(*disks));
    if (!disks)
        return failure_set(f, -ENOMEM, "out of memory");
    o->disks = disks;
    disks[o->ndisks] = strdup(value);
    return disks[o->ndisks] ? (o->ndisks++, 0) : failure_set(f, -ENOMEM, "out of memory");
}

static int set_server(struct options *o, const char *value, struct failure *f)
{
    static const char unix_word[] = "unix:";

    if (strncmp(value, unix_word, sizeof(unix_word) - 1) == 0)
        value += sizeof(unix_word) - 1;
    else if (*value != '/')
        return failure_set(f, -EINVAL,
                           "server=%s: must be unix:PATH, a socket of a qpulld on this machine (one elsewhere is "
                           "proxied by nbdkit's own \"nbd\" plugin)",
                           value);
    return set_path(&o->server, "server", value, f);
}

int options_set(struct options *o, const char *key, const char *value, struct failure *f)
{
    if (strcmp(key, "qmp") == 0)
        return set_path(&o->qmp, key, value, f);
    if (strcmp(key, "server") == 0)
        return set_server(o, value, f);
    if (strcmp(key, "qga") == 0)
        return set_path(&o->qga, key, value, f);
    if (strcmp(key, "vm") == 0)
        return set_string(&o->vm, key, value, f);
    if (strcmp(key, "disk") == 0)
        return add_disk(o, value, f);
    if (strcmp(key, "checkpoint") == 0)
        return set_checkpoint(&o->checkpoint, key, value, f);
    if (strcmp(key, "since") == 0)
        return set_checkpoint(&o->since, key, value, f);
    if (strcmp(key, "map") == 0) {
        if (once(&o->view_said, key, f) < 0)
            return f->err;
        return view_parse(value, &o->view) == 0
                   ? 0
                   : failure_set(f, -EINVAL, "map=%s: must be allocation, dirty or both", value);
    }
    if (strcmp(key, "dirty-map") == 0)
        return set_path(&o->dirty_map, key, value, f);
    if (strcmp(key, "scratch") == 0)
        return set_scratch(o, value, f);
    if (strcmp(key, "state") == 0)
        return set_path(&o->state, key, value, f);
    if (strcmp(key, "quiesce") == 0)
        return set_quiesce(o, value, f);
    if (strcmp(key, "timeout") == 0)
        return set_seconds(&o->timeout_s, &o->timeout_said, key, value, 1, f);
    if (strcmp(key, "linger") == 0)
        return set_seconds(&o->linger_s, &o->linger_said, key, value, 0, f);
    if (strcmp(key, "max-pause") == 0)
        return set_seconds(&o->max_pause_s, &o->max_pause_said, key, value, 1, f);
    return failure_set(f, -EINVAL, "unknown parameter \"%s\"; \"nbdkit qpull --help\" lists them", key);
}

/* -- as a whole ---------------------------------------------------------------------------------------------------- */

static int check_server(const struct options *o, struct failure *f)
{
    const char *key = o->scratch || o->place ? "scratch"
                      : o->state             ? "state"
                      : o->quiesce_said      ? "quiesce"
                      : o->qga               ? "qga"
                      : o->linger_said       ? "linger"
                      : o->max_pause_said    ? "max-pause"
                                             : NULL;

    if (key)
        return failure_set(f, -EINVAL, "%s= is a matter of the qpulld behind server=; configure it there", key);
    if (!o->vm)
        return failure_set(f, -EINVAL, "server= needs vm=NAME: what qpulld calls the VM");
    return 0;
}

static int check_socket(const char *key, const char *path, struct failure *f)
{
    struct stat st;

    if (stat(path, &st) < 0)
        return failure_set(f, -errno, "%s=%s: %s", key, path, strerror(errno));
    if (!S_ISSOCK(st.st_mode))
        return failure_set(f, -EINVAL, "%s=%s: is not a socket", key, path);
    return 0;
}

static int check_dir(const char *key, const char *path, struct failure *f)
{
    struct stat st;

    if (stat(path, &st) < 0 || (S_ISDIR(st.st_mode) && access(path, W_OK | X_OK) < 0))
        return failure_set(f, -errno, "%s=%s: %s", key, path, strerror(errno));
    if (!S_ISDIR(st.st_mode))
        return failure_set(f, -ENOTDIR, "%s=%s: is not a directory", key, path);
    return 0;
}

/* FNV-1a, 32 bits: <http://www.isthe.com/chongo/tech/comp/fnv/> */
static uint32_t hash(const char *text)
{
    uint32_t h = 2166136261u;

    for (; *text; text++)
        h = (h ^ (unsigned char)*text) * 16777619u;
    return h;
}

/* The socket's file name without its ending is what people know of a VM. */
static int name_the_vm(struct options *o, struct failure *f)
{
    const char *slash = strrchr(o->qmp, '/'), *base = slash ? slash + 1 : o->qmp, *dot = strrchr(base, '.');
    size_t len = dot && dot > base ? (size_t)(dot - base) : strlen(base);

    o->vm = strndup(base, MIN(len, (size_t)CONFIG_NAME_MAX));
    return o->vm ? 0 : failure_set(f, -ENOMEM, "out of memory");
}

static int check_name(const struct options *o, struct failure *f)
{
    if (strlen(o->vm) > CONFIG_NAME_MAX || strpbrk(o->vm, "/@") || *o->vm == '.')
        return failure_set(f, -EINVAL, "vm=%s: must be at most %u bytes without '/' and '@', and not begin with '.'",
                           o->vm, CONFIG_NAME_MAX);
    for (const char *s = o->vm; *s; s++) {
        if (iscntrl((unsigned char)*s))
            return failure_set(f, -EINVAL, "vm=%s: has control characters", o->vm);
    }
    return 0;
}

static int make_dirs(char *path)
{
    for (char *s = path + 1;; s++) {
        bool end = !*s;

        if (!end && *s != '/')
            continue;
        *s = '\0';
        if (mkdir(path, 0700) < 0 && errno != EEXIST)
            return -errno;
        if (end)
            return 0;
        *s = '/';
    }
}

/* A folder for each QMP socket: two VMs may have sockets of one name in different places. */
static int make_state(struct options *o, struct failure *f)
{
    _cleanup_free_ char *real = realpath(o->qmp, NULL);
    const char *home = getenv("HOME"), *xdg = getenv("XDG_STATE_HOME");
    uint32_t number = hash(real ? real : o->qmp);
    int r;

    if (geteuid() == 0)
        r = asprintf(&o->state, "%s/%s/%s-%08x", CONFIG_STATE, STATE_BELOW, o->vm, number);
    else if (xdg && *xdg == '/')
        r = asprintf(&o->state, "%s/qpull/%s/%s-%08x", xdg, STATE_BELOW, o->vm, number);
    else if (home && *home == '/')
        r = asprintf(&o->state, "%s/.local/state/qpull/%s/%s-%08x", home, STATE_BELOW, o->vm, number);
    else
        return failure_set(f, -EINVAL, "no home directory is known: say state=DIR, where notes are kept");
    if (r < 0) {
        o->state = NULL;
        return failure_set(f, -ENOMEM, "out of memory");
    }
    r = make_dirs(o->state);
    return r < 0 ? failure_set(f, r, "cannot make %s: %s; say state=DIR, where notes are kept", o->state, strerror(-r))
                 : 0;
}

/* qpulld is the program that knows how to thaw. It stands beside this file in a build, else where it was installed. */
static int find_watchdog(struct options *o, struct failure *f)
{
    Dl_info info;
    const char *slash;

    if (dladdr(options_help, &info) && info.dli_fname && (slash = strrchr(info.dli_fname, '/'))) {
        if (asprintf(&o->watchdog, "%.*s/" DAEMON, (int)(slash - info.dli_fname), info.dli_fname) < 0)
            o->watchdog = NULL;
        if (o->watchdog && *o->watchdog == '/' && access(o->watchdog, X_OK) == 0)
            return 0;
        free(TAKE_PTR(o->watchdog));
    }
    if (access(QPULL_SBINDIR "/" DAEMON, X_OK) < 0)
        return failure_set(f, -ENOENT,
                           "quiesce=%s needs the program " QPULL_SBINDIR "/" DAEMON
                           ", which thaws the guest should nbdkit be killed: %s",
                           quiesce_mode_name(o->quiesce), strerror(errno));
    o->watchdog = strdup(QPULL_SBINDIR "/" DAEMON);
    return o->watchdog ? 0 : failure_set(f, -ENOMEM, "out of memory");
}

/* It is replaced as a whole, and a device, a pipe or somebody's symbolic link must not be. */
static int check_dirty_map(const char *path, struct failure *f)
{
    struct stat st;

    if (lstat(path, &st) == 0 && !S_ISREG(st.st_mode))
        return failure_set(f, -EINVAL, "dirty-map=%s: is there already, and is no regular file", path);
    return 0;
}

static int complete_own(struct options *o, struct failure *f)
{
    int r = check_socket("qmp", o->qmp, f);

    if (r == 0 && !o->vm)
        r = name_the_vm(o, f);
    if (r == 0)
        r = check_name(o, f);
    if (r == 0 && !o->scratch && !o->place)
        r = set_string(&o->scratch, "scratch", CONFIG_SCRATCH, f);
    if (r == 0 && !o->place)
        r = check_dir("scratch", o->scratch, f);
    if (r == 0)
        r = o->state ? check_dir("state", o->state, f) : make_state(o, f);
    if (r == 0 && o->qga && !o->quiesce_said)
        o->quiesce = QUIESCE_TRY;
    if (r == 0 && o->quiesce != QUIESCE_OFF && !o->qga)
        r = failure_set(f, -EINVAL, "quiesce=%s needs qga=SOCKET, the guest agent's", quiesce_mode_name(o->quiesce));
    if (r == 0 && o->quiesce != QUIESCE_OFF)
        r = find_watchdog(o, f);
    return r;
}

int options_complete(struct options *o, struct failure *f)
{
    int r;

    if (!o->qmp == !o->server)
        return failure_set(f, -EINVAL,
                           o->qmp ? "qmp= and server= exclude each other"
                                  : "qmp=SOCKET must be said, the QMP socket of the running QEMU (or "
                                    "server=, of a running qpulld)");
    if (!o->since && o->view != VIEW_ALLOCATION)
        return failure_set(f, -EINVAL, "map=%s needs since=NAME, an earlier checkpoint", view_name(o->view));
    if (!o->since && o->dirty_map)
        return failure_set(f, -EINVAL, "dirty-map= needs since=NAME, an earlier checkpoint");
    if (o->since && o->checkpoint && strcmp(o->since, o->checkpoint) == 0)
        return failure_set(f, -EINVAL, "checkpoint= and since= name the same checkpoint '%s'", o->since);
    if (o->since && !o->view_said && !o->dirty_map)
        return failure_set(f, -EINVAL, "since=%s without map=dirty, map=both or dirty-map=FILE has no effect",
                           o->since);
    if (o->dirty_map && check_dirty_map(o->dirty_map, f) < 0)
        return f->err;
    if (!o->server)
        return complete_own(o, f);
    r = check_server(o, f);
    if (r == 0)
        r = check_name(o, f);
    return r == 0 ? check_socket("server", o->server, f) : r;
}

char *options_dirty_map_path(const struct options *o, const char *disk)
{
    char *path = NULL;

    if (o->ndisks == 1)
        return strdup(o->dirty_map);
    return asprintf(&path, "%s.%s", o->dirty_map, disk) < 0 ? NULL : path;
}
