/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/fake_agent.h"

#include "lib/test.h"
#include "qmp/stream.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DELIMITER 0xff
#define FLOOD_PIECE 65536
#define FLOOD_PIECES 64
#define WAITING_MAX 64

static const char *const names[] = {
    [FAKE_SYNC] = "guest-sync-delimited",
    [FAKE_FREEZE] = "guest-fsfreeze-freeze",
    [FAKE_THAW] = "guest-fsfreeze-thaw",
    [FAKE_STATUS] = "guest-fsfreeze-status",
};

struct peer {
    uv_pipe_t pipe;
    struct fake_agent_side *side;
    char input[4096];
};

/* What outlives the struct that tests look at: handles close later. */
struct fake_agent_side {
    uv_pipe_t listener;
    struct fake_agent *agent; /* NULL: freed */
    struct peer *peer;        /* owned, NULL: none */
    bool waits;               /* a client whom nobody has accepted */
    struct qmp_stream stream;
    bool asleep;
    struct {
        enum fake_agent_command command;
        int64_t id;
    } waiting[WAITING_MAX];
    unsigned nwaiting, nhandles;
};

static void accept_next(struct fake_agent_side *s);

static void put(struct fake_agent_side *s)
{
    if (--s->nhandles == 0) {
        qmp_stream_done(&s->stream);
        free(s);
    }
}

static void on_peer_closed(uv_handle_t *h)
{
    struct peer *p = container_of((uv_pipe_t *)h, struct peer, pipe);
    struct fake_agent_side *s = p->side;

    free(p);
    put(s);
}

static void drop_peer(struct fake_agent_side *s)
{
    struct peer *p = TAKE_PTR(s->peer);

    if (p)
        uv_close((uv_handle_t *)&p->pipe, on_peer_closed);
}

void fake_agent_hang_up(struct fake_agent *a)
{
    drop_peer(a->side);
    accept_next(a->side);
}

bool fake_agent_has_client(const struct fake_agent *a)
{
    return a->side->peer;
}

struct sent {
    uv_write_t write;
    char bytes[];
};

static void on_sent(uv_write_t *w, int status)
{
    free(container_of(w, struct sent, write));
}

void fake_agent_send(struct fake_agent *a, const char *bytes, size_t len)
{
    struct sent *sent = malloc(sizeof(*sent) + len);
    uv_buf_t buf;

    assert_non_null(sent);
    memcpy(sent->bytes, bytes, len);
    buf = uv_buf_init(sent->bytes, (unsigned)len);
    if (!a->side->peer || uv_write(&sent->write, (uv_stream_t *)&a->side->peer->pipe, &buf, 1, on_sent) < 0)
        free(sent);
}

static void say(struct fake_agent *a, const char *text)
{
    fake_agent_send(a, text, strlen(text));
}

static void flood(struct fake_agent *a)
{
    char *piece = malloc(FLOOD_PIECE);

    assert_non_null(piece);
    memset(piece, 'x', FLOOD_PIECE);
    say(a, "{\"return\": \"");
    for (unsigned i = 0; i < FLOOD_PIECES; i++)
        fake_agent_send(a, piece, FLOOD_PIECE);
    free(piece);
}

static void answer_well(struct fake_agent *a, enum fake_agent_command command, int64_t id, int count)
{
    char text[128];

    switch (command) {
    case FAKE_SYNC:
        (void)snprintf(text, sizeof(text), "%c{\"return\": %lld}\n", DELIMITER, (long long)id);
        break;
    case FAKE_STATUS:
        (void)snprintf(text, sizeof(text), "{\"return\": \"%s\"}\n", a->nfrozen ? "frozen" : "thawed");
        break;
    default:
        (void)snprintf(text, sizeof(text), "{\"return\": %d}\n", count);
    }
    say(a, text);
}

static void obey(struct fake_agent *a, enum fake_agent_command command, int64_t id)
{
    enum fake_agent_fault fault = a->faults[command];
    int count = 0;

    if (fault == FAKE_LATE || a->side->asleep) {
        a->side->asleep = true;
        assert_true(a->side->nwaiting < WAITING_MAX);
        a->side->waiting[a->side->nwaiting].command = command;
        a->side->waiting[a->side->nwaiting++].id = id;
        return;
    }
    if (fault != FAKE_REFUSES && fault != FAKE_DEAF && fault != FAKE_FLOODS) {
        count = command == FAKE_FREEZE ? a->nfilesystems : a->nfrozen;
        if (command == FAKE_FREEZE)
            a->nfrozen = a->nfilesystems;
        if (command == FAKE_THAW)
            a->nfrozen = 0;
    }
    switch (fault) {
    case FAKE_REFUSES:
        say(a, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\\nthank \\u001byou\"}}\n");
        break;
    case FAKE_LIES:
        say(a, "{\"return\": {\"you\": [\"would\", \"like\", \"to\", \"know\"]}}\n");
        break;
    case FAKE_RUBBISH:
        say(a, "{\"return\": ]\n");
        break;
    case FAKE_FLOODS:
        flood(a);
        break;
    case FAKE_HANGS_UP:
        fake_agent_hang_up(a);
        break;
    case FAKE_GOOD:
        answer_well(a, command, id, count);
        break;
    default:
        break;
    }
}

