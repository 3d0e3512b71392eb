/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* All connections together: what they share, their common end, and what is told of them. */
#include "conn_internal.h"

#include <assert.h>
#include <json-c/json.h>

int conn_set_init(struct conn_set *s, uv_loop_t *loop, const struct server_config *config,
                  const struct catalog *catalog)
{
    *s = (struct conn_set){.loop = loop, .config = config, .catalog = catalog, .access = &config->access};
    budget_init(&s->budget, BUDGET_TOTAL, CONN_PIECE, BUDGET_SPARE_PIECES);
    s->rates.loop = loop;
    s->tick.data = s;
    (void)fair_init(&s->fair, loop); /* an idle handle: never fails */
    return uv_timer_init(loop, &s->tick);
}

static void on_fair_closed(uv_handle_t *handle)
{
    struct conn_set *s = container_of((uv_idle_t *)handle, struct conn_set, fair.idle);

    s->on_closed(s->arg);
}

static void on_set_closed(uv_handle_t *handle)
{
    struct conn_set *s = handle->data;

    fair_close(&s->fair, on_fair_closed);
}

void conn_set_close(struct conn_set *s, void (*cb)(void *arg))
{
    assert(!s->first);
    s->on_closed = cb;
    budget_done(&s->budget);
    uv_close((uv_handle_t *)&s->tick, on_set_closed);
}

void conn_set_fail(struct conn_set *s, const struct failure *why)
{
    for (struct conn *c = s->first; c; c = c->next) {
        if (c->state == CONN_TALKING) {
            nbd_fail(c->nbd, why);
            if (c->pulling)
                pull_fail(&c->pull, why);
            conn_ask_mapped(c);
        }
        conn_settle(c);
    }
}

void conn_set_kill(struct conn_set *s, const struct failure *why)
{
    for (struct conn *c = s->first; c; c = c->next) {
        conn_kill(c, why->err, "%s", why->text);
        conn_settle(c);
    }
}

static struct json_object *to_json(struct conn *c)
{
    struct json_object *o = json_object_new_object();

    json_object_object_add(o, "id", json_object_new_uint64(c->id));
    json_object_object_add(o, "client", json_object_new_string(c->identity));
    json_object_object_add(o, "origin", json_object_new_string(c->origin));
    json_object_object_add(o, "tls", conn_tls_to_json(c));
    json_object_object_add(o, "export", c->export_name && c->pulling ? json_object_new_string(c->export_name) : NULL);
    json_object_object_add(o, "ticket", json_object_new_boolean(c->ticket != NULL));
    json_object_object_add(o, "session",
                           c->stay_state == STAY_ENTERED ? json_object_new_string(vm_stay_session(&c->stay)) : NULL);
    json_object_object_add(o, "bytes", json_object_new_uint64(c->pulling ? c->pull.nbytes : 0));
    json_object_object_add(o, "requests", json_object_new_uint64(c->nbd ? nbd_inflight(c->nbd) : 0));
    json_object_object_add(o, "rate",
                           json_object_new_uint64(c->stay_state == STAY_ENTERED ? vm_stay_rate(&c->stay) : 0));
    json_object_object_add(o, "buffered", json_object_new_uint64(c->pulling ? c->pull.window : 0));
    json_object_object_add(o, "seconds", json_object_new_uint64((uv_hrtime() - c->born_ns) / 1000000000));
    return o;
}

struct json_object *conn_set_to_json(struct conn_set *s)
{
    struct json_object *all = json_object_new_array();

    for (struct conn *c = s->first; c; c = c->next)
        if (c->state < CONN_CLOSING)
            json_object_array_add(all, to_json(c));
    return all;
}
