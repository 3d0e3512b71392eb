/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* control_checkpoints: commands that change checkpoints and their notes. */
#include "control_internal.h"
#include "log.h"
#include "vm.h"

#include "backup/names.h"
#include "backup/notes.h"
#include "qmp/commands.h"

#include <errno.h>

/*
 * A change goes on to its end although the client may leave: half a change is worse. So it has no "forget", and its
 * VM change is never forgotten.
 */
struct change {
    struct control_call call;
    struct vm_change op;
    char *name;        /* owned: for the log */
    const char *verb;  /* "create", "delete" */
    const char *count; /* what n is called in the answer */
    struct vm *vm;
};

static void on_changed(struct vm_change *op, unsigned n, const struct failure *f)
{
    struct change *c = op->arg;
    _cleanup_free_ char *name = TAKE_PTR(c->name);
    struct json_object *o;

    if (f) {
        log_warning("VM %s: cannot %s \"%s\": %s", vm_name(c->vm), c->verb, name, f->text);
        control_fail(&c->call, f);
        return;
    }
    log_info("VM %s: %s \"%s\": %u %s", vm_name(c->vm), c->verb, name, n, c->count);
    if (op->warning.err)
        log_warning("VM %s: %s \"%s\": %s", vm_name(c->vm), c->verb, name, op->warning.text);
    o = json_object_new_object();
    json_object_object_add(o, c->count, json_object_new_uint64(n));
    if (op->warning.err)
        json_object_object_add(o, "warning", json_object_new_string(op->warning.text));
    control_return(&c->call, o);
}

/* false: the call is answered, and gone. */
static bool change_init(struct control_call *call, struct json_object *args, const char *name, const char *verb,
                        const char *count)
{
    struct change *c = container_of(call, struct change, call);
    struct vm *vm = control_vm(call, args);

    if (!vm) /* the call is gone, and c with it */
        return false;
    c->vm = vm;
    c->verb = verb;
    c->count = count;
    c->name = strdup(name);
    c->op = (struct vm_change){.cb = on_changed, .arg = c};
    if (c->name)
        return true;
    control_error(call, CONTROL_GENERIC, "out of memory");
    return false;
}

static void change_refused(struct control_call *call, int r, const struct failure *f)
{
    struct change *c = container_of(call, struct change, call);
    _cleanup_free_ char *name = TAKE_PTR(c->name);

    if (f && f->err)
        control_fail(call, f);
    else if (r == -ENOTCONN || r == -ESHUTDOWN)
        control_error(call, CONTROL_GENERIC, "Cannot %s \"%s\" of VM \"%s\" now: %s", c->verb, name, vm_name(c->vm),
                      vm_trouble(c->vm));
    else
        control_error(call, CONTROL_GENERIC, "Cannot %s \"%s\" of VM \"%s\" now: %s", c->verb, name, vm_name(c->vm),
                      strerror(-r));
}

/* -- create, delete ------------------------------------------------------------------------------------------------ */

static void create(struct control_call *call, struct json_object *args)
{
    struct change *c = container_of(call, struct change, call);
    const char *name = control_string(args, "name");
    struct vm_create what = {.checkpoint = name,
                             .description = control_string(args, "description"),
                             .parent = control_string(args, "parent")};
    _cleanup_free_ const char **disks = control_strings(args, "disk", &what.ndisks);
    struct failure f = {0};
    int r;

    if (name_check(name, &f) < 0) {
        control_fail(call, &f);
        return;
    }
    if (!change_init(call, args, name, "create checkpoint", "records"))
        return;
    what.disks = disks;
    r = disks ? vm_create_start(c->vm, &c->op, &what) : -ENOMEM;
    if (r == -ENOENT)
        (void)failure_set(&f, r, "VM '%s' has no note of a checkpoint '%s' that could be the parent", vm_name(c->vm),
                          what.parent);
    if (r < 0)
        change_refused(call, r, &f);
}

static const char *const whats[] = {[VM_DELETE_ITSELF] = "itself",
                                    [VM_DELETE_WITH_DESCENDANTS] = "with-descendants",
                                    [VM_DELETE_DESCENDANTS] = "descendants",
                                    [VM_DELETE_NOTE] = "note"};

