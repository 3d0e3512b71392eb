/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lease.h"
#include "config.h"
#include "log.h"

#include "backup/names.h"

#include <assert.h>
#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>

/* Only downwards. */
enum lease_state {
    LEASE_STARTING, /* on_up will come */
    LEASE_UP,       /* clients may come and go */
    LEASE_ENDING,   /* nobody may come any more; who is inside may leave until `wait` is over */
    LEASE_GOING,    /* on_down will come */
    LEASE_GONE,     /* in no list; waits for its timers */
};

struct lease {
    struct vm_lease of_vm;
    struct lease_set *set;
    struct lease *next, *prev;
    enum lease_state state;
    struct vm *vm;               /* borrowed */
    char *identity, *checkpoint; /* owned */
    char **disks;                /* owned, each */
    char session[NAMES_ID_SIZE]; /* from LEASE_UP on */
    uint64_t ttl_ms, ends_ms;    /* the latter in loop time; 0: never */
    bool keep;
    uv_timer_t life;          /* until ends_ms */
    uv_timer_t wait;          /* for the next client, or for the last one to leave */
    lease_begun_cb *on_begun; /* until it was called */
    lease_ended_cb *on_ended; /* likewise; NULL: nobody wants to know */
    void *begun_arg, *ended_arg;
    struct failure lost;
};

/* -- the end ------------------------------------------------------------------------------------------------------- */

static void lease_free(struct lease *l)
{
    for (size_t i = 0; l->disks && i < l->of_vm.ndisks; i++)
        free(l->disks[i]);
    free(l->disks);
    free(l->identity);
    free(l->checkpoint);
    free(l);
}

static void on_wait_closed(uv_handle_t *handle)
{
    lease_free(handle->data);
}

static void on_life_closed(uv_handle_t *handle)
{
    struct lease *l = handle->data;

    uv_close((uv_handle_t *)&l->wait, on_wait_closed);
}

/* Its session is down, or never was. */
static void let_go(struct lease *l)
{
    struct lease_set *s = l->set;

    ticket_revoke(s->tickets, &l->of_vm);
    l->state = LEASE_GONE;
    *(l->prev ? &l->prev->next : &s->leases) = l->next;
    if (l->next)
        l->next->prev = l->prev;
    s->nleases--;
    uv_close((uv_handle_t *)&l->life, on_life_closed);
}

static void on_leave_time(uv_timer_t *timer)
{
    struct lease *l = timer->data;
    struct failure why = {0};

    (void)failure_set(&why, -ESHUTDOWN, "session %s was ended over the control socket", l->session);
    l->state = LEASE_GOING;
    vm_lease_end(&l->of_vm, &why);
}

static void begin_end(struct lease *l, enum vm_decision decision)
{
    assert(l->state == LEASE_UP);
    l->state = LEASE_ENDING;
    ticket_revoke(l->set->tickets, &l->of_vm);
    vm_lease_close(&l->of_vm, decision);
    (void)uv_timer_start(&l->wait, on_leave_time, vm_lease_nclients(&l->of_vm) > 0 ? LEASE_END_WAIT_MS : 0, 0);
}

int lease_end(struct lease *l, enum vm_decision decision, lease_ended_cb *cb, void *arg)
{
    static const char *const words[] = {
        [VM_DECISION_DROP] = "its checkpoint is dropped",
        [VM_DECISION_KEEP] = "its checkpoint is kept",
        [VM_DECISION_AS_EVER] = "its checkpoint is kept where pulls have ended well",
    };

    if (l->state != LEASE_UP)
        return -EALREADY;
    l->on_ended = cb;
    l->ended_arg = arg;
    log_info("VM %s: session %s is ended over the control socket%s%s", vm_name(l->vm), l->session,
             l->checkpoint ? ", " : "", l->checkpoint ? words[decision] : "");
    begin_end(l, decision);
    return 0;
}

void lease_end_forget(struct lease *l)
{
    l->on_ended = NULL;
}

