/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A name becomes a file's name by writing each byte outside of a small plain set as %XX, so that it can be told from
 * it. What would be longer than a file's name may be keeps its beginning and gets a hash, marked by "%~", which no
 * plain encoding contains; the name itself should stand in the file.
 */
#include "backup/state_file.h"

#include "backup/names.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/stat.h>

#define TEMP_PREFIX ".qpull-" /* and 8 hex digits; an encoded name never begins with a dot */
#define TEMP_SUFFIX ".tmp"
static_assert(sizeof(TEMP_PREFIX) + NAMES_ID_SIZE + sizeof(TEMP_SUFFIX) <= STATE_TEMP_SIZE, "it fits");
#define TEMP_TRIES 16
#define HASH_MARK "%~"
#define FNV_BASIS UINT64_C(0xcbf29ce484222325) /* FNV-1a, 64 bits (Fowler, Noll, Vo) */
#define FNV_PRIME UINT64_C(0x100000001b3)
#define FILE_MODE 0600
#define DIR_MODE 0700

/* -- names --------------------------------------------------------------------------------------------------------- */

uint64_t state_hash(const char *text)
{
    uint64_t h = FNV_BASIS;

    for (; *text; text++)
        h = (h ^ (unsigned char)*text) * FNV_PRIME;
    return h;
}

/* A leading '-' or '.' would be taken for an option or hide the file. */
static bool is_plain(unsigned char c, bool first)
{
    return c < 0x80 && (isalnum(c) || strchr("_+=,:", c) || (!first && strchr("-.", c)));
}

/* Writes whole bytes as long as they fit in room and returns how many of name went in. */
static size_t encode(const char *name, char *out, size_t room)
{
    static const char hex[] = "0123456789ABCDEF";
    size_t i;

    for (i = 0; name[i]; i++) {
        unsigned char c = (unsigned char)name[i];
        size_t need = is_plain(c, i == 0) ? 1 : 3;

        if (need > room)
            break;
        room -= need;
        if (need == 1) {
            *out++ = (char)c;
        } else {
            *out++ = '%';
            *out++ = hex[c >> 4];
            *out++ = hex[c & 15];
        }
    }
    *out = '\0';
    return i;
}

const char *state_name(const char *name, const char *suffix, char out[NAME_MAX + 1])
{
    size_t room = NAME_MAX - strlen(suffix), len;

    if (name[encode(name, out, room)]) {
        (void)encode(name, out, room - strlen(HASH_MARK) - STATE_HASH_DIGITS);
        len = strlen(out);
        (void)snprintf(out + len, NAME_MAX + 1 - len, "%s%0*" PRIx64, HASH_MARK, STATE_HASH_DIGITS, state_hash(name));
    }
    len = strlen(out);
    (void)snprintf(out + len, NAME_MAX + 1 - len, "%s", suffix);
    return out;
}

static int hex_value(char c)
{
    const char *digits = "0123456789ABCDEF", *p = c ? strchr(digits, c) : NULL;

    return p ? (int)(p - digits) : -1;
}

bool state_name_parse(const char *file, const char *suffix, char out[NAME_MAX + 1])
{
    char again[NAME_MAX + 1];
    size_t len = strlen(file), end, n = 0;

    if (len > NAME_MAX || len <= strlen(suffix) || strcmp(file + len - strlen(suffix), suffix) != 0)
        return false;
    end = len - strlen(suffix);
    for (size_t i = 0; i < end; i++) {
        int high = 0, low = 0;

        if (file[i] == '%' && end - i < 3)
            return false;
        if (file[i] == '%' && ((high = hex_value(file[i + 1])) < 0 || (low = hex_value(file[i + 2])) < 0))
            return false;
        out[n++] = (char)(file[i] == '%' ? high << 4 | low : file[i]);
        i += file[i] == '%' ? 2 : 0;
    }
    out[n] = '\0';
    return strlen(out) == n && strcmp(state_name(out, suffix, again), file) == 0;
}

