/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "config_internal.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <ini.h>
#include <unistd.h>

/* Where a word was said, for its error sentence. */
struct spot {
    const char *file; /* NULL: a flag */
    unsigned line;
};

/* -- the option table ---------------------------------------------------------------------------------------------- */
enum row {
    ROW_CONFIG,
    ROW_VM,
    ROW_IMAGE,
    ROW_LISTEN,
    ROW_CONTROL,
    ROW_SCRATCH,
    ROW_SCRATCH_LIMIT,
    ROW_SCRATCH_TOTAL_LIMIT,
    ROW_SCRATCH_RESERVE,
    ROW_CBW_TIMEOUT,
    ROW_GIVE_BACK,
    ROW_SHARED_MEMORY,
    ROW_STATE,
    ROW_MAX_PAUSE,
    ROW_LINGER,
    ROW_HOLD_SHUTDOWN,
    ROW_HANDSHAKE_TIMEOUT,
    ROW_IDLE_TIMEOUT,
    ROW_MAX_CONNECTIONS,
    ROW_MAX_CONNECTIONS_PER_CLIENT,
    ROW_MAX_SESSIONS_PER_CLIENT,
    ROW_RATE,
    ROW_BEGIN_TIMEOUT,
    ROW_SESSION_TIMEOUT,
    ROW_KEEP_CHECKPOINTS,
    ROW_ENGINE,
    ROW_PIDFILE,
    ROW_LOG,
    ROW_ALLOW_PLAINTEXT,
    ROW_ALLOW,
    ROW_STORAGE_DAEMON,
    ROW_QGA,
    ROW_QUIESCE,
    ROW_TLS,
    ROW_TLS_CERTS,
    ROW_TLS_PSK,
    ROW_THREADS,
    ROW_SOCKET_MODE,
    ROW_SOCKET_GROUP,
    ROW_USER,
    ROW_SANDBOX,
    ROW_VERSION,
    ROW_HELP,
};

enum row_flags {
    REPEATABLE = 1,
    NO_VALUE = 2,  /* as a flag; in the file it takes yes or no */
    FLAG_ONLY = 4, /* has no place in the file */
};

