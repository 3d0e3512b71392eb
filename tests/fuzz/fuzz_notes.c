/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Notes of checkpoints as they may lie on the disk: the first byte says what is done, the rest is texts with 0 between.
 * A note that is read is written again the same; files of any content are read, or told of and left alone, and the set
 * that comes of them can be changed, written, and read again as the same.
 */
#include "backup/notes_impl.h"
#include "backup/state_file.h"
#include "fuzz.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#define VM "vm1"
#define FILES_MAX 5u
#define BORN 1700000000000 /* ms: 2023-11-14 */

enum { IMPORT = 1, REMOVE = 2, BREAK = 4, ADD = 8, DROP_DISK = 16, FILES = 32 };

static int state_dir = -1;
static char notes_dir[128]; /* below fuzz_folder_path() */

/* -- one note ------------------------------------------------------------------------------------------------------ */
static void decode(const struct input *text)
{
    _cleanup_free_ char *bytes = input_string(text), *vm = NULL, *again = NULL, *third = NULL, *vm2 = NULL;
    _cleanup_(note_freep) struct note *n = NULL, *copy = NULL;
    struct failure why = {0};
    int r = note_decode(bytes, text->size, &n, &vm, &why);

    CHECK((r < 0) == (n == NULL));
    if (!n) {
        CHECK(why.err == r && why.text[0]);
        return;
    }
    again = note_encode(n, VM);
    CHECK(again);
    if (strlen(again) > NOTES_FILE_MAX) /* what is not pretty may fit where what is pretty does not */
        return;
    CHECK(note_decode(again, strlen(again), &copy, &vm2, &why) == 0);
    CHECK(strcmp(n->name, copy->name) == 0 && n->created_ms == copy->created_ms && n->ndisks == copy->ndisks);
    third = note_encode(copy, VM);
    CHECK(third && strcmp(again, third) == 0);
}

/* -- files --------------------------------------------------------------------------------------------------------- */
static void empty_folder(void)
{
    DIR *dir = opendir(notes_dir);

    CHECK(dir);
    for (struct dirent *e = readdir(dir); e; e = readdir(dir))
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            CHECK(unlinkat(dirfd(dir), e->d_name, 0) == 0);
    (void)closedir(dir);
}

static void open_folder(void)
{
    char path[96];

    if (state_dir >= 0) {
        empty_folder();
        return;
    }
    (void)snprintf(path, sizeof(path), "%s/" NOTES_DIR, fuzz_folder_path());
    (void)snprintf(notes_dir, sizeof(notes_dir), "%s/" VM, path);
    CHECK(mkdir(path, 0700) == 0 && mkdir(notes_dir, 0700) == 0);
    state_dir = open(fuzz_folder_path(), O_PATH | O_DIRECTORY | O_CLOEXEC);
    CHECK(state_dir >= 0);
}

static void put_file(const char *name, const struct input *text)
{
    char path[256];
    int fd;

    (void)snprintf(path, sizeof(path), "%s/%s", notes_dir, name);
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, text->data, text->size) == (ssize_t)text->size);
    (void)close(fd);
}

static struct notes *load(void)
{
    struct notes_problems problems = {0};
    struct failure why = {0};
    struct notes *set = NULL;

    CHECK(notes_load(state_dir, VM, &set, &problems, &why) == 0);
    for (size_t i = 0; i < problems.nproblems; i++)
        CHECK(problems.problems[i].why.err < 0 && problems.problems[i].why.text[0]);
    notes_problems_done(&problems);
    return set;
}

/* Nobody stands before its parent, and relations go both ways. */
static void check_set(const struct notes *set)
{
    for (size_t i = 0; i < set->nnotes; i++) {
        const struct note *n = set->notes[i];
        bool found = !n->parent;

        CHECK(notes_find(set, n->name) == n);
        for (size_t k = 0; n->parent && k < i; k++)
            found |= set->notes[k] == n->parent;
        CHECK(found && (!n->parent || n->depth == n->parent->depth + 1));
    }
    CHECK(!set->nnotes || notes_current(set)->nchildren == 0);
}

static void expect_same(const struct notes *a, const struct notes *b)
{
    struct json_object *x = notes_export(a), *y = notes_export(b);

    CHECK(x && y);
    CHECK(strcmp(json_object_to_json_string(x), json_object_to_json_string(y)) == 0);
    json_object_put(x);
    json_object_put(y);
}

static void import(struct notes *set, const char *text, struct notes_change *change)
{
    struct json_object *doc = json_tokener_parse(text);
    size_t before = set->nnotes, nops = change->nops;
    struct failure why = {0};
    int r = notes_import(set, doc, change, &why);

    CHECK(r >= 0 || (why.text[0] && set->nnotes == before && change->nops == nops));
    json_object_put(doc);
}

static void change(struct notes *set, unsigned what, struct input *in)
{
    struct input word = input_take_text(in);
    _cleanup_free_ char *text = input_string(&word);
    struct notes_change change = {0};
    struct failure why = {0};
    const char *first = set->nnotes ? set->notes[0]->name : "a";
    bool written;

    if (what & IMPORT)
        import(set, text, &change);
    if (what & ADD) {
        struct note_spec spec = {.name = text, .created_ms = BORN, .description = text};

        (void)notes_add(set, &spec, &change, &why);
    }
    if (what & BREAK)
        (void)notes_mark_broken(set, first, what & DROP_DISK ? text : NULL, REASON_GAP, text, &change, &why);
    if (what & DROP_DISK)
        CHECK(notes_drop_disk(set, first, text, &change, &why) == 0);
    if (what & REMOVE)
        CHECK(notes_remove(set, first, &change, &why) == 0);
    check_set(set);
    written = notes_apply(state_dir, VM, &change, &why) == 0;
    /* A file that is not ours may stand in the place of one of ours; whatever else, all can be written. */
    CHECK(written || why.text[0]);
    if (written && change.nops > 0) {
        struct notes *again = load();

        for (size_t i = 0; i < change.nops; i++)
            CHECK((notes_find(again, change.ops[i].name) != NULL) == (notes_find(set, change.ops[i].name) != NULL));
        notes_free(again);
    }
    notes_change_done(&change);
}

static void files(unsigned what, struct input *in)
{
    static const char *const names[FILES_MAX] = {"a.json", "b.json", "c.json", "mon day.json", "d.txt"};
    struct notes *set, *again;

    open_folder();
    for (unsigned i = 0; i < FILES_MAX && in->size > 0; i++) {
        struct input text = input_take_text(in);

        put_file(names[i], &text);
    }
    set = load();
    check_set(set);
    again = load();
    expect_same(set, again); /* reading changes nothing */
    notes_free(again);
    change(set, what, in);
    notes_free(set);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    unsigned what = input_byte(&in);

    if (what & FILES) {
        files(what, &in);
    } else {
        struct input text = input_take_text(&in);

        decode(&text);
    }
    return 0;
}
