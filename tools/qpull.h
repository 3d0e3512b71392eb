/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * qpull: what the parts of the command-line tool share: the words of the command line, and the daemon at the other end
 * of the control socket. One process, one command, one thread; memory is freed where a long run would grow.
 *
 * Errors are one sentence on stderr: a function that fails has said it, and returns the exit status.
 */
#ifndef QPULL_TOOL_H
#define QPULL_TOOL_H

#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>

enum exit_status { EXIT_DONE, EXIT_FAILED, EXIT_USAGE };

#define QPULL_CONTROL "/run/qpull/control.sock" /* qpulld's default (server/config.h) */
#define QPULL_WORDS_MAX 8

/* -- the command line ---------------------------------------------------------------------------------------------- */
enum option_bit {
    OPTION_JSON = 1 << 0,
    OPTION_WATCH = 1 << 1,
    OPTION_DISK = 1 << 2,
    OPTION_TREE = 1 << 3,
    OPTION_ROOTS = 1 << 4,
    OPTION_LEAVES = 1 << 5,
    OPTION_CHILDREN = 1 << 6,
    OPTION_DESCENDANTS = 1 << 7,
    OPTION_SIZE = 1 << 8,
    OPTION_DESCRIPTION = 1 << 9,
    OPTION_PARENT = 1 << 10,
    OPTION_WITH_DESCENDANTS = 1 << 11,
    OPTION_NOTE_ONLY = 1 << 12,
    OPTION_ACCEPT = 1 << 13,
    OPTION_TOP = 1 << 14, /* this and the next ones: of a commit */
    OPTION_BASE = 1 << 15,
    OPTION_SHALLOW = 1 << 16,
    OPTION_ACTIVE = 1 << 17,
    OPTION_DELETE = 1 << 18,
    OPTION_FORCE = 1 << 19,
    OPTION_QUIET = 1 << 20,
    OPTION_CLIENT = 1 << 21, /* this and the next ones: of certs */
    OPTION_PSK = 1 << 22,
    OPTION_HOST = 1 << 23,
    OPTION_CHECKPOINT = 1 << 24, /* this and the next ones: of sessions */
    OPTION_KEEP = 1 << 25,
    OPTION_TICKET = 1 << 26,
    OPTION_TTL = 1 << 27,
    OPTION_RATE = 1 << 28,
    OPTION_COMMIT = 1 << 29,
    OPTION_ROLLBACK = 1 << 30,
};
#define QPULL_DISKS_MAX 64 /* --disk on one command line; --client, --psk and --host likewise */

struct args {
    unsigned given; /* option_bit */
    const char *control;
    const char *disks[QPULL_DISKS_MAX]; /* none: all */
    size_t ndisks;
    const char *clients[QPULL_DISKS_MAX], *psks[QPULL_DISKS_MAX], *hosts[QPULL_DISKS_MAX];
    size_t nclients, npsks, nhosts;
    const char *description, *parent;   /* NULL: not given */
    const char *top, *base;             /* likewise */
    const char *checkpoint, *ttl, *rate; /* likewise */
    const char *words[QPULL_WORDS_MAX]; /* the command's arguments, without its name */
    size_t nwords;
};

struct command {
    const char *name;    /* one word or two */
    const char *usage;   /* its arguments */
    const char *summary; /* one line */
    const char *help;    /* more of it, or NULL */
    unsigned options;    /* it takes, besides --control and --help */
    size_t min_words, max_words;
    enum exit_status (*run)(const struct args *args);
};

/* Says the sentence, with "qpull: " before it, and returns EXIT_FAILED. */
enum exit_status complain(const char *fmt, ...) _printf_(1, 2);

/* -- the daemon: qpull_daemon.c ------------------------------------------------------------------------------------ */
struct daemon;

/* EXIT_DONE and a connection that daemon_close() ends; or the sentence is said. */
enum exit_status daemon_open(const char *path, struct daemon **ret_daemon);
void daemon_close(struct daemon *d); /* NULL is fine */

/* An argument that is a string; NULL: left out. */
void put_text(struct json_object *o, const char *key, const char *text);
/* One command; its arguments are given. *ret is owned by the caller (json_object_put()). */
enum exit_status daemon_call(struct daemon *d, struct json_object **ret, const char *command, struct json_object *args);
/* The same with string arguments: pairs of key and value, ended by NULL; a pair whose value is NULL is left out. */
enum exit_status daemon_ask(struct daemon *d, struct json_object **ret, const char *command, ...)
    __attribute__((sentinel));
/* Passes time without losing sight of the daemon. EXIT_FAILED: it is gone, and that is said. */
enum exit_status daemon_wait(struct daemon *d, unsigned ms);

/* From now on SIGINT and SIGTERM do not end the program, but daemon_wait(), once; and as usual again. */
void daemon_catch_signals(struct daemon *d);
void daemon_release_signals(struct daemon *d);
bool daemon_was_interrupted(const struct daemon *d);

/* -- output: qpull_table.c ----------------------------------------------------------------------------------------- */
#define TABLE_COLUMNS_MAX 12

struct table {
    size_t ncolumns;
    struct {
        const char *title;
        bool right; /* numbers stand on the right */
    } columns[TABLE_COLUMNS_MAX];
    char **cells; /* owned, each: row by row */
    size_t ncells;
};

/* The next cell; control characters are shown as "?", NULL as "-". Out of memory ends the program. */
void table_add(struct table *t, const char *fmt, ...) _printf_(2, 3);
void table_print(const struct table *t);
void table_done(struct table *t);

const char *size_text(char to[32], uint64_t bytes);   /* "10 GiB" */
const char *time_text(char to[32], uint64_t seconds); /* "3d 04:05:06" */
void print_json(struct json_object *o);

/* Members of an answer; NULL and 0 where they are missing or of another type. */
const char *answer_text(struct json_object *o, const char *key);
uint64_t answer_number(struct json_object *o, const char *key);
bool answer_bool(struct json_object *o, const char *key);
struct json_object *answer_array(struct json_object *o, const char *key);

/* -- commands: qpull_show.c, qpull_checkpoint.c, qpull_commit.c
 * -------------------------------------------------------------------- */
enum exit_status run_vms(const struct args *args);
enum exit_status run_disks(const struct args *args);
enum exit_status run_status(const struct args *args);
enum exit_status run_checkpoint_list(const struct args *args);
enum exit_status run_checkpoint_show(const struct args *args);
enum exit_status run_checkpoint_can_increment(const struct args *args);
enum exit_status run_checkpoint_adopt(const struct args *args);
enum exit_status run_checkpoint_invalidate(const struct args *args);
enum exit_status run_checkpoint_export(const struct args *args);
enum exit_status run_checkpoint_import(const struct args *args);
enum exit_status run_checkpoint_rename_vm(const struct args *args);
enum exit_status run_checkpoint_create(const struct args *args);
enum exit_status run_checkpoint_delete(const struct args *args);
enum exit_status run_certs_init(const struct args *args); /* qpull_certs.c */
enum exit_status run_begin(const struct args *args);      /* qpull_session.c */
enum exit_status run_end(const struct args *args);
enum exit_status run_metrics(const struct args *args);
enum exit_status run_commit(const struct args *args);
enum exit_status run_doctor(const struct args *args); /* qpull_doctor.c */

#endif
