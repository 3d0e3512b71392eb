/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * qpull_checkpoint: what changes checkpoints and their notes, and what asks about them. Listing stands in
 * qpull_checkpoint_list.
 */
#include "qpull.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>

#define IMPORT_MAX (64u << 20) /* bytes of a document: all notes that one VM may have */

static void put_disks(struct json_object *o, const struct args *args)
{
    struct json_object *disks = json_object_new_array();

    for (size_t i = 0; i < args->ndisks; i++)
        json_object_array_add(disks, json_object_new_string(args->disks[i]));
    json_object_object_add(o, "disk", disks);
}

/* query is given. Says what was done, in the words of fmt about "words[1]" (or "words[0]" where there is one only). */
static enum exit_status change(const struct args *args, const char *command, struct json_object *query,
                               const char *what, const char *count, const char *done)
{
    struct json_object *answer = NULL;
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d);

    put_text(query, "vm", args->words[0]);
    if (status == EXIT_DONE)
        status = daemon_call(d, &answer, command, query);
    else
        json_object_put(query);
    if (status == EXIT_DONE && answer_text(answer, "warning"))
        (void)fprintf(stderr, "qpull: warning: %s\n", answer_text(answer, "warning"));
    if (status == EXIT_DONE && (args->given & OPTION_JSON)) {
        print_json(answer);
    } else if (status == EXIT_DONE) {
        uint64_t n = answer_number(answer, count);
        printf("%s: %" PRIu64 " %.*s%s %s\n", what, n, (int)strlen(count) - 1, count, n == 1 ? "" : "s", done);
    }
    json_object_put(answer);
    daemon_close(d);
    return status;
}

static enum exit_status change_checkpoint(const struct args *args, const char *command, struct json_object *query,
                                          const char *count, const char *done)
{
    char what[512];

    put_text(query, "name", args->words[1]);
    if (args->words[1])
        (void)snprintf(what, sizeof what, "checkpoint \"%s\" of VM \"%s\"", args->words[1], args->words[0]);
    else
        (void)snprintf(what, sizeof what, "VM \"%s\"", args->words[0]);
    return change(args, command, query, what, count, done);
}

enum exit_status run_checkpoint_create(const struct args *args)
{
    struct json_object *query = json_object_new_object();

    put_disks(query, args);
    put_text(query, "description", args->description);
    put_text(query, "parent", args->parent);
    return change_checkpoint(args, "checkpoint-create", query, "records", "begun");
}

enum exit_status run_checkpoint_delete(const struct args *args)
{
    static const struct {
        unsigned bit;
        const char *what;
    } kinds[] = {
        {OPTION_WITH_DESCENDANTS, "with-descendants"}, {OPTION_DESCENDANTS, "descendants"}, {OPTION_NOTE_ONLY, "note"}};
    struct json_object *query = json_object_new_object();
    const char *what = NULL;

    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
        if (!(args->given & kinds[i].bit))
            continue;
        if (what) {
            json_object_put(query);
            (void)complain("one of --with-descendants, --descendants and --note-only");
            return EXIT_USAGE;
        }
        what = kinds[i].what;
    }
    if (args->ndisks)
        put_disks(query, args);
    put_text(query, "what", what);
    return change_checkpoint(args, "checkpoint-delete", query, args->given & OPTION_NOTE_ONLY ? "notes" : "records",
                             "removed");
}

enum exit_status run_checkpoint_adopt(const struct args *args)
{
    struct json_object *query = json_object_new_object();

    put_text(query, "description", args->description);
    put_text(query, "parent", args->parent);
    if (args->given & OPTION_ACCEPT)
        json_object_object_add(query, "accept", json_object_new_boolean(true));
    return change_checkpoint(args, "checkpoint-adopt", query, "notes", "written");
}

enum exit_status run_checkpoint_invalidate(const struct args *args)
{
    struct json_object *query = json_object_new_object();
    char what[512];

    put_text(query, "disk", args->words[1]);
    (void)snprintf(what, sizeof what, "the checkpoints of VM \"%s\", disk \"%s\"", args->words[0], args->words[1]);
    return change(args, "checkpoint-invalidate", query, what, "disks", "invalid");
}

enum exit_status run_checkpoint_rename_vm(const struct args *args)
{
    struct args swapped = *args;
    struct json_object *query = json_object_new_object();
    char what[512];

    put_text(query, "from", args->words[0]);
    swapped.words[0] = args->words[1];
    (void)snprintf(what, sizeof what, "VM \"%s\", which was \"%s\"", args->words[1], args->words[0]);
    return change(&swapped, "checkpoint-rename-vm", query, what, "notes", "taken over");
}

/* -- documents ----------------------------------------------------------------------------------------------------- */

