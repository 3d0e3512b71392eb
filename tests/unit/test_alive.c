/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A word is held by one process at a time, and is free again when that one is killed. */
#include "backup/alive.h"
#include "qmp/base.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define QUEUE 17 /* as listen(2) has it for a backlog of 16 */

static char word[64];

static void a_word_is_held_once_and_tells_its_holder(void **state)
{
    int fd = -1, other = -1;
    uid_t uid;

    assert_int_equal(alive_holder(word, &uid), 0);
    assert_int_equal(alive_hold(word, &fd), 0);
    assert_int_equal(alive_hold(word, &other), -EBUSY);
    /* As many as may ask while nobody accepts them, and more. */
    for (int i = 0; i < 40; i++)
        assert_int_equal(alive_holder(word, &uid), i < QUEUE ? getpid() : -1);
    (void)close(fd);
    assert_int_equal(alive_holder(word, &uid), 0);
    assert_int_equal(alive_hold(word, &other), 0);
    assert_int_equal(alive_holder(word, &uid), getpid());
    assert_int_equal(uid, getuid());
    (void)close(other);
}

static void kill_9_frees_it(void **state)
{
    int pipes[2], fd = -1;
    char byte;
    uid_t uid;
    pid_t pid;

    assert_int_equal(pipe(pipes), 0);
    pid = fork();
    if (pid == 0) {
        if (alive_hold(word, &fd) == 0 && write(pipes[1], "R", 1) == 1)
            (void)pause();
        _exit(1);
    }
    assert_int_equal(read(pipes[0], &byte, 1), 1);
    assert_int_equal(alive_holder(word, &uid), pid);
    (void)kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_int_equal(alive_holder(word, &uid), 0);
    (void)close(pipes[0]);
    (void)close(pipes[1]);
}

static void a_word_that_is_too_long_is_refused(void **state)
{
    char text[200];
    uid_t uid;
    int fd = -1;

    memset(text, 'x', sizeof(text));
    text[sizeof(text) - 1] = '\0';
    assert_int_equal(alive_hold(text, &fd), -ENAMETOOLONG);
    assert_int_equal(alive_holder(text, &uid), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_word_is_held_once_and_tells_its_holder),
        cmocka_unit_test(kill_9_frees_it),
        cmocka_unit_test(a_word_that_is_too_long_is_refused),
    };

    (void)snprintf(word, sizeof(word), "test-%d", (int)getpid());
    return cmocka_run_group_tests(tests, NULL, NULL);
}
