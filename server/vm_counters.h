/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * vm_counters: what has happened to one VM since the daemon started, for `qpull metrics` (server/metrics.c). Numbers
 * only; who sees a thing happen counts it. They only grow, but for those that say so.
 *
 * Embedded in the VM; a VM and the images of its powered-off time share one. Loop thread only.
 */
#ifndef QPULL_VM_COUNTERS_H
#define QPULL_VM_COUNTERS_H

#include <stdint.h>

/* How a session ended. */
enum vm_end {
    VM_END_DONE,     /* all that was opened was pulled to its end */
    VM_END_CLIENT,   /* a client left without that */
    VM_END_SETUP,    /* it never came up */
    VM_END_BROKEN,   /* the frozen view was lost */
    VM_END_SCRATCH,  /* a scratch limit was passed */
    VM_END_TIMEOUT,  /* --session-timeout */
    VM_END_QEMU,     /* the connection to QEMU was lost */
    VM_END_SHUTDOWN, /* the daemon ended it */
    VM_END_OTHER,
    VM_ENDS,
};

struct vm_counters {
    uint64_t started, up;                       /* sessions */
    uint64_t ended[VM_ENDS];                    /* sessions, by vm_end */
    uint64_t kept, dropped;                     /* provisional checkpoints, each on one disk */
    uint64_t problems;                          /* sessions that could not undo something */
    uint64_t setup_ms, nsetups, last_setup_ms;  /* of sessions that came up: together; the last one's */
    uint64_t last_pause_us, longest_pause_us;   /* how long the guest stood still at most for a freeze */
    uint64_t sweeps, sweep_problems, leftovers; /* leftovers: sessions of dead daemons that were undone */
    uint64_t connections;                       /* that entered a session */
    uint64_t client_bytes, qemu_bytes;          /* payload sent to clients, and read of QEMU for them */
};

const char *vm_end_name(enum vm_end end); /* vm_events.c */

#endif
