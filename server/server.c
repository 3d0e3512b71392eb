/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "server.h"
#include "conn.h"
#include "control.h"
#include "lease.h"
#include "listen.h"
#include "roster.h"
#include "source/vhost.h"
#include "tls.h"
#include "vm.h"

#include <assert.h>
#include <errno.h>
#include <json-c/json.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

/* The end, in this order. */
enum stage {
    STAGE_RUNNING,
    STAGE_CONNS,   /* connections take their last replies */
    STAGE_VMS,     /* sessions are torn down, QMP is closed */
    STAGE_CONTROL, /* the control socket tells until here what goes on */
    STAGE_GONE,
};

struct server {
    uv_loop_t *loop;                    /* borrowed */
    const struct server_config *config; /* borrowed */
    struct scratch_place *scratch;      /* owned */
    struct roster roster;
    struct vhost_room vhost_room;
    struct conn_set conns;
    struct ticket_book tickets;
    struct lease_set leases;
    struct control *control;     /* owned */
    struct listener **listeners; /* owned, each */
    size_t nlisteners;
    uint64_t started_ms;
    struct listen_file socket_file; /* of our unix sockets */
    struct tls_server tls;
    struct server_reload *reload; /* the workers': is under way */
    bool has_tls, reload_again;

    enum stage stage;
    bool vms_gone;
    uv_timer_t timer; /* of the end */
    server_stop_cb on_stopped;
    void *arg;
};

/* -- start --------------------------------------------------------------------------------------------------------- */
static void on_event(void *arg, const char *event, struct json_object *data)
{
    struct server *s = arg;

    if (s->control)
        control_event(s->control, event, data);
    else
        json_object_put(data);
}

/* No two VMs of one configuration share a place; one that is to go and one that has come since may. */
static int check_place(const struct server *s, const struct place *place, struct failure *f)
{
    if (!place || place_tells_vms(place))
        return 0;
    for (size_t i = 0; i < s->roster.nvms; i++) {
        const struct vm *vm = roster_vm_at(&s->roster, i);

        if (vm_writes_to(vm, place))
            return failure_set(f, -EBUSY,
                               "VM '%s', which is to go or was configured anew, still writes to this scratch place; "
                               "try again when its session has ended",
                               vm_name(vm));
    }
    return 0;
}

static int may_start(void *arg, const char *identity, const struct place *place, struct failure *f)
{
    const struct server *s = arg;
    unsigned n = 0;

    if (check_place(s, place, f) < 0)
        return f->err;
    for (size_t i = 0; i < s->roster.nvms; i++)
        n += vm_is_for(roster_vm_at(&s->roster, i), identity);
    if (n < s->config->max_sessions_per_client)
        return 0;
    return failure_set(f, -EUSERS,
                       "%s has %u sessions already, the most that one client may have here "
                       "(--max-sessions-per-client); try again when one of them has ended",
                       identity, n);
}

/* What was said of all VMs holds since the start. */
static int make_vm(void *arg, const struct config_vm *from, struct vm **ret_vm, struct failure *f)
{
    struct server *s = arg;
    _cleanup_free_ struct vm_rename *renames = calloc(from->nrenames + 1, sizeof *renames);
    struct vm_config config = {
        .name = from->name,
        .qmp_path = from->qmp,
        .only = (const char *const *)from->disks,
        .nonly = from->ndisks,
        .renames = renames,
        .nrenames = from->nrenames,
        .scratch = s->scratch,
        .cbw_timeout_s = s->config->cbw_timeout_s,
        .give_back = s->config->give_back != GIVE_BACK_OFF,
        .vhost_room = s->vhost_room.limit ? &s->vhost_room : NULL,
        .place = from->place ? from->place : s->config->place,
        .state_dir = s->config->state,
        .linger_ms = s->config->linger_ms,
        .max_pause_ms = s->config->max_pause_ms,
        .hold_shutdown_ms = s->config->hold_shutdown_ms,
        .keep_checkpoints = s->config->keep_checkpoints,
        .engine = from->engine_said ? from->engine : s->config->engine,
        .qga_path = from->qga,
        .quiesce = from->quiesce_said ? from->quiesce : s->config->quiesce,
        .session_timeout_ms = s->config->session_timeout_ms,
        .images = from->images,
        .nimages = from->nimages,
        .storage_daemon = s->config->storage_daemon,
        .rate = s->config->rate,
        .may_start = may_start,
        .start_arg = s,
        .on_event = on_event,
        .event_arg = s,
    };
    int r;

    if (!renames)
        return failure_set(f, -ENOMEM, "out of memory");
    for (size_t i = 0; i < from->nrenames; i++)
        renames[i] = (struct vm_rename){.name = from->renames[i].name, .target = from->renames[i].target};
    r = vm_new(s->loop, &config, ret_vm);
    return r < 0 ? failure_set(f, r, "VM \"%s\": %s", from->name, strerror(-r)) : 0;
}

