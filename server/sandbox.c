/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "sandbox.h"
#include "backup/state_file.h"
#include "sandbox_calls.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <linux/landlock.h>
#include <sched.h>
#include <seccomp.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define HAS_CHECKERS true
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define HAS_CHECKERS true
#endif
#endif
#ifndef HAS_CHECKERS
#define HAS_CHECKERS false
#endif

/* -- system calls -------------------------------------------------------------------------------------------------- */
/*
 * What is not allowed does not exist, as on an older kernel: libraries that try something new go back to what they did
 * before, where EPERM would be an error to them, and a signal the end of all sessions.
 */
#define UNKNOWN SCMP_ACT_ERRNO(ENOSYS)
#define FOREIGN SCMP_ACT_ERRNO(EAFNOSUPPORT) /* what socket() says of families that are not there */

#define NEW_NAMESPACES \
    (CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUSER | CLONE_NEWUTS)
#define WRITE_AND_EXECUTE (PROT_WRITE | PROT_EXEC)

static bool is_needed(enum sandbox_need need, const struct sandbox_config *c)
{
    switch (need) {
    case FOR_ALL:
        return true;
    case FOR_PROGRAMS:
        return c->starts_itself || c->opens_images;
    case FOR_IMAGES:
        return c->opens_images;
    case FOR_CHECKERS:
        return HAS_CHECKERS;
    }
    return false;
}

static int allow_listed(scmp_filter_ctx filter, const struct sandbox_config *c)
{
    int r = 0;

    for (size_t i = 0; r == 0 && i < ARRAY_SIZE(sandbox_calls); i++) {
        int number = seccomp_syscall_resolve_name(sandbox_calls[i].name);

        if (number >= 0 && is_needed(sandbox_calls[i].need, c))
            r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, number, 0);
        if (r == -EEXIST) /* another reason has it, too */
            r = 0;
    }
    return r;
}

static int allow_sockets(scmp_filter_ctx filter, bool foreign)
{
    int r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(socket), 1, SCMP_A0_32(SCMP_CMP_EQ, AF_UNIX));

    /* Layers of images may be on other machines. Our own TCP listeners are open by now. */
    for (int i = 0; foreign && r == 0 && i < 2; i++)
        r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(socket), 1,
                             SCMP_A0_32(SCMP_CMP_EQ, i ? AF_INET6 : AF_INET));
    if (r == 0)
        r = seccomp_rule_add(filter, FOREIGN, SCMP_SYS(socket), 1,
                             SCMP_A0_32(SCMP_CMP_GT, foreign ? AF_INET6 : AF_UNIX));
    return r;
}

/* Calls that exist with some arguments only. clone3() has its own in memory, where no filter sees them: glibc takes
 * clone() where it does not exist. */
static int allow_with_conditions(scmp_filter_ctx filter, const struct sandbox_config *c)
{
    static const unsigned ioctls[] = {FIONBIO, FIOCLEX, FIONREAD, TCGETS, TIOCGWINSZ};
    int r =
        seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(clone), 1, SCMP_A0_32(SCMP_CMP_MASKED_EQ, NEW_NAMESPACES, 0));

    /* Memory is never both written and run; of a library that is loaded late (names of users) only the second. */
    if (r == 0)
        r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mmap), 1,
                             SCMP_A2_32(SCMP_CMP_MASKED_EQ, WRITE_AND_EXECUTE, PROT_WRITE));
    if (r == 0)
        r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mmap), 1,
                             SCMP_A2_32(SCMP_CMP_MASKED_EQ, WRITE_AND_EXECUTE, PROT_EXEC));
    if (r == 0)
        r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mmap), 1,
                             SCMP_A2_32(SCMP_CMP_MASKED_EQ, WRITE_AND_EXECUTE, 0));
    if (r == 0)
        r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mprotect), 1,
                             SCMP_A2_32(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
    if (r == 0 && c->opens_images) /* of disks and of file systems: QEMU's own affair */
        return seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(ioctl), 0);
    for (size_t i = 0; r == 0 && i < ARRAY_SIZE(ioctls); i++)
        r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(ioctl), 1, SCMP_A1_32(SCMP_CMP_EQ, ioctls[i]));
    return r;
}

