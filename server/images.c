/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "images.h"

#include "backup/private_socket.h"
#include "child.h"
#include "images_look.h"
#include "qmp/commands.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum images_state {
    IMAGES_CLOSED,   /* no process, no socket -> LOOKING */
    IMAGES_LOOKING,  /* a thread looks at the files -> STARTING, LOST, CLOSING */
    IMAGES_STARTING, /* the process runs, its monitor does not speak yet -> OPENING, LOST, CLOSING */
    IMAGES_OPENING,  /* one image after the other is opened -> OPEN, LOST, CLOSING */
    IMAGES_OPEN,     /* -> LOST, CLOSING */
    IMAGES_LOST,     /* on_lost was said, the owner lets go -> CLOSING */
    IMAGES_CLOSING,  /* the process ends -> CLOSED */
};

static const char *const state_names[] = {
    [IMAGES_CLOSED] = "closed",   [IMAGES_LOOKING] = "opening", [IMAGES_STARTING] = "opening",
    [IMAGES_OPENING] = "opening", [IMAGES_OPEN] = "open",       [IMAGES_LOST] = "lost",
    [IMAGES_CLOSING] = "closing",
};
static_assert(ARRAY_SIZE(state_names) == IMAGES_CLOSING + 1, "every state has a name");

struct images {
    uv_loop_t *loop;
    const struct images_ops *ops;
    void *arg;
    char *vm; /* owned */
    const struct config_image *images;
    size_t nimages;
    const char *program;
    int state_dir;
    char *qmp_path;                /* owned: the monitor's socket */
    char *qmp_socket, *nbd_socket; /* owned: names in state_dir */

    enum images_state state;
    uv_timer_t timer; /* OPEN: of the rest; LOST and CLOSING: of the process' end */

    /* what a thread finds */
    uv_work_t work;
    bool working;
    struct image_kind *kinds; /* owned: of nimages */
    char *program_path;       /* owned */
    struct failure found;
    bool locked; /* the thread looks for who holds images[next] */
    pid_t pid;

    /* the process */
    uv_process_t process;
    bool dying;                  /* it was told to end, although it was wanted */
    bool running;                /* its exit has not been heard of */
    uv_pipe_t words;             /* its stderr */
    bool speaking;               /* no end of file yet */
    char line[IMAGES_WORDS_MAX]; /* of its stderr, unfinished */
    size_t line_len;
    char last_line[256];
    unsigned ngreetings;    /* that were waited for in vain */
    struct qmp_client *qmp; /* owned */
    char version[64];
    struct qmp_call call;
    size_t next;       /* image being opened */
    unsigned nclosing; /* handles */
    char exit_text[96];
    void (*on_freed)(void *arg);
    void *freed_arg;
};

/* -- life ---------------------------------------------------------------------------------------------------------- */

static void destroy(struct images *im)
{
    free(im->vm);
    free(im->qmp_path);
    free(im->qmp_socket);
    free(im->nbd_socket);
    free(im->kinds);
    free(im);
}

int images_new(const struct images_config *c, const struct images_ops *ops, void *arg, struct images **ret_images)
{
    struct images *im = calloc(1, sizeof *im);

    if (!im)
        return -ENOMEM;
    im->loop = c->loop;
    im->ops = ops;
    im->arg = arg;
    im->images = c->images;
    im->nimages = c->nimages;
    im->program = c->program;
    im->state_dir = c->state_dir;
    im->vm = strdup(c->vm);
    im->kinds = calloc(c->nimages, sizeof *im->kinds);
    if (asprintf(&im->qmp_socket, "image-%s.qmp", c->vm) < 0)
        im->qmp_socket = NULL;
    if (asprintf(&im->nbd_socket, "image-%s.nbd", c->vm) < 0)
        im->nbd_socket = NULL;
    if (asprintf(&im->qmp_path, "%s/image-%s.qmp", c->state, c->vm) < 0)
        im->qmp_path = NULL;
    if (!im->vm || !im->kinds || !im->qmp_socket || !im->nbd_socket || !im->qmp_path) {
        destroy(im);
        return -ENOMEM;
    }
    (void)uv_timer_init(im->loop, &im->timer);
    *ret_images = im;
    return 0;
}

static void on_timer_closed(uv_handle_t *h)
{
    struct images *im = container_of((uv_timer_t *)h, struct images, timer);
    void (*cb)(void *) = im->on_freed;
    void *arg = im->freed_arg;

    destroy(im);
    cb(arg);
}

