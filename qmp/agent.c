/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/agent.h"

#include "qmp/agent_reader.h"

#include <errno.h>
#include <stdio.h>
#include <sys/random.h>
#include <sys/un.h>
#include <time.h>

#define READ_SIZE 4096u
#define LINE_MAX_BYTES 192u /* a sync and a command; both are ours */
#define WORDS_MAX 200u      /* of an agent's sentence that is told */

/* One connection, or an attempt at one. A dropped one lives on until its close callback. */
struct link {
    uv_pipe_t pipe;
    uv_connect_t connect;
    struct agent *agent; /* outlives it */
    bool connected;
    char input[READ_SIZE];
};

struct line {
    uv_write_t write;
    char bytes[LINE_MAX_BYTES];
};

struct agent {
    uv_loop_t *loop;   /* borrowed */
    char *path;        /* owned */
    struct link *link; /* owned, NULL: none */
    unsigned nlinks;   /* open or closing */
    uv_timer_t deadline;
    struct agent_reader reader;
    int64_t last_sync;
    /* the call under way; cb NULL: none */
    const char *command; /* borrowed: a literal */
    enum agent_order order;
    unsigned timeout_ms;
    bool synced;
    struct failure broken; /* it could not be sent; told by the deadline */
    agent_cb cb;
    void *arg;
    bool closing, timer_closed;
    void (*on_closed)(void *arg);
    void *close_arg;
};

/* -- answers ------------------------------------------------------------------------------------------------------- */

static void answer(struct agent *a, struct json_object *ret, const struct failure *f)
{
    agent_cb cb = TAKE_PTR(a->cb);

    (void)uv_timer_stop(&a->deadline);
    if (cb)
        cb(a->arg, ret, f);
}

void agent_forget(struct agent *a)
{
    (void)uv_timer_stop(&a->deadline);
    a->cb = NULL;
    a->reader.state = AGENT_IDLE;
}

/* A guest's words go into our log and to clients: printable ASCII, and not many. */
static void fit_to_print(char *out, size_t size, const char *words)
{
    size_t n = 0;

    for (; words[n] && n + 1 < size; n++)
        out[n] = (char)(words[n] >= 0x20 && words[n] < 0x7f ? words[n] : '?');
    out[n] = '\0';
}

static void failure_of_error(struct failure *f, const char *command, struct json_object *error)
{
    struct json_object *class = NULL, *desc = NULL;
    char words[WORDS_MAX] = "no description";
    bool unknown;

    (void)json_object_object_get_ex(error, "class", &class);
    (void)json_object_object_get_ex(error, "desc", &desc);
    unknown =
        json_object_is_type(class, json_type_string) && strcmp(json_object_get_string(class), "CommandNotFound") == 0;
    if (json_object_is_type(desc, json_type_string))
        fit_to_print(words, sizeof(words), json_object_get_string(desc));
    (void)failure_set(f, unknown ? -ENOSYS : -EREMOTEIO, "the guest agent refused '%s': %s", command, words);
}

static void send_line(struct agent *a, bool sync, bool command);

static void on_heard(void *arg, struct json_object *doc)
{
    struct agent *a = arg;
    struct json_object *v = NULL;
    struct failure f = {0};

    if (!doc) {
        a->synced = true;
        if (!a->command) {
            a->reader.state = AGENT_IDLE;
            answer(a, NULL, NULL);
        } else if (a->order == AGENT_AFTER_SYNC) {
            send_line(a, false, true);
        }
        return;
    }
    if (json_object_object_get_ex(doc, "return", &v)) {
        answer(a, v, NULL);
        return;
    }
    (void)json_object_object_get_ex(doc, "error", &v);
    failure_of_error(&f, a->command, v);
    answer(a, NULL, &f);
}

