/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * qpull_checkpoint_list: checkpoint list and show. qpulld tells of records, one per checkpoint and disk, parents before
 * children; whom that concerns is chosen here.
 */
#include "qpull.h"

#include <inttypes.h>
#include <stdio.h>
#include <time.h>

#define DEPTH_MAX 10000 /* generations: qpulld keeps no more notes of one VM */
#define MS_PER_S 1000

struct list {
    struct json_object *records; /* owned: as qpulld tells them */
    struct entry {
        bool chosen;
        size_t first;  /* of the same checkpoint */
        size_t parent; /* the first of its parent, or NONE */
        bool has_children;
    } * entries; /* owned: one per record */
};
#define NONE SIZE_MAX

static struct json_object *record(const struct list *l, size_t i)
{
    return json_object_array_get_idx(l->records, i);
}

static size_t nrecords(const struct list *l)
{
    return json_object_array_length(l->records);
}

static const char *name_of(const struct list *l, size_t i)
{
    const char *name = answer_text(record(l, i), "name");

    return name ? name : "-";
}

/* The first record of that checkpoint; NONE: there is none. */
static size_t find(const struct list *l, const char *name)
{
    for (size_t i = 0; name && i < nrecords(l); i++) {
        if (strcmp(name_of(l, i), name) == 0)
            return i;
    }
    return NONE;
}

static size_t lookup(struct json_object *index, const char *name)
{
    struct json_object *o = NULL;

    return name && json_object_object_get_ex(index, name, &o) ? json_object_get_uint64(o) : NONE;
}

/* Who is whose parent, once for all. */
static void relate(struct list *l)
{
    struct json_object *index = json_object_new_object();

    for (size_t i = 0; i < nrecords(l); i++) {
        l->entries[i].first = lookup(index, name_of(l, i));
        if (l->entries[i].first != NONE)
            continue;
        l->entries[i].first = i;
        json_object_object_add(index, name_of(l, i), json_object_new_uint64(i));
    }
    for (size_t i = 0; i < nrecords(l); i++) {
        l->entries[i].parent = lookup(index, answer_text(record(l, i), "parent"));
        if (l->entries[i].parent != NONE)
            l->entries[l->entries[i].parent].has_children = true;
    }
    json_object_put(index);
}

static bool descends(const struct list *l, size_t i, size_t from)
{
    unsigned n = 0;

    while ((i = l->entries[i].parent) != NONE && n++ < DEPTH_MAX) {
        if (i == from)
            return true;
    }
    return false;
}

/* of: the checkpoint that was named, or NONE */
static bool is_chosen(const struct list *l, const struct args *args, size_t i, size_t of)
{
    const struct entry *e = &l->entries[i];

    if (args->given & OPTION_ROOTS && e->parent != NONE)
        return false;
    if (args->given & OPTION_LEAVES && l->entries[e->first].has_children)
        return false;
    if (of == NONE)
        return true;
    if (args->given & OPTION_CHILDREN)
        return e->parent == of;
    if (args->given & OPTION_DESCENDANTS)
        return descends(l, i, of);
    return e->first == of;
}

/* -- output -------------------------------------------------------------------------------------------------------- */

static const char *date_text(char to[32], uint64_t ms)
{
    time_t s = (time_t)(ms / MS_PER_S);
    struct tm tm;

    if (ms == 0 || !localtime_r(&s, &tm) || !strftime(to, 32, "%Y-%m-%d %H:%M:%S", &tm))
        return "-";
    return to;
}

static const char *bytes_text(char to[32], const struct args *args, uint64_t bytes)
{
    if (!(args->given & OPTION_SIZE))
        return size_text(to, bytes);
    (void)snprintf(to, 32, "%" PRIu64, bytes);
    return to;
}

static void add_row(struct table *t, const struct args *args, const struct list *l, size_t i)
{
    struct json_object *c = record(l, i);
    const char *reason = answer_text(c, "reason"), *why = answer_text(c, "text");
    bool usable = answer_bool(c, "usable");
    char text[32];

    table_add(t, "%s%s", name_of(l, i), answer_bool(c, "current") ? " *" : "");
    table_add(t, "%s", answer_text(c, "disk") ? answer_text(c, "disk") : "-");
    table_add(t, "%s", date_text(text, answer_number(c, "created-ms")));
    table_add(t, "%s", usable ? bytes_text(text, args, answer_number(c, "dirty-bytes")) : "-");
    table_add(t, "%s", answer_number(c, "granularity") ? size_text(text, answer_number(c, "granularity")) : "-");
    if (usable)
        table_add(t, "usable");
    else
        table_add(t, "%s%s%s", reason ? reason : "?", why ? ": " : "", why ? why : "");
}

static void print_list(const struct args *args, const struct list *l)
{
    struct table t = {
        .ncolumns = 6,
        .columns = {{"CHECKPOINT"}, {"DISK"}, {"CREATED"}, {"CHANGED", true}, {"GRAIN", true}, {"STATE"}}};

    for (size_t i = 0; i < nrecords(l); i++) {
        if (l->entries[i].chosen)
            add_row(&t, args, l, i);
    }
    table_print(&t);
    table_done(&t);
}

/* "vda usable, vdb GAP" */
static void print_disks(const struct list *l, size_t first)
{
    const char *between = "  ";

    for (size_t i = first; i < nrecords(l); i++) {
        struct json_object *c = record(l, i);

        if (l->entries[i].first != first)
            continue;
        printf("%s%s %s", between, answer_text(c, "disk"),
               answer_bool(c, "usable") ? "usable" : answer_text(c, "reason"));
        between = ", ";
    }
    printf("\n");
}

