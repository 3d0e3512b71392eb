/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* reach: what stands in the way of a socket is named, with the words that change it. Another user is a child of ours.
 */
#include "lib/test.h"
#include "reach.h"

#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define STRANGER 54321
#define THEIR_GROUP 54322

static char dir[32], inner[64], path[96];

/* A file stands for the socket: rights to write are the same. */
static void build(mode_t outer_mode, mode_t inner_mode, mode_t mode, gid_t group)
{
    FILE *file;

    (void)strcpy(dir, "/tmp/qpull-reach-XXXXXX");
    assert_non_null(mkdtemp(dir));
    (void)snprintf(inner, sizeof inner, "%s/inner", dir);
    (void)snprintf(path, sizeof path, "%s/s", inner);
    assert_int_equal(mkdir(inner, 0700), 0);
    file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(chown(path, 0, group), 0);
    assert_int_equal(chown(inner, 0, group), 0);
    assert_int_equal(chmod(path, mode), 0);
    assert_int_equal(chmod(inner, inner_mode), 0);
    assert_int_equal(chmod(dir, outer_mode), 0);
}

static void expect(gid_t our_group, const char *words, const char *where, const char *what_to_do)
{
    char text[REACH_TEXT_MAX] = "", advice[REACH_TEXT_MAX] = "";
    int status;
    pid_t pid = fork();

    assert_true(pid >= 0);
    if (pid == 0) {
        if (setgroups(0, NULL) < 0 || setgid(our_group) < 0 || setuid(STRANGER) < 0)
            _exit(2);
        reach_explain(path, text, advice);
        if (strstr(text, words) && strstr(text, where) && strstr(advice, what_to_do))
            _exit(0);
        (void)fprintf(stderr, "%s\n-> %s\n", text, advice);
        _exit(1);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    assert_int_equal(unlink(path) | rmdir(inner) | rmdir(dir), 0);
}

static void the_first_directory_that_may_not_be_searched_is_named(void **state)
{
    build(0700, 0700, 0600, 0);
    expect(STRANGER, "user 54321 may not search the directory", dir, "setfacl -m u:54321:x");
    build(0711, 0710, 0660, THEIR_GROUP);
    expect(STRANGER, "group 54322, mode 0710", inner, "into the group 54322");
}

static void a_socket_of_a_group_wants_us_in_it(void **state)
{
    build(0711, 0711, 0660, THEIR_GROUP);
    expect(STRANGER, "may not write to the socket", path, "into the group 54322");
}

static void a_socket_that_its_group_may_not_write_to_wants_another_umask(void **state)
{
    build(0711, 0711, 0755, THEIR_GROUP);
    expect(THEIR_GROUP, "mode 0755", path, "umask 007");
    build(0711, 0711, 0755, THEIR_GROUP);
    expect(STRANGER, "mode 0755", path, "setfacl -m u:54321:rw");
}

static void where_modes_let_us_in_it_is_something_else(void **state)
{
    build(0711, 0711, 0666, 0);
    expect(STRANGER, "modes let qpulld open", path, "");
}

static int need_root(void **state)
{
    if (geteuid() != 0) {
        (void)fprintf(stderr, "skipped: only root can be another user\n");
        exit(77);
    }
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_first_directory_that_may_not_be_searched_is_named),
        cmocka_unit_test(a_socket_of_a_group_wants_us_in_it),
        cmocka_unit_test(a_socket_that_its_group_may_not_write_to_wants_another_umask),
        cmocka_unit_test(where_modes_let_us_in_it_is_something_else),
    };

    return cmocka_run_group_tests(tests, need_root, NULL);
}
