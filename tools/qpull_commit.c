/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpull_commit: a block commit, from its beginning to its end: the daemon does it, this waits and tells. */
#include "qpull.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <unistd.h>

#define POLL_MS 250u       /* how often the daemon is asked how far it is */
#define BAR_AFTER_MS 1000u /* what is done sooner needs no bar */
#define BAR_WIDTH 40u

/* A file name that is relative to this process means nothing to QEMU. Owned by the caller. */
static char *absolute(const char *what)
{
    char path[PATH_MAX];

    if (what && what[0] != '/' && strchr(what, '/') && realpath(what, path))
        return strdup(path);
    return what ? strdup(what) : NULL;
}

static void put_flag(struct json_object *o, const char *key, bool flag)
{
    if (flag)
        json_object_object_add(o, key, json_object_new_boolean(true));
}

static enum exit_status start(struct daemon *d, const struct args *args, char **ret_job)
{
    const char *slash = strchr(args->words[0], '/');
    _cleanup_free_ char *vm = strndup(args->words[0], (size_t)(slash - args->words[0]));
    _cleanup_free_ char *top = absolute(args->top), *base = absolute(args->base);
    struct json_object *query = json_object_new_object(), *answer = NULL;
    enum exit_status status;

    put_text(query, "vm", vm);
    put_text(query, "disk", slash + 1);
    put_text(query, "top", top);
    put_text(query, "base", base);
    put_flag(query, "shallow", args->given & OPTION_SHALLOW);
    put_flag(query, "active", args->given & OPTION_ACTIVE);
    put_flag(query, "delete", args->given & OPTION_DELETE);
    put_flag(query, "force", args->given & OPTION_FORCE);
    status = daemon_call(d, &answer, "block-commit", query);
    if (status == EXIT_DONE && answer_text(answer, "id"))
        *ret_job = strdup(answer_text(answer, "id"));
    json_object_put(answer);
    return status == EXIT_DONE && !*ret_job ? complain("qpulld's answer has no job in it") : status;
}

/* Owned by the caller; NULL: the daemon no longer knows it. */
static enum exit_status look(struct daemon *d, const char *job, struct json_object **ret)
{
    struct json_object *all = NULL;
    enum exit_status status = daemon_ask(d, &all, "query-jobs", NULL);

    for (size_t i = 0; status == EXIT_DONE && i < json_object_array_length(all); i++) {
        struct json_object *o = json_object_array_get_idx(all, i);
        const char *id = answer_text(o, "id");

        if (id && strcmp(id, job) == 0) /* NOLINT(clang-analyzer-core.NonNullParamChecker): there is one on success */
            *ret = json_object_get(o);
    }
    json_object_put(all);
    return status == EXIT_DONE && !*ret ? complain("qpulld knows nothing of job %s any more: it was started anew", job)
                                        : status;
}

static void draw(struct json_object *job)
{
    uint64_t current = answer_number(job, "current-progress"), total = answer_number(job, "total-progress");
    unsigned filled = total ? (unsigned)((double)current / (double)total * BAR_WIDTH) : 0;
    char bar[BAR_WIDTH + 1], done[32], all[32];

    memset(bar, '.', BAR_WIDTH);
    memset(bar, '#', MIN(filled, BAR_WIDTH));
    bar[BAR_WIDTH] = '\0';
    (void)fprintf(stderr, "\r[%s] %s of %s\033[K", bar, size_text(done, current), size_text(all, total));
}

static enum exit_status wait_for(struct daemon *d, const char *id, bool with_bar, struct json_object **ret_job)
{
    enum exit_status status = EXIT_DONE;
    unsigned waited_ms = 0;
    bool cancelled = false;

    while (status == EXIT_DONE) {
        struct json_object *job = NULL, *none = NULL;
        const char *state;

        if (daemon_was_interrupted(d) && !cancelled) {
            daemon_release_signals(d); /* once more ends this program at once; the daemon goes on cancelling */
            cancelled = true;
            status = daemon_ask(d, &none, "job-cancel", "id", id, NULL);
            json_object_put(none);
        }
        if (status == EXIT_DONE)
            status = look(d, id, &job);
        if (status != EXIT_DONE)
            break;
        state = answer_text(job, "status");
        if (state && strcmp(state, "concluded") == 0) {
            *ret_job = job;
            break;
        }
        if (with_bar && waited_ms >= BAR_AFTER_MS)
            draw(job);
        json_object_put(job);
        status = daemon_wait(d, POLL_MS);
        waited_ms += POLL_MS;
    }
    if (with_bar && waited_ms >= BAR_AFTER_MS)
        (void)fputs("\r\033[K", stderr);
    return status;
}

