/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "roster.h"
#include "log.h"

#include <errno.h>

struct roster_vm {
    struct roster *roster;
    struct vm *vm;
    const struct config_vm *from; /* borrowed, or … */
    struct config_vm *own;        /* … owned: what came later than the daemon's start */
    struct config_vm *next;       /* owned: what the name stands for when this VM is gone; NULL: nothing */
    bool leaves;                  /* as soon as nobody uses it */
    bool stopping;                /* vm_stop() was said */
};

static void config_free_vm(struct config_vm *c)
{
    if (c)
        config_vm_done(c);
    free(c);
}

/* Who asks sees the same order as ever: that of the configuration, later ones behind. */
static void publish(struct roster *r)
{
    r->catalog.nvms = 0;
    for (size_t i = 0; i < r->nvms; i++)
        if (!r->vms[i]->stopping)
            r->catalog.vms[r->catalog.nvms++] = r->vms[i]->vm;
}

static int make_room(struct roster *r, size_t n)
{
    struct roster_vm **vms = reallocarray(r->vms, n + 1, sizeof(struct roster_vm *));
    struct vm **published;

    if (!vms)
        return -ENOMEM;
    r->vms = vms;
    published = reallocarray(r->catalog.vms, n + 1, sizeof(struct vm *));
    if (!published)
        return -ENOMEM;
    r->catalog.vms = published;
    return 0;
}

/* -- one VM -------------------------------------------------------------------------------------------------------- */

static int make_vm(struct roster *r, const struct config_vm *from, struct roster_vm **ret_v, struct failure *f)
{
    struct roster_vm *v = calloc(1, sizeof(*v));
    int e;

    if (!v)
        return failure_set(f, -ENOMEM, "out of memory");
    v->roster = r;
    v->from = from;
    e = r->make(r->arg, from, &v->vm, f);
    if (e < 0) {
        free(v);
        return e;
    }
    *ret_v = v;
    return 0;
}

/* NULL: it is not served, and the log says why. own is taken in any case. */
static struct roster_vm *make_late(struct roster *r, struct config_vm *own)
{
    struct roster_vm *v = NULL;
    struct failure why = {0};

    if (make_vm(r, own, &v, &why) < 0) {
        log_error("%s; it is not served: mend it and send SIGHUP again", why.text);
        config_free_vm(own);
        return NULL;
    }
    v->own = own;
    vm_start(v->vm);
    return v;
}

static void roster_vm_free(struct roster_vm *v)
{
    config_free_vm(v->own);
    config_free_vm(v->next);
    free(v);
}

static void on_look_closed(uv_handle_t *handle)
{
    struct roster *r = handle->data;

    free(r->vms);
    free(r->catalog.vms);
    r->on_stopped(r->stop_arg);
}

static void end_if_empty(struct roster *r)
{
    if (r->on_stopped && r->nvms == 0)
        uv_close((uv_handle_t *)&r->look, on_look_closed);
}

static void on_gone(void *arg)
{
    struct roster_vm *v = arg;
    struct roster *r = v->roster;
    struct roster_vm *next = v->next ? make_late(r, TAKE_PTR(v->next)) : NULL;
    size_t i = 0;

    while (r->vms[i] != v)
        i++;
    r->vms[i] = next;
    if (!next) {
        r->nvms--;
        memmove(&r->vms[i], &r->vms[i + 1], (r->nvms - i) * sizeof(struct roster_vm *));
    }
    roster_vm_free(v);
    publish(r);
    end_if_empty(r);
}

static void stop(struct roster_vm *v)
{
    v->stopping = true;
    publish(v->roster);
    vm_stop(v->vm, on_gone, v);
}

/* -- those that are to go ------------------------------------------------------------------------------------------ */

static void look(struct roster *r)
{
    bool any = false;

    for (size_t i = 0; i < r->nvms; i++) {
        struct roster_vm *v = r->vms[i];

        if (!v->leaves || v->stopping)
            continue;
        if (vm_is_idle(v->vm))
            stop(v);
        else
            any = true;
    }
    if (!any)
        (void)uv_timer_stop(&r->look);
}

static void on_look(uv_timer_t *timer)
{
    look(timer->data);
}

static void let_go(struct roster_vm *v, struct config_vm *next)
{
    const char *name = vm_name(v->vm);
    struct failure why = {0};

    config_free_vm(v->next);
    v->next = next;
    v->leaves = true;
    (void)failure_set(&why, -EAGAIN,
                      next ? "VM '%s' is configured anew (SIGHUP) as soon as its session has ended; try again then"
                           : "VM '%s' is not served any more (SIGHUP)",
                      name);
    vm_shut(v->vm, &why);
    if (!v->stopping)
        log_info("VM %s: %s%s", name, next ? "is configured anew" : "is not served any more",
                 vm_is_idle(v->vm) ? "" : ", as soon as nobody uses it");
}