static const struct {
    const char *name;
    unsigned flags;
    const char *value; /* for --help; NULL: not shown */
    const char *help;
} rows[] = {
    [ROW_CONFIG] = {"config", FLAG_ONLY, "FILE", "read FILE (default " CONFIG_FILE " if it exists); flags win"},
    [ROW_VM] = {"vm", REPEATABLE, "NAME=QMP_SOCKET", "a running QEMU; repeatable"},
    [ROW_IMAGE] = {"image", REPEATABLE, "VM/DISK=[FORMAT:]PATH", "a powered-off VM's disk; repeatable"},
    [ROW_LISTEN] = {"listen", REPEATABLE, "ADDR",
                    "unix:PATH, tcp:HOST:PORT or fd; repeatable (default " CONFIG_LISTEN ")"},
    [ROW_CONTROL] = {"control", 0, "PATH", "control socket (default " CONFIG_CONTROL ")"},
    [ROW_SCRATCH] = {"scratch", 0, "DIR|JSON",
                     "where copy-before-write data goes (default " CONFIG_SCRATCH "), or a blockdev-add object"},
    [ROW_SCRATCH_LIMIT] = {"scratch-limit", 0, "SIZE",
                           "of one session; past it the session is given up (default 0: none)"},
    [ROW_SCRATCH_TOTAL_LIMIT] = {"scratch-total-limit", 0, "SIZE",
                                 "of all sessions; past it the largest is given up (default 0: none)"},
    [ROW_SCRATCH_RESERVE] = {"scratch-reserve", 0, "SIZE",
                             "left free on DIR's file system, likewise (default 256M; 0: none)"},
    [ROW_CBW_TIMEOUT] = {"cbw-timeout", 0, "SECONDS",
                         "a guest's write waits so long for its copy to scratch, once (default 10)"},
    [ROW_GIVE_BACK] = {"give-back", 0, "WHEN",
                       "free what was copied when a client says trim, or has read it: off, trim, read (default off)"},
    [ROW_SHARED_MEMORY] =
        {"shared-memory", 0, "SIZE",
         "for reading through memory shared with QEMUs, 1 to 4 MiB a disk (default 256M; 0: over NBD)"},
    [ROW_STATE] = {"state", 0, "DIR", "checkpoint notes and history (default " CONFIG_STATE ")"},
    [ROW_MAX_PAUSE] = {"max-pause", 0, "SECONDS", "the freeze may stop a guest's I/O for so long (default 1)"},
    [ROW_LINGER] = {"linger", 0, "SECONDS", "a session outlives its last client by so much (default 10)"},
    [ROW_HOLD_SHUTDOWN] = {"hold-shutdown", 0, "SECONDS",
                           "a QEMU whose guest shuts down waits so long for a session's end (default 0: off)"},
    [ROW_HANDSHAKE_TIMEOUT] = {"handshake-timeout", 0, "SECONDS", "for a client's whole negotiation (default 30)"},
    [ROW_IDLE_TIMEOUT] = {"idle-timeout", 0, "SECONDS",
                          "close a client that asks nothing for so long (default 0: never)"},
    [ROW_SESSION_TIMEOUT] = {"session-timeout", 0, "SECONDS",
                             "give a session up that has been up for so long (default 0: never)"},
    [ROW_MAX_CONNECTIONS] = {"max-connections", 0, "N", "NBD clients at a time (default 256)"},
    [ROW_MAX_CONNECTIONS_PER_CLIENT] = {"max-connections-per-client", 0, "N",
                                        "of one identity (uid, address, certificate, key) at a time (default 128)"},
    [ROW_MAX_SESSIONS_PER_CLIENT] = {"max-sessions-per-client", 0, "N", "likewise, sessions (default 64)"},
    [ROW_RATE] = {"rate", 0, "SIZE", "a second, that all clients of a session are sent together (default 0: any)"},
    [ROW_BEGIN_TIMEOUT] =
        {"begin-timeout", 0, "SECONDS",
         "a session of `qpull begin` ends when nobody has read it for so long (default 3600; 0: never)"},
    [ROW_KEEP_CHECKPOINTS] = {"keep-checkpoints", 0, "N", "of each VM; the oldest are dropped (default: all are kept)"},
    [ROW_ENGINE] = {"engine", 0, "NAME", "auto, copy-before-write or backup-job: how disks are frozen (default auto)"},
    [ROW_PIDFILE] = {"pidfile", 0, "FILE", "written when ready to accept"},
    [ROW_LOG] = {"log", 0, "LEVEL", "error, warning, info or debug (default info)"},
    [ROW_ALLOW_PLAINTEXT] = {"allow-plaintext", NO_VALUE, "", "let TCP listeners beyond loopback speak without TLS"},
    [ROW_ALLOW] = {"allow", REPEATABLE, "WHO=VM-GLOB[/RIGHTS][,…]",
                   "who may do what; WHO: user:NAME, group:NAME, psk:NAME, cn:GLOB, ip:ADDRESS, … (default: root and "
                   "our user on unix sockets)"},
    [ROW_STORAGE_DAEMON] = {"storage-daemon", 0, "PROGRAM",
                            "opens images (default " CONFIG_STORAGE_DAEMON ", found by PATH)"},
    [ROW_QGA] = {"qga", REPEATABLE, "NAME=SOCKET", "the guest agent of a VM; repeatable"},
    [ROW_QUIESCE] = {"quiesce", 0, "off|try|require",
                     "freeze the guest's file systems for the cut (default off; try: go on where it fails)"},
    [ROW_TLS] = {"tls", 0, "off|on|require",
                 "on: clients may use TLS, and must from other machines; require: all must (default off)"},
    [ROW_TLS_CERTS] = {"tls-certs", 0, "DIR", "ca-cert.pem, server-cert.pem, server-key.pem, maybe ca-crl.pem"},
    [ROW_TLS_PSK] = {"tls-psk", 0, "FILE", "pre-shared keys instead: lines of USER:HEXKEY"},
    [ROW_THREADS] = {"threads", 0, "N", "that encrypt (default: one for each processor, at most 8)"},
    [ROW_SOCKET_MODE] = {"socket-mode", 0, "OCTAL",
                         "of our unix sockets (default 0600; 0660 with --socket-group, 0666 with rules for users)"},
    [ROW_SOCKET_GROUP] = {"socket-group", 0, "NAME", "of our unix sockets"},
    [ROW_USER] = {"user", 0, "NAME[:GROUP]", "become this user when all sockets are open; for a daemon begun as root"},
    [ROW_SANDBOX] = {"sandbox", 0, "auto|require|off",
                     "system calls and files for us alone: as far as the kernel can (default), in full, or not"},
    [ROW_VERSION] = {"version", NO_VALUE | FLAG_ONLY, "", "print the version and exit"},
    [ROW_HELP] = {"help", NO_VALUE | FLAG_ONLY, "", "print this and exit"},
};
static_assert(ARRAY_SIZE(rows) <= CONFIG_ROWS_MAX, "line_in_file and said_by_flag are too short");

