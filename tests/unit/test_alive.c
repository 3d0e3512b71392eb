/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A word is held by one process at a time, and is free again when that one is killed; not everybody who holds it is
 * believed, and a full queue proves nothing. */
#include "backup/alive.h"
#include "loop.h"
#include "qmp/base.h"
#include "test.h"

#include <errno.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define SOON_MS 20
#define LONG_MS 20000
#define NOBODY_ELSE ((uid_t)-1)
#define MANY 64 /* more than any queue of ours */

static char word[64];

static pid_t holder(void)
{
    return alive_holder(word, NOBODY_ELSE, SOON_MS);
}

/* A process, of that user unless it is ours, that holds the word and never looks who comes. */
static pid_t start_holder(uid_t uid)
{
    int pipes[2];
    char byte;
    pid_t pid;

    assert_int_equal(pipe(pipes), 0);
    pid = fork();
    if (pid == 0) {
        struct alive *a = NULL;
        uv_loop_t loop;

        if ((uid == geteuid() || setresuid(uid, uid, uid) == 0) && uv_loop_init(&loop) == 0 &&
            alive_new(&loop, word, &a) == 0 && write(pipes[1], "R", 1) == 1)
            (void)pause();
        _exit(1);
    }
    (void)close(pipes[1]);
    assert_int_equal(read(pipes[0], &byte, 1), 1);
    (void)close(pipes[0]);
    return pid;
}

static void end_holder(pid_t pid)
{
    (void)kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

/* Connections that stay, until no more are let in. */
static unsigned fill_queue(int fds[MANY])
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int len = snprintf(address.sun_path + 1, sizeof(address.sun_path) - 1, "qpull/%s", word);
    unsigned n = 0;

    for (; n < MANY; n++) {
        fds[n] = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        assert_true(fds[n] >= 0);
        if (connect(fds[n], (struct sockaddr *)&address,
                    (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)len)) == 0)
            continue;
        assert_int_equal(errno, EAGAIN);
        (void)close(fds[n]);
        break;
    }
    assert_between(n, 1, MANY - 1);
    return n;
}

static void empty(const int *fds, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        (void)close(fds[i]);
}

static void a_word_is_held_once_and_tells_its_holder(void **state)
{
    struct alive *a = NULL, *other = NULL;
    uv_loop_t loop;

    loop_init(&loop);
    assert_int_equal(holder(), 0);
    assert_int_equal(alive_new(&loop, word, &a), 0);
    assert_int_equal(alive_new(&loop, word, &other), -EBUSY);
    assert_int_equal(holder(), getpid());
    alive_free(a);
    assert_int_equal(holder(), 0);
    assert_int_equal(alive_new(&loop, word, &other), 0);
    assert_int_equal(holder(), getpid());
    alive_free(other);
    loop_done(&loop);
}

static void kill_9_frees_it(void **state)
{
    pid_t pid = start_holder(geteuid());

    assert_int_equal(holder(), pid);
    end_holder(pid);
    assert_int_equal(holder(), 0);
}

struct question {
    pid_t answer;
    bool answered;
};

static void ask(uv_work_t *work)
{
    ((struct question *)work->data)->answer = alive_holder(word, NOBODY_ELSE, LONG_MS);
}

static void on_answer(uv_work_t *work, int status)
{
    ((struct question *)work->data)->answered = true;
}

static void who_lives_makes_room_for_those_who_ask(void **state)
{
    struct question question = {0};
    uv_work_t work = {.data = &question};
    struct alive *a = NULL;
    uv_loop_t loop;
    int fds[MANY];
    unsigned n;

    loop_init(&loop);
    assert_int_equal(alive_new(&loop, word, &a), 0);
    n = fill_queue(fds);
    assert_int_equal(uv_queue_work(&loop, &work, ask, on_answer), 0);
    loop_until(&loop, question.answered);
    assert_int_equal(question.answer, getpid());
    empty(fds, n);
    alive_free(a);
    loop_done(&loop);
}

static void a_full_queue_is_no_sign_of_life(void **state)
{
    pid_t pid = start_holder(geteuid());
    int fds[MANY];
    unsigned n = fill_queue(fds);

    assert_int_equal(holder(), 0);
    empty(fds, n);
    end_holder(pid);
}

static void strangers_are_not_believed(void **state)
{
    const struct passwd *nobody = getpwnam("nobody");
    pid_t pid;

    if (geteuid() != 0 || !nobody) {
        (void)printf("only root can be another user\n");
        skip();
        return;
    }
    pid = start_holder(nobody->pw_uid);
    assert_int_equal(alive_holder(word, NOBODY_ELSE, SOON_MS), 0);
    assert_int_equal(alive_holder(word, nobody->pw_uid + 1, SOON_MS), 0);
    assert_int_equal(alive_holder(word, nobody->pw_uid, SOON_MS), pid);
    end_holder(pid);
}

static void a_word_that_is_too_long_is_refused(void **state)
{
    struct alive *a = NULL;
    uv_loop_t loop;
    char text[200];

    loop_init(&loop);
    memset(text, 'x', sizeof(text));
    text[sizeof(text) - 1] = '\0';
    assert_int_equal(alive_new(&loop, text, &a), -ENAMETOOLONG);
    assert_int_equal(alive_holder(text, NOBODY_ELSE, SOON_MS), 0);
    alive_free(a);
    loop_done(&loop);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_word_is_held_once_and_tells_its_holder),
        cmocka_unit_test(kill_9_frees_it),
        cmocka_unit_test(who_lives_makes_room_for_those_who_ask),
        cmocka_unit_test(a_full_queue_is_no_sign_of_life),
        cmocka_unit_test(strangers_are_not_believed),
        cmocka_unit_test(a_word_that_is_too_long_is_refused),
    };

    (void)snprintf(word, sizeof(word), "test-%d", (int)getpid());
    return cmocka_run_group_tests(tests, NULL, NULL);
}
