/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * fake_agent: a guest with a guest agent on the test's own loop: a unix socket in a temporary directory, one client at
 * a time as with QEMU (others connect, and wait unheard), and a guest whose file systems are frozen or not. Each
 * command can be made to fail in each way that a guest can.
 *
 * Loop thread only. Owned by the test until fake_agent_free(); its handles close on the loop after that.
 */
#ifndef QPULL_TEST_FAKE_AGENT_H
#define QPULL_TEST_FAKE_AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <uv.h>

enum fake_agent_command { FAKE_SYNC, FAKE_FREEZE, FAKE_THAW, FAKE_STATUS, FAKE_NCOMMANDS };

enum fake_agent_fault {
    FAKE_GOOD,
    FAKE_REFUSES,  /* an error, no effect */
    FAKE_DEAF,     /* no effect, no answer */
    FAKE_SILENT,   /* the effect, and no answer */
    FAKE_LATE,     /* the effect and the answer come with fake_agent_wake(); so does all that is sent after it */
    FAKE_LIES,     /* the effect, and an answer of another type */
    FAKE_RUBBISH,  /* the effect, and what is no JSON */
    FAKE_FLOODS,   /* no effect, and megabytes */
    FAKE_HANGS_UP, /* the effect, and the connection is closed: QEMU ends, say */
    FAKE_NFAULTS
};

struct fake_agent {
    int nfrozen;      /* file systems; 0: thawed */
    int nfilesystems; /* 2 */
    enum fake_agent_fault faults[FAKE_NCOMMANDS];
    unsigned nheard[FAKE_NCOMMANDS];
    unsigned nclients; /* accepted so far */
    char path[100];
    /* private */
    uv_loop_t *loop;
    struct fake_agent_side *side;
};

struct fake_agent *fake_agent_new(uv_loop_t *loop);
void fake_agent_free(struct fake_agent *a); /* NULL is fine */
void fake_agent_wake(struct fake_agent *a); /* FAKE_LATE is over: what waited is done, in order */
void fake_agent_send(struct fake_agent *a, const char *bytes, size_t len);
void fake_agent_hang_up(struct fake_agent *a);
bool fake_agent_has_client(const struct fake_agent *a);
void fake_agent_stop(struct fake_agent *a); /* nobody listens any more */

#endif
