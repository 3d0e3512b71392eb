/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * lease: sessions that were begun over the control socket (`qpull begin`), and live without a client until they are
 * ended there, or until their time is up: `ttl` after the beginning, whoever reads, or --begin-timeout after the last
 * client has left, or none has come. Who ends one decides what becomes of its checkpoint; one that nobody ends keeps
 * none (docs/decisions/0022-begin-and-tickets.md).
 *
 * Loop thread only. The set is embedded in the server; a lease is the set's from lease_begin() on, and goes with its
 * session.
 */
#ifndef QPULL_LEASE_H
#define QPULL_LEASE_H

#include "ticket.h"
#include "vm.h"

#include <uv.h>

struct lease;

struct lease_set {
    uv_loop_t *loop;             /* borrowed */
    unsigned idle_ms;            /* --begin-timeout; 0: never */
    struct ticket_book *tickets; /* borrowed: they are revoked here */
    struct lease *leases;        /* owned */
    size_t nleases;
};

/* All strings are copied. */
struct lease_wish {
    struct vm *vm;
    const char *identity, *checkpoint; /* checkpoint: NULL: none */
    const char *const *disks;          /* none: all */
    size_t ndisks;
    uint64_t ttl_ms; /* from the moment on in which it is up; 0: any */
    uint64_t rate;   /* bytes a second; 0: as the server's others */
    bool keep;       /* however long nobody reads */
};

/* l is up, or f says why not. Once, later. */
typedef void lease_begun_cb(void *arg, struct lease *l, const struct failure *f);
int lease_begin(struct lease_set *s, const struct lease_wish *wish, lease_begun_cb *cb, void *arg,
                struct lease **ret_lease, struct failure *f);
/* Nobody knows of it: it ends, and cb does not come any more; also from inside it. */
void lease_abandon(struct lease *l);

/* NULL: none of that session id that is up. */
struct lease *lease_find(struct lease_set *s, const char *session);
struct vm *lease_vm(const struct lease *l);
const char *lease_identity(const struct lease *l);
const struct vm_lease *lease_of_vm(const struct lease *l); /* as tickets know it */
uint64_t lease_ends_ms(const struct lease *l);             /* by its ttl, in loop time; 0: never */
unsigned lease_idle_ms(const struct lease *l);             /* 0: never */

/*
 * Clients that are still inside get LEASE_END_WAIT_MS to leave. cb comes once, later: all is undone; last is what
 * vm_session_to_json() said, with "kept", "dropped" and "problems", or f says that the session was lost before.
 * -EALREADY: it is being ended.
 */
typedef void lease_ended_cb(void *arg, struct json_object *last, const struct failure *f);
int lease_end(struct lease *l, enum vm_decision decision, lease_ended_cb *cb, void *arg);
void lease_end_forget(struct lease *l); /* cb does not come any more; it ends all the same */

/* {"ttl-left", "idle-left", "tickets", "tickets-used"}: seconds, or null where there is no such limit. Of the lease of
 * that session; NULL: it has none. */
struct json_object *lease_to_json(const struct lease_set *s, const char *session);

#endif
