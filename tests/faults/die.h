/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * die: ends the program where a test cannot go on. Any thread.
 */
#ifndef QPULL_FAULTS_DIE_H
#define QPULL_FAULTS_DIE_H

#include "qmp/base.h"

/* Says the sentence and where the run stood (main.c), and exits 1. */
_Noreturn void die(const char *fmt, ...) _printf_(1, 2);

#endif
