/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The NBD server inside QEMU, as a rig's step: one for each process of QEMU, so it is started for a session and stopped
 * after it. A server of somebody else makes the step fail and is left alone.
 */
#include "backup/private_socket.h"
#include "backup/rig.h"
#include "qmp/commands.h"
#include "source/nbd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/*
 * QEMU, which has just answered a command, greets at once where its server listens on our socket. So much later it does
 * not: it was passed the socket and never started on it.
 */
#define KNOCK_TIMEOUT_MS 5000u

/* In a worker thread: the state directory may be on a slow disk. */
static void make_listener(struct rig *r)
{
    /* 128: all connections of many disks are made at once. */
    int fd = private_socket_listen(r->server_dir, r->server_socket, 128);

    if (fd < 0)
        (void)failure_set(&r->work_failure, fd, "cannot make the socket '%s' in the state directory: %s",
                          r->server_socket, strerror(-fd));
    else
        r->listen_fd = fd;
}

static int on_started(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    rig_of_calls(c)->server = SERVER_OURS;
    return 0;
}

static void on_start_done(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure worded = {0};

    (void)close(r->listen_fd);
    r->listen_fd = -1;
    if (f && f->err == -EREMOTEIO && r->server != SERVER_OURS)
        r->server = SERVER_PASSED; /* refused: whatever server runs is not ours */
    if (f && strstr(f->text, "already running")) {
        (void)failure_set(&worded, -EBUSY,
                          "the NBD server of this QEMU is in use by somebody else, and QEMU has only one; stop it "
                          "(nbd-server-stop) or try again later");
        f = &worded;
    }
    seq_done(&r->seq, f);
}

static void after_listener(struct rig *r)
{
    struct failure f = {0};
    char name[NAMES_SIZE];
    int result;

    if (r->work_failure.err) {
        seq_done(&r->seq, &r->work_failure);
        return;
    }
    names_make(name, NAMES_ID_SERVER, NAMES_SERVER, 0);
    r->server = SERVER_UNKNOWN;
    calls_add(&r->calls, "getfd", qmp_args_strings("fdname", name, NULL), r->listen_fd, 0, NULL);
    calls_add(&r->calls, "nbd-server-start", qmp_args_nbd_server_start_fd(name), QMP_NO_FD, 0, on_started);
    result = calls_wait(&r->calls, on_start_done, &f);
    if (result < 0) {
        (void)close(r->listen_fd); /* nobody has got it: a knock must not find us there ourselves */
        r->listen_fd = -1;
        seq_done(&r->seq, &f);
    }
}

int rig_server_up(struct seq *s, struct failure *f)
{
    return rig_work(rig_of_seq(s), make_listener, after_listener, f);
}

static bool has_file(const struct rig *r)
{
    struct stat st;

    return fstatat(r->server_dir, r->server_socket, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

static void absent(struct rig *r)
{
    r->server = SERVER_ABSENT;
    (void)unlinkat(r->server_dir, r->server_socket, 0);
    seq_done(&r->seq, NULL);
}

/*
 * Asks whether somebody, and that can only be QEMU, still holds our listening socket; cb is told -ECONNREFUSED if not.
 * It asks for an export that QEMU has not, so that the connection is over at both ends before cb: one that QEMU still
 * meant to negotiate with would be the guest's end at the next nbd-server-stop (see source/upstream.c).
 */
static int knock(struct rig *r, source_nbd_open_cb cb, struct failure *f)
{
    char name[NAMES_SIZE];
    struct source_nbd_config config = {
        .socket_path = r->server_address,
        .export_name = names_make(name, NAMES_ID_SERVER, NAMES_SERVER, 0),
        .timeout_ms = KNOCK_TIMEOUT_MS,
    };
    int err = source_nbd_open(r->loop, &config, NULL, cb, r, NULL);

    return err < 0 ? failure_set(f, err, "cannot ask whether QEMU's NBD server is there: %s", strerror(-err)) : 0;
}

static bool is_held(struct source *opened, const struct failure *f)
{
    if (opened)
        source_close(opened, NULL, NULL);
    return !f || f->err != -ECONNREFUSED;
}

static void on_knocked_last(void *arg, struct source *opened, const struct failure *f)
{
    struct rig *r = arg;

    if (is_held(opened, f))
        seq_done(&r->seq, &r->first);
    else
        absent(r); /* it was not running any more */
}

static bool is_lost(const struct failure *f)
{
    return f->err == -ENOTCONN || f->err == -ECONNRESET;
}

/* The monitor is lost. If that is because QEMU is gone, nobody else comes to remove the socket's file. */
static int knock_without_monitor(struct rig *r, const struct failure *why, struct failure *f)
{
    r->first = *why;
    return knock(r, on_knocked_last, f);
}

static void on_stopped(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};

    if (!f || (f->err == -EREMOTEIO && !has_file(r))) {
        absent(r);
        return;
    }
    r->first = *f;
    if (f->err != -EREMOTEIO && !is_lost(f))
        seq_done(&r->seq, f);
    else if (knock(r, on_knocked_last, &next) < 0)
        seq_done(&r->seq, &next);
}

static int stop(struct rig *r, struct failure *f)
{
    struct failure mine = {0};
    int ret;

    calls_add(&r->calls, "nbd-server-stop", NULL, QMP_NO_FD, 0, NULL);
    ret = calls_wait(&r->calls, on_stopped, &mine);
    if (ret < 0)
        return is_lost(&mine) ? knock_without_monitor(r, &mine, f) : failure_copy(f, &mine);
    return ret;
}

static void on_knocked(void *arg, struct source *opened, const struct failure *f)
{
    struct rig *r = arg;
    struct failure next = {0};

    if (!is_held(opened, f)) {
        absent(r);
        return;
    }
    if (r->server == SERVER_PASSED)
        (void)failure_set(&next, -EBUSY, "QEMU has not closed our socket");
    else if (!(f && f->err == -ETIMEDOUT) && stop(r, &next) == 0)
        return;
    seq_done(&r->seq, &next);
}

static void on_fd_closed(struct calls *c, const struct failure *f)
{
    struct rig *r = rig_of_calls(c);
    struct failure next = {0};

    /* A refusal of closefd says that QEMU has no such descriptor left, which is what we want. */
    if (f && is_lost(f) && knock_without_monitor(r, f, &next) == 0)
        return;
    if (f && f->err != -EREMOTEIO)
        seq_done(&r->seq, f);
    else if (!has_file(r))
        absent(r);
    else if (knock(r, on_knocked, &next) < 0)
        seq_done(&r->seq, &next);
}

int rig_server_down(struct seq *s, struct failure *f)
{
    struct rig *r = rig_of_seq(s);
    struct failure mine = {0};
    char name[NAMES_SIZE];
    int ret;

    if (r->server == SERVER_ABSENT)
        return SEQ_DONE;
    if (r->server == SERVER_OURS)
        return stop(r, f);
    calls_add(&r->calls, "closefd",
              qmp_args_strings("fdname", names_make(name, NAMES_ID_SERVER, NAMES_SERVER, 0), NULL), QMP_NO_FD, 0, NULL);
    ret = calls_wait(&r->calls, on_fd_closed, &mine);
    if (ret < 0)
        return is_lost(&mine) ? knock_without_monitor(r, &mine, f) : failure_copy(f, &mine);
    return ret;
}
