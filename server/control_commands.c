/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* control_commands: what the control socket can be asked. The table at the end has them all. */
#include "control_internal.h"
#include "vm.h"

#include "backup/names.h"

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

static const char *string_of(struct json_object *args, const char *name)
{
    struct json_object *o;

    return json_object_object_get_ex(args, name, &o) ? json_object_get_string(o) : NULL;
}

/* The VM that "vm" names; NULL: the call is answered, and gone. */
static struct vm *vm_of(struct control_call *call, struct json_object *args)
{
    const char *name = string_of(args, "vm");
    struct vm *vm = server_vm(call->server, name);

    if (!vm)
        control_error(call, CONTROL_NO_DEVICE, "There is no VM \"%s\" here", name);
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

    for (size_t i = 0; i < control_ncommands; i++) {
        struct json_object *o = json_object_new_object();
        json_object_object_add(o, "name", json_object_new_string(control_commands[i].name));
        json_object_array_add(all, o);
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
        json_object_array_add(all, vm_to_json(server_vm_at(call->server, i)));
    control_return(call, all);
}

static void query_sessions(struct control_call *call, struct json_object *args)
{
    struct json_object *all = json_object_new_array();

    for (size_t i = 0; i < server_nvms(call->server); i++) {
        struct json_object *o = vm_session_to_json(server_vm_at(call->server, i));
        if (o)
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
};

static void ask_forget(struct control_call *call)
{
    struct ask *a = container_of(call, struct ask, call);

    vm_query_forget(&a->query);
    free(TAKE_PTR(a->disk));
}

static void ask_start(struct control_call *call, struct json_object *args,
                      void (*cb)(struct vm_query *, const struct disk_list *, const struct failure *))
{
    struct ask *a = container_of(call, struct ask, call);
    const char *disk = string_of(args, "disk");
    struct vm *vm = vm_of(call, args);
    int r;

    if (!vm)
        return;
    a->vm = vm;
    a->disk = disk ? strdup(disk) : NULL;
    r = disk && !a->disk ? -ENOMEM : vm_query_start(vm, &a->query, cb, a);
    if (r < 0) {
        free(TAKE_PTR(a->disk));
        control_error(call, CONTROL_GENERIC, "VM \"%s\" cannot be asked now: %s", vm_name(vm), strerror(-r));
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

static void on_checkpoints(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct ask *a = container_of(q, struct ask, query);
    _cleanup_free_ char *disk = TAKE_PTR(a->disk);
    struct json_object *all;

    if (f) {
        control_fail(&a->call, f);
        return;
    }
    if (disk && !disk_list_find(disks, disk)) {
        control_error(&a->call, CONTROL_NO_DEVICE, "VM \"%s\" has no disk \"%s\"", vm_name(a->vm), disk);
        return;
    }
    all = json_object_new_array();
    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];
        for (size_t j = 0; (!disk || strcmp(disk, d->name) == 0) && j < d->ncheckpoints; j++)
            json_object_array_add(all, checkpoint_to_json(d, &d->checkpoints[j]));
    }
    control_return(&a->call, all);
}

static void query_checkpoints(struct control_call *call, struct json_object *args)
{
    ask_start(call, args, on_checkpoints);
}

/* -- what changes something ---------------------------------------------------------------------------------------- */
struct change {
    struct control_call call;
    struct vm_change op;
    char *name;       /* owned: for the log */
    const char *verb; /* "create", "delete" */
    struct vm *vm;
};

static void on_changed(struct vm_change *op, unsigned n, const struct failure *f)
{
    struct change *c = op->arg;
    _cleanup_free_ char *name = TAKE_PTR(c->name);
    struct json_object *o;

    if (f) {
        log_warning("VM %s: cannot %s checkpoint \"%s\": %s", vm_name(c->vm), c->verb, name, f->text);
        control_fail(&c->call, f);
        return;
    }
    log_info("VM %s: %s checkpoint \"%s\": %u record%s", vm_name(c->vm), c->verb, name, n, n == 1 ? "" : "s");
    o = json_object_new_object();
    json_object_object_add(o, "records", json_object_new_uint64(n));
    control_return(&c->call, o);
}

/* Goes on to its end although the client may leave: half a change is worse. */
static void change_start(struct control_call *call, struct json_object *args, const char *verb,
                         int (*start)(struct vm *, struct vm_change *, const char *, const char *const *, size_t))
{
    struct change *c = container_of(call, struct change, call);
    const char *name = string_of(args, "name"), *disk = string_of(args, "disk");
    struct vm *vm = vm_of(call, args);
    int r;

    if (!vm)
        return;
    c->vm = vm;
    c->verb = verb;
    c->name = strdup(name);
    c->op = (struct vm_change){.cb = on_changed, .arg = c};
    r = c->name ? start(vm, &c->op, name, &disk, disk ? 1 : 0) : -ENOMEM;
    if (r < 0) {
        free(TAKE_PTR(c->name));
        control_error(call, CONTROL_GENERIC, "Cannot %s checkpoint \"%s\" of VM \"%s\" now: %s", verb, name,
                      vm_name(vm), strerror(-r));
    }
}

static void checkpoint_create(struct control_call *call, struct json_object *args)
{
    struct failure f = {0};

    if (name_check(string_of(args, "name"), &f) < 0)
        control_fail(call, &f);
    else
        change_start(call, args, "create", vm_create_start);
}

static void checkpoint_delete(struct control_call *call, struct json_object *args)
{
    change_start(call, args, "delete", vm_delete_start);
}

const struct control_command control_commands[] = {
    {.name = "query-version", .run = query_version},
    {.name = "query-commands", .run = query_commands},
    {.name = "query-status", .run = query_status},
    {.name = "query-vms", .run = query_vms},
    {.name = "query-sessions", .run = query_sessions},
    {.name = "query-disks", .required = {"vm"}, .size = sizeof(struct ask), .run = query_disks, .forget = ask_forget},
    {.name = "query-checkpoints",
     .required = {"vm"},
     .optional = {"disk"},
     .size = sizeof(struct ask),
     .run = query_checkpoints,
     .forget = ask_forget},
    {.name = "checkpoint-create",
     .required = {"vm", "name"},
     .optional = {"disk"},
     .size = sizeof(struct change),
     .run = checkpoint_create},
    {.name = "checkpoint-delete",
     .required = {"vm", "name"},
     .optional = {"disk"},
     .size = sizeof(struct change),
     .run = checkpoint_delete},
};
const size_t control_ncommands = ARRAY_SIZE(control_commands);
