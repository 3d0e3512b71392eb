/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpull_doctor: the daemon's checks as a table; what is wrong makes the exit status. */
#include "qpull.h"

#include <stdio.h>

static void add_row(struct table *t, struct json_object *check)
{
    const char *vm = answer_text(check, "vm"), *disk = answer_text(check, "disk"),
               *advice = answer_text(check, "advice");
    const char *verdict = answer_text(check, "verdict");

    table_add(t, "%s", verdict && strcmp(verdict, "wrong") == 0 ? "WRONG" : verdict ? verdict : "-");
    table_add(t, "%s%s%s", vm ? vm : "qpulld", disk ? "/" : "", disk ? disk : "");
    table_add(t, "%s", answer_text(check, "check") ? answer_text(check, "check") : "-");
    table_add(t, "%s", answer_text(check, "text") ? answer_text(check, "text") : "-");
    if (!advice)
        return;
    for (unsigned i = 0; i < 3; i++)
        table_add(t, "%s", "");
    table_add(t, "-> %s", advice);
}

enum exit_status run_doctor(const struct args *args)
{
    struct table t = {.ncolumns = 4, .columns = {{"IS"}, {"WHERE"}, {"CHECK"}, {"WHAT"}}};
    struct json_object *checks = NULL;
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d);
    size_t nwrong = 0, n;

    if (status == EXIT_DONE)
        status = daemon_ask(d, &checks, "doctor", "vm", args->nwords ? args->words[0] : NULL, NULL);
    daemon_close(d);
    if (status != EXIT_DONE)
        return status;
    n = json_object_is_type(checks, json_type_array) ? json_object_array_length(checks) : 0;
    for (size_t i = 0; i < n; i++) {
        struct json_object *check = json_object_array_get_idx(checks, i);
        const char *verdict = answer_text(check, "verdict");

        nwrong += verdict && strcmp(verdict, "wrong") == 0;
        add_row(&t, check);
    }
    if (args->given & OPTION_JSON) {
        print_json(checks);
    } else {
        table_print(&t);
        if (nwrong)
            printf("\n%zu of %zu checks: something is wrong\n", nwrong, n);
        else
            printf("\nall is well\n");
    }
    table_done(&t);
    json_object_put(checks);
    return nwrong ? EXIT_FAILED : EXIT_DONE;
}
