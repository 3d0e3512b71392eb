/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "uri.h"

#include <ctype.h>
#include <limits.h>
#include <stdio.h>
#include <unistd.h>

/* RFC 3986: what need not be encoded in a path or a query. */
static char *encode(const char *text)
{
    char *to = malloc(3 * strlen(text) + 1), *at = to;

    for (; to && *text; text++) {
        unsigned char c = (unsigned char)*text;

        if (isalnum(c) || strchr("-._~/", c))
            *at++ = (char)c;
        else
            at += sprintf(at, "%%%02X", c);
    }
    if (to)
        *at = 0;
    return to;
}

static bool begins(const char *text, const char *with)
{
    return strncmp(text, with, strlen(with)) == 0;
}

/* HOST:PORT as others can use it: all addresses are this machine, by its name. */
static char *reachable(const char *host_port)
{
    char name[HOST_NAME_MAX + 1] = "localhost", *to;

    if (!begins(host_port, "0.0.0.0:") && !begins(host_port, "[::]:"))
        return strdup(host_port);
    (void)gethostname(name, sizeof name - 1);
    return asprintf(&to, "%s%s", name, strrchr(host_port, ':')) < 0 ? NULL : to;
}

char *uri_of(const struct server_config *config, const char *address, const char *export_name, bool local)
{
    _cleanup_free_ char *name = encode(export_name), *where = NULL;
    bool is_unix = begins(address, "unix:");
    bool loopback = begins(address, "tcp:127.") || begins(address, "tcp:[::1]:");
    bool tls = config->tls == CONFIG_TLS_REQUIRE ||
               (config->tls == CONFIG_TLS_ON && !is_unix && !loopback && !config->allow_plaintext);
    char *uri;

    if (local && !is_unix)
        return NULL;
    where = is_unix ? encode(address + strlen("unix:")) : reachable(address + strlen("tcp:"));
    if (!name || !where)
        return NULL;
    if (is_unix ? asprintf(&uri, "nbd%s+unix:///%s?socket=%s", tls ? "s" : "", name, where) < 0
                : asprintf(&uri, "nbd%s://%s/%s", tls ? "s" : "", where, name) < 0)
        return NULL;
    return uri;
}
