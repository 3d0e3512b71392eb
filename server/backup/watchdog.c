/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/watchdog.h"

#include "backup/thaw.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#define PIPE_FD 0
#define AGENT_FD 3
#define FIRST_OTHER_FD (AGENT_FD + 1)

#define SAYS_READY 'R'
#define SAYS_FREEZE 'F'

enum exit_status { EXIT_THAWED, EXIT_GAVE_UP, EXIT_BROKEN };

/* -- our side ------------------------------------------------------------------------------------------------------ */

struct watchdog {
    uv_process_t process;
    uv_pipe_t pipe;
    const struct watchdog_ops *ops;
    void *arg;
    unsigned nhandles;
    bool thawed, silent;
    char input[8];
};

static void on_handle_closed(struct watchdog *w)
{
    if (--w->nhandles)
        return;
    if (!w->silent)
        w->ops->on_exit(w->arg, w, w->thawed);
    free(w);
}

static void on_process_closed(uv_handle_t *h)
{
    on_handle_closed(container_of((uv_process_t *)h, struct watchdog, process));
}

static void on_pipe_closed(uv_handle_t *h)
{
    on_handle_closed(container_of((uv_pipe_t *)h, struct watchdog, pipe));
}

static void close_pipe(struct watchdog *w)
{
    if (!uv_is_closing((uv_handle_t *)&w->pipe))
        uv_close((uv_handle_t *)&w->pipe, on_pipe_closed);
}

static void close_process(struct watchdog *w)
{
    if (!uv_is_closing((uv_handle_t *)&w->process))
        uv_close((uv_handle_t *)&w->process, on_process_closed);
}

static void on_process_exit(uv_process_t *p, int64_t status, int signal)
{
    struct watchdog *w = container_of(p, struct watchdog, process);

    w->thawed = status == EXIT_THAWED && signal == 0;
    close_pipe(w);
    close_process(w);
}

static void on_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *buf)
{
    struct watchdog *w = container_of((uv_pipe_t *)h, struct watchdog, pipe);

    *buf = uv_buf_init(w->input, sizeof(w->input));
}

static void on_word(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct watchdog *w = container_of((uv_pipe_t *)stream, struct watchdog, pipe);

    if (n == 0)
        return;
    (void)uv_read_stop(stream); /* its end is told by its exit */
    if (n > 0 && buf->base[0] == SAYS_READY && !w->silent)
        w->ops->on_ready(w->arg);
}

int watchdog_start(const struct watchdog_config *config, const struct watchdog_ops *ops, void *arg,
                   struct watchdog **ret_watchdog)
{
    struct watchdog *w = calloc(1, sizeof(*w));
    char freeze[16], thaw[16];
    const char *args[] = {config->program, WATCHDOG_WORD, config->path, freeze, thaw, NULL};
    uv_stdio_container_t stdio[] = {
        [PIPE_FD] = {.flags = UV_CREATE_PIPE | UV_READABLE_PIPE | UV_WRITABLE_PIPE},
        [STDOUT_FILENO] = {.flags = UV_IGNORE},
        [STDERR_FILENO] = {.flags = UV_INHERIT_FD, .data.fd = STDERR_FILENO},
        [AGENT_FD] = {.flags = UV_INHERIT_FD, .data.fd = config->agent_fd},
    };
    uv_process_options_t options = {
        .exit_cb = on_process_exit,
        .file = config->program,
        .args = (char **)args, /* libuv does not change them */
        .flags = UV_PROCESS_DETACHED,
        .stdio_count = ARRAY_SIZE(stdio),
        .stdio = stdio,
    };
    int r;

    if (!w)
        return -ENOMEM;
    w->ops = ops;
    w->arg = arg;
    w->nhandles = 2;
    (void)snprintf(freeze, sizeof(freeze), "%u", config->freeze_ms);
    (void)snprintf(thaw, sizeof(thaw), "%u", config->thaw_ms);
    (void)uv_pipe_init(config->loop, &w->pipe, /* ipc= */ 0);
    stdio[PIPE_FD].data.stream = (uv_stream_t *)&w->pipe;
    r = uv_spawn(config->loop, &w->process, &options);
    if (r == 0)
        r = uv_read_start((uv_stream_t *)&w->pipe, on_alloc, on_word);
    if (r < 0) {
        watchdog_abandon(w);
        return r;
    }
    *ret_watchdog = w;
    return 0;
}

/* The only byte that we ever write to this pipe: it fits. */
int watchdog_arm(struct watchdog *w)
{
    char word = SAYS_FREEZE;
    uv_buf_t buf = uv_buf_init(&word, 1);
    int r = uv_is_closing((uv_handle_t *)&w->pipe) ? -EPIPE : uv_try_write((uv_stream_t *)&w->pipe, &buf, 1);

    return r < 0 ? r : r == 1 ? 0 : -EPIPE;
}

