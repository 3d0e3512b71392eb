/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "catalog.h"
#include "backup/names.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>

struct catalog_query {
    struct vm_query query;
    struct catalog_ask *ask;
    struct vm *vm;
};

struct vm *catalog_vm(const struct catalog *c, const char *name)
{
    for (size_t i = 0; i < c->nvms; i++)
        if (strcmp(vm_name(c->vms[i]), name) == 0)
            return c->vms[i];
    return NULL;
}

char *catalog_size(char *to, size_t size, uint64_t bytes)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    size_t unit = 0;
    double n = (double)bytes;

    while (n >= 1024 && unit + 1 < ARRAY_SIZE(units)) {
        n /= 1024;
        unit++;
    }
    if (n == (double)(uint64_t)n)
        (void)snprintf(to, size, "%.0f %s", n, units[unit]);
    else
        (void)snprintf(to, size, "%.1f %s", n, units[unit]);
    return to;
}

static void free_entries(struct catalog_entry *entries, size_t nentries)
{
    for (size_t i = 0; i < nentries; i++) {
        free(entries[i].name);
        free(entries[i].description);
    }
    free(entries);
}

/* Frees what a question holds; the questions to the VMs are answered or forgotten. */
static void ask_done(struct catalog_ask *a)
{
    free_entries(a->entries, a->nentries);
    free(a->queries);
    free(a->name);
    a->entries = NULL;
    a->queries = NULL;
    a->name = NULL;
    a->nentries = a->nqueries = a->npending = 0;
    a->failure.err = 0;
}

void catalog_forget(struct catalog_ask *a)
{
    for (size_t i = 0; i < a->nqueries; i++)
        vm_query_forget(&a->queries[i].query);
    ask_done(a);
}

/* -- list ---------------------------------------------------------------------------------------------------------- */
static void add_disk(struct catalog_ask *a, struct vm *vm, const struct disk *d)
{
    struct catalog_entry *entries = reallocarray(a->entries, a->nentries + 1, sizeof *entries);
    struct catalog_entry *e;
    char size[32];
    size_t nusable = 0;

    if (!entries) {
        (void)failure_set(&a->failure, -ENOMEM, "out of memory");
        return;
    }
    a->entries = entries;
    e = &entries[a->nentries];
    for (size_t i = 0; i < d->ncheckpoints; i++)
        nusable += d->checkpoints[i].reason == REASON_NONE;
    if (asprintf(&e->name, "%s/%s", vm_name(vm), d->name) < 0) {
        (void)failure_set(&a->failure, -ENOMEM, "out of memory");
        return;
    }
    if (asprintf(&e->description, "%s disk of VM \"%s\", %s, %zu usable checkpoint%s", d->format, vm_name(vm),
                 catalog_size(size, sizeof size, d->size), nusable, nusable == 1 ? "" : "s") < 0)
        e->description = NULL;
    a->nentries++;
}

static void finish_list(struct catalog_ask *a)
{
    struct catalog_entry *entries = TAKE_PTR(a->entries);
    size_t nentries = a->nentries;

    a->nentries = 0;
    ask_done(a);
    a->on_list(a, entries, nentries); /* the question may be gone now, or be asked anew */
    free_entries(entries, nentries);
}

static void on_list_answer(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct catalog_query *mine = container_of(q, struct catalog_query, query);
    struct catalog_ask *a = mine->ask;

    /* A VM that cannot be asked now has no disks to offer; the log of its connection says why. */
    for (size_t i = 0; disks && i < disks->ndisks; i++)
        add_disk(a, mine->vm, &disks->disks[i]);
    if (--a->npending == 0)
        finish_list(a);
}

/* -- find ---------------------------------------------------------------------------------------------------------- */
/* VM/DISK or VM/DISK@NAME in the answer of its VM. A disk's own name may have an "@", a checkpoint's never. */
static const struct disk *find_disk(const struct disk_list *disks, const char *rest, const char **ret_checkpoint,
                                    struct failure *f)
{
    const struct disk *d = disk_list_find(disks, rest);
    _cleanup_free_ char *name = NULL;
    const char *at;

    *ret_checkpoint = NULL;
    if (d)
        return d;
    at = strrchr(rest, '@');
    if (!at)
        return NULL;
    if (name_check(at + 1, f) < 0)
        return NULL;
    name = strndup(rest, (size_t)(at - rest));
    if (!name) {
        (void)failure_set(f, -ENOMEM, "out of memory");
        return NULL;
    }
    *ret_checkpoint = at + 1;
    return disk_list_find(disks, name);
}

static void finish_find(struct catalog_ask *a, const struct catalog_hit *hit, const struct failure *f)
{
    struct failure why = {0};
    char *name = TAKE_PTR(a->name); /* hit may point into it */

    if (f)
        why = *f;
    ask_done(a);
    a->on_find(a, hit, hit ? NULL : &why); /* the question may be gone now */
    free(name);
}

