/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The files of the notes (backup/state_file on their names, and on how they are written). A file counts only under the
 * name that its content leads to, so no note can be there twice.
 */
#include "backup/notes_impl.h"
#include "backup/state_file.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define ASIDE_PREFIX "damaged%~" /* and a hash of the file's name, and a number */
#define ASIDE_TRIES 100

static int no_memory(struct failure *f)
{
    (void)failure_set(f, -ENOMEM, "out of memory for the notes of checkpoints");
    return -ENOMEM;
}

/* -- problems ------------------------------------------------------------------------------------------------------ */

void notes_problems_done(struct notes_problems *p)
{
    for (size_t i = 0; i < p->nproblems; i++) {
        free(p->problems[i].file);
        free(p->problems[i].checkpoint);
    }
    free(p->problems);
    *p = (struct notes_problems){0};
}

/* Without memory for the words it is counted at least. */
static void tell(struct notes_problems *p, const char *dir, const char *file, const struct failure *why)
{
    char name[NAME_MAX + 1];
    bool known = state_name_parse(file, NOTES_SUFFIX, name);
    struct notes_problem new = {.why = *why};

    if (!p)
        return;
    if (p->nproblems == p->nalloc && p->nalloc < NOTES_PROBLEMS_MAX) {
        size_t nalloc = MIN(p->nalloc ? 2 * p->nalloc : 4, NOTES_PROBLEMS_MAX);
        struct notes_problem *problems = reallocarray(p->problems, nalloc, sizeof(*problems));

        if (problems) {
            p->problems = problems;
            p->nalloc = nalloc;
        }
    }
    if (p->nproblems < p->nalloc && asprintf(&new.file, NOTES_DIR "/%s/%s", dir, file) >= 0) {
        new.checkpoint = known ? strdup(name) : NULL;
        p->problems[p->nproblems++] = new;
    } else {
        p->nmore++;
    }
}

/* -- directories --------------------------------------------------------------------------------------------------- */

struct place {
    int fd; /* owned: the VM's directory, to read and to sync */
    char dir[NAME_MAX + 1];
    const char *vm;
};

static void place_done(struct place *p)
{
    if (p->fd >= 0)
        (void)close(p->fd);
    p->fd = -1;
}

static int dir_failure(struct failure *f, int err, const char *vm, const char *what)
{
    return failure_set(f, err,
                       "cannot %s the directory of the checkpoint notes of VM '%s': %s; look after "
                       "'" NOTES_DIR "' in the state directory",
                       what, vm, strerror(-err));
}

/* *p must not be open. Without `make` -ENOENT is not told: whoever reads takes it for no notes. */
static int place_open(struct place *p, int state_dir, const char *vm, bool make, struct failure *f)
{
    _cleanup_fd_ int notes_dir = -1;
    int r;

    p->fd = -1;
    p->vm = vm;
    if (!vm[0])
        return failure_set(f, -EINVAL, "a VM without a name has no checkpoint notes");
    (void)state_name(vm, "", p->dir);
    r = make ? state_make_dir(state_dir, NOTES_DIR) : 0;
    if (r == 0)
        r = notes_dir = state_open_dir(state_dir, NOTES_DIR);
    if (r >= 0)
        r = make ? state_make_dir(notes_dir, p->dir) : 0;
    if (r == 0)
        r = p->fd = state_open_dir(notes_dir, p->dir);
    if (r >= 0 || (r == -ENOENT && !make))
        return MIN(r, 0);
    return dir_failure(f, r, vm, make ? "make" : "open");
}

static int place_sync(const struct place *p, struct failure *f)
{
    return fsync(p->fd) < 0 ? dir_failure(f, -errno, p->vm, "sync") : 0;
}

/* -- one file ------------------------------------------------------------------------------------------------------ */

struct content {
    char *text; /* owned */
    size_t len;
};

/* The note in that file, if it belongs there. -ENOENT is not told. */
static int read_note(const struct place *p, const char *file, struct note **ret_note, char **ret_vm, struct failure *f)
{
    _cleanup_(note_freep) struct note *n = NULL;
    _cleanup_free_ char *vm = NULL;
    struct content c = {0};
    char right[NAME_MAX + 1];
    int r = state_read(p->fd, file, NOTES_FILE_MAX, &c.text, &c.len, f);

    if (r == 0)
        r = note_decode(c.text, c.len, &n, &vm, f);
    free(c.text);
    if (r < 0 || !n)
        return r;
    if (strcmp(state_name(n->name, NOTES_SUFFIX, right), file) != 0)
        return failure_set(f, -EBADMSG, "it is under a wrong name: the note of checkpoint '%s' would be in '%s'",
                           n->name, right);
    *ret_note = TAKE_PTR(n);
    *ret_vm = TAKE_PTR(vm);
    return 0;
}

