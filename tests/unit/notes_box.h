/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * notes_box: a state directory of its own and a set of notes for the tests of backup/notes. The directory goes with
 * the box.
 */
#ifndef QPULL_TEST_NOTES_BOX_H
#define QPULL_TEST_NOTES_BOX_H

#include "lib/test.h"

#include "backup/notes.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define VM "vm1"
#define BORN 1700000000000 /* ms: 2023-11-14 */

struct box {
    char dir[64];
    int state_dir; /* O_PATH, as the daemon has it */
    bool mounted;  /* dir is a file system of its own */
    struct notes *set;
    struct notes_change change;
    struct notes_problems problems;
    struct failure failure;
};

static inline int box_up(void **state)
{
    struct box *b = calloc(1, sizeof(*b));

    /* In memory where there is such a place: everything is synced. */
    (void)snprintf(b->dir, sizeof(b->dir), "%s/qpull-notes-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(b->dir) || chmod(b->dir, 0755) < 0)
        return -1;
    b->state_dir = open(b->dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
    b->set = notes_new(VM);
    *state = b;
    return b->state_dir < 0 || !b->set ? -1 : 0;
}

static inline int box_down(void **state)
{
    struct box *b = *state;
    char command[96];
    int r;

    (void)close(b->state_dir);
    if (b->mounted)
        (void)umount2(b->dir, MNT_DETACH);
    (void)snprintf(command, sizeof(command), "rm -rf %s", b->dir);
    r = system(command);
    notes_free(b->set);
    notes_change_done(&b->change);
    notes_problems_done(&b->problems);
    free(b);
    return r;
}

static inline void box_forget(struct box *b)
{
    b->failure = (struct failure){0};
}

/* parent as in struct note_spec */
static inline int box_add(struct box *b, const char *name, const char *parent, int64_t age_ms)
{
    struct note_spec spec = {.name = name, .parent = parent, .created_ms = BORN + age_ms};

    box_forget(b);
    return notes_add(b->set, &spec, &b->change, &b->failure);
}

static inline int box_remove(struct box *b, const char *name)
{
    box_forget(b);
    return notes_remove(b->set, name, &b->change, &b->failure);
}

static inline int box_write(struct box *b)
{
    int r;

    box_forget(b);
    r = notes_apply(b->state_dir, b->set->vm, &b->change, &b->failure);
    if (r == 0)
        notes_change_done(&b->change);
    return r;
}

/* The set and the problems are what the files say from now on. */
static inline void box_load(struct box *b, const char *vm)
{
    struct notes *set = NULL;

    box_forget(b);
    notes_problems_done(&b->problems);
    if (notes_load(b->state_dir, vm, &set, &b->problems, &b->failure) < 0)
        fail_msg("loading: %s", b->failure.text);
    notes_free(b->set);
    b->set = set;
}

static inline void box_says(const struct box *b, const char *part)
{
    if (!strstr(b->failure.text, part))
        fail_msg("\"%s\" is not in \"%s\"", part, b->failure.text);
}

static inline struct note *box_note(const struct box *b, const char *name)
{
    struct note *n = notes_find(b->set, name);

    if (!n)
        fail_msg("there is no note of '%s'", name);
    return n;
}

/* parent NULL: a root */
static inline void box_parent_is(const struct box *b, const char *name, const char *parent)
{
    const struct note *n = box_note(b, name);

    if (!parent)
        assert_null(n->parent);
    else if (!n->parent || strcmp(n->parent->name, parent) != 0)
        fail_msg("the parent of '%s' is '%s', not '%s'", name, n->parent ? n->parent->name : "(none)", parent);
}

/* All names in order, with blanks between. Static, until the next call. */
static inline const char *box_order(const struct box *b)
{
    static char text[4096];

    text[0] = '\0';
    for (size_t i = 0; i < b->set->nnotes; i++)
        (void)snprintf(text + strlen(text), sizeof(text) - strlen(text), "%s%s", i ? " " : "", b->set->notes[i]->name);
    return text;
}

static inline void box_same(const struct notes *x, const struct notes *y)
{
    struct json_object *a = notes_export(x), *b = notes_export(y);

    assert_string_equal(json_object_to_json_string(a), json_object_to_json_string(b));
    (void)json_object_put(a);
    (void)json_object_put(b);
}

/* -- files in the directory of VM ---------------------------------------------------------------------------------- */

static inline const char *box_path(const struct box *b, const char *file)
{
    static char path[512];

    (void)snprintf(path, sizeof(path), "%s/checkpoints/vm1/%s", b->dir, file);
    return path;
}

static inline void box_put_bytes(const struct box *b, const char *file, const void *bytes, size_t len)
{
    int fd = open(box_path(b, file), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, bytes, len), len);
    assert_int_equal(close(fd), 0);
}

static inline void box_put(const struct box *b, const char *file, const char *text)
{
    box_put_bytes(b, file, text, strlen(text));
}

static inline size_t box_get(const struct box *b, const char *file, char *out, size_t size)
{
    int fd = open(box_path(b, file), O_RDONLY | O_CLOEXEC);
    ssize_t n;

    assert_true(fd >= 0);
    n = read(fd, out, size - 1);
    assert_true(n >= 0);
    (void)close(fd);
    out[n] = '\0';
    return (size_t)n;
}

static inline bool box_has(const struct box *b, const char *file)
{
    struct stat st;

    return lstat(box_path(b, file), &st) == 0;
}

/* Files in the VM's directory that end like this. */
static inline size_t box_count(const struct box *b, const char *end)
{
    DIR *dir = opendir(box_path(b, ""));
    size_t n = 0;

    assert_non_null(dir);
    for (const struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        size_t len = strlen(e->d_name);

        n += e->d_name[0] != '.' && len >= strlen(end) && strcmp(e->d_name + len - strlen(end), end) == 0;
        n += strncmp(e->d_name, ".qpull-", 7) == 0 && strcmp(end, ".tmp") == 0;
    }
    (void)closedir(dir);
    return n;
}

static inline void box_add_written(struct box *b, const char *name, const char *parent, int64_t age_ms)
{
    if (box_add(b, name, parent, age_ms) < 0 || box_write(b) < 0)
        fail_msg("%s", b->failure.text);
}

static inline const struct notes_problem *box_problem(const struct box *b, const char *file)
{
    for (size_t i = 0; i < b->problems.nproblems; i++) {
        const char *slash = strrchr(b->problems.problems[i].file, '/');

        if (strcmp(slash + 1, file) == 0)
            return &b->problems.problems[i];
    }
    fail_msg("nothing is told of '%s'", file);
    return NULL;
}

static inline void box_told(const struct box *b, const char *file, const char *part)
{
    const struct notes_problem *p = box_problem(b, file);

    assert_true(p->why.err < 0);
    if (!strstr(p->why.text, part))
        fail_msg("\"%s\" is not in \"%s\"", part, p->why.text);
}

#define NOTE_TEXT(name, parent)                                                                   \
    "{\"format\":1,\"vm\":\"vm1\",\"name\":\"" name "\",\"parent\":" parent ",\"created_ms\":5,"  \
    "\"disks\":[{\"name\":\"vda\",\"size\":4096,\"node\":\"#b\",\"later\":[1.10,{\"k\":null}]}]," \
    "\"broken\":{\"disk\":\"vda\",\"reason\":\"SOON\",\"text\":\"t\",\"more\":1},\"colour\":\"red\"}"

#endif
