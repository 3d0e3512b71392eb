/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * conn_limit: how many connections there may be at a time, and how many of one identity. Where all places are taken,
 * the one that has been negotiating longest makes way. One too many of an identity is told so in words, when it asks
 * for something, and then let go; but there are few of those at a time, too, and few that have heard the last word and
 * stay.
 */
#include "conn_internal.h"

#include <errno.h>

static unsigned limit(const struct conn *c)
{
    return c->set->config->max_connections_per_client;
}

static void tell(struct conn *c)
{
    struct conn_set *s = c->set;
    uint64_t now = uv_now(s->loop);

    s->nrefused++;
    if (s->limit_told_ms && now - s->limit_told_ms < LISTEN_COMPLAIN_MS)
        return;
    s->limit_told_ms = now;
    log_warning("c%llu is refused: %s has %u connections already (--max-connections-per-client)",
                (unsigned long long)c->id, c->identity, limit(c));
}

/* It was let into nothing, and is not about to be: who asks GO waits for a freeze, who asks all else can ask for ever.
 */
static bool gives_way(const struct conn *c)
{
    return c->state == CONN_TALKING && !c->opened && !(c->asking && c->ask_type == NBD_ASK_OPEN);
}

static void evict(struct conn *c, const char *whose)
{
    c->set->nevicted++;
    conn_kill(c, -EUSERS, "it was negotiating while another %s needed its place", whose);
    conn_settle(c);
}

bool conn_limit_make_room(struct conn_set *s)
{
    if (s->nconns < s->config->max_connections)
        return true;
    for (struct conn *c = s->first; c; c = c->next)
        if (gives_way(c)) {
            evict(c, "client");
            return true;
        }
    return false;
}

void conn_limit_farewells(struct conn_set *s)
{
    struct conn *oldest = NULL;
    unsigned n = 0;

    if (s->nopen - s->nconns < CONN_FAREWELLS_MAX) /* most of these are closed already, and freed at the loop's turn */
        return;
    for (struct conn *c = s->first; c; c = c->next)
        if (c->state == CONN_FLUSHING || (c->state == CONN_SHUT && c->await_eof)) {
            oldest = oldest ? oldest : c;
            n++;
        }
    if (n < CONN_FAREWELLS_MAX)
        return;
    conn_kill(oldest, -EUSERS, "others have come meanwhile");
    conn_settle(oldest);
}

bool conn_limit_line(struct conn_set *s)
{
    uint64_t now = uv_now(s->loop);

    if (now - s->lines_ms >= 1000) {
        if (s->nunsaid > 0)
            log_info("%llu lines about clients are left out: more than %u in a second", (unsigned long long)s->nunsaid,
                     CONN_LINES_MAX);
        s->lines_ms = now;
        s->nlines = s->nunsaid = 0;
    }
    if (s->nlines < CONN_LINES_MAX) {
        s->nlines++;
        return true;
    }
    s->nunsaid++;
    return false;
}

/*
 * Before its TLS is up a client is known by its address only, behind which there may be many: it is told that it is one
 * too many only if it still is when it asks for something, and takes nobody's place unless there are too many of these.
 */
void conn_limit_check(struct conn *c)
{
    bool known = !c->set->tls || c->tls_was_up;
    size_t nothers = 0, nrefused = 0;
    struct conn *oldest = NULL;

    for (struct conn *other = c->set->first; other; other = other->next) {
        if (other == c || other->state != CONN_TALKING)
            continue;
        nrefused += other->one_too_many;
        if (strcmp(other->identity, c->identity) != 0)
            continue;
        nothers += !other->one_too_many;
        if (!oldest && gives_way(other) && !(known && other->one_too_many)) /* these are about to be told so */
            oldest = other;
    }
    c->one_too_many = limit(c) > 0 && nothers >= limit(c);
    if (!c->one_too_many)
        return;
    if (oldest && (known || nrefused >= CONN_REFUSED_MAX)) {
        evict(oldest, "connection of the same client");
        c->one_too_many = !known;
        return;
    }
    tell(c);
    c->quiet = true; /* that was its line */
    if (nrefused >= CONN_REFUSED_MAX)
        c->turned_away = true; /* it is not heard out */
}

bool conn_limit_refuses(struct conn *c, struct failure *why)
{
    if (!c->one_too_many)
        return false;
    (void)failure_set(why, -EUSERS,
                      "%s has %u connections already, the most that one client may have here "
                      "(--max-connections-per-client); try again when one of them has ended",
                      c->identity, limit(c));
    c->turned_away = true;
    return true;
}

void conn_limit_settle(struct conn *c)
{
    struct failure why = {0};

    if (!c->turned_away || c->state != CONN_TALKING)
        return;
    (void)failure_set(&why, -EUSERS, "its client has as many connections as it may have");
    nbd_fail(c->nbd, &why);
}
