/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/selftest.h"

#include "backup/rig.h"
#include "qmp/commands.h"
#include "source/nbd.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define TEST_CLUSTER 65536u /* copy granularity over a raw file; see COPY_CLUSTER in steps.h */
#define TEST_SIZE ((ssize_t)2 * TEST_CLUSTER)
#define TEST_OLD 0x5a /* what the frozen view must show */
#define TEST_NEW 0xa5 /* what is written over the first cluster after the freeze */

struct selftest {
    struct rig rig;
    selftest_cb cb;
    void *arg;
    int fds[2]; /* scratch, base */
    int64_t fdsets[2];
    struct source_nbd_poke *poke;
    struct source_nbd_open *opening;
    struct source *source;
    struct source_read read;
    bool narrow;
    struct failure failure;
    unsigned char buffer[TEST_SIZE];
};

static struct selftest *of_seq(struct seq *s)
{
    return container_of(rig_of_seq(s), struct selftest, rig);
}

static int on_fd_added(struct calls *c, unsigned index, struct json_object *ret, struct failure *f)
{
    container_of(rig_of_calls(c), struct selftest, rig)->fdsets[index] = qmp_get_int(ret, "fdset-id");
    return 0;
}

static const enum names_kind fd_kinds[] = {NAMES_SCRATCH, NAMES_BASE};

static int files_up(struct seq *q, struct failure *f)
{
    struct selftest *t = of_seq(q);
    char name[NAMES_SIZE];

    for (unsigned i = 0; i < ARRAY_SIZE(t->fds); i++) {
        t->fds[i] = memfd_create("qpull-selftest", MFD_CLOEXEC);
        if (t->fds[i] < 0 || ftruncate(t->fds[i], TEST_SIZE) < 0)
            return failure_set(f, -errno, "cannot make a memory file: %s", strerror(errno));
    }
    /*
     * Data in both clusters, before and after: QEMU's server reads what block status calls one extent in one go, and
     * that is what shows the bug. With a zero cluster beside a written one it would read them apart, and all would look
     * well.
     */
    memset(t->buffer, TEST_OLD, TEST_SIZE);
    if (pwrite(t->fds[1], t->buffer, TEST_SIZE, 0) != TEST_SIZE)
        return failure_set(f, -EIO, "cannot fill a memory file");
    for (unsigned i = 0; i < ARRAY_SIZE(t->fds); i++)
        calls_add(&t->rig.calls, "add-fd", qmp_args_add_fd(names_make(name, t->rig.id, fd_kinds[i], 0)), t->fds[i], i,
                  on_fd_added);
    return rig_wait(&t->rig, f);
}

static int nodes_up(struct seq *q, struct failure *f)
{
    struct selftest *t = of_seq(q);
    char name[NAMES_SIZE];

    for (unsigned i = 0; i < ARRAY_SIZE(t->fdsets); i++)
        calls_add(&t->rig.calls, "blockdev-add",
                  qmp_args_blockdev_add_file(names_make(name, t->rig.id, fd_kinds[i], 0), t->fdsets[i]), QMP_NO_FD, i,
                  NULL);
    return rig_wait(&t->rig, f);
}

static int cbw_up(struct seq *q, struct failure *f)
{
    struct selftest *t = of_seq(q);
    char scratch[NAMES_SIZE], base[NAMES_SIZE], cbw[NAMES_SIZE];

    names_make(scratch, t->rig.id, NAMES_SCRATCH, 0);
    names_make(base, t->rig.id, NAMES_BASE, 0);
    names_make(cbw, t->rig.id, NAMES_CBW, 0);
    calls_add(&t->rig.calls, "blockdev-add", qmp_args_blockdev_add_cbw(cbw, base, json_object_new_string(scratch), 0),
              QMP_NO_FD, 0, NULL);
    return rig_wait(&t->rig, f);
}

static int access_up(struct seq *q, struct failure *f)
{
    struct selftest *t = of_seq(q);
    char cbw[NAMES_SIZE], access[NAMES_SIZE];

    names_make(cbw, t->rig.id, NAMES_CBW, 0);
    names_make(access, t->rig.id, NAMES_ACCESS, 0);
    calls_add(&t->rig.calls, "blockdev-add", qmp_args_blockdev_add_snapshot_access(access, cbw, false), QMP_NO_FD, 0,
              NULL);
    return rig_wait(&t->rig, f);
}

static int exports_up(struct seq *q, struct failure *f)
{
    struct selftest *t = of_seq(q);
    char access[NAMES_SIZE], cbw[NAMES_SIZE], reader[NAMES_SIZE], writer[NAMES_SIZE];

    names_make(access, t->rig.id, NAMES_ACCESS, 0);
    names_make(cbw, t->rig.id, NAMES_CBW, 0);
    names_make(reader, t->rig.id, NAMES_EXPORT, 0);
    names_make(writer, t->rig.id, NAMES_LATE, 0);
    calls_add(&t->rig.calls, "block-export-add", qmp_args_export_add(reader, access, reader, 0, NULL, 0), QMP_NO_FD, 0,
              NULL);
    calls_add(&t->rig.calls, "block-export-add", qmp_args_export_add(writer, cbw, writer, QMP_EXPORT_WRITABLE, NULL, 0),
              QMP_NO_FD, 0, NULL);
    return rig_wait(&t->rig, f);
}