/* Below `parent` (NONE: the roots), each with its own branch before its next sibling. */
static void print_tree(const struct list *l, size_t parent, unsigned depth)
{
    for (size_t i = 0; i < nrecords(l); i++) {
        if (l->entries[i].first != i || !l->entries[i].chosen || l->entries[i].parent != parent)
            continue;
        printf("%*s%s%s", (int)(2 * depth), "", name_of(l, i), answer_bool(record(l, i), "current") ? " *" : "");
        print_disks(l, i);
        if (depth < DEPTH_MAX)
            print_tree(l, i, depth + 1);
    }
}

static void print_chosen(const struct args *args, const struct list *l)
{
    struct json_object *out = json_object_new_array();

    for (size_t i = 0; i < nrecords(l); i++) {
        if (l->entries[i].chosen)
            json_object_array_add(out, json_object_get(record(l, i)));
    }
    print_json(out);
    json_object_put(out);
}

/* -- commands ------------------------------------------------------------------------------------------------------ */

static enum exit_status fetch(const struct args *args, struct list *l)
{
    struct daemon *d = NULL;
    enum exit_status status = daemon_open(args->control, &d);

    if (status == EXIT_DONE)
        status = daemon_ask(d, &l->records, "query-checkpoints", "vm", args->words[0], "disk",
                            args->ndisks == 1 ? args->disks[0] : NULL, NULL);
    daemon_close(d);
    if (status != EXIT_DONE)
        return status;
    l->entries = calloc(nrecords(l) + 1, sizeof *l->entries);
    if (!l->entries)
        return complain("out of memory");
    relate(l);
    return EXIT_DONE;
}

static void list_done(struct list *l)
{
    json_object_put(l->records);
    free(l->entries);
}

static bool wants_disk(const struct args *args, const char *disk)
{
    for (size_t i = 0; i < args->ndisks; i++) {
        if (disk && strcmp(args->disks[i], disk) == 0)
            return true;
    }
    return args->ndisks == 0;
}

static enum exit_status unknown(const struct args *args)
{
    return complain("VM \"%s\" has no checkpoint \"%s\"", args->words[0], args->words[1]);
}

enum exit_status run_checkpoint_list(const struct args *args)
{
    struct list l = {0};
    enum exit_status status;
    size_t of = NONE;

    if ((args->given & (OPTION_CHILDREN | OPTION_DESCENDANTS)) && args->nwords < 2) {
        (void)complain("--children and --descendants want the name of a checkpoint");
        return EXIT_USAGE;
    }
    if ((args->given & OPTION_TREE) && (args->given & (OPTION_JSON | OPTION_SIZE) || args->nwords > 1)) {
        (void)complain("--tree draws all checkpoints of a VM, for people");
        return EXIT_USAGE;
    }
    status = fetch(args, &l);
    if (status == EXIT_DONE && args->nwords > 1 && (of = find(&l, args->words[1])) == NONE)
        status = unknown(args);
    for (size_t i = 0; status == EXIT_DONE && i < nrecords(&l); i++)
        l.entries[i].chosen = is_chosen(&l, args, i, of) &&
                              (args->given & OPTION_TREE || wants_disk(args, answer_text(record(&l, i), "disk")));
    if (status == EXIT_DONE && (args->given & OPTION_JSON))
        print_chosen(args, &l);
    else if (status == EXIT_DONE && (args->given & OPTION_TREE))
        print_tree(&l, NONE, 0);
    else if (status == EXIT_DONE)
        print_list(args, &l);
    list_done(&l);
    return status;
}

static size_t current(const struct list *l)
{
    for (size_t i = 0; i < nrecords(l); i++) {
        if (answer_bool(record(l, i), "current"))
            return i;
    }
    return NONE;
}

static void print_one(const struct args *args, const struct list *l, size_t one)
{
    struct json_object *o = record(l, one);
    const char *parent = answer_text(o, "parent"), *description = answer_text(o, "description"), *between = "";
    char text[32];

    printf("checkpoint:  %s%s\n", name_of(l, one), answer_bool(o, "current") ? " (the current one)" : "");
    printf("created:     %s\n", date_text(text, answer_number(o, "created-ms")));
    if (description && *description)
        printf("description: %s\n", description);
    printf("parent:      %s\n", parent ? parent : "-");
    printf("children:    ");
    for (size_t i = 0; i < nrecords(l); i++) {
        if (l->entries[i].first != i || l->entries[i].parent != one)
            continue;
        printf("%s%s", between, name_of(l, i));
        between = ", ";
    }
    printf("%s\n", *between ? "" : "-");
    if (!answer_bool(o, "noted"))
        printf("It has no note: somebody else made it, or the notes are lost (see \"checkpoint adopt\").\n");
    printf("\n");
    print_list(args, l);
}

enum exit_status run_checkpoint_show(const struct args *args)
{
    struct list l = {0};
    enum exit_status status = fetch(args, &l);
    size_t one = NONE;

    if (status == EXIT_DONE && args->nwords == 1) {
        one = current(&l);
        if (one == NONE)
            status = complain("VM \"%s\" has no current checkpoint", args->words[0]);
    } else if (status == EXIT_DONE) {
        one = find(&l, args->words[1]);
        if (one == NONE)
            status = unknown(args);
    }
    for (size_t i = 0; status == EXIT_DONE && i < nrecords(&l); i++)
        l.entries[i].chosen = l.entries[i].first == l.entries[one].first;
    if (status == EXIT_DONE && (args->given & OPTION_JSON))
        print_chosen(args, &l);
    else if (status == EXIT_DONE)
        print_one(args, &l, one);
    list_done(&l);
    return status;
}
