/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * proxy: stands between a QMP client and QEMU's monitor, passes commands (with their file descriptors), answers and
 * events on, and spoils those that the test chooses. One client at a time, as with QEMU; each new one gets a new
 * connection to QEMU. It knows no command's meaning.
 *
 * Loop thread only. Owned by the test until proxy_free(); its handles close on the loop after that.
 */
#ifndef QPULL_FAULTS_PROXY_H
#define QPULL_FAULTS_PROXY_H

#include "qmp/stream.h"

#include <stdbool.h>
#include <uv.h>

struct proxy;

enum verdict {
    VERDICT_PASS,
    VERDICT_PASS_AND_TELL, /* on_passed is called when the client has its answer */
    VERDICT_REFUSE,        /* QEMU does not get it, the client gets an error */
    VERDICT_LOSE,          /* QEMU gets it, the client gets no answer */
    VERDICT_DROP,          /* QEMU does not get it, the client gets no answer */
    VERDICT_CUT,           /* QEMU does not get it, the connection breaks */
    VERDICT_CUT_AFTER,     /* QEMU gets it, and the connection breaks when it answers */
};

struct proxy_ops {
    /* Each command but qmp_capabilities, before it is passed on. args may be NULL; both are borrowed. */
    enum verdict (*on_command)(void *arg, const char *name, struct json_object *args);
    /* Right before a connection breaks because of a verdict; may be NULL. */
    void (*on_cut)(void *arg);
    /* The answer to a command of VERDICT_PASS_AND_TELL has been sent to the client; may be NULL. */
    void (*on_passed)(void *arg);
};

/* Listens at path at once; borrows it, target and ops for its life. */
struct proxy *proxy_new(uv_loop_t *loop, const char *path, const char *target, const struct proxy_ops *ops, void *arg);
void proxy_free(struct proxy *p);

bool proxy_has_client(const struct proxy *p);

#endif
