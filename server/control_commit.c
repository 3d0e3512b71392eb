/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* control_commit: block commits on the control socket: begun, looked at, cancelled. */
#include "control_internal.h"
#include "vm.h"

#include "log.h"
#include "server.h"

#include <errno.h>

struct control_commit {
    struct control_call call;
    struct vm_commit request;
};

static bool flag_of(struct json_object *args, const char *name)
{
    return json_object_get_boolean(json_object_object_get(args, name));
}

static void on_begun(struct vm_commit *request, const char *job, const struct failure *f)
{
    struct control_commit *c = container_of(request, struct control_commit, request);
    struct json_object *o;

    if (f) {
        control_fail(&c->call, f);
        return;
    }
    o = json_object_new_object();
    (void)json_object_object_add(o, "id", json_object_new_string(job));
    control_return(&c->call, o);
}

static void block_commit(struct control_call *call, struct json_object *args)
{
    struct control_commit *c = container_of(call, struct control_commit, call);
    struct vm *vm = control_vm(call, args);
    struct failure f = {0};

    if (!vm)
        return;
    c->request = (struct vm_commit){.disk = control_string(args, "disk"),
                                    .top = control_string(args, "top"),
                                    .base = control_string(args, "base"),
                                    .shallow = flag_of(args, "shallow"),
                                    .active = flag_of(args, "active"),
                                    .delete = flag_of(args, "delete"),
                                    .force = flag_of(args, "force"),
                                    .cb = on_begun};
    if (vm_commit_start(vm, &c->request, &f) < 0)
        control_fail(call, &f);
}

static void query_jobs(struct control_call *call, struct json_object *args)
{
    struct json_object *all = json_object_new_array();

    for (size_t i = 0; i < server_nvms(call->server); i++) {
        struct vm *vm = server_vm_at(call->server, i);
        struct json_object *o = control_sees(call, vm) ? vm_commit_to_json(vm) : NULL;

        if (o)
            (void)json_object_array_add(all, o);
    }
    control_return(call, all);
}

static void job_cancel(struct control_call *call, struct json_object *args)
{
    const char *job = control_string(args, "id");

    for (size_t i = 0; i < server_nvms(call->server); i++) {
        if (vm_commit_cancel(server_vm_at(call->server, i), job) == 0) {
            control_return(call, NULL);
            return;
        }
    }
    control_error(call, CONTROL_GENERIC, "There is no job \"%s\"", job);
}

static const struct control_command commands[] = {
    {.name = "block-commit",
     .right = ACCESS_CONTROL,
     .params = {{"vm", REQUIRED},
                {"disk", REQUIRED},
                {"top"},
                {"base"},
                {"shallow", .type = CONTROL_BOOL},
                {"active", .type = CONTROL_BOOL},
                {"delete", .type = CONTROL_BOOL},
                {"force", .type = CONTROL_BOOL}},
     .size = sizeof(struct control_commit),
     .run = block_commit},
    {.name = "query-jobs", .run = query_jobs},
    {.name = "job-cancel", .right = CONTROL_ADMIN, .params = {{"id", REQUIRED}}, .run = job_cancel},
};
const struct control_table control_jobs = {commands, ARRAY_SIZE(commands)};
