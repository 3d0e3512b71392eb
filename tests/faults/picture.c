/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "die.h"
#include "guest.h"
#include "qmp/commands.h"

#include <dirent.h>
#include <stdio.h>
#include <unistd.h>

#define MAX_LINES 1024

struct lines {
    char *line[MAX_LINES]; /* owned */
    size_t n;
};

static void add(struct lines *l, const char *fmt, ...) _printf_(2, 3);
static void add(struct lines *l, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    if (l->n == MAX_LINES || vasprintf(&l->line[l->n++], fmt, ap) < 0)
        die("the picture of the block layer has too many lines");
    va_end(ap);
}

static struct json_object *ask(struct guest *g, const char *command)
{
    return guest_call(g, NULL, "{'execute':'%s'}", command);
}

static const char *text_of(struct json_object *o, const char *key)
{
    return qmp_get_string(o, key) ?: "-";
}

/* The test's own record, and a checkpoint as it is to be: whether it may be there is judged by
 * guest_check_checkpoint(). */
static bool is_expected(struct json_object *b)
{
    const char *name = text_of(b, "name");
    bool records = qmp_get_bool(b, "recording") && !qmp_get_bool(b, "busy") && !qmp_get_bool(b, "inconsistent");

    return strcmp(name, GUEST_RECORD) == 0 ||
           (strcmp(name, GUEST_CHECKPOINT) == 0 && records && qmp_get_bool(b, "persistent"));
}

static void add_nodes(struct lines *l, struct guest *g)
{
    struct json_object *nodes = guest_call(g, NULL, "{'execute':'query-named-block-nodes','arguments':{'flat':true}}");

    for (size_t i = 0; i < qmp_array_length(nodes); i++) {
        struct json_object *n = json_object_array_get_idx(nodes, i), *bitmaps = qmp_get(n, "dirty-bitmaps");
        const char *name = text_of(n, "node-name");

        /* QEMU names file nodes below qcow2 by a running number ("#block123"): it stays while the node does. */
        add(l, "node %s %s %s ro=%d", name, text_of(n, "drv"), text_of(n, "file"), qmp_get_bool(n, "ro"));
        for (size_t k = 0; k < qmp_array_length(bitmaps); k++) {
            struct json_object *b = json_object_array_get_idx(bitmaps, k);

            if (is_expected(b))
                continue;
            add(l, "bitmap %s %s recording=%d busy=%d persistent=%d inconsistent=%d granularity=%lld", name,
                text_of(b, "name"), qmp_get_bool(b, "recording"), qmp_get_bool(b, "busy"),
                qmp_get_bool(b, "persistent"), qmp_get_bool(b, "inconsistent"),
                (long long)qmp_get_int(b, "granularity"));
        }
    }
    json_object_put(nodes);
}

static const char *name_of_id(struct json_object *nodes, int64_t id)
{
    for (size_t i = 0; i < qmp_array_length(nodes); i++) {
        struct json_object *n = json_object_array_get_idx(nodes, i);

        if (qmp_get_int(n, "id") == id)
            return text_of(n, "name");
    }
    return "?";
}

static void add_graph(struct lines *l, struct guest *g)
{
    struct json_object *graph = ask(g, "x-debug-query-block-graph"), *nodes = qmp_get(graph, "nodes"),
                       *edges = qmp_get(graph, "edges");

    for (size_t i = 0; i < qmp_array_length(edges); i++) {
        struct json_object *e = json_object_array_get_idx(edges, i);

        add(l, "edge %s -%s-> %s", name_of_id(nodes, qmp_get_int(e, "parent")), text_of(e, "name"),
            name_of_id(nodes, qmp_get_int(e, "child")));
    }
    json_object_put(graph);
}

static void add_devices(struct lines *l, struct guest *g)
{
    struct json_object *devices = ask(g, "query-block");

    for (size_t i = 0; i < qmp_array_length(devices); i++) {
        struct json_object *d = json_object_array_get_idx(devices, i);

        add(l, "device %s on %s io-status=%s", text_of(d, "qdev"), text_of(qmp_get(d, "inserted"), "node-name"),
            text_of(d, "io-status"));
    }
    json_object_put(devices);
}

