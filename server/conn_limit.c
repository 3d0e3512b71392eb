/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * conn_limit: how many connections one identity may have at a time. One too many is told so in words, when it asks for
 * something, and then let go; but there are few of those at a time, too.
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

void conn_limit_check(struct conn *c)
{
    size_t nothers = 0, nrefused = 0;

    for (const struct conn *other = c->set->first; other; other = other->next) {
        if (other == c || other->state != CONN_TALKING)
            continue;
        nrefused += other->one_too_many;
        nothers += !other->one_too_many && strcmp(other->identity, c->identity) == 0;
    }
    c->one_too_many = limit(c) > 0 && nothers >= limit(c);
    if (!c->one_too_many)
        return;
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