/* -- its time ------------------------------------------------------------------------------------------------------ */

static void time_is_up(struct lease *l, const char *sentence, double seconds)
{
    struct failure why = {0};

    (void)failure_set(&why, -ETIME, "session %s of VM '%s': %s %g seconds, which are over", l->session, vm_name(l->vm),
                      sentence, seconds);
    ticket_revoke(l->set->tickets, &l->of_vm);
    vm_lease_fail(&l->of_vm, &why);
}

static void on_life_over(uv_timer_t *timer)
{
    struct lease *l = timer->data;

    if (l->state == LEASE_UP) /* else it ends anyhow */
        time_is_up(l, "it was begun with a --ttl of", (double)l->ttl_ms / 1000);
}

static void on_idle(uv_timer_t *timer)
{
    struct lease *l = timer->data;

    time_is_up(l, "no client was there, and nobody has ended it, for --begin-timeout:", lease_idle_ms(l) / 1000.0);
}

static void on_clients(struct vm_lease *of_vm, size_t nclients)
{
    struct lease *l = container_of(of_vm, struct lease, of_vm);

    if (l->state == LEASE_ENDING && nclients == 0)
        (void)uv_timer_start(&l->wait, on_leave_time, 0, 0);
    if (l->state != LEASE_UP)
        return;
    if (nclients > 0)
        (void)uv_timer_stop(&l->wait);
    else if (lease_idle_ms(l) > 0 && !uv_is_active((uv_handle_t *)&l->wait))
        (void)uv_timer_start(&l->wait, on_idle, lease_idle_ms(l), 0);
}

/* -- what the VM says ---------------------------------------------------------------------------------------------- */

static void on_up(struct vm_lease *of_vm, const struct failure *f)
{
    struct lease *l = container_of(of_vm, struct lease, of_vm);
    lease_begun_cb *cb = l->on_begun;

    l->on_begun = NULL;
    if (f) {
        let_go(l);
        cb(l->begun_arg, NULL, f);
        return;
    }
    l->state = LEASE_UP;
    (void)snprintf(l->session, sizeof l->session, "%s", vm_lease_session(of_vm));
    if (l->ttl_ms) {
        l->ends_ms = uv_now(l->set->loop) + l->ttl_ms;
        (void)uv_timer_start(&l->life, on_life_over, l->ttl_ms, 0);
    }
    on_clients(of_vm, vm_lease_nclients(of_vm));
    log_info("VM %s: session %s was begun for %s over the control socket%s%s", vm_name(l->vm), l->session, l->identity,
             l->checkpoint ? ", provisional checkpoint " : "", l->checkpoint ? l->checkpoint : "");
    cb(l->begun_arg, l, NULL);
}

static void on_lost(struct vm_lease *of_vm, const struct failure *why)
{
    struct lease *l = container_of(of_vm, struct lease, of_vm);

    l->lost = *why;
    l->state = LEASE_GOING;
    (void)uv_timer_stop(&l->wait);
    ticket_revoke(l->set->tickets, of_vm);
}

static void on_down(struct vm_lease *of_vm, struct json_object *last, const struct failure *problems)
{
    struct lease *l = container_of(of_vm, struct lease, of_vm);
    lease_ended_cb *cb = l->on_ended;

    let_go(l);
    if (cb)
        cb(l->ended_arg, last, l->lost.err ? &l->lost : NULL);
}

/* -- the beginning ------------------------------------------------------------------------------------------------- */

