/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "reach.h"

#include "backup/state_file.h"
#include "qmp/base.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define COMMAND_MAX (128u << 10) /* bytes of a command line that are looked at: libvirt's have some 10 KiB */
#define SELINUX_TYPE 2           /* colons before the type in user:role:type:level */

/* -- processes ----------------------------------------------------------------------------------------------------- */
static ssize_t read_proc(pid_t pid, const char *name, char *to, size_t size)
{
    char path[64];
    _cleanup_fd_ int fd = -1;
    size_t used = 0;

    if (pid)
        (void)snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    else
        (void)snprintf(path, sizeof path, "/proc/self/%s", name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && used < size - 1) {
        ssize_t n = read(fd, to + used, size - 1 - used);

        if (n <= 0)
            break;
        used += (size_t)n;
    }
    to[used] = 0;
    return (ssize_t)used;
}

void reach_label(pid_t pid, char label[REACH_LABEL_MAX])
{
    (void)read_proc(pid, "attr/current", label, REACH_LABEL_MAX);
    label[strcspn(label, "\n")] = 0;
}

static bool is_selinux(const char *label)
{
    const char *role = strchr(label, ':');

    return role && strchr(role + 1, ':');
}

static const char *module_of(const char *label)
{
    return is_selinux(label) ? "SELinux label" : "AppArmor profile";
}

void reach_describe(pid_t pid, char text[REACH_TEXT_MAX])
{
    char label[REACH_LABEL_MAX], path[32];
    struct stat st;

    (void)snprintf(path, sizeof path, "/proc/%d", (int)pid);
    reach_label(pid, label);
    if (stat(path, &st) < 0)
        (void)snprintf(text, REACH_TEXT_MAX, "%s", strerror(errno));
    else
        (void)snprintf(text, REACH_TEXT_MAX, "user %d, %s%s%s", (int)st.st_uid, *label ? module_of(label) : "no label",
                       *label ? " " : "", label);
}

/* Who was told that path on its command line, if anybody may be seen that was: libvirt and people do it so. */
static pid_t find_owner(const char *path)
{
    DIR *proc = opendir("/proc");
    char *words = malloc(COMMAND_MAX);
    pid_t found = 0;
    const struct dirent *e;

    for (unsigned n = 0; proc && words && !found && n < REACH_PROCESSES && (e = readdir(proc)); n++) {
        pid_t pid = isdigit((unsigned char)*e->d_name) ? (pid_t)strtol(e->d_name, NULL, 10) : 0;
        ssize_t len = pid > 0 && pid != getpid() ? read_proc(pid, "cmdline", words, COMMAND_MAX) : 0;

        if (len > 0 && memmem(words, (size_t)len, path, strlen(path)) && memmem(words, (size_t)len, "qemu", 4))
            found = pid;
    }
    if (proc)
        (void)closedir(proc);
    free(words);
    return found;
}

/* -- rights -------------------------------------------------------------------------------------------------------- */
static void name_user(uid_t uid, char *to, size_t size)
{
    struct passwd entry, *found = NULL;
    char room[1024];

    if (getpwuid_r(uid, &entry, room, sizeof room, &found) == 0 && found)
        (void)snprintf(to, size, "%s (%u)", found->pw_name, (unsigned)uid);
    else
        (void)snprintf(to, size, "%u", (unsigned)uid);
}

static void name_group(gid_t gid, char *to, size_t size)
{
    struct group entry, *found = NULL;
    char room[4096]; /* one with very many members is a number */

    if (getgrgid_r(gid, &entry, room, sizeof room, &found) == 0 && found)
        (void)snprintf(to, size, "%s (%u)", found->gr_name, (unsigned)gid);
    else
        (void)snprintf(to, size, "%u", (unsigned)gid);
}

static bool in_group(gid_t gid)
{
    gid_t groups[256];
    int n = getgroups((int)ARRAY_SIZE(groups), groups);

    for (int i = 0; i < n; i++)
        if (groups[i] == gid)
            return true;
    return getegid() == gid;
}

