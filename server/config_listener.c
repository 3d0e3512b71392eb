/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "config_internal.h"

#include <ctype.h>
#include <errno.h>

static void listener_done(struct config_listener *l)
{
    free(l->text);
    free(l->host);
    free(l->port);
}

static int parse_tcp(struct config_listener *l, const char *rest, struct failure *f)
{
    const char *colon = strrchr(rest, ':');
    const char *host = rest;
    size_t len;
    char *end;
    unsigned long port;

    if (!colon)
        return failure_set(f, -EINVAL, "\"%s\" has no port: tcp:HOST:PORT", l->text);
    len = (size_t)(colon - rest);
    if (len >= 2 && host[0] == '[' && host[len - 1] == ']') {
        host++;
        len -= 2;
    } else if (memchr(host, ':', len)) {
        return failure_set(f, -EINVAL, "\"%s\": an IPv6 address goes into brackets, tcp:[::1]:PORT", l->text);
    }
    port = strtoul(colon + 1, &end, 10);
    if (!isdigit((unsigned char)colon[1]) || *end || port > 65535)
        return failure_set(f, -EINVAL, "\"%s\": the port is no number from 0 to 65535", l->text);
    if (len == 0)
        return failure_set(f, -EINVAL, "\"%s\" has no host; all addresses are tcp:0.0.0.0:PORT or tcp:[::]:PORT",
                           l->text);
    l->host = strndup(host, len);
    l->port = strdup(colon + 1);
    if (!l->host || !l->port)
        return failure_set(f, -ENOMEM, "out of memory");
    return 0;
}

static int parse_listener(struct config_listener *l, struct failure *f)
{
    if (strcmp(l->text, "fd") == 0) {
        l->type = LISTEN_FD;
        return 0;
    }
    if (strncmp(l->text, "unix:", 5) == 0) {
        l->type = LISTEN_UNIX;
        l->path = l->text + 5;
        return *l->path ? 0 : failure_set(f, -EINVAL, "the socket's path is empty");
    }
    if (strncmp(l->text, "tcp:", 4) == 0) {
        l->type = LISTEN_TCP;
        return parse_tcp(l, l->text + 4, f);
    }
    return failure_set(f, -EINVAL, "\"%s\" is none of unix:PATH, tcp:HOST:PORT, fd", l->text);
}

int config_add_listener(struct server_config *c, const char *value, struct failure *f)
{
    struct config_listener *all, new = {.text = strdup(value)};
    int r;

    r = new.text ? parse_listener(&new, f) : failure_set(f, -ENOMEM, "out of memory");
    for (size_t i = 0; r == 0 && i < c->nlisteners; i++)
        /* Port 0 is another port each time. */
        if (strcmp(c->listeners[i].text, value) == 0 && !(new.port &&strtoul(new.port, NULL, 10) == 0))
            r = failure_set(f, -EINVAL, "\"%s\" is there twice", value);
    if (r == 0 && c->nlisteners == CONFIG_LISTENERS_MAX)
        r = failure_set(f, -EINVAL, "more than %u listeners", CONFIG_LISTENERS_MAX);
    if (r < 0) {
        listener_done(&new);
        return r;
    }
    all = reallocarray(c->listeners, c->nlisteners + 1, sizeof *all);
    if (!all) {
        listener_done(&new);
        return failure_set(f, -ENOMEM, "out of memory");
    }
    c->listeners = all;
    all[c->nlisteners++] = new;
    return 0;
}

void config_drop_listeners(struct server_config *c)
{
    for (size_t i = 0; i < c->nlisteners; i++)
        listener_done(&c->listeners[i]);
    free(c->listeners);
    c->listeners = NULL;
    c->nlisteners = 0;
}