static int set_row(struct server_config *c, enum row row, const char *value, bool by_flag, struct failure *f)
{
    switch (row) {
    case ROW_CONFIG: /* read before */
        return 0;
    case ROW_VM:
        return config_set_vm(c, value, by_flag, f);
    case ROW_IMAGE:
        return config_set_image_of(c, value, by_flag, f);
    case ROW_LISTEN:
        if (by_flag && c->said_by_flag[row] == 1) /* the first one replaces what the file says */
            config_drop_listeners(c);
        return config_add_listener(c, value, f);
    case ROW_CONTROL:
        return config_set_path(&c->control, value, f);
    case ROW_SCRATCH:
        return config_set_scratch(&c->scratch, &c->place, value, f);
    case ROW_SCRATCH_LIMIT:
        return config_set_size(&c->scratch_limit, value, f);
    case ROW_SCRATCH_TOTAL_LIMIT:
        return config_set_size(&c->scratch_total_limit, value, f);
    case ROW_SCRATCH_RESERVE:
        return config_set_size(&c->scratch_reserve, value, f);
    case ROW_CBW_TIMEOUT: /* 0 would be QEMU's word for ever */
        return config_set_count(&c->cbw_timeout_s, value, CONFIG_CBW_TIMEOUT_MAX_S, f);
    case ROW_GIVE_BACK:
        return config_set_give_back(&c->give_back, value, f);
    case ROW_SHARED_MEMORY:
        return config_set_size(&c->shared_memory, value, f);
    case ROW_STATE:
        return config_set_path(&c->state, value, f);
    case ROW_MAX_PAUSE:
        if (config_set_seconds(&c->max_pause_ms, value, f) < 0)
            return f->err;
        if (c->max_pause_ms == 0)
            return failure_set(f, -EINVAL, "no freeze takes no time at all");
        return 0;
    case ROW_LINGER:
        return config_set_seconds(&c->linger_ms, value, f);
    case ROW_HOLD_SHUTDOWN:
        return config_set_seconds(&c->hold_shutdown_ms, value, f);
    case ROW_HANDSHAKE_TIMEOUT:
        if (config_set_seconds(&c->handshake_timeout_ms, value, f) < 0)
            return f->err;
        if (c->handshake_timeout_ms == 0)
            return failure_set(f, -EINVAL, "0 would let silent clients hold connections for ever");
        return 0;
    case ROW_IDLE_TIMEOUT:
        return config_set_seconds(&c->idle_timeout_ms, value, f);
    case ROW_SESSION_TIMEOUT:
        return config_set_seconds(&c->session_timeout_ms, value, f);
    case ROW_MAX_CONNECTIONS:
        return config_set_count(&c->max_connections, value, CONFIG_CONNECTIONS_MAX, f);
    case ROW_MAX_CONNECTIONS_PER_CLIENT:
        return config_set_count(&c->max_connections_per_client, value, CONFIG_CONNECTIONS_MAX, f);
    case ROW_MAX_SESSIONS_PER_CLIENT:
        return config_set_count(&c->max_sessions_per_client, value, CONFIG_VMS_MAX, f);
    case ROW_RATE:
        return config_set_rate(&c->rate, value, f);
    case ROW_BEGIN_TIMEOUT:
        return config_set_seconds(&c->begin_timeout_ms, value, f);
    case ROW_KEEP_CHECKPOINTS:
        return config_set_count(&c->keep_checkpoints, value, CONFIG_CHECKPOINTS_MAX, f);
    case ROW_ENGINE:
        return config_set_engine(&c->engine, value, f);
    case ROW_PIDFILE:
        return config_set_path(&c->pidfile, value, f);
    case ROW_LOG:
        if (log_level_parse(value, &c->log_level) < 0)
            return failure_set(f, -EINVAL, "\"%s\" is none of error, warning, info, debug", value);
        return 0;
    case ROW_ALLOW_PLAINTEXT:
        c->allow_plaintext = true;
        return value ? config_set_bool(&c->allow_plaintext, value, f) : 0;
    case ROW_ALLOW:
        return access_add(&c->access, value, f);
    case ROW_STORAGE_DAEMON:
        return config_set_path(&c->storage_daemon, value, f);
    case ROW_QGA:
        return config_set_qga(c, value, by_flag, f);
    case ROW_QUIESCE:
        return config_set_quiesce(&c->quiesce, value, f);
    case ROW_TLS:
        return config_set_tls(&c->tls, value, f);
    case ROW_TLS_CERTS:
        return config_set_path(&c->tls_certs, value, f);
    case ROW_TLS_PSK:
        return config_set_path(&c->tls_psk, value, f);
    case ROW_THREADS:
        return config_set_count(&c->threads, value, TLS_THREADS_MAX, f);
    case ROW_SOCKET_MODE:
        return config_set_mode(&c->socket_mode, value, f);
    case ROW_SOCKET_GROUP:
        return config_set_path(&c->socket_group, value, f);
    case ROW_USER:
        return config_set_path(&c->user, value, f);
    case ROW_SANDBOX:
        return config_set_sandbox(&c->sandbox, value, f);
    case ROW_VERSION:
        c->wish = CONFIG_VERSION;
        return 0;
    case ROW_HELP:
        c->wish = CONFIG_HELP;
        return 0;
    }
    return failure_set(f, -EINVAL, "not supported by this version");
}