/* Gives the file a second name that nobody has, so that renaming over the first one loses nothing. */
static int set_aside(const struct place *p, const char *file)
{
    for (int i = 0; i < ASIDE_TRIES; i++) {
        char aside[NAME_MAX + 1];

        (void)snprintf(aside, sizeof(aside), "%s%0*" PRIx64 "-%d", ASIDE_PREFIX, STATE_HASH_DIGITS, state_hash(file),
                       i);
        if (linkat(p->fd, file, p->fd, aside, 0) == 0)
            return 0;
        if (errno != EEXIST)
            return -errno;
    }
    return -EEXIST;
}

static int save_failure(struct failure *f, int err, const char *name, const struct place *p, const char *what)
{
    return failure_set(f, err,
                       "cannot write the note of checkpoint '%s' of VM '%s' (%s): %s. The checkpoint itself is "
                       "not affected; see to " NOTES_DIR "/%s in the state directory",
                       name, p->vm, what, strerror(-err), p->dir);
}

static int save_text(const struct place *p, const char *name, const char *text, struct failure *f)
{
    _cleanup_(note_freep) struct note *there = NULL;
    _cleanup_free_ char *vm = NULL;
    struct failure why = {0};
    char file[NAME_MAX + 1];
    size_t len = strlen(text);
    int r;

    if (len > NOTES_FILE_MAX)
        return failure_set(f, -EFBIG, "the note of checkpoint '%s' of VM '%s' has %zu bytes, at most %u are kept", name,
                           p->vm, len, NOTES_FILE_MAX);
    (void)state_name(name, NOTES_SUFFIX, file);
    r = read_note(p, file, &there, &vm, &why);
    if (there && strcmp(there->name, name) != 0)
        return failure_set(f, -EEXIST,
                           "the notes of checkpoints '%s' and '%s' would have the same file; give one of "
                           "them another name",
                           name, there->name);
    if (r == -ENOMEM)
        return no_memory(f);
    if (r < 0 && r != -ENOENT) {
        r = set_aside(p, file);
        if (r < 0)
            return save_failure(f, r, name, p, "a damaged one cannot be set aside");
    }
    r = state_replace(p->fd, file, text, len);
    return r < 0 ? save_failure(f, r, name, p, file) : 0;
}

static int delete_file(const struct place *p, const char *name, struct failure *f)
{
    _cleanup_(note_freep) struct note *there = NULL;
    _cleanup_free_ char *vm = NULL;
    struct failure why = {0};
    char file[NAME_MAX + 1];
    int r;

    (void)state_name(name, NOTES_SUFFIX, file);
    r = read_note(p, file, &there, &vm, &why);
    if (r == -ENOMEM)
        return no_memory(f);
    if (!there || strcmp(there->name, name) != 0)
        return 0;
    if (unlinkat(p->fd, file, 0) < 0 && errno != ENOENT)
        return failure_set(f, -errno,
                           "cannot remove the note of checkpoint '%s' of VM '%s': %s; remove " NOTES_DIR
                           "/%s/%s in the state directory",
                           name, p->vm, strerror(errno), p->dir, file);
    return 0;
}

/* -- writing ------------------------------------------------------------------------------------------------------- */

int notes_apply(int state_dir, const char *vm, struct notes_change *change, struct failure *f)
{
    _cleanup_(place_done) struct place p = {.fd = -1};
    size_t i = change->ndone;
    int r;

    if (i == change->nops)
        return 0;
    r = place_open(&p, state_dir, vm, /* make= */ true, f);
    for (; r == 0 && i < change->nops; i++) {
        const struct notes_op *op = &change->ops[i];

        if (op->text) {
            r = save_text(&p, op->name, op->text, f);
        } else {
            /* What came before must last before something goes. */
            r = i > change->ndone ? place_sync(&p, f) : 0;
            r = r < 0 ? r : delete_file(&p, op->name, f);
        }
        if (r < 0)
            break;
    }
    if (p.fd >= 0 && i > change->ndone) {
        int synced = place_sync(&p, f);

        r = r < 0 ? r : synced;
        if (synced == 0)
            change->ndone = i;
    }
    return r;
}

