/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "access.h"
#include "config.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fnmatch.h>
#include <grp.h>
#include <pwd.h>
#include <unistd.h>

enum kind { USER, GROUP, PSK, DN, CN, SAN, ADDRESS, ANY };

struct access_rule {
    enum kind kind;
    id_t id;                 /* USER, GROUP */
    struct in6_addr address; /* ADDRESS; IPv4 as v4-mapped */
    unsigned bits;           /* of address */
    unsigned rights;         /* enum access_right */
    char *who, *vm;          /* owned: globs; who is of PSK (no glob), DN, CN, SAN */
};

static const struct {
    const char *word;
    enum kind kind;
    bool is_number;
} kinds[] = {
    {"user", USER, false}, {"uid", USER, true}, {"group", GROUP, false}, {"gid", GROUP, true},   {"psk", PSK, false},
    {"dn", DN, false},     {"cn", CN, false},   {"san", SAN, false},     {"ip", ADDRESS, false},
};

static const struct {
    const char *word;
    enum access_right right;
} rights[] = {
    {"list", ACCESS_LIST},
    {"pull", ACCESS_PULL},
    {"checkpoint", ACCESS_CHECKPOINT},
    {"control", ACCESS_CONTROL},
};

/* -- making rules -------------------------------------------------------------------------------------------------- */

static int no_memory(struct failure *f)
{
    return failure_set(f, -ENOMEM, "out of memory");
}

static int parse_id(struct access_rule *r, const char *name, bool is_number, struct failure *f)
{
    const char *what = r->kind == USER ? "user" : "group";
    const struct passwd *user = NULL;
    const struct group *group = NULL;
    char *end;
    unsigned long n;

    if (is_number) {
        errno = 0;
        n = strtoul(name, &end, 10);
        if (!isdigit((unsigned char)*name) || *end || errno || n >= UINT32_MAX) /* (uid_t)-1 is nobody's */
            return failure_set(f, -EINVAL, "\"%s\" is no %s id", name, what);
        r->id = (id_t)n;
        return 0;
    }
    if (r->kind == USER)
        user = getpwnam(name);
    else
        group = getgrnam(name);
    if (!user && !group)
        return failure_set(f, -EINVAL, "there is no %s \"%s\" here", what, name);
    r->id = user ? user->pw_uid : group->gr_gid;
    return 0;
}

static void map_v4(struct in6_addr *to, const struct in_addr *from)
{
    *to = (struct in6_addr){.s6_addr = {[10] = 0xff, [11] = 0xff}};
    memcpy(&to->s6_addr[12], from, sizeof(*from));
}

static int parse_address(struct access_rule *r, const char *text, struct failure *f)
{
    _cleanup_free_ char *address = strdup(text);
    char *slash = address ? strchr(address, '/') : NULL, *end;
    struct in_addr v4;
    unsigned most = 32;
    unsigned long n;

    if (!address)
        return no_memory(f);
    if (slash)
        *slash++ = 0;
    if (inet_pton(AF_INET, address, &v4) == 1)
        map_v4(&r->address, &v4);
    else if (inet_pton(AF_INET6, address, &r->address) == 1)
        most = 128;
    else
        return failure_set(f, -EINVAL, "\"%s\" is no address: ip:192.0.2.7, ip:192.0.2.0/24, ip:2001:db8::/32", text);
    r->bits = 128;
    if (!slash)
        return 0;
    n = strtoul(slash, &end, 10);
    if (!isdigit((unsigned char)*slash) || *end || n > most)
        return failure_set(f, -EINVAL, "\"%s\": behind the slash is no number from 0 to %u", text, most);
    r->bits = (unsigned)n + 128 - most;
    return 0;
}

