/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The frozen views are read through memory that QEMU shares with us (source/vhost.h), beside the NBD exports and as
 * long as that works: whatever fails here is noted, and reads go over NBD (docs/decisions/0017-shared-memory.md).
 *
 * QEMU needs a listening socket for it. Ours have a name for the blink of an eye in which we connect to them: nobody
 * else ever can, and what a killed daemon leaves is one file, which the next one removes. The export is the session's
 * by its name; the socket's fd is in QEMU under a name only between two commands, and that name is the same for all, so
 * that a successor finds it.
 */
#include "backup/late.h"

#include "backup/private_socket.h"
#include "qmp/commands.h"
#include "source/paired.h"
#include "source/vhost.h"

#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static void drop_fd(int *fd)
{
    if (*fd >= 0)
        (void)close(*fd);
    *fd = -1;
}

/* Said once in a session, by its first disk; the others hardly have another reason. */
static void note(struct session_disk *d, const struct failure *why)
{
    struct session *s = d->session;
    char text[sizeof(why->text) + 96];

    if (s->shared_noted || s->stop_wanted)
        return;
    s->shared_noted = true;
    (void)snprintf(text, sizeof(text), "disk '%s' is read over NBD, without shared memory: %s", d->disk->name,
                   why->text);
    if (s->ops->on_note)
        s->ops->on_note(s->arg, text);
}

/* -- the sockets --------------------------------------------------------------------------------------------------- */

static void socket_name(const struct rig *r, char *out, size_t size)
{
    (void)snprintf(out, size, "%s.vhost", r->server_socket);
}

/* In a worker thread: the state directory may be on a slow disk. Negative errno. */
static int make_socket(const struct rig *r, struct session_disk *d)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    char name[sizeof(sa.sun_path)];
    int err = 0;

    if (strlen(r->server_address) + sizeof(".vhost") > sizeof(sa.sun_path))
        return -ENAMETOOLONG;
    socket_name(r, name, sizeof(name));
    (void)snprintf(sa.sun_path, sizeof(sa.sun_path), "%.*s.vhost", (int)sizeof(sa.sun_path) - 7, r->server_address);
    d->vhost.listen_fd = private_socket_listen(r->server_dir, name, 1); /* we are the only one who ever connects */
    if (d->vhost.listen_fd < 0)
        return d->vhost.listen_fd;
    d->vhost.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (d->vhost.fd < 0 || connect(d->vhost.fd, (struct sockaddr *)&sa, sizeof(sa)) < 0)
        err = -errno;
    (void)unlinkat(r->server_dir, name, 0);
    return err;
}

static void make_sockets(struct rig *r)
{
    struct session *s = container_of(r, struct session, late);

    for (unsigned i = 0; i < r->ndisks; i++) {
        int err = make_socket(r, &s->disks[i]);

        if (err == 0)
            continue;
        drop_fd(&s->disks[i].vhost.listen_fd);
        drop_fd(&s->disks[i].vhost.fd);
        (void)failure_set(&r->work_failure, err, "cannot make a socket in the state directory: %s", strerror(-err));
        return;
    }
}

static void after_sockets(struct rig *r)
{
    struct session *s = container_of(r, struct session, late);

    if (r->work_failure.err)
        note(&s->disks[0], &r->work_failure);
    seq_done(&r->seq, NULL);
}

int late_make_sockets(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);

    return s->vhost_room && !s->depth_pass ? rig_work(&s->late, make_sockets, after_sockets, f) : SEQ_DONE;
}

static void closefd(struct rig *r);

int step_vhost_sockets_down(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        drop_fd(&s->disks[i].vhost.listen_fd);
        drop_fd(&s->disks[i].vhost.fd);
    }
    if (!s->vhost_fd_passed)
        return SEQ_DONE;
    closefd(&s->rig);
    return rig_wait(&s->rig, f);
}

/* -- the sources --------------------------------------------------------------------------------------------------- */

static void on_vhost_lost(void *arg, const struct failure *why)
{
    struct session_disk *d = arg;

    d->vhost.serves = false;
    note(d, why);
    source_paired_lost(d->vhost.pair);
}

static void on_early_closed(void *arg)
{
    session_one_done(arg, NULL);
}