void images_free(struct images *im, void (*cb)(void *arg), void *arg)
{
    assert(im->state == IMAGES_CLOSED);
    im->on_freed = cb;
    im->freed_arg = arg;
    uv_close((uv_handle_t *)&im->timer, on_timer_closed);
}

bool images_is_closed(const struct images *im)
{
    return im->state == IMAGES_CLOSED;
}

static void set_state(struct images *im, enum images_state state)
{
    if (strcmp(state_names[im->state], state_names[state]) != 0)
        log_debug("VM %s: images: %s -> %s", im->vm, state_names[im->state], state_names[state]);
    (void)uv_timer_stop(&im->timer);
    im->state = state;
}

static void end_process(struct images *im);
static void finish(struct images *im);

static void fail(struct images *im, const struct failure *why)
{
    struct failure f = *why;

    if (im->state == IMAGES_CLOSING) {
        end_process(im);
        return;
    }
    if (im->state == IMAGES_LOST)
        return;
    set_state(im, IMAGES_LOST);
    im->ops->on_lost(im->arg, &f);
}

/* -- the process' end ---------------------------------------------------------------------------------------------- */

static void on_part_closed(void *arg)
{
    struct images *im = arg;

    if (--im->nclosing > 0)
        return;
    free(TAKE_PTR(im->program_path));
    set_state(im, IMAGES_CLOSED);
    im->ops->on_closed(im->arg);
}

static void on_process_closed(uv_handle_t *h)
{
    on_part_closed(container_of((uv_process_t *)h, struct images, process));
}

static void on_words_closed(uv_handle_t *h)
{
    on_part_closed(container_of((uv_pipe_t *)h, struct images, words));
}

static void on_end_timer_kick(uv_timer_t *t)
{
    on_part_closed(container_of(t, struct images, timer));
}

/* The process is gone, or never was: everything that was made for it goes, too. */
static void finish(struct images *im)
{
    if (im->nclosing)
        return;
    im->nclosing = 1;
    (void)unlinkat(im->state_dir, im->qmp_socket, 0);
    (void)unlinkat(im->state_dir, im->nbd_socket, 0);
    if (im->pid) {
        im->nclosing += 2;
        uv_close((uv_handle_t *)&im->process, on_process_closed);
        uv_close((uv_handle_t *)&im->words, on_words_closed);
        im->pid = 0;
    }
    if (im->qmp) {
        im->nclosing++;
        qmp_client_close(TAKE_PTR(im->qmp), on_part_closed, im);
    }
    (void)uv_timer_start(&im->timer, on_end_timer_kick, 0, 0); /* on_closed comes from the loop */
}

static void on_end_deadline(uv_timer_t *t)
{
    struct images *im = container_of(t, struct images, timer);

    log_warning("VM %s: qemu-storage-daemon (PID %d) has not ended within %u s; it is killed", im->vm, (int)im->pid,
                IMAGES_END_MS / 1000);
    (void)uv_process_kill(&im->process, SIGKILL);
}

static void on_quit(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    struct images *im = container_of(call, struct images, call);

    if (f && im->running)
        (void)uv_process_kill(&im->process, SIGTERM);
}

static void end_process(struct images *im)
{
    if (im->working)
        return; /* after_work() comes back here */
    if (!im->running && !im->speaking) {
        finish(im);
        return;
    }
    (void)uv_timer_start(&im->timer, on_end_deadline, IMAGES_END_MS, 0);
    if (!im->running)
        return;
    if (im->call.client) /* its answer is dropped: the process is told below */
        qmp_call_cancel(&im->call);
    if (im->call.client || !im->qmp || !qmp_client_is_ready(im->qmp) ||
        qmp_call_start(im->qmp, &im->call, "quit", NULL, QMP_NO_FD, IMAGES_END_MS, on_quit, NULL) < 0)
        (void)uv_process_kill(&im->process, SIGTERM);
}

void images_close(struct images *im)
{
    if (im->state == IMAGES_CLOSED || im->state == IMAGES_CLOSING)
        return;
    set_state(im, IMAGES_CLOSING);
    end_process(im);
}

/* Both its exit and the end of its words: the last of them often says why. */
static void try_gone(struct images *im)
{
    struct failure f = {0};

    if (im->running || im->speaking)
        return;
    if (im->state == IMAGES_CLOSING) {
        finish(im);
        return;
    }
    (void)failure_set(&f, -EPIPE, "the qemu-storage-daemon that holds the images of VM '%s' %s%s%s", im->vm,
                      im->exit_text, *im->last_line ? "; its last words: " : "", im->last_line);
    fail(im, &f);
}