static void delete (struct control_call *call, struct json_object *args)
{
    struct change *c = container_of(call, struct change, call);
    const char *what = control_string(args, "what"), *name = control_string(args, "name");
    size_t which = VM_DELETE_ITSELF, ndisks;
    _cleanup_free_ const char **disks = control_strings(args, "disk", &ndisks);
    struct failure f = {0};
    int r;

    while (what && which < ARRAY_SIZE(whats) && strcmp(whats[which], what) != 0)
        which++;
    if (which == ARRAY_SIZE(whats)) {
        control_error(call, CONTROL_GENERIC,
                      "\"what\" is \"itself\", \"with-descendants\", \"descendants\" or \"note\", not \"%s\"", what);
        return;
    }
    if (which == VM_DELETE_NOTE && ndisks) {
        control_error(call, CONTROL_GENERIC, "A note is about all disks: it cannot be deleted for some");
        return;
    }
    if (!change_init(call, args, name, "delete checkpoint", which == VM_DELETE_NOTE ? "notes" : "records"))
        return;
    r = disks ? vm_delete_start(c->vm, &c->op, name, disks, ndisks, (enum vm_delete)which) : -ENOMEM;
    if (r == -ENOENT)
        (void)failure_set(&f, r, "checkpoint '%s' of VM '%s' has no note, so no descendants are known", name,
                          vm_name(c->vm));
    if (r < 0)
        change_refused(call, r, &f);
}

/* -- notes alone --------------------------------------------------------------------------------------------------- */

static void export_notes(struct control_call *call, struct json_object *args)
{
    struct vm *vm = control_vm(call, args);

    if (vm)
        control_return(call, vm_export(vm));
}

static void import_start(struct control_call *call, struct json_object *doc)
{
    struct change *c = container_of(call, struct change, call);
    struct failure f = {0};
    int r = vm_import_start(c->vm, &c->op, doc, &f);

    if (r < 0)
        change_refused(call, r, &f);
}

static void import_notes(struct control_call *call, struct json_object *args)
{
    struct json_object *doc = json_object_object_get(args, "document");

    if (change_init(call, args, control_string(args, "vm"), "import the notes of VM", "notes"))
        import_start(call, doc);
}

static void rename_vm(struct control_call *call, struct json_object *args)
{
    struct change *c = container_of(call, struct change, call);
    const char *from = control_string(args, "from");
    struct failure f = {0};
    int r;

    if (server_keeps_notes(call->server, from)) {
        control_error(call, CONTROL_GENERIC, "VM \"%s\" is one of qpulld's, and keeps its notes", from);
        return;
    }
    if (!change_init(call, args, from, "take over the notes of VM", "notes"))
        return;
    r = vm_rename_start(c->vm, &c->op, from, &f);
    if (r < 0)
        change_refused(call, r, &f);
}

/* Before anything else is done with the disk; whether there is such a one nobody can say while the VM is off. */
static void invalidate(struct control_call *call, struct json_object *args)
{
    struct change *c = container_of(call, struct change, call);
    const char *disk = control_string(args, "disk");
    struct failure f = {0};
    int r;

    if (!*disk) {
        control_error(call, CONTROL_GENERIC, "Which disk was restored? Say its name");
        return;
    }
    if (!change_init(call, args, disk, "call invalid the checkpoints of restored disk", "disks"))
        return;
    r = vm_restored_start(c->vm, &c->op, disk, &f);
    if (r < 0)
        change_refused(call, r, &f);
}

/* -- adopt --------------------------------------------------------------------------------------------------------- */

/*
 * A note for records that have none (they were made by somebody else, or the notes are lost), or a better one. Which
 * disks have a record is seen from the records themselves; one that is usable must be there.
 */
struct adopt {
    struct change change; /* first: its call is what the control socket knows */
    struct vm_query query;
    struct json_object *args; /* owned */
};

/* What is noted of that checkpoint up to now; NULL: nothing. Owned by the caller. */
static struct json_object *noted(struct json_object *doc, const char *name)
{
    struct json_object *all = json_object_object_get(doc, "checkpoints");