/* -- TLS ----------------------------------------------------------------------------------------------------------- */
/* Files are read by a worker. */
struct server_reload {
    struct work work;
    struct server *server;
    const char *certs, *psk;
    struct tls_creds *creds;
    struct failure note, why;
};

static void tell_creds(const struct tls_creds *creds, const struct failure *note)
{
    log_info("TLS: %s", tls_creds_text(creds));
    if (note->err)
        log_warning("TLS: %s", note->text);
}

static int start_tls(struct server *s, struct failure *f)
{
    const struct server_config *c = s->config;
    struct tls_creds *creds;
    struct failure note = {0};
    unsigned nthreads = c->threads ? c->threads : workers_default(TLS_THREADS_DEFAULT_MAX);
    int r;

    if (c->tls == CONFIG_TLS_OFF)
        return 0;
    r = tls_creds_load(c->tls_certs, c->tls_psk, &creds, &note, f);
    if (r < 0)
        return config_blame(c, c->tls_certs ? "tls-certs" : "tls-psk", r, f);
    r = tls_server_init(&s->tls, s->loop, nthreads, creds);
    if (r < 0) {
        tls_creds_unref(creds);
        return failure_set(f, r, "cannot start %u threads for TLS: %s", nthreads, uv_strerror(r));
    }
    tell_creds(creds, &note);
    s->has_tls = true;
    s->conns.tls = &s->tls;
    return 0;
}

static void run_reload(struct work *w)
{
    struct server_reload *l = container_of(w, struct server_reload, work);

    (void)tls_creds_load(l->certs, l->psk, &l->creds, &l->note, &l->why);
}

/* Between the `rm` and the `cp` of who replaces it nobody wants the revoked ones back. */
static void check_crl_stays(struct server_reload *l)
{
    if (l->why.err || tls_creds_have_crl(l->creds) || !tls_creds_have_crl(l->server->tls.creds))
        return;
    tls_creds_unref(TAKE_PTR(l->creds));
    (void)failure_set(&l->why, -ENOENT,
                      "the revocation list %s/ca-crl.pem is gone (put one there, if only an empty one, or restart "
                      "qpulld to go on without any)",
                      l->certs);
}

static void on_reloaded(struct work *w)
{
    struct server_reload *l = container_of(w, struct server_reload, work);
    struct server *s = l->server;

    check_crl_stays(l);
    if (l->why.err) {
        log_error("SIGHUP: %s; the certificates or keys of before stay in use", l->why.text);
    } else {
        tls_server_set_creds(&s->tls, l->creds);
        tell_creds(l->creds, &l->note);
    }
    s->reload = NULL;
    free(l);
    if (s->reload_again && !server_is_stopping(s)) {
        s->reload_again = false;
        server_reload_tls(s);
    }
}

