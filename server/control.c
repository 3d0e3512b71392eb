/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "control_client.h"
#include "listen.h"
#include "vm.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

struct answer {
    uv_write_t write;
    struct control_client *client;
    size_t len;
    char text[];
};

/* -- the end of a client ------------------------------------------------------------------------------------------- */
static void call_unlink(struct control_call *call)
{
    struct control_client *client = call->client;

    if (!client)
        return;
    *(call->prev ? &call->prev->next : &client->calls) = call->next;
    if (call->next)
        call->next->prev = call->prev;
    client->ncalls--;
    call->client = NULL;
    call->next = call->prev = NULL;
}

static void call_free(struct control_call *call)
{
    call_unlink(call);
    json_object_put(call->id);
    free(call);
}

static void try_finish(struct control *c);

static void on_client_closed(uv_handle_t *handle)
{
    struct control_client *client = handle->data;
    struct control *c = client->control;

    *(client->prev ? &client->prev->next : &c->clients) = client->next;
    if (client->next)
        client->next->prev = client->prev;
    qmp_stream_done(&client->stream);
    access_who_done(&client->who);
    free(client);
    if (--c->nclients == 0)
        (void)uv_timer_stop(&c->tick);
    try_finish(c);
}

void control_client_close(struct control_client *client)
{
    if (client->closing)
        return;
    client->closing = true;
    while (client->calls) {
        struct control_call *call = client->calls;

        call_unlink(call);
        if (call->command->forget) {
            call->command->forget(call);
            call_free(call);
        }
    }
    uv_close((uv_handle_t *)&client->pipe, on_client_closed);
}

/* -- answers ------------------------------------------------------------------------------------------------------- */
static void update_reading(struct control_client *client);

/* Nothing more comes from it, or goes to it. */
static bool is_answered(const struct control_client *client)
{
    return client->heard_out && client->ncalls == 0 && client->unsent == 0;
}

static void on_written(uv_write_t *req, int status)
{
    struct answer *a = container_of(req, struct answer, write);
    struct control_client *client = a->client;

    client->unsent -= a->len;
    free(a);
    if (status < 0 || (client->last_words && client->unsent == 0) || is_answered(client))
        control_client_close(client);
    else
        update_reading(client);
}

/* -ENOBUFS: the client does not read. Nothing is closed here. */
static int send_text(struct control_client *client, const char *text, size_t len)
{
    struct answer *a;
    uv_buf_t buf;
    int r;

    if (client->unsent + len > CONTROL_UNSENT_MAX)
        return -ENOBUFS;
    if (!text || !(a = malloc(sizeof *a + len + 2)))
        return -ENOMEM;
    memcpy(a->text, text, len);
    memcpy(a->text + len, "\r\n", 2); /* as QEMU ends a line */
    a->len = len + 2;
    a->client = client;
    if (client->unsent == 0)
        client->progress_ms = uv_now(client->pipe.loop);
    buf = uv_buf_init(a->text, (unsigned)a->len);
    r = uv_write(&a->write, (uv_stream_t *)&client->pipe, &buf, 1, on_written);
    if (r < 0)
        free(a);
    else
        client->unsent += len + 2;
    return r;
}

static void tell_unsent(const struct control_client *client, int r)
{
    if (r == -ENOBUFS || r == -ENOMEM)
        log_warning("control client %llu is closed: %s", (unsigned long long)client->id,
                    r == -ENOBUFS ? "it does not read its answers" : "out of memory");
}

/* doc is given. */
static void send_document(struct control_client *client, struct json_object *doc)
{
    size_t len = 0;
    const char *text = doc ? json_object_to_json_string_length(doc, JSON_C_TO_STRING_PLAIN, &len) : NULL;
    int r = client->closing ? 0 : send_text(client, text, len);

    if (r < 0) {
        tell_unsent(client, r);
        control_client_close(client);
    }
    json_object_put(doc);
}

/* -- what it may --------------------------------------------------------------------------------------------------- */
static unsigned rights_of(const struct control_client *client, const char *vm)
{
    return access_rights(server_access(client->control->server), &client->who, vm);
}

