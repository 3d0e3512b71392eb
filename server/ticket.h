/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * ticket: export names that cannot be guessed, each for one disk of one session, for somebody whom no rule names
 * (docs/decisions/0022-begin-and-tickets.md). A ticket is bound to the first client that opens it: that client may have
 * several connections; when the last one has said goodbye the ticket is used up, and if it broke, when `linger_ms` have
 * passed without it. It knows no session and no socket: a lease makes tickets and revokes them, a connection finds
 * them.
 *
 * Whoever has the name has the disk: it is handed out once, by ticket_new(), and is neither logged nor shown. Names are
 * compared with all tickets in a time that says nothing about them.
 *
 * Loop thread only. A ticket is the book's until it is revoked, and then its last user's.
 */
#ifndef QPULL_TICKET_H
#define QPULL_TICKET_H

#include "qmp/base.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define TICKET_PREFIX "ticket-"
#define TICKET_BYTES 32 /* of the kernel's random numbers: 256 bits */
#define TICKET_NAME_SIZE (sizeof TICKET_PREFIX + 2 * (size_t)TICKET_BYTES) /* with its end */

struct ticket;
struct vm_lease;

struct ticket_book {
    struct ticket *tickets; /* owned */
    size_t ntickets;
    unsigned linger_ms;
};

/* Who presents it: all of it must stay the same. Borrowed for the call; identities that are longer are refused. */
struct ticket_who {
    const char *identity, *origin;
    pid_t pid; /* of a unix socket's other end; 0 */
};

/* ret_name: the export name, TICKET_NAME_SIZE bytes; nobody can be told again. disk is copied, lease borrowed until
 * ticket_revoke(). ends_ms: as now_ms, 0: never. -EMFILE: there are TICKETS_MAX; -errno of getrandom(). */
int ticket_new(struct ticket_book *b, const struct vm_lease *lease, const char *disk, uint64_t ends_ms, char *ret_name,
               struct failure *f);
/* All of that lease: nobody finds them any more. */
void ticket_revoke(struct ticket_book *b, const struct vm_lease *lease);
/* For the status: how many of a lease can still be used, and how many are in use. */
void ticket_count(const struct ticket_book *b, const struct vm_lease *lease, uint64_t now_ms, unsigned *ret_good,
                  unsigned *ret_used);

/* Whether it looks like one, or has most of one in it, good or not: it must not be logged. */
bool ticket_is_meant(const char *export_name);
/* NULL: there is none of that name, for him, now. Borrowed until the next turn of the loop, unless entered. */
struct ticket *ticket_find(struct ticket_book *b, const char *export_name, const struct ticket_who *who,
                           uint64_t now_ms);
const char *ticket_disk(const struct ticket *t);
const struct vm_lease *ticket_lease(const struct ticket *t); /* NULL: revoked */

/* He opens it: nobody else can from now on. Ends with ticket_leave(). */
void ticket_enter(struct ticket *t, const struct ticket_who *who);
/* used: he was let in; otherwise, if nobody was before, it is as it was. well: he said goodbye. */
void ticket_leave(struct ticket_book *b, struct ticket *t, bool used, bool well, uint64_t now_ms);

void ticket_book_done(struct ticket_book *b); /* with no user left */

#endif
