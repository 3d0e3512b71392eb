/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpull_session: sessions that stand for themselves: begun, and ended. */
#include "qpull.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>

/* A number with a unit behind it, or without; 0: it is none. */
static int64_t number_of(const char *text, const char *units, const int64_t *worth)
{
    const char *unit;
    char *end;
    long long n;

    errno = 0;
    n = strtoll(text, &end, 10);
    if (!isdigit((unsigned char)*text) || errno || n < 1)
        return 0;
    if (!*end)
        return n;
    unit = strchr(units, *end);
    if (!unit || end[1] || n > INT64_MAX / worth[unit - units])
        return 0;
    return n * worth[unit - units];
}

static int64_t seconds_of(const char *text)
{
    static const int64_t worth[] = {1, 60, 3600, 86400};

    return number_of(text, "smhd", worth);
}

static int64_t bytes_of(const char *text)
{
    static const int64_t worth[] = {INT64_C(1) << 10, INT64_C(1) << 20, INT64_C(1) << 30, INT64_C(1) << 40,
                                    INT64_C(1) << 10, INT64_C(1) << 20, INT64_C(1) << 30, INT64_C(1) << 40};

    return number_of(text, "KMGTkmgt", worth);
}

static enum exit_status put_number(struct json_object *o, const char *key, const char *text, int64_t n,
                                   const char *example)
{
    if (!text)
        return EXIT_DONE;
    if (n == 0) {
        (void)complain("--%s: \"%s\" is not like %s", key, text, example);
        return EXIT_USAGE;
    }
    json_object_object_add(o, key, json_object_new_int64(n));
    return EXIT_DONE;
}

static void put_flag(struct json_object *o, const char *key, bool flag)
{
    if (flag)
        json_object_object_add(o, key, json_object_new_boolean(true));
}

/* -- begin --------------------------------------------------------------------------------------------------------- */

static void print_begun(struct json_object *begun, const struct args *args)
{
    struct json_object *disks = answer_array(begun, "disks");
    uint64_t idle = answer_number(begun, "begin-timeout");
    const char *checkpoint = answer_text(begun, "checkpoint");

    if (!(args->given & OPTION_QUIET)) {
        (void)fprintf(stderr, "session %s of VM %s%s%s; until `qpull end %s`", answer_text(begun, "session"),
                      answer_text(begun, "vm"), checkpoint ? ", checkpoint " : "", checkpoint ? checkpoint : "",
                      answer_text(begun, "session"));
        if (idle)
            (void)fprintf(stderr, ", or %" PRIu64 " s without a client", idle);
        if (args->ttl)
            (void)fprintf(stderr, ", or the end of %s", args->ttl);
        (void)fputc('\n', stderr);
    }
    for (size_t i = 0; disks && i < json_object_array_length(disks); i++) {
        struct json_object *uris = answer_array(json_object_array_get_idx(disks, i), "uris");

        for (size_t k = 0; uris && k < json_object_array_length(uris); k++)
            printf("%s\n", json_object_get_string(json_object_array_get_idx(uris, k)));
    }
}

enum exit_status run_begin(const struct args *args)
{
    struct json_object *wish = json_object_new_object(), *disks, *begun = NULL;
    struct daemon *d = NULL;
    enum exit_status status;

    put_text(wish, "vm", args->words[0]);
    put_text(wish, "checkpoint", args->checkpoint);
    put_flag(wish, "keep", args->given & OPTION_KEEP);
    put_flag(wish, "ticket", args->given & OPTION_TICKET);
    if (args->ndisks > 0) {
        disks = json_object_new_array();
        for (size_t i = 0; i < args->ndisks; i++)
            json_object_array_add(disks, json_object_new_string(args->disks[i]));
        json_object_object_add(wish, "disk", disks);
    }
    status = put_number(wish, "ttl", args->ttl, args->ttl ? seconds_of(args->ttl) : 0, "90, 90s, 30m, 2h or 1d");
    if (status == EXIT_DONE)
        status = put_number(wish, "rate", args->rate, args->rate ? bytes_of(args->rate) : 0, "1000000, 50M or 1G");
    if (status == EXIT_DONE)
        status = daemon_open(args->control, &d);
    if (status == EXIT_DONE)
        status = daemon_call(d, &begun, "session-begin", TAKE_PTR(wish));
    if (status == EXIT_DONE && (args->given & OPTION_JSON))
        print_json(begun);
    else if (status == EXIT_DONE)
        print_begun(begun, args);
    json_object_put(wish);
    json_object_put(begun);
    daemon_close(d);
    return status;
}

/* -- end ----------------------------------------------------------------------------------------------------------- */

static void print_disks(struct json_object *disks, const char *words, const char *checkpoint)
{
    for (size_t i = 0; disks && i < json_object_array_length(disks); i++)
        printf("checkpoint %s is %s disk %s\n", checkpoint, words,
               json_object_get_string(json_object_array_get_idx(disks, i)));
}

enum exit_status run_end(const struct args *args)
{
    bool keep = args->given & OPTION_COMMIT, drop = args->given & OPTION_ROLLBACK;
    const char *checkpoint, *problems;
    struct json_object *ended = NULL, *dropped;
    struct daemon *d = NULL;
    enum exit_status status;

    if (keep && drop) {
        (void)complain("--commit and --rollback contradict each other");
        return EXIT_USAGE;
    }
    status = daemon_open(args->control, &d);
    if (status == EXIT_DONE)
        status = daemon_ask(d, &ended, "session-end", "session", args->words[0], "checkpoint",
                            keep   ? "commit"
                            : drop ? "rollback"
                                   : NULL,
                            NULL);
    if (status == EXIT_DONE) {
        checkpoint = answer_text(ended, "checkpoint");
        problems = answer_text(ended, "problems");
        dropped = answer_array(ended, "dropped");
        if (args->given & OPTION_JSON)
            print_json(ended);
        else if (checkpoint && !(args->given & OPTION_QUIET)) {
            print_disks(answer_array(ended, "kept"), "kept on", checkpoint);
            print_disks(dropped, "not kept on", checkpoint);
        }
        if (problems)
            status = complain("%s", problems);
        else if (keep && dropped && json_object_array_length(dropped) > 0)
            status = complain("the checkpoint could not be kept on all disks");
    }
    json_object_put(ended);
    daemon_close(d);
    return status;
}
