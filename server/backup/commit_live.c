/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What becomes of the image that a powered-off VM is started with, when it was committed: the VM's definition still
 * names it. So it goes on as an empty overlay on base, whatever it is started with later shows the same; or it is
 * deleted, if that was wished for. Emptying is not among the monitor's commands, so an empty image is made beside it
 * before anything else is done, and takes its place when all is committed.
 *
 * Until then, and while its name changes hands, our QEMU holds the old one under its lock. Who has opened it by then,
 * and waits only for the lock, must not start with a file that has no name any more: so its first bytes go.
 */
#include "backup/commit_impl.h"

#include "backup/seq.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define XATTR_MAX 65536              /* bytes: a value, and all names (linux/limits.h) */
#define MAGIC_SIZE 4                 /* docs/interop/qcow2.txt */
#define NEW_MODE (S_IRUSR | S_IWUSR) /* until it has the old one's */

bool commit_is_live(const struct commit *c)
{
    return c->still_socket && c->active;
}

bool commit_empties(const struct commit *c)
{
    return commit_is_live(c) && !c->delete;
}

void commit_live_done(struct commit *c)
{
    free(c->live_path);
    free(c->new_path);
    json_object_put(c->new_format);
}

/* -- the look ------------------------------------------------------------------------------------------------------ */

static bool is_beside(const char *a, const char *b)
{
    size_t len = (size_t)(strrchr(a, '/') - a);

    return strncmp(a, b, len + 1) == 0 && !strchr(b + len + 1, '/');
}

/* As it stands in the image above base, which may be relative to the folder of that one; else the whole path. */
static const char *backing_name(const struct commit *c)
{
    size_t above = c->plan.base - 1;
    const char *name = qmp_get_string(qmp_get(c->chain.layers[above], "image"), "backing-filename");
    const char *full = qmp_get_string(qmp_get(c->chain.layers[above], "image"), "full-backing-filename");

    return name && full && strcmp(full, c->base_file) == 0 && is_beside(c->files[0].path, chain_file(&c->chain, above))
               ? name
               : c->base_file;
}

const char *commit_emptied(const struct commit *c)
{
    return c->done && commit_empties(c) && !c->new_made ? c->live_path : NULL;
}

int commit_live_look(struct commit *c, struct failure *f)
{
    struct json_object *top = c->chain.layers[0], *image = qmp_get(top, "image");
    struct json_object *data = qmp_get(qmp_get(image, "format-specific"), "data");
    const char *path = c->files[0].path, *why = NULL;
    const char *protocol = qmp_get_string(graph_named(c->chain.named, c->files[0].protocol), "drv");

    if (!commit_empties(c))
        return 0;
    if (!protocol || strcmp(protocol, "file") != 0 || path[0] != '/')
        why = "it is not a local file with a full path";
    else if (strcmp(qmp_get_string(top, "drv"), "qcow2") != 0)
        why = "it is not in qcow2 format";
    else if (qmp_array_length(qmp_get(image, "snapshots")))
        why = "it holds internal snapshots";
    else if (qmp_get_string(data, "data-file"))
        why = "its data are in another file";
    else if (qmp_get(data, "encrypt"))
        why = "it is encrypted";
    if (why)
        return failure_set(f, -ENOTSUP, "image '%s' cannot be made empty: %s; say --delete if it is to go", path, why);
    c->new_format =
        qmp_args_create_overlay(c->job, names_make(c->new_node, c->rig.id, NAMES_SCRATCH, 0), backing_name(c),
                                qmp_get_string(c->chain.layers[c->plan.base], "drv"), image);
    return c->new_format ? 0 : failure_set(f, -ENOMEM, "out of memory");
}

/* -- the new image ------------------------------------------------------------------------------------------------- */

