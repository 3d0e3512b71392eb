/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "log.h"

#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_BYTES 4096

static const struct {
    const char *name;
    const char *prefix; /* sd-daemon(3) */
} levels[] = {
    [LOG_LEVEL_ERROR] = {"error", "<3>"},
    [LOG_LEVEL_WARNING] = {"warning", "<4>"},
    [LOG_LEVEL_INFO] = {"info", "<6>"},
    [LOG_LEVEL_DEBUG] = {"debug", "<7>"},
};
static_assert(ARRAY_SIZE(levels) == LOG_LEVEL_DEBUG + 1, "a level without a name");

/* The only global state of the daemon: a log line must be possible from anywhere. */
static enum log_level threshold = LOG_LEVEL_INFO;
static bool to_journal;
static void (*to_sink)(enum log_level level, const char *line);

int log_level_parse(const char *name, enum log_level *ret_level)
{
    for (size_t i = 0; i < ARRAY_SIZE(levels); i++)
        if (strcmp(levels[i].name, name) == 0) {
            *ret_level = (enum log_level)i;
            return 0;
        }
    return -EINVAL;
}

const char *log_level_name(enum log_level level)
{
    return levels[level].name;
}

void log_init(enum log_level level)
{
    const char *stream = getenv("JOURNAL_STREAM");
    struct stat st;

    threshold = level;
    to_journal = false;
    if (stream && fstat(STDERR_FILENO, &st) == 0) {
        char ours[64];
        (void)snprintf(ours, sizeof ours, "%ju:%ju", (uintmax_t)st.st_dev, (uintmax_t)st.st_ino);
        to_journal = strcmp(ours, stream) == 0;
    }
}

void log_init_sink(enum log_level level, void (*sink)(enum log_level, const char *))
{
    log_init(level);
    to_sink = sink;
}

/* Bytes of the UTF-8 character at s, 0 if it is none (overlong forms and surrogates are none: RFC 3629). */
static size_t utf8_length(const unsigned char *s)
{
    if (s[0] < 0x80)
        return 1;
    if (s[0] >= 0xc2 && s[0] <= 0xdf)
        return (s[1] & 0xc0) == 0x80 ? 2 : 0;
    if (s[0] >= 0xe0 && s[0] <= 0xef) {
        if ((s[1] & 0xc0) != 0x80 || (s[2] & 0xc0) != 0x80)
            return 0;
        if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f))
            return 0;
        return 3;
    }
    if (s[0] >= 0xf0 && s[0] <= 0xf4) {
        if ((s[1] & 0xc0) != 0x80 || (s[2] & 0xc0) != 0x80 || (s[3] & 0xc0) != 0x80)
            return 0;
        if ((s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f))
            return 0;
        return 4;
    }
    return 0;
}

/* C1 control characters (U+0080 to U+009F) steer terminals, too. */
static bool is_control(const unsigned char *s)
{
    return s[0] < 0x20 || s[0] == 0x7f || (s[0] == 0xc2 && s[1] < 0xa0);
}

char *log_escape(char *to, size_t size, const char *text)
{
    static const char hex[] = "0123456789abcdef";
    const unsigned char *s = (const unsigned char *)text;
    size_t used = 0;

    if (size == 0)
        return to;
    while (*s) {
        size_t n = utf8_length(s);
        if (n > 0 && !is_control(s)) {
            if (used + n >= size)
                break;
            memcpy(to + used, s, n);
            used += n;
            s += n;
        } else {
            if (used + 4 >= size)
                break;
            to[used++] = '\\';
            to[used++] = 'x';
            to[used++] = hex[*s >> 4];
            to[used++] = hex[*s & 15];
            s++;
        }
    }
    to[used] = 0;
    return to;
}

void log_line(enum log_level level, const char *fmt, ...)
{
    char text[LINE_MAX_BYTES / 2], clean[LINE_MAX_BYTES], line[LINE_MAX_BYTES + 64];
    int len;
    va_list ap;

    if (level > threshold)
        return;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap); /* a longer line is cut: its beginning says what happened */
    va_end(ap);
    log_escape(clean, sizeof clean, text);

    if (to_sink) {
        to_sink(level, clean);
        return;
    }
    if (to_journal) {
        len = snprintf(line, sizeof line, "%s%s\n", levels[level].prefix, clean);
    } else {
        struct timespec now;
        struct tm tm;
        char date[32];

        clock_gettime(CLOCK_REALTIME, &now);
        gmtime_r(&now.tv_sec, &tm);
        (void)strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &tm);
        len = snprintf(line, sizeof line, "%s.%03ldZ %s: %s\n", date, now.tv_nsec / 1000000, levels[level].name, clean);
    }
    /* Nobody is left to tell when stderr fails. */
    if (len > 0 && write(STDERR_FILENO, line, (size_t)len) < 0)
        return;
}
