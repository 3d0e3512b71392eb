/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * nbd_servers: real NBD servers for the tests of source/nbd. Each gets a listening socket that exists before it
 * starts (systemd's socket activation, which qemu-nbd and nbdkit understand), so that nobody waits for a server to be
 * ready: a connection just sits in the backlog. All files are in a temporary directory that goes with the server.
 */
#ifndef QPULL_TEST_NBD_SERVERS_H
#define QPULL_TEST_NBD_SERVERS_H

#include "lib/test.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define LISTEN_FD 3 /* sd_listen_fds(3): SD_LISTEN_FDS_START */
#define TEST_SKIPPED 77

struct server {
    char dir[32];
    char path[64]; /* its socket */
    pid_t pid;     /* 0: none runs */
    int listener;  /* ours, -1 once closed */
};

static inline bool have_program(const char *name)
{
    char command[128];

    (void)snprintf(command, sizeof(command), "command -v %s >/dev/null", name);
    return system(command) == 0;
}

/* Says what is missing and skips the test. */
#define need_program(name)                                \
    do {                                                  \
        if (!have_program(name)) {                        \
            print_message("skipped: no %s here\n", name); \
            skip();                                       \
        }                                                 \
    } while (0)

/* A directory and a listening socket in it; nothing serves it yet. */
static inline void server_init(struct server *s, int backlog)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    *s = (struct server){.dir = "/tmp/qpull-nbd-XXXXXX"};
    assert_non_null(mkdtemp(s->dir));
    (void)snprintf(s->path, sizeof(s->path), "%s/nbd.sock", s->dir);
    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", s->path);
    s->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(s->listener >= 0);
    assert_int_equal(bind(s->listener, (const struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(s->listener, backlog), 0);
}

/* Runs a shell command in the server's directory and expects it to succeed. */
static inline void server_shell(struct server *s, const char *command)
{
    char line[2048];

    assert_true((size_t)snprintf(line, sizeof(line), "cd %s && { %s; }", s->dir, command) < sizeof(line));
    if (system(line) != 0)
        fail_msg("this failed: %s", command);
}

static inline void server_child(struct server *s, const char *command)
{
    char pid[16];

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)snprintf(pid, sizeof(pid), "%d", (int)getpid());
    if (chdir(s->dir) < 0 || dup2(s->listener, LISTEN_FD) < 0 || setenv("LISTEN_PID", pid, 1) < 0 ||
        setenv("LISTEN_FDS", "1", 1) < 0)
        _exit(127);
    /* Servers complain about us all the time here: that is for people who look for a mistake. */
    if (!getenv("QPULL_TEST_VERBOSE"))
        if (!freopen("/dev/null", "w", stderr))
            _exit(127);
    if (s->listener == LISTEN_FD)
        (void)fcntl(LISTEN_FD, F_SETFD, 0);
    (void)execl("/bin/sh", "sh", "-c", command, (char *)NULL);
    _exit(127);
}

/* Starts `exec PROGRAM …` in the directory, with the socket. */
static inline void server_start(struct server *s, const char *command)
{
    assert_int_equal(strncmp(command, "exec ", strlen("exec ")), 0); /* the server has the pid that LISTEN_PID names */
    s->pid = fork();
    assert_true(s->pid >= 0);
    if (s->pid == 0)
        server_child(s, command);
    /* The server alone holds it, so that connecting fails when it is dead. */
    (void)close(s->listener);
    s->listener = -1;
}

/* From here on it answers nothing more. */
static inline void server_stop(struct server *s)
{
    int status;

    assert_int_equal(kill(s->pid, SIGSTOP), 0);
    assert_int_equal(waitpid(s->pid, &status, WUNTRACED), s->pid); /* all its threads have stopped */
    assert_true(WIFSTOPPED(status));
}

static inline void server_kill(struct server *s)
{
    if (s->pid > 0) {
        (void)kill(s->pid, SIGKILL);
        (void)waitpid(s->pid, NULL, 0);
    }
    s->pid = 0;
}

static inline void server_done(struct server *s)
{
    char command[64];

    server_kill(s);
    if (s->listener >= 0)
        (void)close(s->listener);
    (void)snprintf(command, sizeof(command), "rm -rf %s", s->dir);
    assert_int_equal(system(command), 0);
}

/* Bytes that differ everywhere: splitmix64 of the offset (Steele, Lea, Flood 2014). */
static inline void fill_pattern(unsigned char *data, size_t length)
{
    for (size_t i = 0; i < length; i += sizeof(uint64_t)) {
        uint64_t z = (i / sizeof(z) + 1) * UINT64_C(0x9e3779b97f4a7c15);

        z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
        z ^= z >> 31;
        memcpy(data + i, &z, length - i < sizeof(z) ? length - i : sizeof(z));
    }
}

static inline void server_write_file(struct server *s, const char *name, const void *data, size_t length)
{
    char path[128];
    FILE *file;

    (void)snprintf(path, sizeof(path), "%s/%s", s->dir, name);
    file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, length, file), length);
    assert_int_equal(fclose(file), 0);
}

#endif