/* Owner, mode and attributes (access lists, security labels) of the old one; whoever may start the VM may go on. */
static int take_after(int fd, int old, const struct stat *st, struct failure *f)
{
    _cleanup_free_ char *names = malloc(XATTR_MAX), *value = malloc(XATTR_MAX);
    ssize_t len = names ? flistxattr(old, names, XATTR_MAX) : 0;
    struct stat mine;

    if (!names || !value)
        return failure_set(f, -ENOMEM, "out of memory");
    if (fstat(fd, &mine) < 0 ||
        ((mine.st_uid != st->st_uid || mine.st_gid != st->st_gid) && fchown(fd, st->st_uid, st->st_gid) < 0) ||
        fchmod(fd, st->st_mode & 07777) < 0)
        return failure_set(f, -errno, "it cannot be given the owner and mode of the old one: %s", strerror(errno));
    if (len < 0 && errno != ENOTSUP)
        return failure_set(f, -errno, "attributes of the old one cannot be read: %s", strerror(errno));
    for (const char *name = names; len > 0 && name < names + len; name += strlen(name) + 1) {
        ssize_t size = fgetxattr(old, name, value, XATTR_MAX);

        if (size < 0 || fsetxattr(fd, name, value, (size_t)size, 0) < 0)
            return failure_set(f, -errno, "it cannot be given the attribute '%s' of the old one: %s", name,
                               strerror(errno));
    }
    return 0;
}

static int make_file(struct commit *c, struct failure *f)
{
    int old = open(c->live_path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC), fd = -1, r;
    struct stat st;

    if (old < 0 || fstat(old, &st) < 0)
        r = failure_set(f, -errno, "image '%s' cannot be opened: %s", c->live_path, strerror(errno));
    else if (!S_ISREG(st.st_mode) || st.st_nlink != 1)
        r = failure_set(f, -EINVAL, "image '%s' cannot be made empty: it is %s; say --delete if it is to go",
                        c->live_path, S_ISREG(st.st_mode) ? "known by several names (hard links)" : "no regular file");
    else if ((unlink(c->new_path) < 0 && errno != ENOENT) ||
             (fd = open(c->new_path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, NEW_MODE)) < 0)
        r = failure_set(f, -errno, "an empty image cannot be made: '%s': %s", c->new_path, strerror(errno));
    else {
        struct failure why = {0};

        c->files[0].dev = st.st_dev;
        c->files[0].ino = st.st_ino;
        c->new_made = true;
        r = take_after(fd, old, &st, &why);
        if (r < 0)
            (void)failure_set(f, r, "an empty image cannot be made: '%s': %s", c->new_path, why.text);
    }
    if (fd >= 0)
        (void)close(fd);
    if (old >= 0)
        (void)close(old);
    return r;
}

static void make_in_thread(struct rig *r)
{
    struct commit *c = commit_of_rig(r);

    c->live_path = realpath(c->files[0].path, NULL);
    if (!c->live_path) {
        (void)failure_set(&r->work_failure, -errno, "image '%s' cannot be found: %s", c->files[0].path,
                          strerror(errno));
        return;
    }
    if (asprintf(&c->new_path, "%s" COMMIT_NEW_ENDING, c->live_path) < 0) {
        c->new_path = NULL;
        (void)failure_set(&r->work_failure, -ENOMEM, "out of memory");
        return;
    }
    (void)make_file(c, &r->work_failure);
}

static void after_work(struct rig *r)
{
    rig_step_done(&r->calls, r->work_failure.err ? &r->work_failure : NULL);
}

int commit_step_new_file(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);
    int r = commit_empties(c) ? rig_work(&c->rig, make_in_thread, after_work, f) : SEQ_DONE;

    return r < 0 ? failure_set(f, r, "an empty image cannot be made: %s", strerror(-r)) : r;
}

static void remove_in_thread(struct rig *r)
{
    const struct commit *c = commit_of_rig(r);

    if (unlink(c->new_path) < 0 && errno != ENOENT)
        (void)failure_set(&r->work_failure, -errno, "'%s' cannot be removed: %s", c->new_path, strerror(errno));
}

int commit_no_new_file(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    return c->new_made ? rig_work(&c->rig, remove_in_thread, after_work, f) : SEQ_DONE;
}

int commit_step_new_node(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    if (!commit_empties(c))
        return SEQ_DONE;
    calls_add(&c->rig.calls, "blockdev-add",
              qmp_args_strings("driver", "file", "node-name", c->new_node, "filename", c->new_path, NULL), QMP_NO_FD, 0,
              NULL);
    return rig_wait(&c->rig, f);
}

int commit_no_new_node(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    return c->new_made ? rig_no_scratch_nodes(s, f) : SEQ_DONE;
}

/* -- its turn ------------------------------------------------------------------------------------------------------ */

/* Whoever has this file without a name open, and has not read its head yet, is not to take it for a disk. */
static int spoil(int fd, struct failure *f)
{
    static const char nothing[MAGIC_SIZE];
    struct stat st;

    if (fstat(fd, &st) < 0 || (st.st_nlink == 0 && pwrite(fd, nothing, sizeof(nothing), 0) != sizeof(nothing)))
        return failure_set(f, -EIO, "the old image cannot be made unusable: %s", strerror(errno));
    return 0;
}

