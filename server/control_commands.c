/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* control_commands: what the control socket can be asked about VMs and disks (control_checkpoints: about checkpoints).
 */
#include "control_internal.h"
#include "doctor.h"
#include "lease.h"
#include "vm.h"

#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>

struct json_object *control_version_to_json(void)
{
    struct json_object *o = json_object_new_object();
    int major = 0, minor = 0, micro = 0;

    (void)sscanf(QPULL_VERSION, "%d.%d.%d", &major, &minor, &micro); /* NOLINT(cert-err34-c): our own constant */
    json_object_object_add(o, "major", json_object_new_int(major));
    json_object_object_add(o, "minor", json_object_new_int(minor));
    json_object_object_add(o, "micro", json_object_new_int(micro));
    return o;
}

const char *control_string(struct json_object *args, const char *name)
{
    struct json_object *o;

    return json_object_object_get_ex(args, name, &o) ? json_object_get_string(o) : NULL;
}

const char **control_strings(struct json_object *args, const char *name, size_t *ret_n)
{
    struct json_object *o = NULL;
    bool one, said = json_object_object_get_ex(args, name, &o);
    const char **strings;

    one = said && json_object_is_type(o, json_type_string);
    *ret_n = one ? 1 : said ? json_object_array_length(o) : 0;
    strings = calloc(*ret_n + 1, sizeof(*strings));
    for (size_t i = 0; strings && i < *ret_n; i++)
        strings[i] = json_object_get_string(one ? o : json_object_array_get_idx(o, i));
    return strings;
}

struct vm *control_vm(struct control_call *call, struct json_object *args)
{
    const char *name = control_string(args, "vm");
    struct vm *vm = server_vm(call->server, name);

    if (!vm)
        control_error(call, CONTROL_NO_DEVICE, CONTROL_NO_VM, name);
    return vm;
}

/* -- at once ------------------------------------------------------------------------------------------------------- */
static void query_version(struct control_call *call, struct json_object *args)
{
    struct json_object *o = json_object_new_object();

    json_object_object_add(o, "qpull", control_version_to_json());
    json_object_object_add(o, "package", json_object_new_string("qpull " QPULL_VERSION));
    control_return(call, o);
}

static void query_commands(struct control_call *call, struct json_object *args)
{
    struct json_object *all = json_object_new_array();

    for (size_t t = 0; t < CONTROL_TABLES; t++) {
        for (size_t i = 0; i < control_tables[t]->ncommands; i++)
            json_object_array_add(all, qmp_args_strings("name", control_tables[t]->commands[i].name, NULL));
    }
    control_return(call, all);
}

static void query_status(struct control_call *call, struct json_object *args)
{
    control_return(call, server_status_to_json(call->server));
}

static void query_vms(struct control_call *call, struct json_object *args)
{
    struct json_object *all = json_object_new_array();

    for (size_t i = 0; i < server_nvms(call->server); i++)
        if (control_sees(call, server_vm_at(call->server, i)))
            json_object_array_add(all, vm_to_json(server_vm_at(call->server, i)));
    control_return(call, all);
}

static void query_sessions(struct control_call *call, struct json_object *args)
{
    struct json_object *all = json_object_new_array();

    for (size_t i = 0; i < server_nvms(call->server); i++) {
        struct vm *vm = server_vm_at(call->server, i);
        struct json_object *o = control_sees(call, vm) ? vm_session_to_json(vm) : NULL;

        if (!o)
            continue;
        json_object_object_add(
            o, "begun",
            lease_to_json(server_leases(call->server), json_object_get_string(json_object_object_get(o, "id"))));
        json_object_array_add(all, o);
    }
    control_return(call, all);
}

/* -- what QEMU must be asked for ----------------------------------------------------------------------------------- */
struct ask {
    struct control_call call;
    struct vm_query query;
    struct vm *vm;
    char *disk; /* owned, or NULL: all */
    char *name; /* owned, or NULL: a checkpoint's */
};

static void ask_forget(struct control_call *call)
{
    struct ask *a = container_of(call, struct ask, call);

    vm_query_forget(&a->query);
    free(TAKE_PTR(a->disk));
    free(TAKE_PTR(a->name));
}

