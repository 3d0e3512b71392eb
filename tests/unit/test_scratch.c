/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* scratch: who is given up at which limit, and that a look survives whoever it looks at. Real files on a file system of
 * our own, where nobody else takes or gives room; a real loop. */
#include "test.h"

#include "backup/scratch.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define MIB (1ull << 20)
#define ROOM "64m" /* of the file system */
#define NUSERS 3
#define LOOKS_MS (8 * SCRATCH_LOOK_MIN_MS) /* long enough for several looks: all limits here are near */

struct user {
    struct scratch_user user;
    struct scratch_file files[2];
    unsigned nover;
    struct scratch_over over;
};

struct box {
    uv_loop_t loop;
    uv_timer_t patience;
    unsigned nwaits;
    struct scratch_place *place;
    struct user users[NUSERS];
    unsigned nover;
    uv_work_t work;
    uv_sem_t held;
};

static struct box box;
static char dir[] = "/tmp/qpull-scratch-XXXXXX";

static void on_over(struct scratch_user *u, const struct scratch_over *over)
{
    struct user *user = container_of(u, struct user, user);

    user->nover++;
    user->over = *over;
    box.nover++;
}

static void on_closed(void *arg)
{
    *(bool *)arg = true;
}

static int set_up(void **state)
{
    memset(&box, 0, sizeof(box));
    for (unsigned i = 0; i < NUSERS; i++) {
        for (unsigned k = 0; k < 2; k++)
            box.users[i].files[k].fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        box.users[i].user = (struct scratch_user){.files = box.users[i].files, .nfiles = 2, .on_over = on_over};
    }
    return uv_loop_init(&box.loop) || uv_timer_init(&box.loop, &box.patience);
}

static int tear_down(void **state)
{
    bool closed = false;

    for (unsigned i = 0; i < NUSERS; i++) {
        scratch_leave(&box.users[i].user);
        for (unsigned k = 0; k < 2; k++)
            (void)close(box.users[i].files[k].fd);
    }
    scratch_close(box.place, on_closed, &closed);
    uv_close((uv_handle_t *)&box.patience, NULL);
    (void)uv_run(&box.loop, UV_RUN_DEFAULT);
    return !closed || uv_loop_close(&box.loop) < 0;
}

static void start(uint64_t session, uint64_t all, uint64_t reserve)
{
    const struct scratch_limits limits = {.session = session, .all = all, .reserve = reserve};

    assert_int_equal(scratch_new(&box.loop, dir, &limits, &box.place), 0);
}

/* The file is as large as a disk, and holds so many bytes. */
static void fill(unsigned user, unsigned file, uint64_t bytes)
{
    int fd = box.users[user].files[file].fd;

    assert_int_equal(ftruncate(fd, (off_t)(1024 * MIB)), 0);
    assert_int_equal(posix_fallocate(fd, 512 * MIB, (off_t)bytes), 0);
}

static void on_patience(uv_timer_t *t)
{
    box.nwaits++;
}

/* Until so many were given up, or for ms; in steps, of which a machine that stands still takes one only: looks come
 * between them. */
static void spin(unsigned nover, unsigned ms)
{
    box.nwaits = 0;
    uv_update_time(&box.loop); /* to fill files takes time */
    (void)uv_timer_start(&box.patience, on_patience, SCRATCH_LOOK_MIN_MS, SCRATCH_LOOK_MIN_MS);
    while (box.nover < nover && box.nwaits < ms / SCRATCH_LOOK_MIN_MS)
        (void)uv_run(&box.loop, UV_RUN_ONCE);
    (void)uv_timer_stop(&box.patience);
}

static void enter(unsigned user)
{
    scratch_enter(box.place, &box.users[user].user);
}

static void wait_for_sem(uv_work_t *work)
{
    uv_sem_wait(&box.held);
}

static void after_sem(uv_work_t *work, int status)
{
    uv_sem_destroy(&box.held);
}

/* The only thread is busy until somebody posts. */
static void hold_worker(void)
{
    assert_int_equal(uv_sem_init(&box.held, 0), 0);
    assert_int_equal(uv_queue_work(&box.loop, &box.work, wait_for_sem, after_sem), 0);
}

