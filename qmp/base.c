/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/base.h"

#include <stdio.h>

int failure_set(struct failure *f, int err, const char *fmt, ...)
{
    if (f && f->err == 0) {
        va_list ap;

        f->err = err;
        va_start(ap, fmt);
        (void)vsnprintf(f->text, sizeof(f->text), fmt, ap); /* cutting a sentence short is fine */
        va_end(ap);
    }
    return err;
}

int failure_copy(struct failure *to, const struct failure *from)
{
    if (to && to->err == 0)
        *to = *from;
    return from->err;
}