static int parse_who(struct access_rule *r, const char *who, struct failure *f)
{
    const char *colon = strchr(who, ':');

    if (strcmp(who, "any") == 0) {
        r->kind = ANY;
        return 0;
    }
    for (size_t i = 0; colon && i < ARRAY_SIZE(kinds); i++) {
        if (strlen(kinds[i].word) != (size_t)(colon - who) || strncmp(kinds[i].word, who, (size_t)(colon - who)) != 0)
            continue;
        if (!colon[1])
            return failure_set(f, -EINVAL, "\"%s\" names nobody", who);
        r->kind = kinds[i].kind;
        if (r->kind == USER || r->kind == GROUP)
            return parse_id(r, colon + 1, kinds[i].is_number, f);
        if (r->kind == ADDRESS)
            return parse_address(r, colon + 1, f);
        r->who = strdup(colon + 1);
        return r->who ? 0 : no_memory(f);
    }
    return failure_set(f, -EINVAL,
                       "\"%s\" is none of user:NAME, uid:N, group:NAME, gid:N, psk:NAME, dn:GLOB, cn:GLOB, san:GLOB, "
                       "ip:ADDRESS[/BITS], any",
                       who);
}

static int parse_rights(unsigned *to, char *words, struct failure *f)
{
    char *word, *rest = words;

    *to = 0;
    while ((word = strsep(&rest, "+"))) {
        unsigned before = *to;

        for (size_t i = 0; i < ARRAY_SIZE(rights); i++)
            if (strcmp(rights[i].word, word) == 0)
                *to |= rights[i].right;
        if (*to == before)
            return failure_set(f, -EINVAL, "\"%s\" is none of list, pull, checkpoint, control, or there twice", word);
    }
    return 0;
}

static void rule_done(struct access_rule *r)
{
    free(r->who);
    free(r->vm);
}

static int add_rule(struct access *a, const char *who, char *vm, struct failure *f)
{
    struct access_rule *all, r = {.rights = ACCESS_LIST | ACCESS_PULL | ACCESS_CHECKPOINT};
    char *slash = strchr(vm, '/');
    int result;

    if (slash)
        *slash++ = 0;
    if (!*vm)
        return failure_set(f, -EINVAL, "a VM's name is empty; * is all of them");
    if (a->nrules == CONFIG_RULES_MAX)
        return failure_set(f, -EINVAL, "more than %u rules", CONFIG_RULES_MAX);
    result = parse_who(&r, who, f);
    if (result == 0 && slash)
        result = parse_rights(&r.rights, slash, f);
    if (result == 0) {
        r.vm = strdup(vm);
        all = r.vm ? reallocarray(a->rules, a->nrules + 1, sizeof(*all)) : NULL;
        if (all) {
            a->rules = all;
            all[a->nrules++] = r;
            return 0;
        }
        result = no_memory(f);
    }
    rule_done(&r);
    return result;
}

/* Without the blanks around it. */
static char *trim(char *s)
{
    char *end;

    s += strspn(s, " \t");
    for (end = s + strlen(s); end > s && strchr(" \t", end[-1]); end--)
        ;
    *end = 0;
    return s;
}

int access_add(struct access *a, const char *text, struct failure *f)
{
    _cleanup_free_ char *copy = strdup(text);
    char *equals = copy ? strrchr(copy, '=') : NULL, *rest, *vm; /* the last one: a DN has some, a VM glob none */

    if (!copy)
        return no_memory(f);
    if (!equals)
        return failure_set(f, -EINVAL, "\"%s\" is not WHO=VM-GLOB[/RIGHT+…][,…]", text);
    *equals = 0;
    rest = equals + 1;
    while ((vm = strsep(&rest, ","))) {
        int r = add_rule(a, trim(copy), trim(vm), f);

        if (r < 0)
            return r;
    }
    return 0;
}

void access_done(struct access *a)
{
    for (size_t i = 0; i < a->nrules; i++)
        rule_done(&a->rules[i]);
    free(a->rules);
    *a = (struct access){0};
}

/* -- who it is ----------------------------------------------------------------------------------------------------- */

static bool has_prefix(const struct in6_addr *address, const struct in6_addr *prefix, unsigned bits)
{
    unsigned bytes = bits / 8, rest = bits % 8;

    return memcmp(address, prefix, bytes) == 0 &&
           (rest == 0 || (address->s6_addr[bytes] ^ prefix->s6_addr[bytes]) >> (8 - rest) == 0);
}

