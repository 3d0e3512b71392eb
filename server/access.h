/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * access: who may do what with which VM. A client is known by what the system or TLS says of it, never by what it says
 * itself. Root and the daemon's own user, on unix sockets, may do everything; nobody else may do anything but what a
 * rule allows: WHO=VM-GLOB[/RIGHT[+RIGHT]…][,…], where WHO is one of
 *
 *   user:NAME uid:N group:NAME gid:N   the process at the other end of a unix socket (a group of it)
 *   psk:NAME                           TLS with a pre-shared key
 *   dn:GLOB cn:GLOB san:GLOB           TLS with a client certificate: its subject, the CN in it, a name of its
 *                                      subjectAltName
 *   ip:ADDRESS[/BITS]                  an address; no proof of anything where others are in the network
 *   any                                whoever can connect
 *
 * Rights are list (it is there: LIST, INFO), pull (GO, and reading; session-begin), checkpoint (GO with @NAME;
 * checkpoint-… commands) and control (all other commands, and tickets); list+pull+checkpoint if none is named.
 *
 * Pure but for access_peer() and names of users and groups, which are looked up when the rule is made.
 */
#ifndef QPULL_ACCESS_H
#define QPULL_ACCESS_H

#include "qmp/base.h"

#include <netinet/in.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/types.h>

enum access_right { ACCESS_LIST = 1, ACCESS_PULL = 2, ACCESS_CHECKPOINT = 4, ACCESS_CONTROL = 8 };
#define ACCESS_ALL 15u

/* What is known of a client; zeroed: nothing. */
struct access_who {
    bool has_peer; /* a unix socket */
    uid_t uid;
    pid_t pid;
    gid_t *groups; /* owned: all of the peer's */
    size_t ngroups;
    struct sockaddr_storage address; /* of TCP, or AF_UNSPEC */
    const char *psk, *dn, *cn;       /* borrowed: of TLS, verified; NULL: not told */
    const char *const *sans;         /* likewise */
    size_t nsans;
};

struct access_rule;

struct access {
    struct access_rule *rules; /* owned */
    size_t nrules;
};

/* One rule. -EINVAL and what is wrong, -ENOMEM. */
int access_add(struct access *a, const char *text, struct failure *f);
void access_done(struct access *a);

/* Root or the daemon's own user. */
bool access_is_ours(const struct access_who *who);
/* Of what enum access_right has, for this VM. */
unsigned access_rights(const struct access *a, const struct access_who *who, const char *vm);
/* May do all with all VMs, also those that are not there yet. */
bool access_is_admin(const struct access *a, const struct access_who *who);
/* Whether it may do anything at all with any VM on the control socket. */
bool access_may_connect(const struct access *a, const struct access_who *who);
/* A rule names a user or a group: other users must be able to connect to our unix sockets. */
bool access_names_users(const struct access *a);

/* Asks the system about a connected socket. Negative errno. */
int access_peer(int fd, struct access_who *who);
void access_who_done(struct access_who *who);

#endif