/* -- the file ------------------------------------------------------------------------------------------------------ */
struct reader {
    struct server_config *c;
    FILE *file;
    struct spot spot;
    bool goes_on;             /* the line continues the value of the one before */
    bool in_server, in_allow; /* else in a VM's section, or in none */
    bool server_said, allow_said;
    size_t vm;              /* index + 1 of the VM whose section this is, or 0 */
    struct failure failure; /* without the spot */
    char *scratch;          /* owned: the text of the last scratch=, which may go on */
    struct failure unfinished;
    unsigned unfinished_line; /* where that text, so far, has no end */
};

/* inih tells of a section only with its first key, and cuts names: so section lines are read here. */
static int begin_section(struct reader *r, const char *line)
{
    _cleanup_free_ char *name = NULL;
    const char *end = strrchr(line, ']'), *open, *close;
    struct config_vm *vm;

    r->in_server = r->in_allow = false;
    r->vm = 0;
    if (!end)
        return failure_set(&r->failure, -EINVAL, "a section's name has no \"]\"");
    if (strncmp(line, "[server]", 8) == 0) {
        if (r->server_said)
            return failure_set(&r->failure, -EINVAL, "the section [server] is there twice");
        r->in_server = r->server_said = true;
        return 0;
    }
    if (strncmp(line, "[allow]", 7) == 0) {
        if (r->allow_said)
            return failure_set(&r->failure, -EINVAL, "the section [allow] is there twice");
        r->in_allow = r->allow_said = true;
        return 0;
    }
    open = strchr(line, '"');
    close = strrchr(line, '"');
    if (strncmp(line, "[vm ", 4) != 0 || !open || close == open || close + 1 != end ||
        strspn(line + 4, " ") != (size_t)(open - line - 4))
        return failure_set(&r->failure, -EINVAL, "unknown section; there are [server], [allow] and [vm \"NAME\"]");
    name = strndup(open + 1, (size_t)(close - open - 1));
    if (!name)
        return failure_set(&r->failure, -ENOMEM, "out of memory");
    if (config_find_vm(r->c, name))
        return failure_set(&r->failure, -EINVAL, "the VM \"%s\" is there twice", name);
    vm = config_add_vm(r->c, name, &r->failure);
    if (!vm)
        return r->failure.err;
    vm->line = r->spot.line;
    r->vm = r->c->nvms;
    return 0;
}