/* right: 1 to search a directory, 2 to write to a socket, as one of the three digits of a mode has it. */
static void explain_mode(const char *path, unsigned right, char *text, char *advice)
{
    const char *verb = right == 1 ? "search the directory" : "write to the socket";
    char user[64], owner[64], group[64];
    struct stat st;
    bool by_group;

    name_user(geteuid(), user, sizeof user);
    if (stat(path, &st) < 0) {
        (void)snprintf(text, REACH_TEXT_MAX, "'%s': %s", path, strerror(errno));
        (void)snprintf(advice, REACH_TEXT_MAX, "correct the path of its QMP socket (--vm, qmp=)");
        return;
    }
    name_user(st.st_uid, owner, sizeof owner);
    name_group(st.st_gid, group, sizeof group);
    by_group = st.st_mode & (right << 3);
    (void)snprintf(text, REACH_TEXT_MAX, "qpulld's user %s may not %s '%s': owner %s, group %s, mode 0%o", user, verb,
                   path, owner, group, (unsigned)st.st_mode & 07777);
    if (st.st_uid == geteuid())
        (void)snprintf(advice, REACH_TEXT_MAX, "chmod u+%c '%s'", right == 1 ? 'x' : 'w', path);
    else if (by_group && !in_group(st.st_gid))
        (void)snprintf(
            advice, REACH_TEXT_MAX,
            "put %s into the group %s (SupplementaryGroups= of its unit, or usermod -aG) and start qpulld anew", user,
            group);
    else if (in_group(st.st_gid))
        (void)snprintf(advice, REACH_TEXT_MAX, "chmod g+%c '%s'%s", right == 1 ? 'x' : 'w', path,
                       right == 1 ? "" : ", or start QEMU with umask 007");
    else
        (void)snprintf(advice, REACH_TEXT_MAX, "setfacl -m u:%u:%s '%s'%s", (unsigned)geteuid(),
                       right == 1 ? "x" : "rw", path,
                       right == 1 ? "" : ", or start QEMU with umask 007 and qpulld in its group");
}

static const char *selinux_type(char *label)
{
    char *s = label;

    for (int i = 0; i < SELINUX_TYPE && s; i++)
        s = strchr(s, ':') ? strchr(s, ':') + 1 : NULL;
    if (!s)
        return label;
    s[strcspn(s, ":")] = 0;
    return s;
}

/* Modes and lists let us, and the kernel does not. */
static void explain_module(const char *path, char *text, char *advice)
{
    char ours[REACH_LABEL_MAX], theirs[REACH_LABEL_MAX] = "", file[REACH_LABEL_MAX] = "";
    pid_t pid = find_owner(path);
    ssize_t len = getxattr(path, "security.selinux", file, sizeof file - 1);

    reach_label(0, ours);
    if (pid)
        reach_label(pid, theirs);
    file[len > 0 ? len : 0] = 0;
    if (!*ours || strcmp(ours, "unconfined") == 0) {
        (void)snprintf(text, REACH_TEXT_MAX, "modes let qpulld open '%s', and something else does not", path);
        (void)snprintf(advice, REACH_TEXT_MAX, "look for a denial in the kernel's log (dmesg, ausearch -m avc)");
        return;
    }
    (void)snprintf(text, REACH_TEXT_MAX, "modes let qpulld open '%s'; its %s is %s, that of QEMU (process %d) %s", path,
                   module_of(ours), ours, (int)pid, *theirs ? theirs : "not known");
    if (is_selinux(ours))
        (void)snprintf(advice, REACH_TEXT_MAX,
                       "allow %s %s:unix_stream_socket connectto; allow %s %s:sock_file write; (a module of semodule)",
                       selinux_type(ours), *theirs ? selinux_type(theirs) : "svirt_t", selinux_type(ours),
                       *file ? selinux_type(file) : "qemu_var_run_t");
    else
        (void)snprintf(advice, REACH_TEXT_MAX, "add the rule \"%s rw,\" to the profile %.*s and load it anew", path,
                       (int)strcspn(ours, " "), ours);
}

void reach_explain(const char *path, char text[REACH_TEXT_MAX], char advice[REACH_TEXT_MAX])
{
    char part[PATH_MAX];

    for (const char *slash = strchr(path + 1, '/'); slash && (size_t)(slash - path) < sizeof part;
         slash = strchr(slash + 1, '/')) {
        memcpy(part, path, (size_t)(slash - path));
        part[slash - path] = 0;
        if (faccessat(AT_FDCWD, part, X_OK, AT_EACCESS) < 0) {
            explain_mode(part, 1, text, advice);
            return;
        }
    }
    if (faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) < 0)
        explain_mode(path, 2, text, advice);
    else
        explain_module(path, text, advice);
}
