/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * analyze: what tests/analyze tells the analysers, which look at one file at a time, about functions of others: these
 * return what they are given, which is negative, and leave a failure behind. Included before each file but qmp/base.c.
 * Not part of any build.
 */
#include "qmp/base.h"

static inline int analyze_failed(const struct failure *f, int err)
{
    if (err >= 0 || (f && f->err >= 0))
        __builtin_unreachable();
    return err;
}

#define failure_set(f, err, ...) (failure_set(f, err, __VA_ARGS__), analyze_failed(f, err))
#define failure_copy(to, from) analyze_failed(to, failure_copy(to, from))