static bool is_at(const struct access_rule *r, const struct sockaddr_storage *a)
{
    struct in6_addr address;

    if (a->ss_family == AF_INET)
        map_v4(&address, &((const struct sockaddr_in *)a)->sin_addr);
    else if (a->ss_family == AF_INET6)
        address = ((const struct sockaddr_in6 *)a)->sin6_addr;
    else
        return false;
    return has_prefix(&address, &r->address, r->bits);
}

static bool is_like(const char *glob, const char *name)
{
    return name && fnmatch(glob, name, /* flags= */ 0) == 0;
}

static bool is_meant(const struct access_rule *r, const struct access_who *who)
{
    switch (r->kind) {
    case USER:
        return who->has_peer && who->uid == r->id;
    case GROUP:
        for (size_t i = 0; who->has_peer && i < who->ngroups; i++)
            if (who->groups[i] == r->id)
                return true;
        return false;
    case PSK:
        return who->psk && strcmp(who->psk, r->who) == 0;
    case DN:
        return is_like(r->who, who->dn);
    case CN:
        return is_like(r->who, who->cn);
    case SAN:
        for (size_t i = 0; i < who->nsans; i++)
            if (is_like(r->who, who->sans[i]))
                return true;
        return false;
    case ADDRESS:
        return is_at(r, &who->address);
    case ANY:
        return true;
    }
    return false;
}

/* Root, and who could read our memory anyhow. */
bool access_is_ours(const struct access_who *who)
{
    return who->has_peer && (who->uid == 0 || who->uid == geteuid());
}

unsigned access_rights(const struct access *a, const struct access_who *who, const char *vm)
{
    unsigned all = access_is_ours(who) ? ACCESS_ALL : 0;

    for (size_t i = 0; all != ACCESS_ALL && i < a->nrules; i++)
        if (is_meant(&a->rules[i], who) && is_like(a->rules[i].vm, vm))
            all |= a->rules[i].rights;
    return all;
}

bool access_is_admin(const struct access *a, const struct access_who *who)
{
    unsigned all = access_is_ours(who) ? ACCESS_ALL : 0;

    for (size_t i = 0; i < a->nrules; i++)
        if (is_meant(&a->rules[i], who) && strcmp(a->rules[i].vm, "*") == 0)
            all |= a->rules[i].rights;
    return all == ACCESS_ALL;
}

bool access_may_connect(const struct access *a, const struct access_who *who)
{
    bool may = access_is_ours(who);

    for (size_t i = 0; i < a->nrules; i++)
        may = may || is_meant(&a->rules[i], who);
    return may;
}

bool access_names_users(const struct access *a)
{
    for (size_t i = 0; i < a->nrules; i++)
        if (a->rules[i].kind == USER || a->rules[i].kind == GROUP || a->rules[i].kind == ANY)
            return true;
    return false;
}

int access_peer(int fd, struct access_who *who)
{
    socklen_t len = sizeof(who->address);
    struct ucred peer;

    *who = (struct access_who){0};
    if (getpeername(fd, (struct sockaddr *)&who->address, &len) < 0)
        return -errno;
    if (who->address.ss_family != AF_UNIX)
        return 0;
    len = sizeof(peer);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0)
        return -errno;
    who->uid = peer.uid;
    who->pid = peer.pid;
    /* Asked for the size first, which it tells by ERANGE (Linux 4.13). */
    len = 0;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, NULL, &len) < 0 && errno != ERANGE)
        return -errno;
    who->groups = calloc(len / sizeof(gid_t) + 1, sizeof(gid_t));
    if (!who->groups)
        return -ENOMEM;
    if (len > 0 && getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, who->groups, &len) < 0)
        len = 0; /* the first group is left */
    who->ngroups = len / sizeof(gid_t);
    who->groups[who->ngroups++] = peer.gid;
    who->has_peer = true;
    return 0;
}

void access_who_done(struct access_who *who)
{
    free(who->groups);
    who->groups = NULL;
    who->ngroups = 0;
    who->has_peer = false;
}
