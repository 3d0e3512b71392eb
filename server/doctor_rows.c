/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The rows of a checkup's answer, for whoever checks something. */
#include "doctor.h"

#include "qmp/base.h"

#include <assert.h>
#include <json-c/json.h>
#include <stdio.h>

static const char *const verdicts[] = {[VERDICT_OK] = "ok", [VERDICT_NOTE] = "note", [VERDICT_WRONG] = "wrong"};
static_assert(ARRAY_SIZE(verdicts) == VERDICT_WRONG + 1, "every verdict has a name");

static struct json_object *string_or_null(const char *s)
{
    return s ? json_object_new_string(s) : NULL;
}

void doctor_vadd(struct json_object *checks, const char *vm, const char *disk, const char *check, enum verdict verdict,
                 const char *advice, const char *fmt, va_list ap)
{
    struct json_object *o = json_object_new_object();
    _cleanup_free_ char *text = NULL;

    if (vasprintf(&text, fmt, ap) < 0)
        text = NULL;
    (void)json_object_object_add(o, "vm", string_or_null(vm));
    (void)json_object_object_add(o, "disk", string_or_null(disk));
    (void)json_object_object_add(o, "check", json_object_new_string(check));
    (void)json_object_object_add(o, "verdict", json_object_new_string(verdicts[verdict]));
    (void)json_object_object_add(o, "text", json_object_new_string(text ? text : "out of memory"));
    (void)json_object_object_add(o, "advice", string_or_null(advice));
    (void)json_object_array_add(checks, o);
}

void doctor_add(struct json_object *checks, const char *vm, const char *disk, const char *check, enum verdict verdict,
                const char *advice, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    doctor_vadd(checks, vm, disk, check, verdict, advice, fmt, ap);
    va_end(ap);
}
