/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/base.h"

#include <stdio.h>
#include <time.h>

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

int64_t unix_time_ms(void)
{
    struct timespec now;

    (void)clock_gettime(CLOCK_REALTIME, &now); /* cannot fail: the clock is there */
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}