static void stay(struct roster_vm *v)
{
    config_free_vm(TAKE_PTR(v->next));
    v->leaves = false;
    vm_shut(v->vm, NULL);
    log_info("VM %s: stays as it is", vm_name(v->vm));
}

/* -- all of them --------------------------------------------------------------------------------------------------- */

void roster_init(struct roster *r, uv_loop_t *loop, roster_make_fn *make, void *arg)
{
    *r = (struct roster){.make = make, .arg = arg};
    (void)uv_timer_init(loop, &r->look);
    r->look.data = r;
}

int roster_add(struct roster *r, const struct config_vm *from, struct failure *f)
{
    if (make_room(r, r->nvms + 1) < 0)
        return failure_set(f, -ENOMEM, "out of memory");
    if (make_vm(r, from, &r->vms[r->nvms], f) < 0)
        return f->err;
    r->nvms++;
    publish(r);
    return 0;
}

void roster_start(struct roster *r)
{
    for (size_t i = 0; i < r->nvms; i++)
        vm_start(r->vms[i]->vm);
}

static struct config_vm *find(struct config_vm *vms, size_t nvms, const char *name)
{
    for (size_t i = 0; i < nvms; i++)
        if (vms[i].name && strcmp(vms[i].name, name) == 0)
            return &vms[i];
    return NULL;
}

static bool is_there(const struct roster *r, const char *name)
{
    for (size_t i = 0; i < r->nvms; i++)
        if (strcmp(r->vms[i]->from->name, name) == 0)
            return true;
    return false;
}

/* What was said of a VM, out of the array that it came in, whose place is empty then. NULL: out of memory. */
static struct config_vm *take(struct config_vm *from)
{
    struct config_vm *own = malloc(sizeof(*own));

    if (!own) {
        log_error("VM %s: out of memory; all about it is as before", from->name);
        return NULL;
    }
    *own = *from;
    *from = (struct config_vm){0};
    return own;
}

/* said is NULL where nothing was. */
static void set_old(struct roster_vm *v, struct config_vm *said, struct roster_change *change)
{
    struct config_vm *own;

    if (!said) {
        if (v->leaves && !v->next)
            return;
        let_go(v, NULL);
        change->ngone++;
    } else if (config_vm_alike(v->from, said) && !v->stopping) {
        if (v->leaves)
            stay(v);
    } else if (!v->next || !config_vm_alike(v->next, said)) {
        own = take(said);
        if (!own)
            return;
        let_go(v, own);
        change->nchanged++;
    }
}

static void add_new(struct roster *r, struct config_vm *said, struct roster_change *change)
{
    struct config_vm *own = take(said);
    struct roster_vm *v = own ? make_late(r, own) : NULL;

    if (!v)
        return;
    log_info("VM %s: is served from now on", vm_name(v->vm));
    r->vms[r->nvms++] = v;
    change->nnew++;
}

int roster_set(struct roster *r, struct config_vm *vms, size_t nvms, struct roster_change *ret_change)
{
    size_t nold = r->nvms;

    *ret_change = (struct roster_change){0};
    if (make_room(r, nold + nvms) < 0)
        return -ENOMEM;
    for (size_t i = 0; i < nold; i++)
        set_old(r->vms[i], find(vms, nvms, r->vms[i]->from->name), ret_change);
    for (size_t i = 0; i < nvms; i++)
        if (vms[i].name && !is_there(r, vms[i].name)) /* no name: it was taken */
            add_new(r, &vms[i], ret_change);
    publish(r);
    (void)uv_timer_start(&r->look, on_look, ROSTER_LOOK_MS, ROSTER_LOOK_MS);
    look(r);
    return 0;
}

struct vm *roster_vm_at(const struct roster *r, size_t i)
{
    return r->vms[i]->vm;
}

void roster_stop(struct roster *r, void (*cb)(void *arg), void *arg)
{
    r->on_stopped = cb;
    r->stop_arg = arg;
    (void)uv_timer_stop(&r->look);
    for (size_t i = 0; i < r->nvms; i++) {
        config_free_vm(TAKE_PTR(r->vms[i]->next));
        if (!r->vms[i]->stopping)
            stop(r->vms[i]);
    }
    end_if_empty(r);
}
