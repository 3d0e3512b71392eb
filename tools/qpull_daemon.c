/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpull_daemon: qpulld's control socket, one question at a time: the loop runs while an answer is awaited. */
#include "qmp/client.h"
#include "qpull.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>

/* The daemon asks QEMU for some answers, and gives up on it after 30 s a command. */
#define ANSWER_TIMEOUT_MS 120000

struct daemon {
    uv_loop_t loop;
    uv_timer_t timer;
    struct qmp_client *client; /* owned */
    bool closed;
    bool time_is_up;
    uv_signal_t signals[2]; /* of SIGINT and SIGTERM, once they are caught */
    bool catching, interrupted;
    struct failure lost; /* the connection, or the attempt */
    /* the question */
    bool answered;
    struct json_object *answer; /* owned */
    struct failure failure;
};

static void on_ready(void *arg, struct json_object *greeting)
{
}

static void on_lost(void *arg, const struct failure *why)
{
    struct daemon *d = arg;

    (void)failure_copy(&d->lost, why);
}

static const struct qmp_client_ops ops = {.on_ready = on_ready, .on_lost = on_lost};

static enum exit_status cannot_reach(const struct daemon *d, const char *path)
{
    switch (d->lost.err) {
    case -ENOENT:
    case -ECONNREFUSED:
        return complain("cannot reach qpulld at %s: is it running? (%s)", path, strerror(-d->lost.err));
    case -EACCES:
    case -EPERM:
        return complain("cannot reach qpulld at %s: root and qpulld's own user may", path);
    default:
        return complain("cannot reach qpulld at %s: %s", path, d->lost.text);
    }
}

enum exit_status daemon_open(const char *path, struct daemon **ret_daemon)
{
    struct daemon *d = calloc(1, sizeof *d);
    enum exit_status status;
    int r;

    if (!d)
        return complain("out of memory");
    r = uv_loop_init(&d->loop);
    if (r < 0) {
        free(d);
        return complain("cannot begin: %s", uv_strerror(r));
    }
    (void)uv_timer_init(&d->loop, &d->timer);
    d->timer.data = d;
    r = qmp_client_new(&d->loop, path, &ops, d, /* limits= */ NULL, &d->client);
    if (r == 0)
        r = qmp_client_open(d->client);
    if (r < 0)
        (void)failure_set(&d->lost, r, "%s", strerror(-r));
    while (!d->lost.err && !qmp_client_is_ready(d->client))
        (void)uv_run(&d->loop, UV_RUN_ONCE);
    if (d->lost.err) {
        status = cannot_reach(d, path);
        daemon_close(d);
        return status;
    }
    *ret_daemon = d;
    return EXIT_DONE;
}

static void on_closed(void *arg)
{
    struct daemon *d = arg;

    d->closed = true;
}

void daemon_close(struct daemon *d)
{
    if (!d)
        return;
    d->closed = !d->client;
    if (d->client)
        qmp_client_close(d->client, on_closed, d);
    uv_close((uv_handle_t *)&d->timer, NULL);
    for (size_t i = 0; d->catching && i < ARRAY_SIZE(d->signals); i++)
        uv_close((uv_handle_t *)&d->signals[i], NULL);
    (void)uv_run(&d->loop, UV_RUN_DEFAULT);
    (void)uv_loop_close(&d->loop);
    free(d);
}

static void on_answer(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    struct daemon *d = call->arg;

    d->answered = true;
    if (f)
        d->failure = *f;
    else
        d->answer = json_object_get(ret);
}

void put_text(struct json_object *o, const char *key, const char *text)
{
    if (text)
        (void)json_object_object_add(o, key, json_object_new_string(text));
}

enum exit_status daemon_ask(struct daemon *d, struct json_object **ret, const char *command, ...)
{
    struct json_object *args = json_object_new_object();
    const char *key, *value;
    va_list ap;

    va_start(ap, command);
    while ((key = va_arg(ap, const char *))) {
        value = va_arg(ap, const char *);
        put_text(args, key, value);
    }
    va_end(ap);
    return daemon_call(d, ret, command, args);
}

enum exit_status daemon_call(struct daemon *d, struct json_object **ret, const char *command, struct json_object *args)
{
    struct qmp_call call = {0};
    int r;

    d->answered = false;
    d->failure = (struct failure){0};
    r = qmp_call_start(d->client, &call, command, args, QMP_NO_FD, ANSWER_TIMEOUT_MS, on_answer, d);
    if (r < 0)
        return complain("qpulld is gone: %s", d->lost.err ? d->lost.text : strerror(-r));
    while (!d->answered)
        (void)uv_run(&d->loop, UV_RUN_ONCE);
    if (d->failure.err)
        return complain("%s", d->failure.text);
    *ret = TAKE_PTR(d->answer);
    return EXIT_DONE;
}

static void on_signal(uv_signal_t *signal, int number)
{
    struct daemon *d = signal->data;

    d->interrupted = true;
}

void daemon_catch_signals(struct daemon *d)
{
    static const int numbers[] = {SIGINT, SIGTERM};

    d->catching = true;
    for (size_t i = 0; i < ARRAY_SIZE(numbers); i++) {
        (void)uv_signal_init(&d->loop, &d->signals[i]);
        d->signals[i].data = d;
        (void)uv_signal_start(&d->signals[i], on_signal, numbers[i]);
    }
}

void daemon_release_signals(struct daemon *d)
{
    for (size_t i = 0; d->catching && i < ARRAY_SIZE(d->signals); i++)
        (void)uv_signal_stop(&d->signals[i]);
}

bool daemon_was_interrupted(const struct daemon *d)
{
    return d->interrupted;
}

static void on_time(uv_timer_t *timer)
{
    struct daemon *d = timer->data;

    d->time_is_up = true;
}

enum exit_status daemon_wait(struct daemon *d, unsigned ms)
{
    bool was_interrupted = d->interrupted;

    d->time_is_up = false;
    (void)uv_timer_start(&d->timer, on_time, ms, 0);
    while (!d->time_is_up && !d->lost.err && d->interrupted == was_interrupted)
        (void)uv_run(&d->loop, UV_RUN_ONCE);
    return d->lost.err ? complain("qpulld is gone: %s", d->lost.text) : EXIT_DONE;
}
