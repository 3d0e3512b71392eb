/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conn_world.h"

#include <signal.h>
#include <stdio.h>
#include <unistd.h>

/* -- VMs ----------------------------------------------------------------------------------------------------------- */

static void answer(uv_timer_t *timer)
{
    struct vm *vm = timer->data;

    while (vm->queries && !vm->hold_queries) {
        struct vm_query *q = vm->queries;
        vm->queries = q->next;
        q->vm = NULL;
        q->cb(q, &vm->list, NULL);
    }
    for (struct vm_stay *s = vm->stays, *next; s && !vm->hold_entering; s = next) {
        next = s->next;
        if (s->state != STAY_WAITING)
            continue;
        if (vm->refusal.err) {
            struct failure why = vm->refusal;
            vm_leave(s, false, false);
            vm->nleft--;
            s->on_entered(s, &why);
            continue;
        }
        s->state = STAY_IN;
        vm->nentered++;
        s->on_entered(s, NULL);
    }
}

void vm_answer_soon(struct vm *vm)
{
    assert_int_equal(uv_timer_start(&vm->timer, answer, 0, 0), 0);
}

const char *vm_name(const struct vm *vm)
{
    return vm->name;
}

int vm_query_start(struct vm *vm, struct vm_query *q,
                   void (*cb)(struct vm_query *, const struct disk_list *, const struct failure *), void *arg)
{
    *q = (struct vm_query){.cb = cb, .arg = arg, .vm = vm, .next = vm->queries};
    vm->queries = q;
    vm_answer_soon(vm);
    return 0;
}

void vm_query_forget(struct vm_query *q)
{
    struct vm_query **at;

    if (!q->vm)
        return;
    for (at = &q->vm->queries; *at != q; at = &(*at)->next)
        ;
    *at = q->next;
    q->vm = NULL;
}

int vm_enter(struct vm *vm, struct vm_stay *stay)
{
    stay->vm = vm;
    stay->state = STAY_WAITING;
    stay->prev = NULL;
    stay->next = vm->stays;
    if (stay->next)
        stay->next->prev = stay;
    vm->stays = stay;
    (void)snprintf(vm->since, sizeof vm->since, "%s", stay->nsince ? stay->since[0] : "");
    (void)snprintf(vm->checkpoint, sizeof vm->checkpoint, "%s", stay->checkpoint ? stay->checkpoint : "");
    (void)snprintf(vm->disk, sizeof vm->disk, "%s", stay->disk);
    (void)snprintf(vm->identity, sizeof vm->identity, "%s", stay->identity);
    vm_answer_soon(vm);
    return 0;
}

void vm_leave(struct vm_stay *stay, bool said_disc, bool read_failed)
{
    struct vm *vm = stay->vm;

    assert_non_null(vm); /* once only */
    *(stay->prev ? &stay->prev->next : &vm->stays) = stay->next;
    if (stay->next)
        stay->next->prev = stay->prev;
    stay->vm = NULL;
    vm->nleft++;
    vm->last_disc = said_disc;
    vm->last_failed = read_failed;
}

struct source *vm_stay_source(struct vm_stay *stay)
{
    return &stay->vm->source.source;
}

const struct map *vm_stay_map(struct vm_stay *stay, const char *context)
{
    return stay->vm->unmapped                                 ? NULL
           : strcmp(context, "base:allocation") == 0          ? stay->vm->allocation
           : strcmp(context, "qemu:dirty-bitmap:monday") == 0 ? stay->vm->dirty
                                                              : NULL;
}

void vm_map(struct vm *vm)
{
    vm->unmapped = false;
    for (struct vm_stay *s = vm->stays, *next; s; s = next) {
        next = s->next;
        if (s->state == STAY_IN)
            s->on_maps(s);
    }
}

bool vm_stay_expects_map(struct vm_stay *stay, const char *context)
{
    return stay->vm->unmapped;
}

struct vm_counters *vm_stay_counters(struct vm_stay *stay)
{
    return &stay->vm->counters;
}

void vm_stay_lost(struct vm_stay *stay)
{
    stay->vm->ntold_lost++;
}

const char *vm_trouble(const struct vm *vm)
{
    return "not connected";
}