uid_t control_uid(const struct control_call *call)
{
    return call->client->who.uid;
}

unsigned control_rights(const struct control_call *call, const struct vm *vm)
{
    return rights_of(call->client, vm_name(vm));
}

bool control_sees(const struct control_call *call, const struct vm *vm)
{
    return rights_of(call->client, vm_name(vm)) & ACCESS_LIST;
}

static bool may_hear(const struct control_client *client, struct json_object *data)
{
    struct json_object *vm;

    return json_object_object_get_ex(data, "vm", &vm) && (rights_of(client, json_object_get_string(vm)) & ACCESS_LIST);
}

static void refuse(struct control_client *client, struct json_object *id, const char *class, const char *fmt, ...)
    _printf_(4, 5);

/* Otherwise it is answered. A VM that it may do nothing with is not there. */
static bool check_rights(struct control_client *client, struct json_object *id, const struct control_command *command,
                         struct json_object *args)
{
    const char *vm = control_string(args, "vm");
    unsigned rights = vm ? rights_of(client, vm) : 0;

    if (command->right == 0 || access_is_admin(server_access(client->control->server), &client->who))
        return true;
    if (vm && rights == 0) {
        refuse(client, id, CONTROL_NO_DEVICE, CONTROL_NO_VM, vm);
        return false;
    }
    if (vm && (rights & command->right))
        return true;
    refuse(client, id, CONTROL_GENERIC, "user %u may not say %s here (--allow)", (unsigned)client->who.uid,
           command->name);
    return false;
}

void control_event(struct control *c, const char *event, struct json_object *data)
{
    struct json_object *doc = json_object_new_object(), *timestamp = json_object_new_object();
    int64_t now_ms = unix_time_ms();
    const char *text;
    size_t len = 0;

    json_object_object_add(timestamp, "seconds", json_object_new_int64(now_ms / 1000));
    json_object_object_add(timestamp, "microseconds", json_object_new_int64(now_ms % 1000 * 1000));
    json_object_object_add(doc, "timestamp", timestamp);
    json_object_object_add(doc, "event", json_object_new_string(event));
    json_object_object_add(doc, "data", data);
    text = json_object_to_json_string_length(doc, JSON_C_TO_STRING_PLAIN, &len);
    for (struct control_client *client = c->clients; client; client = client->next) {
        bool told = client->negotiated && !client->closing && !client->doomed && may_hear(client, data);
        int r = told ? send_text(client, text, len) : 0;

        if (r < 0)
            tell_unsent(client, r);
        client->doomed |= r < 0;
    }
    json_object_put(doc);
}

struct json_object *control_error_document(struct json_object *id, const char *class, const char *text)
{
    struct json_object *doc = json_object_new_object(), *error = json_object_new_object();

    json_object_object_add(error, "class", json_object_new_string(class));
    json_object_object_add(error, "desc", json_object_new_string(text));
    json_object_object_add(doc, "error", error);
    if (id)
        json_object_object_add(doc, "id", json_object_get(id));
    return doc;
}

void control_return(struct control_call *call, struct json_object *value)
{
    struct control_client *client = call->client;

    if (client) {
        struct json_object *doc = json_object_new_object();

        json_object_object_add(doc, "return", value ? value : json_object_new_object());
        if (call->id)
            json_object_object_add(doc, "id", json_object_get(call->id));
        call_free(call);
        send_document(client, doc);
        update_reading(client);
        return;
    }
    json_object_put(value);
    call_free(call);
}

void control_error(struct control_call *call, const char *class, const char *fmt, ...)
{
    struct control_client *client = call->client;
    char text[sizeof((struct failure *)NULL)->text];
    struct json_object *doc;
    va_list ap;

    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    log_debug("control: %s: %s", call->command->name, text);
    doc = client ? control_error_document(call->id, class, text) : NULL;
    call_free(call);
    if (client) {
        send_document(client, doc);
        update_reading(client);
    }
}

void control_fail(struct control_call *call, const struct failure *f)
{
    control_error(call, f->err == -ENODEV ? CONTROL_NO_DEVICE : CONTROL_GENERIC, "%s", f->text);
}

