/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* conn_ask: what a negotiating client wants to know, and how it gets into a session. */
#include "conn_internal.h"

#include <errno.h>
#include <stdio.h>

#define DIRTY_PREFIX "qemu:dirty-bitmap:"

static const char *const always[] = {"base:allocation", "qemu:allocation-depth"};

/* Our own time does not count against the client's handshake. */
static void answered(struct conn *c)
{
    c->asking = false;
    c->since_ms += uv_now(c->set->loop) - c->asked_ms;
}

/* A ticket that is wrong here may be good elsewhere, or nearly right. */
static const char *in_public(const struct conn *c, const struct failure *why)
{
    return c->secret ? "what it presented as a ticket is none, or none any more" : why->text;
}

static void answer_error(struct conn *c, const struct failure *why)
{
    answered(c);
    if (c->ask_type != NBD_ASK_OPEN) /* a client may ask many times */
        log_debug("c%llu answered with an error: %s", (unsigned long long)c->id, in_public(c, why));
    c->hushed = c->secret;
    nbd_answer_error(c->nbd, why);
    c->hushed = false;
}

static void answer_no_memory(struct conn *c)
{
    struct failure why = {0};

    (void)failure_set(&why, -ENOMEM, "the server is out of memory");
    answer_error(c, &why);
}

/* -- LIST ---------------------------------------------------------------------------------------------------------- */
static void on_list(struct catalog_ask *a, const struct catalog_entry *entries, size_t nentries)
{
    struct conn *c = container_of(a, struct conn, ask);
    _cleanup_free_ struct nbd_list_entry *list = calloc(nentries + 1, sizeof *list);

    if (!list) {
        answer_no_memory(c);
    } else {
        for (size_t i = 0; i < nentries; i++)
            list[i] = (struct nbd_list_entry){entries[i].name, entries[i].description};
        answered(c);
        nbd_answer_list(c->nbd, list, nentries);
    }
    conn_settle(c);
}

/* -- what an export is --------------------------------------------------------------------------------------------- */
static char *canonical_name(const struct catalog_hit *hit)
{
    char *name;

    if (asprintf(&name, "%s/%s%s%s", vm_name(hit->vm), hit->disk->name, hit->checkpoint ? "@" : "",
                 hit->checkpoint ? hit->checkpoint : "") < 0)
        return NULL;
    return name;
}

static struct nbd_export export_of(const struct conn *c, const char *name, const char *description, uint64_t size)
{
    return (struct nbd_export){
        .name = name,
        .description = description,
        .size = size,
        .min_block = CONN_BLOCK_MIN,
        .preferred_block = CONN_BLOCK_PREFERRED,
        .max_block = CONN_BLOCK_MAX,
        .multi_conn = true,
        .trim = c->set->config->give_back != GIVE_BACK_OFF,
    };
}

static void answer_export(struct conn *c, const struct catalog_hit *hit)
{
    _cleanup_free_ char *name = canonical_name(hit);
    char size[32], description[CONFIG_NAME_MAX + 128];
    struct nbd_export e;

    if (!name) {
        answer_no_memory(c);
        return;
    }
    if (hit->by_ticket) { /* its bearer is told of the disk's bytes, not whose they are */
        e = export_of(c, NULL, NULL, hit->disk->size);
        answered(c);
        nbd_answer_export(c->nbd, &e);
        return;
    }
    (void)snprintf(description, sizeof description, "%s, %s disk of VM \"%s\"; a GO freezes it",
                   catalog_size(size, sizeof size, hit->disk->size), hit->disk->format, vm_name(hit->vm));
    e = export_of(c, name, description, hit->disk->size);
    answered(c);
    nbd_answer_export(c->nbd, &e);
}

static void answer_contexts(struct conn *c, const struct catalog_hit *hit)
{
    const struct disk *d = hit->disk;
    _cleanup_free_ const char **names = calloc(ARRAY_SIZE(always) + d->ncheckpoints, sizeof *names);
    size_t n = 0;
    bool complete = names != NULL;

    for (size_t i = 0; complete && i < ARRAY_SIZE(always); i++)
        names[n++] = always[i];
    for (size_t i = 0; complete && i < d->ncheckpoints; i++) {
        char *name;
        if (d->checkpoints[i].reason != REASON_NONE)
            continue;
        if (asprintf(&name, DIRTY_PREFIX "%s", d->checkpoints[i].name) < 0)
            complete = false;
        else
            names[n++] = name;
    }
    if (complete) {
        answered(c);
        nbd_answer_contexts(c->nbd, names, n);
    } else {
        answer_no_memory(c);
    }
    for (size_t i = ARRAY_SIZE(always); i < n; i++)
        free((char *)names[i]);
}

