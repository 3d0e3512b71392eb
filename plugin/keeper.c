/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper.h"

#include <libnbd.h>

#define GOODBYE_MS 5000u /* for the server to take it */

struct keeper {
    struct nbd_handle *nbd; /* owned */
};

/* libnbd begins its sentences with the name of its function, which says nothing to anybody here. */
static int fail(struct failure *f, const char *what)
{
    const char *words = nbd_get_error(), *colon = words ? strstr(words, ": ") : NULL;
    int err = nbd_get_errno();

    return failure_set(f, err > 0 ? -err : -EIO, "%s: %s", what, colon ? colon + 2 : words ? words : "no reason given");
}

/* While goes_on(nbd) says so; nbd_poll() moves it. leaving: the client has gone, as it should. */
static int wait_until(struct nbd_handle *nbd, int (*goes_on)(struct nbd_handle *), uint64_t deadline_ms, bool leaving,
                      struct failure *f, const char *what)
{
    while (goes_on(nbd) > 0) {
        uint64_t now = door_now_ms();
        int r = now < deadline_ms ? nbd_poll(nbd, (int)MIN(deadline_ms - now, (uint64_t)DOOR_LOOK_MS)) : 0;

        if (r < 0)
            return fail(f, what);
        if (r == 0 && door_now_ms() >= deadline_ms)
            return failure_set(f, -ETIMEDOUT, "%s: no answer in time", what);
        if (r == 0 && !leaving && !door_is_wanted())
            return failure_set(f, -ESHUTDOWN, "%s: given up: the client has gone, or nbdkit is ending", what);
    }
    return 0;
}

static int open_nbd(const char *socket, const char *what, struct nbd_handle **ret_nbd, struct failure *f)
{
    *ret_nbd = nbd_create();
    return *ret_nbd ? 0 : fail(f, what);
}

int keeper_new(const char *socket, const char *export_name, const char *context, uint64_t deadline_ms,
               struct keeper **ret_keeper, struct failure *f)
{
    struct keeper *k = calloc(1, sizeof(*k));
    _cleanup_free_ char *what = NULL;
    int r;

    if (!k || asprintf(&what, "export '%s' of qpulld at '%s'", export_name, socket) < 0) {
        what = NULL;
        free(k);
        return failure_set(f, -ENOMEM, "out of memory");
    }
    r = open_nbd(socket, what, &k->nbd, f);
    if (r == 0 && (nbd_set_export_name(k->nbd, export_name) < 0 ||
                   (context && nbd_add_meta_context(k->nbd, context) < 0) || nbd_aio_connect_unix(k->nbd, socket) < 0))
        r = fail(f, what);
    if (r == 0)
        r = wait_until(k->nbd, nbd_aio_is_connecting, deadline_ms, /* leaving= */ false, f, what);
    if (r == 0 && nbd_aio_is_ready(k->nbd) <= 0)
        r = fail(f, what);
    if (r == 0 && context && nbd_can_meta_context(k->nbd, context) <= 0)
        r = failure_set(f, -ENOENT,
                        "%s: %s is not offered: there is no such checkpoint of this disk, or it cannot be used "
                        "(\"qpull checkpoint list\" tells why)",
                        what, context);
    if (r < 0) {
        keeper_free(k, /* well= */ false);
        return r;
    }
    *ret_keeper = k;
    return 0;
}

/* An end of file that waits in the socket counts. */
bool keeper_stands(struct keeper *k)
{
    return nbd_poll(k->nbd, 0) >= 0 && nbd_aio_is_ready(k->nbd) > 0;
}

static int is_open(struct nbd_handle *nbd)
{
    return nbd_aio_is_closed(nbd) == 0 && nbd_aio_is_dead(nbd) == 0;
}

void keeper_free(struct keeper *k, bool well)
{
    struct failure ignored = {0};

    if (!k)
        return;
    if (well && k->nbd && nbd_aio_is_ready(k->nbd) > 0 && nbd_aio_disconnect(k->nbd, 0) == 0)
        (void)wait_until(k->nbd, is_open, door_now_ms() + GOODBYE_MS, /* leaving= */ true, &ignored, "goodbye");
    nbd_close(k->nbd);
    free(k);
}

/* -- list ---------------------------------------------------------------------------------------------------------- */

struct listing {
    const char *prefix;
    struct names *names;
    bool no_memory;
};

static int on_export(void *arg, const char *name, const char *description)
{
    struct listing *l = arg;
    size_t len = strlen(l->prefix);

    if (strncmp(name, l->prefix, len) == 0 && names_add(l->names, name + len) < 0)
        l->no_memory = true;
    return 0;
}

static int is_connecting(struct nbd_handle *nbd)
{
    return nbd_aio_is_connecting(nbd) > 0 && nbd_aio_is_negotiating(nbd) == 0;
}

static int is_busy_listing(struct nbd_handle *nbd)
{
    return nbd_aio_is_connecting(nbd);
}

int keeper_list(const char *socket, const char *prefix, uint64_t deadline_ms, struct names *ret_names,
                struct failure *f)
{
    struct listing listing = {.prefix = prefix, .names = ret_names};
    struct nbd_handle *nbd = NULL;
    _cleanup_free_ char *what = NULL;
    int r;

    if (asprintf(&what, "qpulld at '%s'", socket) < 0) {
        what = NULL;
        return failure_set(f, -ENOMEM, "out of memory");
    }
    r = open_nbd(socket, what, &nbd, f);
    if (r == 0 && (nbd_set_opt_mode(nbd, true) < 0 || nbd_aio_connect_unix(nbd, socket) < 0))
        r = fail(f, what);
    if (r == 0)
        r = wait_until(nbd, is_connecting, deadline_ms, /* leaving= */ false, f, what);
    if (r == 0 && nbd_aio_opt_list(nbd, (nbd_list_callback){.callback = on_export, .user_data = &listing},
                                   NBD_NULL_COMPLETION) < 0)
        r = fail(f, what);
    if (r == 0)
        r = wait_until(nbd, is_busy_listing, deadline_ms, /* leaving= */ false, f, what);
    if (r == 0 && listing.no_memory)
        r = failure_set(f, -ENOMEM, "out of memory");
    nbd_close(nbd);
    return r;
}
