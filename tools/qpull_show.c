/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpull_show: vms, disks, status. */
#include "qpull.h"

#include <inttypes.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define WATCH_MS 1000

static const char *or_dash(const char *text)
{
    return text && *text ? text : "-";
}

/* Asks one question without arguments and gives the daemon back. */
static enum exit_status ask_once(const struct args *args, const char *command, struct json_object **ret)
{
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d);

    if (status == EXIT_DONE)
        status = daemon_ask(d, ret, command, NULL);
    daemon_close(d);
    return status;
}

enum exit_status run_vms(const struct args *args)
{
    struct table t = {.ncolumns = 5, .columns = {{"VM"}, {"STATE"}, {"QEMU"}, {"SESSION"}, {"QMP SOCKET"}}};
    struct json_object *vms = NULL;
    enum exit_status status = ask_once(args, "query-vms", &vms);

    if (status != EXIT_DONE)
        return status;
    if (args->given & OPTION_JSON) {
        print_json(vms);
    } else {
        for (size_t i = 0; i < json_object_array_length(vms); i++) {
            struct json_object *vm = json_object_array_get_idx(vms, i);
            const char *reason = answer_text(vm, "reason");

            table_add(&t, "%s", or_dash(answer_text(vm, "name")));
            if (answer_bool(vm, "powered-off") && !reason)
                table_add(&t, "powered off, images %s", or_dash(answer_text(vm, "state")));
            else if (answer_bool(vm, "powered-off"))
                table_add(&t, "powered off: %s", reason);
            else if (answer_bool(vm, "connected"))
                table_add(&t, "connected");
            else
                table_add(&t, "not connected%s%s", reason ? ": " : "", reason ? reason : "");
            table_add(&t, "%s", or_dash(answer_text(vm, "qemu")));
            table_add(&t, "%s", or_dash(answer_text(vm, "session")));
            table_add(&t, "%s", or_dash(answer_text(vm, "qmp")));
        }
        table_print(&t);
    }
    table_done(&t);
    json_object_put(vms);
    return EXIT_DONE;
}

/* -- disks --------------------------------------------------------------------------------------------------------- */
static void add_disks(struct table *t, struct json_object *disks)
{
    char size[32];

    for (size_t i = 0; i < json_object_array_length(disks); i++) {
        struct json_object *d = json_object_array_get_idx(disks, i);
        struct json_object *checkpoints = answer_array(d, "checkpoints");
        size_t n = checkpoints ? json_object_array_length(checkpoints) : 0, nusable = 0;

        for (size_t k = 0; k < n; k++)
            nusable += answer_bool(json_object_array_get_idx(checkpoints, k), "usable");
        table_add(t, "%s/%s", or_dash(answer_text(d, "vm")), or_dash(answer_text(d, "name")));
        table_add(t, "%s", size_text(size, answer_number(d, "size")));
        table_add(t, "%s", or_dash(answer_text(d, "format")));
        table_add(t, "%s", or_dash(answer_text(d, "node")));
        if (n == 0)
            table_add(t, "-");
        else
            table_add(t, "%zu usable of %zu", nusable, n);
    }
}

/* One VM, or all that answer: one that is down must not hide the others. */
enum exit_status run_disks(const struct args *args)
{
    struct table t = {.ncolumns = 5, .columns = {{"EXPORT"}, {"SIZE", true}, {"FORMAT"}, {"NODE"}, {"CHECKPOINTS"}}};
    struct json_object *vms = NULL, *all = json_object_new_array();
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d), one;

    if (status == EXIT_DONE && args->nwords > 0) {
        vms = json_object_new_array();
        json_object_array_add(vms, json_object_new_object());
        json_object_object_add(json_object_array_get_idx(vms, 0), "name", json_object_new_string(args->words[0]));
    } else if (status == EXIT_DONE) {
        status = daemon_ask(d, &vms, "query-vms", NULL);
    }
    for (size_t i = 0; vms && i < json_object_array_length(vms); i++) {
        struct json_object *disks = NULL;
        const char *vm = answer_text(json_object_array_get_idx(vms, i), "name");

        one = vm ? daemon_ask(d, &disks, "query-disks", "vm", vm, NULL) : EXIT_FAILED;
        if (one != EXIT_DONE) {
            status = one;
            continue;
        }
        add_disks(&t, disks);
        for (size_t k = 0; k < json_object_array_length(disks); k++)
            json_object_array_add(all, json_object_get(json_object_array_get_idx(disks, k)));
        json_object_put(disks);
    }
    if (args->given & OPTION_JSON)
        print_json(all);
    else if (t.ncells > 0 || status == EXIT_DONE)
        table_print(&t);
    table_done(&t);
    json_object_put(vms);
    json_object_put(all);
    daemon_close(d);
    return status;
}