static void on_exited(uv_process_t *p, int64_t status, int number)
{
    struct images *im = container_of(p, struct images, process);

    if (number)
        (void)snprintf(im->exit_text, sizeof im->exit_text, "was ended by signal %d (%s)", number, strsignal(number));
    else
        (void)snprintf(im->exit_text, sizeof im->exit_text, "ended with status %lld", (long long)status);
    im->running = false;
    try_gone(im);
}

/* -- its words ----------------------------------------------------------------------------------------------------- */

static void tell_line(struct images *im, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if ((unsigned char)im->line[i] < ' ' || im->line[i] == 0x7f)
            im->line[i] = '?'; /* a line of the log stays one line */
    }
    if (len == 0)
        return;
    log_warning("VM %s: qemu-storage-daemon says: %.*s", im->vm, (int)len, im->line);
    len = MIN(len, sizeof im->last_line - 1); /* for a sentence */
    memcpy(im->last_line, im->line, len);
    im->last_line[len] = 0;
}

static void on_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *buf)
{
    struct images *im = container_of((uv_pipe_t *)h, struct images, words);

    *buf = uv_buf_init(im->line + im->line_len, (unsigned)(sizeof im->line - im->line_len));
}

static void on_words(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct images *im = container_of((uv_pipe_t *)stream, struct images, words);
    char *end;

    if (n < 0) {
        tell_line(im, im->line_len);
        im->speaking = false;
        (void)uv_read_stop(stream);
        try_gone(im);
        return;
    }
    im->line_len += (size_t)n;
    while ((end = memchr(im->line, '\n', im->line_len))) {
        size_t len = (size_t)(end - im->line);

        tell_line(im, len);
        im->line_len -= len + 1;
        memmove(im->line, end + 1, im->line_len);
    }
    if (im->line_len == sizeof im->line) {
        tell_line(im, im->line_len);
        im->line_len = 0;
    }
}

/* -- opening ------------------------------------------------------------------------------------------------------- */

static void open_next(struct images *im);

static void start_work(struct images *im, uv_work_cb work, uv_after_work_cb after)
{
    im->working = true;
    (void)uv_queue_work(im->loop, &im->work, work, after); /* fails only without a callback */
}

/* In a thread. */
static void find_holder(uv_work_t *w)
{
    struct images *im = container_of(w, struct images, work);
    const struct config_image *image = &im->images[im->next];
    const pid_t ours[] = {getpid(), im->pid};
    struct failure why = im->found;
    char holder[128];

    im->found.err = 0;
    if (images_find_holder(image->path, ours, ARRAY_SIZE(ours), holder, sizeof holder))
        (void)failure_set(&im->found, -EBUSY,
                          "image '%s' of disk '%s' is in use by %s: while the VM runs, only its QEMU can be asked "
                          "(--vm %s=QMP_SOCKET); QEMU's words: %s",
                          image->path, image->disk, holder, im->vm, why.text);
    else
        (void)failure_set(&im->found, -EBUSY,
                          "image '%s' of disk '%s', or a file below it, is in use by another process, most likely the "
                          "VM's running QEMU (--vm %s=QMP_SOCKET) or a qemu-img; QEMU's words: %s",
                          image->path, image->disk, im->vm, why.text);
}

static void after_find_holder(uv_work_t *w, int status)
{
    struct images *im = container_of(w, struct images, work);

    im->working = false;
    fail(im, &im->found);
}

static void on_added(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    struct images *im = container_of(call, struct images, call);
    const struct config_image *image = &im->images[im->next];
    struct failure mine = {0};

    if (im->state != IMAGES_OPENING)
        return;
    if (!f) {
        im->next++;
        open_next(im);
        return;
    }
    if (f->err == -ECONNRESET)
        return; /* its exit says more */
    if (f->err == -EREMOTEIO && strstr(f->text, "lock")) {
        im->found = *f;
        start_work(im, find_holder, after_find_holder);
        return;
    }
    (void)failure_set(&mine, f->err, "cannot open image '%s' of disk '%s' as %s: %s", image->path, image->disk,
                      im->kinds[im->next].format, f->text);
    fail(im, &mine);
}

static void node_name(char name[32], size_t i)
{
    (void)snprintf(name, 32, "disk%zu", i);
}

