/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* listen: the file of a unix socket, looked at from inside of bind(2) and of chown(2): what another process may see. */
#include "lib/loop.h"
#include "lib/test.h"
#include "listen.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define SOME_GROUP 12345u

struct world {
    uv_loop_t loop;
    char dir[32], path[64];
};

static mode_t mode_at_bind, mode_at_chown;
static bool chown_fails;

static mode_t mode_of(const char *path)
{
    struct stat st;

    assert_int_equal(lstat(path, &st), 0);
    return st.st_mode & 07777;
}

/* These stand before libc's. */
int bind(int fd, const struct sockaddr *address, socklen_t len)
{
    int r = (int)syscall(SYS_bind, fd, address, len);

    if (r == 0)
        mode_at_bind = mode_of(((const struct sockaddr_un *)address)->sun_path);
    return r;
}

int fchownat(int fd, const char *path, uid_t uid, gid_t gid, int flags)
{
    struct stat st;

    assert_int_equal(fstat(fd, &st), 0);
    mode_at_chown = st.st_mode & 07777;
    errno = EPERM;
    return chown_fails ? -1 : (int)syscall(SYS_fchownat, fd, path, (uid_t)-1, (gid_t)-1, flags);
}

static int set_up(void **state)
{
    struct world *w = calloc(1, sizeof *w);

    assert_non_null(w);
    log_init(LOG_LEVEL_ERROR);
    loop_init(&w->loop);
    (void)strcpy(w->dir, "/tmp/qpull-listen-XXXXXX");
    assert_non_null(mkdtemp(w->dir));
    (void)snprintf(w->path, sizeof w->path, "%s/s", w->dir);
    mode_at_bind = mode_at_chown = 0;
    chown_fails = false;
    *state = w;
    return 0;
}

static int tear_down(void **state)
{
    struct world *w = *state;

    loop_done(&w->loop);
    (void)umask(022);
    assert_int_equal(rmdir(w->dir), 0);
    free(w);
    return 0;
}

static int on_client(void *arg, uv_stream_t *stream)
{
    return 0;
}

static struct listener *make(struct world *w, mode_t mode, gid_t gid)
{
    const struct listen_file file = {.mode = mode, .uid = LISTEN_AS_IS, .gid = gid};
    struct listener *l;
    struct failure why = {0};

    if (listen_open_unix(&w->loop, w->path, &file, on_client, NULL, &l, &why) < 0)
        fail_msg("%s", why.text);
    return l;
}

static void the_mode_is_what_was_said_whatever_the_umask(void **state)
{
    static const mode_t masks[] = {0, 022, 077, 0777}, modes[] = {0600, 0660, 0666, 0777};
    struct world *w = *state;

    for (size_t i = 0; i < ARRAY_SIZE(masks); i++)
        for (size_t k = 0; k < ARRAY_SIZE(modes); k++) {
            struct listener *l;

            (void)umask(masks[i]);
            l = make(w, modes[k], LISTEN_AS_IS);
            assert_int_equal(mode_of(w->path), modes[k]);
            assert_int_equal(umask(masks[i]), masks[i]); /* not even for a moment: threads would have it, too */
            listen_close(l);
        }
}

static void nobody_but_the_owner_can_connect_before_the_group_is_right(void **state)
{
    struct world *w = *state;
    struct listener *l;

    (void)umask(0);
    l = make(w, 0666, SOME_GROUP);
    assert_int_equal(mode_at_bind & 0077, 0);
    assert_int_equal(mode_at_chown & 0077, 0);
    assert_int_equal(mode_of(w->path), 0666);
    listen_close(l);
}

static void a_group_that_cannot_be_given_leaves_no_socket(void **state)
{
    const struct listen_file file = {.mode = 0660, .uid = LISTEN_AS_IS, .gid = SOME_GROUP};
    struct world *w = *state;
    struct listener *l;
    struct failure why = {0};

    chown_fails = true;
    assert_int_equal(listen_open_unix(&w->loop, w->path, &file, on_client, NULL, &l, &why), -EPERM);
    assert_non_null(strstr(why.text, "group 12345"));
    assert_int_equal(access(w->path, F_OK), -1);
}

static void the_mode_can_change_later_but_not_of_anothers_file(void **state)
{
    struct world *w = *state;
    struct listener *l = make(w, 0600, LISTEN_AS_IS);
    struct failure why = {0};
    int fd;

    (void)umask(077);
    assert_int_equal(listen_set_mode(l, 0666, &why), 0);
    assert_int_equal(mode_of(w->path), 0666);
    assert_int_equal(unlink(w->path), 0);
    fd = open(w->path, O_CREAT | O_EXCL | O_WRONLY, 0600);
    assert_true(fd >= 0);
    (void)close(fd);
    assert_int_equal(listen_set_mode(l, 0666, &why), -ESTALE);
    assert_int_equal(mode_of(w->path), 0600);
    listen_close(l);
    loop_turn(&w->loop, 2);
    assert_int_equal(unlink(w->path), 0); /* it was not ours to remove */
}

/* -- a crowd ------------------------------------------------------------------------------------------------------- */
#define CROWD (4 * LISTEN_TURN)

struct crowd {
    uv_pipe_t pipes[CROWD];
    uv_idle_t others; /* what else the loop has to do */
    unsigned ntaken, nturn, most;
};

static int on_one_of_a_crowd(void *arg, uv_stream_t *stream)
{
    struct crowd *c = arg;

    assert_int_equal(uv_pipe_init(stream->loop, &c->pipes[c->ntaken], 0), 0);
    assert_int_equal(uv_accept(stream, (uv_stream_t *)&c->pipes[c->ntaken++]), 0);
    c->nturn++;
    c->most = MAX(c->most, c->nturn);
    return 0;
}

static void on_others(uv_idle_t *idle)
{
    ((struct crowd *)idle->data)->nturn = 0;
}

static void a_crowd_that_comes_leaves_the_rest_of_the_loop_its_turns(void **state)
{
    const struct listen_file file = {.mode = 0600, .uid = LISTEN_AS_IS, .gid = LISTEN_AS_IS};
    struct world *w = *state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct crowd *c = calloc(1, sizeof *c);
    struct failure why = {0};
    struct listener *l;
    int fds[CROWD];

    assert_non_null(c);
    assert_int_equal(listen_open_unix(&w->loop, w->path, &file, on_one_of_a_crowd, c, &l, &why), 0);
    (void)strcpy(address.sun_path, w->path);
    for (size_t i = 0; i < CROWD; i++) {
        fds[i] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(connect(fds[i], (struct sockaddr *)&address, sizeof address), 0);
    }
    (void)uv_idle_init(&w->loop, &c->others);
    c->others.data = c;
    (void)uv_idle_start(&c->others, on_others);
    loop_until(&w->loop, c->ntaken == CROWD);
    assert_between(c->most, 1, LISTEN_TURN + 1);
    for (size_t i = 0; i < CROWD; i++) {
        uv_close((uv_handle_t *)&c->pipes[i], NULL);
        (void)close(fds[i]);
    }
    uv_close((uv_handle_t *)&c->others, NULL);
    listen_close(l);
    loop_turn(&w->loop, 3);
    free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_mode_is_what_was_said_whatever_the_umask, set_up, tear_down),
        cmocka_unit_test_setup_teardown(nobody_but_the_owner_can_connect_before_the_group_is_right, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_group_that_cannot_be_given_leaves_no_socket, set_up, tear_down),
        cmocka_unit_test_setup_teardown(the_mode_can_change_later_but_not_of_anothers_file, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_crowd_that_comes_leaves_the_rest_of_the_loop_its_turns, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
