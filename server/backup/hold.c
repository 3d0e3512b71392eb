/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/hold.h"

#include "qmp/commands.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

/* Linux: an argument list has 6 MiB at most by default (3/4 of _STK_LIM, fs/exec.c); QEMU's have some KiB. */
#define COMMAND_LINE_MAX ((size_t)1 << 20)

/* -- whether ------------------------------------------------------------------------------------------------------- */

static bool is_qemu(const char *program)
{
    const char *slash = strrchr(program, '/'), *name = slash ? slash + 1 : program;

    return strncmp(name, "qemu", 4) == 0 || strncmp(name, "kvm", 3) == 0;
}

static bool is_option(const char *word, const char *name)
{
    return *word == '-' && strcmp(word + (word[1] == '-' ? 2 : 1), name) == 0;
}

/* "a=b,KEY=VALUE,…" */
static bool says(const char *list, const char *key, const char *value)
{
    size_t nkey = strlen(key), nvalue = strlen(value);

    for (; list; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL) {
        if (strncmp(list, key, nkey) == 0 && list[nkey] == '=' && strncmp(list + nkey + 1, value, nvalue) == 0 &&
            (list[nkey + 1 + nvalue] == '\0' || list[nkey + 1 + nvalue] == ','))
            return true;
    }
    return false;
}

int hold_from_command_line(const char *words, size_t length, enum hold *ret_hold, struct failure *f)
{
    enum hold hold = HOLD_SHUTDOWN_AND_PANIC;
    const char *end = words + length, *before = "";

    /* The socket may have been made by a manager that passed it on (libvirt): then this is not QEMU's command line. */
    if (length == 0 || words[length - 1] || !is_qemu(words))
        return failure_set(f, -ENOTSUP,
                           "the process behind QEMU's monitor is no qemu that shows its command line, so what it does "
                           "when its guest shuts down is not known");
    for (const char *word = words; word < end; before = word, word += strlen(word) + 1) {
        if (is_option(word, "no-shutdown") || (is_option(before, "action") && says(word, "shutdown", "pause")))
            return failure_set(f, -ENOTSUP,
                               "QEMU was started with '%s%s%s': it waits by itself, and nobody but who "
                               "started it ends it",
                               is_option(before, "action") ? before : "", is_option(before, "action") ? " " : "", word);
        if (is_option(before, "action") && (says(word, "panic", "pause") || says(word, "panic", "none")))
            hold = HOLD_SHUTDOWN;
    }
    *ret_hold = hold;
    return 0;
}

/* In a worker thread: the file is made of QEMU's memory, which may have to come from swap. */
static void read_command_line(struct rig *r)
{
    _cleanup_free_ char *words = malloc(COMMAND_LINE_MAX);
    char path[64];
    size_t length = 0;
    ssize_t n = 0;
    int fd;

    (void)snprintf(path, sizeof(path), "/proc/%d/cmdline", (int)r->hold_pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    while (words && fd >= 0 && length < COMMAND_LINE_MAX &&
           (n = read(fd, words + length, COMMAND_LINE_MAX - length)) > 0)
        length += (size_t)n;
    if (!words)
        (void)failure_set(&r->hold_refused, -ENOMEM, "out of memory");
    else if (fd < 0 || n < 0 || length == COMMAND_LINE_MAX)
        (void)failure_set(&r->hold_refused, -ENOTSUP, "QEMU's command line cannot be read from '%s'", path);
    else
        (void)hold_from_command_line(words, length, &r->hold_found, &r->hold_refused);
    if (fd >= 0)
        (void)close(fd);
}

/* -- up ------------------------------------------------------------------------------------------------------------ */

static const char *mark(const struct rig *r, char name[NAMES_SIZE])
{
    return names_make(name, r->id, NAMES_HOLD, r->hold - HOLD_SHUTDOWN);
}

static void on_marked(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};

    if (f && f->err == -EREMOTEIO)
        r->hold = HOLD_NONE; /* there is no mark, and nothing was changed */
    if (f) {
        seq_done(&r->seq, f);
        return;
    }
    calls_add(c, "set-action", qmp_args_strings("shutdown", "pause", NULL), QMP_NO_FD, 0, NULL);
    rig_proceed(r, rig_wait(r, &next), &next);
}