static void open_next(struct images *im)
{
    const struct image_kind *kind = &im->kinds[im->next];
    struct failure f = {0};
    char node[32];
    int r;

    if (im->next == im->nimages) {
        set_state(im, IMAGES_OPEN);
        im->ops->on_open(im->arg, im->qmp, im->version);
        return;
    }
    node_name(node, im->next);
    r = qmp_call_start(im->qmp, &im->call, "blockdev-add",
                       qmp_args_blockdev_add_image(node, kind->format, kind->protocol, im->images[im->next].path),
                       QMP_NO_FD, VM_CALL_TIMEOUT_MS, on_added, NULL);
    if (r < 0) {
        (void)failure_set(&f, r, "the qemu-storage-daemon for the images of VM '%s' cannot be asked: %s", im->vm,
                          strerror(-r));
        fail(im, &f);
    }
}

static void on_ready(void *arg, struct json_object *greeting)
{
    struct images *im = arg;
    struct json_object *qemu = qmp_get(qmp_get(greeting, "version"), "qemu");

    if (im->state != IMAGES_STARTING)
        return;
    (void)snprintf(im->version, sizeof im->version, "%lld.%lld.%lld", (long long)qmp_get_int(qemu, "major"),
                   (long long)qmp_get_int(qemu, "minor"), (long long)qmp_get_int(qemu, "micro"));
    set_state(im, IMAGES_OPENING);
    im->next = 0;
    open_next(im);
}

/* A monitor that is lost is a daemon that is of no use: it ends, and its exit is what is told. */
static void on_lost(void *arg, const struct failure *why)
{
    struct images *im = arg;
    struct failure f = {0};

    if (!im->running || im->state == IMAGES_CLOSING || im->state == IMAGES_LOST)
        return;
    /* QEMU 7.2 on a busy machine lets the first command of a new process lie, once in some 5000 starts; whoever
     * connects again, as the client does by itself, is served at once. */
    if (im->state == IMAGES_STARTING && why->err == -ETIMEDOUT && ++im->ngreetings < IMAGES_GREETINGS)
        return;
    if (im->state == IMAGES_STARTING && why->err == -ETIMEDOUT) {
        (void)failure_set(&f, why->err, "the qemu-storage-daemon for the images of VM '%s' does not answer", im->vm);
        fail(im, &f);
        return;
    }
    if (im->dying)
        return;
    im->dying = true;
    (void)uv_process_kill(&im->process, SIGTERM);
    (void)uv_timer_start(&im->timer, on_end_deadline, IMAGES_END_MS, 0);
    im->ops->on_dying(im->arg);
}

static const struct qmp_client_ops client_ops = {.on_ready = on_ready, .on_lost = on_lost};

/*
 * Not blocking: while QEMU's monitor moves to a thread of its own, both threads may see one connection come, and the
 * one that is late would wait in accept() for ever, deaf to SIGTERM (7.2).
 */
static int make_listener(const struct images *im, const char *name, struct failure *f)
{
    int fd = private_socket_listen(im->state_dir, name, 128); /* all connections of many disks are made at once */

    return fd < 0 ? failure_set(f, fd, "cannot make the socket '%s' in the state directory: %s", name, strerror(-fd))
                  : fd;
}

#define QMP_FD 3
#define NBD_FD 4

/*
 * The images are opened over QMP, not by arguments: QEMU's refusals come as sentences.
 */
static int spawn(struct images *im, int qmp_fd, int nbd_fd)
{
    char parent[16];
    const char *args[] = {
        CHILD_SELF,     CHILD_WORD,
        parent,         im->program_path,
        "--chardev",    "socket,id=qmp,fd=3,server=on,wait=off",
        "--monitor",    "chardev=qmp",
        "--nbd-server", "addr.type=fd,addr.str=4",
        NULL,
    };
    uv_stdio_container_t stdio[] = {
        {.flags = UV_IGNORE},
        {.flags = UV_IGNORE},
        {.flags = UV_CREATE_PIPE | UV_WRITABLE_PIPE, .data.stream = (uv_stream_t *)&im->words},
        [QMP_FD] = {.flags = UV_INHERIT_FD, .data.fd = qmp_fd},
        [NBD_FD] = {.flags = UV_INHERIT_FD, .data.fd = nbd_fd},
    };
    uv_process_options_t options = {
        .exit_cb = on_exited,
        .file = CHILD_SELF,
        .args = (char **)args, /* libuv does not change them */
        /* A Ctrl-C at our terminal is for us: we end it in order. */
        .flags = UV_PROCESS_DETACHED,
        .stdio_count = ARRAY_SIZE(stdio),
        .stdio = stdio,
    };
    int r;

    (void)snprintf(parent, sizeof parent, "%d", (int)getpid());
    (void)uv_pipe_init(im->loop, &im->words, /* ipc= */ 0);
    r = uv_spawn(im->loop, &im->process, &options);
    im->pid = r == 0 ? im->process.pid : -1; /* either way both handles are to be closed */
    if (r < 0)
        return r;
    im->running = im->speaking = true;
    return uv_read_start((uv_stream_t *)&im->words, on_alloc, on_words);
}

