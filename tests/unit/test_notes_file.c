/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* notes_file: names that want to be something else, and files that are not what they should be. */
#include "notes_box.h"

#include "backup/notes_impl.h"
#include "backup/state_file.h"

#define NOBODY 65534 /* uid of "nobody" on Debian; any that is not root's does */

/* -- names --------------------------------------------------------------------------------------------------------- */

static void hostile_names_come_back(void **state)
{
    struct box *b = *state;
    static char names[24][256];
    unsigned n = 0, nhashed = 0;
    struct notes *before;

    for (const char *const *p =
             (const char *const[]){".", "..", ".json", "%", "%2E", "%~", "a%~0123456789abcdef", "-rf", "trailing ", " ",
                                   "*?[", "\\", "\"", "'", "x.json", ".qpull-00000000.tmp", NULL};
         *p; p++)
        (void)snprintf(names[n++], sizeof(names[0]), "%s", *p);
    for (unsigned i = 0; i < 255; i += 3) { /* 85 signs of three bytes */
        (void)memcpy(names[n] + i, "\xe6\x97\xa5", 3);
        (void)memcpy(names[n + 1] + i, "\xe6\x97\xa5", 3);
    }
    names[n + 1][254] = '\xa6'; /* the last byte is another */
    (void)memset(names[n + 2], '%', 255);
    (void)memset(names[n + 3], 'a', 255);
    (void)memset(names[n + 4], 'a', 250); /* the longest that needs no hash */
    n += 5;

    for (unsigned i = 0; i < n; i++) {
        char file[NAME_MAX + 1], again[NAME_MAX + 1];

        if (box_add(b, names[i], NULL, i) < 0)
            fail_msg("%s: %s", names[i], b->failure.text);
        (void)state_name(names[i], NOTES_SUFFIX, file);
        assert_true(strlen(file) <= NAME_MAX && file[0] != '.' && file[0] != '-' && !strchr(file, '/'));
        if (state_name_parse(file, NOTES_SUFFIX, again))
            assert_string_equal(again, names[i]);
        else
            nhashed++;
    }
    assert_int_equal(nhashed, 4);
    if (box_write(b) < 0)
        fail_msg("%s", b->failure.text);
    assert_int_equal(box_count(b, ".json"), n);
    before = TAKE_PTR(b->set);
    box_load(b, VM);
    assert_int_equal(b->problems.nproblems, 0);
    box_same(before, b->set);
    notes_free(before);
    for (unsigned i = 0; i < n; i++)
        assert_int_equal(box_remove(b, names[i]), 0);
    assert_int_equal(box_write(b), 0);
    assert_int_equal(box_count(b, ""), 0);
}

static void vms_of_any_name_have_directories_of_their_own(void **state)
{
    struct box *b = *state;
    static char long_name[129];
    const char *const names[] = {"..", ".", "a/b", "a%2Fb", "checkpoints", "-", long_name};
    struct note_spec spec = {.created_ms = BORN};

    for (unsigned i = 0; i < 128; i += 2)
        (void)snprintf(long_name + i, sizeof(long_name) - i, "\xc3\xa9");
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        struct notes *set = notes_new(names[i]);

        spec.name = names[i][0] == 'a' ? "same" : "other";
        spec.description = names[i];
        assert_int_equal(notes_add(set, &spec, &b->change, &b->failure), 0);
        if (notes_apply(b->state_dir, names[i], &b->change, &b->failure) < 0)
            fail_msg("%s", b->failure.text);
        notes_change_done(&b->change);
        notes_free(set);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        box_load(b, names[i]);
        assert_int_equal(b->problems.nproblems, 0);
        assert_int_equal(b->set->nnotes, 1);
        assert_string_equal(b->set->notes[0]->description, names[i]);
    }
    box_forget(b);
    assert_int_equal(notes_save_one(b->state_dir, "", b->set->notes[0], &b->failure), -EINVAL);
}