const struct disk *vm_lease_disk(const struct vm_lease *l, const char *name)
{
    return disk_list_find(&l->stay.vm->list, name);
}

struct vm *vm_lease_vm(const struct vm_lease *l)
{
    return l->stay.vm;
}

const char *vm_lease_session(const struct vm_lease *l)
{
    return "s1";
}

uint64_t vm_stay_rate(const struct vm_stay *stay)
{
    return stay->vm->rate;
}

const char *vm_stay_session(const struct vm_stay *stay)
{
    return "s1";
}

/* -- the disk ------------------------------------------------------------------------------------------------------ */
struct disk_loan {
    struct source_loan loan;
    struct disk_source *disk;
    size_t length;
    uint8_t bytes[];
};

/* Who uses them still will be found out: they are other bytes now, and soon nobody's. */
static void end_loan(struct source_loan *l)
{
    struct disk_loan *loan = container_of(l, struct disk_loan, loan);

    assert_true(loan->disk->nlent-- > 0);
    memset(loan->bytes, 0xee, loan->length);
    free(loan);
}

static void lend(struct disk_source *d, struct source_read *r)
{
    struct disk_loan *loan = malloc(sizeof *loan + r->length);

    assert_non_null(loan);
    assert_true(d->nlent++ < SLOTS); /* more than SCARCE are not kept */
    *loan = (struct disk_loan){.loan = {.end = end_loan, .scarce = d->nlent > SCARCE}, .disk = d, .length = r->length};
    r->buffer = loan->bytes;
    r->loan = &loan->loan;
}

static void answer_read(struct disk_source *d, struct source_read *r)
{
    read_list_remove(&d->reads, r);
    d->nreads--;
    if (!d->lost && r->borrow && ++d->nasked % NOT_LENT == 0) {
        r->cb(r, -ENOBUFS);
        return;
    }
    if (!d->lost && r->borrow)
        lend(d, r);
    if (!d->lost)
        memcpy(r->buffer, d->data + r->offset, r->length);
    r->cb(r, d->lost ? -EIO : 0);
}

void vm_answer_read(struct vm *vm, unsigned i)
{
    struct source_read *r = vm->source.reads.first;

    for (; i > 0; i--)
        r = r->next;
    answer_read(&vm->source, r);
}

static void answer_reads(uv_timer_t *timer)
{
    struct disk_source *d = timer->data;

    while (d->reads.first && !d->hold)
        answer_read(d, d->reverse ? d->reads.last : d->reads.first);
}

static int disk_read(struct source *s, struct source_read *r)
{
    struct disk_source *d = container_of(s, struct disk_source, source);

    if (d->lost)
        return -ENOTCONN;
    read_list_append(&d->reads, r);
    d->nreads++;
    return uv_timer_start(&d->timer, answer_reads, 0, 0);
}

static const struct source_ops disk_ops = {.read = disk_read};

void vm_release_reads(struct vm *vm)
{
    vm->source.hold = false;
    assert_int_equal(uv_timer_start(&vm->source.timer, answer_reads, 0, 0), 0);
}

/* Zeros, as the map has them: [0, 256 KiB), and from 512 KiB to 1 MiB. The data under them is not zero: who reads it is
 * found out. */
static void vm_init(struct vm *vm, uv_loop_t *loop, const char *name, size_t ndisks)
{
    *vm = (struct vm){.name = name, .loop = loop};
    vm->source = (struct disk_source){.source = {.ops = &disk_ops, .size = DISK_SIZE}, .data = malloc(DISK_SIZE)};
    vm->source.timer.data = &vm->source;
    assert_int_equal(uv_timer_init(loop, &vm->source.timer), 0);
    assert_int_equal(uv_timer_init(loop, &vm->timer), 0);
    vm->timer.data = vm;
    for (uint32_t i = 0; i < DISK_SIZE; i++)
        vm->source.data[i] = (uint8_t)(1 + (i * 2654435761u >> 24) % 255);
    vm->checkpoints[0] = (struct checkpoint){.name = (char *)"broken", .reason = REASON_INCONSISTENT};
    vm->checkpoints[1] = (struct checkpoint){.name = (char *)"monday"};
    for (size_t i = 0; i < ndisks; i++)
        vm->disks[i] = (struct disk){.name = (char *)(i ? "vdb" : "vda"),
                                     .format = (char *)"qcow2",
                                     .size = DISK_SIZE,
                                     .ncheckpoints = 2,
                                     .checkpoints = vm->checkpoints};
    vm->list = (struct disk_list){.ndisks = ndisks, .disks = vm->disks};
    assert_int_equal(map_new(&vm->allocation), 0);
    assert_int_equal(map_append(vm->allocation, 256 * KIB, NBD_STATE_HOLE | NBD_STATE_ZERO), 0);
    assert_int_equal(map_append(vm->allocation, 256 * KIB, 0), 0);
    assert_int_equal(map_append(vm->allocation, 512 * KIB, NBD_STATE_HOLE | NBD_STATE_ZERO), 0);
    assert_int_equal(map_append(vm->allocation, DISK_SIZE - 1024 * KIB, 0), 0);
    assert_int_equal(map_new(&vm->dirty), 0);
    assert_int_equal(map_append(vm->dirty, 64 * KIB, NBD_STATE_DIRTY), 0);
    assert_int_equal(map_append(vm->dirty, DISK_SIZE - 64 * KIB, 0), 0);
}

