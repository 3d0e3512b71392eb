/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * test: cmocka with the headers it needs before itself, in the order it needs them.
 */
#ifndef QPULL_TEST_TEST_H
#define QPULL_TEST_TEST_H

/* clang-format off */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>
/* clang-format on */

/* For numbers that are not negative. What cmocka has has another name in each version. */
#define assert_between(value, low, high)                                                            \
    do {                                                                                            \
        uintmax_t between_ = (uintmax_t)(value);                                                    \
        if (between_ < (uintmax_t)(low) || between_ > (uintmax_t)(high))                            \
            fail_msg("%s is %ju, which is not from %ju to %ju", #value, between_, (uintmax_t)(low), \
                     (uintmax_t)(high));                                                            \
    } while (0)

#endif