static void one_note_is_saved_and_deleted_by_itself(void **state)
{
    struct box *b = *state;
    struct note_spec spec = {.name = "a", .created_ms = 1763686378123, .description = "d"};
    char text[4096];

    assert_int_equal(notes_delete_one(b->state_dir, VM, "a", &b->failure), 0); /* not even a directory */
    assert_int_equal(notes_add(b->set, &spec, &b->change, &b->failure), 0);
    assert_int_equal(notes_save_one(b->state_dir, VM, box_note(b, "a"), &b->failure), 0);
    (void)box_get(b, "a.json", text, sizeof(text));
    assert_non_null(strstr(text, "\"created\": \"2025-11-21T00:52:58.123Z\""));
    assert_non_null(strstr(text, "\"created_ms\": 1763686378123"));
    assert_non_null(strstr(text, "\"broken\": null"));
    assert_int_equal(notes_delete_one(b->state_dir, VM, "a", &b->failure), 0);
    assert_int_equal(notes_delete_one(b->state_dir, VM, "a", &b->failure), 0);
    assert_int_equal(box_count(b, ""), 0);
}

/* -- files that are not what they should be ------------------------------------------------------------------------ */

static void leftovers_of_interrupted_writes_are_removed_and_nothing_else(void **state)
{
    struct box *b = *state;

    box_add_written(b, "a", NULL, 0);
    box_put(b, ".qpull-0123abcd.tmp", "{\"format\":1,");
    box_put(b, ".qpull-00000000.tmp", "");
    box_put(b, ".qpull-0123abc.tmp", "short");
    box_put(b, ".qpull-0123abcde.tmp", "long");
    box_put(b, ".qpull-0123abcX.tmp", "not hex");
    box_put(b, "as-long-as-ours.tmp", "a person's");
    box_put(b, "README", "a person's");
    box_load(b, VM);
    assert_int_equal(b->set->nnotes, 1);
    assert_false(box_has(b, ".qpull-0123abcd.tmp"));
    assert_false(box_has(b, ".qpull-00000000.tmp"));
    assert_int_equal(b->problems.nproblems, 5);
    box_told(b, ".qpull-0123abcX.tmp", "not a note's file");
    box_told(b, "as-long-as-ours.tmp", "not a note's file");
    box_told(b, "README", "not a note's file");
    box_told(b, ".qpull-0123abc.tmp", "left as it is");
    box_told(b, ".qpull-0123abcde.tmp", "left as it is");
    assert_true(box_has(b, ".qpull-0123abc.tmp") && box_has(b, ".qpull-0123abcde.tmp") && box_has(b, "README"));
}

static void a_damaged_file_is_told_and_left_wherever_it_ends(void **state)
{
    struct box *b = *state;
    const char text[] = NOTE_TEXT("a", "null");
    char now[sizeof(text)];

    box_add_written(b, "good", NULL, 0);
    box_put(b, "a.json", text);
    box_load(b, VM);
    assert_int_equal(b->problems.nproblems, 0);
    assert_int_equal(b->set->nnotes, 2);
    for (size_t len = 0; len < sizeof(text) - 1; len++) {
        box_put_bytes(b, "a.json", text, len);
        box_load(b, VM);
        assert_int_equal(b->set->nnotes, 1);
        assert_int_equal(b->problems.nproblems, 1);
        box_told(b, "a.json", "left as it is");
        assert_string_equal(box_problem(b, "a.json")->checkpoint, "a");
        assert_int_equal(box_get(b, "a.json", now, sizeof(now)), len);
        assert_memory_equal(now, text, len);
    }
}

