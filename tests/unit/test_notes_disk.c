/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* notes_file: disks that are full, writers that are killed, VMs that are renamed, and very many notes. */
#include "notes_box.h"

#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

/* -- disks that are full, machines that stop ----------------------------------------------------------------------- */

static void a_file_that_cannot_be_written_leaves_the_old_one(void **state)
{
    struct box *b = *state;
    struct rlimit was, none;
    char before[4096], after[4096];

    box_add_written(b, "a", NULL, 0);
    (void)box_get(b, "a.json", before, sizeof(before));
    assert_int_equal(notes_mark_broken(b->set, "a", "vda", REASON_GAP, NULL, &b->change, &b->failure), 0);
    assert_int_equal(box_add(b, "b", NULL, 1), 0);

    (void)signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    none = (struct rlimit){.rlim_cur = 100, .rlim_max = was.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &none), 0);
    assert_int_equal(box_write(b), -EFBIG);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);

    box_says(b, "cannot write the note of checkpoint 'a' of VM 'vm1'");
    box_says(b, "checkpoints/vm1");
    (void)box_get(b, "a.json", after, sizeof(after));
    assert_string_equal(before, after);
    assert_int_equal(box_count(b, ".tmp"), 0);
    assert_false(box_has(b, "b.json"));

    assert_int_equal(box_write(b), 0); /* the same change, once there is room */
    box_load(b, VM);
    assert_int_equal(b->set->nnotes, 2);
    assert_string_equal(box_note(b, "a")->broken.reason, "GAP");
}