static bool is_unfinished(struct reader *r)
{
    if (!r->unfinished.err || r->failure.err)
        return false;
    r->failure = r->unfinished;
    r->spot.line = r->unfinished_line;
    return true;
}

#define UTF8_BOM "\xef\xbb\xbf" /* inih skips it, too */

static char *read_line(char *line, int size, void *arg)
{
    struct reader *r = arg;
    const char *s;
    size_t len;

    if (r->failure.err || !fgets(line, size, r->file))
        return NULL;
    r->spot.line++;
    len = strlen(line);
    if (len + 1 == (size_t)size && line[len - 1] != '\n') {
        (void)failure_set(&r->failure, -EINVAL,
                          "the line is longer than %d bytes; a value can go on in an indented line", size - 2);
        return NULL;
    }
    s = line + (r->spot.line == 1 && strncmp(line, UTF8_BOM, 3) == 0 ? 3 : 0);
    r->goes_on = isblank((unsigned char)*s);
    s += strspn(s, " \t");
    if (!r->goes_on && !strchr("\r\n;#", *s) && is_unfinished(r)) /* "" is in there, too */
        return NULL;
    if (*s == '[' && begin_section(r, s) < 0)
        return NULL;
    return line;
}

static int name_key(struct reader *r, const char *key)
{
    struct failure why = r->failure;

    r->failure.err = 0;
    return failure_set(&r->failure, why.err, "\"%s\": %s", key, why.text);
}

/* A JSON object may be too long for one line. */
static int set_scratch(struct reader *r, const char *value)
{
    struct config_vm *vm = r->vm ? &r->c->vms[r->vm - 1] : NULL;
    char *text = NULL;
    int result;

    if (!r->goes_on && (vm ? vm->scratch_said : r->c->line_in_file[ROW_SCRATCH]))
        return failure_set(&r->failure, -EINVAL, "\"scratch\" is there twice");
    if (vm)
        vm->scratch_said = true;
    else
        r->c->line_in_file[ROW_SCRATCH] = r->spot.line;
    if (asprintf(&text, "%s%s%s", r->goes_on ? r->scratch : "", r->goes_on ? " " : "", value) < 0)
        return failure_set(&r->failure, -ENOMEM, "out of memory");
    if (r->goes_on && !place_is_meant(text)) {
        free(text);
        return failure_set(&r->failure, -EINVAL, "the value of \"scratch\" may not go on in a second line");
    }
    free(r->scratch);
    r->scratch = text;
    memset(&r->unfinished, 0, sizeof(r->unfinished));
    result = vm ? config_set_scratch(/* dir= */ NULL, &vm->place, text, &r->failure)
                : config_set_scratch(&r->c->scratch, &r->c->place, text, &r->failure);
    if (result == 0)
        return 0;
    (void)name_key(r, "scratch");
    if (result != -EAGAIN)
        return r->failure.err;
    r->unfinished = r->failure;
    r->unfinished_line = r->spot.line;
    memset(&r->failure, 0, sizeof(r->failure));
    return 0;
}

