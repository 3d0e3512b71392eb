/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * init: the whole user space of the test guest. Loads the modules named in $qpull_modules (an unknown kernel parameter
 * becomes init's environment), then answers commands on the virtio-serial port "qpull.cmd": one line each, answered by
 * one line "ok …" or "err …". The commands stand in the table at the end; tests/qemu/harness.py is the other side.
 */
#include "files.h"
#include "load.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <linux/reboot.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PORT_NAME "qpull.cmd"
#define AGENT_PORT_NAME "org.qemu.guest_agent.0"
#define AGENT_PROGRAM "/usr/sbin/qemu-ga" /* where tests/guest/build has put it */
#define MAX_LINE 512
#define MAX_WORDS 32
#define CHUNK (1u << 20)      /* longest single read or write of a command */
#define DISK_WAIT_US 5000000  /* hotplug and the SCSI scan are asynchronous */
#define PORT_WAIT_US 20000000 /* under emulation on a busy host */
#define POLL_US 5000
#define VPD_HEADER 4 /* bytes before the serial number in SCSI page 0x80, SPC-4 7.8.16 */

static pthread_mutex_t error_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t nerrors;
static char first_error[MAX_LINE / 2];

void error_note(const char *disk, const char *what, uint64_t offset, int error)
{
    pthread_mutex_lock(&error_lock);
    if (nerrors++ == 0)
        snprintf(first_error, sizeof(first_error), "%s of %s at %" PRIu64 ": %s", what, disk, offset, strerror(-error));
    pthread_mutex_unlock(&error_lock);
}

void error_report(char *answer, size_t len)
{
    pthread_mutex_lock(&error_lock);
    snprintf(answer, len, "%" PRIu64 " %s", nerrors, first_error);
    pthread_mutex_unlock(&error_lock);
}

static _Noreturn void die(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fprintf(stderr, "qpull-guest: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    reboot(LINUX_REBOOT_CMD_POWER_OFF);
    _exit(1);
}

/* Bytes of a small file, without the line end; 0 if there are none. */
static size_t file_read(const char *path, char *buf, size_t len)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n;

    if (fd < 0)
        return 0;
    n = read(fd, buf, len - 1);
    close(fd);
    if (n < 0)
        n = 0;
    while (n > 0 && (buf[n - 1] == '\n' || buf[n - 1] == ' '))
        n--;
    buf[n] = '\0';
    return (size_t)n;
}

/* virtio-blk shows its serial as a file, SCSI disks in a page with a binary header. */
static bool disk_is(const char *dev, const char *name)
{
    char path[PATH_MAX], text[MAX_LINE];
    size_t n;

    snprintf(path, sizeof(path), "/sys/block/%s/serial", dev);
    if (file_read(path, text, sizeof(text)) > 0 && strcmp(text, name) == 0)
        return true;
    snprintf(path, sizeof(path), "/sys/block/%s/device/serial", dev); /* nvme */
    if (file_read(path, text, sizeof(text)) > 0 && strcmp(text, name) == 0)
        return true;
    snprintf(path, sizeof(path), "/sys/block/%s/device/vpd_pg80", dev);
    n = file_read(path, text, sizeof(text));
    return n > VPD_HEADER && strcmp(text + VPD_HEADER, name) == 0;
}

static bool disk_find(const char *name, char *path, size_t len)
{
    struct dirent *entry;
    bool found = false;
    DIR *dir = opendir("/sys/block");

    while (dir && !found && (entry = readdir(dir)) != NULL) {
        if (entry->d_name[0] == '.' || !disk_is(entry->d_name, name))
            continue;
        found = snprintf(path, len, "/dev/%s", entry->d_name) < (int)len && access(path, F_OK) == 0;
    }
    if (dir)
        closedir(dir);
    return found;
}

/* The kernel shows a new disk in sysfs and /dev a moment before the device behind them can be opened. */
static bool is_coming(int error)
{
    return error == ENXIO || error == ENOENT;
}

int disk_open(const char *name, uint64_t *ret_size)
{
    uint64_t end = now_us() + DISK_WAIT_US;
    char path[PATH_MAX];
    int fd = -1, error;

    for (;;) {
        error = ENODEV;
        if (disk_find(name, path, sizeof(path))) {
            fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
            error = errno;
            if (fd >= 0 || !is_coming(error))
                break;
        }
        if (now_us() > end)
            break;
        usleep(POLL_US);
    }
    if (fd < 0)
        return -error;
    if (ioctl(fd, BLKGETSIZE64, ret_size) < 0) {
        error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

struct command {
    char *words[MAX_WORDS];
    unsigned nwords;
    char answer[MAX_LINE];
};

static int refuse(struct command *c, int error, const char *why)
{
    snprintf(c->answer, sizeof(c->answer), "%s: %s", why, strerror(-error));
    return error;
}

static bool number(const char *text, uint64_t *ret_value)
{
    char *end;

    errno = 0;
    *ret_value = strtoull(text, &end, 0);
    return errno == 0 && end != text && *end == '\0';
}

/* Value of key=… among the words; the default where it does not stand. A bad number counts as not there. */
static uint64_t option(const struct command *c, const char *key, uint64_t otherwise)
{
    size_t len = strlen(key);
    uint64_t value;

    for (unsigned i = 0; i < c->nwords; i++) {
        if (strncmp(c->words[i], key, len) == 0 && c->words[i][len] == '=' && number(c->words[i] + len + 1, &value))
            return value;
    }
    return otherwise;
}

static int cmd_ping(struct command *c)
{
    snprintf(c->answer, sizeof(c->answer), "%s", c->nwords > 1 ? c->words[1] : "");
    return 0;
}

static int cmd_size(struct command *c)
{
    uint64_t size;
    int fd = disk_open(c->words[1], &size);

    if (fd < 0)
        return refuse(c, fd, "cannot open the disk");
    close(fd);
    snprintf(c->answer, sizeof(c->answer), "%" PRIu64, size);
    return 0;
}

struct area_job {
    int fd;
    uint8_t *buf;
    uint64_t seed, sum;
};

static int piece_write(struct area_job *j, uint64_t offset, size_t len)
{
    pattern_fill(j->buf, j->seed, offset, len);
    return pwrite(j->fd, j->buf, len, (off_t)offset) == (ssize_t)len ? 0 : -EIO;
}

static int piece_sum(struct area_job *j, uint64_t offset, size_t len)
{
    if (pread(j->fd, j->buf, len, (off_t)offset) != (ssize_t)len)
        return -EIO;
    j->sum = pattern_sum(j->buf, len, j->sum);
    return 0;
}

static int piece_verify(struct area_job *j, uint64_t offset, size_t len)
{
    if (pread(j->fd, j->buf, len, (off_t)offset) != (ssize_t)len)
        return -EIO;
    return pattern_matches(j->buf, j->seed, offset, len) ? 0 : -EILSEQ;
}

static int piece_zero(struct area_job *j, uint64_t offset, size_t len)
{
    return disk_zero(j->fd, offset, len);
}

static int piece_discard(struct area_job *j, uint64_t offset, size_t len)
{
    return disk_discard(j->fd, offset, len);
}

/* DISK OFFSET LEN [SEED], done in pieces; answers with the microseconds it took. */
static int area_do(struct command *c, int (*piece)(struct area_job *, uint64_t, size_t), struct area_job *j)
{
    uint64_t offset, len, size, start = now_us();
    void *buf = NULL;
    int error = 0;

    if (!number(c->words[2], &offset) || !number(c->words[3], &len) || offset % SECTOR || len % SECTOR)
        return refuse(c, -EINVAL, "offset and length are multiples of 512");
    if (c->nwords > 4 && !number(c->words[4], &j->seed))
        return refuse(c, -EINVAL, "seed");
    j->fd = disk_open(c->words[1], &size);
    if (j->fd < 0)
        return refuse(c, j->fd, "cannot open the disk");
    if (posix_memalign(&buf, IO_ALIGN, CHUNK) != 0)
        error = -ENOMEM;
    j->buf = buf;
    while (!error && len > 0) {
        size_t n = len < CHUNK ? len : CHUNK;

        error = piece(j, offset, n);
        if (error)
            break;
        offset += n;
        len -= n;
    }
    free(buf);
    close(j->fd);
    if (error) {
        error_note(c->words[1], c->words[0], offset, error);
        return refuse(c, error, c->words[0]);
    }
    snprintf(c->answer, sizeof(c->answer), "us=%" PRIu64, now_us() - start);
    return 0;
}

static int cmd_write(struct command *c)
{
    return area_do(c, piece_write, &(struct area_job){0});
}

static int cmd_verify(struct command *c)
{
    return area_do(c, piece_verify, &(struct area_job){0});
}

static int cmd_zero(struct command *c)
{
    return area_do(c, piece_zero, &(struct area_job){0});
}

static int cmd_discard(struct command *c)
{
    return area_do(c, piece_discard, &(struct area_job){0});
}

static int cmd_sum(struct command *c)
{
    struct area_job j = {0};
    int error = area_do(c, piece_sum, &j);

    if (!error)
        snprintf(c->answer, sizeof(c->answer), "%" PRIu64, j.sum);
    return error;
}

static int cmd_flush(struct command *c)
{
    uint64_t size;
    int error = 0, fd = disk_open(c->words[1], &size);

    if (fd < 0)
        return refuse(c, fd, "cannot open the disk");
    if (fsync(fd) < 0)
        error = -errno;
    close(fd);
    if (error) {
        error_note(c->words[1], "flush", 0, error);
        return refuse(c, error, "flush");
    }
    c->answer[0] = '\0';
    return 0;
}

static int cmd_load(struct command *c)
{
    static const char *const kinds[] = {"write", "zero", "discard", "read", "flush"};
    const char *disk = c->words[2];
    struct load_plan plan = {0};
    char *answer = c->answer;

    _Static_assert(sizeof(kinds) / sizeof(kinds[0]) == LOAD_NKINDS, "one name per kind");
    if (strcmp(c->words[1], "status") == 0)
        return load_status(disk, answer, sizeof(c->answer));
    if (strcmp(c->words[1], "stop") == 0 || strcmp(c->words[1], "wait") == 0)
        return load_stop(disk, c->words[1][0] == 'w', answer, sizeof(c->answer));
    if (strcmp(c->words[1], "start") != 0)
        return refuse(c, -EINVAL, "load start|status|wait|stop");
    for (unsigned i = 3; i < c->nwords; i++) {
        for (unsigned kind = 0; kind < LOAD_NKINDS; kind++) {
            if (strcmp(c->words[i], kinds[kind]) == 0)
                plan.kinds |= 1u << kind;
        }
    }
    plan.seed = option(c, "seed", 0);
    plan.from = option(c, "from", 0);
    plan.size = option(c, "size", 0);
    plan.unit = (uint32_t)option(c, "unit", 4096);
    plan.max = (uint32_t)option(c, "max", 65536);
    return load_start(disk, &plan, option(c, "limit", 0), (uint32_t)option(c, "pause-us", 0), answer,
                      sizeof(c->answer));
}

static int cmd_order(struct command *c)
{
    unsigned ndisks = 0;

    if (strcmp(c->words[1], "status") == 0)
        return order_status(c->answer, sizeof(c->answer));
    if (strcmp(c->words[1], "stop") == 0)
        return order_stop(c->answer, sizeof(c->answer));
    if (strcmp(c->words[1], "start") != 0)
        return refuse(c, -EINVAL, "order start|status|stop");
    while (2 + ndisks < c->nwords && !strchr(c->words[2 + ndisks], '='))
        ndisks++;
    return order_start(c->words + 2, ndisks, option(c, "seed", 0), option(c, "at", 0),
                       (uint32_t)option(c, "block", 4096), (uint32_t)option(c, "ring", 256), c->answer,
                       sizeof(c->answer));
}

static int cmd_errors(struct command *c)
{
    error_report(c->answer, sizeof(c->answer));
    return 0;
}

static int cmd_poweroff(struct command *c)
{
    reboot(LINUX_REBOOT_CMD_POWER_OFF);
    return refuse(c, -errno, "poweroff");
}

static int cmd_reboot(struct command *c)
{
    reboot(LINUX_REBOOT_CMD_RESTART);
    return refuse(c, -errno, "reboot");
}

static bool port_find(const char *wanted, char *path, size_t len)
{
    char file[PATH_MAX], name[MAX_LINE];
    struct dirent *entry;
    bool found = false;
    DIR *dir = opendir("/sys/class/virtio-ports");

    while (dir && !found && (entry = readdir(dir)) != NULL) {
        snprintf(file, sizeof(file), "/sys/class/virtio-ports/%s/name", entry->d_name);
        if (file_read(file, name, sizeof(name)) > 0 && strcmp(name, wanted) == 0)
            found = snprintf(path, len, "/dev/%s", entry->d_name) < (int)len;
    }
    if (dir)
        closedir(dir);
    return found;
}

static pid_t agent;

static int agent_start(struct command *c)
{
    char path[PATH_MAX];

    if (!port_find(AGENT_PORT_NAME, path, sizeof(path)))
        return refuse(c, -ENOENT, "no port " AGENT_PORT_NAME);
    mkdir("/run", 0755);
    agent = fork();
    if (agent == 0) {
        execl(AGENT_PROGRAM, AGENT_PROGRAM, "-m", "virtio-serial", "-p", path, "-t", "/run", (char *)NULL);
        _exit(127);
    }
    return agent < 0 ? refuse(c, -errno, "fork") : 0;
}

static int cmd_agent(struct command *c)
{
    static const struct {
        const char *name;
        int signal;
    } signals[] = {{"hang", SIGSTOP}, {"wake", SIGCONT}, {"kill", SIGKILL}};

    c->answer[0] = '\0';
    if (strcmp(c->words[1], "start") == 0)
        return agent_start(c);
    for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++) {
        if (strcmp(c->words[1], signals[i].name) != 0 || agent <= 0)
            continue;
        if (kill(agent, signals[i].signal) < 0)
            return refuse(c, -errno, "the agent");
        if (signals[i].signal == SIGKILL)
            waitpid(agent, NULL, 0);
        return 0;
    }
    return refuse(c, -EINVAL, "agent start|hang|wake|kill, in this order");
}

static int cmd_mount(struct command *c)
{
    uint64_t size;
    char path[PATH_MAX];
    int fd = disk_open(c->words[1], &size);

    if (fd < 0)
        return refuse(c, fd, "cannot open the disk");
    close(fd);
    mkdir(FILES_DIR, 0755);
    if (!disk_find(c->words[1], path, sizeof(path)) || mount(path, FILES_DIR, "ext4", 0, NULL) < 0)
        return refuse(c, -errno, "mount");
    c->answer[0] = '\0';
    return 0;
}

static int cmd_files(struct command *c)
{
    if (strcmp(c->words[1], "status") == 0)
        return files_status(c->answer, sizeof(c->answer));
    if (strcmp(c->words[1], "start") == 0)
        return files_start(c->answer, sizeof(c->answer));
    return refuse(c, -EINVAL, "files start|status");
}

static const struct {
    const char *name;
    unsigned nwords; /* at least, with the name */
    int (*run)(struct command *c);
} commands[] = {
    {"ping", 1, cmd_ping},       /* [TEXT]: answers TEXT */
    {"size", 2, cmd_size},       /* DISK: bytes */
    {"write", 5, cmd_write},     /* DISK OFFSET LEN SEED: the pattern */
    {"verify", 5, cmd_verify},   /* likewise: is the pattern there? */
    {"zero", 4, cmd_zero},       /* DISK OFFSET LEN */
    {"discard", 4, cmd_discard}, /* DISK OFFSET LEN */
    {"sum", 4, cmd_sum},         /* DISK OFFSET LEN: pattern_sum() */
    {"flush", 2, cmd_flush},     /* DISK */
    {"load", 3,
     cmd_load}, /* start DISK KIND… [seed= from= size= unit= max= limit= pause-us=] | status|wait|stop DISK */
    {"order", 2, cmd_order},       /* start DISK… [seed= at= block= ring=] | status | stop */
    {"agent", 2, cmd_agent},       /* start | hang | wake | kill */
    {"mount", 2, cmd_mount},       /* DISK: ext4, at FILES_DIR */
    {"files", 2, cmd_files},       /* start | status */
    {"errors", 1, cmd_errors},     /* failed operations since boot, and the first one */
    {"poweroff", 1, cmd_poweroff}, /* no answer */
    {"reboot", 1, cmd_reboot},     /* no answer */
};

static void command_run(char *line, int port)
{
    struct command c = {0};
    char reply[MAX_LINE + 8], *save;
    int error = -EINVAL, n;

    for (char *w = strtok_r(line, " \r", &save); w && c.nwords < MAX_WORDS; w = strtok_r(NULL, " \r", &save))
        c.words[c.nwords++] = w;
    if (c.nwords == 0)
        return;
    snprintf(c.answer, sizeof(c.answer), "unknown command or too few words");
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        if (strcmp(commands[i].name, c.words[0]) != 0 || c.nwords < commands[i].nwords)
            continue;
        error = commands[i].run(&c);
        break;
    }
    n = snprintf(reply, sizeof(reply), "%s %s\n", error ? "err" : "ok", c.answer);
    if (write(port, reply, (size_t)n) != n)
        die("cannot answer: %s", strerror(errno));
}

static void module_load(const char *name)
{
    char list[MAX_LINE * 8] = "", path[PATH_MAX], *save;

    snprintf(path, sizeof(path), "/modules/%s.order", name);
    if (access(path, F_OK) < 0)
        die("no module %s in this initramfs", name);
    (void)file_read(path, list, sizeof(list)); /* empty: built into this kernel */
    for (char *file = strtok_r(list, "\n", &save); file; file = strtok_r(NULL, "\n", &save)) {
        int fd;

        snprintf(path, sizeof(path), "/modules/%s", file);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            die("cannot load %s: %s", file, strerror(errno));
        close(fd);
    }
}

static int port_open(void)
{
    uint64_t end = now_us() + PORT_WAIT_US;
    char path[PATH_MAX];
    int fd;

    while (!port_find(PORT_NAME, path, sizeof(path)) || (fd = open(path, O_RDWR | O_CLOEXEC)) < 0) {
        if (now_us() > end)
            die("no virtio-serial port " PORT_NAME);
        usleep(POLL_US);
    }
    return fd;
}

static void serve(int port)
{
    char line[MAX_LINE];
    size_t have = 0;

    for (;;) {
        ssize_t n = read(port, line + have, sizeof(line) - 1 - have);
        char *end;

        if (n <= 0) { /* nobody at the host's end */
            usleep(POLL_US);
            continue;
        }
        have += (size_t)n;
        line[have] = '\0';
        while ((end = strchr(line, '\n')) != NULL) {
            *end = '\0';
            command_run(line, port);
            have -= (size_t)(end + 1 - line);
            memmove(line, end + 1, have + 1);
        }
        if (have == sizeof(line) - 1)
            die("a command of more than %zu bytes", have);
    }
}

int main(void)
{
    char *modules = getenv("qpull_modules"), *save;

    mkdir("/dev", 0755);
    mkdir("/sys", 0755);
    mkdir("/proc", 0755);
    if (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) < 0 && errno != EBUSY)
        die("devtmpfs: %s", strerror(errno));
    if (mount("sysfs", "/sys", "sysfs", 0, NULL) < 0 || mount("proc", "/proc", "proc", 0, NULL) < 0)
        die("sysfs, proc: %s", strerror(errno));
    for (char *m = modules ? strtok_r(modules, ",", &save) : NULL; m; m = strtok_r(NULL, ",", &save))
        module_load(m);
    serve(port_open());
    return 0;
}
