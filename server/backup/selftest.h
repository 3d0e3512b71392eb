/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * selftest: finds out whether a QEMU has the bug of 7.0-7.2 that returns live bytes through snapshot-access (mended
 * in 8.0). Not by its version, which says nothing about back-ports: by a tiny graph of our own in that QEMU, 128 KiB
 * over memory files. One cluster is overwritten through the copy-before-write node, then one read crosses from it into
 * the next.
 *
 * Loop thread only.
 */
#ifndef QPULL_BACKUP_SELFTEST_H
#define QPULL_BACKUP_SELFTEST_H

#include "qmp/client.h"

#include <stdbool.h>
#include <uv.h>

struct selftest_config {
    uv_loop_t *loop;
    struct qmp_client *qmp;
    const char *server_socket; /* as struct rig_config */
    int server_dir;
    unsigned timeout_ms;
};

/*
 * f NULL: narrow says whether reads must stay inside a cluster. Else nothing is known. problems->err != 0: something of
 * the test is left in QEMU. Comes once, later; everything of the test is gone by then.
 */
typedef void (*selftest_cb)(void *arg, bool narrow, const struct failure *f, const struct failure *problems);
/* config is borrowed for the call, what it points to until cb. */
int selftest_start(const struct selftest_config *config, selftest_cb cb, void *arg);

#endif
