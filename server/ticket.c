/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ticket.h"
#include "config.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <gnutls/gnutls.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

/* Hex digits in a row that are no name, but most of a ticket with something else around it. */
#define TICKET_REVEALING 40u

struct ticket {
    struct ticket *next, *prev;
    const struct vm_lease *lease; /* borrowed; NULL: revoked, and in no book any more */
    char *disk;                   /* owned */
    uint64_t ends_ms;             /* 0: never */
    unsigned nusers;
    bool used;        /* somebody was let in */
    uint64_t dead_ms; /* used, and nobody is in: found by nobody from then on */
    struct {
        char identity[TICKET_IDENTITY_MAX], origin[TICKET_IDENTITY_MAX];
        pid_t pid;
    } who; /* nusers or used: whose it is */
    char name[TICKET_NAME_SIZE];
};

/* -- making and revoking ------------------------------------------------------------------------------------------- */

static void ticket_free(struct ticket *t)
{
    gnutls_memset(t->name, 0, sizeof t->name);
    free(t->disk);
    free(t);
}

static int make_name(char *to)
{
    uint8_t random[TICKET_BYTES];
    size_t n = 0;

    while (n < sizeof random) {
        ssize_t r = getrandom(random + n, sizeof random - n, /* flags= */ 0);

        if (r < 0 && errno != EINTR)
            return -errno;
        n += r > 0 ? (size_t)r : 0;
    }
    memcpy(to, TICKET_PREFIX, sizeof TICKET_PREFIX);
    for (size_t i = 0; i < sizeof random; i++)
        (void)snprintf(to + sizeof TICKET_PREFIX - 1 + 2 * i, 3, "%02x", random[i]);
    gnutls_memset(random, 0, sizeof random);
    return 0;
}

int ticket_new(struct ticket_book *b, const struct vm_lease *lease, const char *disk, uint64_t ends_ms, char *ret_name,
               struct failure *f)
{
    struct ticket *t;
    int r;

    if (b->ntickets >= TICKETS_MAX)
        return failure_set(f, -EMFILE, "there are %u tickets already; end a session that has some", TICKETS_MAX);
    t = calloc(1, sizeof *t);
    if (t)
        t->disk = strdup(disk);
    r = t && t->disk ? make_name(t->name) : -ENOMEM;
    if (r < 0) {
        if (t)
            ticket_free(t);
        return failure_set(f, r, "no ticket can be made: %s", strerror(-r));
    }
    t->lease = lease;
    t->ends_ms = ends_ms;
    t->next = b->tickets;
    if (t->next)
        t->next->prev = t;
    b->tickets = t;
    b->ntickets++;
    memcpy(ret_name, t->name, sizeof t->name);
    return 0;
}

void ticket_revoke(struct ticket_book *b, const struct vm_lease *lease)
{
    struct ticket *next;

    for (struct ticket *t = b->tickets; t; t = next) {
        next = t->next;
        if (t->lease != lease)
            continue;
        *(t->prev ? &t->prev->next : &b->tickets) = t->next;
        if (t->next)
            t->next->prev = t->prev;
        b->ntickets--;
        t->lease = NULL;
        if (t->nusers == 0)
            ticket_free(t);
    }
}

void ticket_book_done(struct ticket_book *b)
{
    while (b->tickets)
        ticket_revoke(b, b->tickets->lease);
}

/* -- finding ------------------------------------------------------------------------------------------------------- */

bool ticket_is_meant(const char *export_name)
{
    size_t run = 0;

    if (strncmp(export_name, TICKET_PREFIX, sizeof TICKET_PREFIX - 1) == 0)
        return true;
    for (; *export_name && run < TICKET_REVEALING; export_name++)
        run = isxdigit((unsigned char)*export_name) ? run + 1 : 0;
    return run == TICKET_REVEALING;
}

static bool is_good(const struct ticket *t, uint64_t now_ms)
{
    return (t->ends_ms == 0 || now_ms < t->ends_ms) && (!t->used || t->nusers > 0 || now_ms < t->dead_ms);
}

static bool is_his(const struct ticket *t, const struct ticket_who *who)
{
    if (!t->used && t->nusers == 0)
        return strlen(who->identity) < sizeof t->who.identity && strlen(who->origin) < sizeof t->who.origin;
    return strcmp(t->who.identity, who->identity) == 0 && strcmp(t->who.origin, who->origin) == 0 &&
           t->who.pid == who->pid;
}

struct ticket *ticket_find(struct ticket_book *b, const char *export_name, const struct ticket_who *who,
                           uint64_t now_ms)
{
    struct ticket *found = NULL;
    char name[TICKET_NAME_SIZE] = {0};

    /* What has another length or beginning is no secret. */
    if (strlen(export_name) != sizeof name - 1)
        return NULL;
    memcpy(name, export_name, sizeof name);
    for (struct ticket *t = b->tickets; t; t = t->next)
        if (gnutls_memcmp(t->name, name, sizeof name) == 0)
            found = t;
    gnutls_memset(name, 0, sizeof name);
    return found && is_good(found, now_ms) && is_his(found, who) ? found : NULL;
}

const char *ticket_disk(const struct ticket *t)
{
    return t->disk;
}

const struct vm_lease *ticket_lease(const struct ticket *t)
{
    return t->lease;
}

void ticket_count(const struct ticket_book *b, const struct vm_lease *lease, uint64_t now_ms, unsigned *ret_good,
                  unsigned *ret_used)
{
    *ret_good = *ret_used = 0;
    for (const struct ticket *t = b->tickets; t; t = t->next) {
        if (t->lease != lease)
            continue;
        *ret_good += is_good(t, now_ms);
        *ret_used += t->nusers > 0;
    }
}

/* -- using --------------------------------------------------------------------------------------------------------- */

void ticket_enter(struct ticket *t, const struct ticket_who *who)
{
    assert(is_his(t, who));
    (void)snprintf(t->who.identity, sizeof t->who.identity, "%s", who->identity);
    (void)snprintf(t->who.origin, sizeof t->who.origin, "%s", who->origin);
    t->who.pid = who->pid;
    t->nusers++;
}

void ticket_leave(struct ticket_book *b, struct ticket *t, bool used, bool well, uint64_t now_ms)
{
    assert(t->nusers > 0);
    t->used |= used;
    if (used) /* who failed to come in changes nothing for those before */
        t->dead_ms = well ? now_ms : now_ms + b->linger_ms;
    if (--t->nusers == 0 && !t->lease)
        ticket_free(t);
}