/* It may still be a note, or one of another VM, which is told as well; the neighbour is read in any case. */
static void any_wrong_byte_is_survived(void **state)
{
    struct box *b = *state;
    const char text[] = NOTE_TEXT("a", "null");
    static const char bytes[] = {'\0', '"', '{', '\\', '\x80', '9'};
    char wrong[sizeof(text)];

    box_add_written(b, "good", NULL, 0);
    for (size_t i = 0; i < sizeof(text) - 1; i++) {
        (void)memcpy(wrong, text, sizeof(text));
        wrong[i] = bytes[i % sizeof(bytes)];
        box_put_bytes(b, "a.json", wrong, sizeof(text) - 1);
        box_load(b, VM);
        assert_non_null(notes_find(b->set, "good"));
        assert_between(b->set->nnotes + b->problems.nproblems, 2, 3);
    }
}

static void what_is_not_a_note_is_told_in_words(void **state)
{
    struct box *b = *state;
    static const struct {
        const char *file, *text, *says;
    } bad[] = {
        {"e.json", "", "ends in the middle"},
        {"f.json", "{\"format\":2,\"name\":\"f\"}", "format 2, this program reads format 1"},
        {"g.json", "{\"format\":\"1\"}", "\"format\""},
        {"h.json", "[1]", "not a JSON object"},
        {"i.json", NOTE_TEXT("i", "null") "x", "something follows its end"},
        {"j.json", NOTE_TEXT("other", "null"), "'other' would be in 'other.json'"},
        {"k.json", NOTE_TEXT("k", "7"), "\"parent\" is not a text"},
        {"l.json", "{\"format\":1,\"name\":\"l\",\"vm\":\"vm1\",\"created_ms\":-1}", "\"created_ms\""},
        {"m.json", "{\"format\":1,\"name\":\"m\",\"vm\":\"vm1\",\"created_ms\":1}", "\"disks\""},
        {"n.json", "{\"format\":1,\"name\":\"n\",\"vm\":\"vm1\",\"created_ms\":1,\"disks\":[1]}", "not all objects"},
        {"o.json", "{\"format\":1,\"name\":\"o\",\"vm\":\"vm1\",\"created_ms\":1,\"disks\":[],\"broken\":1}",
         "\"broken\""},
        {"p.json", "{\"format\":1,\"name\":\"p\",\"vm\":\"vm1\",\"created_ms\":99999999999999999999,\"disks\":[]}",
         "\"created_ms\""},
        {"q.json",
         "{\"format\":1,\"name\":\"q\",\"vm\":\"vm1\",\"created_ms\":1,\"disks\":[{\"name\":\"a\",\"size\":-1}]}",
         "\"size\""},
        {"%2e.json", NOTE_TEXT(".", "null"), "'%2E.json'"},
        {"Note.JSON", NOTE_TEXT("Note", "null"), "not a note's file"},
    };

    box_add_written(b, "good", NULL, 0);
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        box_put(b, bad[i].file, bad[i].text);
    box_load(b, VM);
    assert_int_equal(b->set->nnotes, 1);
    assert_int_equal(b->problems.nproblems, ARRAY_SIZE(bad));
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        box_told(b, bad[i].file, bad[i].says);
        assert_true(box_has(b, bad[i].file));
    }
}

static void deep_nesting_and_large_files_are_refused(void **state)
{
    struct box *b = *state;
    static char text[NOTES_FILE_MAX + 2];
    size_t head = sizeof(NOTE_TEXT("a", "null")) - 1;

    box_add_written(b, "good", NULL, 0);
    (void)memset(text, ' ', sizeof(text));
    (void)memcpy(text, NOTE_TEXT("a", "null"), head);
    box_put_bytes(b, "a.json", text, NOTES_FILE_MAX);
    box_load(b, VM);
    assert_int_equal(b->set->nnotes, 2);
    box_put_bytes(b, "a.json", text, NOTES_FILE_MAX + 1);
    box_load(b, VM);
    box_told(b, "a.json", "65537 bytes");
    (void)memset(text, '[', sizeof(text));
    box_put_bytes(b, "a.json", text, NOTES_FILE_MAX);
    box_load(b, VM);
    box_told(b, "a.json", "nesting");
    for (size_t depth = 20; depth < 40; depth++) { /* across both limits, in what we do not know */
        int n = snprintf(text, sizeof(text),
                         "{\"format\":1,\"vm\":\"vm1\",\"name\":\"a\",\"created_ms\":5,\"disks\":[],\"x\":");

        (void)memset(text + n, '[', depth);
        (void)memset(text + n + depth, ']', depth);
        text[(size_t)n + 2 * depth] = '}';
        box_put_bytes(b, "a.json", text, (size_t)n + 2 * depth + 1);
        box_load(b, VM);
        assert_int_equal(b->set->nnotes, depth < 24 ? 2 : 1);
        if (depth < 24)
            assert_int_equal(notes_save_one(b->state_dir, VM, box_note(b, "a"), &b->failure), 0);
    }
}