/* -- commands ------------------------------------------------------------------------------------------------------ */
static void refuse(struct control_client *client, struct json_object *id, const char *class, const char *fmt, ...)
{
    char text[sizeof((struct failure *)NULL)->text];
    va_list ap;

    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    send_document(client, control_error_document(id, class, text));
}

static const struct control_param *find_param(const struct control_command *command, const char *name)
{
    for (size_t i = 0; i < CONTROL_ARGS_MAX && command->params[i].name; i++)
        if (strcmp(command->params[i].name, name) == 0)
            return &command->params[i];
    return NULL;
}

static bool is_strings(struct json_object *value)
{
    if (json_object_is_type(value, json_type_string))
        return true;
    if (!json_object_is_type(value, json_type_array))
        return false;
    for (size_t i = 0; i < json_object_array_length(value); i++)
        if (!json_object_is_type(json_object_array_get_idx(value, i), json_type_string))
            return false;
    return true;
}

/* What is wrong with the value: what was expected; NULL: nothing. */
static const char *wrong_type(const struct control_param *p, struct json_object *value)
{
    switch (p->type) {
    case CONTROL_STRINGS:
        return is_strings(value) ? NULL : "array of strings";
    case CONTROL_OBJECT:
        return json_object_is_type(value, json_type_object) ? NULL : "object";
    case CONTROL_NUMBER:
        return json_object_is_type(value, json_type_int) ? NULL : "integer";
    case CONTROL_BOOL:
        return json_object_is_type(value, json_type_boolean) ? NULL : "boolean";
    case CONTROL_STRING:
        break;
    }
    return json_object_is_type(value, json_type_string) ? NULL : "string";
}

static bool check_arguments(struct control_client *client, struct json_object *id,
                            const struct control_command *command, struct json_object *args)
{
    json_object_object_foreach(args, key, value)
    {
        const struct control_param *p = find_param(command, key);
        const char *expected = p ? wrong_type(p, value) : NULL;

        if (!p) {
            refuse(client, id, CONTROL_GENERIC, "Parameter '%s' is unexpected", key);
            return false;
        }
        if (expected) {
            refuse(client, id, CONTROL_GENERIC, "Invalid parameter type for '%s', expected: %s", key, expected);
            return false;
        }
    }
    for (size_t i = 0; i < CONTROL_ARGS_MAX && command->params[i].name; i++)
        if (command->params[i].required && !json_object_object_get_ex(args, command->params[i].name, NULL)) {
            refuse(client, id, CONTROL_GENERIC, "Parameter '%s' is missing", command->params[i].name);
            return false;
        }
    return true;
}

static void start_call(struct control_client *client, struct json_object *id, const struct control_command *command,
                       struct json_object *args)
{
    struct control_call *call = calloc(1, MAX(command->size, sizeof *call));

    if (!call) {
        refuse(client, id, CONTROL_GENERIC, "the server is out of memory");
        return;
    }
    call->server = client->control->server;
    call->command = command;
    call->client = client;
    call->id = json_object_get(id);
    call->next = client->calls;
    if (client->calls)
        client->calls->prev = call;
    client->calls = call;
    client->ncalls++;
    command->run(call, args);
}

static const struct control_command *find_command(const char *name)
{
    for (size_t t = 0; t < CONTROL_TABLES; t++)
        for (size_t i = 0; i < control_tables[t]->ncommands; i++)
            if (strcmp(control_tables[t]->commands[i].name, name) == 0)
                return &control_tables[t]->commands[i];
    return NULL;
}

