/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* config_check(): what only the system can tell about a configuration. */
#include "config_internal.h"

#include <errno.h>
#include <grp.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static int check_dir(const char *what, const char *path, int mode, struct failure *f)
{
    struct stat st;

    if (stat(path, &st) < 0)
        return failure_set(f, -EINVAL, "the %s %s: %s", what, path, strerror(errno));
    if (!S_ISDIR(st.st_mode))
        return failure_set(f, -EINVAL, "the %s %s is not a directory", what, path);
    if (access(path, mode) < 0)
        return failure_set(f, -EINVAL, "the %s %s: %s", what, path, strerror(errno));
    return 0;
}

/* The directory in which path lies must be writable. */
static int check_parent(const char *what, const char *path, struct failure *f)
{
    _cleanup_free_ char *copy = strdup(path);
    char *slash;

    if (!copy)
        return failure_set(f, -ENOMEM, "out of memory");
    slash = strrchr(copy, '/');
    if (!slash)
        return check_dir(what, ".", W_OK | X_OK, f);
    slash[slash == copy] = 0;
    return check_dir(what, copy, W_OK | X_OK, f);
}

static int blame_line(const struct server_config *c, unsigned line, int r, struct failure *f)
{
    struct failure why = *f;

    if (r >= 0 || line == 0 || !c->file)
        return r;
    *f = (struct failure){0};
    return failure_set(f, why.err, "%s:%u: %s", c->file, line, why.text);
}

int config_blame(const struct server_config *c, const char *key, int r, struct failure *f)
{
    return blame_line(c, config_line_of(c, key), r, f);
}

/* Given to whom we are going to be; one that is there already belongs to somebody. */
static int make_default_dir(const struct server_config *c, const char *path, mode_t mode, struct failure *f)
{
    if (mkdir(path, mode) < 0)
        return errno == EEXIST ? 0 : failure_set(f, -EINVAL, "cannot make %s: %s", path, strerror(errno));
    if (c->become.set && geteuid() == 0 && lchown(path, c->become.uid, c->become.gid) < 0)
        return failure_set(f, -EINVAL, "cannot give %s to %s: %s", path, c->become.name, strerror(errno));
    return 0;
}

bool config_is_loopback(const struct sockaddr_storage *a)
{
    if (a->ss_family == AF_INET)
        return (ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr) >> 24) == IN_LOOPBACKNET;
    if (a->ss_family == AF_INET6) {
        const struct in6_addr *in6 = &((const struct sockaddr_in6 *)a)->sin6_addr;
        return IN6_IS_ADDR_LOOPBACK(in6) || (IN6_IS_ADDR_V4MAPPED(in6) && in6->s6_addr[12] == IN_LOOPBACKNET);
    }
    return false;
}

static int check_socket_path(const char *path, struct failure *f)
{
    if (strlen(path) >= sizeof((struct sockaddr_un *)NULL)->sun_path)
        return failure_set(f, -EINVAL, "the socket's path \"%s\" is longer than %zu bytes", path,
                           sizeof((struct sockaddr_un *)NULL)->sun_path - 1);
    return 0;
}