static void on_deadline(uv_timer_t *t)
{
    struct agent *a = container_of(t, struct agent, deadline);
    struct failure f = a->broken;

    a->reader.state = AGENT_IDLE;
    if (a->synced)
        (void)failure_set(&f, -ETIMEDOUT, "the guest agent did not answer '%s' within %u ms", a->command,
                          a->timeout_ms);
    else
        (void)failure_set(&f, -ETIMEDOUT,
                          "the guest agent at '%s' does not answer: it does not run in the guest, hangs, or its socket "
                          "is in use by another program",
                          a->path);
    answer(a, NULL, &f);
}

/* -- the connection ------------------------------------------------------------------------------------------------ */

static void end_if_closed(struct agent *a)
{
    void (*cb)(void *) = a->on_closed;
    void *arg = a->close_arg;

    if (!a->closing || !a->timer_closed || a->nlinks)
        return;
    agent_reader_done(&a->reader);
    free(a->path);
    free(a);
    if (cb)
        cb(arg);
}

static void on_link_closed(uv_handle_t *h)
{
    struct link *l = container_of((uv_pipe_t *)h, struct link, pipe);
    struct agent *a = l->agent;

    free(l);
    a->nlinks--;
    end_if_closed(a);
}

void agent_hang_up(struct agent *a)
{
    struct link *l = TAKE_PTR(a->link);

    if (l)
        uv_close((uv_handle_t *)&l->pipe, on_link_closed);
}

/* From the loop: the connection is over, and the call with it. */
static void lose(struct agent *a, int err, const char *why)
{
    struct failure f = {0};

    agent_hang_up(a);
    a->reader.state = AGENT_IDLE;
    (void)failure_set(&f, err, "the guest agent's socket '%s': %s", a->path, why);
    answer(a, NULL, &f);
}

static void on_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *buf)
{
    struct link *l = container_of((uv_pipe_t *)h, struct link, pipe);

    *buf = uv_buf_init(l->input, sizeof(l->input));
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct link *l = container_of((uv_pipe_t *)stream, struct link, pipe);
    struct agent *a = l->agent;
    struct failure f = {0};

    if (l != a->link || n == 0)
        return;
    if (n < 0) {
        lose(a, -ECONNRESET, n == UV_EOF ? "QEMU closed the connection" : uv_strerror((int)n));
        return;
    }
    if (agent_reader_feed(&a->reader, buf->base, (size_t)n, &f) < 0)
        answer(a, NULL, &f);
}

static void on_written(uv_write_t *w, int status)
{
    free(container_of(w, struct line, write)); /* what could not be sent is told by reading */
}

/* The call ends from the loop. */
static void break_call(struct agent *a, int err)
{
    (void)failure_set(&a->broken, err, "cannot talk to the guest agent at '%s': %s", a->path, strerror(-err));
    (void)uv_timer_start(&a->deadline, on_deadline, 0, 0);
}

static void send_line(struct agent *a, bool sync, bool command)
{
    struct line *line = calloc(1, sizeof(*line));
    size_t n = 0;
    uv_buf_t buf;
    int r;

    if (!line) {
        break_call(a, -ENOMEM);
        return;
    }
    /* The delimiter makes the agent forget the torn command of a client before us. */
    if (sync)
        n += (size_t)snprintf(line->bytes, sizeof(line->bytes),
                              "%c{\"execute\": \"guest-sync-delimited\", \"arguments\": {\"id\": %lld}}\n",
                              AGENT_DELIMITER, (long long)a->last_sync);
    if (command)
        n += (size_t)snprintf(line->bytes + n, sizeof(line->bytes) - n, "{\"execute\": \"%s\"}\n", a->command);
    buf = uv_buf_init(line->bytes, (unsigned)n);
    r = uv_write(&line->write, (uv_stream_t *)&a->link->pipe, &buf, 1, on_written);
    if (r < 0) {
        free(line);
        break_call(a, r);
    }
}

static void begin(struct agent *a)
{
    agent_reader_begin(&a->reader, ++a->last_sync);
    send_line(a, true, a->command && a->order == AGENT_AT_ONCE);
}