static int filter_calls(const struct sandbox_config *c)
{
    scmp_filter_ctx filter = seccomp_init(UNKNOWN);
    int r;

    if (!filter)
        return -ENOMEM;
    /* Calls of another machine's table, as int 0x80 makes them, end the process (libseccomp's default). */
    r = seccomp_attr_set(filter, SCMP_FLTATR_CTL_NNP, 1);
    if (r == 0)
        r = seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2); /* a tree, not a line */
    if (r == 0)
        r = allow_listed(filter, c);
    if (r == 0)
        r = allow_sockets(filter, c->opens_images);
    if (r == 0)
        r = allow_with_conditions(filter, c);
    if (r == 0)
        r = seccomp_load(filter);
    seccomp_release(filter);
    return r;
}

static int refuse_rings(void)
{
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
    int r;

    if (!filter)
        return -ENOMEM;
    r = seccomp_attr_set(filter, SCMP_FLTATR_CTL_NNP, 1);
    if (r == 0)
        r = seccomp_rule_add(filter, UNKNOWN, SCMP_SYS(io_uring_setup), 0);
    if (r == 0)
        r = seccomp_load(filter);
    seccomp_release(filter);
    return r;
}

/* -- files --------------------------------------------------------------------------------------------------------- */
/* linux/landlock.h of Debian 12 ends with ABI 2. */
#define RIGHT_TRUNCATE (1ull << 14)     /* ABI 3 */
#define RIGHT_IOCTL_DEVICE (1ull << 15) /* ABI 5 */
#define NET_BIND_TCP (1ull << 0)        /* ABI 4 */
#define NET_CONNECT_TCP (1ull << 1)
#define SCOPE_SIGNAL (1ull << 1) /* ABI 6 */

struct ruleset {
    uint64_t files, net, scoped;
};

/* Reading, and removing a file, are left to the rights of the user: where disks' layers are only QEMU knows, and we
 * look at them (sync, lineage) and delete what a commit has merged. */
#define MAKING                                                                                  \
    (LANDLOCK_ACCESS_FS_MAKE_REG | LANDLOCK_ACCESS_FS_MAKE_DIR | LANDLOCK_ACCESS_FS_MAKE_SOCK | \
     LANDLOCK_ACCESS_FS_REMOVE_DIR | LANDLOCK_ACCESS_FS_REFER)
#define MAKING_ELSE                                                                                \
    (LANDLOCK_ACCESS_FS_MAKE_CHAR | LANDLOCK_ACCESS_FS_MAKE_BLOCK | LANDLOCK_ACCESS_FS_MAKE_FIFO | \
     LANDLOCK_ACCESS_FS_MAKE_SYM)
#define WRITING (LANDLOCK_ACCESS_FS_WRITE_FILE | RIGHT_TRUNCATE)
#define ALL_HANDLED (LANDLOCK_ACCESS_FS_EXECUTE | WRITING | MAKING | MAKING_ELSE | RIGHT_IOCTL_DEVICE)
#define FIRST_REFER 2
#define FIRST_TRUNCATE 3
#define FIRST_NET 4
#define FIRST_IOCTL 5
#define FIRST_SCOPED 6

static struct ruleset ruleset_for(int abi)
{
    struct ruleset r = {.files = ALL_HANDLED, .net = NET_BIND_TCP | NET_CONNECT_TCP, .scoped = SCOPE_SIGNAL};

    if (abi < FIRST_SCOPED)
        r.scoped = 0;
    if (abi < FIRST_IOCTL)
        r.files &= ~RIGHT_IOCTL_DEVICE;
    if (abi < FIRST_NET)
        r.net = 0;
    if (abi < FIRST_TRUNCATE)
        r.files &= ~RIGHT_TRUNCATE;
    if (abi < FIRST_REFER)
        r.files &= ~(uint64_t)LANDLOCK_ACCESS_FS_REFER;
    return r;
}

static size_t ruleset_size(int abi)
{
    return abi < FIRST_NET      ? offsetof(struct ruleset, net)
           : abi < FIRST_SCOPED ? offsetof(struct ruleset, scoped)
                                : sizeof(struct ruleset);
}