/* -- OPEN ---------------------------------------------------------------------------------------------------------- */
static void forget_wish(struct conn *c)
{
    for (size_t i = 0; i < c->ncontexts; i++)
        free(c->contexts[i]);
    free(c->contexts);
    free(c->since);
    free(c->disk);
    free(c->checkpoint);
    free(c->export_name);
    c->contexts = NULL;
    c->since = NULL;
    c->disk = c->checkpoint = c->export_name = NULL;
    c->ncontexts = 0;
}

/*
 * Our words name VMs, disks and paths. Who has come by a ticket hears fixed ones instead (docs/decisions/0022):
 * to_bearer, or, where it is NULL, that there is no such export. An answer may bring the next ask at once: all of this
 * one is gone before.
 */
static void refuse_open(struct conn *c, const struct failure *why, const char *to_bearer)
{
    struct failure told = {0};

    if (!c->quiet && conn_limit_line(c->set))
        log_info("c%llu refused: %s", (unsigned long long)c->id, c->ticket ? why->text : in_public(c, why));
    if (c->ticket && to_bearer)
        (void)failure_set(&told, why->err, "%s", to_bearer);
    else if (c->ticket)
        (void)catalog_unknown(c->asked, &told);
    c->opened = false;
    forget_wish(c);
    conn_ticket_leave(c, /* used= */ false);
    answer_error(c, told.err ? &told : why);
}

/* The contexts stay as the client chose them: nbd counts on their order. */
static int keep_contexts(struct conn *c, const struct nbd_ask *ask)
{
    c->contexts = calloc(ask->ncontexts + 1, sizeof *c->contexts);
    c->since = calloc(ask->ncontexts + 1, sizeof *c->since);
    if (!c->contexts || !c->since)
        return -ENOMEM;
    for (; c->ncontexts < ask->ncontexts; c->ncontexts++) {
        c->contexts[c->ncontexts] = strdup(ask->contexts[c->ncontexts]);
        if (!c->contexts[c->ncontexts])
            return -ENOMEM;
    }
    return 0;
}

static void on_pull_read(void *arg)
{
    struct conn *c = arg;

    if (c->pull.lost && c->stay_state == STAY_ENTERED)
        vm_stay_lost(&c->stay);
    conn_settle(c);
}

/* -- what it may -----------------------------------------------------------------------------------------------------
 */
static unsigned rights_of(const struct conn *c, const struct vm *vm)
{
    return access_rights(c->set->access, &c->who, vm_name(vm));
}

static bool sees(const struct catalog_ask *a, const struct vm *vm)
{
    const struct conn *c = container_of(a, struct conn, ask);

    return rights_of(c, vm) & (c->ask_type == NBD_ASK_LIST ? ACCESS_LIST : ACCESS_LIST | ACCESS_PULL);
}

static int may_open(const struct conn *c, const struct catalog_hit *hit, struct failure *f)
{
    unsigned rights = rights_of(c, hit->vm);

    if (!(rights & ACCESS_PULL))
        return failure_set(f, -EPERM, "%s may not pull disks of VM \"%s\" (--allow)", c->identity, vm_name(hit->vm));
    if (hit->checkpoint && !(rights & ACCESS_CHECKPOINT))
        return failure_set(f, -EPERM, "%s may not make checkpoints of VM \"%s\" (--allow)", c->identity,
                           vm_name(hit->vm));
    return 0;
}

/* Each map of its contexts is there, or comes. */
static int check_maps(struct conn *c, struct failure *f)
{
    for (size_t i = 0; i < c->ncontexts; i++) {
        if (!vm_stay_map(&c->stay, c->contexts[i]) && !vm_stay_expects_map(&c->stay, c->contexts[i]))
            return failure_set(f, -EIO, "the map \"%s\" of disk \"%s\" could not be read", c->contexts[i], c->disk);
    }
    return 0;
}

/* All maps of its contexts, or none. */
static int set_maps(struct conn *c, struct failure *f)
{
    _cleanup_free_ const struct map **maps = calloc(c->ncontexts + 1, sizeof(struct map *));

    if (!maps)
        return failure_set(f, -ENOMEM, "the server is out of memory");
    pull_set_allocation(&c->pull, vm_stay_map(&c->stay, "base:allocation"));
    for (size_t i = 0; i < c->ncontexts; i++) {
        maps[i] = vm_stay_map(&c->stay, c->contexts[i]);
        if (!maps[i])
            return check_maps(c, f);
    }
    pull_set_maps(&c->pull, maps);
    c->mapped = true;
    return 0;
}

