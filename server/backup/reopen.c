/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/reopen.h"

#include "backup/seq.h"
#include "qmp/commands.h"

#include <errno.h>

int reopen_init(struct reopen *r, struct qmp_client *qmp, const struct disk_list *disks, unsigned timeout_ms)
{
    r->disks = disks;
    calls_init(&r->calls, qmp, timeout_ms);
    r->done = calloc(disks->ndisks + 1, sizeof(*r->done));
    r->wanted = calloc(disks->ndisks + 1, sizeof(*r->wanted));
    return r->done && r->wanted ? 0 : -ENOMEM;
}

void reopen_done(struct reopen *r)
{
    free(TAKE_PTR(r->done));
    free(TAKE_PTR(r->wanted));
}

static int on_reopened(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    container_of(c, struct reopen, calls)->done[index] = true;
    return 0;
}

static void on_all(struct calls *c, const struct failure *f)
{
    struct reopen *r = container_of(c, struct reopen, calls);

    for (size_t i = 0; f && i < r->disks->ndisks; i++) {
        if (r->wanted[i] && !r->done[i])
            (void)failure_set(&r->failure, f->err, "the image of disk '%s' cannot be made %s: %s",
                              r->disks->disks[i].name, r->writable ? "writable" : "read-only again", f->text);
    }
    r->cb(r, r->failure.err ? &r->failure : NULL);
}

/* QEMU wants every child of a reopened node to be said again, by the name that it has now. */
static void add_one(struct reopen *r, unsigned i, struct json_object *graph)
{
    static const char *const roles[] = {"file", "backing", "data-file"};
    const struct disk *d = &r->disks->disks[i];
    struct json_object *args = qmp_args_reopen_image(d->top, d->format, r->writable);

    for (size_t k = 0; k < ARRAY_SIZE(roles); k++) {
        const char *child = graph_child(graph, d->top, roles[k]);

        if (child)
            qmp_args_reopen_child(args, roles[k], child);
    }
    calls_add(&r->calls, "blockdev-reopen", args, QMP_NO_FD, i, on_reopened);
}

static int on_graph(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    struct reopen *r = container_of(c, struct reopen, calls);

    for (unsigned i = 0; i < r->disks->ndisks; i++) {
        if (r->wanted[i])
            add_one(r, i, ret); /* the set goes on with them */
    }
    return 0;
}

int reopen_start(struct reopen *r, bool writable, struct failure *f)
{
    bool any = false;

    r->writable = writable;
    memset(&r->failure, 0, sizeof(r->failure));
    for (size_t i = 0; i < r->disks->ndisks; i++) {
        r->wanted[i] = r->wants(r, i);
        any |= r->wanted[i];
        r->done[i] = false;
    }
    if (!any)
        return SEQ_DONE;
    calls_add(&r->calls, "x-debug-query-block-graph", NULL, QMP_NO_FD, 0, on_graph);
    return calls_wait(&r->calls, on_all, f);
}
