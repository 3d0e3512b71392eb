/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* control_sessions: sessions begun and ended on the control socket, and the tickets for them. */
#include "control_internal.h"
#include "lease.h"
#include "log.h"
#include "uri.h"
#include "vm.h"

#include "backup/names.h"

#include <errno.h>
#include <stdio.h>

static bool flag_of(struct json_object *args, const char *name)
{
    return json_object_get_boolean(json_object_object_get(args, name));
}

/* Who may begin one may join it over NBD: it is the same identity there. */
#define IDENTITY_SIZE 32
static const char *identity_of(const struct control_call *call, char to[IDENTITY_SIZE])
{
    (void)snprintf(to, IDENTITY_SIZE, "uid:%u", (unsigned)control_uid(call));
    return to;
}

/* -- begin --------------------------------------------------------------------------------------------------------- */
struct begin {
    struct control_call call;
    struct lease *lease; /* borrowed until on_begun() */
    bool tickets;
};

/* An array of URIs; the name is of one disk. */
static struct json_object *uris_of(const struct server *s, const char *export_name, bool local)
{
    struct json_object *all = json_object_new_array();

    for (size_t i = 0; i < server_nlisteners(s); i++) {
        _cleanup_free_ char *uri = uri_of(server_config(s), server_address(s, i), export_name, local);

        if (uri)
            json_object_array_add(all, json_object_new_string(uri));
    }
    return all;
}

/* False: no export of this daemon has a URI by which it would know who speaks to its control socket. */
static bool is_known_anywhere(const struct server *s)
{
    struct json_object *all = uris_of(s, "", /* local= */ true);
    bool any = json_object_array_length(all) > 0;

    json_object_put(all);
    return any;
}

/* VM/DISK or VM/DISK@NAME, or a ticket: who has that needs no rule, so that he may come from anywhere. */
static int add_disk(struct begin *b, struct json_object *to, struct lease *l, const struct disk *d, struct failure *f)
{
    struct server *s = b->call.server;
    const char *checkpoint = lease_of_vm(l)->checkpoint;
    struct json_object *o = json_object_new_object();
    _cleanup_free_ char *name = NULL;
    char ticket[TICKET_NAME_SIZE];
    int r = 0;

    json_object_array_add(to, o);
    json_object_object_add(o, "disk", json_object_new_string(d->name));
    json_object_object_add(o, "size", json_object_new_uint64(d->size));
    if (b->tickets) {
        r = ticket_new(server_tickets(s), lease_of_vm(l), d->name, lease_ends_ms(l), ticket, f);
        if (r == 0)
            json_object_object_add(o, "uris", uris_of(s, ticket, /* local= */ false));
        return r;
    }
    if (asprintf(&name, "%s/%s%s%s", vm_name(lease_vm(l)), d->name, checkpoint ? "@" : "",
                 checkpoint ? checkpoint : "") < 0) {
        name = NULL;
        return failure_set(f, -ENOMEM, "out of memory");
    }
    json_object_object_add(o, "uris", uris_of(s, name, /* local= */ true));
    return 0;
}

static void on_begun(void *arg, struct lease *l, const struct failure *f)
{
    struct begin *b = arg;
    struct json_object *o, *disks;
    const struct disk_list *list;
    struct failure why = {0};

    if (f) {
        log_warning("control: uid:%u cannot begin a session: %s", (unsigned)control_uid(&b->call), f->text);
        control_fail(&b->call, f);
        return;
    }
    o = json_object_new_object();
    disks = json_object_new_array();
    list = vm_lease_disks(lease_of_vm(l));
    json_object_object_add(o, "session", json_object_new_string(vm_lease_session(lease_of_vm(l))));
    json_object_object_add(o, "vm", json_object_new_string(vm_name(lease_vm(l))));
    json_object_object_add(o, "checkpoint",
                           lease_of_vm(l)->checkpoint ? json_object_new_string(lease_of_vm(l)->checkpoint) : NULL);
    json_object_object_add(o, "begin-timeout",
                           lease_idle_ms(l) ? json_object_new_uint64(lease_idle_ms(l) / 1000) : NULL);
    json_object_object_add(o, "disks", disks);
    for (size_t i = 0; i < list->ndisks && !why.err; i++)
        if (vm_lease_disk(lease_of_vm(l), list->disks[i].name))
            (void)add_disk(b, disks, l, &list->disks[i], &why);
    if (why.err) {
        lease_abandon(l);
        json_object_put(o);
        control_fail(&b->call, &why);
        return;
    }
    control_return(&b->call, o);
}