enum exit_status run_checkpoint_export(const struct args *args)
{
    struct json_object *answer = NULL;
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d);

    if (status == EXIT_DONE)
        status = daemon_ask(d, &answer, "checkpoint-export", "vm", args->words[0], NULL);
    if (status == EXIT_DONE)
        print_json(answer);
    json_object_put(answer);
    daemon_close(d);
    return status;
}

/* NULL: the sentence is said. */
static struct json_object *read_document(const char *path)
{
    FILE *in = strcmp(path, "-") == 0 ? stdin : fopen(path, "re");
    enum json_tokener_error error = json_tokener_continue;
    struct json_tokener *t = json_tokener_new();
    struct json_object *doc = NULL;
    char buffer[65536];
    size_t n, total = 0;

    if (!in || !t) {
        (void)complain("%s: %s", path, strerror(in ? ENOMEM : errno));
        json_tokener_free(t);
        return NULL;
    }
    while (error == json_tokener_continue && (n = fread(buffer, 1, sizeof buffer, in)) > 0 &&
           (total += n) <= IMPORT_MAX) {
        doc = json_tokener_parse_ex(t, buffer, (int)n);
        error = json_tokener_get_error(t);
    }
    if (ferror(in))
        (void)complain("%s: cannot be read", path);
    else if (total > IMPORT_MAX)
        (void)complain("%s: more than %u bytes", path, IMPORT_MAX);
    else if (error != json_tokener_success || !json_object_is_type(doc, json_type_object))
        (void)complain("%s: not a document of \"checkpoint export\" (%s)", path,
                       error == json_tokener_continue ? "it ends too early" : json_tokener_error_desc(error));
    if (ferror(in) || total > IMPORT_MAX || error != json_tokener_success ||
        !json_object_is_type(doc, json_type_object)) {
        json_object_put(doc);
        doc = NULL;
    }
    json_tokener_free(t);
    if (in != stdin)
        (void)fclose(in);
    return doc;
}

enum exit_status run_checkpoint_import(const struct args *args)
{
    struct json_object *doc = read_document(args->words[1]), *query;
    char what[512];

    if (!doc)
        return EXIT_FAILED;
    query = json_object_new_object();
    json_object_object_add(query, "document", doc);
    (void)snprintf(what, sizeof what, "VM \"%s\"", args->words[0]);
    return change(args, "checkpoint-import", query, what, "notes", "written");
}

/* -- the dry run --------------------------------------------------------------------------------------------------- */

static bool is_meant(const struct args *args, const char *disk)
{
    for (size_t i = 0; i < args->ndisks; i++) {
        if (strcmp(args->disks[i], disk) == 0)
            return true;
    }
    return args->ndisks == 0;
}

/* Of several disks those that are meant; the answer is changed in place. */
static enum exit_status choose_disks(const struct args *args, struct json_object *verdicts)
{
    size_t nfound = 0;

    for (size_t i = json_object_array_length(verdicts); i-- > 0;) {
        const char *disk = answer_text(json_object_array_get_idx(verdicts, i), "disk");

        if (disk && is_meant(args, disk))
            nfound++;
        else
            json_object_array_del_idx(verdicts, i, 1);
    }
    return nfound >= args->ndisks ? EXIT_DONE : complain("VM \"%s\" has not all of these disks", args->words[0]);
}

enum exit_status run_checkpoint_can_increment(const struct args *args)
{
    struct table t = {.ncolumns = 4, .columns = {{"DISK"}, {"VERDICT"}, {"CHANGED", true}, {"REASON"}}};
    struct json_object *verdicts = NULL;
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d);
    bool all = true;
    char text[32];

    if (status == EXIT_DONE)
        status = daemon_ask(d, &verdicts, "can-increment", "vm", args->words[0], "name", args->words[1], NULL);
    if (status == EXIT_DONE)
        status = choose_disks(args, verdicts);
    for (size_t i = 0; status == EXIT_DONE && i < json_object_array_length(verdicts); i++) {
        struct json_object *v = json_object_array_get_idx(verdicts, i);
        const char *verdict = answer_text(v, "verdict"), *why = answer_text(v, "text");
        bool incremental = verdict && strcmp(verdict, "incremental") == 0;

        all &= incremental;
        table_add(&t, "%s", answer_text(v, "disk") ? answer_text(v, "disk") : "-");
        table_add(&t, "%s", verdict ? verdict : "-");
        table_add(&t, "%s", incremental ? size_text(text, answer_number(v, "dirty-bytes")) : "-");
        if (incremental)
            table_add(&t, "-");
        else
            table_add(&t, "%s: %s", answer_text(v, "reason") ? answer_text(v, "reason") : "?", why ? why : "?");
    }
    if (status == EXIT_DONE && (args->given & OPTION_JSON))
        print_json(verdicts);
    else if (status == EXIT_DONE)
        table_print(&t);
    table_done(&t);
    json_object_put(verdicts);
    daemon_close(d);
    return status == EXIT_DONE && !all ? EXIT_FAILED : status;
}