int notes_save_one(int state_dir, const char *vm, const struct note *n, struct failure *f)
{
    _cleanup_(place_done) struct place p = {.fd = -1};
    _cleanup_free_ char *text = note_encode(n, vm);
    int r;

    if (!text)
        return no_memory(f);
    r = place_open(&p, state_dir, vm, /* make= */ true, f);
    r = r < 0 ? r : save_text(&p, n->name, text, f);
    return r < 0 ? r : place_sync(&p, f);
}

int notes_delete_one(int state_dir, const char *vm, const char *name, struct failure *f)
{
    _cleanup_(place_done) struct place p = {.fd = -1};
    int r = place_open(&p, state_dir, vm, /* make= */ false, f);

    if (r == -ENOENT)
        return 0;
    r = r < 0 ? r : delete_file(&p, name, f);
    return r < 0 ? r : place_sync(&p, f);
}

/* -- reading ------------------------------------------------------------------------------------------------------- */

static int leave(struct failure *f, const struct failure *why)
{
    return failure_set(f, why->err, "%s. It is left as it is; checkpoints do not depend on their notes", why->text);
}

static int no_room(const struct notes *set, const struct note *n, struct failure *f)
{
    struct failure why = {0};

    if (notes_check_room(set, set->nnotes + 1, set->bytes + n->bytes, &why) < 0)
        return failure_set(f, why.err, "it is not read: %s", why.text);
    return 0;
}

/* Problems go to the list; a failure is one of memory. */
static int load_file(const struct place *p, const char *file, struct notes *set, struct notes_problems *problems,
                     struct failure *f)
{
    _cleanup_(note_freep) struct note *n = NULL;
    _cleanup_free_ char *vm = NULL;
    struct failure why = {0}, told = {0};
    int r = read_note(p, file, &n, &vm, &why);

    assert(r < 0 || n);
    if (r == 0)
        r = no_room(set, n, &why);
    if (r == 0 && notes_reserve(set, set->nnotes + 1) < 0)
        r = -ENOMEM;
    if (r == -ENOMEM)
        return no_memory(f);
    if (r == -ENOENT) /* gone since the directory was read */
        return 0;
    if (r < 0) {
        (void)leave(&told, &why);
        tell(problems, p->dir, file, &told);
        return 0;
    }
    if (strcmp(vm, p->vm) != 0) {
        n->elsewhere = true;
        (void)failure_set(&told, -EXDEV,
                          "it is of VM '%s'; it counts for '%s', where it lies, and will say so when it "
                          "is written the next time",
                          vm, p->vm);
        tell(problems, p->dir, file, &told);
    }
    notes_append(set, TAKE_PTR(n));
    return 0;
}

static int load_entry(const struct place *p, const char *file, struct notes *set, struct notes_problems *problems,
                      struct failure *f)
{
    struct failure why = {0};
    size_t len = strlen(file);

    if (strcmp(file, ".") == 0 || strcmp(file, "..") == 0)
        return 0;
    if (state_is_temp(file)) {
        if (unlinkat(p->fd, file, 0) == 0 || errno == ENOENT)
            return 0;
        (void)failure_set(&why, -errno, "it is left over from an interrupted write and cannot be removed: %s",
                          strerror(errno));
        tell(problems, p->dir, file, &why);
        return 0;
    }
    if (len > strlen(NOTES_SUFFIX) && strcmp(file + len - strlen(NOTES_SUFFIX), NOTES_SUFFIX) == 0)
        return load_file(p, file, set, problems, f);
    if (strncmp(file, ASIDE_PREFIX, strlen(ASIDE_PREFIX)) == 0)
        (void)failure_set(&why, -EBADMSG,
                          "it is a damaged note that was set aside for a new one; remove it when you "
                          "have seen it");
    else
        (void)failure_set(&why, -EBADMSG, "it is not a note's file and is left as it is");
    tell(problems, p->dir, file, &why);
    return 0;
}

