/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "client_world.h"

#include <dirent.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

static void on_closed(void *arg)
{
    struct world *w = arg;

    w->closed = true;
}

void world_close(struct world *w)
{
    if (w->client)
        qmp_client_close(TAKE_PTR(w->client), on_closed, w);
}

static void on_ready(void *arg, struct json_object *greeting)
{
    struct world *w = arg;

    w->nready++;
    free(w->greeting);
    w->greeting = strdup(json_object_to_json_string_ext(greeting, JSON_C_TO_STRING_PLAIN));
    assert_true(qmp_client_is_ready(w->client));
    if (w->close_when_ready)
        world_close(w);
}

static void on_lost(void *arg, const struct failure *why)
{
    struct world *w = arg;

    if (w->nlost < ARRAY_SIZE(w->lost_at))
        w->lost_at[w->nlost] = uv_now(w->clock);
    w->nlost++;
    w->why = *why;
    w->nanswers_at_loss = w->nanswers;
    assert_true(why->err < 0);
    assert_true(strlen(why->text) > 0);
    assert_false(qmp_client_is_ready(w->client));
    if (w->close_when_lost)
        world_close(w);
}

const struct qmp_client_ops world_ops = {.on_ready = on_ready, .on_lost = on_lost};
const struct qmp_client_limits quick = {.reconnect_min_ms = 1, .reconnect_max_ms = 4};

static void on_command(struct fake_qemu *q, const struct fake_command *command, void *arg)
{
    struct world *w = arg;
    size_t len = strlen(w->order);

    (void)snprintf(w->order + len, sizeof(w->order) - len, "%s ", command->name);
    if (w->ncommands < MAX_HELD) {
        w->nfds_with[w->ncommands] = command->nfds;
        w->fd_came_first[w->ncommands] = command->fd_came_first;
    }
    w->ncommands++;
    if (strcmp(command->name, "echo") == 0) {
        fake_qemu_return(q, command->id, json_object_get(command->args));
    } else if (strcmp(command->name, "hold") == 0) {
        assert_true(w->nheld < MAX_HELD);
        w->held[w->nheld++] = json_object_get(command->id);
    } else if (strcmp(command->name, "fail") == 0) {
        fake_qemu_error(q, command->id, json_object_get_string(json_object_object_get(command->args, "class")),
                        json_object_get_string(json_object_object_get(command->args, "desc")));
    } else if (strcmp(command->name, "hangup") == 0) {
        fake_qemu_hangup(q);
    } else if (strcmp(command->name, "last-words") == 0) {
        fake_qemu_event(q, "SHUTDOWN", NULL);
        fake_qemu_return(q, command->id, NULL);
        fake_qemu_hangup(q);
    }
}

void release(struct world *w, unsigned i, const char *result)
{
    fake_qemu_return(w->qemu, w->held[i], json_tokener_parse(result));
}

void world_connect(struct world *w, const struct qmp_client_limits *limits)
{
    assert_int_equal(qmp_client_new(&w->loop, fake_qemu_path(w->qemu), &world_ops, w, limits, &w->client), 0);
    assert_int_equal(qmp_client_open(w->client), 0);
}

void world_init(struct world *w, const struct fake_qemu_options *options)
{
    *w = (struct world){0};
    loop_init(&w->loop);
    w->clock = &w->loop;
    w->qemu = fake_qemu_new(&w->loop, options, on_command, w);
}

void world_up(struct world *w, const struct fake_qemu_options *options)
{
    world_init(w, options);
    world_connect(w, &quick);
    loop_until(&w->loop, w->nready == 1);
}

void world_down(struct world *w)
{
    world_close(w);
    fake_qemu_free(w->qemu);
    for (unsigned i = 0; i < w->nheld; i++)
        json_object_put(w->held[i]);
    loop_done(&w->loop);
    assert_true(w->closed);
    free(w->greeting);
}

void on_answer(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    struct answer *a = call->arg;

    a->n++;
    a->number = ++a->world->nanswers;
    free(a->ret);
    a->ret = ret ? strdup(json_object_to_json_string_ext(ret, JSON_C_TO_STRING_PLAIN)) : NULL;
    a->f = f ? *f : (struct failure){0};
    if (f)
        assert_null(ret);
    if (a->cancel)
        qmp_call_cancel(&a->cancel->call);
    if (a->close_client)
        world_close(a->world);
}

void ask_with_fd(struct world *w, struct answer *a, const char *command, const char *args, int fd, unsigned timeout_ms)
{
    struct json_object *o = args ? json_tokener_parse(args) : NULL;

    a->world = w;
    assert_int_equal(qmp_call_start(w->client, &a->call, command, o, fd, timeout_ms, on_answer, a), 0);
    assert_int_equal(a->n, 0); /* never from within */
}

void ask(struct world *w, struct answer *a, const char *command, const char *args)
{
    ask_with_fd(w, a, command, args, QMP_NO_FD, LONG_MS);
}

void answer_done(struct answer *a)
{
    free(a->ret);
}

void round_trip(struct world *w)
{
    struct answer a = {0};

    ask(w, &a, "echo", "{\"x\": 1}");
    loop_until(&w->loop, a.n == 1);
    assert_int_equal(a.f.err, 0);
    assert_string_equal(a.ret, "{\"x\":1}");
    answer_done(&a);
}

unsigned open_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned n = 0;

    assert_non_null(dir);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

char *big_args(size_t len)
{
    char *text = malloc(len + 1);

    assert_non_null(text);
    (void)snprintf(text, len + 1, "{\"x\":\"%0*d\"}", (int)len - 8, 0);
    return text;
}

static void on_event(struct qmp_watch *watch, const char *event, struct json_object *data)
{
    struct ear *e = watch->arg;

    e->n++;
    (void)snprintf(e->last, sizeof(e->last), "%s %s", event,
                   data ? json_object_to_json_string_ext(data, JSON_C_TO_STRING_PLAIN) : "-");
    if (e->remove)
        qmp_watch_remove(&e->remove->watch);
    if (e->add) {
        qmp_watch_remove(&e->add->watch);
        qmp_watch_add(e->world->client, &e->add->watch, e->add->event, on_event, e->add);
    }
    if (e->close_client)
        world_close(e->world);
}

void hear(struct world *w, struct ear *e, const char *event)
{
    e->world = w;
    e->event = event;
    qmp_watch_add(w->client, &e->watch, event, on_event, e);
}

size_t more_than_a_socket_holds(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), size = 0;
    socklen_t len = sizeof(size);

    if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, &len) < 0)
        abort();
    close(fd);
    return 2 * (size_t)size;
}