    for (size_t i = 0; i < json_object_array_length(all); i++) {
        struct json_object *o = json_object_array_get_idx(all, i);

        if (strcmp(json_object_get_string(json_object_object_get(o, "name")), name) == 0)
            return json_object_get(o);
    }
    return NULL;
}

static struct json_object *disks_with(const struct disk_list *disks, const char *name, const char **ret_why)
{
    struct json_object *a = json_object_new_array();
    bool usable = false;

    *ret_why = reason_text(REASON_NO_SUCH_CHECKPOINT);
    for (size_t i = 0; i < disks->ndisks; i++) {
        const struct disk *d = &disks->disks[i];
        const struct checkpoint *c = disk_checkpoint(d, name);
        struct json_object *o;

        if (!c)
            continue;
        if (c->reason == REASON_NONE)
            usable = true;
        else
            *ret_why = reason_text(c->reason);
        o = qmp_args_strings("name", d->name, "node", d->node, NULL);
        json_object_object_add(o, "size", json_object_new_uint64(d->size));
        json_object_array_add(a, o);
    }
    if (usable)
        *ret_why = NULL;
    return a;
}

/* Adds to the list; -EINVAL: there is no usable record. */
static int adopt_one(struct json_object *list, struct json_object *old, const char *vm, const struct disk_list *disks,
                     const char *parent, const char *name, struct json_object *args, struct failure *f)
{
    struct json_object *o = noted(old, name), *created = json_object_object_get(args, "created-ms");
    const char *description = control_string(args, "description"), *said = control_string(args, "parent"), *why;
    struct json_object *with = disks_with(disks, name, &why);

    if (why) {
        json_object_put(with);
        json_object_put(o);
        return failure_set(f, -EINVAL, "checkpoint '%s' cannot be adopted: %s", name, why);
    }
    if (!o) {
        o = qmp_args_strings("name", name, "vm", vm, "description", "", NULL);
        json_object_object_add(o, "format", json_object_new_int(NOTES_FORMAT));
        json_object_object_add(o, "created_ms", json_object_new_int64(unix_time_ms()));
        json_object_object_add(o, "parent", parent ? json_object_new_string(parent) : NULL);
    }
    json_object_object_add(o, "disks", with);
    json_object_object_add(o, "broken", NULL);
    if (description)
        json_object_object_add(o, "description", json_object_new_string(description));
    if (said)
        json_object_object_add(o, "parent", *said ? json_object_new_string(said) : NULL);
    if (created)
        json_object_object_add(o, "created_ms", json_object_get(created));
    json_object_array_add(list, o);
    return 0;
}

/* The name that was said, or every usable record that has no note, each the parent of the next. */
static int adopt_all(struct json_object *list, struct json_object *old, struct vm *vm, const struct disk_list *disks,
                     struct json_object *args, struct failure *f)
{
    const char *name = control_string(args, "name"), *parent = vm_current(vm);
    struct json_object *all;
    int r = 0;

    if (name)
        return adopt_one(list, old, vm_name(vm), disks, parent && strcmp(parent, name) == 0 ? NULL : parent, name, args,
                         f);
    all = vm_checkpoints_to_json(vm, disks, NULL);
    for (size_t i = 0; i < json_object_array_length(all) && r == 0; i++) {
        struct json_object *o = json_object_array_get_idx(all, i);
        const char *next = control_string(o, "name");

        if (json_object_get_boolean(json_object_object_get(o, "noted")) ||
            !json_object_get_boolean(json_object_object_get(o, "usable")) || (parent && strcmp(parent, next) == 0))
            continue;
        r = adopt_one(list, old, vm_name(vm), disks, parent, next, args, f);
        parent = control_string(json_object_array_get_idx(list, json_object_array_length(list) - 1), "name");
    }
    json_object_put(all);
    return r;
}