void conn_ask_mapped(struct conn *c)
{
    if (c->unmapped && (c->mapped || c->pull.stopped) && !pull_reply_is_open(&c->pull))
        pull_request(&c->pull, TAKE_PTR(c->unmapped));
}

/* The stay is entered: the source stands, and perhaps the maps. */
static int begin_pull(struct conn *c, struct failure *f)
{
    struct pull_config config = {
        .nbd = c->nbd,
        .source = vm_stay_source(&c->stay),
        .ncontexts = c->ncontexts,
        .budget = &c->set->budget,
        .fair = &c->fair,
        .counters = vm_stay_counters(&c->stay),
        .give_back_read = c->set->config->give_back == GIVE_BACK_READ,
        .on_read = on_pull_read,
        .arg = c,
    };

    if (!config.source)
        return failure_set(f, -EIO, "the session has no frozen disk \"%s\"", c->disk);
    if (check_maps(c, f) < 0)
        return f->err;
    if (fair_join_reads(&c->set->fair, &c->fair, vm_name(c->vm)) < 0 || pull_init(&c->pull, &config) < 0)
        return failure_set(f, -ENOMEM, "the server is out of memory");
    if (rate_join(&c->set->rates, &c->pull.rate, vm_stay_session(&c->stay), vm_stay_rate(&c->stay)) < 0) {
        pull_done(&c->pull);
        return failure_set(f, -ENOMEM, "the server is out of memory");
    }
    c->size = config.source->size;
    c->pulling = true;
    if (set_maps(c, f) == 0)
        return 0;
    pull_done(&c->pull);
    c->pulling = false;
    return f->err;
}

static void on_maps(struct vm_stay *stay)
{
    struct conn *c = container_of(stay, struct conn, stay);
    struct failure why = {0};

    if (c->pulling && set_maps(c, &why) < 0)
        conn_kill(c, why.err, "%s", why.text);
    conn_settle(c);
}

static void on_entered(struct vm_stay *stay, const struct failure *f)
{
    struct conn *c = container_of(stay, struct conn, stay);
    struct failure why = {0};
    struct nbd_export e;

    if (f) {
        c->stay_state = STAY_NONE;
        refuse_open(c, f, /* to_bearer= */ NULL); /* it has just been used up */
        conn_settle(c);
        return;
    }
    c->stay_state = STAY_ENTERED;
    if (begin_pull(c, &why) < 0) {
        c->stay_state = STAY_NONE;
        vm_leave(&c->stay, /* said_disc= */ false, /* read_failed= */ false);
        refuse_open(c, &why, "this disk, or a map of it, cannot be read");
        conn_settle(c);
        return;
    }
    c->quiet = false;
    log_info("c%llu open: %s for %s%s, session %s, %zu context%s", (unsigned long long)c->id, c->export_name,
             c->identity, c->ticket ? " by a ticket" : "", vm_stay_session(&c->stay), c->ncontexts,
             c->ncontexts == 1 ? "" : "s");
    answered(c);
    c->active_ms = uv_now(c->set->loop);
    e = export_of(c, c->ticket ? NULL : c->export_name, NULL, c->size);
    nbd_answer_export(c->nbd, &e);
    conn_settle(c);
}

static void on_lost(struct vm_stay *stay, const struct failure *why)
{
    struct conn *c = container_of(stay, struct conn, stay);
    struct failure told = {0};

    if (c->state == CONN_TALKING) {
        log_warning("c%llu lost its session %s: %s", (unsigned long long)c->id, vm_stay_session(stay), why->text);
        nbd_fail(c->nbd, why);
    }
    if (c->ticket) /* as refuse_open() has it */
        (void)failure_set(&told, why->err, "the session has ended");
    if (c->pulling)
        pull_fail(&c->pull, c->ticket ? &told : why);
    conn_ask_mapped(c);
    conn_settle(c);
}

static void enter(struct conn *c, const struct catalog_hit *hit)
{
    struct failure why = {0};
    int r;

    c->export_name = canonical_name(hit);
    c->disk = strdup(hit->disk->name);
    c->checkpoint = hit->checkpoint ? strdup(hit->checkpoint) : NULL;
    if (!c->export_name || !c->disk || (hit->checkpoint && !c->checkpoint)) {
        (void)failure_set(&why, -ENOMEM, "the server is out of memory");
        refuse_open(c, &why, why.text);
        return;
    }
    c->stay = (struct vm_stay){
        .identity = c->ticket ? c->ticket_identity : c->identity,
        .session = c->ticket_session,
        .disk = c->disk,
        .checkpoint = c->checkpoint,
        .since = c->since,
        .on_entered = on_entered,
        .on_maps = on_maps,
        .on_lost = on_lost,
        .arg = c,
    };
    for (size_t i = 0; i < c->ncontexts; i++)
        if (strncmp(c->contexts[i], DIRTY_PREFIX, sizeof DIRTY_PREFIX - 1) == 0)
            c->since[c->stay.nsince++] = c->contexts[i] + sizeof DIRTY_PREFIX - 1;
        else
            c->stay.depth |= strcmp(c->contexts[i], "qemu:allocation-depth") == 0;
    c->vm = hit->vm;
    c->stay_state = STAY_ENTERING;
    c->opened = true;
    r = vm_enter(hit->vm, &c->stay);
    if (r < 0) {
        c->stay_state = STAY_NONE;
        (void)failure_set(&why, r, "VM \"%s\" cannot be frozen now: %s", vm_name(hit->vm), strerror(-r));
        refuse_open(c, &why, /* to_bearer= */ NULL);
    }
}

