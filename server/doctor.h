/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * doctor: looks whether all is well with the daemon, its directories and its VMs, and says of what is not what to do.
 * It mends nothing. The only thing that it changes is a QEMU that has not been tested yet: there the self-test runs,
 * as it would before the first session.
 *
 * A check is {"vm": NAME or null, "disk": NAME or null, "check", "verdict", "text", "advice": … or null}. The verdict
 * is "ok", "note" (works, but one should know), or "wrong".
 *
 * Loop thread only; file systems are looked at by a worker. The doctor owns itself.
 */
#ifndef QPULL_DOCTOR_H
#define QPULL_DOCTOR_H

#include "qmp/base.h"

#include <json-c/json.h>
#include <stdarg.h>

struct doctor;
struct server;
struct vm;

/* Comes once, later; in DOCTOR_TIMEOUT_MS what has not answered is wrong. checks: an array, given to the callback. */
typedef void (*doctor_cb)(void *arg, struct json_object *checks);
/* vm NULL: all. -ENOMEM. */
int doctor_start(struct server *server, struct vm *vm, doctor_cb cb, void *arg, struct doctor **ret_doctor);
void doctor_forget(struct doctor *d); /* no callback any more */

/* For those who check: appends one row to an array; vm, disk and advice may be NULL. */
enum verdict { VERDICT_OK, VERDICT_NOTE, VERDICT_WRONG };
void doctor_add(struct json_object *checks, const char *vm, const char *disk, const char *check, enum verdict verdict,
                const char *advice, const char *fmt, ...) _printf_(7, 8);
void doctor_vadd(struct json_object *checks, const char *vm, const char *disk, const char *check, enum verdict verdict,
                 const char *advice, const char *fmt, va_list ap) _printf_(7, 0);

#endif
