/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * base: the few helpers that every layer shares. No objects, no I/O, no state.
 * Safe from any thread.
 */
#ifndef QPULL_BASE_H
#define QPULL_BASE_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/param.h> /* MIN, MAX: uv.h brings it, too, so definitions of our own would meet it */

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#define container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))

/* Runs fn(&variable) when the variable leaves its scope. */
#define _cleanup_(fn) __attribute__((cleanup(fn)))
#define _cleanup_free_ _cleanup_(base_freep)
#define _printf_(fmt, args) __attribute__((format(printf, fmt, args)))

/* Hands over what a pointer owns: the value moves out and NULL stays behind. */
#define TAKE_PTR(p)                     \
    ({                                  \
        __typeof__(p) taken_ptr_ = (p); \
        (p) = NULL;                     \
        taken_ptr_;                     \
    })
/* The same of a descriptor: none is left behind. */
#define TAKE_FD(fd)           \
    ({                        \
        int taken_fd_ = (fd); \
        (fd) = -1;            \
        taken_fd_;            \
    })

static inline void base_freep(void *p)
{
    free(*(void **)p);
}

/*
 * What went wrong, in a number for programs and a sentence for people. It travels with the
 * operation it belongs to; zeroed means that nothing has failed. The first failure is kept.
 */
struct failure {
    int err; /* negative errno, 0: none */
    char text[512];
};

/* Records err and the sentence unless f holds a failure already (f may be NULL). Returns err. */
int failure_set(struct failure *f, int err, const char *fmt, ...) _printf_(3, 4);

/* Unix time in ms: for people and files, never for deadlines. */
int64_t unix_time_ms(void);

/* Copies from into to unless to holds a failure already. Returns from->err. */
int failure_copy(struct failure *to, const struct failure *from);

#endif
