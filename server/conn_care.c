/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* conn_care: what keeps a slow, silent or stuck client from costing the others anything. */
#include "conn_internal.h"

#include <errno.h>

/* -- deadlines ----------------------------------------------------------------------------------------------------- */
static void check_output(struct conn *c)
{
    uint64_t written = c->submitted - uv_stream_get_write_queue_size(&c->sock.stream);
    unsigned bound = c->set->config->idle_timeout_ms > 0 ? c->set->config->idle_timeout_ms : CONN_STUCK_MS;

    if (written != c->written || !conn_is_sending(c)) {
        c->written = written;
        c->progress_ms = uv_now(c->set->loop);
        return;
    }
    if (uv_now(c->set->loop) - c->progress_ms > bound)
        conn_kill(c, -ETIMEDOUT, "the client took no byte of its replies for %g seconds", bound / 1000.0);
}

static void check_deadlines(struct conn *c)
{
    const struct server_config *config = c->set->config;
    uint64_t now = uv_now(c->set->loop);
    struct failure why = {0};

    if (c->state >= CONN_FLUSHING) {
        if (c->state == CONN_SHUT && now - c->shut_ms > CONN_FAREWELL_MS)
            c->await_eof = false;
        if (c->state == CONN_FLUSHING && now - c->end_ms > CONN_FLUSH_MS)
            conn_kill(c, -ETIMEDOUT, "the client did not take our last bytes within %u seconds", CONN_FLUSH_MS / 1000);
        return;
    }
    check_output(c);
    if (c->state != CONN_TALKING || c->asking)
        return;
    if (!nbd_in_transmission(c->nbd)) {
        if (!nbd_is_ending(c->nbd) && now - c->since_ms > config->handshake_timeout_ms)
            (void)failure_set(&why, -ETIMEDOUT, "the client did not finish negotiating within %g seconds",
                              config->handshake_timeout_ms / 1000.0);
    } else if (config->idle_timeout_ms > 0 && nbd_inflight(c->nbd) == 0 && !conn_is_sending(c) &&
               now - c->active_ms > config->idle_timeout_ms) {
        (void)failure_set(&why, -ETIMEDOUT, "the client asked for nothing for %g seconds",
                          config->idle_timeout_ms / 1000.0);
    }
    if (why.err)
        nbd_fail(c->nbd, &why);
}

/*
 * Who does not take what we have for it gets no more memory than it takes bytes in two ticks: what a stuck or a slow
 * client holds, the others cannot have. Nor has one client more of it by having more connections.
 */
static void share_memory(struct conn *c)
{
    uint64_t taken = c->pull.ntaken - c->taken_seen;
    uint64_t allowed = MIN(fair_part(&c->fair, BUDGET_TOTAL), CONN_WINDOW);

    c->taken_seen = c->pull.ntaken;
    if (c->pull.unsent > 0)
        allowed = MIN(allowed, 2 * taken);
    pull_allow(&c->pull, MAX(allowed, CONN_PIECE));
}

void conn_care(struct conn *c)
{
    check_deadlines(c);
    if (c->state == CONN_TALKING && c->pulling)
        share_memory(c);
}