/* Out of bounds, or no number: 0, and *ret_bad. */
static uint64_t number_of(struct json_object *args, const char *name, uint64_t most, bool *ret_bad)
{
    struct json_object *o;
    int64_t n;

    if (!json_object_object_get_ex(args, name, &o))
        return 0;
    n = json_object_get_int64(o);
    if (n < 1 || (uint64_t)n > most)
        *ret_bad = true;
    return n > 0 ? (uint64_t)n : 0;
}

static int check_wish(struct control_call *call, const struct lease_wish *wish, bool tickets, struct failure *f)
{
    unsigned rights = control_rights(call, wish->vm);
    uint64_t rate = server_config(call->server)->rate;

    if (wish->checkpoint && name_check(wish->checkpoint, f) < 0)
        return f->err;
    if (wish->checkpoint && !(rights & ACCESS_CHECKPOINT))
        return failure_set(f, -EPERM, "%s may not make checkpoints of VM \"%s\" (--allow)", wish->identity,
                           vm_name(wish->vm));
    if (!tickets && !is_known_anywhere(call->server))
        return failure_set(
            f, -EINVAL,
            "qpulld listens at no unix socket, where it would know %s: begin with --ticket, or give it a "
            "--listen unix:PATH",
            wish->identity);
    if (tickets && !(rights & ACCESS_CONTROL))
        return failure_set(f, -EPERM,
                           "%s may not let others in to VM \"%s\": tickets need the right \"control\" "
                           "(--allow)",
                           wish->identity, vm_name(wish->vm));
    if (wish->rate && wish->rate < CONFIG_RATE_LEAST)
        return failure_set(f, -EINVAL, "a rate of %llu bytes a second is less than %uK: clients would give up waiting",
                           (unsigned long long)wish->rate, CONFIG_RATE_LEAST >> 10);
    if (rate && wish->rate > rate)
        return failure_set(f, -EINVAL, "qpulld's --rate allows no session more than %llu bytes a second",
                           (unsigned long long)rate);
    return 0;
}

static void session_begin(struct control_call *call, struct json_object *args)
{
    struct begin *b = container_of(call, struct begin, call);
    struct vm *vm = control_vm(call, args);
    char identity[IDENTITY_SIZE];
    size_t ndisks;
    _cleanup_free_ const char **disks = control_strings(args, "disk", &ndisks);
    struct failure f = {0};
    bool bad_ttl = false, bad_rate = false;
    struct lease_wish wish;

    if (!vm) /* the call is gone */
        return;
    wish = (struct lease_wish){
        .vm = vm,
        .identity = identity_of(call, identity),
        .checkpoint = control_string(args, "checkpoint"),
        .disks = disks,
        .ndisks = ndisks,
        .ttl_ms = 1000 * number_of(args, "ttl", CONFIG_SECONDS_MAX, &bad_ttl),
        .rate = number_of(args, "rate", CONFIG_SIZE_MAX, &bad_rate),
        .keep = flag_of(args, "keep"),
    };

    b->tickets = flag_of(args, "ticket");
    if (bad_ttl)
        (void)failure_set(&f, -EINVAL, "\"ttl\" is no number of seconds from 1 to %u", CONFIG_SECONDS_MAX);
    else if (bad_rate)
        (void)failure_set(&f, -EINVAL, "\"rate\" is no number of bytes a second");
    else if (!disks)
        (void)failure_set(&f, -ENOMEM, "out of memory");
    else if (check_wish(call, &wish, b->tickets, &f) == 0 &&
             lease_begin(server_leases(call->server), &wish, on_begun, b, &b->lease, &f) == 0)
        return;
    control_fail(call, &f);
}