static void things_that_are_not_files_are_told_and_not_waited_for(void **state)
{
    struct box *b = *state;

    box_add_written(b, "good", NULL, 0);
    box_put(b, "outside", NOTE_TEXT("link", "null"));
    assert_int_equal(mkdir(box_path(b, "dir.json"), 0700), 0);
    assert_int_equal(mkfifo(box_path(b, "fifo.json"), 0600), 0);
    assert_int_equal(symlink("outside", box_path(b, "link.json")), 0);
    box_load(b, VM);
    assert_int_equal(b->set->nnotes, 1);
    assert_int_equal(b->problems.nproblems, 4);
    box_told(b, "dir.json", "not a regular file");
    box_told(b, "fifo.json", "not a regular file");
    box_told(b, "link.json", "symbolic link");
}

static void an_unreadable_file_is_told(void **state)
{
    struct box *b = *state;
    bool root = geteuid() == 0;

    box_add_written(b, "locked", NULL, 0);
    box_add_written(b, "good", NULL, 1);
    assert_int_equal(chmod(box_path(b, "locked.json"), 0), 0);
    assert_int_equal(chmod(box_path(b, "good.json"), 0644), 0);
    assert_int_equal(chmod(box_path(b, ".."), 0755), 0);
    assert_int_equal(chmod(box_path(b, ""), 0755), 0);
    if (root)
        assert_int_equal(seteuid(NOBODY), 0);
    box_load(b, VM);
    if (root)
        assert_int_equal(seteuid(0), 0);
    assert_int_equal(b->set->nnotes, 1);
    box_told(b, "locked.json", "cannot be opened: Permission denied");
    /* Its child is not lost and still knows whose it is. */
    box_parent_is(b, "good", NULL);
    assert_string_equal(box_note(b, "good")->parent_name, "locked");
    assert_int_equal(chmod(box_path(b, "locked.json"), 0600), 0);
    assert_int_equal(notes_save_one(b->state_dir, VM, box_note(b, "good"), &b->failure), 0);
    box_load(b, VM);
    box_parent_is(b, "good", "locked");
}

static void an_unreadable_directory_is_a_failure(void **state)
{
    struct box *b = *state;
    struct notes *set = NULL;
    char path[96];

    (void)snprintf(path, sizeof(path), "%s/checkpoints", b->dir);
    assert_int_equal(close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600)), 0); /* where a directory should be */
    assert_int_equal(notes_load(b->state_dir, VM, &set, &b->problems, &b->failure), -ENOTDIR);
    box_says(b, "look after 'checkpoints'");
    assert_null(set);
    assert_int_equal(box_add(b, "a", NULL, 0), 0);
    assert_int_equal(box_write(b), -ENOTDIR);
    assert_int_equal(b->change.ndone, 0);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(box_write(b), 0);
}