static void bytes_count_and_not_the_size_of_the_files(void **state)
{
    start(8 * MIB, 0, 0);
    enter(0);
    fill(0, 0, 3 * MIB);
    fill(0, 1, 4 * MIB);
    spin(1, LOOKS_MS);
    assert_int_equal(box.nover, 0);
    assert_between(scratch_used(&box.users[0].user), 7 * MIB, 8 * MIB);
    fill(0, 1, 6 * MIB);
    spin(1, LOOKS_MS);
    assert_int_equal(box.nover, 1);
    assert_int_equal(box.users[0].over.limit, SCRATCH_SESSION);
    assert_int_equal(box.users[0].over.allowed, 8 * MIB);
    assert_between(box.users[0].over.found, 9 * MIB, 10 * MIB);
    spin(2, LOOKS_MS); /* once is enough */
    assert_int_equal(box.nover, 1);
}

static void one_s_limit_is_not_the_sum_of_all(void **state)
{
    start(8 * MIB, 0, 0);
    for (unsigned i = 0; i < NUSERS; i++) {
        fill(i, 0, 6 * MIB);
        enter(i);
    }
    spin(1, LOOKS_MS);
    assert_int_equal(box.nover, 0);
}

static void where_all_hold_too_much_the_largest_goes_and_the_others_stay(void **state)
{
    start(0, 16 * MIB, 0);
    fill(0, 0, 5 * MIB);
    fill(1, 1, 7 * MIB);
    fill(2, 0, 6 * MIB);
    for (unsigned i = 0; i < NUSERS; i++)
        enter(i);
    spin(2, LOOKS_MS);
    assert_int_equal(box.nover, 1);
    assert_int_equal(box.users[1].nover, 1);
    assert_int_equal(box.users[1].over.limit, SCRATCH_ALL);
    assert_between(box.users[1].over.found, 18 * MIB, 19 * MIB);
}

static void a_new_one_is_refused_while_all_hold_nearly_what_they_may(void **state)
{
    struct failure f = {0};

    start(0, 6 * MIB, 0);
    fill(0, 0, 5 * MIB);
    enter(0);
    spin(1, LOOKS_MS);
    assert_int_equal(scratch_check_quota(box.place, &f), 0);
    fill(0, 1, MIB / 2); /* 5.5 of 6: more than 7/8 */
    spin(1, LOOKS_MS);
    assert_int_equal(scratch_check_quota(box.place, &f), -ENOSPC);
    assert_non_null(strstr(f.text, "--scratch-total-limit"));
    scratch_leave(&box.users[0].user);
    assert_int_equal(scratch_check_quota(box.place, &f), 0);
}

static uint64_t free_now(void)
{
    struct statvfs st;

    assert_int_equal(statvfs(dir, &st), 0);
    return (uint64_t)st.f_bavail * st.f_frsize;
}

static void where_the_reserve_is_touched_one_after_the_other_makes_room(void **state)
{
    struct failure f = {0};

    start(0, 0, 128 * MIB); /* more than there is */
    fill(0, 0, 2 * MIB);
    fill(1, 0, 4 * MIB);
    assert_int_equal(scratch_check_room(box.place, box.users[0].files[0].fd, &f), -ENOSPC);
    assert_non_null(strstr(f.text, "--scratch-reserve"));
    for (unsigned i = 0; i < NUSERS; i++)
        enter(i);
    spin(3, LOOKS_MS);
    assert_int_equal(box.nover, 2);
    assert_int_equal(box.users[0].over.allowed, 128 * MIB);
    assert_int_equal(box.users[0].over.found, free_now());
    assert_int_equal(box.users[0].over.limit, SCRATCH_RESERVE);
    assert_int_equal(box.users[2].nover, 0); /* it holds nothing, its end would help nobody */
}