static void sync_folder_of(const char *path)
{
    char copy[PATH_MAX];
    int fd;

    (void)snprintf(copy, sizeof(copy), "%s", path);
    fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return;
    (void)fsync(fd); /* either name is right after a crash */
    (void)close(fd);
}

static int sync_file(const char *path)
{
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC), r;

    if (fd < 0)
        return -errno;
    r = fsync(fd) < 0 ? -errno : 0;
    (void)close(fd);
    return r;
}

static int change_name(struct commit *c, struct failure *f)
{
    int r;

    if (c->delete) {
        if (unlink(c->live_path) < 0)
            return failure_set(f, -errno, "image '%s' is not deleted: %s", c->live_path, strerror(errno));
        c->files[0].deleted = true;
        return 0;
    }
    r = sync_file(c->new_path);
    if (r == 0 && rename(c->new_path, c->live_path) < 0)
        r = -errno;
    if (r < 0)
        return failure_set(f, r, "image '%s' cannot be replaced by an empty one: %s", c->live_path, strerror(-r));
    c->new_made = false;
    return 0;
}

static void replace_in_thread(struct rig *r)
{
    struct commit *c = commit_of_rig(r);
    const struct commit_file *file = &c->files[0];
    int fd = open(c->live_path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
    struct stat st;

    if (fd < 0 || fstat(fd, &st) < 0)
        (void)failure_set(&r->work_failure, -errno, "image '%s' cannot be opened: %s", c->live_path, strerror(errno));
    else if (st.st_dev != file->dev || st.st_ino != file->ino)
        (void)failure_set(&r->work_failure, -ESTALE, "image '%s' is not the file that it was", c->live_path);
    else if (change_name(c, &r->work_failure) == 0) {
        sync_folder_of(c->live_path);
        (void)spoil(fd, &r->work_failure);
    }
    if (fd >= 0)
        (void)close(fd);
}

static void after_replacing(struct rig *r)
{
    const struct commit *c = commit_of_rig(r);
    const struct failure *why = &r->work_failure;
    struct failure f = {0};

    if (why->err)
        (void)failure_set(&f, why->err,
                          "%s; it shows what base '%s' shows, but only for as long as nobody writes to that", why->text,
                          c->base_file);
    rig_step_done(&r->calls, f.err ? &f : NULL);
}

static int replace(struct commit *c, struct failure *f)
{
    int r;

    if (c->delete &&!c->live_path && !(c->live_path = strdup(c->files[0].path)))
        return failure_set(f, -ENOMEM, "out of memory");
    r = rig_work(&c->rig, replace_in_thread, after_replacing, f);
    return r < 0 ? failure_set(f, r, "image '%s' cannot be replaced: %s", c->live_path, strerror(-r)) : r;
}

static void on_own(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    struct failure mine = {0};

    if (f)
        (void)failure_set(&mine, f->err, "image '%s' is not deleted: %s", c->files[0].path, f->text);
    else
        (void)replace(c, &mine);
    if (mine.err)
        rig_step_done(calls, &mine);
}

/* Nobody else has it open if our QEMU may write to it. */
static void on_graph(struct calls *calls, const struct failure *f)
{
    static const char *const roles[] = {"file", "backing", "data-file"};
    struct commit *c = commit_of_calls(calls);
    struct json_object *graph = c->rig.answers[2], *args;
    struct failure mine = {0};

    if (f) {
        rig_step_done(calls, f);
        return;
    }
    args = qmp_args_reopen_image(c->live_node, qmp_get_string(c->chain.layers[0], "drv"), true);
    for (size_t i = 0; i < ARRAY_SIZE(roles); i++) {
        const char *child = graph_child(graph, c->live_node, roles[i]);

        if (child)
            qmp_args_reopen_child(args, roles[i], child);
    }
    calls_add(calls, "blockdev-reopen", args, QMP_NO_FD, 0, NULL);
    commit_go_on(c, calls_wait(calls, on_own, &mine), &mine);
}

int commit_step_replace(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    if (!commit_is_live(c))
        return SEQ_DONE;
    return c->delete ? rig_ask_graph(&c->rig, on_graph, f) : replace(c, f);
}