static void a_damaged_file_in_the_way_is_set_aside_and_not_lost(void **state)
{
    struct box *b = *state;
    char text[64];
    DIR *dir;

    box_add_written(b, "good", NULL, 0);
    for (int i = 0; i < 2; i++) {
        box_put(b, "a.json", "precious");
        assert_int_equal(box_remove(b, "a"), 0); /* no such note in the set: the file stays */
        assert_int_equal(notes_delete_one(b->state_dir, VM, "a", &b->failure), 0);
        assert_true(box_has(b, "a.json"));
        box_add_written(b, "a", NULL, 1);
        box_load(b, VM);
        assert_non_null(notes_find(b->set, "a"));
        assert_int_equal(b->problems.nproblems, i + 1);
        assert_non_null(strstr(b->problems.problems[0].why.text, "set aside"));
        assert_int_equal(box_remove(b, "a"), 0);
        assert_int_equal(box_write(b), 0);
        assert_false(box_has(b, "a.json"));
    }
    dir = opendir(box_path(b, ""));
    assert_non_null(dir);
    for (const struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        if (strncmp(e->d_name, "damaged", 7) == 0) {
            (void)box_get(b, e->d_name, text, sizeof(text));
            assert_string_equal(text, "precious");
        }
    }
    (void)closedir(dir);
}

static void unknown_keys_are_written_again(void **state)
{
    struct box *b = *state;
    char text[4096];

    box_add_written(b, "p", NULL, 0);
    box_put(b, "a.json", NOTE_TEXT("a", "\"p\""));
    box_load(b, VM);
    assert_int_equal(box_remove(b, "p"), 0); /* a is written anew */
    assert_int_equal(box_write(b), 0);
    (void)box_get(b, "a.json", text, sizeof(text));
    assert_non_null(strstr(text, "\"parent\": null"));
    assert_non_null(strstr(text, "\"colour\": \"red\""));
    assert_non_null(strstr(text, "1.10"));
    assert_non_null(strstr(text, "\"k\": null"));
    assert_non_null(strstr(text, "\"reason\": \"SOON\""));
    assert_non_null(strstr(text, "\"more\": 1"));
    assert_non_null(strstr(text, "\"node\": \"#b\""));
}

/* -- relations in files -------------------------------------------------------------------------------------------- */

static void cycles_in_files_become_roots_and_are_told(void **state)
{
    struct box *b = *state;

    box_add_written(b, "good", NULL, 0);
    box_put(b, "self.json", NOTE_TEXT("self", "\"self\""));
    box_put(b, "a.json", NOTE_TEXT("a", "\"b\""));
    box_put(b, "b.json", NOTE_TEXT("b", "\"a\""));
    box_put(b, "x.json", NOTE_TEXT("x", "\"y\""));
    box_put(b, "y.json", NOTE_TEXT("y", "\"z\""));
    box_put(b, "z.json", NOTE_TEXT("z", "\"x\""));
    box_put(b, "tail.json", NOTE_TEXT("tail", "\"x\""));
    box_put(b, "tip.json", NOTE_TEXT("tip", "\"tail\""));
    box_load(b, VM);
    assert_int_equal(b->set->nnotes, 9);
    assert_int_equal(b->problems.nproblems, 6);
    for (const char *const *p = (const char *const[]){"self", "a", "b", "x", "y", "z", NULL}; *p; p++) {
        char file[16];

        (void)snprintf(file, sizeof(file), "%s.json", *p);
        box_told(b, file, "its own ancestor");
        box_parent_is(b, *p, NULL);
    }
    box_parent_is(b, "tail", "x");
    box_parent_is(b, "tip", "tail");

    /* Written anew they are sound. */
    for (size_t i = 0; i < b->set->nnotes; i++)
        assert_int_equal(notes_save_one(b->state_dir, VM, b->set->notes[i], &b->failure), 0);
    box_load(b, VM);
    assert_int_equal(b->problems.nproblems, 0);
    assert_int_equal(b->set->nnotes, 9);
}

