/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* sandbox and privileges: each case in a child, since there is no way back; what it finds is its exit status. */
#include "lib/test.h"
#include "privileges.h"
#include "sandbox.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/landlock.h>
#include <netinet/in.h>
#include <pthread.h>
#include <pwd.h>
#include <sched.h>
#include <seccomp.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <uv.h>

#define ABI_WITH_TCP 4
#define OTHER_USER "nobody"

/* In a child cmocka's asserts would run the rest of the tests twice. */
#define expect(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            (void)fprintf(stderr, "%s:%d: not so: %s (errno: %s)\n", __FILE__, __LINE__, #condition, strerror(errno)); \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

static char dir[32], mine[64], theirs[64];

static int landlock_abi(void)
{
    return (int)syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
}

static void in_child(void (*run)(void))
{
    int status;
    pid_t pid = fork();

    assert_true(pid >= 0);
    if (pid == 0) {
        run();
        _exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
}

static void enter(enum sandbox_mode mode, bool opens_images, const char *words)
{
    const char *dirs[] = {mine};
    const struct sandbox_config config = {.mode = mode, .dirs = dirs, .ndirs = 1, .opens_images = opens_images};
    char text[SANDBOX_TEXT_MAX];
    struct failure why = {0};

    if (sandbox_enter(&config, text, &why) < 0)
        (void)fprintf(stderr, "%s\n", why.text);
    expect(!why.err);
    if (!strstr(text, words))
        (void)fprintf(stderr, "%s\n", text);
    expect(strstr(text, words));
}

/* -- system calls -------------------------------------------------------------------------------------------------- */
static bool is_unknown(long result)
{
    return result == -1 && errno == ENOSYS;
}

static void *unshare_in_thread(void *arg)
{
    return is_unknown(syscall(SYS_unshare, CLONE_NEWUSER)) ? arg : NULL;
}

static void try_calls(void)
{
    pthread_t thread;
    void *result = NULL;
    long page = sysconf(_SC_PAGESIZE);
    void *memory;
    int pair[2];

    enter(SANDBOX_AUTO, false, "system calls are limited");
    expect(is_unknown(syscall(SYS_unshare, CLONE_NEWUSER)));
    expect(is_unknown(syscall(SYS_setns, -1, 0)));
    expect(is_unknown(syscall(SYS_mount, "", "", "", 0, NULL)));
    expect(is_unknown(syscall(SYS_bpf, 0, NULL, 0)));
    expect(is_unknown(syscall(SYS_keyctl, 0)));
    expect(is_unknown(syscall(SYS_setuid, 0)));
    expect(is_unknown(syscall(SYS_io_uring_setup, 1, NULL)));
    expect(is_unknown(syscall(SYS_clone, CLONE_NEWUSER, NULL, NULL, NULL, 0)));
    expect(is_unknown(syscall(SYS_clone3, NULL, 0)));
    expect(is_unknown(syscall(SYS_ioctl, 0, 0x5412, ""))); /* TIOCSTI: typing on our terminal */
    expect(socket(AF_INET, SOCK_STREAM, 0) == -1 && errno == EAFNOSUPPORT);
    expect(socket(AF_PACKET, SOCK_RAW, 0) == -1 && errno == EAFNOSUPPORT);
    expect(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    memory = mmap(NULL, (size_t)page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(memory != MAP_FAILED);
    expect(is_unknown(mprotect(memory, (size_t)page, PROT_READ | PROT_EXEC)));
    expect(mmap(NULL, (size_t)page, PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
    expect(getpwnam("root") != NULL); /* SIGHUP looks names up */
    expect(pthread_create(&thread, NULL, unshare_in_thread, &page) == 0);
    expect(pthread_join(thread, &result) == 0 && result == &page);
}

static void calls_without_use_do_not_exist_in_any_thread(void **state)
{
    in_child(try_calls);
}

static void on_idle(uv_async_t *async)
{
    uv_close((uv_handle_t *)async, NULL);
}

/* As the program does it: the loop is older than the sandbox. */
static void try_loop(void)
{
    uv_loop_t loop;
    uv_async_t async;
    uv_pipe_t pipe;
    int pair[2];

    sandbox_prepare(SANDBOX_AUTO);
    expect(is_unknown(syscall(SYS_io_uring_setup, 1, NULL)));
    expect(syscall(SYS_getpgid, 0) >= 0 && socket(AF_INET, SOCK_STREAM, 0) >= 0); /* and nothing else yet */
    expect(uv_loop_init(&loop) == 0);
    expect(uv_async_init(&loop, &async, on_idle) == 0);
    enter(SANDBOX_AUTO, false, "system calls are limited");
    expect(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    expect(uv_pipe_init(&loop, &pipe, 0) == 0 && uv_pipe_open(&pipe, pair[0]) == 0);
    expect(uv_async_send(&async) == 0);
    expect(uv_run(&loop, UV_RUN_ONCE) >= 0);
    uv_close((uv_handle_t *)&pipe, NULL);
    expect(uv_run(&loop, UV_RUN_DEFAULT) == 0 && uv_loop_close(&loop) == 0);
}

static void a_loop_that_was_made_before_runs_on(void **state)
{
    in_child(try_loop);
}

/* Programs: who needs none has none. Builds with sanitizers start their own. */
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
static void try_programs(void)
{
    enter(SANDBOX_AUTO, false, "system calls are limited");
    expect(is_unknown(execl("/bin/true", "true", NULL)));
    expect(is_unknown(syscall(SYS_kill, getpid(), 0)));
    expect(is_unknown(syscall(SYS_ptrace, 0, 0, 0, 0)));
}

static void without_an_agent_or_images_no_program_can_be_started(void **state)
{
    in_child(try_programs);
}
#endif

static void try_images(void)
{
    enter(SANDBOX_REQUIRE, true, "files are not limited, as images are served");
    expect(socket(AF_INET, SOCK_STREAM, 0) >= 0); /* a layer may be there */
    expect(open(theirs, O_WRONLY | O_CLOEXEC) >= 0);
    expect(is_unknown(syscall(SYS_mount, "", "", "", 0, NULL)));
}

static void with_images_files_and_tcp_are_left_to_the_storage_daemon(void **state)
{
    in_child(try_images);
}

/* -- files --------------------------------------------------------------------------------------------------------- */
static void try_files(void)
{
    char path[128];
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int early = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    enter(SANDBOX_REQUIRE, false, "files are written in 1 directories only");
    expect(open(theirs, O_WRONLY | O_CLOEXEC) == -1 && errno == EACCES);
    expect(open(theirs, O_RDONLY | O_CLOEXEC) >= 0); /* a disk is opened for fdatasync() only */
    (void)snprintf(path, sizeof path, "%s/new", dir);
    expect(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600) == -1 && errno == EACCES);
    expect(mkdir(path, 0700) == -1 && errno == EACCES);
    expect(open(mine, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600) >= 0); /* scratch */
    (void)snprintf(path, sizeof path, "%s/new", mine);
    expect(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600) >= 0);
    expect(unlink(path) == 0);
    expect(open("/dev/null", O_RDWR | O_CLOEXEC) >= 0);
    if (landlock_abi() >= ABI_WITH_TCP) {
        expect(connect(early, (struct sockaddr *)&a, sizeof a) == -1 && errno == EACCES);
        expect(bind(early, (struct sockaddr *)&a, sizeof a) == -1 && errno == EACCES);
    }
}

static void files_are_written_in_our_directories_only(void **state)
{
    if (landlock_abi() < 1)
        skip();
    in_child(try_files);
}

static void lose_landlock(void)
{
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);

    expect(seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(landlock_create_ruleset), 0) == 0);
    expect(seccomp_load(filter) == 0);
    seccomp_release(filter);
}

static void try_without_landlock(void)
{
    lose_landlock();
    enter(SANDBOX_AUTO, false, "this kernel has no landlock");
    expect(is_unknown(syscall(SYS_mount, "", "", "", 0, NULL)));
}

static void require_without_landlock(void)
{
    const struct sandbox_config config = {.mode = SANDBOX_REQUIRE};
    char text[SANDBOX_TEXT_MAX];
    struct failure why = {0};

    lose_landlock();
    expect(sandbox_enter(&config, text, &why) < 0 && strstr(why.text, "--sandbox require"));
}

static void a_kernel_without_landlock_is_enough_unless_it_is_required(void **state)
{
    in_child(try_without_landlock);
    in_child(require_without_landlock);
}

/* -- another user -------------------------------------------------------------------------------------------------- */
static void become_other(void)
{
    struct privileges p;
    struct failure why = {0};
    gid_t groups[64];
    int n;

    expect(privileges_find(OTHER_USER, &p, &why) == 0);
    if (privileges_drop(&p, &why) < 0)
        (void)fprintf(stderr, "%s\n", why.text);
    expect(!why.err);
    expect(getuid() == p.uid && geteuid() == p.uid && getgid() == p.gid && getegid() == p.gid);
    n = getgroups(ARRAY_SIZE(groups), groups);
    for (int i = 0; i < n; i++)
        expect(groups[i] != 0);
    expect(setuid(0) == -1 && setgid(0) == -1 && setgroups(0, NULL) == -1);
    expect(privileges_drop(&p, &why) == 0); /* nothing more to give */
    p.uid--;
    expect(privileges_drop(&p, &why) == -EPERM && strstr(why.text, "only root can become another user"));
}

static void there_is_no_way_back_to_root(void **state)
{
    if (geteuid() != 0)
        skip();
    in_child(become_other);
}

static void root_and_nobody_known_are_no_users_to_become(void **state)
{
    static const char *const wrong[] = {"", ":", "root", "no-such-user", "nobody:no-such-group", "nobody:", ":nogroup"};
    struct privileges p = {0};

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        struct failure why = {0};

        assert_int_equal(privileges_find(wrong[i], &p, &why), -EINVAL);
        assert_false(p.set);
    }
}

static int set_up(void **state)
{
    int fd;

    (void)strcpy(dir, "/tmp/qpull-sandbox-XXXXXX");
    assert_non_null(mkdtemp(dir));
    (void)snprintf(mine, sizeof mine, "%s/mine", dir);
    (void)snprintf(theirs, sizeof theirs, "%s/theirs", dir);
    assert_int_equal(mkdir(mine, 0700), 0);
    fd = open(theirs, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    return close(fd);
}

static int tear_down(void **state)
{
    (void)unlink(theirs);
    return rmdir(mine) < 0 ? -1 : rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(calls_without_use_do_not_exist_in_any_thread),
        cmocka_unit_test(a_loop_that_was_made_before_runs_on),
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
        cmocka_unit_test(without_an_agent_or_images_no_program_can_be_started),
#endif
        cmocka_unit_test(with_images_files_and_tcp_are_left_to_the_storage_daemon),
        cmocka_unit_test(files_are_written_in_our_directories_only),
        cmocka_unit_test(a_kernel_without_landlock_is_enough_unless_it_is_required),
        cmocka_unit_test(there_is_no_way_back_to_root),
        cmocka_unit_test(root_and_nobody_known_are_no_users_to_become),
    };

    if (getenv("QPULL_TEST_VALGRIND")) { /* it does a part of the system calls itself, and starts no programs as told */
        print_message("skipped: what the kernel refuses is not seen under valgrind\n");
        return 77;
    }

    return cmocka_run_group_tests(tests, set_up, tear_down);
}
