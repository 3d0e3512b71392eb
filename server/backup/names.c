/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/names.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <sys/random.h>
#include <time.h>

static const char *const kinds[] = {
    [NAMES_SCRATCH] = "scratch", [NAMES_CBW] = "cbw",     [NAMES_PRE] = "pre",         [NAMES_CUT] = "cut",
    [NAMES_ACCESS] = "access",   [NAMES_BASE] = "base",   [NAMES_EXPORT] = "export",   [NAMES_LATE] = "late",
    [NAMES_LAYER] = "layer",     [NAMES_SINCE] = "since", [NAMES_WRITTEN] = "written", [NAMES_KEEP] = "keep",
    [NAMES_SERVER] = "server",   [NAMES_JOB] = "job",     [NAMES_LIVE] = "live",       [NAMES_PAUSED] = "paused",
    [NAMES_QUIESCE] = "quiesce", [NAMES_LOCK] = "lock",   [NAMES_HOLD] = "hold",       [NAMES_DISCARD] = "discard",
    [NAMES_VHOST] = "vhost",
};
static_assert(ARRAY_SIZE(kinds) == NAMES_NKINDS, "every kind has a name");

const char *names_make(char out[NAMES_SIZE], const char *id, enum names_kind kind, unsigned n)
{
    (void)snprintf(out, NAMES_SIZE, NAMES_PREFIX "%.8s-%s%u", id, kinds[kind], n % (NAMES_MAX_DISKS + 1));
    return out;
}

void names_new_id(char id[NAMES_ID_SIZE])
{
    uint32_t r = 0;

    if (getrandom(&r, sizeof(r), GRND_NONBLOCK) != sizeof(r))
        r = (uint32_t)(uintptr_t)id ^
            (uint32_t)clock(); /* early boot; uniqueness within one QEMU is all that is asked */
    (void)snprintf(id, NAMES_ID_SIZE, "%08x", r);
}

bool names_is_ours(const char *name)
{
    return name && strncmp(name, NAMES_PREFIX, strlen(NAMES_PREFIX)) == 0;
}

bool names_parse(const char *name, char id[NAMES_ID_SIZE], enum names_kind *ret_kind, unsigned *ret_n)
{
    const char *p;

    if (!names_is_ours(name))
        return false;
    p = name + strlen(NAMES_PREFIX);
    if (strspn(p, "0123456789abcdef") != NAMES_ID_SIZE - 1 || p[NAMES_ID_SIZE - 1] != '-')
        return false;
    for (unsigned k = 0; k < NAMES_NKINDS; k++) {
        const char *digits = p + NAMES_ID_SIZE + strlen(kinds[k]);
        size_t ndigits;

        if (strncmp(p + NAMES_ID_SIZE, kinds[k], strlen(kinds[k])) != 0)
            continue;
        ndigits = strspn(digits, "0123456789");
        if (ndigits < 1 || ndigits > 3 || digits[ndigits])
            continue;
        memcpy(id, p, NAMES_ID_SIZE - 1);
        id[NAMES_ID_SIZE - 1] = '\0';
        *ret_kind = (enum names_kind)k;
        *ret_n = (unsigned)strtoul(digits, NULL, 10);
        return true;
    }
    return false;
}

/* QEMU's JSON parser refuses anything else, and then answers without saying whom (RFC 3629: shortest form, no
 * surrogates). */
static bool is_utf8(const char *text)
{
    const unsigned char *p = (const unsigned char *)text;

    while (*p) {
        unsigned n = *p < 0x80                 ? 0
                     : *p >= 0xc2 && *p < 0xe0 ? 1
                     : *p >= 0xe0 && *p < 0xf0 ? 2
                     : *p >= 0xf0 && *p < 0xf5 ? 3
                                               : 4;

        if (n == 4 || (*p == 0xe0 && p[1] < 0xa0) || (*p == 0xed && p[1] > 0x9f) || (*p == 0xf0 && p[1] < 0x90) ||
            (*p == 0xf4 && p[1] > 0x8f))
            return false;
        for (p++; n; n--, p++) {
            if ((*p & 0xc0) != 0x80)
                return false;
        }
    }
    return true;
}

int name_check(const char *name, struct failure *f)
{
    size_t len = strlen(name);

    if (len == 0)
        return failure_set(f, -EINVAL, "a checkpoint needs a name after '@'");
    if (len > NAMES_CHECKPOINT_MAX)
        return failure_set(f, -EINVAL, "the checkpoint's name has %zu bytes, at most %d are allowed", len,
                           NAMES_CHECKPOINT_MAX);
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)name[i];

        if (c < 0x20 || c == 0x7f || c == '/' || c == '@')
            return failure_set(f, -EINVAL,
                               "a checkpoint's name has no '/', '@' or control characters (byte %zu is 0x%02x)", i, c);
    }
    if (!is_utf8(name))
        return failure_set(f, -EINVAL, "a checkpoint's name must be UTF-8");
    if (names_is_ours(name))
        return failure_set(f, -EINVAL, "names that begin with '" NAMES_PREFIX "' are kept for temporary objects");
    return 0;
}
