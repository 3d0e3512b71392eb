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

#endif