/* Notes that are their own ancestors become roots; their files keep saying otherwise until they are written again. */
static void break_cycles(const struct place *p, struct notes *set, struct notes_problems *problems)
{
    if (notes_relink(set) == 0)
        return;
    for (size_t i = 0; i < set->nnotes; i++) {
        struct note *n = set->notes[i];
        struct failure why = {0};
        char file[NAME_MAX + 1];

        if (!n->cyclic)
            continue;
        (void)failure_set(&why, -ELOOP,
                          "it makes the checkpoint its own ancestor, by its parent '%s'; it counts as one "
                          "without a parent",
                          n->parent_name);
        tell(problems, p->dir, state_name(n->name, NOTES_SUFFIX, file), &why);
        free(TAKE_PTR(n->parent_name));
    }
}

static void dir_closep(DIR **dir)
{
    if (*dir)
        (void)closedir(*dir);
}

static int load_all(const struct place *p, struct notes *set, struct notes_problems *problems, struct failure *f)
{
    _cleanup_(dir_closep) DIR *dir = NULL;
    int fd = state_open_dir(p->fd, "."), r = 0; /* closedir() takes it along */
    const struct dirent *e;

    if (fd < 0)
        return dir_failure(f, fd, p->vm, "open");
    dir = fdopendir(fd);
    if (!dir) {
        (void)close(fd);
        return no_memory(f);
    }
    for (errno = 0; r == 0 && (e = readdir(dir)); errno = 0)
        r = load_entry(p, e->d_name, set, problems, f);
    if (r == 0 && errno)
        r = dir_failure(f, -errno, p->vm, "read");
    if (r == 0)
        break_cycles(p, set, problems);
    return r;
}

int notes_load(int state_dir, const char *vm, struct notes **ret_set, struct notes_problems *problems,
               struct failure *f)
{
    _cleanup_(place_done) struct place p = {.fd = -1};
    struct notes *set;
    int r = place_open(&p, state_dir, vm, /* make= */ false, f);

    if (r < 0 && r != -ENOENT)
        return r;
    set = notes_new(vm);
    if (!set)
        return no_memory(f);
    r = r < 0 ? 0 : load_all(&p, set, problems, f);
    if (r < 0)
        notes_free(set);
    else
        *ret_set = set;
    return r;
}

/* -- a new name of the VM ------------------------------------------------------------------------------------------ */

static int rename_dir(int state_dir, const char *from, const char *to, struct failure *f)
{
    _cleanup_fd_ int notes_dir = state_open_dir(state_dir, NOTES_DIR);
    char old[NAME_MAX + 1], new[NAME_MAX + 1];

    if (notes_dir == -ENOENT)
        return 0;
    if (notes_dir < 0)
        return dir_failure(f, notes_dir, from, "open");
    (void)state_name(from, "", old);
    (void)state_name(to, "", new);
    /* None of the old name: there are no notes, or an earlier call was interrupted after this. */
    if (renameat(notes_dir, old, notes_dir, new) < 0 && errno != ENOENT) {
        if (errno == EEXIST || errno == ENOTEMPTY)
            return failure_set(f, -EEXIST,
                               "VM '%s' has checkpoint notes of its own, so those of '%s' cannot become its; "
                               "move " NOTES_DIR "/%s out of the state directory first",
                               to, from, new);
        return dir_failure(f, -errno, from, "rename");
    }
    return fsync(notes_dir) < 0 ? dir_failure(f, -errno, to, "sync") : 0;
}

int notes_rename_vm(int state_dir, const char *from, const char *to, struct failure *f)
{
    struct notes_change change = {0};
    struct notes *set = NULL;
    int r;

    if (!from[0] || !to[0])
        return failure_set(f, -EINVAL, "a VM without a name has no checkpoint notes");
    r = strcmp(from, to) == 0 ? 0 : rename_dir(state_dir, from, to, f);
    r = r < 0 ? r : notes_load(state_dir, to, &set, NULL, f);
    for (size_t i = 0; set && r == 0 && i < set->nnotes; i++) {
        char *text = set->notes[i]->elsewhere ? note_encode(set->notes[i], to) : NULL;

        if (set->notes[i]->elsewhere && (!text || notes_change_push(&change, set->notes[i]->name, text) < 0))
            r = no_memory(f);
    }
    r = r < 0 ? r : notes_apply(state_dir, to, &change, f);
    notes_change_done(&change);
    notes_free(set);
    return r;
}