static size_t length_of(struct json_object *array)
{
    return array ? json_object_array_length(array) : 0;
}

/* Nodes of a powered-off VM's images have no names that anybody knows. */
static const char *name_of(struct json_object *job, const char *node, const char *file)
{
    return answer_text(job, answer_bool(job, "powered-off") ? file : node);
}

static void print_live(struct json_object *job)
{
    const char *base = answer_text(job, "base-file"), *emptied = answer_text(job, "emptied");

    if (emptied)
        printf("%s is an empty image over that now: the VM is started with it as before\n", emptied);
    else if (answer_bool(job, "powered-off"))
        printf("start the VM with %s from now on, and tell qpulld: --image %s/%s=%s\n", base, answer_text(job, "vm"),
               answer_text(job, "disk"), base);
    else
        printf("the guest goes on in %s: start the VM with that image from now on\n", base);
}

static void print_report(struct json_object *job, bool active)
{
    struct json_object *checkpoints = answer_array(job, "checkpoints"), *deleted = answer_array(job, "deleted");

    printf("committed '%s' into '%s'\n", name_of(job, "top", "top-file"), name_of(job, "base", "base-file"));
    if (active)
        print_live(job);
    for (size_t i = 0; i < length_of(checkpoints); i++) {
        struct json_object *c = json_object_array_get_idx(checkpoints, i);
        const char *text = answer_text(c, "text");

        printf("checkpoint \"%s\": %s%s%s\n", answer_text(c, "name"), answer_text(c, "state"), text ? ": " : "",
               text ? text : "");
    }
    for (size_t i = 0; i < length_of(deleted); i++)
        printf("deleted %s\n", json_object_get_string(json_object_array_get_idx(deleted, i)));
}

static bool is_any_broken(struct json_object *job)
{
    struct json_object *checkpoints = answer_array(job, "checkpoints");

    for (size_t i = 0; i < length_of(checkpoints); i++) {
        const char *state = answer_text(json_object_array_get_idx(checkpoints, i), "state");

        if (state && strcmp(state, "broken") == 0)
            return true;
    }
    return false;
}

static enum exit_status report(struct json_object *job, const struct args *args)
{
    const char *error = answer_text(job, "error"), *problem = answer_text(job, "problem");
    enum exit_status status = EXIT_DONE;

    if (args->given & OPTION_JSON)
        print_json(job);
    else if (!error && !(args->given & OPTION_QUIET))
        print_report(job, args->given & OPTION_ACTIVE);
    if (error)
        status = complain("%s", error);
    if (problem)
        status = complain("%s", problem);
    if (!error && !(args->given & OPTION_FORCE) && is_any_broken(job))
        status = complain("the data are committed, but a checkpoint was spoiled");
    return status;
}

enum exit_status run_commit(const struct args *args)
{
    const char *slash = strchr(args->words[0], '/');
    bool with_bar = isatty(STDERR_FILENO) && !(args->given & (OPTION_QUIET | OPTION_JSON));
    _cleanup_free_ char *id = NULL;
    struct json_object *job = NULL;
    struct daemon *d = NULL;
    enum exit_status status;

    if (!slash || slash == args->words[0] || !slash[1]) {
        (void)complain("\"%s\" is no VM/DISK; see qpull disks", args->words[0]);
        return EXIT_USAGE;
    }
    if ((args->given & OPTION_SHALLOW) && args->base) {
        (void)complain("--shallow and --base contradict each other: shallow means the image right below top");
        return EXIT_USAGE;
    }
    status = daemon_open(args->control, &d);
    if (status == EXIT_DONE) {
        daemon_catch_signals(d);
        status = start(d, args, &id);
    }
    if (status == EXIT_DONE)
        status = wait_for(d, id, with_bar, &job);
    if (status == EXIT_DONE)
        status = report(job, args);
    json_object_put(job);
    daemon_close(d);
    return status;
}