static void on_adopt_disks(struct vm_query *q, const struct disk_list *disks, const struct failure *f)
{
    struct adopt *a = container_of(q, struct adopt, query);
    struct json_object *args = TAKE_PTR(a->args), *doc = NULL, *list = json_object_new_array(), *old = NULL;
    struct control_call *call = &a->change.call;
    struct failure mine = {0};

    if (!f) {
        old = vm_export(a->change.vm);
        if (!old)
            (void)failure_set(&mine, -ENOMEM, "out of memory");
        else
            (void)adopt_all(list, old, a->change.vm, disks, args, &mine);
    }
    if (f || mine.err) {
        json_object_put(list);
        change_refused(call, -EINVAL, f ? f : &mine);
    } else {
        doc = qmp_args_strings("vm", vm_name(a->change.vm), NULL);
        json_object_object_add(doc, "format", json_object_new_int(NOTES_FORMAT));
        json_object_object_add(doc, "checkpoints", list);
        import_start(call, doc);
    }
    json_object_put(doc);
    json_object_put(old);
    json_object_put(args);
}

static void adopt(struct control_call *call, struct json_object *args)
{
    struct adopt *a = container_of(call, struct adopt, change.call);
    const char *name = control_string(args, "name");
    bool accept = json_object_get_boolean(json_object_object_get(args, "accept"));
    struct failure f = {0};
    int r;

    if (name && name_check(name, &f) < 0) {
        control_fail(call, &f);
        return;
    }
    if (!name && (control_string(args, "parent") || json_object_object_get_ex(args, "created-ms", NULL))) {
        control_error(call, CONTROL_GENERIC, "A parent or a time of creation belongs to one checkpoint: say its name");
        return;
    }
    if (accept && !name) {
        control_error(call, CONTROL_GENERIC, "What happened to a record is accepted for one checkpoint: say its name");
        return;
    }
    if (!change_init(call, args, name ? name : "(all)", "adopt checkpoint", "notes"))
        return;
    if (accept) {
        log_warning("VM %s: checkpoint %s: its records are taken for right from now on, as somebody said",
                    vm_name(a->change.vm), name);
        vm_accept(a->change.vm, name);
    }
    a->args = json_object_get(args);
    r = vm_query_start(a->change.vm, &a->query, on_adopt_disks, a);
    if (r < 0) {
        json_object_put(TAKE_PTR(a->args));
        change_refused(call, r, NULL);
    }
}

static const struct control_command commands[] = {
    {.name = "checkpoint-create",
     .right = ACCESS_CHECKPOINT,
     .params = {{"vm", REQUIRED}, {"name", REQUIRED}, {"disk", .type = CONTROL_STRINGS}, {"description"}, {"parent"}},
     .size = sizeof(struct change),
     .run = create},
    {.name = "checkpoint-delete",
     .right = ACCESS_CHECKPOINT,
     .params = {{"vm", REQUIRED}, {"name", REQUIRED}, {"disk", .type = CONTROL_STRINGS}, {"what"}},
     .size = sizeof(struct change),
     .run = delete},
    {.name = "checkpoint-adopt",
     .right = ACCESS_CHECKPOINT,
     .params = {{"vm", REQUIRED},
                {"name"},
                {"description"},
                {"parent"},
                {"created-ms", .type = CONTROL_NUMBER},
                {"accept", .type = CONTROL_BOOL}},
     .size = sizeof(struct adopt),
     .run = adopt},
    {.name = "checkpoint-invalidate",
     .right = ACCESS_CHECKPOINT,
     .params = {{"vm", REQUIRED}, {"disk", REQUIRED}},
     .size = sizeof(struct change),
     .run = invalidate},
    {.name = "checkpoint-export", .right = ACCESS_LIST, .params = {{"vm", REQUIRED}}, .run = export_notes},
    {.name = "checkpoint-import",
     .right = ACCESS_CHECKPOINT,
     .params = {{"vm", REQUIRED}, {"document", REQUIRED, CONTROL_OBJECT}},
     .size = sizeof(struct change),
     .run = import_notes},
    {.name = "checkpoint-rename-vm",
     .right = CONTROL_ADMIN,
     .params = {{"vm", REQUIRED}, {"from", REQUIRED}},
     .size = sizeof(struct change),
     .run = rename_vm},
};
const struct control_table control_checkpoints = {commands, ARRAY_SIZE(commands)};
