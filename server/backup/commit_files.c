/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The images that were merged away. Nodes that somebody added by hand stand on base still, with what they showed
 * before: as long as they do, QEMU takes no snapshot of base and commits nothing into it. So they are closed, unless
 * somebody uses them.
 *
 * On request the files are deleted, too: only regular ones that no node of QEMU has open, that are the same as at the
 * beginning, and never base. What is not deleted is said, and does not undo the commit.
 */
#include "backup/commit_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

void commit_files_done(struct commit *c)
{
    for (size_t i = 0; c->files && i < c->nfiles; i++) {
        free(c->files[i].path);
        free(c->files[i].node);
        free(c->files[i].protocol);
    }
    for (size_t i = 0; c->open_files && i < c->nopen; i++)
        free(c->open_files[i]);
    free(c->files);
    free(c->open_files);
}

/* -- before the commit --------------------------------------------------------------------------------------------- */

int commit_files_note(struct commit *c, struct failure *f)
{
    size_t n = c->plan.base - c->plan.top;

    c->files = calloc(n, sizeof(*c->files));
    if (!c->files)
        return failure_set(f, -ENOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) {
        const char *node = chain_node(&c->chain, c->plan.top + i), *path = chain_file(&c->chain, c->plan.top + i);
        const char *protocol = graph_child(c->chain.graph, node, "file");
        const char *driver = qmp_get_string(graph_named(c->chain.named, protocol), "drv");
        struct commit_file *file = &c->files[c->nfiles++];

        if (c->delete &&(!driver || strcmp(driver, "file") != 0 || path[0] != '/'))
            return failure_set(f, -EINVAL,
                               "image '%s' of node '%s' cannot be deleted: it is not a local file with a full path",
                               path, node);
        file->path = strdup(path);
        file->node = strdup(node);
        file->protocol = strdup(protocol ? protocol : "");
        if (!file->path || !file->node || !file->protocol)
            return failure_set(f, -ENOMEM, "out of memory");
    }
    return 0;
}

static int check_file(struct commit_file *file, const char *base, struct failure *f)
{
    struct stat st, base_st;

    if (lstat(file->path, &st) < 0)
        return failure_set(f, -errno, "image '%s' cannot be deleted: %s", file->path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return failure_set(f, -EINVAL, "image '%s' cannot be deleted: it is not a regular file", file->path);
    if (stat(base, &base_st) == 0 && base_st.st_dev == st.st_dev && base_st.st_ino == st.st_ino)
        return failure_set(f, -EINVAL, "image '%s' is the base itself, and is not deleted", file->path);
    file->dev = st.st_dev;
    file->ino = st.st_ino;
    return 0;
}

static void check_files(struct rig *r)
{
    struct commit *c = commit_of_rig(r);

    for (size_t i = 0; i < c->nfiles; i++) {
        if (check_file(&c->files[i], c->base_file, &r->work_failure) < 0)
            return;
    }
}

int commit_files_check(struct commit *c, void (*after)(struct rig *r), struct failure *f)
{
    int r = rig_work(&c->rig, check_files, after, f);

    return r < 0 ? failure_set(f, r, "the images cannot be looked at: %s", strerror(-r)) : 0;
}

/* -- after it ------------------------------------------------------------------------------------------------------ */

/* Nodes that QEMU opened itself are gone already, and others may be in use: neither is a failure. */
static void on_closed(struct calls *calls, const struct failure *f)
{
    rig_step_done(calls, NULL);
}

int commit_step_close(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    for (size_t i = 0; i < c->nfiles; i++) {
        const char *nodes[] = {c->files[i].node, c->files[i].protocol};

        for (size_t k = 0; k < ARRAY_SIZE(nodes) && *nodes[k]; k++)
            calls_add(&c->rig.calls, "blockdev-del", qmp_args_strings("node-name", nodes[k], NULL), QMP_NO_FD, 0, NULL);
    }
    return calls_wait(&c->rig.calls, on_closed, f);
}

/* -- deleting ------------------------------------------------------------------------------------------------------ */

static bool is_open(const struct commit *c, const struct commit_file *file)
{
    for (size_t i = 0; i < c->nopen; i++) {
        struct stat st;

        if (stat(c->open_files[i], &st) == 0 && st.st_dev == file->dev && st.st_ino == file->ino)
            return true;
    }
    return false;
}

/* QEMU and its tools lock single bytes of every image they have open: of some other VM, too, whose backing it is. */
#define LOCK_FIRST 100 /* block/file-posix.c: RAW_LOCK_PERM_BASE; RAW_LOCK_SHARED_BASE is 200 */
#define LOCK_BYTES 200

static bool is_locked(const char *path)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = LOCK_FIRST, .l_len = LOCK_BYTES};
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    bool locked = fd >= 0 && fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;

    if (fd >= 0)
        (void)close(fd);
    return locked;
}

static void delete_file(const struct commit *c, struct commit_file *file, struct failure *f)
{
    struct stat st;

    if (is_open(c, file))
        (void)failure_set(f, -EBUSY, "image '%s' is not deleted: QEMU still has it open", file->path);
    else if (lstat(file->path, &st) < 0 || !S_ISREG(st.st_mode) || st.st_dev != file->dev || st.st_ino != file->ino)
        (void)failure_set(f, -ESTALE, "image '%s' is not deleted: it is not the file it was", file->path);
    else if (is_locked(file->path))
        (void)failure_set(f, -EBUSY, "image '%s' is not deleted: another process has it open", file->path);
    else if (unlink(file->path) < 0)
        (void)failure_set(f, -errno, "image '%s' is not deleted: %s", file->path, strerror(errno));
    else
        file->deleted = true;
}

static void delete_files(struct rig *r)
{
    struct commit *c = commit_of_rig(r);

    for (size_t i = 0; i < c->nfiles; i++) {
        if (!c->files[i].deleted) /* the VM's own, when it is powered off */
            delete_file(c, &c->files[i], &r->work_failure);
    }
}

static void after_deletion(struct rig *r)
{
    rig_step_done(&r->calls, r->work_failure.err ? &r->work_failure : NULL);
}

static int note_open_files(struct commit *c, struct json_object *named)
{
    size_t n = qmp_array_length(named);

    c->open_files = calloc(n + 1, sizeof(*c->open_files));
    if (!c->open_files)
        return -ENOMEM;
    for (size_t i = 0; i < n; i++) {
        const char *path = qmp_get_string(json_object_array_get_idx(named, i), "file");

        if (path && path[0] == '/' && !(c->open_files[c->nopen++] = strdup(path)))
            return -ENOMEM;
    }
    return 0;
}

static void on_nodes(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    struct failure mine = {0};
    int r;

    if (!f && ((r = note_open_files(c, c->rig.answers[1])) < 0 ||
               (r = rig_work(&c->rig, delete_files, after_deletion, &mine)) < 0)) {
        (void)failure_set(&mine, r, "the images are not deleted: %s", strerror(-r));
        f = &mine;
    }
    if (f)
        rig_step_done(calls, f);
}

int commit_step_delete(struct seq *s, struct failure *f)
{
    return commit_of_seq(s)->delete ? rig_ask_graph(rig_of_seq(s), on_nodes, f) : SEQ_DONE;
}
