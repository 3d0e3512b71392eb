/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * roster: the VMs that the daemon serves, each with what was configured for it, and how they come and go while it runs.
 * A VM that is to go, or is configured anew, is served as it is while its session stands; a session more does not
 * begin.
 *
 * Loop thread only. Embedded in the server, which keeps it until roster_stop() has called back.
 */
#ifndef QPULL_ROSTER_H
#define QPULL_ROSTER_H

#include "catalog.h"
#include "config.h"

#include <uv.h>

struct roster_vm;

/* from is borrowed for the VM's life. */
typedef int roster_make_fn(void *arg, const struct config_vm *from, struct vm **ret_vm, struct failure *f);

struct roster {
    struct catalog catalog; /* for all others: the VMs that can be asked, not those that are being stopped */
    /* private */
    roster_make_fn *make;
    void *arg;
    struct roster_vm **vms; /* owned, each; catalog.vms has room for as many */
    size_t nvms;
    uv_timer_t look; /* runs while a VM that is to go is in use */
    void (*on_stopped)(void *arg);
    void *stop_arg;
};

void roster_init(struct roster *r, uv_loop_t *loop, roster_make_fn *make, void *arg);
/* from is borrowed until roster_stop() has called back. */
int roster_add(struct roster *r, const struct config_vm *from, struct failure *f);
void roster_start(struct roster *r); /* all of them connect */

/*
 * These VMs from now on, which have passed config_check_vms(): what is alike stays untouched. The roster takes the
 * contents of vms as far as it needs them, and leaves the rest to the caller. A VM that cannot be made is logged and
 * left out. -ENOMEM: all is as before.
 */
struct roster_change {
    size_t nnew, nchanged, ngone;
};
int roster_set(struct roster *r, struct config_vm *vms, size_t nvms, struct roster_change *ret_change);

/* Every VM that is not gone yet, also those that are being stopped. */
struct vm *roster_vm_at(const struct roster *r, size_t i);

/* Stops and frees all; cb comes later, as the last touch. */
void roster_stop(struct roster *r, void (*cb)(void *arg), void *arg);

#endif