void server_reload_tls(struct server *s)
{
    struct server_reload *l;

    if (!s->has_tls)
        return;
    if (s->reload) { /* it may have read the old ones */
        s->reload_again = true;
        return;
    }
    l = calloc(1, sizeof *l);
    if (!l) {
        log_error("SIGHUP: out of memory");
        return;
    }
    *l = (struct server_reload){
        .work = {.run = run_reload, .done = on_reloaded},
        .server = s,
        .certs = s->config->tls_certs,
        .psk = s->config->tls_psk,
    };
    s->reload = l;
    workers_submit(s->tls.workers, &l->work);
}

static void on_conns_gone(void *arg);

static void ignore_closed(void *arg)
{
}

int server_new(uv_loop_t *loop, const struct server_config *config, struct server **ret_server, struct failure *f)
{
    struct server *s = calloc(1, sizeof *s);
    const struct scratch_limits limits = {
        .session = config->scratch_limit,
        .all = config->scratch_total_limit,
        .reserve = config->scratch_reserve,
    };
    int r;

    if (!s)
        return failure_set(f, -ENOMEM, "out of memory");
    s->loop = loop;
    s->config = config;
    s->started_ms = uv_now(loop);
    s->vhost_room.limit = config->shared_memory;
    /* Socket activation may pass any number for one "fd". */
    s->listeners = calloc(config->nlisteners + CONFIG_LISTENERS_MAX, sizeof(struct listener *));
    r = s->listeners ? scratch_new(loop, config->place ? "" : config->scratch, &limits, &s->scratch) : -ENOMEM;
    if (r == 0)
        r = conn_set_init(&s->conns, loop, config, &s->roster.catalog);
    if (r < 0) {
        if (s->scratch)
            scratch_close(s->scratch, ignore_closed, NULL);
        free(s->listeners);
        free(s);
        return failure_set(f, r, "cannot begin: %s", strerror(-r));
    }
    s->tickets.linger_ms = config->linger_ms;
    s->leases = (struct lease_set){.loop = loop, .idle_ms = config->begin_timeout_ms, .tickets = &s->tickets};
    s->conns.tickets = &s->tickets;
    s->conns.on_empty = on_conns_gone;
    s->conns.arg = s;
    s->timer.data = s;
    roster_init(&s->roster, loop, make_vm, s);
    (void)uv_timer_init(loop, &s->timer);
    *ret_server = s;
    return 0;
}

/* Rules that name users want them to get as far as to be asked who they are. */
static mode_t socket_mode(const struct server *s)
{
    if (s->config->socket_mode)
        return s->config->socket_mode;
    if (access_names_users(s->conns.access))
        return 0666;
    return s->config->socket_group ? 0660 : 0600;
}

static int on_client(void *arg, uv_stream_t *stream)
{
    struct server *s = arg;

    return conn_accept(&s->conns, stream);
}

/* Sockets that systemd or a test passed: those of unix and TCP listeners, all of them. */
static int open_passed(struct server *s, const struct config_listener *config, struct failure *f)
{
    int n = sd_listen_fds(/* unset_environment= */ 1), r;

    if (n <= 0)
        return failure_set(f, -EINVAL, "--listen fd: no socket was passed to this process (LISTEN_FDS, LISTEN_PID)");
    if ((unsigned)n > CONFIG_LISTENERS_MAX)
        return failure_set(f, -EINVAL, "--listen fd: more than %u sockets were passed", CONFIG_LISTENERS_MAX);
    for (int i = 0; i < n; i++) {
        int fd = SD_LISTEN_FDS_START + i;
        struct sockaddr_storage address = {0};
        socklen_t len = sizeof address;

        if (sd_is_socket(fd, AF_UNSPEC, SOCK_STREAM, /* listening= */ 1) <= 0)
            return failure_set(f, -EINVAL, "--listen fd: descriptor %d is not a listening stream socket", fd);
        if (getsockname(fd, (struct sockaddr *)&address, &len) < 0)
            return failure_set(f, -errno, "--listen fd: descriptor %d: %s", fd, strerror(errno));
        if (address.ss_family != AF_UNIX && !config_is_loopback(&address) && s->config->tls == CONFIG_TLS_OFF &&
            !s->config->allow_plaintext)
            return failure_set(f, -EINVAL,
                               "--listen fd: descriptor %d would offer disks to the network in clear text; "
                               "say --tls on, listen on loopback, or say --allow-plaintext",
                               fd);
        r = listen_open(s->loop, config, fd, &s->socket_file, on_client, s, &s->listeners[s->nlisteners], f);
        if (r < 0)
            return r;
        s->nlisteners++;
    }
    return 0;
}