static int allow_below(int ruleset, const char *path, uint64_t rights, struct failure *f)
{
    _cleanup_fd_ int fd = open(path, O_PATH | O_CLOEXEC);
    struct landlock_path_beneath_attr rule = {.allowed_access = rights, .parent_fd = fd};

    if (fd < 0)
        return failure_set(f, -errno, "landlock: %s: %s", path, strerror(errno));
    if (syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) < 0)
        return failure_set(f, -errno, "landlock: a rule for %s: %s", path, strerror(errno));
    return 0;
}

/* The first object is the program; its header names the interpreter that the kernel starts with it. */
static int find_interpreter(struct dl_phdr_info *info, size_t size, void *arg)
{
    const char **ret_path = arg;

    for (size_t i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_INTERP)
            *ret_path = (const char *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    return 1;
}

static int allow_files(int ruleset, const struct sandbox_config *c, uint64_t handled, struct failure *f)
{
    const char *interpreter = NULL;
    int r = allow_below(ruleset, "/dev/null", handled & WRITING, f); /* what children have for stdin and stdout */

    for (size_t i = 0; r == 0 && i < c->ndirs; i++)
        r = allow_below(ruleset, c->dirs[i], handled & (WRITING | MAKING), f);
    if (r == 0 && HAS_CHECKERS) /* they start a program that knows names of functions */
        return allow_below(ruleset, "/", LANDLOCK_ACCESS_FS_EXECUTE, f);
    if (r < 0 || !c->starts_itself)
        return r;
    (void)dl_iterate_phdr(find_interpreter, &interpreter);
    r = allow_below(ruleset, "/proc/self/exe", LANDLOCK_ACCESS_FS_EXECUTE, f);
    return r == 0 && interpreter ? allow_below(ruleset, interpreter, LANDLOCK_ACCESS_FS_EXECUTE, f) : r;
}

/* The ABI, or negative errno: this kernel has none. */
static int limit_files(const struct sandbox_config *c, struct failure *f)
{
    int abi = (int)syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
    struct ruleset attr;
    _cleanup_fd_ int fd = -1;

    if (abi < 1)
        return abi < 0 ? -errno : -EOPNOTSUPP;
    attr = ruleset_for(abi);
    fd = (int)syscall(SYS_landlock_create_ruleset, &attr, ruleset_size(abi), 0);
    if (fd < 0)
        return failure_set(f, -errno, "landlock: a set of rules (ABI %d): %s", abi, strerror(errno));
    if (allow_files(fd, c, attr.files, f) < 0)
        return f->err;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || syscall(SYS_landlock_restrict_self, fd, 0) < 0)
        return failure_set(f, -errno, "landlock: %s", strerror(errno));
    return abi;
}

/* -- both ---------------------------------------------------------------------------------------------------------- */
void sandbox_prepare(enum sandbox_mode mode)
{
    if (mode != SANDBOX_OFF)
        (void)refuse_rings();
}

int sandbox_enter(const struct sandbox_config *c, char text[SANDBOX_TEXT_MAX], struct failure *f)
{
    char files[SANDBOX_TEXT_MAX / 2];
    int r;

    (void)snprintf(text, SANDBOX_TEXT_MAX, "off");
    if (c->mode == SANDBOX_OFF)
        return 0;
    /* First the files: their calls are on no list. Images may be anywhere, and qemu-storage-daemon writes to them. */
    r = c->opens_images ? 0 : limit_files(c, f);
    if (f->err)
        return f->err;
    if (r > 0)
        (void)snprintf(files, sizeof files, "files are written in %zu directories only (landlock, ABI %d)", c->ndirs,
                       r);
    else if (r == 0)
        (void)snprintf(files, sizeof files, "files are not limited, as images are served");
    else
        (void)snprintf(files, sizeof files, "files are not limited: this kernel has no landlock (%s)", strerror(-r));
    if (r < 0 && c->mode == SANDBOX_REQUIRE)
        return failure_set(f, r, "--sandbox require: %s", files);
    r = filter_calls(c);
    if (r < 0 && c->mode == SANDBOX_REQUIRE)
        return failure_set(f, r, "--sandbox require: system calls cannot be limited: %s", strerror(-r));
    if (r < 0)
        (void)snprintf(text, SANDBOX_TEXT_MAX, "system calls are not limited (%s); %s", strerror(-r), files);
    else
        (void)snprintf(text, SANDBOX_TEXT_MAX, "system calls are limited (seccomp); %s", files);
    return 0;
}
