/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* control_places: who may have one of the control socket's places, and how the others are told. */
#include "control_client.h"

#include <stdio.h>

/* The log is not told of each, or clients could fill it. */
void control_turn_away(struct control_client *client, const char *fmt, ...)
{
    struct control *c = client->control;
    uint64_t now = uv_now(client->pipe.loop);
    char text[sizeof((struct failure *)NULL)->text];
    struct json_object *doc;
    uv_buf_t bufs[2] = {{0}, uv_buf_init((char *)"\r\n", 2)};
    va_list ap;

    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (c->told_ms && now - c->told_ms < LISTEN_COMPLAIN_MS) {
        c->nuntold++;
    } else {
        log_warning("control client %llu (process %d) is turned away: %s", (unsigned long long)client->id,
                    (int)client->who.pid, text);
        c->told_ms = now;
    }
    doc = control_error_document(NULL, CONTROL_GENERIC, text);
    bufs[0].base = (char *)json_object_to_json_string_length(doc, JSON_C_TO_STRING_PLAIN, &bufs[0].len);
    if (bufs[0].base)
        (void)uv_try_write((uv_stream_t *)&client->pipe, bufs, ARRAY_SIZE(bufs)); /* words that nobody waits for */
    json_object_put(doc);
    control_client_close(client);
}

void control_tell_untold(struct control *c)
{
    uint64_t now = uv_now(c->tick.loop);

    if (c->nuntold == 0 || now - c->told_ms < LISTEN_COMPLAIN_MS)
        return;
    log_warning("control: %llu more clients were turned away", (unsigned long long)c->nuntold);
    c->nuntold = 0;
    c->told_ms = now;
}

bool control_check_connect(struct control_client *client)
{
    bool may = access_may_connect(server_access(client->control->server), &client->who);

    if (!may)
        control_turn_away(client, "user %u may not use this socket (--allow)", (unsigned)client->who.uid);
    return may;
}

/*
 * Who has rights to one VM must not keep the others out by being there, and nobody those
 * who could do something about it: root and our own user have places that are theirs.
 */
bool control_check_place(struct control_client *client)
{
    unsigned nall = 0, nothers = 0, nsame = 0;

    for (const struct control_client *c = client->control->clients; c; c = c->next) {
        if (c == client || c->closing)
            continue;
        nall++;
        nothers += !access_is_ours(&c->who);
        nsame += c->who.uid == client->who.uid;
    }
    if (nall < CONTROL_CLIENTS_MAX && access_is_ours(&client->who))
        return true;
    if (nall >= CONTROL_CLIENTS_MAX)
        control_turn_away(client, "all %u places at this socket are taken; try again when somebody has left",
                          CONTROL_CLIENTS_MAX);
    else if (nsame >= CONTROL_CLIENTS_OF_USER)
        control_turn_away(client,
                          "user %u has %u connections to this socket already, the most that one may have; close some",
                          (unsigned)client->who.uid, nsame);
    else if (nothers >= CONTROL_CLIENTS_MAX - CONTROL_CLIENTS_OURS)
        control_turn_away(client,
                          "the %u places that users other than root may have at this socket are taken; try again when "
                          "somebody has left",
                          CONTROL_CLIENTS_MAX - CONTROL_CLIENTS_OURS);
    else
        return true;
    return false;
}

void control_check_access(struct control *c)
{
    for (struct control_client *client = c->clients; client; client = client->next)
        if (!client->closing)
            (void)control_check_connect(client);
}
