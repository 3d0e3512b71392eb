/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpulld: argv and signals around the server. Exit status: 0 ended well, 1 failed, 2 wrong usage or configuration. */
#include "backup/watchdog.h"
#include "child.h"
#include "config.h"
#include "privileges.h"
#include "roster.h"
#include "sandbox.h"
#include "server.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

enum exit_status { EXIT_DONE, EXIT_FAILED, EXIT_USAGE };

static const int signals[] = {SIGTERM, SIGINT, SIGHUP};

struct daemon {
    uv_loop_t loop;
    int argc;
    char **argv; /* main()'s */
    const struct server_config *config;
    struct access access;                     /* owned: since the last SIGHUP; else that of config */
    struct sandbox_config limits;             /* under which we are; its dirs are gone */
    struct server *server;                    /* owned until server_stop() */
    uv_signal_t watches[ARRAY_SIZE(signals)]; /* closed when the server is gone */
    enum exit_status status;
    bool has_pidfile;
};

static void remove_pidfile(struct daemon *d)
{
    if (d->has_pidfile)
        (void)unlink(d->config->pidfile); /* nothing to do about a file that cannot go */
    d->has_pidfile = false;
}

static void on_stopped(void *arg, bool clean)
{
    struct daemon *d = arg;

    if (!clean) { /* something hangs: the loop would never end by itself */
        remove_pidfile(d);
        _exit(EXIT_FAILED);
    }
    for (size_t i = 0; i < ARRAY_SIZE(signals); i++)
        uv_close((uv_handle_t *)&d->watches[i], NULL);
}

static void note_needs(struct sandbox_config *limits, const struct config_vm *vms, size_t nvms)
{
    for (size_t i = 0; i < nvms; i++) {
        limits->starts_itself |= vms[i].qga != NULL;
        limits->opens_images |= vms[i].nimages > 0;
    }
}

/* There is no way out of a sandbox: a VM whose programs could not be started is better refused than served in part. */
static int check_sandbox(const struct daemon *d, const struct server_config *config, struct failure *f)
{
    struct sandbox_config wanted = {0};

    note_needs(&wanted, config->vms, config->nvms);
    if (d->limits.mode == SANDBOX_OFF ||
        (d->limits.starts_itself >= wanted.starts_itself && d->limits.opens_images >= wanted.opens_images))
        return 0;
    return failure_set(f, -EPERM,
                       "a VM has %s now, and none had at the start: the sandbox has no room for the program that is "
                       "needed; restart qpulld",
                       d->limits.opens_images < wanted.opens_images ? "images" : "a guest agent");
}

/*
 * VMs and who may do what, from flags and file as they are now, and certificates and keys; all else stays until the
 * next start.
 */
static void reload(struct daemon *d)
{
    struct roster_change change;
    struct server_config *config = NULL;
    struct failure why = {0};
    struct access before = d->access;

    if (config_parse(d->argc, d->argv, &config, &why) < 0 ||
        config_check_vms(d->config, config->vms, config->nvms, &why) < 0 || check_sandbox(d, config, &why) < 0 ||
        server_set_vms(d->server, config->vms, config->nvms, &change) < 0) {
        log_error("SIGHUP: nothing was changed: %s", why.err ? why.text : "out of memory");
        config_free(config);
        return;
    }
    server_reload_tls(d->server);
    d->access = config->access;
    config->access = (struct access){0};
    server_set_access(d->server, &d->access);
    log_info("SIGHUP: %zu VMs are new, %zu configured anew, %zu gone; %zu rules say who may do what; all else waits "
             "for the next start",
             change.nnew, change.nchanged, change.ngone, d->access.nrules);
    access_done(&before);
    config_free(config);
}

static void on_signal(uv_signal_t *watch, int number)
{
    struct daemon *d = watch->data;

    if (number == SIGHUP) {
        if (!server_is_stopping(d->server))
            reload(d);
        return;
    }
    if (server_is_stopping(d->server)) {
        log_info("%s: ending already", strsignal(number));
        return;
    }
    log_info("%s: ending", strsignal(number));
    (void)sd_notify(/* unset_environment= */ 0, "STOPPING=1");
    server_stop(d->server, on_stopped, d);
}

/* In one step for whoever looks: a file that is there is whole. */
static int write_pidfile(const char *path, struct failure *f)
{
    _cleanup_free_ char *temporary = NULL;
    char text[32];
    int fd, len, r;

    if (asprintf(&temporary, "%s.%d", path, (int)getpid()) < 0)
        return failure_set(f, -ENOMEM, "out of memory");
    fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0)
        return failure_set(f, -errno, "cannot write the pidfile %s: %s", temporary, strerror(errno));
    len = snprintf(text, sizeof text, "%d\n", (int)getpid());
    r = write(fd, text, (size_t)len) == len ? 0 : -EIO;
    if (close(fd) < 0 || (r == 0 && rename(temporary, path) < 0))
        r = -errno;
    if (r < 0) {
        (void)unlink(temporary);
        return failure_set(f, r, "cannot write the pidfile %s: %s", path, strerror(-r));
    }
    return 0;
}

/* The directory of a path, to be freed; NULL: out of memory. */
static char *parent_of(const char *path)
{
    const char *slash = strrchr(path, '/');

    return !slash ? strdup(".") : strndup(path, slash == path ? 1 : (size_t)(slash - path));
}

