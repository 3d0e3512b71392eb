/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The images that were merged away. Nodes that somebody added by hand stand on base still, with what they showed
 * before: as long as they do, QEMU takes no snapshot of base and commits nothing into it. So they are closed, unless
 * somebody uses them.
 *
 * On request the files are deleted, too: only regular ones that no node of QEMU has open, that are the same as at the
 * beginning, and never base. What is not deleted is said, and does not undo the commit.
 *
 * Their names are QEMU's word, and a QEMU that its guest has taken over may name any file of the host. So before the
 * commit each must be shown to be a layer of this disk by what such a QEMU cannot write into a file that it cannot
 * open: its head names the next layer, and so on down to base, and a process holds it as an image.
 */
#include "backup/commit_impl.h"
#include "backup/qcow2.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
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
    file->owner = st.st_uid;
    return 0;
}

/* QEMU writes options into the head of an image where a name alone would not do, after a commit for one. */
static const char *name_of_options(struct json_object *options)
{
    const char *flat = qmp_get_string(options, "file.filename");

    return flat ? flat : qmp_get_string(qmp_get(options, "file"), "filename");
}

/* A relative name is meant from the folder of the image that it stands in. */
static bool leads_to(const char *image, const char *name, dev_t dev, ino_t ino)
{
    struct json_object *options = strncmp(name, "json:", 5) == 0 ? json_tokener_parse(name + 5) : NULL;
    const char *file = options ? name_of_options(options) : name;
    _cleanup_free_ char *path = NULL;
    struct stat st;
    bool leads = false;

    if (file && strncmp(file, "file:", 5) == 0)
        file += 5;
    if (file && asprintf(&path, "%.*s%s", file[0] == '/' ? 0 : (int)(strrchr(image, '/') - image) + 1, image, file) < 0)
        path = NULL;
    leads = path && stat(path, &st) == 0 && st.st_dev == dev && st.st_ino == ino;
    json_object_put(options);
    return leads;
}

/* below: lstat() of the next layer, or stat() of base. */
static int show_file(const struct commit_file *file, const struct stat *below, const char *below_name,
                     struct failure *f)
{
    char name[QCOW2_NAME_MAX + 1] = "";
    int fd = open(file->path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC), r;
    struct stat st;

    if (fd < 0 || fstat(fd, &st) < 0)
        r = -errno;
    else if (st.st_dev != file->dev || st.st_ino != file->ino)
        r = -ESTALE;
    else
        r = qcow2_read_backing(fd, name);
    if (fd >= 0)
        (void)close(fd);
    if (r < 0 && r != -EBADMSG)
        return failure_set(f, r, "it cannot be read: %s", strerror(-r));
    if (r < 0)
        return failure_set(f, r, "it is not a qcow2 image, so nothing shows that it is a layer of this disk");
    if (!leads_to(file->path, name, below->st_dev, below->st_ino))
        return failure_set(f, -EINVAL, "its own head does not say that it lies over '%s', so it may be another disk's",
                           below_name);
    /* A layer below that is root's no QEMU has made to lead us astray. */
    if (S_ISREG(below->st_mode) && below->st_uid != 0 && file->owner != below->st_uid)
        return failure_set(f, -EPERM, "it is user %d's, and '%s' below it user %d's", (int)file->owner, below_name,
                           (int)below->st_uid);
    if (!is_locked(file->path))
        return failure_set(f, -EINVAL,
                           "no process holds it as an image (QEMU locks those that it has open, unless told "
                           "locking=off), so it may be another disk's");
    return 0;
}

/* From base upwards: one that is not shown shows nothing about those above. */
static void show_files(struct commit *c)
{
    const char *below_name = c->base_file;
    struct stat below;
    int err = stat(c->base_file, &below) < 0 ? -errno : 0;

    for (size_t i = c->nfiles; i-- > 0;) {
        struct commit_file *file = &c->files[i];

        if (err < 0)
            (void)failure_set(&file->kept, err, "nothing shows that '%s' below it is a layer of this disk", below_name);
        else
            err = show_file(file, &below, below_name, &file->kept);
        below_name = file->path;
        below = (struct stat){.st_dev = file->dev, .st_ino = file->ino, .st_uid = file->owner, .st_mode = S_IFREG};
    }
}

static void check_files(struct rig *r)
{
    struct commit *c = commit_of_rig(r);

    for (size_t i = 0; i < c->nfiles; i++) {
        if (check_file(&c->files[i], c->base_file, &r->work_failure) < 0)
            return;
    }
    /* A powered-off VM's images are held by a child of ours, which may delete by itself whatever we may. */
    if (!c->still_socket)
        show_files(c);
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

static void delete_file(const struct commit *c, struct commit_file *file, struct failure *f)
{
    struct stat st;

    if (file->kept.err)
        (void)failure_set(f, file->kept.err, "image '%s' is not deleted: %s", file->path, file->kept.text);
    else if (is_open(c, file))
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
