/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* control_metrics: the daemon's numbers over the control socket. */
#include "control_internal.h"
#include "metrics.h"

/* {"content-type", "text"}: JSON all around it, so that it can be had by whoever speaks QMP. */
static void metrics(struct control_call *call, struct json_object *args)
{
    _cleanup_free_ char *text = metrics_text(call->server);
    struct json_object *o;

    if (!text) {
        control_error(call, CONTROL_GENERIC, "the server is out of memory");
        return;
    }
    o = json_object_new_object();
    json_object_object_add(o, "content-type", json_object_new_string(METRICS_CONTENT_TYPE));
    json_object_object_add(o, "text", json_object_new_string(text));
    control_return(call, o);
}

static const struct control_command commands[] = {
    {.name = "metrics", .right = CONTROL_ADMIN, .run = metrics},
};
const struct control_table control_metrics = {commands, ARRAY_SIZE(commands)};