/* All sockets are open, no client has been heard, and there is one thread: what limits a thread limits all to come. */
static int give_up_rights(struct daemon *d, struct failure *f)
{
    const struct server_config *config = d->config;
    _cleanup_free_ char *pidfile_dir = config->pidfile ? parent_of(config->pidfile) : NULL;
    const char *dirs[3];
    struct sandbox_config limits = {.mode = config->sandbox, .dirs = dirs};
    char text[SANDBOX_TEXT_MAX];
    struct failure why = {0};

    if (config->become.set) {
        if (privileges_drop(&config->become, f) < 0)
            return f->err;
        if (config_check_paths(config, &why) < 0)
            return failure_set(f, why.err, "for the user %s: %s", config->become.name, why.text);
        log_info("this is user %s (%d), group %d from now on", config->become.name, (int)config->become.uid,
                 (int)config->become.gid);
    } else if (geteuid() == 0) {
        log_warning("this is root and stays root: say --user NAME, or start it by its systemd unit");
    }
    if (config->pidfile && !pidfile_dir)
        return failure_set(f, -ENOMEM, "out of memory");
    dirs[limits.ndirs++] = config->state;
    if (!config->place)
        dirs[limits.ndirs++] = config->scratch;
    if (pidfile_dir)
        dirs[limits.ndirs++] = pidfile_dir;
    note_needs(&limits, config->vms, config->nvms);
    if (sandbox_enter(&limits, text, f) < 0)
        return f->err;
    log_info("sandbox: %s", text);
    d->limits = limits;
    d->limits.dirs = NULL;
    return 0;
}

/* All that can fail before anybody may count on us. */
static int begin(struct daemon *d, struct failure *f)
{
    int r;

    r = server_listen(d->server, f);
    if (r == 0)
        r = give_up_rights(d, f);
    if (r == 0)
        r = server_start(d->server, f);
    if (r == 0 && d->config->pidfile) {
        r = write_pidfile(d->config->pidfile, f);
        d->has_pidfile = r == 0;
    }
    return r;
}

static void tell_ready(struct daemon *d)
{
    log_info("qpulld %s serves %zu VM%s; control socket %s", QPULL_VERSION, d->config->nvms,
             d->config->nvms == 1 ? "" : "s", d->config->control);
    for (size_t i = 0; i < server_nlisteners(d->server); i++) {
        log_info("listening on %s", server_address(d->server, i));
        (void)printf("listening on %s\n", server_address(d->server, i));
    }
    (void)fflush(stdout);
    (void)sd_notify(/* unset_environment= */ 0, "READY=1");
}

static enum exit_status run(int argc, char **argv, const struct server_config *config)
{
    struct daemon d = {.argc = argc, .argv = argv, .config = config, .status = EXIT_DONE};
    struct failure why = {0};
    int r;

    sandbox_prepare(config->sandbox);
    r = uv_loop_init(&d.loop);
    if (r < 0) {
        log_error("cannot begin: %s", uv_strerror(r));
        return EXIT_FAILED;
    }
    if (server_new(&d.loop, config, &d.server, &why) < 0) {
        log_error("%s", why.text);
        (void)uv_loop_close(&d.loop);
        return EXIT_FAILED;
    }
    for (size_t i = 0; i < ARRAY_SIZE(signals); i++) {
        (void)uv_signal_init(&d.loop, &d.watches[i]);
        d.watches[i].data = &d;
        (void)uv_signal_start(&d.watches[i], on_signal, signals[i]);
    }
    if (begin(&d, &why) < 0) {
        log_error("%s", why.text);
        d.status = EXIT_FAILED;
        server_stop(d.server, on_stopped, &d);
    } else {
        tell_ready(&d);
    }
    (void)uv_run(&d.loop, UV_RUN_DEFAULT);
    remove_pidfile(&d);
    access_done(&d.access);
    r = uv_loop_close(&d.loop);
    if (r < 0)
        log_error("something was left open: %s", uv_strerror(r));
    if (d.status == EXIT_DONE)
        log_info("ended");
    return d.status;
}

int main(int argc, char **argv)
{
    struct server_config *config = NULL;
    struct failure why = {0};
    enum exit_status status = EXIT_DONE;

    if (child_is_one(argc, argv))
        return child_main(argc, argv);
    if (watchdog_is_one(argc, argv))
        return watchdog_main(argc, argv);
    log_init(LOG_LEVEL_INFO);
    (void)setenv("UV_USE_IO_URING", "0", /* overwrite= */ 1); /* libuv 1.45; sandbox_prepare() has the rest */
    (void)signal(SIGPIPE, SIG_IGN);                           /* a client that leaves is told by write(2) */
    (void)signal(SIGXFSZ, SIG_IGN); /* a file-size limit is an error of that file, not the end of the daemon */
    if (config_parse(argc, argv, &config, &why) < 0) {
        (void)fprintf(stderr, "qpulld: %s\n", why.text);
        return EXIT_USAGE;
    }
    log_init(config->log_level);
    switch (config->wish) {
    case CONFIG_HELP:
        config_print_help(stdout);
        break;
    case CONFIG_VERSION:
        (void)printf("qpulld %s\n", QPULL_VERSION);
        break;
    case CONFIG_RUN:
        if (config_check(config, &why) < 0) {
            (void)fprintf(stderr, "qpulld: %s\n", why.text);
            status = EXIT_USAGE;
        } else {
            status = run(argc, argv, config);
        }
        break;
    }
    config_free(config);
    return status;
}