static int start_listeners(struct server *s, struct failure *f)
{
    for (size_t i = 0; i < s->config->nlisteners; i++) {
        const struct config_listener *l = &s->config->listeners[i];
        int r;

        if (l->type == LISTEN_FD) {
            r = open_passed(s, l, f);
        } else {
            r = listen_open(s->loop, l, /* fd= */ -1, &s->socket_file, on_client, s, &s->listeners[s->nlisteners], f);
            if (r == 0)
                s->nlisteners++;
        }
        if (r < 0)
            return r;
    }
    return 0;
}

int server_listen(struct server *s, struct failure *f)
{
    int r;

    s->socket_file = (struct listen_file){
        .mode = socket_mode(s),
        .uid = s->config->become.set ? s->config->become.uid : LISTEN_AS_IS,
        .gid = s->config->socket_gid,
    };
    r = control_open(s, s->config->control, &s->control, f);
    return r == 0 ? start_listeners(s, f) : r;
}

int server_start(struct server *s, struct failure *f)
{
    int r = start_tls(s, f);

    for (size_t i = 0; r == 0 && i < s->config->nvms; i++)
        r = roster_add(&s->roster, &s->config->vms[i], f);
    if (r == 0)
        roster_start(&s->roster);
    return r;
}

/* -- stop ---------------------------------------------------------------------------------------------------------- */
static void close_listeners(struct server *s)
{
    for (size_t i = 0; i < s->nlisteners; i++)
        listen_close(s->listeners[i]);
    s->nlisteners = 0;
}

static void on_timer_closed(uv_handle_t *handle)
{
    struct server *s = handle->data;
    server_stop_cb cb = s->on_stopped;
    void *arg = s->arg;

    free(s->listeners);
    free(s);
    cb(arg, /* clean= */ true);
}

static void on_scratch_closed(void *arg)
{
    struct server *s = arg;

    uv_close((uv_handle_t *)&s->timer, on_timer_closed);
}

static void on_tls_closed(void *arg)
{
    struct server *s = arg;

    scratch_close(TAKE_PTR(s->scratch), on_scratch_closed, s);
}

static void on_set_closed(void *arg)
{
    struct server *s = arg;

    if (s->has_tls)
        tls_server_close(&s->tls, on_tls_closed, s);
    else
        on_tls_closed(s);
}

static void on_control_closed(void *arg)
{
    struct server *s = arg;

    s->stage = STAGE_GONE;
    conn_set_close(&s->conns, on_set_closed);
}

static void try_control(struct server *s)
{
    if (!s->vms_gone || s->conns.nopen > 0)
        return;
    s->stage = STAGE_CONTROL;
    if (s->control)
        control_close(TAKE_PTR(s->control), on_control_closed, s);
    else
        on_control_closed(s);
}

static void on_vms_gone(void *arg)
{
    struct server *s = arg;

    s->vms_gone = true;
    try_control(s);
}

static void on_too_late(uv_timer_t *timer)
{
    struct server *s = timer->data;

    log_error("not everything could be ended within %u seconds (%zu connections, %zu VMs left); ending anyhow",
              SERVER_STOP_MS / 1000, s->conns.nopen, s->roster.nvms);
    s->on_stopped(s->arg, /* clean= */ false);
}

static void stop_vms(struct server *s)
{
    s->stage = STAGE_VMS;
    (void)uv_timer_start(&s->timer, on_too_late, SERVER_STOP_MS - SERVER_DRAIN_MS, 0);
    roster_stop(&s->roster, on_vms_gone, s);
}