static void add_others(struct lines *l, struct guest *g)
{
    struct json_object *exports = ask(g, "query-block-exports"), *sets = ask(g, "query-fdsets"),
                       *jobs = ask(g, "query-jobs");
    struct json_object *status = ask(g, "query-status");

    for (size_t i = 0; i < qmp_array_length(exports); i++) {
        struct json_object *e = json_object_array_get_idx(exports, i);

        add(l, "export %s of %s shutting-down=%d", text_of(e, "id"), text_of(e, "node-name"),
            qmp_get_bool(e, "shutting-down"));
    }
    for (size_t i = 0; i < qmp_array_length(sets); i++) {
        struct json_object *s = json_object_array_get_idx(sets, i);

        add(l, "fdset %lld %s", (long long)qmp_get_int(s, "fdset-id"), json_object_to_json_string(qmp_get(s, "fds")));
    }
    for (size_t i = 0; i < qmp_array_length(jobs); i++)
        add(l, "job %s", text_of(json_object_array_get_idx(jobs, i), "id"));
    add(l, "vm %s", text_of(status, "status"));
    json_object_put(exports);
    json_object_put(sets);
    json_object_put(jobs);
    json_object_put(status);
}

/* Neither fd sets nor the graph show a descriptor that a monitor holds ("getfd"): QEMU's own table does. */
static void add_files(struct lines *l, const struct guest *g)
{
    char path[64];
    unsigned nfiles = 0, nsockets = 0;
    DIR *dir;

    (void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)g->pid);
    dir = opendir(path);
    for (const struct dirent *e; dir && (e = readdir(dir));) {
        char link[320], target[256] = "";

        (void)snprintf(link, sizeof(link), "%s/%s", path, e->d_name);
        if (readlink(link, target, sizeof(target) - 1) < 0)
            continue;
        nsockets += strncmp(target, "socket:", strlen("socket:")) == 0;
        nfiles += strstr(target, "(deleted)") != NULL;
    }
    if (dir)
        (void)closedir(dir);
    add(l, "QEMU holds %u sockets and %u unlinked files", nsockets, nfiles);
}

static void add_directories(struct lines *l, const struct guest *g)
{
    const char *const paths[] = {g->scratch, g->state};

    for (size_t i = 0; i < ARRAY_SIZE(paths); i++) {
        DIR *dir = opendir(paths[i]);

        for (const struct dirent *e; dir && (e = readdir(dir));) {
            /* What is remembered of the disks is meant to stay. */
            if (e->d_name[0] != '.' && strcmp(e->d_name, "lineage") != 0)
                add(l, "file %s/%s", strrchr(paths[i], '/') + 1, e->d_name);
        }
        if (dir)
            (void)closedir(dir);
    }
}

static int compare_lines(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static char *join(struct lines *l)
{
    size_t length = 1;
    char *text;

    for (size_t i = 0; i < l->n; i++)
        length += strlen(l->line[i]) + 1;
    text = malloc(length);
    if (!text)
        die("out of memory");
    *text = '\0';
    for (size_t i = 0, at = 0; i < l->n; i++) {
        at += (size_t)snprintf(text + at, length - at, "%s\n", l->line[i]);
        free(l->line[i]);
    }
    return text;
}

char *guest_picture(struct guest *g)
{
    struct lines l = {.n = 0};

    add_nodes(&l, g);
    add_graph(&l, g);
    add_devices(&l, g);
    add_others(&l, g);
    add_files(&l, g);
    add_directories(&l, g);
    qsort(l.line, l.n, sizeof(*l.line), compare_lines);
    return join(&l);
}

unsigned guest_count_fds(const struct guest *g)
{
    char path[64];
    unsigned n = 0;
    DIR *dir;

    (void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)g->pid);
    dir = opendir(path);
    while (dir && readdir(dir))
        n++;
    if (dir)
        (void)closedir(dir);
    return n;
}

char *guest_files(const struct guest *g)
{
    struct lines l = {.n = 0};

    add_directories(&l, g);
    return join(&l);
}

char *guest_difference(const char *before, const char *after)
{
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);

    if (!out)
        die("out of memory");
    while (*before || *after) {
        size_t nb = strcspn(before, "\n"), na = strcspn(after, "\n");
        int order = !*before ? 1 : !*after ? -1 : strncmp(before, after, MAX(nb, na) + 1);

        if (order < 0)
            (void)fprintf(out, "    -%.*s\n", (int)nb, before);
        else if (order > 0)
            (void)fprintf(out, "    +%.*s\n", (int)na, after);
        if (order <= 0)
            before += nb + 1;
        if (order >= 0)
            after += na + 1;
    }
    (void)fclose(out);
    if (length)
        return text;
    free(text);
    return NULL;
}
