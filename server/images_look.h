/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * images_look: what only the file system can tell about images: of which format they are, where a program is, and who
 * has a file open. These functions block, so they run on libuv's thread pool; they touch nothing but their arguments.
 */
#ifndef QPULL_IMAGES_LOOK_H
#define QPULL_IMAGES_LOOK_H

#include "config.h"

#include <sys/types.h>

struct image_kind {
    const char *format;   /* QEMU's name, a literal */
    const char *protocol; /* "file" or "host_device" */
};

/*
 * The format that was named, or the one that the file begins like. -EINVAL: it cannot be told, or may not be believed.
 */
int images_look(const struct config_image *image, struct image_kind *ret_kind, struct failure *f);

/* The path of a program, as execvp() would find it; ret_path is the caller's. */
int images_find_program(const char *name, char **ret_path, struct failure *f);

/* "qemu-system-x86 (PID 4711)": a process, other than these, that has the file open. False: none that we may see. */
bool images_find_holder(const char *path, const pid_t * not, size_t nnot, char *text, size_t size);

#endif