static void on_conns_gone(void *arg)
{
    struct server *s = arg;

    if (s->stage == STAGE_CONNS)
        stop_vms(s);
    else if (s->stage == STAGE_VMS)
        try_control(s);
}

/* What is left waits for a client that does not read, or for a QEMU that does not answer: its end answers, too. */
static void on_drained(uv_timer_t *timer)
{
    struct server *s = timer->data;
    struct failure why = {0};

    (void)failure_set(&why, -ESHUTDOWN, "qpulld ends, and this took too long");
    conn_set_kill(&s->conns, &why);
    stop_vms(s);
}

void server_stop(struct server *s, server_stop_cb cb, void *arg)
{
    struct failure why = {0};

    if (s->stage != STAGE_RUNNING)
        return;
    s->on_stopped = cb;
    s->arg = arg;
    s->stage = STAGE_CONNS;
    close_listeners(s);
    if (s->conns.nopen == 0) {
        on_conns_gone(s);
        return;
    }
    log_info("waiting for %zu connection%s", s->conns.nopen, s->conns.nopen == 1 ? "" : "s");
    (void)failure_set(&why, -ESHUTDOWN, "qpulld ends");
    (void)uv_timer_start(&s->timer, on_drained, SERVER_DRAIN_MS, 0);
    conn_set_fail(&s->conns, &why);
}

bool server_is_stopping(const struct server *s)
{
    return s->stage != STAGE_RUNNING;
}

/* -- for the control socket ---------------------------------------------------------------------------------------- */
struct vm *server_vm(const struct server *s, const char *name)
{
    return catalog_vm(&s->roster.catalog, name);
}

bool server_keeps_notes(const struct server *s, const char *name)
{
    for (size_t i = 0; i < s->roster.nvms; i++)
        if (strcmp(vm_name(roster_vm_at(&s->roster, i)), name) == 0)
            return true;
    return false;
}

const struct access *server_access(const struct server *s)
{
    return s->conns.access;
}

int server_set_vms(struct server *s, struct config_vm *vms, size_t nvms, struct roster_change *ret_change)
{
    return roster_set(&s->roster, vms, nvms, ret_change);
}

void server_set_access(struct server *s, const struct access *access)
{
    struct failure why = {0};

    s->conns.access = access;
    if (s->control)
        control_check_access(s->control);
    if (!s->control || socket_mode(s) == s->socket_file.mode)
        return;
    s->socket_file.mode = socket_mode(s);
    log_info("our unix sockets have mode 0%o from now on", (unsigned)s->socket_file.mode);
    if (control_set_mode(s->control, s->socket_file.mode, &why) < 0)
        log_error("%s", why.text);
    for (size_t i = 0; i < s->nlisteners; i++)
        if (listen_set_mode(s->listeners[i], s->socket_file.mode, &why) < 0)
            log_error("%s", why.text);
}

const struct listen_file *server_socket_file(const struct server *s)
{
    return &s->socket_file;
}

size_t server_nvms(const struct server *s)
{
    return s->roster.catalog.nvms;
}

struct vm *server_vm_at(const struct server *s, size_t i)
{
    return s->roster.catalog.vms[i];
}

struct lease_set *server_leases(struct server *s)
{
    return &s->leases;
}

struct ticket_book *server_tickets(struct server *s)
{
    return &s->tickets;
}

struct scratch_place *server_scratch(const struct server *s)
{
    return s->scratch;
}

const struct server_config *server_config(const struct server *s)
{
    return s->config;
}

uv_loop_t *server_loop(const struct server *s)
{
    return s->loop;
}

const struct conn_set *server_conns(const struct server *s)
{
    return &s->conns;
}

uint64_t server_scratch_used(const struct server *s)
{
    return scratch_used_by_all(s->scratch);
}

uint64_t server_uptime_ms(const struct server *s)
{
    return uv_now(s->loop) - s->started_ms;
}