static int on_document(void *arg, struct json_object *doc)
{
    struct control_client *client = arg;
    struct json_object *execute = NULL, *args = NULL, *id = NULL, *empty = NULL;
    const struct control_command *command = NULL;
    const char *name;

    if (client->closing)
        return -ECANCELED;
    json_object_object_get_ex(doc, "id", &id);
    json_object_object_foreach(doc, key, value)
    {
        if (strcmp(key, "execute") != 0 && strcmp(key, "arguments") != 0 && strcmp(key, "id") != 0) {
            refuse(client, id, CONTROL_GENERIC, "QMP input member '%s' is unexpected", key);
            return 0;
        }
    }
    if (!json_object_object_get_ex(doc, "execute", &execute) || !json_object_is_type(execute, json_type_string)) {
        refuse(client, id, CONTROL_GENERIC, "QMP input lacks member 'execute', a string");
        return 0;
    }
    if (json_object_object_get_ex(doc, "arguments", &args) && !json_object_is_type(args, json_type_object)) {
        refuse(client, id, CONTROL_GENERIC, "QMP input member 'arguments' must be an object");
        return 0;
    }
    name = json_object_get_string(execute);
    log_debug("control client %llu: %s", (unsigned long long)client->id, name);
    if (strcmp(name, "qmp_capabilities") == 0) { /* takes any "enable": there is nothing to enable */
        struct json_object *answer = json_object_new_object();

        client->negotiated = true;
        json_object_object_add(answer, "return", json_object_new_object());
        if (id)
            json_object_object_add(answer, "id", json_object_get(id));
        send_document(client, answer);
        return 0;
    }
    command = find_command(name);
    if (!client->negotiated) {
        refuse(client, id, CONTROL_NO_COMMAND, "Expecting capabilities negotiation with 'qmp_capabilities'");
        return 0;
    }
    if (!command) {
        refuse(client, id, CONTROL_NO_COMMAND, "The command %s has not been found", name);
        return 0;
    }
    if (!args)
        args = empty = json_object_new_object();
    if (check_arguments(client, id, command, args) && check_rights(client, id, command, args))
        start_call(client, id, command, args);
    json_object_put(empty);
    return 0;
}

/* -- input --------------------------------------------------------------------------------------------------------- */
static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
    struct control_client *client = handle->data;

    *buf = uv_buf_init(client->input, sizeof client->input);
}

/* At the end of its input: has the peer closed the socket, or only shut its writing side? (unix(7): POLLHUP) */
static bool is_gone(const struct control_client *client)
{
    struct pollfd p = {.fd = -1};

    return uv_fileno((const uv_handle_t *)&client->pipe, &p.fd) < 0 || poll(&p, 1, 0) < 0 || (p.revents & POLLHUP);
}

static void on_read(uv_stream_t *stream, ssize_t nread, const uv_buf_t *buf)
{
    struct control_client *client = stream->data;
    struct failure why = {0};

    if (nread == 0)
        return;
    if (nread == UV_EOF && !is_gone(client)) {
        client->heard_out = true; /* `echo … | socat` waits for its answers with its writing side shut */
        if (is_answered(client))
            control_client_close(client);
        else
            update_reading(client);
        return;
    }
    if (nread < 0) {
        control_client_close(client);
        return;
    }
    if (qmp_stream_feed(&client->stream, buf->base, (size_t)nread, on_document, client, &why) < 0 && !client->closing) {
        client->last_words = true;
        refuse(client, NULL, CONTROL_GENERIC, "%s", why.text);
    }
    update_reading(client);
}

/* A client that floods, or does not read, waits. One input buffer may hold some more commands than CONTROL_CALLS_MAX.
 */
static void update_reading(struct control_client *client)
{
    bool wanted = !client->closing && !client->last_words && !client->heard_out && client->ncalls < CONTROL_CALLS_MAX &&
                  client->unsent < CONTROL_UNSENT_PAUSE;

    if (client->closing || wanted == client->reading)
        return;
    if (wanted)
        wanted = uv_read_start((uv_stream_t *)&client->pipe, on_alloc, on_read) == 0;
    else
        (void)uv_read_stop((uv_stream_t *)&client->pipe);
    client->reading = wanted;
}