static void on_vhost_open(void *arg, struct source *source, const struct failure *f)
{
    struct session_disk *d = arg;

    d->vhost.opening = NULL;
    if (d->vhost.closing) {
        if (source)
            source_close(source, on_early_closed, d->session);
        else
            session_one_done(d->session, NULL);
        return;
    }
    if (f) {
        note(d, f);
        return;
    }
    d->vhost.serves = true;
    source_paired_add(d->vhost.pair, source);
}

/* QEMU serves it. Beside the walk, which does not wait for it: what is read until then is read over NBD. */
static void open_vhost(struct session_disk *d)
{
    struct session *s = d->session;
    struct failure f = {0};
    struct source_vhost_config config = {
        .fd = d->vhost.fd,
        .cluster = s->narrow_reads ? COPY_CLUSTER : 0,
        .timeout_ms = s->rig.timeout_ms,
        .room = s->vhost_room,
    };
    int r;

    drop_fd(&d->vhost.listen_fd);
    if (!d->vhost.pair)
        return;
    r = source_vhost_open(s->rig.loop, &config, on_vhost_lost, on_vhost_open, d, &d->vhost.opening);

    d->vhost.fd = -1; /* given */
    if (r == 0)
        return;
    (void)failure_set(&f, r, "%s", r == -ENOSPC ? "all that --shared-memory allows is in use" : strerror(-r));
    note(d, &f);
}

/* -- the exports --------------------------------------------------------------------------------------------------- */

static struct session *session_of_late_calls(struct calls *c)
{
    return container_of(rig_of_calls(c), struct session, late);
}

static int on_exported(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    open_vhost(&session_of_late_calls(c)->disks[index]);
    return 0;
}

static void on_refused(struct calls *c, unsigned index, const struct failure *f)
{
    note(&session_of_late_calls(c)->disks[index], f);
}

/* Each export takes the fd out of QEMU's table before the next one comes. */
int late_share_memory(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    char export[NAMES_SIZE], access[NAMES_SIZE], fd[NAMES_SIZE];

    for (unsigned i = 0; !s->depth_pass && i < s->rig.ndisks; i++) {
        if (s->disks[i].vhost.listen_fd < 0)
            continue;
        s->vhost_fd_passed = true;
        names_make(fd, NAMES_ID_SERVER, NAMES_VHOST, 0);
        names_make(export, s->rig.id, NAMES_VHOST, i);
        calls_try(&s->late.calls, "getfd", qmp_args_strings("fdname", fd, NULL), s->disks[i].vhost.listen_fd, i, NULL,
                  on_refused);
        calls_try(&s->late.calls, "block-export-add", qmp_args_export_add_vhost(export, session_view(s, i, access), fd),
                  QMP_NO_FD, i, on_exported, on_refused);
    }
    return rig_wait(&s->late, f);
}

/* d->source has just been opened: from now on it is the sure one of a pair. */
void session_pair_source(struct session_disk *d)
{
    if (d->session->vhost_room && source_paired_new(d->source, &d->vhost.pair) == 0)
        d->source = d->vhost.pair;
}

void session_close_vhost(struct session_disk *d)
{
    drop_fd(&d->vhost.listen_fd);
    drop_fd(&d->vhost.fd);
    d->vhost.serves = false;
    if (!d->vhost.opening || d->vhost.closing)
        return;
    d->vhost.closing = true;
    d->session->npending++;
    source_vhost_open_cancel(d->vhost.opening);
}

unsigned session_nshared(const struct session *s)
{
    unsigned n = 0;

    for (unsigned i = 0; i < s->rig.ndisks; i++)
        n += s->disks[i].vhost.serves;
    return n;
}

/* -- leftovers ----------------------------------------------------------------------------------------------------- */

static void on_no_fd(struct calls *c, unsigned index, const struct failure *f)
{
    /* QEMU has no fd of that name, as it should be. */
}

static void closefd(struct rig *r)
{
    char name[NAMES_SIZE];

    names_make(name, NAMES_ID_SERVER, NAMES_VHOST, 0);
    calls_try(&r->calls, "closefd", qmp_args_strings("fdname", name, NULL), QMP_NO_FD, 0, NULL, on_no_fd);
}

int rig_no_vhost_fd(struct seq *q, struct failure *f)
{
    struct rig *r = rig_of_seq(q);
    char name[128];

    if (strcmp(r->id, NAMES_ID_SERVER) != 0)
        return SEQ_DONE;
    socket_name(r, name, sizeof(name));
    (void)unlinkat(r->server_dir, name, 0);
    closefd(r);
    return rig_wait(r, f);
}