void state_temp_name(char out[STATE_TEMP_SIZE])
{
    char id[NAMES_ID_SIZE];

    names_new_id(id);
    (void)snprintf(out, STATE_TEMP_SIZE, TEMP_PREFIX "%s" TEMP_SUFFIX, id);
}

bool state_is_temp(const char *file)
{
    size_t digits = strlen(TEMP_PREFIX), end = digits + NAMES_ID_SIZE - 1;

    return strncmp(file, TEMP_PREFIX, digits) == 0 && strspn(file + digits, "0123456789abcdef") == end - digits &&
           strcmp(file + end, TEMP_SUFFIX) == 0;
}

/* -- directories --------------------------------------------------------------------------------------------------- */

int state_open_dir(int at, const char *name)
{
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    return fd < 0 ? -errno : fd;
}

/* Makes the directory if it is not there, so that it stays after a loss of power. */
int state_make_dir(int at, const char *name)
{
    _cleanup_fd_ int parent = -1;

    if (mkdirat(at, name, DIR_MODE) < 0)
        return errno == EEXIST ? 0 : -errno;
    parent = state_open_dir(at, "."); /* `at` may be an O_PATH descriptor, which cannot be synced */
    if (parent < 0)
        return parent;
    return fsync(parent) < 0 ? -errno : 0;
}

/* -- files --------------------------------------------------------------------------------------------------------- */

int state_read(int dir, const char *file, size_t max, char **ret_text, size_t *ret_len, struct failure *f)
{
    /* O_NONBLOCK: a FIFO is opened at once, to be refused. */
    _cleanup_fd_ int fd = openat(dir, file, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    _cleanup_free_ char *text = NULL;
    struct stat st;
    size_t len = 0;

    if (fd < 0 && errno == ENOENT)
        return -ENOENT;
    if (fd < 0 && errno == ELOOP)
        return failure_set(f, -ELOOP, "it is a symbolic link, which is not followed");
    if (fd < 0 || fstat(fd, &st) < 0)
        return failure_set(f, -errno, "it cannot be opened: %s", strerror(errno));
    if (!S_ISREG(st.st_mode))
        return failure_set(f, -EBADMSG, "it is not a regular file");
    if ((uintmax_t)st.st_size > max)
        return failure_set(f, -EFBIG, "it has %jd bytes, at most %zu are read", (intmax_t)st.st_size, max);
    text = malloc(max + 1); /* it may grow while we read */
    if (!text)
        return failure_set(f, -ENOMEM, "out of memory");
    for (;;) {
        ssize_t n = read(fd, text + len, max + 1 - len);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return failure_set(f, -errno, "it cannot be read: %s", strerror(errno));
        if (n == 0)
            break;
        len += (size_t)n;
        if (len > max)
            return failure_set(f, -EFBIG, "it has more than %zu bytes", max);
    }
    *ret_text = TAKE_PTR(text);
    *ret_len = len;
    return 0;
}

static int write_all(int fd, const char *text, size_t len)
{
    while (len) {
        ssize_t n = write(fd, text, len);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        text += n;
        len -= (size_t)n;
    }
    return fsync(fd) < 0 ? -errno : 0;
}

static int open_temp(int dir, char temp[STATE_TEMP_SIZE])
{
    int fd = -1;

    for (int i = 0; fd < 0 && i < TEMP_TRIES; i++) {
        state_temp_name(temp);
        fd = openat(dir, temp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, FILE_MODE);
        if (fd < 0 && errno != EEXIST)
            break;
    }
    return fd < 0 ? -errno : fd;
}

int state_replace(int dir, const char *file, const char *text, size_t len)
{
    char temp[STATE_TEMP_SIZE];
    int fd = open_temp(dir, temp), r;

    if (fd < 0)
        return fd;
    r = write_all(fd, text, len);
    if (close(fd) < 0 && r == 0)
        r = -errno;
    if (r == 0 && renameat(dir, temp, dir, file) < 0)
        r = -errno;
    if (r < 0)
        (void)unlinkat(dir, temp, 0); /* if not: state_is_temp() knows it */
    return r;
}
