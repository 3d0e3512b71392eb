/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * conn_ticket: a connection whose export name is a ticket. What it finds is a disk of a session that stands, so nobody
 * is asked anything; what it does not find goes the way of every unknown name, in conn_ask.c.
 */
#include "conn_internal.h"
#include "ticket.h"

#include <errno.h>

static struct ticket_who who_is(const struct conn *c)
{
    return (struct ticket_who){.identity = c->identity, .origin = c->origin, .pid = c->who.pid};
}

bool conn_ticket_find(struct conn *c, const struct nbd_ask *ask, struct catalog_hit *ret_hit)
{
    struct ticket_who who = who_is(c);
    const struct vm_lease *lease;
    struct ticket *t;

    if (!c->set->tickets || !ask->export_name)
        return false;
    t = ticket_find(c->set->tickets, ask->export_name, &who, uv_now(c->set->loop));
    lease = t ? ticket_lease(t) : NULL;
    *ret_hit = (struct catalog_hit){0};
    if (!lease)
        return false;
    ret_hit->disk = vm_lease_disk(lease, ticket_disk(t));
    if (!ret_hit->disk)
        return false;
    ret_hit->vm = vm_lease_vm(lease);
    ret_hit->checkpoint = lease->checkpoint;
    ret_hit->by_ticket = true;
    if (ask->type != NBD_ASK_OPEN)
        return true;
    c->ticket_identity = strdup(lease->identity);
    c->ticket_session = strdup(vm_lease_session(lease));
    if (!c->ticket_identity || !c->ticket_session) {
        conn_ticket_leave(c, /* used= */ false);
        return false;
    }
    ticket_enter(t, &who);
    c->ticket = t;
    return true;
}

void conn_ticket_leave(struct conn *c, bool used)
{
    struct ticket *t = TAKE_PTR(c->ticket);

    if (t)
        ticket_leave(c->set->tickets, t, used, c->end == NBD_END_DISC, uv_now(c->set->loop));
    free(TAKE_PTR(c->ticket_identity));
    free(TAKE_PTR(c->ticket_session));
}

bool conn_ticket_is_meant(const struct nbd_ask *ask)
{
    return ask->export_name && ticket_is_meant(ask->export_name);
}
