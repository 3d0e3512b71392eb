/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpull_checkpoint: checkpoint list, create, delete. */
#include "qpull.h"

#include <inttypes.h>
#include <stdio.h>

static void print_list(struct json_object *checkpoints)
{
    struct table t = {.ncolumns = 5,
                      .columns = {{"CHECKPOINT"}, {"DISK"}, {"CHANGED", true}, {"GRAIN", true}, {"STATE"}}};
    char text[32];

    for (size_t i = 0; i < json_object_array_length(checkpoints); i++) {
        struct json_object *c = json_object_array_get_idx(checkpoints, i);
        const char *reason = answer_text(c, "reason"), *why = answer_text(c, "text");
        bool usable = answer_bool(c, "usable");

        table_add(&t, "%s", answer_text(c, "name") ? answer_text(c, "name") : "-");
        table_add(&t, "%s", answer_text(c, "disk") ? answer_text(c, "disk") : "-");
        table_add(&t, "%s", usable ? size_text(text, answer_number(c, "dirty-bytes")) : "-");
        table_add(&t, "%s", size_text(text, answer_number(c, "granularity")));
        if (usable)
            table_add(&t, "usable");
        else
            table_add(&t, "%s%s%s", reason ? reason : "?", why ? ": " : "", why ? why : "");
    }
    table_print(&t);
    table_done(&t);
}

enum exit_status run_checkpoint_list(const struct args *args)
{
    struct json_object *checkpoints = NULL;
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d);

    if (status == EXIT_DONE)
        status = daemon_ask(d, &checkpoints, "query-checkpoints", "vm", args->words[0], "disk", args->disk, NULL);
    if (status == EXIT_DONE && (args->given & OPTION_JSON))
        print_json(checkpoints);
    else if (status == EXIT_DONE)
        print_list(checkpoints);
    json_object_put(checkpoints);
    daemon_close(d);
    return status;
}

static enum exit_status change(const struct args *args, const char *command, const char *done)
{
    struct json_object *answer = NULL;
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d);

    if (status == EXIT_DONE)
        status =
            daemon_ask(d, &answer, command, "vm", args->words[0], "name", args->words[1], "disk", args->disk, NULL);
    if (status == EXIT_DONE && (args->given & OPTION_JSON)) {
        print_json(answer);
    } else if (status == EXIT_DONE) {
        uint64_t n = answer_number(answer, "records");
        printf("checkpoint \"%s\" of VM \"%s\": %" PRIu64 " record%s %s\n", args->words[1], args->words[0], n,
               n == 1 ? "" : "s", done);
    }
    json_object_put(answer);
    daemon_close(d);
    return status;
}

enum exit_status run_checkpoint_create(const struct args *args)
{
    return change(args, "checkpoint-create", "begun");
}

enum exit_status run_checkpoint_delete(const struct args *args)
{
    return change(args, "checkpoint-delete", "removed");
}