/* -- status -------------------------------------------------------------------------------------------------------- */
static void print_summary(struct json_object *status)
{
    struct json_object *listeners = answer_array(status, "listeners"), *buffers = NULL;
    char text[32], limit[32];

    printf("qpulld %s, pid %" PRIu64 ", up %s", or_dash(answer_text(status, "version")), answer_number(status, "pid"),
           time_text(text, answer_number(status, "uptime")));
    if (json_object_object_get_ex(status, "buffers", &buffers))
        printf(", buffers %s of %s", size_text(text, answer_number(buffers, "used")),
               size_text(limit, answer_number(buffers, "limit")));
    printf("%s\n", answer_bool(status, "stopping") ? ", ending" : "");
    for (size_t i = 0; listeners && i < json_object_array_length(listeners); i++)
        printf("listening on %s\n", json_object_get_string(json_object_array_get_idx(listeners, i)));
}

static void print_sessions(struct json_object *sessions)
{
    struct table t = {.ncolumns = 11,
                      .columns = {{"SESSION"},
                                  {"VM"},
                                  {"STATUS"},
                                  {"STEP"},
                                  {"CLIENT"},
                                  {"CHECKPOINT"},
                                  {"FROZEN"},
                                  {"QUIESCED"},
                                  {"PAUSE", true},
                                  {"SCRATCH", true},
                                  {"RATE", true}}};
    char text[32];

    if (json_object_array_length(sessions) == 0) {
        printf("\nno session\n");
        return;
    }
    for (size_t i = 0; i < json_object_array_length(sessions); i++) {
        struct json_object *s = json_object_array_get_idx(sessions, i);
        time_t frozen = (time_t)(answer_number(s, "frozen-at-ms") / 1000);
        struct tm tm;
        char date[32] = "-";

        if (frozen > 0 && localtime_r(&frozen, &tm))
            (void)strftime(date, sizeof date, "%Y-%m-%d %H:%M:%S", &tm);
        table_add(&t, "%s", or_dash(answer_text(s, "id")));
        table_add(&t, "%s", or_dash(answer_text(s, "vm")));
        table_add(&t, "%s%s%s", or_dash(answer_text(s, "status")), answer_bool(s, "lingering") ? ", lingers" : "",
                  json_object_object_get(s, "begun") ? ", begun" : "");
        table_add(&t, "%s", or_dash(answer_text(s, "step")));
        table_add(&t, "%s", or_dash(answer_text(s, "identity")));
        table_add(&t, "%s", or_dash(answer_text(s, "checkpoint")));
        table_add(&t, "%s", date);
        if (answer_bool(s, "quiesced"))
            table_add(&t, "%" PRIu64 " ms", answer_number(s, "quiesced-ms"));
        else
            table_add(&t, "%s", answer_text(s, "not-quiesced") ? "NO" : "-");
        if (frozen > 0)
            table_add(&t, "%.1f ms", (double)answer_number(s, "pause-us") / 1000);
        else
            table_add(&t, "-");
        table_add(&t, "%s", size_text(text, answer_number(s, "scratch-bytes")));
        if (answer_number(s, "rate") > 0)
            table_add(&t, "%s/s", size_text(text, answer_number(s, "rate")));
        else
            table_add(&t, "-");
    }
    printf("\n");
    table_print(&t);
    for (size_t i = 0; i < json_object_array_length(sessions); i++) {
        struct json_object *s = json_object_array_get_idx(sessions, i);
        const char *why = answer_text(s, "failure"), *not_quiesced = answer_text(s, "not-quiesced");

        if (why)
            printf("%s: %s\n", or_dash(answer_text(s, "id")), why);
        if (not_quiesced)
            printf("%s: not quiesced: %s\n", or_dash(answer_text(s, "id")), not_quiesced);
    }
    table_done(&t);
}

