/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * fuzz: what the targets share: a check that says which one it was, an input read from its front, and a folder in
 * memory that goes with the process. A target keeps nothing from one input to the next that could change what comes.
 */
#ifndef QPULL_TEST_FUZZ_H
#define QPULL_TEST_FUZZ_H

#include "qmp/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                  \
        }                                                                             \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* -- input --------------------------------------------------------------------------------------------------------- */
struct input {
    const uint8_t *data; /* borrowed */
    size_t size;
};

static inline uint8_t input_byte(struct input *in)
{
    if (in->size == 0)
        return 0;
    in->size--;
    return *in->data++;
}

/* At most len bytes, less at the end. */
static inline struct input input_take(struct input *in, size_t len)
{
    struct input part = {in->data, MIN(len, in->size)};

    in->data += part.size;
    in->size -= part.size;
    return part;
}

/* Up to the next 0, which is skipped. */
static inline struct input input_take_text(struct input *in)
{
    const uint8_t *end = in->size ? memchr(in->data, 0, in->size) : NULL;
    struct input part = input_take(in, end ? (size_t)(end - in->data) : in->size);

    (void)input_byte(in);
    return part;
}

/* Terminated, and a block of just that size, so that reading beyond it is seen. Owned by the caller. */
static inline char *input_string(const struct input *in)
{
    char *s = malloc(in->size + 1);

    CHECK(s);
    if (in->size > 0)
        memcpy(s, in->data, in->size);
    s[in->size] = '\0';
    return s;
}

/* -- a folder ------------------------------------------------------------------------------------------------------ */
static char fuzz_folder[64];

static void fuzz_folder_remove(void)
{
    char command[96];

    (void)snprintf(command, sizeof(command), "rm -rf %s", fuzz_folder);
    (void)!system(command); /* at the end of the process: nobody to tell */
}

/* Its path; made at the first call. */
static inline const char *fuzz_folder_path(void)
{
    if (!fuzz_folder[0]) {
        (void)snprintf(fuzz_folder, sizeof(fuzz_folder), "%s/qpull-fuzz-XXXXXX",
                       access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
        CHECK(mkdtemp(fuzz_folder));
        (void)atexit(fuzz_folder_remove);
    }
    return fuzz_folder;
}

#endif