static int fill(struct lease *l, const struct lease_wish *wish)
{
    l->vm = wish->vm;
    l->keep = wish->keep;
    l->identity = strdup(wish->identity);
    l->checkpoint = wish->checkpoint ? strdup(wish->checkpoint) : NULL;
    l->disks = calloc(wish->ndisks + 1, sizeof *l->disks);
    if (!l->identity || (wish->checkpoint && !l->checkpoint) || !l->disks)
        return -ENOMEM;
    for (; l->of_vm.ndisks < wish->ndisks; l->of_vm.ndisks++) {
        l->disks[l->of_vm.ndisks] = strdup(wish->disks[l->of_vm.ndisks]);
        if (!l->disks[l->of_vm.ndisks])
            return -ENOMEM;
    }
    l->of_vm.identity = l->identity;
    l->of_vm.checkpoint = l->checkpoint;
    l->of_vm.disks = (const char *const *)l->disks;
    l->of_vm.rate = wish->rate;
    l->of_vm.on_up = on_up;
    l->of_vm.on_clients = on_clients;
    l->of_vm.on_lost = on_lost;
    l->of_vm.on_down = on_down;
    return 0;
}

int lease_begin(struct lease_set *s, const struct lease_wish *wish, lease_begun_cb *cb, void *arg,
                struct lease **ret_lease, struct failure *f)
{
    struct lease *l;
    int r;

    if (s->nleases >= LEASES_MAX)
        return failure_set(f, -EMFILE, "%u sessions have been begun and not ended", LEASES_MAX);
    l = calloc(1, sizeof *l);
    if (!l || fill(l, wish) < 0) {
        if (l)
            lease_free(l);
        return failure_set(f, -ENOMEM, "out of memory");
    }
    l->set = s;
    l->on_begun = cb;
    l->begun_arg = arg;
    l->ttl_ms = wish->ttl_ms;
    r = vm_lease_start(wish->vm, &l->of_vm);
    if (r < 0) {
        (void)failure_set(f, r, "VM \"%s\" cannot be frozen now: %s", vm_name(wish->vm), vm_trouble(wish->vm));
        lease_free(l);
        return r;
    }
    l->life.data = l->wait.data = l;
    (void)uv_timer_init(s->loop, &l->life); /* these never fail */
    (void)uv_timer_init(s->loop, &l->wait);
    l->next = s->leases;
    if (l->next)
        l->next->prev = l;
    s->leases = l;
    s->nleases++;
    *ret_lease = l;
    return 0;
}

void lease_abandon(struct lease *l)
{
    if (l->state == LEASE_STARTING) {
        vm_lease_forget(&l->of_vm);
        let_go(l);
    } else if (l->state == LEASE_UP) {
        begin_end(l, VM_DECISION_DROP);
    }
}

/* -- questions ----------------------------------------------------------------------------------------------------- */

struct lease *lease_find(struct lease_set *s, const char *session)
{
    for (struct lease *l = s->leases; l; l = l->next)
        if (l->state > LEASE_STARTING && strcmp(l->session, session) == 0)
            return l;
    return NULL;
}

struct vm *lease_vm(const struct lease *l)
{
    return l->vm;
}

const char *lease_identity(const struct lease *l)
{
    return l->identity;
}

const struct vm_lease *lease_of_vm(const struct lease *l)
{
    return &l->of_vm;
}

uint64_t lease_ends_ms(const struct lease *l)
{
    return l->ends_ms;
}

unsigned lease_idle_ms(const struct lease *l)
{
    return l->keep ? 0 : l->set->idle_ms;
}

static struct json_object *left(const uv_timer_t *timer, bool is_meant)
{
    return is_meant ? json_object_new_uint64(uv_timer_get_due_in(timer) / 1000) : NULL;
}

struct json_object *lease_to_json(const struct lease_set *s, const char *session)
{
    const struct lease *l = lease_find((struct lease_set *)s, session);
    struct json_object *o;
    unsigned ngood, nused;

    if (!l)
        return NULL;
    o = json_object_new_object();
    ticket_count(s->tickets, &l->of_vm, uv_now(s->loop), &ngood, &nused);
    json_object_object_add(o, "ttl-left", left(&l->life, l->ends_ms > 0));
    json_object_object_add(o, "idle-left",
                           left(&l->wait, l->state == LEASE_UP && uv_is_active((const uv_handle_t *)&l->wait)));
    json_object_object_add(o, "tickets", json_object_new_uint64(ngood));
    json_object_object_add(o, "tickets-used", json_object_new_uint64(nused));
    return o;
}