static struct source_nbd_config nbd_config(const struct selftest *t, char name[NAMES_SIZE], enum names_kind kind)
{
    return (struct source_nbd_config){
        .socket_path = t->rig.server_address,
        .export_name = names_make(name, t->rig.id, kind, 0),
        .timeout_ms = t->rig.timeout_ms,
    };
}

static void on_poked(void *arg, const struct failure *f)
{
    struct selftest *t = arg;

    seq_done(&t->rig.seq, f);
}

static int poke_up(struct seq *q, struct failure *f)
{
    struct selftest *t = of_seq(q);
    char name[NAMES_SIZE];
    struct source_nbd_config config = nbd_config(t, name, NAMES_LATE);

    memset(t->buffer, TEST_NEW, TEST_CLUSTER);
    return source_nbd_poke(t->rig.loop, &config, 0, t->buffer, TEST_CLUSTER, on_poked, t, &t->poke);
}

static void on_read(struct source_read *r, int err)
{
    struct selftest *t = r->arg;
    struct failure f = {0};

    for (unsigned i = 0; i < TEST_SIZE; i++)
        t->narrow |= t->buffer[i] != TEST_OLD;
    if (err)
        (void)failure_set(&f, err, "the frozen view of the self-test cannot be read: %s", strerror(-err));
    seq_done(&t->rig.seq, &f);
}

static void on_open(void *arg, struct source *source, const struct failure *f)
{
    struct selftest *t = arg;
    struct failure mine = {0};
    int r;

    t->source = source;
    if (!f) {
        t->read = (struct source_read){.length = TEST_SIZE, .buffer = t->buffer, .cb = on_read, .arg = t};
        r = source_read(source, &t->read);
        if (r == 0)
            return;
        (void)failure_set(&mine, r, "cannot read: %s", strerror(-r));
        f = &mine;
    }
    seq_done(&t->rig.seq, f);
}

static void on_lost(void *arg, const struct failure *why)
{
    /* The read in flight has got its error; there is nothing else to say it to. */
}

static int read_up(struct seq *q, struct failure *f)
{
    struct selftest *t = of_seq(q);
    char name[NAMES_SIZE];
    struct source_nbd_config config = nbd_config(t, name, NAMES_EXPORT);

    return source_nbd_open(t->rig.loop, &config, on_lost, on_open, t, &t->opening);
}

static void on_closed(void *arg)
{
    struct selftest *t = arg;

    seq_done(&t->rig.seq, NULL);
}

static int read_down(struct seq *q, struct failure *f)
{
    struct selftest *t = of_seq(q);

    if (!t->source)
        return SEQ_DONE;
    source_close(TAKE_PTR(t->source), on_closed, t);
    return 0;
}

static const struct seq_step steps[] = {
    {"pass memory files", files_up, rig_no_fds, NULL},
    {"add nodes", nodes_up, rig_no_scratch_nodes, NULL},
    {"add copy-before-write", cbw_up, rig_no_cbw, NULL},
    {"add snapshot-access", access_up, rig_no_access, NULL},
    {"start NBD server", rig_server_up, rig_server_down, NULL},
    {"add exports", exports_up, rig_no_exports, NULL},
    {"overwrite a cluster", poke_up, NULL, NULL},
    {"read across clusters", read_up, read_down, NULL},
};

static void on_top(struct seq *q)
{
    seq_stop(q, false);
}

static void on_failed(struct seq *q, const struct failure *why)
{
    char step[96];

    seq_describe(q, step, sizeof(step));
    (void)failure_set(&of_seq(q)->failure, why->err, "self-test, step %s: %s", step, why->text);
    seq_stop(q, false);
}

static void on_end(struct seq *q, const struct failure *problems)
{
    struct selftest *t = of_seq(q);
    struct failure left = *problems;

    rig_done(&t->rig);
    for (unsigned i = 0; i < ARRAY_SIZE(t->fds); i++) {
        if (t->fds[i] >= 0)
            (void)close(t->fds[i]);
    }
    t->cb(t->arg, t->narrow, t->failure.err ? &t->failure : NULL, &left);
    free(t);
}

static const struct seq_ops ops = {.on_top = on_top, .on_failed = on_failed, .on_end = on_end};

int selftest_start(const struct selftest_config *config, selftest_cb cb, void *arg)
{
    struct selftest *t = calloc(1, sizeof(*t));
    char id[NAMES_ID_SIZE];
    struct rig_config rig = {
        .loop = config->loop,
        .qmp = config->qmp,
        .id = id,
        .ndisks = 1,
        .timeout_ms = config->timeout_ms,
        .server_socket = config->server_socket,
        .server_dir = config->server_dir,
    };

    if (!t)
        return -ENOMEM;
    names_new_id(id);
    t->cb = cb;
    t->arg = arg;
    t->fds[0] = t->fds[1] = -1;
    (void)rig_init(&t->rig, &rig, steps, ARRAY_SIZE(steps), &ops); /* a timer only: cannot fail */
    rig_announce(&t->rig);
    seq_start(&t->rig.seq);
    return 0;
}