static void a_lost_parent_leaves_a_root_that_finds_it_again(void **state)
{
    struct box *b = *state;

    box_add_written(b, "p", NULL, 0);
    box_add_written(b, "c", NULL, 1);
    box_add_written(b, "d", NULL, 2);
    assert_int_equal(unlink(box_path(b, "p.json")), 0);
    box_load(b, VM);
    assert_int_equal(b->problems.nproblems, 0);
    box_parent_is(b, "c", NULL);

    assert_int_equal(box_add(b, "p", "", 0), 0); /* noted again */
    box_parent_is(b, "c", "p");
    assert_string_equal(box_order(b), "p c d");
    notes_change_done(&b->change);

    box_load(b, VM);
    assert_int_equal(box_add(b, "p", NULL, 5), 0); /* made anew, on top of those that wait for it: no cycle */
    box_parent_is(b, "c", NULL);
    box_parent_is(b, "p", "d");
    assert_int_equal(b->change.nops, 2); /* c is written, too */
    assert_int_equal(box_write(b), 0);
    box_load(b, VM);
    assert_int_equal(b->problems.nproblems, 0);
    box_parent_is(b, "p", "d");
}

static void deleting_a_checkpoint_without_a_note_frees_those_who_name_it(void **state)
{
    struct box *b = *state;

    box_add_written(b, "p", NULL, 0);
    box_add_written(b, "c", NULL, 1);
    assert_int_equal(unlink(box_path(b, "p.json")), 0);
    box_load(b, VM);
    assert_int_equal(box_remove(b, "p"), 0);
    assert_int_equal(b->change.nops, 1);
    assert_int_equal(box_write(b), 0);
    box_load(b, VM);
    assert_null(box_note(b, "c")->parent_name);
}

static void a_set_with_a_lost_parent_can_be_exported_and_imported(void **state)
{
    struct box *b = *state;
    struct notes *copy = notes_new(VM);
    struct json_object *doc;

    box_add_written(b, "p", NULL, 0);
    box_add_written(b, "c", NULL, 1);
    assert_int_equal(unlink(box_path(b, "p.json")), 0);
    box_load(b, VM);
    doc = notes_export(b->set);
    assert_int_equal(notes_import(copy, doc, &b->change, &b->failure), 0);
    assert_null(notes_find(copy, "c")->parent_name);
    (void)json_object_put(doc);
    notes_free(copy);
}

static void a_change_outlives_its_set(void **state)
{
    struct box *b = *state;

    assert_int_equal(box_add(b, "a", NULL, 0), 0);
    assert_int_equal(box_add(b, "b", NULL, 1), 0);
    assert_int_equal(box_remove(b, "a"), 0); /* with what came before, in one go */
    notes_free(TAKE_PTR(b->set));
    assert_int_equal(notes_apply(b->state_dir, VM, &b->change, &b->failure), 0);
    assert_int_equal(b->change.ndone, b->change.nops);
    box_load(b, VM);
    assert_string_equal(box_order(b), "b");
    box_parent_is(b, "b", NULL);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, box_up, box_down)
    const struct CMUnitTest tests[] = {
        T(hostile_names_come_back),
        T(vms_of_any_name_have_directories_of_their_own),
        T(one_note_is_saved_and_deleted_by_itself),
        T(leftovers_of_interrupted_writes_are_removed_and_nothing_else),
        T(a_damaged_file_is_told_and_left_wherever_it_ends),
        T(any_wrong_byte_is_survived),
        T(what_is_not_a_note_is_told_in_words),
        T(deep_nesting_and_large_files_are_refused),
        T(things_that_are_not_files_are_told_and_not_waited_for),
        T(an_unreadable_file_is_told),
        T(an_unreadable_directory_is_a_failure),
        T(a_damaged_file_in_the_way_is_set_aside_and_not_lost),
        T(unknown_keys_are_written_again),
        T(cycles_in_files_become_roots_and_are_told),
        T(a_lost_parent_leaves_a_root_that_finds_it_again),
        T(deleting_a_checkpoint_without_a_note_frees_those_who_name_it),
        T(a_set_with_a_lost_parent_can_be_exported_and_imported),
        T(a_change_outlives_its_set),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