/* WHO = VM-GLOB…; inih has cut the line at its first ":" or "=", which a WHO may have. */
static int allow(struct reader *r, const char *key, const char *value)
{
    _cleanup_free_ char *rule = NULL;

    if (asprintf(&rule, "%s%c%s", key, strchr(value, '=') ? ':' : '=', value) < 0)
        return failure_set(&r->failure, -ENOMEM, "out of memory");
    return access_add(&r->c->access, rule, &r->failure);
}

static int set_key(struct reader *r, const char *key, const char *value)
{
    if (r->in_server && strcmp(key, rows[ROW_SCRATCH].name) == 0)
        return set_scratch(r, value);
    if (r->in_server) {
        for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
            if (strcmp(rows[i].name, key) != 0 || (rows[i].flags & FLAG_ONLY))
                continue;
            if (r->c->line_in_file[i] && !(rows[i].flags & REPEATABLE))
                return failure_set(&r->failure, -EINVAL, "\"%s\" is there twice", key);
            r->c->line_in_file[i] = r->spot.line;
            if (set_row(r->c, (enum row)i, value, /* by_flag= */ false, &r->failure) < 0)
                return name_key(r, key);
            if (i == ROW_LISTEN)
                r->c->listeners[r->c->nlisteners - 1].line = r->spot.line;
            return 0;
        }
        return failure_set(&r->failure, -EINVAL, "unknown key \"%s\" in [server]", key);
    }
    if (r->in_allow)
        return allow(r, key, value);
    if (r->vm > 0) {
        struct config_vm *vm = &r->c->vms[r->vm - 1];
        if (strcmp(key, "qmp") == 0)
            return vm->qmp ? failure_set(&r->failure, -EINVAL, "\"qmp\" is there twice")
                           : config_set_path(&vm->qmp, value, &r->failure);
        if (strcmp(key, "disks") == 0)
            return config_set_disks(vm, value, r->goes_on, &r->failure);
        if (strcmp(key, "engine") == 0)
            return config_set_vm_engine(vm, value, &r->failure);
        if (strncmp(key, "disk.", 5) == 0)
            return config_set_rename(vm, key + 5, value, &r->failure);
        if (strncmp(key, "image.", 6) == 0)
            return config_set_image(vm, key + 6, value, /* by_flag= */ false, &r->failure);
        if (strcmp(key, "scratch") == 0)
            return set_scratch(r, value);
        if (strcmp(key, "qga") == 0)
            return vm->qga ? failure_set(&r->failure, -EINVAL, "\"qga\" is there twice")
                           : config_set_path(&vm->qga, value, &r->failure);
        if (strcmp(key, "quiesce") == 0 && vm->quiesce_said)
            return failure_set(&r->failure, -EINVAL, "\"quiesce\" is there twice");
        if (strcmp(key, "quiesce") == 0) {
            vm->quiesce_said = true;
            return config_set_quiesce(&vm->quiesce, value, &r->failure);
        }
        return failure_set(&r->failure, -EINVAL, "unknown key \"%s\" in [vm \"%s\"]", key, vm->name);
    }
    return failure_set(&r->failure, -EINVAL, "\"%s\" stands before any section", key);
}

#define INI_NAME_MAX 49 /* inih 55: longer keys are cut without a word */

/* inih's handler: 1 is fine, 0 is an error. */
static int on_key(void *arg, const char *section, const char *key, const char *value)
{
    struct reader *r = arg;

    if (r->failure.err)
        return 0;
    if (strlen(key) >= INI_NAME_MAX)
        return failure_set(&r->failure, -EINVAL, "the key \"%s…\" is too long", key) == 0;
    if (r->goes_on && strcmp(key, "disks") != 0 && strcmp(key, "scratch") != 0)
        return failure_set(&r->failure, -EINVAL, "the value of \"%s\" may not go on in a second line", key) == 0;
    return set_key(r, key, value) == 0;
}

