/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "privileges.h"

#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <pwd.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CAPABILITIES_MAX 64 /* bits of capset(2), version 3 */
#define CAPABILITY_WORDS 2

int privileges_find(const char *text, struct privileges *ret_privileges, struct failure *f)
{
    struct privileges p = {.set = true};
    const char *colon = strchr(text, ':');
    size_t len = colon ? (size_t)(colon - text) : strlen(text);
    const struct passwd *user;
    const struct group *group;

    if (len == 0 || len >= sizeof p.name || (colon && !colon[1]))
        return failure_set(f, -EINVAL, "\"%s\" is not NAME or NAME:GROUP", text);
    memcpy(p.name, text, len);
    user = getpwnam(p.name);
    if (!user)
        return failure_set(f, -EINVAL, "there is no user \"%s\"", p.name);
    p.uid = user->pw_uid;
    p.gid = user->pw_gid;
    if (colon) {
        group = getgrnam(colon + 1);
        if (!group)
            return failure_set(f, -EINVAL, "there is no group \"%s\"", colon + 1);
        p.gid = group->gr_gid;
    }
    if (p.uid == 0)
        return failure_set(f, -EINVAL, "\"%s\" is root: name a user that may do less", p.name);
    *ret_privileges = p;
    return 0;
}

/* libcap would be a library for two calls. */
static int drop_capabilities(void)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[CAPABILITY_WORDS] = {0};

    (void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); /* looked at below */
    return syscall(SYS_capset, &head, data) < 0 ? -errno : 0;
}

static int look_for_capabilities(struct failure *f)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[CAPABILITY_WORDS];

    if (syscall(SYS_capget, &head, data) < 0)
        return failure_set(f, -errno, "cannot see what capabilities are left: %s", strerror(errno));
    for (size_t i = 0; i < CAPABILITY_WORDS; i++)
        if (data[i].effective || data[i].permitted || data[i].inheritable)
            return failure_set(f, -EPERM, "capabilities are left (%08x)", data[i].effective | data[i].permitted);
    return 0;
}

static int look_for_way_back(const struct privileges *p, struct failure *f)
{
    uid_t uid[3] = {0};
    gid_t gid[3] = {0};

    if (getresuid(&uid[0], &uid[1], &uid[2]) < 0 || getresgid(&gid[0], &gid[1], &gid[2]) < 0)
        return failure_set(f, -errno, "cannot see who we are: %s", strerror(errno));
    for (size_t i = 0; i < ARRAY_SIZE(uid); i++)
        if (uid[i] != p->uid || gid[i] != p->gid)
            return failure_set(f, -EPERM, "we are still user %d, group %d in part", (int)uid[i], (int)gid[i]);
    if (setuid(0) == 0 || seteuid(0) == 0 || (p->gid != 0 && setegid(0) == 0))
        return failure_set(f, -EPERM, "there is a way back to root");
    return look_for_capabilities(f);
}

static int become(const struct privileges *p, struct failure *f)
{
    /* No capability through a file of the system either. Not in all containers; no_new_privs has the same effect. */
    for (unsigned long i = 0; i < CAPABILITIES_MAX; i++)
        (void)prctl(PR_CAPBSET_DROP, i, 0, 0, 0);
    if (initgroups(p->name, p->gid) < 0)
        return failure_set(f, -errno, "cannot take the groups of %s: %s", p->name, strerror(errno));
    if (setresgid(p->gid, p->gid, p->gid) < 0 || setresuid(p->uid, p->uid, p->uid) < 0)
        return failure_set(f, -errno, "cannot become %s: %s", p->name, strerror(errno));
    return 0;
}

int privileges_drop(const struct privileges *p, struct failure *f)
{
    int r;

    if (geteuid() != 0 && (geteuid() != p->uid || getuid() != p->uid))
        return failure_set(f, -EPERM, "--user %s: only root can become another user, and this is user %d", p->name,
                           (int)geteuid());
    if (geteuid() == 0 && become(p, f) < 0)
        return f->err;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return failure_set(f, -errno, "cannot do without new privileges: %s", strerror(errno));
    r = drop_capabilities();
    if (r < 0)
        return failure_set(f, r, "cannot drop capabilities: %s", strerror(-r));
    return look_for_way_back(p, f);
}
