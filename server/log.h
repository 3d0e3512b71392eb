/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * log: the daemon's one place that writes to stderr: one line per event. Libraries do not log; they hand failures to
 * whoever decides. Bytes that are not plain printable UTF-8 are escaped, so that a client cannot forge a line.
 *
 * Any thread after log_init(); a line is one write.
 */
#ifndef QPULL_LOG_H
#define QPULL_LOG_H

#include "qmp/base.h"

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARNING, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

/* Names as --log takes them; -EINVAL. */
int log_level_parse(const char *name, enum log_level *ret_level);
const char *log_level_name(enum log_level level);

/* With stderr on the journal (JOURNAL_STREAM, see systemd.exec(5)) lines carry a priority instead of time and level. */
void log_init(enum log_level level);

/* Lines go to sink, clean but without time and level, and not to stderr: where a library's user has a log of its own.
 * NULL: to stderr. Before any other thread logs. */
void log_init_sink(enum log_level level, void (*sink)(enum log_level level, const char *line));

void log_line(enum log_level level, const char *fmt, ...) _printf_(2, 3);

#define log_error(...) log_line(LOG_LEVEL_ERROR, __VA_ARGS__)
#define log_warning(...) log_line(LOG_LEVEL_WARNING, __VA_ARGS__)
#define log_info(...) log_line(LOG_LEVEL_INFO, __VA_ARGS__)
#define log_debug(...) log_line(LOG_LEVEL_DEBUG, __VA_ARGS__)

/* Copies text into to (size bytes, always terminated), with control characters and broken UTF-8 as \xNN. Returns to. */
char *log_escape(char *to, size_t size, const char *text);

#endif