static void ask_start(struct control_call *call, struct json_object *args,
                      void (*cb)(struct vm_query *, const struct disk_list *, const struct failure *))
{
    struct ask *a = container_of(call, struct ask, call);
    const char *disk = control_string(args, "disk"), *name = control_string(args, "name");
    struct vm *vm = control_vm(call, args); /* NULL: answered, and the call is gone */
    int r;

    if (!vm)
        return;
    a->vm = vm;
    a->disk = disk ? strdup(disk) : NULL;
    a->name = name ? strdup(name) : NULL;
    r = (disk && !a->disk) || (name && !a->name) ? -ENOMEM : vm_query_start(vm, &a->query, cb, a);
    if (r < 0) {
        free(TAKE_PTR(a->disk));
        free(TAKE_PTR(a->name));
        control_error(call, CONTROL_GENERIC, "VM \"%s\" cannot be asked now: %s", vm_name(vm),
                      r == -ENOTCONN || r == -ESHUTDOWN ? vm_trouble(vm) : strerror(-r));
    }
}

static void on_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct ask *a = container_of(q, struct ask, query);

    free(TAKE_PTR(a->disk));
    if (f)
        control_fail(&a->call, f);
    else
        control_return(&a->call, disk_list_to_json(disks, vm_name(a->vm)));
}

static void query_disks(struct control_call *call, struct json_object *args)
{
    ask_start(call, args, on_disks);
}

/* What is asked about disks that are there, as all commands with a "disk" say it. */
static bool has_disk(struct ask *a, const char *disk, const struct disk_list *disks, const struct failure *f)
{
    if (f)
        control_fail(&a->call, f);
    else if (disk && !disk_list_find(disks, disk))
        control_error(&a->call, CONTROL_NO_DEVICE, "VM \"%s\" has no disk \"%s\"", vm_name(a->vm), disk);
    else
        return true;
    return false;
}

static void on_checkpoints(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct ask *a = container_of(q, struct ask, query);
    _cleanup_free_ char *disk = TAKE_PTR(a->disk);

    if (has_disk(a, disk, disks, f))
        control_return(&a->call, vm_checkpoints_to_json(a->vm, disks, disk));
}

static void on_can_increment(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct ask *a = container_of(q, struct ask, query);
    _cleanup_free_ char *disk = TAKE_PTR(a->disk), *name = TAKE_PTR(a->name);

    if (has_disk(a, disk, disks, f))
        control_return(&a->call, vm_can_increment_to_json(a->vm, disks, name, disk));
}

static void can_increment(struct control_call *call, struct json_object *args)
{
    ask_start(call, args, on_can_increment);
}

static void query_checkpoints(struct control_call *call, struct json_object *args)
{
    ask_start(call, args, on_checkpoints);
}

/* -- the doctor ---------------------------------------------------------------------------------------------------- */
struct consult {
    struct control_call call;
    struct doctor *doctor;
};

static void on_consulted(void *arg, struct json_object *checks)
{
    struct consult *c = arg;

    control_return(&c->call, checks);
}

static void consult(struct control_call *call, struct json_object *args)
{
    struct consult *c = container_of(call, struct consult, call);
    struct vm *vm = control_string(args, "vm") ? control_vm(call, args) : NULL;

    if (control_string(args, "vm") && !vm)
        return;
    if (doctor_start(call->server, vm, on_consulted, c, &c->doctor) < 0)
        control_error(call, CONTROL_GENERIC, "out of memory");
}

static void consult_forget(struct control_call *call)
{
    doctor_forget(container_of(call, struct consult, call)->doctor);
}

static const struct control_command commands[] = {
    {.name = "query-version", .run = query_version},
    {.name = "query-commands", .run = query_commands},
    {.name = "query-status", .right = CONTROL_ADMIN, .run = query_status},
    {.name = "query-vms", .run = query_vms},
    {.name = "query-sessions", .run = query_sessions},
    {.name = "doctor",
     .right = ACCESS_CONTROL,
     .params = {{"vm"}},
     .size = sizeof(struct consult),
     .run = consult,
     .forget = consult_forget},
    {.name = "query-disks",
     .right = ACCESS_LIST,
     .params = {{"vm", REQUIRED}},
     .size = sizeof(struct ask),
     .run = query_disks,
     .forget = ask_forget},
    {.name = "query-checkpoints",
     .right = ACCESS_LIST,
     .params = {{"vm", REQUIRED}, {"disk"}},
     .size = sizeof(struct ask),
     .run = query_checkpoints,
     .forget = ask_forget},
    {.name = "can-increment",
     .right = ACCESS_LIST,
     .params = {{"vm", REQUIRED}, {"name", REQUIRED}, {"disk"}},
     .size = sizeof(struct ask),
     .run = can_increment,
     .forget = ask_forget},
};
const struct control_table control_general = {commands, ARRAY_SIZE(commands)};

const struct control_table *const control_tables[CONTROL_TABLES] = {&control_general, &control_checkpoints,
                                                                    &control_jobs, &control_sessions, &control_metrics};