static int read_file(struct server_config *c, const char *path, struct failure *f)
{
    struct reader r = {.c = c, .spot = {.file = path}};
    int line;

    r.file = fopen(path, "re");
    if (!r.file)
        return failure_set(f, -EINVAL, "%s: %s", path, strerror(errno));
    line = ini_parse_stream(read_line, &r, on_key, &r);
    if (!r.failure.err && ferror(r.file))
        (void)failure_set(&r.failure, -EINVAL, "cannot be read: %s", strerror(errno));
    (void)fclose(r.file);
    (void)is_unfinished(&r);
    free(r.scratch);
    if (!r.failure.err && line != 0) {
        r.spot.line = (unsigned)MAX(line, 1);
        (void)failure_set(&r.failure, -EINVAL, "this is neither a section nor KEY=VALUE");
    }
    if (r.failure.err)
        return failure_set(f, -EINVAL, "%s:%u: %s", path, r.spot.line, r.failure.text);
    return config_set_string(&c->file, path, f);
}

unsigned config_line_of(const struct server_config *c, const char *key)
{
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++)
        if (strcmp(rows[i].name, key) == 0 && !c->said_by_flag[i])
            return c->line_in_file[i];
    return 0;
}

/* -- flags --------------------------------------------------------------------------------------------------------- */
/* Walks argv; c NULL: only looks for --config and for what is wrong with the words themselves. */
static int walk_flags(struct server_config *c, int argc, char *const *argv, const char **ret_file, struct failure *f)
{
    struct option options[ARRAY_SIZE(rows) + 1] = {{0}};
    int choice;

    for (size_t i = 0; i < ARRAY_SIZE(rows); i++)
        options[i] = (struct option){rows[i].name, rows[i].flags & NO_VALUE ? no_argument : required_argument, NULL,
                                     256 + (int)i};
    optind = 0; /* glibc: begin anew */
    opterr = 0;
    while ((choice = getopt_long(argc, argv, "+:h", options, NULL)) != -1) {
        enum row row = (enum row)(choice - 256);
        struct failure why = {0};

        if (choice == ':')
            return failure_set(f, -EINVAL, "%s wants a value", argv[optind - 1]);
        if (choice == 'h') {
            row = ROW_HELP;
        } else if (choice < 256) {
            return failure_set(f, -EINVAL, "unknown or ambiguous flag %s", argv[optind - 1]);
        }
        if (!c) {
            if (row == ROW_CONFIG)
                *ret_file = optarg;
            continue;
        }
        if (c->said_by_flag[row] > 0 && !(rows[row].flags & (REPEATABLE | NO_VALUE)))
            return failure_set(f, -EINVAL, "--%s is there twice", rows[row].name);
        if (c->said_by_flag[row] < 2)
            c->said_by_flag[row]++;
        if (set_row(c, row, rows[row].flags & NO_VALUE ? NULL : optarg, /* by_flag= */ true, &why) < 0)
            return failure_set(f, why.err, "--%s: %s", rows[row].name, why.text);
    }
    if (optind < argc)
        return failure_set(f, -EINVAL, "what is \"%s\"? Every argument is a flag", argv[optind]);
    return 0;
}