static void print_connections(struct json_object *connections)
{
    struct table t = {
        .ncolumns = 7,
        .columns = {
            {"CONNECTION"}, {"CLIENT"}, {"EXPORT"}, {"SESSION"}, {"SERVED", true}, {"REQUESTS", true}, {"TIME", true}}};
    char text[32];

    if (!connections || json_object_array_length(connections) == 0) {
        printf("\nno connection\n");
        return;
    }
    for (size_t i = 0; i < json_object_array_length(connections); i++) {
        struct json_object *c = json_object_array_get_idx(connections, i);

        table_add(&t, "c%" PRIu64, answer_number(c, "id"));
        table_add(&t, "%s", or_dash(answer_text(c, "client")));
        table_add(&t, "%s", answer_text(c, "export") ? answer_text(c, "export") : "(negotiating)");
        table_add(&t, "%s", or_dash(answer_text(c, "session")));
        table_add(&t, "%s", size_text(text, answer_number(c, "bytes")));
        table_add(&t, "%" PRIu64, answer_number(c, "requests"));
        table_add(&t, "%s", time_text(text, answer_number(c, "seconds")));
    }
    printf("\n");
    table_print(&t);
    table_done(&t);
}

/* Why the sessions before these did not end as their clients wished. */
static void print_past(struct json_object *vms)
{
    for (size_t i = 0; vms && i < json_object_array_length(vms); i++) {
        struct json_object *vm = json_object_array_get_idx(vms, i), *last = NULL;
        const char *why;

        if (!json_object_object_get_ex(vm, "last-session", &last) || !last)
            continue;
        why = answer_text(last, "failure") ? answer_text(last, "failure") : answer_text(last, "problems");
        if (why)
            printf("\nlast session of VM %s, %s: %s\n", or_dash(answer_text(vm, "name")),
                   or_dash(answer_text(last, "id")), why);
    }
}

static void print_status(struct json_object *both)
{
    struct json_object *status = json_object_object_get(both, "status"), *sessions = answer_array(both, "sessions");

    print_summary(status);
    if (sessions)
        print_sessions(sessions);
    print_past(answer_array(both, "vms"));
    print_connections(answer_array(status, "connections"));
}

static enum exit_status show_status(const struct args *args, struct daemon *d)
{
    struct json_object *both = json_object_new_object(), *status = NULL, *sessions = NULL, *vms = NULL;
    enum exit_status result = daemon_ask(d, &status, "query-status", NULL);

    if (result == EXIT_DONE)
        result = daemon_ask(d, &sessions, "query-sessions", NULL);
    if (result == EXIT_DONE)
        result = daemon_ask(d, &vms, "query-vms", NULL);
    json_object_object_add(both, "status", status);
    json_object_object_add(both, "sessions", sessions);
    json_object_object_add(both, "vms", vms);
    if (result == EXIT_DONE && (args->given & OPTION_JSON))
        print_json(both);
    else if (result == EXIT_DONE)
        print_status(both);
    json_object_put(both);
    return result;
}

#define CLEAR_SCREEN "\033[H\033[2J" /* ECMA-48: cursor home, erase all */

enum exit_status run_status(const struct args *args)
{
    bool on_terminal = isatty(STDOUT_FILENO) && !(args->given & OPTION_JSON);
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d);

    if (status == EXIT_DONE && !(args->given & OPTION_WATCH))
        status = show_status(args, d);
    while (status == EXIT_DONE && (args->given & OPTION_WATCH)) {
        if (on_terminal)
            printf(CLEAR_SCREEN);
        status = show_status(args, d);
        if (fflush(stdout) != 0) /* nobody looks any more */
            break;
        if (status == EXIT_DONE)
            status = daemon_wait(d, WATCH_MS);
    }
    daemon_close(d);
    return status;
}