void watchdog_dismiss(struct watchdog *w)
{
    w->silent = true;
    (void)uv_process_kill(&w->process, SIGKILL); /* it may be gone, and then it is */
}

void watchdog_hand_over(struct watchdog *w)
{
    close_pipe(w);
}

void watchdog_abandon(struct watchdog *w)
{
    w->silent = true;
    close_pipe(w);
    close_process(w);
}

/* -- its side ------------------------------------------------------------------------------------------------------ */

struct dog {
    uv_loop_t loop;
    uv_pipe_t pipe;
    uv_timer_t deadline;
    const char *path;
    unsigned freeze_ms, thaw_ms;
    bool armed, thawing;
    enum exit_status status;
    char input[8];
};

bool watchdog_is_one(int argc, char *const *argv)
{
    return argc == 5 && strcmp(argv[1], WATCHDOG_WORD) == 0;
}

static void dog_end(struct dog *d, enum exit_status status)
{
    d->status = status;
    if (!uv_is_closing((uv_handle_t *)&d->pipe))
        uv_close((uv_handle_t *)&d->pipe, NULL);
    if (!uv_is_closing((uv_handle_t *)&d->deadline))
        uv_close((uv_handle_t *)&d->deadline, NULL);
}

static void on_thawed(void *arg, const struct failure *f)
{
    struct dog *d = arg;

    (void)fprintf(stderr, "qpulld watchdog %d: guest agent '%s': %s%s\n", (int)getpid(), d->path,
                  f ? "the guest's file systems may still be frozen, and its tries are over: "
                    : "the guest's file systems are thawed",
                  f ? f->text : "");
    dog_end(d, f ? EXIT_GAVE_UP : EXIT_THAWED);
}

static void dog_thaw(struct dog *d, const char *why)
{
    struct thaw_config config = {.loop = &d->loop, .path = d->path, .fd = AGENT_FD, .total_ms = d->thaw_ms};
    struct thaw *thaw;
    int r;

    if (d->thawing)
        return;
    d->thawing = true;
    (void)fprintf(stderr, "qpulld watchdog %d: guest agent '%s': %s; thawing the guest's file systems\n", (int)getpid(),
                  d->path, why);
    (void)uv_timer_stop(&d->deadline);
    r = thaw_start(&config, on_thawed, d, &thaw);
    if (r < 0) {
        (void)fprintf(stderr, "qpulld watchdog %d: cannot thaw: %s\n", (int)getpid(), strerror(-r));
        dog_end(d, EXIT_BROKEN);
    }
}

static void on_freeze_deadline(uv_timer_t *t)
{
    dog_thaw(container_of(t, struct dog, deadline), "the daemon has not thawed in time");
}

static void dog_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *buf)
{
    struct dog *d = container_of((uv_pipe_t *)h, struct dog, pipe);

    *buf = uv_buf_init(d->input, sizeof(d->input));
}

static void dog_hears(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct dog *d = container_of((uv_pipe_t *)stream, struct dog, pipe);

    for (ssize_t i = 0; i < n; i++) {
        if (buf->base[i] == SAYS_FREEZE) {
            d->armed = true;
            (void)uv_timer_start(&d->deadline, on_freeze_deadline, d->freeze_ms, 0);
        }
    }
    if (n >= 0)
        return;
    (void)uv_read_stop(stream);
    if (d->armed)
        dog_thaw(d, "the daemon is gone, or cannot thaw");
    else
        dog_end(d, EXIT_THAWED); /* nothing was frozen */
}

int watchdog_main(int argc, char *const *argv)
{
    struct dog d = {.path = argv[2], .status = EXIT_BROKEN};
    char ready = SAYS_READY;

    d.freeze_ms = (unsigned)strtoul(argv[3], NULL, 10);
    d.thaw_ms = (unsigned)strtoul(argv[4], NULL, 10);
    /* What sd_notify or socket activation may have left open is not ours. */
    (void)close_range(FIRST_OTHER_FD, ~0u, 0);
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGTERM, SIG_IGN); /* it ends by itself, when nothing is frozen */
    (void)signal(SIGHUP, SIG_IGN);
    (void)signal(SIGINT, SIG_IGN);
    if (uv_loop_init(&d.loop) < 0)
        return EXIT_BROKEN;
    (void)uv_timer_init(&d.loop, &d.deadline);
    (void)uv_pipe_init(&d.loop, &d.pipe, /* ipc= */ 0);
    if (uv_pipe_open(&d.pipe, PIPE_FD) < 0 || uv_read_start((uv_stream_t *)&d.pipe, dog_alloc, dog_hears) < 0 ||
        write(PIPE_FD, &ready, 1) != 1)
        dog_end(&d, EXIT_BROKEN);
    (void)uv_run(&d.loop, UV_RUN_DEFAULT);
    (void)uv_loop_close(&d.loop);
    return d.status;
}
