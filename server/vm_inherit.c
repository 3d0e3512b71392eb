/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A VM that had another name: what was remembered of its disks under that name becomes part of what is remembered now.
 * The new memory is on disk before anything else moves and the old one goes last, so whichever name the VM has after
 * qpulld was killed in between, what is held against a checkpoint is known.
 */
#include "vm_internal.h"

#include <errno.h>

static void end(struct vm *vm, const struct failure *f)
{
    struct vm_heir *h = &vm->watch.heir;
    void (*cb)(struct vm *, void *, const struct failure *, const struct failure *) = h->cb;
    const struct failure warning = h->failure;
    void *arg = h->arg;

    lineage_free(TAKE_PTR(h->old));
    free(TAKE_PTR(h->from));
    *h = (struct vm_heir){0};
    cb(vm, arg, f, warning.err ? &warning : NULL);
    vm_stop_if_idle(vm);
}

static void on_stored(struct vm_watch_wait *wait, const struct failure *f)
{
    end(container_of(wait, struct vm, watch.heir.wait), f);
}

static void load_in_thread(uv_work_t *work)
{
    struct vm_heir *h = container_of(work, struct vm_heir, work);
    struct vm *vm = container_of(h, struct vm, watch.heir);

    (void)lineage_load(vm->state_dir, h->from, &h->old, &h->failure);
}

static void on_loaded(uv_work_t *work, int status)
{
    struct vm_heir *h = container_of(work, struct vm_heir, work);
    struct vm *vm = container_of(h, struct vm, watch.heir);
    struct failure f = {0};
    int r = h->old ? lineage_inherit(vm->watch.lineage, h->old) : -ENOMEM;

    if (r == 0)
        r = vm_watch_store(vm, &h->wait, on_stored);
    if (r < 0)
        (void)failure_set(&f, r, "what is remembered of the disks of VM '%s' cannot be taken over: %s", h->from,
                          r == -ENOMEM ? "out of memory" : "it is too much for one VM");
    if (r != 0)
        end(vm, r < 0 ? &f : NULL);
}

int vm_inherit_start(struct vm *vm, const char *from,
                     void (*cb)(struct vm *vm, void *arg, const struct failure *f, const struct failure *warning),
                     void *arg)
{
    struct vm_heir *h = &vm->watch.heir;
    int r;

    if (h->from)
        return -EBUSY;
    *h = (struct vm_heir){.from = strdup(from), .cb = cb, .arg = arg};
    r = h->from ? uv_queue_work(vm->loop, &h->work, load_in_thread, on_loaded) : -ENOMEM;
    if (r < 0)
        free(TAKE_PTR(h->from));
    return r;
}