static int check_listener(const struct server_config *c, struct config_listener *l, struct failure *f)
{
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *found;
    int r;

    if (l->type == LISTEN_UNIX)
        return check_socket_path(l->path, f);
    if (l->type == LISTEN_FD)
        return getenv("LISTEN_FDS")
                   ? 0
                   : failure_set(f, -EINVAL, "--listen fd: nobody passed a socket (LISTEN_FDS is not set)");
    r = getaddrinfo(l->host, l->port, &hints, &found);
    if (r != 0)
        return failure_set(f, -EINVAL, "--listen %s: %s", l->text, gai_strerror(r));
    memcpy(&l->address, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    if (!config_is_loopback(&l->address) && c->tls == CONFIG_TLS_OFF && !c->allow_plaintext)
        return failure_set(f, -EINVAL,
                           "--listen %s would offer disks to the network in clear text; "
                           "say --tls on, listen on loopback, or say --allow-plaintext",
                           l->text);
    return 0;
}

/* What is in the files is looked at when they are loaded. */
static int check_tls(const struct server_config *c, struct failure *f)
{
    if (c->tls_certs && c->tls_psk)
        return failure_set(f, -EINVAL, "--tls-certs and --tls-psk cannot both be used: a client has one or the other");
    if (c->tls == CONFIG_TLS_OFF && (c->tls_certs || c->tls_psk))
        return failure_set(f, -EINVAL, "--tls-%s needs --tls on or --tls require", c->tls_certs ? "certs" : "psk");
    if (c->tls != CONFIG_TLS_OFF && !c->tls_certs && !c->tls_psk)
        return failure_set(f, -EINVAL,
                           "--tls %s needs --tls-certs DIR or --tls-psk FILE; qpull certs init DIR makes either",
                           c->tls == CONFIG_TLS_ON ? "on" : "require");
    return 0;
}

static int check_vm(const struct server_config *c, const struct config_vm *vm, struct failure *f)
{
    enum quiesce_mode quiesce = vm->quiesce_said ? vm->quiesce : c->quiesce;
    struct failure why = {0};
    struct stat st;

    if (!vm->qmp)
        return 0; /* the images are looked at when somebody wants them: they may come later */
    if (check_socket_path(vm->qmp, &why) < 0)
        return failure_set(f, -EINVAL, "VM \"%s\": %s", vm->name, why.text);
    if (vm->qga && check_socket_path(vm->qga, &why) < 0)
        return failure_set(f, -EINVAL, "VM \"%s\", guest agent: %s", vm->name, why.text);
    if (quiesce == QUIESCE_REQUIRE && !vm->qga)
        return failure_set(
            f, -EINVAL,
            "VM \"%s\": quiesce=require needs its guest agent (--qga NAME=SOCKET, or qga= in its section); "
            "or say quiesce=try or quiesce=off there",
            vm->name);
    /* QEMU may start later than we do, so that the socket need not be there; what is there must be one. */
    if (stat(vm->qmp, &st) == 0 && !S_ISSOCK(st.st_mode))
        return failure_set(f, -EINVAL, "VM \"%s\": %s is not a socket", vm->name, vm->qmp);
    return 0;
}

/* A place that all VMs share. */
static int check_place(const struct server_config *c, const struct config_vm *vms, size_t nvms, struct failure *f)
{
    unsigned nsharing = 0;

    if (c->scratch_limit || c->scratch_total_limit)
        return failure_set(f, -EINVAL,
                           "--scratch-limit and --scratch-total-limit need a directory for --scratch: what another "
                           "place holds cannot be seen from here");
    for (size_t i = 0; i < nvms; i++)
        nsharing += vms[i].qmp && !vms[i].place;
    if (nsharing > 1 && !place_tells_vms(c->place))
        return failure_set(f, -EINVAL,
                           "--scratch: %u VMs would write to one scratch place: put %%v into its JSON where the VM's "
                           "name belongs, or %%s for the session's id",
                           nsharing);
    return 0;
}

static int check_vm_places(const struct server_config *c, const struct config_vm *vms, size_t nvms, struct failure *f)
{
    for (size_t i = 0; i < nvms; i++) {
        const struct config_vm *a = &vms[i];

        if (!a->place || place_tells_vms(a->place))
            continue;
        if (c->place && strcmp(place_text(a->place), place_text(c->place)) == 0)
            return failure_set(f, -EINVAL, "VM \"%s\" and --scratch of all others would write to one scratch place",
                               a->name);
        for (size_t k = 0; k < i; k++) {
            const struct config_vm *b = &vms[k];

            if (b->place && strcmp(place_text(a->place), place_text(b->place)) == 0)
                return failure_set(f, -EINVAL, "VM \"%s\" and VM \"%s\" would write to one scratch place", b->name,
                                   a->name);
        }
    }
    return 0;
}

static int check_names(struct server_config *c, struct failure *f)
{
    const struct group *group;
    struct failure why = {0};

    if (c->user && privileges_find(c->user, &c->become, &why) < 0)
        return failure_set(f, -EINVAL, "--user: %s", why.text);
    c->socket_gid = c->become.set ? c->become.gid : (gid_t)-1; /* chown(2): as it is */
    if (c->socket_group) {
        group = getgrnam(c->socket_group);
        if (!group)
            return failure_set(f, -EINVAL, "--socket-group: there is no group \"%s\"", c->socket_group);
        c->socket_gid = group->gr_gid;
    }
    return 0;
}

int config_check_paths(const struct server_config *c, struct failure *f)
{
    int r = 0;

    for (size_t i = 0; r == 0 && i < c->nlisteners; i++)
        if (c->listeners[i].type == LISTEN_UNIX)
            r = blame_line(c, c->listeners[i].line, check_parent("directory of the listener", c->listeners[i].path, f),
                           f);
    if (r == 0)
        r = config_blame(c, "control", check_parent("directory of the control socket", c->control, f), f);
    if (r == 0 && !c->place)
        r = config_blame(c, "scratch", check_dir("scratch directory", c->scratch, W_OK | X_OK, f), f);
    if (r == 0)
        r = config_blame(c, "state", check_dir("state directory", c->state, R_OK | W_OK | X_OK, f), f);
    if (r == 0 && c->pidfile)
        r = config_blame(c, "pidfile", check_parent("directory of the pidfile", c->pidfile, f), f);
    if (r == 0 && c->file && access(c->file, R_OK) < 0) /* SIGHUP reads it again */
        r = failure_set(f, -EINVAL, "the file %s: %s", c->file, strerror(errno));
    return r;
}

int config_check_vms(const struct server_config *c, const struct config_vm *vms, size_t nvms, struct failure *f)
{
    int r = c->place ? check_place(c, vms, nvms, f) : 0;

    if (r == 0)
        r = check_vm_places(c, vms, nvms, f);
    for (size_t i = 0; r == 0 && i < nvms; i++)
        r = blame_line(c, vms[i].by_flag ? 0 : vms[i].line, check_vm(c, &vms[i], f), f);
    return r;
}

int config_check(struct server_config *c, struct failure *f)
{
    int r = check_tls(c, f);

    if (r == 0)
        r = check_names(c, f);
    for (size_t i = 0; r == 0 && i < c->nlisteners; i++) {
        struct config_listener *l = &c->listeners[i];
        if (l->type == LISTEN_UNIX && strncmp(l->path, CONFIG_RUN_DIR "/", sizeof CONFIG_RUN_DIR) == 0)
            r = make_default_dir(c, CONFIG_RUN_DIR, 0755, f);
        if (r == 0)
            r = blame_line(c, l->line, check_listener(c, l, f), f);
    }
    if (r == 0 && strcmp(c->control, CONFIG_CONTROL) == 0)
        r = make_default_dir(c, CONFIG_RUN_DIR, 0755, f);
    if (r == 0)
        r = config_blame(c, "control", check_socket_path(c->control, f), f);
    if (r == 0 && strcmp(c->state, CONFIG_STATE) == 0)
        r = make_default_dir(c, CONFIG_STATE, 0700, f);
    if (r == 0)
        r = config_check_paths(c, f);
    return r == 0 ? config_check_vms(c, c->vms, c->nvms, f) : r;
}