static void vm_done(struct vm *vm)
{
    assert_null(vm->stays);
    assert_null(vm->queries);
    assert_int_equal(vm->source.nreads, 0);
    assert_int_equal(vm->source.nlent, 0);
    uv_close((uv_handle_t *)&vm->source.timer, NULL);
    uv_close((uv_handle_t *)&vm->timer, NULL);
    loop_turn(vm->loop, 3);
    map_free(vm->allocation);
    map_free(vm->dirty);
    free(vm->source.data);
}

void vm_lose(struct vm *vm, const char *text)
{
    struct failure why = {.err = -EIO};

    (void)snprintf(why.text, sizeof why.text, "%s", text);
    vm->source.lost = true;
    for (struct vm_stay *s = vm->stays; s; s = s->next)
        s->on_lost(s, &why);
}

/* -- the server, and clients --------------------------------------------------------------------------------------- */
static int on_client(void *arg, uv_stream_t *stream)
{
    struct world *w = arg;

    return conn_accept(&w->set, stream);
}

int world_set_up_lending(void **state)
{
    int r = world_set_up(state);
    struct world *w = *state;

    w->vms[0].source.source.lends = w->vms[1].source.source.lends = true;
    return r;
}

int world_set_up(void **state)
{
    struct world *w = calloc(1, sizeof *w);
    struct failure why = {0};
    const struct listen_file ours = {.mode = 0600, .uid = LISTEN_AS_IS, .gid = LISTEN_AS_IS};

    log_init(LOG_LEVEL_ERROR);
    (void)signal(SIGPIPE, SIG_IGN); /* as the daemon does */
    loop_init(&w->loop);
    w->config = (struct server_config){.handshake_timeout_ms = 60000, .max_connections = 8};
    vm_init(&w->vms[0], &w->loop, "web", 2);
    vm_init(&w->vms[1], &w->loop, "db", 1);
    w->vm_list[0] = &w->vms[0];
    w->vm_list[1] = &w->vms[1];
    w->catalog = (struct catalog){.vms = w->vm_list, .nvms = 1};
    assert_int_equal(conn_set_init(&w->set, &w->loop, &w->config, &w->catalog), 0);
    (void)strcpy(w->dir, "/tmp/qpull-conn-XXXXXX");
    assert_non_null(mkdtemp(w->dir));
    (void)snprintf(w->path, sizeof w->path, "%s/nbd.sock", w->dir);
    assert_int_equal(listen_open_unix(&w->loop, w->path, &ours, on_client, w, &w->listener, &why), 0);
    *state = w;
    return 0;
}

static void on_set_closed(void *arg)
{
}

void client_close(struct client *c)
{
    if (c->open)
        uv_close((uv_handle_t *)&c->pipe, NULL);
    c->open = false;
}

