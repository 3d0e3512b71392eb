/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The notes of a VM have one keeper, whose process is told, and none when that one has been killed. */
#include "backup/claim.h"
#include "qmp/base.h"
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define VM "a VM/of any name"
#define VM_FILE "a%20VM%2Fof%20any%20name" /* backup/state_file */

static char folder[64];
static int dir = -1;

static int setup(void **state)
{
    (void)snprintf(folder, sizeof(folder), "/tmp/qpull-claim-XXXXXX");
    if (!mkdtemp(folder))
        return -1;
    dir = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC); /* as the daemon has it */
    return dir < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    (void)unlinkat(dir, CLAIM_DIR "/" VM_FILE, 0);
    (void)unlinkat(dir, CLAIM_DIR "/other", 0);
    (void)unlinkat(dir, CLAIM_DIR, AT_REMOVEDIR);
    (void)close(dir);
    return rmdir(folder);
}

static void one_keeps_them_until_it_lets_go(void **state)
{
    int fd = -1, other = -1, again = -1;
    pid_t holder = 0;
    struct stat st;

    assert_int_equal(claim_take(dir, VM, &fd, &holder), 0);
    assert_int_equal(claim_take(dir, VM, &again, &holder), -EBUSY);
    assert_int_equal(holder, getpid());
    assert_int_equal(again, -1);
    assert_int_equal(claim_take(dir, "other", &other, &holder), 0);
    assert_int_equal(fstatat(dir, CLAIM_DIR "/" VM_FILE, &st, 0), 0);
    assert_int_equal(st.st_mode, S_IFREG | 0600);
    (void)close(fd);
    assert_int_equal(claim_take(dir, VM, &again, &holder), 0);
    (void)close(again);
    (void)close(other);
}

static void kill_9_frees_them(void **state)
{
    int pipes[2], fd = -1;
    pid_t holder = 0, pid;
    char byte;

    assert_int_equal(pipe(pipes), 0);
    pid = fork();
    if (pid == 0) {
        if (claim_take(dir, VM, &fd, &holder) == 0 && write(pipes[1], "R", 1) == 1)
            (void)pause();
        _exit(1);
    }
    assert_int_equal(read(pipes[0], &byte, 1), 1);
    assert_int_equal(claim_take(dir, VM, &fd, &holder), -EBUSY);
    assert_int_equal(holder, pid);
    (void)kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_int_equal(claim_take(dir, VM, &fd, &holder), 0);
    (void)close(fd);
    (void)close(pipes[0]);
    (void)close(pipes[1]);
}

static void a_holder_that_has_not_signed_is_nobody_in_particular(void **state)
{
    int fd = -1, again = -1, file;
    pid_t holder = 1;

    assert_int_equal(claim_take(dir, VM, &fd, &holder), 0);
    file = openat(dir, CLAIM_DIR "/" VM_FILE, O_WRONLY | O_TRUNC | O_CLOEXEC);
    assert_int_equal(write(file, "-12", 3), 3);
    assert_int_equal(claim_take(dir, VM, &again, &holder), -EBUSY);
    assert_int_equal(holder, 0);
    (void)close(file);
    (void)close(fd);
}

static void what_is_no_file_of_ours_is_not_locked(void **state)
{
    pid_t holder = 0;
    int fd = -1;

    assert_int_equal(mkdirat(dir, CLAIM_DIR, 0700), 0);
    assert_int_equal(symlinkat("/dev/null", dir, CLAIM_DIR "/" VM_FILE), 0);
    assert_int_equal(claim_take(dir, VM, &fd, &holder), -ELOOP);
    assert_int_equal(unlinkat(dir, CLAIM_DIR "/" VM_FILE, 0), 0);
    assert_int_equal(mkfifoat(dir, CLAIM_DIR "/" VM_FILE, 0600), 0);
    assert_int_equal(claim_take(dir, VM, &fd, &holder), -EINVAL);
    assert_int_equal(fd, -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(one_keeps_them_until_it_lets_go, setup, teardown),
        cmocka_unit_test_setup_teardown(kill_9_frees_them, setup, teardown),
        cmocka_unit_test_setup_teardown(a_holder_that_has_not_signed_is_nobody_in_particular, setup, teardown),
        cmocka_unit_test_setup_teardown(what_is_no_file_of_ours_is_not_locked, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