int config_parse(int argc, char *const *argv, struct server_config **ret_config, struct failure *f)
{
    struct server_config *c = calloc(1, sizeof *c);
    const char *file = NULL;
    int r;

    if (!c)
        return failure_set(f, -ENOMEM, "out of memory");
    *c = (struct server_config){
        .control = strdup(CONFIG_CONTROL),
        .scratch = strdup(CONFIG_SCRATCH),
        .state = strdup(CONFIG_STATE),
        .storage_daemon = strdup(CONFIG_STORAGE_DAEMON),
        .linger_ms = CONFIG_LINGER_MS,
        .handshake_timeout_ms = CONFIG_HANDSHAKE_TIMEOUT_MS,
        .idle_timeout_ms = CONFIG_IDLE_TIMEOUT_MS,
        .max_pause_ms = CONFIG_MAX_PAUSE_MS,
        .session_timeout_ms = CONFIG_SESSION_TIMEOUT_MS,
        .max_connections = CONFIG_MAX_CONNECTIONS,
        .max_connections_per_client = CONFIG_MAX_CONNECTIONS_PER_CLIENT,
        .max_sessions_per_client = CONFIG_MAX_SESSIONS_PER_CLIENT,
        .begin_timeout_ms = CONFIG_BEGIN_TIMEOUT_MS,
        .scratch_reserve = CONFIG_SCRATCH_RESERVE,
        .shared_memory = CONFIG_SHARED_MEMORY,
        .cbw_timeout_s = CONFIG_CBW_TIMEOUT_S,
        .log_level = LOG_LEVEL_INFO,
        .sandbox = CONFIG_SANDBOX,
    };
    r = c->control && c->scratch && c->state && c->storage_daemon ? 0 : failure_set(f, -ENOMEM, "out of memory");
    if (r == 0)
        r = walk_flags(NULL, argc, argv, &file, f);
    for (int i = 1; r == 0 && i < argc; i++) /* help helps also where the file is broken */
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--version") == 0) {
            c->wish = strcmp(argv[i], "--version") == 0 ? CONFIG_VERSION : CONFIG_HELP;
            *ret_config = c;
            return 0;
        }
    if (r == 0 && !file && access(CONFIG_FILE, F_OK) == 0)
        file = CONFIG_FILE;
    if (r == 0 && file)
        r = read_file(c, file, f);
    if (r == 0)
        r = walk_flags(c, argc, argv, &file, f);
    if (r == 0 && c->nlisteners == 0)
        r = config_add_listener(c, CONFIG_LISTEN, f);
    for (size_t i = 0; r == 0 && i < c->nvms; i++)
        if (!c->vms[i].qmp && c->vms[i].nimages == 0 && c->vms[i].qga_by_flag && !c->vms[i].line)
            r = failure_set(f, -EINVAL, "--qga: there is no VM \"%s\"", c->vms[i].name);
        else if (!c->vms[i].qmp && c->vms[i].nimages == 0)
            r = failure_set(f, -EINVAL, "%s:%u: the VM \"%s\" has neither \"qmp\" nor an \"image.DISK\"", c->file,
                            c->vms[i].line, c->vms[i].name);
    if (r < 0) {
        config_free(c);
        return r;
    }
    *ret_config = c;
    return 0;
}

void config_free(struct server_config *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->nvms; i++)
        config_vm_done(&c->vms[i]);
    free(c->vms);
    config_drop_listeners(c);
    free(c->control);
    free(c->scratch);
    place_free(c->place);
    free(c->state);
    free(c->storage_daemon);
    free(c->pidfile);
    free(c->tls_certs);
    free(c->tls_psk);
    free(c->socket_group);
    free(c->user);
    free(c->file);
    access_done(&c->access);
    free(c);
}

void config_print_help(FILE *out)
{
    (void)fprintf(out, "Usage: qpulld [FLAG]…\n"
                       "Serves frozen views of the disks of QEMU guests over NBD.\n\n");
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++)
        if (rows[i].help) {
            char flag[64];
            (void)snprintf(flag, sizeof flag, "--%s %s", rows[i].name, rows[i].value);
            (void)fprintf(out, "  %-29s %s\n", flag, rows[i].help);
        }
    (void)fprintf(
        out, "\nThe same names without dashes stand in the file's section [server]; each section [vm \"NAME\"] has\n"
             "qmp=, qga=, quiesce=, disks=, disk.NAME=, image.DISK=, engine= and scratch=; a section [allow] has WHO = "
             "VM-GLOB.\n"
             "SIZE: bytes, or with K, M, G or T (powers of 1024) behind.\n"
             "Exit status: 0 done, 1 failed, 2 wrong usage.\n");
}
