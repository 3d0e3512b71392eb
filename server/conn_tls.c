/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* conn_tls: NBD_OPT_STARTTLS of one connection: who must say it, when TLS begins, and who the client is then. */
#include "conn_internal.h"

#include <errno.h>
#include <json-c/json.h>

/* Whether only this machine can be at the other end. */
static bool is_local(struct conn *c)
{
    struct sockaddr_storage a = {0};
    socklen_t len = sizeof a;
    uv_os_fd_t fd;

    return c->sock.handle.type == UV_NAMED_PIPE ||
           (uv_fileno(&c->sock.handle, &fd) == 0 && getsockname(fd, (struct sockaddr *)&a, &len) == 0 &&
            config_is_loopback(&a));
}

void conn_tls_offer(struct conn *c)
{
    const struct server_config *config = c->set->config;

    if (!c->set->tls)
        return;
    if (config->tls == CONFIG_TLS_REQUIRE || (!config->allow_plaintext && !is_local(c)))
        nbd_offer_tls(c->nbd, NBD_TLS_REQUIRED);
    else
        nbd_offer_tls(c->nbd, NBD_TLS_ON);
}

/* From inside nbd: nothing happens before conn_tls_settle(). */
void conn_tls_starttls(struct conn *c)
{
    c->tls_wanted = true;
}

/* -- the handshake ------------------------------------------------------------------------------------------------- */
static void on_taken(void *arg)
{
    conn_batch_done(arg, 0);
}

static void on_moved(void *arg)
{
    conn_settle(arg);
}

static const struct tls_ops tls_ops = {.taken = on_taken, .moved = on_moved};

static void begin(struct conn *c)
{
    struct failure why = {0};
    int r;

    if (c->input_len > 0) {
        /* Sent before our answer, so not by a client that wants TLS; perhaps by somebody between it and us. */
        (void)failure_set(&why, -EPROTO, "something was sent behind NBD_OPT_STARTTLS without waiting for its answer");
        nbd_fail(c->nbd, &why);
        return;
    }
    r = tls_new(c->set->tls, &c->sock.stream, &tls_ops, c, &c->tls);
    if (r < 0) {
        (void)failure_set(&why, r, "the server has no memory for TLS");
        nbd_fail(c->nbd, &why);
    }
}

static void greet(struct conn *c)
{
    const struct tls_peer *p = tls_peer(c->tls);

    c->tls_was_up = true;
    c->tls_wanted = false;
    memcpy(c->identity, p->identity, sizeof c->identity);
    c->who.psk = p->psk;
    c->who.dn = p->dn;
    c->who.cn = p->cn;
    c->who.sans = (const char *const *)p->names;
    c->who.nsans = p->nnames;
    if (!c->quiet)
        log_info("c%llu is %s, by TLS %s", (unsigned long long)c->id, c->identity, p->session);
    conn_limit_check(c);
    nbd_tls_ready(c->nbd);
}

void conn_tls_settle(struct conn *c)
{
    if (c->tls_wanted && !c->tls && c->state == CONN_TALKING && !conn_is_sending(c))
        begin(c);
    if (!c->tls)
        return;
    if (c->state == CONN_TALKING && !c->tls_was_up && tls_state(c->tls) == TLS_UP)
        greet(c);
    if (tls_state(c->tls) != TLS_FAILED)
        return;
    if (c->tls_was_up)
        conn_kill(c, tls_why(c->tls)->err, "%s", tls_why(c->tls)->text);
    else if (c->state == CONN_TALKING)
        nbd_fail(c->nbd, tls_why(c->tls)); /* the client is told by an alert */
}

/* -- what comes out of it ------------------------------------------------------------------------------------------ */
bool conn_tls_input(struct conn *c)
{
    ssize_t n = 1;

    while (c->input_len < sizeof c->input && n > 0) {
        n = tls_read(c->tls, c->input + c->input_len, sizeof c->input - c->input_len);
        if (n > 0)
            c->input_len += (size_t)n;
    }
    if (c->input_len > 0)
        return true; /* what was wrong comes again */
    if (n == 0)
        nbd_feed_eof(c->nbd);
    else if (n != -EAGAIN)
        conn_kill(c, (int)n, "%s", tls_why(c->tls)->text);
    return false;
}

struct json_object *conn_tls_to_json(const struct conn *c)
{
    struct json_object *o, *names;
    const struct tls_peer *p;

    if (!c->tls_was_up)
        return NULL;
    p = tls_peer(c->tls);
    o = json_object_new_object();
    names = json_object_new_array();
    for (size_t i = 0; i < p->nnames; i++)
        json_object_array_add(names, json_object_new_string(p->names[i]));
    json_object_object_add(o, "session", json_object_new_string(p->session));
    json_object_object_add(o, "names", names);
    return o;
}