size_t server_nlisteners(const struct server *s)
{
    return s->nlisteners;
}

const char *server_address(const struct server *s, size_t i)
{
    return listen_address(s->listeners[i]);
}

static struct json_object *scratch_to_json(const struct server *s)
{
    struct json_object *o = json_object_new_object();
    const struct scratch_limits *limits = scratch_limits(s->scratch);

    json_object_object_add(o, "directory", s->config->place ? NULL : json_object_new_string(scratch_dir(s->scratch)));
    json_object_object_add(o, "place", s->config->place ? json_object_new_string(s->config->scratch) : NULL);
    json_object_object_add(o, "used", json_object_new_uint64(scratch_used_by_all(s->scratch)));
    json_object_object_add(o, "limit", json_object_new_uint64(limits->session));
    json_object_object_add(o, "total-limit", json_object_new_uint64(limits->all));
    json_object_object_add(o, "reserve", json_object_new_uint64(limits->reserve));
    return o;
}

static struct json_object *tls_to_json(const struct server *s)
{
    struct json_object *o = json_object_new_object();

    json_object_object_add(o, "required", json_object_new_boolean(s->config->tls == CONFIG_TLS_REQUIRE));
    json_object_object_add(o, "credentials", json_object_new_string(tls_creds_text(s->tls.creds)));
    json_object_object_add(o, "handshakes", json_object_new_uint64(s->tls.nhandshakes));
    json_object_object_add(o, "failed", json_object_new_uint64(s->tls.nfailed));
    json_object_object_add(o, "buffers", json_object_new_uint64(s->tls.sealed));
    return o;
}

struct json_object *server_status_to_json(struct server *s)
{
    struct json_object *o = json_object_new_object(), *listeners = json_object_new_array();
    struct json_object *memory = json_object_new_object(), *counts = json_object_new_object();
    struct json_object *vms = json_object_new_array();

    for (size_t i = 0; i < s->nlisteners; i++)
        json_object_array_add(listeners, json_object_new_string(server_address(s, i)));
    json_object_object_add(memory, "used", json_object_new_uint64(s->conns.budget.used));
    json_object_object_add(memory, "most", json_object_new_uint64(s->conns.budget.most));
    json_object_object_add(memory, "spare", json_object_new_uint64(budget_spare_bytes(&s->conns.budget)));
    json_object_object_add(memory, "limit", json_object_new_uint64(s->conns.budget.limit));
    json_object_object_add(counts, "now", json_object_new_uint64(s->conns.nconns));
    json_object_object_add(counts, "limit", json_object_new_uint64(s->config->max_connections));
    json_object_object_add(counts, "limit-per-client", json_object_new_uint64(s->config->max_connections_per_client));
    json_object_object_add(counts, "total", json_object_new_uint64(s->conns.ntotal));
    json_object_object_add(counts, "refused", json_object_new_uint64(s->conns.nrefused));
    json_object_object_add(counts, "evicted", json_object_new_uint64(s->conns.nevicted));

    json_object_object_add(o, "version", json_object_new_string(QPULL_VERSION));
    json_object_object_add(o, "pid", json_object_new_int64(getpid()));
    json_object_object_add(o, "uptime", json_object_new_uint64(server_uptime_ms(s) / 1000));
    json_object_object_add(o, "stopping", json_object_new_boolean(server_is_stopping(s)));
    json_object_object_add(o, "listeners", listeners);
    json_object_object_add(o, "tls", s->has_tls ? tls_to_json(s) : NULL);
    json_object_object_add(o, "buffers", memory);
    json_object_object_add(o, "scratch", scratch_to_json(s));
    for (size_t i = 0; i < s->roster.nvms; i++)
        json_object_array_add(vms, vm_brief_to_json(roster_vm_at(&s->roster, i)));
    json_object_object_add(o, "vms", vms);
    json_object_object_add(o, "connection-counts", counts);
    json_object_object_add(o, "connections", conn_set_to_json(&s->conns));
    return o;
}
