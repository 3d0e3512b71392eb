/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A socket whose address tells nothing, and what is left of one whose maker was killed. */
#include "backup/private_socket.h"
#include "qmp/base.h"
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static char folder[64];
static int dir = -1;
static int later; /* seconds by which time() is ahead */

/* It stands before libc's: files cannot be made older than they are. */
time_t time(time_t *t)
{
    struct timespec now;

    (void)clock_gettime(CLOCK_REALTIME, &now);
    now.tv_sec += later;
    if (t)
        *t = now.tv_sec;
    return now.tv_sec;
}

static int set_up(void **state)
{
    (void)snprintf(folder, sizeof folder, "/tmp/qpull-private-XXXXXX");
    if (!mkdtemp(folder))
        return -1;
    dir = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC); /* as the daemon has it */
    later = 0;
    return dir < 0 ? -1 : 0;
}

static int tear_down(void **state)
{
    (void)close(dir);
    return rmdir(folder);
}

static void put(const char *name, bool is_socket)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd;

    (void)snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", folder, name);
    fd = is_socket ? socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)
                   : open(address.sun_path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    if (is_socket)
        assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    (void)close(fd);
}

static bool is_there(const char *name)
{
    return faccessat(dir, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

static void its_file_has_the_name_and_its_address_has_not(void **state)
{
    struct sockaddr_un address = {0};
    socklen_t len = sizeof address;
    struct stat st;
    int fd = private_socket_listen(dir, "nbd-payroll.sock", 1);

    assert_true(fd >= 0);
    assert_int_equal(fstatat(dir, "nbd-payroll.sock", &st, AT_SYMLINK_NOFOLLOW), 0);
    assert_true(S_ISSOCK(st.st_mode));
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &len), 0);
    assert_null(strstr(address.sun_path, "payroll"));
    (void)close(fd);
    assert_int_equal(unlinkat(dir, "nbd-payroll.sock", 0), 0);
}

static void what_a_killed_one_left_goes_after_a_while_and_nothing_else(void **state)
{
    static const char *const names[] = {".qpull-0123abcd.tmp", ".qpull-89ef0123.tmp", "nbd-vm.sock"};

    put(names[0], true);
    put(names[1], false); /* a file of somebody who replaces one */
    put(names[2], true);
    private_socket_tidy(dir);
    assert_true(is_there(names[0])); /* it may be about to get its name */
    later = 3600;
    private_socket_tidy(dir);
    assert_false(is_there(names[0]));
    for (size_t i = 1; i < ARRAY_SIZE(names); i++)
        assert_int_equal(unlinkat(dir, names[i], 0), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(its_file_has_the_name_and_its_address_has_not, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_a_killed_one_left_goes_after_a_while_and_nothing_else, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
