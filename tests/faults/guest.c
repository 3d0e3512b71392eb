/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guest.h"

#include "die.h"
#include "qmp/commands.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define QEMU "qemu-system-x86_64"
#define START_MS 20000
#define ANSWER_MS 20000 /* a guest that waits longer for one write is a frozen guest */

bool guest_possible(void)
{
    return system("command -v " QEMU " qemu-img stdbuf >/dev/null") == 0;
}

/* splitmix64 (Steele, Lea, Flood 2014) */
uint64_t guest_random(struct guest *g)
{
    uint64_t z = (g->seed += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* -- the process --------------------------------------------------------------------------------------------------- */

static int connect_to(const char *path)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        die("socket: %s", strerror(errno));
    (void)strncat(sa.sun_path, path, sizeof(sa.sun_path) - 1);
    if (connect(fd, (const struct sockaddr *)&sa, sizeof(sa)) < 0) {
        (void)close(fd);
        return -1;
    }
    return fd;
}

static void nap(void)
{
    static const struct timespec ms10 = {.tv_nsec = 10000000};

    (void)nanosleep(&ms10, NULL);
}

static void exec_qemu(const struct guest *g)
{
    static char memory[][160] = {"stdbuf", "-oL", QEMU, "-accel",      "tcg",      "-machine",
                                 "pc",     "-m",  "16", "-nodefaults", "-display", "none"};
    static char more[GUEST_MAX_DISKS * 4 + 4][160];
    char *argv[64], last[160];
    size_t n = 0, m = 0;
    int out;

    for (size_t i = 0; i < ARRAY_SIZE(memory); i++)
        argv[n++] = memory[i];
    for (unsigned i = 0; i < g->ndisks; i++) {
        argv[n++] = strcpy(more[m++], "-blockdev");
        (void)snprintf(more[m], sizeof(more[m]),
                       "driver=qcow2,node-name=d%u,discard=unmap,file.driver=file,file.filename=%s/d%u.qcow2", i,
                       g->dir, i);
        argv[n++] = more[m++];
        argv[n++] = strcpy(more[m++], "-device");
        (void)snprintf(more[m], sizeof(more[m]), "virtio-blk-pci,drive=d%u,id=v%u", i, i);
        argv[n++] = more[m++];
    }
    for (unsigned i = 0; i < 2; i++) {
        argv[n++] = strcpy(more[m++], "-qmp");
        (void)snprintf(i ? last : more[m], sizeof(last), "unix:%s/monitor%u,server=on,wait=off", g->dir, i);
        argv[n++] = i ? last : more[m++];
    }
    argv[n] = NULL;
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    out = open("output", O_WRONLY | O_CREAT | O_APPEND, 0600);
    (void)dup2(open("/dev/null", O_RDONLY | O_CLOEXEC), STDIN_FILENO);
    (void)dup2(out, STDOUT_FILENO);
    (void)dup2(out, STDERR_FILENO);
    (void)close(out);
    (void)execvp(argv[0], argv);
    _exit(127);
}

static void make_image(const struct guest *g, unsigned i)
{
    char command[160];

    (void)snprintf(command, sizeof(command), "qemu-img create -q -f qcow2 %s/d%u.qcow2 %llu", g->dir, i,
                   (unsigned long long)GUEST_SIZE);
    if (system(command) != 0)
        die("this failed: %s", command);
}

static void wait_for_control(struct guest *g)
{
    char path[64];

    (void)snprintf(path, sizeof(path), "%s/monitor1", g->dir);
    for (unsigned i = 0; i < START_MS / 10 && (g->control = connect_to(path)) < 0; i++)
        nap();
    if (g->control < 0)
        die("QEMU does not listen at '%s'", path);
}

/* What must survive every session untouched: a bitmap, a node and an fd set of others. */
static void add_foreign_things(struct guest *g)
{
    for (unsigned i = 0; i < g->ndisks; i++) {
        json_object_put(guest_call(
            g, NULL, "{'execute':'block-dirty-bitmap-add','arguments':{'node':'d%u','name':'old','persistent':true}}",
            i));
        json_object_put(
            guest_call(g, NULL, "{'execute':'block-dirty-bitmap-add','arguments':{'node':'d%u','name':'foreign'}}", i));
    }
    json_object_put(
        guest_call(g, NULL, "{'execute':'blockdev-add','arguments':{'driver':'null-co','node-name':'foreign'}}"));
}

bool guest_can_limit_scratch(void)
{
    return unshare(CLONE_NEWNS) == 0 && mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0;
}

static void limit_scratch(const struct guest *g, uint64_t size)
{
    char options[64];

    (void)snprintf(options, sizeof(options), "size=%llu", (unsigned long long)size);
    if (mount("qpull", g->scratch, "tmpfs", 0, options) < 0)
        die("a small file system cannot be mounted: %s", strerror(errno));
}

static void launch(struct guest *g)
{
    char path[64];

    for (unsigned i = 0; i < g->ndisks; i++)
        make_image(g, i);
    g->pid = fork();
    if (g->pid < 0)
        die("fork: %s", strerror(errno));
    if (g->pid == 0) {
        if (chdir(g->dir) == 0)
            exec_qemu(g);
        _exit(127);
    }
    wait_for_control(g);
    qmp_stream_init(&g->stream, 0);
    json_object_put(guest_call(g, NULL, "{'execute':'qmp_capabilities'}"));
    (void)snprintf(path, sizeof(path), "%s/output", g->dir);
    g->output = open(path, O_RDONLY | O_CLOEXEC);
    g->output_at = (long)lseek(g->output, 0, SEEK_END);
    add_foreign_things(g);
}

static void disconnect(struct guest *g)
{
    (void)close(g->control);
    (void)close(g->output);
    json_object_put(TAKE_PTR(g->answer));
    qmp_stream_done(&g->stream);
}

void guest_start(struct guest *g, unsigned ndisks, uint64_t scratch_size, uint64_t seed)
{
    memset(g, 0, sizeof(*g));
    strcpy(g->dir, "/tmp/qpull-faults-XXXXXX");
    if (!mkdtemp(g->dir))
        die("mkdtemp: %s", strerror(errno));
    g->ndisks = ndisks;
    g->seed = seed;
    (void)snprintf(g->monitor, sizeof(g->monitor), "%s/monitor0", g->dir);
    (void)snprintf(g->scratch, sizeof(g->scratch), "%s/scratch", g->dir);
    (void)snprintf(g->state, sizeof(g->state), "%s/state", g->dir);
    if (mkdir(g->scratch, 0700) < 0 || mkdir(g->state, 0700) < 0)
        die("mkdir: %s", strerror(errno));
    if (scratch_size)
        limit_scratch(g, scratch_size);
    launch(g);
}

void guest_die(struct guest *g)
{
    if (g->pid > 0) {
        (void)kill(g->pid, SIGKILL);
        (void)waitpid(g->pid, NULL, 0);
    }
    g->pid = 0;
}

void guest_replace(struct guest *g)
{
    char path[64];

    guest_die(g);
    disconnect(g);
    for (unsigned i = 0; i < 2; i++) {
        (void)snprintf(path, sizeof(path), "%s/monitor%u", g->dir, i);
        (void)unlink(path);
    }
    memset(g->disks, 0, sizeof(g->disks));
    g->frozen = g->has_overlays = false;
    g->nwrites = 0;
    launch(g);
}

bool guest_lives(struct guest *g, struct failure *f)
{
    char text[400] = "";
    int status;

    if (waitpid(g->pid, &status, WNOHANG) != g->pid)
        return true;
    g->pid = 0;
    g->output_at = MAX(0L, (long)lseek(g->output, 0, SEEK_END) - (long)sizeof(text) + 1);
    (void)!pread(g->output, text, sizeof(text) - 1, g->output_at);
    (void)failure_set(f, -ESRCH, "QEMU has died (status 0x%x): %s", (unsigned)status, text);
    return false;
}

void guest_done(struct guest *g)
{
    char command[64];

    guest_die(g);
    disconnect(g);
    (void)umount2(g->scratch, MNT_DETACH);
    (void)snprintf(command, sizeof(command), "rm -rf '%s'", g->dir);
    (void)!system(command);
}

/* -- the second monitor -------------------------------------------------------------------------------------------- */

static int on_document(void *arg, struct json_object *doc)
{
    struct guest *g = arg;

    if ((qmp_get(doc, "return") || qmp_get(doc, "error")) && !g->answer)
        g->answer = json_object_get(doc);
    return 0;
}

static struct json_object *wait_for_answer(struct guest *g)
{
    char bytes[16384];

    while (!g->answer) {
        struct pollfd p = {.fd = g->control, .events = POLLIN};
        struct failure f = {0};
        ssize_t n;
        int r;

        do
            r = poll(&p, 1, ANSWER_MS);
        while (r < 0 && errno == EINTR); /* a daemon has ended */
        if (r <= 0)
            die("the guest is frozen: QEMU has not answered within %d ms (process %d)", ANSWER_MS, (int)g->pid);
        n = read(g->control, bytes, sizeof(bytes));
        if (n <= 0)
            break;
        if (qmp_stream_feed(&g->stream, bytes, (size_t)n, on_document, g, &f) < 0)
            die("QEMU's answer: %s", f.text);
    }
    return TAKE_PTR(g->answer);
}

struct json_object *guest_call(struct guest *g, struct failure *f, const char *fmt, ...)
{
    _cleanup_free_ char *text = NULL;
    struct json_object *answer, *ret;
    struct failure why = {0};
    va_list ap;
    int r;

    va_start(ap, fmt);
    r = vasprintf(&text, fmt, ap);
    va_end(ap);
    if (r < 0)
        die("out of memory");
    if (send(g->control, text, strlen(text), MSG_NOSIGNAL) != (ssize_t)strlen(text) || !(answer = wait_for_answer(g))) {
        nap();
        if (guest_lives(g, &why))
            die("QEMU has closed the second monitor at: %s", text);
        die("%s (at: %s)", why.text, text);
    }
    ret = json_object_get(qmp_get(answer, "return"));
    if (!ret) {
        (void)failure_set(&why, -EREMOTEIO, "%s", qmp_get_string(qmp_get(answer, "error"), "desc"));
        if (!f)
            die("QEMU refuses %s: %s", text, why.text);
        (void)failure_copy(f, &why);
    }
    json_object_put(answer);
    return ret;
}

/* -- the guest's part ---------------------------------------------------------------------------------------------- */

static void io(struct guest *g, unsigned disk, const char *command)
{
    json_object_put(guest_call(g, NULL,
                               "{'execute':'human-monitor-command','arguments':{'command-line':"
                               "'qemu-io -d /machine/peripheral/v%u/virtio-backend \\\"%s\\\"'}}",
                               disk, command));
}

static uint64_t now_ms(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void guest_write(struct guest *g)
{
    unsigned disk = (unsigned)(guest_random(g) % g->ndisks), cluster = (unsigned)(guest_random(g) % GUEST_NCLUSTERS);
    unsigned char pattern = guest_random(g) % 8 ? (unsigned char)(1 + guest_random(g) % 255) : 0;
    struct guest_disk *d = &g->disks[disk];
    uint64_t begun_ms;
    char command[64];

    if (pattern)
        (void)snprintf(command, sizeof(command), "write -P %u %uk 64k", pattern, cluster * (GUEST_CLUSTER / 1024));
    else
        (void)snprintf(command, sizeof(command), "write -z %uk 64k", cluster * (GUEST_CLUSTER / 1024));
    begun_ms = now_ms();
    io(g, disk, command);
    g->slowest_ms = MAX(g->slowest_ms, (unsigned)(now_ms() - begun_ms));
    g->nwrites++;
    d->now[cluster] = pattern;
    (g->frozen ? d->after : d->before)[cluster] = true;
}

/* What QEMU printed since the last look: qemu-io says on standard output what became of each request. */
static char *new_output(struct guest *g)
{
    off_t end = lseek(g->output, 0, SEEK_END);
    size_t length = (size_t)(end - g->output_at);
    char *text = calloc(1, length + 1);

    if (!text)
        die("out of memory");
    if (pread(g->output, text, length, g->output_at) != (ssize_t)length)
        die("QEMU's output cannot be read: %s", strerror(errno));
    g->output_at = (long)end;
    return text;
}

static unsigned count_of(const char *text, const char *what)
{
    unsigned n = 0;

    for (const char *p = text; (p = strstr(p, what)); p += strlen(what))
        n++;
    return n;
}

int guest_check_writes(struct guest *g, struct failure *f)
{
    _cleanup_free_ char *text = new_output(g);
    unsigned want = g->nwrites, n = count_of(text, "wrote 65536/65536 bytes");

    g->nwrites = 0;
    if (g->slowest_ms > GUEST_WRITE_MAX_MS)
        return failure_set(f, -ETIMEDOUT, "a write of the guest took %u ms", g->slowest_ms);
    return n == want ? 0 : failure_set(f, -EIO, "%u of the guest's %u writes succeeded: %s", n, want, text);
}

int guest_check_data(struct guest *g, struct failure *f)
{
    int r = guest_check_writes(g, f);

    if (r < 0)
        return r;
    for (unsigned i = 0; i < g->ndisks; i++) {
        for (unsigned c = 0; c < GUEST_NCLUSTERS; c++) {
            _cleanup_free_ char *text = NULL;
            char command[64];

            (void)snprintf(command, sizeof(command), "read -P %u %uk 64k", g->disks[i].now[c],
                           c * (GUEST_CLUSTER / 1024));
            io(g, i, command);
            text = new_output(g);
            if (!strstr(text, "read 65536/65536 bytes") || strstr(text, "failed"))
                return failure_set(f, -EILSEQ, "the guest reads something else on disk %u, cluster %u: %s", i, c, text);
        }
    }
    return 0;
}

/* -- checkpoints --------------------------------------------------------------------------------------------------- */

void guest_begin_run(struct guest *g)
{
    g->frozen = false;
    for (unsigned i = 0; i < g->ndisks; i++) {
        memset(g->disks[i].before, 0, sizeof(g->disks[i].before));
        memset(g->disks[i].after, 0, sizeof(g->disks[i].after));
        json_object_put(
            guest_call(g, NULL, "{'execute':'block-dirty-bitmap-clear','arguments':{'node':'d%u','name':'old'}}", i));
    }
}

void guest_freezes(struct guest *g)
{
    if (g->frozen)
        return;
    g->frozen = true;
    for (unsigned i = 0; i < g->ndisks; i++) {
        memcpy(g->disks[i].frozen, g->disks[i].now, sizeof(g->disks[i].now));
        json_object_put(guest_call(
            g, NULL, "{'execute':'block-dirty-bitmap-add','arguments':{'node':'d%u','name':'" GUEST_RECORD "'}}", i));
    }
}

static bool bitmap_count(struct guest *g, unsigned disk, const char *name, uint64_t *ret_count)
{
    struct json_object *nodes = guest_call(g, NULL, "{'execute':'query-named-block-nodes','arguments':{'flat':true}}");
    char node[8];
    bool found = false;

    (void)snprintf(node, sizeof(node), "d%u", disk);
    for (size_t i = 0; i < qmp_array_length(nodes); i++) {
        struct json_object *n = json_object_array_get_idx(nodes, i), *bitmaps = qmp_get(n, "dirty-bitmaps");

        if (strcmp(qmp_get_string(n, "node-name") ?: "", node) != 0)
            continue;
        for (size_t k = 0; k < qmp_array_length(bitmaps); k++) {
            struct json_object *b = json_object_array_get_idx(bitmaps, k);

            if (strcmp(qmp_get_string(b, "name") ?: "", name) == 0) {
                *ret_count = (uint64_t)qmp_get_int(b, "count");
                found = true;
            }
        }
    }
    json_object_put(nodes);
    return found;
}

int guest_check_checkpoint(struct guest *g, unsigned disk, bool *ret_exists, uint64_t *ret_surplus, struct failure *f)
{
    static const char name[] = GUEST_CHECKPOINT;
    uint64_t count = 0, both = 0, own = 0;
    unsigned nafter = 0;

    *ret_exists = bitmap_count(g, disk, name, &count);
    if (!*ret_exists)
        return 0;
    if (!bitmap_count(g, disk, GUEST_RECORD, &own))
        return failure_set(f, -EILSEQ, "disk %u has the checkpoint, but it was never frozen", disk);
    for (unsigned c = 0; c < GUEST_NCLUSTERS; c++)
        nafter += g->disks[disk].after[c];
    if (own != (uint64_t)nafter * GUEST_CLUSTER)
        die("the test's own record is wrong: %llu bytes for %u clusters", (unsigned long long)own, nafter);
    json_object_put(guest_call(
        g, NULL,
        "{'execute':'transaction','arguments':{'actions':["
        "{'type':'block-dirty-bitmap-add','data':{'node':'d%u','name':'test-both','disabled':true}},"
        "{'type':'block-dirty-bitmap-merge','data':{'node':'d%u','target':'test-both','bitmaps':['%s','" GUEST_RECORD
        "']}}]}}",
        disk, disk, name));
    (void)bitmap_count(g, disk, "test-both", &both);
    json_object_put(guest_call(
        g, NULL, "{'execute':'block-dirty-bitmap-remove','arguments':{'node':'d%u','name':'test-both'}}", disk));
    *ret_surplus = count - own;
    if (both != count)
        return failure_set(f, -EILSEQ,
                           "checkpoint '%s' of disk %u misses %llu bytes that were written since the freeze", name,
                           disk, (unsigned long long)(both - count));
    return 0;
}

void guest_end_run(struct guest *g)
{
    static const char name[] = GUEST_CHECKPOINT;
    uint64_t count;

    for (unsigned i = 0; i < g->ndisks; i++) {
        if (bitmap_count(g, i, GUEST_RECORD, &count))
            json_object_put(guest_call(
                g, NULL, "{'execute':'block-dirty-bitmap-remove','arguments':{'node':'d%u','name':'" GUEST_RECORD "'}}",
                i));
        if (bitmap_count(g, i, name, &count))
            json_object_put(guest_call(
                g, NULL, "{'execute':'block-dirty-bitmap-remove','arguments':{'node':'d%u','name':'%s'}}", i, name));
    }
}

/* -- somebody else's snapshots ------------------------------------------------------------------------------------- */

void guest_take_snapshots(struct guest *g)
{
    if (g->has_overlays)
        return;
    g->has_overlays = true;
    for (unsigned i = 0; i < g->ndisks; i++) {
        char command[160];

        (void)snprintf(command, sizeof(command),
                       "qemu-img create -q -f qcow2 -o backing_fmt=qcow2 -b d%u.qcow2 -u %s/overlay%u.qcow2 %llu", i,
                       g->dir, i, (unsigned long long)GUEST_SIZE);
        if (system(command) != 0)
            die("this failed: %s", command);
        json_object_put(
            guest_call(g, NULL,
                       "{'execute':'blockdev-add','arguments':{'driver':'qcow2','node-name':'overlay%u','backing':null,"
                       "'file':{'driver':'file','filename':'%s/overlay%u.qcow2'}}}",
                       i, g->dir, i));
        json_object_put(guest_call(
            g, NULL, "{'execute':'blockdev-snapshot','arguments':{'node':'d%u','overlay':'overlay%u'}}", i, i));
    }
}

static bool device_is_on(struct guest *g, unsigned disk, const char *node)
{
    struct json_object *devices = guest_call(g, NULL, "{'execute':'query-block'}");
    char qdev[64];
    bool is_on = false;

    (void)snprintf(qdev, sizeof(qdev), "/machine/peripheral/v%u/virtio-backend", disk);
    for (size_t i = 0; i < qmp_array_length(devices); i++) {
        struct json_object *d = json_object_array_get_idx(devices, i);

        is_on |= strcmp(qmp_get_string(d, "qdev") ?: "", qdev) == 0 &&
                 strcmp(qmp_get_string(qmp_get(d, "inserted"), "node-name") ?: "", node) == 0;
    }
    json_object_put(devices);
    return is_on;
}

static bool has_jobs(struct guest *g)
{
    struct json_object *jobs = guest_call(g, NULL, "{'execute':'query-jobs'}");
    bool any = qmp_array_length(jobs) > 0;

    json_object_put(jobs);
    return any;
}

/* An active commit has written everything below when it is ready; only then it lets itself be completed. */
static void commit(struct guest *g, unsigned disk)
{
    struct failure refusal;
    struct json_object *done = NULL;

    json_object_put(guest_call(
        g, NULL, "{'execute':'block-commit','arguments':{'job-id':'commit','device':'overlay%u','base-node':'d%u'}}",
        disk, disk));
    while (!done) {
        memset(&refusal, 0, sizeof(refusal));
        done = guest_call(g, &refusal, "{'execute':'job-complete','arguments':{'id':'commit'}}");
        nap();
    }
    json_object_put(done);
    while (has_jobs(g))
        nap();
}

int guest_undo_snapshots(struct guest *g, struct failure *f)
{
    if (!g->has_overlays)
        return 0;
    g->has_overlays = false;
    for (unsigned i = 0; i < g->ndisks; i++) {
        char overlay[24];

        (void)snprintf(overlay, sizeof(overlay), "overlay%u", i);
        if (!device_is_on(g, i, overlay))
            return failure_set(f, -ESTALE, "disk %u does not stand on the overlay that somebody put there", i);
        commit(g, i);
        json_object_put(guest_call(g, NULL, "{'execute':'blockdev-del','arguments':{'node-name':'overlay%u'}}", i));
    }
    return 0;
}

bool guest_runs(struct guest *g)
{
    struct json_object *status = guest_call(g, NULL, "{'execute':'query-status'}");
    bool runs = qmp_get_bool(status, "running");

    json_object_put(status);
    return runs;
}
