/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One value of the configuration: from its word to what it means, or a sentence that says what is wrong with it. */
#include "config_internal.h"

#include <ctype.h>
#include <errno.h>

int config_set_string(char **to, const char *value, struct failure *f)
{
    char *copy = strdup(value);

    if (!copy)
        return failure_set(f, -ENOMEM, "out of memory");
    free(*to);
    *to = copy;
    return 0;
}

int config_set_path(char **to, const char *value, struct failure *f)
{
    if (!*value)
        return failure_set(f, -EINVAL, "the path is empty");
    return config_set_string(to, value, f);
}

int config_set_scratch(char **dir, struct place **place, const char *value, struct failure *f)
{
    struct place *new = NULL;

    if (!dir && !place_is_meant(value))
        return failure_set(f, -EINVAL,
                           "\"%s\" is no JSON object of blockdev-add; a directory is named once for all VMs, in "
                           "[server]",
                           value);
    if (place_is_meant(value) && place_parse(value, &new, f) < 0)
        return f->err;
    if (dir && config_set_path(dir, value, f) < 0) {
        place_free(new);
        return f->err;
    }
    place_free(*place);
    *place = new;
    return 0;
}

#define MODE_OWNER 0600u /* what connecting takes, and what we need ourselves */

int config_set_mode(unsigned *to, const char *value, struct failure *f)
{
    char *end;
    unsigned long mode = strtoul(value, &end, 8);

    if (!isdigit((unsigned char)*value) || *end || mode > 0777 || (mode & MODE_OWNER) != MODE_OWNER)
        return failure_set(f, -EINVAL, "\"%s\" is no octal mode from 0600 to 0777 that lets the owner connect", value);
    *to = (unsigned)mode;
    return 0;
}

int config_set_sandbox(enum sandbox_mode *to, const char *value, struct failure *f)
{
    if (strcmp(value, "auto") == 0)
        *to = SANDBOX_AUTO;
    else if (strcmp(value, "require") == 0)
        *to = SANDBOX_REQUIRE;
    else if (strcmp(value, "off") == 0)
        *to = SANDBOX_OFF;
    else
        return failure_set(f, -EINVAL, "\"%s\" is none of auto, require, off", value);
    return 0;
}

int config_set_seconds(unsigned *to_ms, const char *value, struct failure *f)
{
    uint64_t ms = 0;
    const char *s = value;
    unsigned unit = 100;

    if (!isdigit((unsigned char)*s))
        goto bad;
    for (; isdigit((unsigned char)*s); s++) {
        ms = ms * 10 + (uint64_t)(*s - '0') * 1000;
        if (ms > CONFIG_SECONDS_MAX * 1000ull)
            return failure_set(f, -EINVAL, "\"%s\" is more than %u seconds", value, CONFIG_SECONDS_MAX);
    }
    if (*s == '.') {
        for (s++; isdigit((unsigned char)*s) && unit > 0; s++, unit /= 10)
            ms += (uint64_t)(*s - '0') * unit;
    }
    if (*s)
        goto bad;
    *to_ms = (unsigned)ms;
    return 0;
bad:
    return failure_set(f, -EINVAL, "\"%s\" is not a number of seconds", value);
}

int config_set_count(unsigned *to, const char *value, unsigned max, struct failure *f)
{
    char *end;
    unsigned long n;

    errno = 0;
    n = strtoul(value, &end, 10);
    if (!isdigit((unsigned char)*value) || *end || errno || n < 1 || n > max)
        return failure_set(f, -EINVAL, "\"%s\" is not a number from 1 to %u", value, max);
    *to = (unsigned)n;
    return 0;
}

int config_set_size(uint64_t *to, const char *value, struct failure *f)
{
    static const char units[] = "KMGT";
    unsigned shift = 0;
    char *end;
    unsigned long long n;

    errno = 0;
    n = strtoull(value, &end, 10);
    if (isdigit((unsigned char)*value) && *end) {
        const char *unit = strchr(units, toupper((unsigned char)*end));

        if (unit) {
            shift = 10 * (unsigned)(unit - units + 1);
            end++;
        }
    }
    if (!isdigit((unsigned char)*value) || *end)
        return failure_set(f, -EINVAL, "\"%s\" is not a size: a number of bytes, or with K, M, G or T", value);
    if (errno || n > CONFIG_SIZE_MAX >> shift)
        return failure_set(f, -EINVAL, "\"%s\" is more than %lluT", value, CONFIG_SIZE_MAX >> 40);
    *to = (uint64_t)n << shift;
    return 0;
}

int config_set_rate(uint64_t *to, const char *value, struct failure *f)
{
    uint64_t n;

    if (config_set_size(&n, value, f) < 0)
        return f->err;
    if (n > 0 && n < CONFIG_RATE_LEAST)
        return failure_set(f, -EINVAL, "\"%s\" is less than %uK a second: clients would give up waiting", value,
                           CONFIG_RATE_LEAST >> 10);
    *to = n;
    return 0;
}

int config_set_bool(bool *to, const char *value, struct failure *f)
{
    static const char *const yes[] = {"yes", "true", "on", "1"}, *const no[] = {"no", "false", "off", "0"};

    for (size_t i = 0; i < ARRAY_SIZE(yes); i++) {
        if (strcmp(value, yes[i]) == 0) {
            *to = true;
            return 0;
        }
        if (strcmp(value, no[i]) == 0) {
            *to = false;
            return 0;
        }
    }
    return failure_set(f, -EINVAL, "\"%s\" is neither yes nor no", value);
}

int config_set_engine(enum engine *to, const char *value, struct failure *f)
{
    if (engine_parse(value, to) == 0)
        return 0;
    return failure_set(f, -EINVAL, "\"%s\" is none of %s, %s, %s", value, engine_name(ENGINE_AUTO),
                       engine_name(ENGINE_CBW), engine_name(ENGINE_JOB));
}

int config_set_quiesce(enum quiesce_mode *to, const char *value, struct failure *f)
{
    for (unsigned mode = QUIESCE_OFF; mode <= QUIESCE_REQUIRE; mode++) {
        if (strcmp(value, quiesce_mode_name((enum quiesce_mode)mode)) == 0) {
            *to = (enum quiesce_mode)mode;
            return 0;
        }
    }
    return failure_set(f, -EINVAL, "\"%s\" is none of off, try, require", value);
}

int config_set_give_back(enum config_give_back *to, const char *value, struct failure *f)
{
    static const char *const words[] = {[GIVE_BACK_OFF] = "off", [GIVE_BACK_TRIM] = "trim", [GIVE_BACK_READ] = "read"};

    for (size_t i = 0; i < ARRAY_SIZE(words); i++) {
        if (strcmp(words[i], value) == 0) {
            *to = (enum config_give_back)i;
            return 0;
        }
    }
    return failure_set(f, -EINVAL, "\"%s\" is none of off, trim, read", value);
}

int config_set_tls(enum config_tls *to, const char *value, struct failure *f)
{
    static const char *const words[] = {
        [CONFIG_TLS_OFF] = "off", [CONFIG_TLS_ON] = "on", [CONFIG_TLS_REQUIRE] = "require"};

    for (size_t i = 0; i < ARRAY_SIZE(words); i++) {
        if (strcmp(words[i], value) == 0) {
            *to = (enum config_tls)i;
            return 0;
        }
    }
    return failure_set(f, -EINVAL, "\"%s\" is none of off, on, require", value);
}