static void on_connected(uv_connect_t *c, int status)
{
    struct link *l = container_of(c, struct link, connect);
    struct agent *a = l->agent;

    if (l != a->link)
        return;
    if (status == UV_ENOENT || status == UV_ECONNREFUSED) {
        lose(a, status, "nobody listens there; QEMU does not run, or has no such channel");
        return;
    }
    if (status == 0)
        status = uv_read_start((uv_stream_t *)&l->pipe, on_alloc, on_read);
    if (status < 0) {
        lose(a, status, uv_strerror(status));
        return;
    }
    l->connected = true;
    if (a->cb)
        begin(a);
}

static int link_new(struct agent *a)
{
    struct link *l = calloc(1, sizeof(*l));

    if (!l)
        return -ENOMEM;
    l->agent = a;
    (void)uv_pipe_init(a->loop, &l->pipe, /* ipc= */ 0);
    a->link = l;
    a->nlinks++;
    return 0;
}

int agent_fd(const struct agent *a)
{
    uv_os_fd_t fd = -1;

    return a->link && a->link->connected && uv_fileno((uv_handle_t *)&a->link->pipe, &fd) == 0 ? fd : -1;
}

/* -- life ---------------------------------------------------------------------------------------------------------- */

int agent_call(struct agent *a, const char *command, enum agent_order order, unsigned timeout_ms, agent_cb cb,
               void *arg)
{
    int r;

    if (a->cb)
        return -EBUSY;
    if (!a->link) {
        r = link_new(a);
        if (r < 0)
            return r;
        uv_pipe_connect(&a->link->connect, &a->link->pipe, a->path, on_connected);
    }
    a->command = command;
    a->order = order;
    a->timeout_ms = timeout_ms;
    a->synced = false;
    memset(&a->broken, 0, sizeof(a->broken));
    a->cb = cb;
    a->arg = arg;
    (void)uv_timer_start(&a->deadline, on_deadline, timeout_ms, 0);
    if (a->link->connected)
        begin(a);
    return 0;
}

int agent_new(uv_loop_t *loop, const char *path, int fd, struct agent **ret_agent)
{
    struct agent *a;
    uint32_t random = 0;
    int r = 0;

    if (strlen(path) >= sizeof(((struct sockaddr_un *)NULL)->sun_path))
        return -ENAMETOOLONG;
    a = calloc(1, sizeof(*a));
    if (!a)
        return -ENOMEM;
    a->loop = loop;
    a->path = strdup(path);
    if (!a->path) {
        free(a);
        return -ENOMEM;
    }
    agent_reader_init(&a->reader, on_heard, a);
    /* Numbers of ours are not those of the client before us. */
    if (getrandom(&random, sizeof(random), GRND_NONBLOCK) != sizeof(random))
        random = (uint32_t)uv_hrtime();
    a->last_sync = random >> 2;
    (void)uv_timer_init(loop, &a->deadline);
    if (fd >= 0 && (r = link_new(a)) == 0) {
        r = uv_pipe_open(&a->link->pipe, fd);
        if (r == 0) {
            a->link->connected = true;
            r = uv_read_start((uv_stream_t *)&a->link->pipe, on_alloc, on_read);
        }
    }
    if (r < 0) {
        agent_close(a, NULL, NULL);
        return r;
    }
    *ret_agent = a;
    return 0;
}

static void on_timer_closed(uv_handle_t *h)
{
    struct agent *a = container_of((uv_timer_t *)h, struct agent, deadline);

    a->timer_closed = true;
    end_if_closed(a);
}

void agent_close(struct agent *a, void (*cb)(void *arg), void *arg)
{
    agent_forget(a);
    agent_hang_up(a);
    a->closing = true;
    a->on_closed = cb;
    a->close_arg = arg;
    uv_close((uv_handle_t *)&a->deadline, on_timer_closed);
}