static void a_full_disk_leaves_the_old_files_and_is_told(void **state)
{
    struct box *b = *state;
    char fill[4096] = {0};
    int fd, r;

    if (mount("qpull-test", b->dir, "tmpfs", 0, "size=64k") < 0) {
        print_message("a file system of its own is missing (mount: %s)\n", strerror(errno));
        skip();
    }
    b->mounted = true;
    (void)close(b->state_dir);
    b->state_dir = open(b->dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
    box_add_written(b, "a", NULL, 0);
    fd = open(box_path(b, "fill"), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    while (write(fd, fill, sizeof(fill)) > 0)
        ;
    (void)close(fd);
    assert_int_equal(box_add(b, "b", NULL, 1), 0);
    r = box_write(b);
    assert_int_equal(r, -ENOSPC);
    box_says(b, "No space left");
    assert_int_equal(box_count(b, ".tmp"), 0);
    assert_int_equal(unlink(box_path(b, "fill")), 0);
    assert_int_equal(box_write(b), 0);
    box_load(b, VM);
    assert_int_equal(b->set->nnotes, 2);
}

#define KILLS 30
#define KILL_AFTER_US 3000 /* at most */

static void a_killed_writer_leaves_whole_files(void **state)
{
    struct box *b = *state;
    static char text[NOTES_DESCRIPTION_MAX + 1];
    struct note_spec spec = {.name = "a", .created_ms = BORN, .description = text};
    unsigned nleft = 0;

    (void)memset(text, 'x', NOTES_DESCRIPTION_MAX);
    assert_int_equal(notes_add(b->set, &spec, &b->change, &b->failure), 0);
    assert_int_equal(box_write(b), 0);
    for (unsigned i = 0; i < KILLS; i++) {
        pid_t child = fork();

        assert_true(child >= 0);
        if (child == 0) {
            for (;;) {
                (void)notes_save_one(b->state_dir, VM, b->set->notes[0], NULL);
                b->set->notes[0]->created_ms++;
            }
        }
        (void)usleep((i * 7919) % KILL_AFTER_US);
        (void)kill(child, SIGKILL);
        assert_int_equal(waitpid(child, NULL, 0), child);
        nleft += box_count(b, ".tmp") > 0;
        box_load(b, VM);
        assert_int_equal(b->problems.nproblems, 0);
        assert_int_equal(strlen(box_note(b, "a")->description), NOTES_DESCRIPTION_MAX);
        assert_int_equal(box_count(b, ".tmp"), 0);
    }
    print_message("%u of %d kills left a temporary file behind\n", nleft, KILLS);
}

/* -- a new name of the VM ------------------------------------------------------------------------------------------ */

static int rename_vm(struct box *b, const char *from, const char *to)
{
    box_forget(b);
    return notes_rename_vm(b->state_dir, from, to, &b->failure);
}

static void a_renamed_vm_takes_its_notes_along(void **state)
{
    struct box *b = *state;
    char path[128], old[128];

    assert_int_equal(rename_vm(b, "no", "notes"), 0);
    box_add_written(b, "a", NULL, 0);
    box_add_written(b, "b", NULL, 1);
    assert_int_equal(rename_vm(b, VM, "vm/2"), 0);
    box_load(b, VM);
    assert_int_equal(b->set->nnotes, 0);
    box_load(b, "vm/2");
    assert_int_equal(b->set->nnotes, 2);
    assert_int_equal(b->problems.nproblems, 0);
    box_parent_is(b, "b", "a");
    assert_int_equal(rename_vm(b, VM, "vm/2"), 0); /* again */

    /* Interrupted after the directory: told by every load, and mended by the same call. */
    (void)snprintf(old, sizeof(old), "%s/checkpoints/vm%%2F2", b->dir);
    (void)snprintf(path, sizeof(path), "%s/checkpoints/vm3", b->dir);
    assert_int_equal(rename(old, path), 0);
    box_load(b, "vm3");
    assert_int_equal(b->set->nnotes, 2);
    assert_int_equal(b->problems.nproblems, 2);
    box_told(b, "a.json", "of VM 'vm/2'");
    assert_int_equal(rename_vm(b, "vm/2", "vm3"), 0);
    box_load(b, "vm3");
    assert_int_equal(b->set->nnotes, 2);
    assert_int_equal(b->problems.nproblems, 0);
}

static void a_vm_is_not_renamed_over_anothers_notes(void **state)
{
    struct box *b = *state;
    struct notes *set = notes_new("vm2");
    struct note_spec spec = {.name = "theirs", .created_ms = BORN};

    box_add_written(b, "mine", NULL, 0);
    assert_int_equal(notes_add(set, &spec, &b->change, &b->failure), 0);
    assert_int_equal(notes_apply(b->state_dir, "vm2", &b->change, &b->failure), 0);
    notes_free(set);
    assert_int_equal(rename_vm(b, VM, "vm2"), -EEXIST);
    box_says(b, "checkpoints/vm2");
    box_load(b, VM);
    assert_non_null(notes_find(b->set, "mine"));
    box_load(b, "vm2");
    assert_non_null(notes_find(b->set, "theirs"));
}

/* -- many ---------------------------------------------------------------------------------------------------------- */

static double seconds(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void ten_thousand_notes_are_loaded_and_not_one_more(void **state)
{
    struct box *b = *state;
    struct note_disk disks[] = {{.name = (char *)"vda", .size = 1, .node = (char *)"#block123"},
                                {.name = (char *)"vdb", .size = 2, .node = (char *)"#block456"}};
    double start = seconds(), added, written, loaded;
    char name[32];

    for (unsigned i = 0; i < NOTES_MAX; i++) {
        struct note_spec spec = {.name = name, .created_ms = BORN + i, .disks = disks, .ndisks = 2};

        (void)snprintf(name, sizeof(name), "backup-%u", (i * 7919) % NOTES_MAX);
        if (notes_add(b->set, &spec, &b->change, &b->failure) < 0)
            fail_msg("%s", b->failure.text);
    }
    added = seconds();
    assert_int_equal(box_write(b), 0);
    written = seconds();
    box_load(b, VM);
    loaded = seconds();
    print_message("%u notes in one line: added in %.2f s, written in %.2f s, loaded in %.2f s\n", NOTES_MAX,
                  added - start, written - added, loaded - written);
    assert_int_equal(b->problems.nproblems, 0);
    assert_int_equal(b->set->nnotes, NOTES_MAX);
    assert_int_equal(notes_current(b->set)->depth, NOTES_MAX - 1);
    assert_int_equal(box_add(b, "one-more", NULL, 0), -ENOSPC);
    box_says(b, "10000");

    box_put(b, "extra.json", NOTE_TEXT("extra", "null"));
    box_load(b, VM);
    assert_int_equal(b->set->nnotes, NOTES_MAX);
    assert_int_equal(b->problems.nproblems, 1);
    assert_non_null(strstr(b->problems.problems[0].why.text, "not read"));
}

static void problems_without_number_cost_bounded_words(void **state)
{
    struct box *b = *state;

    box_add_written(b, "a", NULL, 0);
    for (unsigned i = 0; i < NOTES_PROBLEMS_MAX + 5; i++) {
        char file[32];

        (void)snprintf(file, sizeof(file), "%u", i);
        box_put(b, file, "");
    }
    box_load(b, VM);
    assert_int_equal(b->problems.nproblems, NOTES_PROBLEMS_MAX);
    assert_int_equal(b->problems.nmore, 5);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, box_up, box_down)
    const struct CMUnitTest tests[] = {
        T(a_file_that_cannot_be_written_leaves_the_old_one),
        T(a_full_disk_leaves_the_old_files_and_is_told),
        T(a_killed_writer_leaves_whole_files),
        T(a_renamed_vm_takes_its_notes_along),
        T(a_vm_is_not_renamed_over_anothers_notes),
        T(ten_thousand_notes_are_loaded_and_not_one_more),
        T(problems_without_number_cost_bounded_words),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