void fake_agent_wake(struct fake_agent *a)
{
    struct fake_agent_side *s = a->side;
    unsigned n = s->nwaiting;

    s->asleep = false;
    s->nwaiting = 0;
    for (unsigned i = 0; i < n; i++) {
        if (a->faults[s->waiting[i].command] == FAKE_LATE)
            a->faults[s->waiting[i].command] = FAKE_GOOD;
        obey(a, s->waiting[i].command, s->waiting[i].id);
    }
}

static int on_command(void *arg, struct json_object *doc)
{
    struct fake_agent_side *s = arg;
    struct json_object *name = NULL, *args = NULL, *id = NULL;

    assert_true(json_object_object_get_ex(doc, "execute", &name));
    if (json_object_object_get_ex(doc, "arguments", &args))
        (void)json_object_object_get_ex(args, "id", &id);
    for (unsigned i = 0; i < FAKE_NCOMMANDS; i++) {
        if (strcmp(names[i], json_object_get_string(name)) != 0)
            continue;
        s->agent->nheard[i]++;
        obey(s->agent, (enum fake_agent_command)i, json_object_get_int64(id));
    }
    return 0;
}

static void on_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *buf)
{
    struct peer *p = container_of((uv_pipe_t *)h, struct peer, pipe);

    *buf = uv_buf_init(p->input, sizeof(p->input));
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct peer *p = container_of((uv_pipe_t *)stream, struct peer, pipe);
    struct fake_agent_side *s = p->side;
    const char *at = buf->base, *end;

    if (p != s->peer || n == 0)
        return;
    if (n < 0) {
        drop_peer(s);
        accept_next(s);
        return;
    }
    end = at + n;
    while (at < end) {
        const char *delimiter = memchr(at, DELIMITER, (size_t)(end - at));
        const char *stop = delimiter ? delimiter : end;

        assert_int_equal(qmp_stream_feed(&s->stream, at, (size_t)(stop - at), on_command, s, NULL), 0);
        if (delimiter)
            qmp_stream_reset(&s->stream);
        at = stop + (delimiter ? 1 : 0);
    }
}

static void accept_next(struct fake_agent_side *s)
{
    struct peer *p;

    if (s->peer || !s->waits || !s->agent)
        return;
    s->waits = false;
    p = calloc(1, sizeof(*p));
    assert_non_null(p);
    p->side = s;
    (void)uv_pipe_init(s->listener.loop, &p->pipe, 0);
    s->nhandles++;
    s->peer = p;
    assert_int_equal(uv_accept((uv_stream_t *)&s->listener, (uv_stream_t *)&p->pipe), 0);
    s->agent->nclients++;
    assert_int_equal(uv_read_start((uv_stream_t *)&p->pipe, on_alloc, on_read), 0);
}

static void on_client(uv_stream_t *listener, int status)
{
    struct fake_agent_side *s = container_of((uv_pipe_t *)listener, struct fake_agent_side, listener);

    s->waits = true;
    accept_next(s);
}

struct fake_agent *fake_agent_new(uv_loop_t *loop)
{
    struct fake_agent *a = calloc(1, sizeof(*a));
    struct fake_agent_side *s = calloc(1, sizeof(*s));
    char folder[] = "/tmp/qpull-agent-XXXXXX";

    assert_non_null(a);
    assert_non_null(s);
    assert_non_null(mkdtemp(folder));
    (void)signal(SIGPIPE, SIG_IGN); /* as the daemon and its watchdog do */
    (void)snprintf(a->path, sizeof(a->path), "%s/qga.sock", folder);
    a->nfilesystems = 2;
    a->side = s;
    s->agent = a;
    qmp_stream_init(&s->stream, 0);
    (void)uv_pipe_init(loop, &s->listener, 0);
    s->nhandles = 2; /* the listener, and the test itself */
    assert_int_equal(uv_pipe_bind(&s->listener, a->path), 0);
    assert_int_equal(uv_listen((uv_stream_t *)&s->listener, 8, on_client), 0);
    return a;
}

static void on_listener_closed(uv_handle_t *h)
{
    put(container_of((uv_pipe_t *)h, struct fake_agent_side, listener));
}

void fake_agent_stop(struct fake_agent *a)
{
    if (uv_is_closing((uv_handle_t *)&a->side->listener))
        return;
    drop_peer(a->side);
    a->side->waits = false;
    uv_close((uv_handle_t *)&a->side->listener, on_listener_closed);
    (void)unlink(a->path);
}

void fake_agent_free(struct fake_agent *a)
{
    char *slash;

    if (!a)
        return;
    if (!uv_is_closing((uv_handle_t *)&a->side->listener))
        fake_agent_stop(a);
    a->side->agent = NULL;
    put(a->side);
    slash = strrchr(a->path, '/');
    *slash = '\0';
    (void)rmdir(a->path);
    free(a);
}