/* -- all asks ------------------------------------------------------------------------------------------------------ */
/* One of hit and f is NULL. */
static void answer_hit(struct conn *c, const struct catalog_hit *hit, const struct failure *f)
{
    if (f && c->ask_type == NBD_ASK_OPEN)
        refuse_open(c, f, /* to_bearer= */ NULL); /* before any ticket was good */
    else if (f)
        answer_error(c, f);
    else if (c->ask_type == NBD_ASK_EXPORT)
        answer_export(c, hit);
    else if (c->ask_type == NBD_ASK_CONTEXTS)
        answer_contexts(c, hit);
    else
        enter(c, hit);
}

static void on_find(struct catalog_ask *a, const struct catalog_hit *hit, const struct failure *f)
{
    struct conn *c = container_of(a, struct conn, ask);
    struct failure why = {0};

    if (!f && c->ask_type == NBD_ASK_OPEN && may_open(c, hit, &why) < 0)
        f = &why;
    answer_hit(c, hit, f);
    conn_settle(c);
}

void conn_ask_parked(struct conn *c)
{
    struct nbd_ask ask = c->parked_ask;

    c->parked = false;
    conn_ask(c, &ask);
}

void conn_ask(struct conn *c, const struct nbd_ask *ask)
{
    struct catalog_hit hit;
    struct failure why = {0};
    int r = 0;

    if (conn_is_full(c)) { /* options that wait in nbd come here one by one; a list may be long */
        c->parked = true;
        c->parked_ask = *ask;
        return;
    }
    c->asking = true;
    c->asked_ms = uv_now(c->set->loop);
    c->ask_type = ask->type;
    c->asked = ask->export_name;
    c->secret = conn_ticket_is_meant(ask);
    c->ask.sees = sees;
    c->ask.content_ns = c->born_ns;
    c->ask.on_list = on_list;
    c->ask.on_find = on_find;
    if (conn_limit_refuses(c, &why)) {
        answer_error(c, &why);
        return;
    }
    if (ask->type == NBD_ASK_LIST) {
        if (catalog_list_start(c->set->catalog, &c->ask) < 0) { /* no VM, or none that can be asked: an empty list */
            answered(c);
            nbd_answer_list(c->nbd, NULL, 0);
        }
        return;
    }
    if (ask->type == NBD_ASK_OPEN) {
        if (keep_contexts(c, ask) < 0)
            r = failure_set(&why, -ENOMEM, "the server is out of memory");
    }
    if (r == 0 && conn_ticket_find(c, ask, &hit)) {
        answer_hit(c, &hit, NULL);
        return;
    }
    if (r == 0)
        r = catalog_find_start(c->set->catalog, &c->ask, ask->export_name, &why);
    if (r < 0 && ask->type == NBD_ASK_OPEN)
        refuse_open(c, &why, /* to_bearer= */ NULL);
    else if (r < 0)
        answer_error(c, &why);
}

void conn_ask_forget(struct conn *c)
{
    catalog_forget(&c->ask);
    if (c->stay_state == STAY_ENTERING) {
        vm_leave(&c->stay, /* said_disc= */ false, /* read_failed= */ false);
        c->stay_state = STAY_NONE;
    }
    if (c->stay_state == STAY_NONE)
        conn_ticket_leave(c, /* used= */ false);
    c->asking = c->parked = false;
}

bool conn_try_leave(struct conn *c)
{
    if (c->pulling && c->pull.nreading > 0)
        return false;
    if (c->stay_state == STAY_ENTERED) {
        vm_leave(&c->stay, c->end == NBD_END_DISC, c->pulling && c->pull.read_failed);
        conn_ticket_leave(c, /* used= */ true);
        c->stay_state = STAY_NONE;
        if (c->pulling)
            pull_let_go(&c->pull);
    }
    return true;
}

void conn_ask_done(struct conn *c)
{
    forget_wish(c);
}