int world_tear_down(void **state)
{
    struct world *w = *state;

    for (size_t i = 0; i < CLIENTS_MAX; i++)
        client_close(&w->clients[i]);
    loop_until(&w->loop, w->set.nopen == 0);
    assert_int_equal(w->set.budget.used, 0);
    assert_int_equal(w->set.nconns, 0);
    listen_close(w->listener);
    conn_set_close(&w->set, on_set_closed);
    vm_done(&w->vms[0]);
    vm_done(&w->vms[1]);
    loop_done(&w->loop);
    assert_int_equal(access(w->path, F_OK), -1);
    (void)rmdir(w->dir);
    for (size_t i = 0; i < CLIENTS_MAX; i++)
        bytes_done(&w->clients[i].in);
    free(w);
    return 0;
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
    static char room[64 * KIB]; /* one loop, and on_read copies at once */

    *buf = uv_buf_init(room, sizeof room);
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct client *c = stream->data;

    if (n > 0)
        put_raw(&c->in, buf->base, (size_t)n);
    if (n < 0) {
        c->eof = true;
        (void)uv_read_stop(stream);
    }
}

void client_read(struct client *c, bool on)
{
    if (on)
        assert_int_equal(uv_read_start((uv_stream_t *)&c->pipe, on_alloc, on_read), 0);
    else
        (void)uv_read_stop((uv_stream_t *)&c->pipe);
}

static void on_connected(uv_connect_t *req, int status)
{
    struct client *c = req->data;

    c->connected = status == 0;
}

struct client *client_connect(struct world *w, size_t i)
{
    struct client *c = &w->clients[i];

    assert_int_equal(uv_pipe_init(&w->loop, &c->pipe, 0), 0);
    c->pipe.data = c->connect.data = c;
    c->open = true;
    uv_pipe_connect(&c->connect, &c->pipe, w->path, on_connected);
    loop_until(&w->loop, c->connected);
    client_read(c, true);
    return c;
}

static void on_sent(uv_write_t *req, int status)
{
    free(req);
}

void client_say(struct client *c, struct bytes *b)
{
    uv_write_t *req = malloc(sizeof *req + b->len);
    uv_buf_t buf = uv_buf_init((char *)(req + 1), (unsigned)b->len);

    memcpy(req + 1, b->data, b->len);
    assert_int_equal(uv_write(req, (uv_stream_t *)&c->pipe, &buf, 1, on_sent), 0);
    bytes_done(b);
}

void client_expect(struct world *w, struct client *c, struct bytes *want)
{
    loop_until(&w->loop, c->in.len >= want->len || c->eof);
    loop_turn(&w->loop, 2);
    assert_int_equal(c->in.len, want->len);
    assert_memory_equal(c->in.data, want->data, want->len);
    bytes_done(want);
    bytes_done(&c->in);
}

void client_expect_either(struct world *w, struct client *c, struct bytes *want, struct bytes *other)
{
    assert_int_equal(want->len, other->len);
    loop_until(&w->loop, c->in.len >= want->len || c->eof);
    if (c->in.len == other->len && memcmp(c->in.data, other->data, other->len) == 0)
        client_expect(w, c, other);
    else
        client_expect(w, c, want);
    bytes_done(want);
    bytes_done(other);
}

struct client *client_greet(struct world *w, size_t i, enum form form)
{
    struct client *c = client_connect(w, i);
    struct bytes b = {0};

    say_flags(&b, NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES);
    if (form == STRUCTURED)
        say_option(&b, NBD_OPT_STRUCTURED_REPLY, NULL);
    client_say(c, &b);
    want_greeting(&b);
    if (form == STRUCTURED)
        want_reply(&b, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    client_expect(w, c, &b);
    return c;
}

struct client *client_open(struct world *w, size_t i, const char *name, enum form form)
{
    struct client *c = client_greet(w, i, form);
    struct bytes b = {0};

    say_info(&b, NBD_OPT_GO, name, 0, NULL);
    client_say(c, &b);
    want_info_export(&b, NBD_OPT_GO, DISK_SIZE, FLAGS_SIMPLE | (form == STRUCTURED ? NBD_FLAG_SEND_DF : 0));
    want_reply(&b, NBD_OPT_GO, NBD_REP_ACK, NULL);
    client_expect(w, c, &b);
    return c;
}

void say_read(struct bytes *b, uint64_t cookie, uint64_t offset, uint32_t length)
{
    say_request(b, 0, NBD_CMD_READ, cookie, offset, length);
}

void say_disc(struct bytes *b)
{
    say_request(b, 0, NBD_CMD_DISC, 0, 0, 0);
}