static void on_tick(uv_timer_t *timer)
{
    struct control *c = timer->data;
    uint64_t now = uv_now(timer->loop);
    unsigned timeout_ms = server_config(c->server)->handshake_timeout_ms;

    for (struct control_client *client = c->clients; client; client = client->next) {
        size_t unsent = uv_stream_get_write_queue_size((uv_stream_t *)&client->pipe);

        if (client->closing)
            continue;
        if (client->doomed || (client->heard_out && is_gone(client))) {
            control_client_close(client);
            continue;
        }
        if (!client->negotiated && now - client->born_ms > timeout_ms) {
            control_turn_away(client, "\"qmp_capabilities\" was not said within %g seconds (--handshake-timeout)",
                              timeout_ms / 1000.0);
            continue;
        }
        if (unsent != client->unsent_seen || unsent == 0) {
            client->unsent_seen = unsent;
            client->progress_ms = now;
        } else if (now - client->progress_ms > CONTROL_STUCK_MS) {
            log_warning("control client %llu is closed: it does not read its answers", (unsigned long long)client->id);
            control_client_close(client);
        }
    }
    control_tell_untold(c);
}

/* -- the beginning ------------------------------------------------------------------------------------------------- */
static struct json_object *greeting(void)
{
    struct json_object *doc = json_object_new_object(), *qmp = json_object_new_object(), *v = json_object_new_object();

    /* "qemu" is what QMP shells look for; "qpull" tells who it really is. */
    json_object_object_add(v, "qemu", control_version_to_json());
    json_object_object_add(v, "qpull", control_version_to_json());
    json_object_object_add(v, "package", json_object_new_string("qpull " QPULL_VERSION));
    json_object_object_add(qmp, "version", v);
    json_object_object_add(qmp, "capabilities", json_object_new_array());
    json_object_object_add(doc, "QMP", qmp);
    return doc;
}

static int on_connection(void *arg, uv_stream_t *listener)
{
    struct control *c = arg;
    struct control_client *client = calloc(1, sizeof *client);
    uv_os_fd_t fd;

    if (!client)
        return -ENOMEM;
    if (uv_pipe_init(listener->loop, &client->pipe, /* ipc= */ 0) < 0) {
        free(client);
        return -ENOMEM;
    }
    client->pipe.data = client;
    client->control = c;
    client->id = ++c->next_id;
    client->born_ms = uv_now(listener->loop);
    client->next = c->clients;
    if (c->clients)
        c->clients->prev = client;
    c->clients = client;
    if (c->nclients++ == 0)
        (void)uv_timer_start(&c->tick, on_tick, CONN_TICK_MS, CONN_TICK_MS);
    qmp_stream_init(&client->stream, CONTROL_DOCUMENT_MAX);
    if (uv_accept(listener, (uv_stream_t *)&client->pipe) < 0 || uv_fileno((uv_handle_t *)&client->pipe, &fd) < 0 ||
        access_peer(fd, &client->who) < 0) {
        control_client_close(client);
        return 0;
    }
    if (!control_check_connect(client) || !control_check_place(client))
        return 0;
    send_document(client, greeting());
    update_reading(client);
    return 0;
}

int control_open(struct server *server, const char *path, struct control **ret_control, struct failure *f)
{
    struct control *c = calloc(1, sizeof *c);
    int r;

    if (!c)
        return failure_set(f, -ENOMEM, "out of memory");
    c->server = server;
    r = listen_open_unix(server_loop(server), path, server_socket_file(server), on_connection, c, &c->listener, f);
    if (r < 0) {
        free(c);
        return r;
    }
    (void)uv_timer_init(server_loop(server), &c->tick);
    c->tick.data = c;
    *ret_control = c;
    return 0;
}

static void on_tick_closed(uv_handle_t *handle)
{
    struct control *c = handle->data;
    void (*cb)(void *arg) = c->on_closed;
    void *arg = c->arg;

    free(c);
    cb(arg);
}

static void try_finish(struct control *c)
{
    if (c->closing && c->nclients == 0)
        uv_close((uv_handle_t *)&c->tick, on_tick_closed);
}

void control_close(struct control *c, void (*cb)(void *arg), void *arg)
{
    c->closing = true;
    c->on_closed = cb;
    c->arg = arg;
    listen_close(TAKE_PTR(c->listener));
    for (struct control_client *client = c->clients; client; client = client->next)
        control_client_close(client);
    try_finish(c);
}

int control_set_mode(struct control *c, mode_t mode, struct failure *f)
{
    return listen_set_mode(c->listener, mode, f);
}
