/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "doctor.h"

#include "config.h"
#include "qmp/commands.h"
#include "reach.h"
#include "server.h"
#include "vm.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdio.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define MIB (1ull << 20)
#define STATE_ROOM (1ull << 20) /* bytes: less, and notes of checkpoints may soon not be written */
#define CHECK_SCRATCH "scratch"
#define CHECK_STATE "state"

/* Not in linux/magic.h of all that we build on. */
#define MAGIC_ZFS 0x2fc12fc1u
#define MAGIC_CEPH 0x00c36400u
#define MAGIC_CIFS 0xff534d42u
#define MAGIC_SMB2 0xfe534d42u
#define MAGIC_FUSE 0x65735546u
#define MAGIC_XFS 0x58465342u

/* What the worker finds out of one directory. */
struct folder {
    char *path; /* owned */
    int err;    /* why no file can be made there, or it cannot be looked at; 0 */
    bool unlinked_wanted;
    uint64_t free; /* bytes; UINT64_MAX: the file system tells no size */
    unsigned type; /* of the file system */
};

struct patient {
    struct vm_checkup checkup;
    struct doctor *doctor;
    char *name; /* owned */
    bool done;
    /* for the worker, and of it */
    char *locked; /* owned: a QMP socket that may not be opened; else NULL */
    pid_t qemu;   /* 0: is not known */
    bool opens_scratch;
    char text[REACH_TEXT_MAX], advice[REACH_TEXT_MAX];
};

struct doctor {
    doctor_cb cb; /* NULL: answered, or nobody wants it */
    void *arg;
    struct json_object *checks; /* owned: of the daemon, until it is given */
    unsigned nleft;             /* the worker, and VMs */
    uv_work_t work;
    bool worked;
    uv_timer_t deadline;
    struct folder scratch, state;
    const struct server_config *config; /* borrowed: the server's */
    size_t npatients;
    struct patient patients[];
};

/* -- directories --------------------------------------------------------------------------------------------------- */

static const struct {
    unsigned type;
    const char *name;
    bool remote; /* it may hang with something that is not this machine's kernel */
} file_systems[] = {
    {EXT4_SUPER_MAGIC, "ext4", false},
    {MAGIC_XFS, "xfs", false},
    {BTRFS_SUPER_MAGIC, "btrfs", false},
    {TMPFS_MAGIC, "tmpfs", false},
    {OVERLAYFS_SUPER_MAGIC, "overlay", false},
    {MAGIC_ZFS, "zfs", false},
    {NFS_SUPER_MAGIC, "NFS", true},
    {MAGIC_CIFS, "CIFS", true},
    {MAGIC_SMB2, "SMB", true},
    {MAGIC_CEPH, "Ceph", true},
    {MAGIC_FUSE, "FUSE", true},
};

static const char *file_system(unsigned type, bool *ret_remote)
{
    for (size_t i = 0; i < ARRAY_SIZE(file_systems); i++) {
        if (file_systems[i].type == type) {
            *ret_remote = file_systems[i].remote;
            return file_systems[i].name;
        }
    }
    *ret_remote = false;
    return "a file system without a name here";
}

