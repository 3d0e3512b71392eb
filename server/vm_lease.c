/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A session that somebody has begun who is no NBD client. Its stay has no disk, and counts as somebody inside; so the
 * session neither lingers nor ends by itself. vm_session.c asks here wherever such a session is another one.
 */
#include "vm_internal.h"

#include <assert.h>
#include <errno.h>

static bool is_meant(const struct vm_lease *l, const char *disk)
{
    for (size_t i = 0; i < l->ndisks; i++) {
        if (strcmp(l->disks[i], disk) == 0)
            return true;
    }
    return l->ndisks == 0;
}

/* -- the beginning ------------------------------------------------------------------------------------------------- */

static void on_entered(struct vm_stay *stay, const struct failure *f)
{
    struct vm_lease *l = stay->lease;

    l->on_up(l, f);
}

static void on_lost(struct vm_stay *stay, const struct failure *why)
{
    struct vm_lease *l = stay->lease;

    l->on_lost(l, why);
}

int vm_lease_start(struct vm *vm, struct vm_lease *l)
{
    l->decision = VM_DECISION_DROP; /* until somebody says that he has the data */
    l->ending = false;
    l->stay = (struct vm_stay){
        .identity = l->identity,
        .checkpoint = l->checkpoint,
        .lease = l,
        .on_entered = on_entered,
        .on_lost = on_lost,
    };
    return vm_enter(vm, &l->stay);
}

void vm_lease_forget(struct vm_lease *l)
{
    vm_leave(&l->stay, /* said_disc= */ false, /* read_failed= */ false);
}

int vm_lease_check(const struct vm *vm, const struct vm_stay *stay, const struct disk_list *disks, struct failure *f)
{
    const struct vm_lease *l = stay->lease;

    for (size_t i = 0; i < l->ndisks; i++) {
        if (!disk_list_find(disks, l->disks[i]))
            return failure_set(f, -ENOENT, "VM '%s' has no disk '%s'", vm->name, l->disks[i]);
    }
    return 0;
}

/* A map that is read at the freeze is exact, and nobody can say yet which ones will be wanted. */
size_t vm_lease_since(const struct disk_list *disks, const char **since, size_t n, size_t most)
{
    for (size_t i = 0; i < disks->ndisks; i++) {
        for (size_t k = 0; k < disks->disks[i].ncheckpoints && n < most; k++) {
            const struct checkpoint *c = &disks->disks[i].checkpoints[k];
            size_t at = 0;

            while (at < n && strcmp(since[at], c->name) != 0)
                at++;
            if (at == n && c->reason == REASON_NONE)
                since[n++] = c->name;
        }
    }
    return n;
}

/* -- who takes part ------------------------------------------------------------------------------------------------ */

bool vm_lease_admits(const struct vm *vm, const struct vm_stay *stay)
{
    if (stay->lease)
        return vm->lease == stay->lease;
    if (vm->lease && vm->lease->ending)
        return false;
    return !stay->session || strcmp(stay->session, session_id(vm->session)) == 0;
}

/* It must not begin a session of its own, nor wait for one. */
bool vm_lease_refuse_strays(struct vm *vm, struct vm_stay **ret_stay)
{
    for (struct vm_stay *stay = vm->stays; stay; stay = stay->next) {
        if (stay->state != STAY_WAITING || !stay->session)
            continue;
        if (vm->session && !vm->ending && vm_lease_admits(vm, stay))
            continue;
        *ret_stay = stay;
        return true;
    }
    return false;
}

size_t vm_lease_nclients(const struct vm_lease *l)
{
    size_t n = 0;

    for (const struct vm_stay *stay = l->stay.vm ? l->stay.vm->stays : NULL; stay; stay = stay->next)
        n += !stay->lease && (stay->state == STAY_IN || stay->state == STAY_ASKING);
    return n;
}

void vm_lease_notice(struct vm *vm)
{
    if (vm->lease && vm->lease->stay.state == STAY_IN)
        vm->lease->on_clients(vm->lease, vm_lease_nclients(vm->lease));
}

uint64_t vm_stay_rate(const struct vm_stay *stay)
{
    const struct vm *vm = stay->vm;

    return vm->lease && vm->lease->rate ? vm->lease->rate : vm->rate;
}

bool vm_is_for(const struct vm *vm, const char *identity)
{
    if (vm->twin && vm_is_for(vm->twin, identity))
        return true;
    return vm->identity && strcmp(vm->identity, identity) == 0;
}

bool vm_writes_to(const struct vm *vm, const struct place *place)
{
    return vm->session && !vm->images && vm->place && strcmp(place_text(vm->place), place_text(place)) == 0;
}

const struct disk_list *vm_lease_disks(const struct vm_lease *l)
{
    return session_disks(l->stay.vm->session);
}

const struct disk *vm_lease_disk(const struct vm_lease *l, const char *name)
{
    return l->stay.vm && l->stay.vm->session && is_meant(l, name) ? disk_list_find(vm_lease_disks(l), name) : NULL;
}

struct vm *vm_lease_vm(const struct vm_lease *l)
{
    return l->stay.vm->keeper;
}

const char *vm_lease_session(const struct vm_lease *l)
{
    return session_id(l->stay.vm->session);
}

/* -- the end ------------------------------------------------------------------------------------------------------- */

void vm_lease_close(struct vm_lease *l, enum vm_decision decision)
{
    l->decision = decision;
    l->ending = true;
}

void vm_lease_end(struct vm_lease *l, const struct failure *why)
{
    struct vm *vm = l->stay.vm;

    if (vm->ending)
        return;
    assert(vm->lease == l && l->ending);
    l->stay.state = STAY_LOST; /* it knows */
    vm_session_tell(vm, why);
    vm_end_session(vm);
}

void vm_lease_fail(struct vm_lease *l, const struct failure *why)
{
    if (!l->stay.vm->ending)
        session_fail(l->stay.vm->session, why);
}

bool vm_lease_decides(const struct vm *vm, const char *disk, bool *keep)
{
    if (!vm->lease || vm->lease->decision == VM_DECISION_AS_EVER)
        return false;
    *keep = vm->lease->decision == VM_DECISION_KEEP && is_meant(vm->lease, disk);
    return true;
}

/* A session that was never up has told that already. */
void vm_lease_down(struct vm *vm, struct json_object *last, const struct failure *problems)
{
    struct vm_lease *l = vm->lease;

    if (!l)
        return;
    vm_session_remove(&l->stay);
    l->on_down(l, last, problems);
}
