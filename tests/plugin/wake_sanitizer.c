/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Preloaded into nbdkit beside a sanitizer's library, which else begins inside the first malloc() of some library's
 * constructor: libp11-kit's holds glibc's lock of locales then, the sanitizer's dlerror() takes and frees it once more,
 * and whoever wants it later waits for ever (seen with gcc 12 and glibc 2.36). Linked with -z initfirst.
 */
#include <stdlib.h>

static void *volatile woken;

__attribute__((constructor)) static void wake(void)
{
    woken = malloc(1);
    free(woken);
}