/* In the worker. */
static void look_at(struct folder *p)
{
    struct statfs type;
    struct statvfs room;
    int fd;

    if (p->unlinked_wanted) {
        fd = open(p->path, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        if (fd < 0)
            p->err = -errno;
        else
            (void)close(fd);
    } else if (access(p->path, W_OK | X_OK) < 0) {
        p->err = -errno;
    }
    if (statfs(p->path, &type) < 0 || statvfs(p->path, &room) < 0) {
        p->err = p->err ? p->err : -errno;
        return;
    }
    p->type = (unsigned)type.f_type;
    p->free = room.f_blocks ? (uint64_t)room.f_bavail * room.f_frsize : UINT64_MAX;
    if ((room.f_flag & ST_RDONLY) && !p->err)
        p->err = -EROFS;
}

static void add_scratch(struct doctor *d)
{
    const struct folder *p = &d->scratch;
    bool remote;
    const char *name = file_system(p->type, &remote);

    if (d->config->place)
        doctor_add(d->checks, NULL, NULL, CHECK_SCRATCH, VERDICT_NOTE, "pull something: QEMU opens it only then",
                   "scratch is %s", d->config->scratch);
    else if (p->err == -EOPNOTSUPP || p->err == -EISDIR)
        doctor_add(d->checks, NULL, NULL, CHECK_SCRATCH, VERDICT_WRONG,
                   "name a --scratch on a file system with O_TMPFILE (ext4, xfs, btrfs, tmpfs)",
                   "'%s' is on %s, which cannot make files without a name (O_TMPFILE)", p->path, name);
    else if (p->err)
        doctor_add(d->checks, NULL, NULL, CHECK_SCRATCH, VERDICT_WRONG,
                   "make the directory writable for qpulld, or name another --scratch",
                   "no file can be made in '%s': %s", p->path, strerror(-p->err));
    else if (d->config->scratch_reserve && p->free <= d->config->scratch_reserve)
        doctor_add(d->checks, NULL, NULL, CHECK_SCRATCH, VERDICT_WRONG,
                   "make room there, name another --scratch, or lower --scratch-reserve",
                   "no session can begin: '%s' (%s) has %llu MiB free, and --scratch-reserve keeps %llu MiB", p->path,
                   name, (unsigned long long)(p->free / MIB), (unsigned long long)(d->config->scratch_reserve / MIB));
    else if (remote)
        doctor_add(d->checks, NULL, NULL, CHECK_SCRATCH, VERDICT_NOTE, "a local --scratch hangs with nobody else",
                   "'%s' is on %s: while that hangs, guests' writes hang with it, up to %u seconds, and the session is "
                   "lost",
                   p->path, name, d->config->cbw_timeout_s);
    else if (p->free == UINT64_MAX)
        doctor_add(d->checks, NULL, NULL, CHECK_SCRATCH, VERDICT_OK, NULL, "'%s' (%s) tells no size", p->path, name);
    else
        doctor_add(d->checks, NULL, NULL, CHECK_SCRATCH, VERDICT_OK, NULL,
                   "'%s' (%s) has %llu MiB free, reserve %llu MiB", p->path, name, (unsigned long long)(p->free / MIB),
                   (unsigned long long)(d->config->scratch_reserve / MIB));
}

static void add_state(struct doctor *d)
{
    const struct folder *p = &d->state;

    if (p->err)
        doctor_add(d->checks, NULL, NULL, CHECK_STATE, VERDICT_WRONG,
                   "make the directory writable for qpulld, or name another --state",
                   "notes of checkpoints cannot be written to '%s': %s", p->path, strerror(-p->err));
    else if (p->free < STATE_ROOM)
        doctor_add(d->checks, NULL, NULL, CHECK_STATE, VERDICT_WRONG, "make room there",
                   "'%s' has only %llu bytes free: notes of checkpoints may not be written", p->path,
                   (unsigned long long)p->free);
    else
        doctor_add(d->checks, NULL, NULL, CHECK_STATE, VERDICT_OK, NULL, "'%s' can be written", p->path);
}

/* What the worker has found of one VM. */
static void add_access(struct doctor *d, const struct patient *p)
{
    if (p->locked)
        doctor_add(d->checks, p->name, NULL, "qmp access", VERDICT_WRONG, p->advice, "%s", p->text);
    else if (p->qemu && p->opens_scratch)
        doctor_add(d->checks, p->name, NULL, "qemu access", VERDICT_NOTE, NULL,
                   "QEMU (process %d: %s) opens its scratch place itself, and must be allowed to; sockets it gets by "
                   "descriptor",
                   (int)p->qemu, p->text);
    else if (p->qemu)
        doctor_add(
            d->checks, p->name, NULL, "qemu access", VERDICT_OK, NULL,
            "QEMU (process %d: %s) gets scratch and sockets by descriptor, and needs no right to any path of ours",
            (int)p->qemu, p->text);
}

/* -- the end ------------------------------------------------------------------------------------------------------- */

static void doctor_free(uv_handle_t *h)
{
    struct doctor *d = container_of((uv_timer_t *)h, struct doctor, deadline);

    for (size_t i = 0; i < d->npatients; i++) {
        json_object_put(d->patients[i].checkup.checks);
        free(d->patients[i].name);
        free(d->patients[i].locked);
    }
    json_object_put(d->checks);
    free(d->scratch.path);
    free(d->state.path);
    free(d);
}

static void answer(struct doctor *d)
{
    struct json_object *checks = TAKE_PTR(d->checks);
    doctor_cb cb = TAKE_PTR(d->cb);

    for (size_t i = 0; i < d->npatients; i++) {
        struct patient *p = &d->patients[i];

        for (size_t k = 0; k < qmp_array_length(p->checkup.checks); k++)
            (void)json_object_array_add(checks, json_object_get(json_object_array_get_idx(p->checkup.checks, k)));
        if (!p->done)
            doctor_add(checks, p->name, NULL, "answers", VERDICT_WRONG,
                       "see whether this QEMU answers query-status on another monitor, and what its log says",
                       "nothing has come back within %u seconds", DOCTOR_TIMEOUT_MS / 1000);
    }
    if (cb)
        cb(d->arg, checks);
    else
        json_object_put(checks);
}

static void part_done(struct doctor *d)
{
    if (--d->nleft)
        return;
    if (d->checks)
        answer(d);
    uv_close((uv_handle_t *)&d->deadline, doctor_free);
}

static void on_deadline(uv_timer_t *t)
{
    struct doctor *d = container_of(t, struct doctor, deadline);

    if (!d->worked)
        doctor_add(d->checks, NULL, NULL, CHECK_SCRATCH, VERDICT_WRONG,
                   "name a --scratch and a --state that do not hang",
                   "the file systems of '%s' and '%s' have not answered within %u seconds", d->scratch.path,
                   d->state.path, DOCTOR_TIMEOUT_MS / 1000);
    answer(d); /* what is under way ends by itself */
}

static void work(uv_work_t *w)
{
    struct doctor *d = container_of(w, struct doctor, work);

    look_at(&d->scratch);
    look_at(&d->state);
    for (size_t i = 0; i < d->npatients; i++) {
        struct patient *p = &d->patients[i];

        if (p->locked)
            reach_explain(p->locked, p->text, p->advice);
        else if (p->qemu)
            reach_describe(p->qemu, p->text);
    }
}

static void after_work(uv_work_t *w, int status)
{
    struct doctor *d = container_of(w, struct doctor, work);

    d->worked = true;
    if (d->checks) {
        add_scratch(d);
        add_state(d);
        for (size_t i = 0; i < d->npatients; i++)
            add_access(d, &d->patients[i]);
    }
    part_done(d);
}

static void on_checkup(struct vm_checkup *c)
{
    struct patient *p = container_of(c, struct patient, checkup);

    p->done = true;
    part_done(p->doctor);
}

static void add_daemon(struct doctor *d, struct server *server)
{
    const struct scratch_place *scratch = server_scratch(server);
    struct failure f = {0};

    doctor_add(d->checks, NULL, NULL, "daemon", VERDICT_OK, NULL, "qpulld %s answers, process %d", QPULL_VERSION,
               (int)getpid());
    if (server_nvms(server) == 0)
        doctor_add(d->checks, NULL, NULL, "daemon", VERDICT_WRONG, "name VMs: --vm NAME=QMP_SOCKET, or [vm \"NAME\"]",
                   "it has no VM");
    if (scratch_check_quota(scratch, &f) < 0)
        doctor_add(d->checks, NULL, NULL, CHECK_SCRATCH, VERDICT_WRONG,
                   "wait for the sessions that hold it, or raise --scratch-total-limit", "%s", f.text);
}

static int fill(struct doctor *d, struct server *server, struct vm *only)
{
    d->checks = json_object_new_array();
    d->scratch.path = strdup(scratch_dir(server_scratch(server)));
    d->scratch.unlinked_wanted = true;
    d->config = server_config(server);
    d->state.path = strdup(d->config->state);
    for (size_t i = 0; i < d->npatients; i++) {
        const struct vm *vm = only ? only : server_vm_at(server, i);
        struct patient *p = &d->patients[i];

        p->doctor = d;
        p->name = strdup(vm_name(vm));
        p->qemu = vm_qemu_pid(vm);
        p->opens_scratch = vm_opens_scratch(vm);
        if (vm_locked_socket(vm) && !(p->locked = strdup(vm_locked_socket(vm))))
            return -ENOMEM;
        p->checkup.cb = on_checkup;
        p->checkup.checks = json_object_new_array();
        if (!p->name || !p->checkup.checks)
            return -ENOMEM;
    }
    return d->checks && d->scratch.path && d->state.path ? 0 : -ENOMEM;
}

int doctor_start(struct server *server, struct vm *vm, doctor_cb cb, void *arg, struct doctor **ret_doctor)
{
    size_t n = vm ? 1 : server_nvms(server);
    struct doctor *d = calloc(1, sizeof(*d) + n * sizeof(d->patients[0]));

    if (!d)
        return -ENOMEM;
    d->cb = cb;
    d->arg = arg;
    d->npatients = n;
    (void)uv_timer_init(server_loop(server), &d->deadline);
    if (fill(d, server, vm) < 0) {
        uv_close((uv_handle_t *)&d->deadline, doctor_free);
        return -ENOMEM;
    }
    add_daemon(d, server);
    d->nleft = 1;
    for (size_t i = 0; i < n; i++) {
        struct patient *p = &d->patients[i];

        p->done = vm_checkup_start(vm ? vm : server_vm_at(server, i), &p->checkup);
        d->nleft += !p->done;
    }
    (void)uv_queue_work(server_loop(server), &d->work, work, after_work); /* fails for no work function only */
    (void)uv_timer_start(&d->deadline, on_deadline, DOCTOR_TIMEOUT_MS, 0);
    *ret_doctor = d;
    return 0;
}

void doctor_forget(struct doctor *d)
{
    d->cb = NULL;
}
