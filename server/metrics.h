/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * metrics: the daemon's numbers in the text form that Prometheus reads (exposition format 0.0.4), one table of them
 * (docs/METRICS.md). It counts nothing itself: numbers of a VM are in vm_counters.h, those of connections in conn.h.
 *
 * Loop thread only; the text belongs to the caller.
 */
#ifndef QPULL_METRICS_H
#define QPULL_METRICS_H

#include "server.h"

#define METRICS_CONTENT_TYPE "text/plain; version=0.0.4; charset=utf-8"

/* NULL: out of memory. */
char *metrics_text(const struct server *s);

#endif