/* Nobody will ever know its name. */
static void begin_forget(struct control_call *call)
{
    struct begin *b = container_of(call, struct begin, call);

    log_warning("control: who wanted to begin a session left before it was up: it ends");
    lease_abandon(b->lease);
}

/* -- end ----------------------------------------------------------------------------------------------------------- */
struct end {
    struct control_call call;
    struct lease *lease; /* borrowed until on_ended() */
};

static void on_ended(void *arg, struct json_object *last, const struct failure *f)
{
    struct end *e = arg;
    struct json_object *o;

    if (f) {
        control_fail(&e->call, f);
        return;
    }
    o = json_object_new_object();
    for (const char *const *key = (const char *const[]){"id", "vm", "checkpoint", "kept", "dropped", "problems", NULL};
         *key; key++)
        json_object_object_add(o, *key, json_object_get(json_object_object_get(last, *key)));
    control_return(&e->call, o);
}

static bool parse_decision(const char *text, enum vm_decision *to)
{
    *to = VM_DECISION_AS_EVER;
    if (text && strcmp(text, "commit") == 0)
        *to = VM_DECISION_KEEP;
    else if (text && strcmp(text, "rollback") == 0)
        *to = VM_DECISION_DROP;
    else
        return !text;
    return true;
}

/* Of whoever began it, and of those who may do all else with the VM; for others it is not there. */
static struct lease *find(struct control_call *call, const char *session)
{
    struct lease *l = lease_find(server_leases(call->server), session);
    char identity[IDENTITY_SIZE];

    if (!l || !(control_rights(call, lease_vm(l)) & ACCESS_CONTROL ||
                strcmp(lease_identity(l), identity_of(call, identity)) == 0))
        return NULL;
    return l;
}

static void session_end(struct control_call *call, struct json_object *args)
{
    struct end *e = container_of(call, struct end, call);
    const char *session = control_string(args, "session"), *what = control_string(args, "checkpoint");
    enum vm_decision decision;

    e->lease = find(call, session);
    if (!e->lease)
        control_error(call, CONTROL_NO_DEVICE, "There is no session \"%s\" here that was begun over this socket",
                      session);
    else if (!parse_decision(what, &decision))
        control_error(call, CONTROL_GENERIC, "\"checkpoint\" is neither \"commit\" nor \"rollback\"");
    else if (decision == VM_DECISION_KEEP && !lease_of_vm(e->lease)->checkpoint)
        control_error(call, CONTROL_GENERIC, "Session \"%s\" was begun without a checkpoint: there is nothing to keep",
                      session);
    else if (lease_end(e->lease, decision, on_ended, e) < 0)
        control_error(call, CONTROL_GENERIC, "Session \"%s\" is being ended already", session);
}

/* It goes on to its end, unheard. */
static void end_forget(struct control_call *call)
{
    lease_end_forget(container_of(call, struct end, call)->lease);
}

static const struct control_command commands[] = {
    {.name = "session-begin",
     .right = ACCESS_PULL,
     .params = {{"vm", REQUIRED, CONTROL_STRING},
                {"checkpoint", false, CONTROL_STRING},
                {"disk", false, CONTROL_STRINGS},
                {"keep", false, CONTROL_BOOL},
                {"ticket", false, CONTROL_BOOL},
                {"ttl", false, CONTROL_NUMBER},
                {"rate", false, CONTROL_NUMBER}},
     .size = sizeof(struct begin),
     .run = session_begin,
     .forget = begin_forget},
    {.name = "session-end",
     .params = {{"session", REQUIRED, CONTROL_STRING}, {"checkpoint", false, CONTROL_STRING}},
     .size = sizeof(struct end),
     .run = session_end,
     .forget = end_forget},
};
const struct control_table control_sessions = {commands, ARRAY_SIZE(commands)};