static int on_status(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    const char *status = qmp_get_string(ret, "status");

    r->hold_over = status && (strcmp(status, "shutdown") == 0 ||
                              (r->hold != HOLD_SHUTDOWN && strcmp(status, "guest-panicked") == 0));
    return 0;
}

static void on_status_before(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};
    char name[NAMES_SIZE];

    if (!f && r->hold_over)
        (void)failure_set(&r->hold_refused, -ENOTSUP, "its guest is off already, and somebody wants QEMU to stay");
    if (f || r->hold_refused.err) {
        seq_done(&r->seq, f);
        return;
    }
    r->hold = r->hold_found;
    calls_add(c, "blockdev-add", qmp_args_blockdev_add_null(mark(r, name)), QMP_NO_FD, 0, NULL);
    rig_proceed(r, calls_wait(c, on_marked, &next), &next);
}

static void after_command_line(struct rig *r)
{
    struct failure f = {0};

    if (r->hold_refused.err) {
        seq_done(&r->seq, NULL);
        return;
    }
    calls_add(&r->calls, "query-status", NULL, QMP_NO_FD, 0, on_status);
    rig_proceed(r, calls_wait(&r->calls, on_status_before, &f), &f);
}

int rig_hold(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);

    if (!r->hold_wanted)
        return SEQ_DONE;
    r->hold_pid = qmp_client_peer_pid(r->qmp);
    return rig_work(r, read_command_line, after_command_line, f);
}

/* -- down ---------------------------------------------------------------------------------------------------------- */

static void released(struct rig *r, const struct failure *f)
{
    if (!f)
        r->hold = HOLD_NONE;
    seq_done(&r->seq, f);
}

static int on_nodes(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    char name[NAMES_SIZE];

    for (size_t i = 0; i < qmp_array_length(ret); i++) {
        const char *node = qmp_get_string(json_object_array_get_idx(ret, i), "node-name");

        if (node && strcmp(node, mark(r, name)) == 0)
            return failure_copy(f, &r->first);
    }
    return 0;
}

static void on_looked_up(struct calls *c, const struct failure *f)
{
    released(rig_of_calls(c), f);
}

static void on_unmarked(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};
    int result;

    if (!f || f->err != -EREMOTEIO) {
        released(r, f);
        return;
    }
    r->first = *f; /* that of a mark which is not there is none */
    calls_add(c, "query-named-block-nodes", qmp_args_query_named_block_nodes(), QMP_NO_FD, 0, on_nodes);
    result = calls_wait(c, on_looked_up, &next);
    if (result != 0)
        released(r, &next);
}

static void on_quit(struct calls *c, const struct failure *f)
{
    /* QEMU may be gone before it has answered. */
    released(rig_of_calls(c), f && f->err != -ECONNRESET ? f : NULL);
}

/* From here on QEMU ends by itself when its guest shuts down, so what it is now is what we have held, or not. */
static void on_action_back(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};
    char name[NAMES_SIZE];
    int result;

    if (f) {
        seq_done(&r->seq, f);
        return;
    }
    if (r->hold_over)
        calls_add(c, "quit", NULL, QMP_NO_FD, 0, NULL);
    else
        calls_add(c, "blockdev-del", qmp_args_strings("node-name", mark(r, name), NULL), QMP_NO_FD, 0, NULL);
    result = calls_wait(c, r->hold_over ? on_quit : on_unmarked, &next);
    if (result != 0)
        seq_done(&r->seq, &next);
}

int rig_no_hold(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);

    if (r->hold == HOLD_NONE)
        return SEQ_DONE;
    calls_add(&r->calls, "set-action", qmp_args_strings("shutdown", "poweroff", NULL), QMP_NO_FD, 0, NULL);
    calls_add(&r->calls, "query-status", NULL, QMP_NO_FD, 0, on_status);
    return calls_wait(&r->calls, on_action_back, f);
}