static void who_is_going_makes_the_room_that_others_need_not_make(void **state)
{
    fill(0, 0, 30 * MIB);
    fill(1, 0, 10 * MIB);
    start(0, 0, free_now() + 25 * MIB);
    enter(0);
    enter(1);
    spin(2, LOOKS_MS);
    assert_int_equal(box.users[0].nover, 1);
    assert_int_equal(box.users[1].nover, 0);
    spin(2, SCRATCH_LEAVE_MS); /* it does not go */
    assert_int_equal(box.users[1].nover, 1);
}

static void without_limits_nobody_is_given_up(void **state)
{
    struct failure f = {0};

    start(0, 0, 0);
    enter(0);
    fill(0, 0, 60 * MIB);
    spin(1, 2 * SCRATCH_LOOK_MAX_MS);
    assert_int_equal(box.nover, 0);
    assert_between(scratch_used_by_all(box.place), 60 * MIB, 61 * MIB);
    assert_int_equal(scratch_check_quota(box.place, &f), 0);
    assert_int_equal(scratch_check_room(box.place, -1, &f), 0); /* not even asked */
}

static void who_goes_or_has_left_is_told_nothing(void **state)
{
    start(1 * MIB, 0, 0);
    fill(0, 0, 4 * MIB);
    fill(1, 0, 4 * MIB);
    enter(0);
    enter(1);
    scratch_going(&box.users[0].user);
    hold_worker();
    (void)uv_run(&box.loop, UV_RUN_NOWAIT); /* the look is under way */
    scratch_leave(&box.users[1].user);
    scratch_leave(&box.users[1].user);
    uv_sem_post(&box.held);
    spin(1, LOOKS_MS);
    assert_int_equal(box.nover, 0);
    enter(1);
    spin(1, LOOKS_MS);
    assert_int_equal(box.users[1].nover, 1);
}

static void the_place_may_be_closed_while_a_look_is_under_way(void **state)
{
    start(1 * MIB, 0, 0);
    enter(0);
    hold_worker();
    (void)uv_run(&box.loop, UV_RUN_NOWAIT);
    uv_sem_post(&box.held);
    /* tear_down() does it, and expects the callback */
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

static void the_reserve_may_be_used_up_to_its_last_byte_only(void **state)
{
    struct failure f = {0};

    start(0, 0, 40 * MIB);
    assert_int_equal(scratch_check_room(box.place, box.users[0].files[0].fd, &f), 0);
    fill(0, 0, 20 * MIB);
    enter(0);
    spin(1, LOOKS_MS);
    assert_int_equal(box.nover, 0);
    fill(0, 1, 5 * MIB);
    spin(1, LOOKS_MS);
    assert_int_equal(box.nover, 1);
    assert_int_equal(scratch_check_room(box.place, box.users[0].files[0].fd, &f), -ENOSPC);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(bytes_count_and_not_the_size_of_the_files),
        TEST(one_s_limit_is_not_the_sum_of_all),
        TEST(where_all_hold_too_much_the_largest_goes_and_the_others_stay),
        TEST(a_new_one_is_refused_while_all_hold_nearly_what_they_may),
        TEST(where_the_reserve_is_touched_one_after_the_other_makes_room),
        TEST(who_is_going_makes_the_room_that_others_need_not_make),
        TEST(the_reserve_may_be_used_up_to_its_last_byte_only),
        TEST(without_limits_nobody_is_given_up),
        TEST(who_goes_or_has_left_is_told_nothing),
        TEST(the_place_may_be_closed_while_a_look_is_under_way),
    };

    int failed;

    (void)setenv("UV_THREADPOOL_SIZE", "1", 1);

    /* The mount is of our own name space: it goes with the process. */
    if (!mkdtemp(dir) || unshare(CLONE_NEWNS) < 0 || mount("none", "/", "none", MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("qpull-test", dir, "tmpfs", 0, "size=" ROOM) < 0) {
        perror("skipped: a small file system cannot be mounted");
        (void)rmdir(dir);
        return 77;
    }
    failed = cmocka_run_group_tests(tests, NULL, NULL);
    (void)umount2(dir, MNT_DETACH);
    (void)rmdir(dir);
    return failed;
}