static int start(struct images *im, struct failure *f)
{
    static const struct qmp_client_limits limits = {.greeting_timeout_ms = IMAGES_GREETING_MS};
    int qmp_fd = make_listener(im, im->qmp_socket, f), nbd_fd = qmp_fd < 0 ? -1 : make_listener(im, im->nbd_socket, f);
    int r = f->err;

    set_state(im, IMAGES_STARTING);
    im->ngreetings = 0;
    im->line_len = 0;
    im->last_line[0] = 0;
    im->dying = false;
    if (r == 0 && (r = spawn(im, qmp_fd, nbd_fd)) < 0)
        (void)failure_set(f, r, "cannot start '%s' for the images of VM '%s': %s", im->program_path, im->vm,
                          uv_strerror(r));
    if (qmp_fd >= 0)
        (void)close(qmp_fd);
    if (nbd_fd >= 0)
        (void)close(nbd_fd);
    /* The child has the listening socket already, so there is nothing to wait for before connecting. */
    if (r == 0)
        r = qmp_client_new(im->loop, im->qmp_path, &client_ops, im, &limits, &im->qmp);
    if (r == 0)
        r = qmp_client_open(im->qmp);
    return r < 0 ? failure_set(f, r, "cannot connect to qemu-storage-daemon: %s", strerror(-r)) : 0;
}

/* In a thread. */
static void look(uv_work_t *w)
{
    struct images *im = container_of(w, struct images, work);
    struct failure why = {0};

    memset(&im->found, 0, sizeof im->found);
    for (size_t i = 0; i < im->nimages; i++) {
        if (images_look(&im->images[i], &im->kinds[i], &im->found) < 0)
            return;
    }
    if (images_find_program(im->program, &im->program_path, &why) < 0)
        (void)failure_set(&im->found, why.err,
                          "%s; it serves the disks of VMs that are powered off (Debian: qemu-system-common, elsewhere "
                          "often qemu-storage-daemon; --storage-daemon tells where it is)",
                          why.text);
}

static void after_look(uv_work_t *w, int status)
{
    struct images *im = container_of(w, struct images, work);

    im->working = false;
    if (im->state == IMAGES_CLOSING) {
        end_process(im);
        return;
    }
    if (im->found.err || start(im, &im->found) < 0)
        fail(im, &im->found);
}

void images_open(struct images *im)
{
    if (im->state == IMAGES_OPEN && !im->dying)
        (void)uv_timer_stop(&im->timer);
    if (im->state != IMAGES_CLOSED)
        return;
    set_state(im, IMAGES_LOOKING);
    start_work(im, look, after_look);
}

static void on_rest(uv_timer_t *t)
{
    struct images *im = container_of(t, struct images, timer);

    im->ops->on_rested(im->arg);
}

void images_rest(struct images *im)
{
    if (im->state == IMAGES_OPEN && !uv_is_active((uv_handle_t *)&im->timer))
        (void)uv_timer_start(&im->timer, on_rest, IMAGES_REST_MS, 0);
}

/* -- questions ----------------------------------------------------------------------------------------------------- */

const char *images_nbd_socket(const struct images *im)
{
    return im->nbd_socket;
}

const char *images_path(const struct images *im, const char *disk)
{
    for (size_t i = 0; i < im->nimages; i++) {
        if (strcmp(im->images[i].disk, disk) == 0)
            return im->images[i].path;
    }
    return NULL;
}

const char *images_state_name(const struct images *im)
{
    return state_names[im->state];
}

struct json_object *images_query_block(const struct images *im)
{
    struct json_object *all = json_object_new_array();

    for (size_t i = 0; i < im->nimages; i++) {
        struct json_object *o = qmp_args_strings("qdev", im->images[i].disk, NULL);
        char node[32];

        node_name(node, i);
        (void)json_object_object_add(o, "inserted", qmp_args_strings("node-name", node, NULL));
        (void)json_object_array_add(all, o);
    }
    return all;
}

struct json_object *images_to_json(const struct images *im)
{
    struct json_object *all = json_object_new_array();

    for (size_t i = 0; i < im->nimages; i++) {
        const struct config_image *image = &im->images[i];
        struct json_object *o = qmp_args_strings("disk", image->disk, "path", image->path, NULL);

        (void)json_object_object_add(o, "format", image->format ? json_object_new_string(image->format) : NULL);
        (void)json_object_array_add(all, o);
    }
    return all;
}
