/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* conn_who: who is at the other end of a socket that was just accepted, and what the socket needs because of that. */
#include "conn_internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/socket.h>

/*
 * A peer that is gone without a word (power, network) is one that answers nothing for CONN_VANISHED_S, whether it owes
 * us an acknowledgement or the connection is idle. Best effort: the deadlines for unsent bytes and idle clients stand.
 */
static void notice_vanishing(int fd)
{
    int on = 1, idle = CONN_VANISHED_S / 2, interval = MAX(CONN_VANISHED_S / 12, 1), count = 6;
    unsigned vanished_ms = CONN_VANISHED_S * 1000;

    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &vanished_ms, sizeof vanished_ms);
}

int conn_identify(struct conn *c, char *from, size_t size)
{
    const struct sockaddr_storage *a = &c->who.address;
    char text[INET6_ADDRSTRLEN] = "?";
    uint16_t port = 0;
    uv_os_fd_t fd;
    int r;
    int size_wanted = (int)MIN((size_t)CONN_SOCKET_BUFFER, CONN_SOCKET_TOTAL / MAX(c->set->nopen, (size_t)1));

    if (uv_fileno(&c->sock.handle, &fd) < 0)
        return -EBADF;
    r = access_peer(fd, &c->who);
    if (r < 0)
        return r;
    if (c->sock.handle.type == UV_NAMED_PIPE) {
        /* SO_SNDBUFFORCE is for root and passes the system's limit; otherwise we take what we get. */
        if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size_wanted, sizeof size_wanted) < 0)
            (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size_wanted, sizeof size_wanted);
        (void)snprintf(c->origin, sizeof c->origin, "uid:%u", (unsigned)c->who.uid);
        (void)snprintf(from, size, "%s (pid %d)", c->origin, (int)c->who.pid);
        return fair_join(&c->set->fair, &c->fair, from); /* a client is a process */
    }
    if (a->ss_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)a;
        (void)inet_ntop(AF_INET, &in->sin_addr, text, sizeof text);
        port = ntohs(in->sin_port);
    } else if (a->ss_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)a;
        if (IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr)) /* one client, whichever way it came */
            (void)inet_ntop(AF_INET, &in6->sin6_addr.s6_addr[12], text, sizeof text);
        else
            (void)inet_ntop(AF_INET6, &in6->sin6_addr, text, sizeof text);
        port = ntohs(in6->sin6_port);
    }
    notice_vanishing(fd);
    (void)uv_tcp_nodelay(&c->sock.tcp, 1);
    (void)snprintf(c->origin, sizeof c->origin, "ip:%s", text);
    (void)snprintf(from, size, "%s port %u", c->origin, port);
    return fair_join(&c->set->fair, &c->fair, c->origin);
}