static void on_find_answer(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct catalog_query *mine = container_of(q, struct catalog_query, query);
    struct catalog_ask *a = mine->ask;
    struct catalog_hit hit = {.vm = mine->vm};
    struct failure why = {0};
    const char *rest = strchr(a->name, '/') + 1;

    if (!disks) {
        finish_find(a, NULL, f);
        return;
    }
    hit.disk = find_disk(disks, rest, &hit.checkpoint, &why);
    if (!hit.disk) {
        (void)failure_set(
            &why, -ENOENT,
            "VM \"%s\" has no disk \"%.*s\"; NBD_OPT_LIST (nbdinfo --list) or `qpull disks %s` names its disks",
            vm_name(mine->vm), hit.checkpoint ? (int)(hit.checkpoint - 1 - rest) : (int)strlen(rest), rest,
            vm_name(mine->vm));
        finish_find(a, NULL, &why);
        return;
    }
    finish_find(a, &hit, NULL);
}

/* The one disk there is: asked once more, by its name, for its VM may be gone. */
static void find_only(struct catalog_ask *a)
{
    _cleanup_free_ char *name = TAKE_PTR(a->entries[0].name);
    struct failure why = {0};

    ask_done(a);
    if (catalog_find_start(a->catalog, a, name, &why) < 0)
        finish_find(a, NULL, &why);
}

/* The empty name: counts the disks of all VMs; a VM that cannot be asked may have any number. */
static void on_only_answer(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct catalog_query *mine = container_of(q, struct catalog_query, query);
    struct catalog_ask *a = mine->ask;

    if (!disks)
        (void)failure_copy(&a->failure, f);
    for (size_t i = 0; disks && i < disks->ndisks; i++)
        add_disk(a, mine->vm, &disks->disks[i]);
    if (--a->npending > 0)
        return;
    if (!a->failure.err && a->nentries == 1) {
        find_only(a);
        return;
    }
    (void)failure_set(&a->failure, -ENOENT,
                      "the empty export name means the only disk, but there are %zu; name one as VM/DISK, "
                      "NBD_OPT_LIST (nbdinfo --list) names them all",
                      a->nentries);
    finish_find(a, NULL, &a->failure);
}

/* -- both ---------------------------------------------------------------------------------------------------------- */
static bool sees(const struct catalog_ask *a, const struct vm *vm)
{
    return !a->sees || a->sees(a, vm);
}

typedef void query_fn(struct vm_query *q, const struct disk_list *disks, const struct failure *f);

static int ask_vms(struct catalog_ask *a, struct vm **vms, size_t nvms, query_fn *on_answer)
{
    a->queries = calloc(nvms + 1, sizeof *a->queries);
    if (!a->queries)
        return -ENOMEM;
    for (size_t i = 0; i < nvms; i++) {
        struct catalog_query *q = &a->queries[a->nqueries];
        int r;

        if (!sees(a, vms[i]))
            continue;
        q->ask = a;
        q->vm = vms[i];
        q->query.content_ns = a->name ? a->content_ns : 0;
        r = vm_query_start(vms[i], &q->query, on_answer, a);
        if (r == 0)
            a->nqueries++;
        else
            (void)failure_set(&a->failure, r, "VM \"%s\" cannot be asked for its disks: %s", vm_name(vms[i]),
                              r == -ENOMEM ? "out of memory" : vm_trouble(vms[i]));
    }
    a->npending = a->nqueries;
    return 0;
}

int catalog_list_start(const struct catalog *c, struct catalog_ask *a)
{
    int r;

    if (c->nvms == 0)
        return -ENOENT;
    r = ask_vms(a, c->vms, c->nvms, on_list_answer);
    if (r == 0 && a->npending == 0)
        r = -ENOTCONN;
    if (r < 0)
        catalog_forget(a);
    return r;
}

int catalog_unknown(const char *export_name, struct failure *f)
{
    return failure_set(f, -ENOENT,
                       "there is no export \"%s\": exports are named VM/DISK or VM/DISK@CHECKPOINT, "
                       "NBD_OPT_LIST (nbdinfo --list) names them",
                       export_name);
}

int catalog_find_start(const struct catalog *c, struct catalog_ask *a, const char *export_name, struct failure *f)
{
    const char *slash = strchr(export_name, '/');
    _cleanup_free_ char *vm_part = NULL;
    struct vm *vm = NULL;
    int r;

    if (*export_name && slash) {
        vm_part = strndup(export_name, (size_t)(slash - export_name));
        vm = vm_part ? catalog_vm(c, vm_part) : NULL;
        if (vm && !sees(a, vm))
            vm = NULL;
    }
    if (*export_name && !vm)
        return catalog_unknown(export_name, f);
    if (c->nvms == 0)
        return failure_set(f, -ENOENT, "there is no VM to export from");
    a->catalog = c;
    a->name = strdup(export_name);
    r = !a->name       ? -ENOMEM
        : *export_name ? ask_vms(a, &vm, 1, on_find_answer)
                       : ask_vms(a, c->vms, c->nvms, on_only_answer);
    if (r == 0 && a->npending == 0)
        r = a->failure.err ? a->failure.err : failure_set(&a->failure, -ENOENT, "there is no VM to export from");
    if (r < 0) {
        (void)failure_copy(f, &a->failure);
        (void)failure_set(f, r, "out of memory");
        catalog_forget(a);
    }
    return r;
}
