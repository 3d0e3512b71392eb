/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * notes: what is remembered about the checkpoints of one VM besides their records: parent, time, description, disks.
 * The bitmaps in QEMU are the truth and the notes only add to it. A bitmap without a note is a usable checkpoint; a
 * note without a bitmap is broken and can still be deleted. No note depends on another: deleting one gives its
 * children to its own parent and changes nothing else.
 *
 * Files: STATE_DIR/checkpoints/VM/NAME.json, one small JSON document each (backup/notes_file.c on their names). Files
 * that cannot be read or are not ours are reported, left alone, and never in the way.
 *
 * Two halves. The set (struct notes) is memory only; its owner uses it on one thread, usually the loop's. What has to
 * be written for a change of the set is collected in a struct notes_change, which holds finished bytes and no pointer
 * into the set, so that it can be handed to a worker thread. The functions of the second half touch files and wait for
 * the disk: call them from a worker thread or at start, and never two at once for the same VM.
 */
#ifndef QPULL_BACKUP_NOTES_H
#define QPULL_BACKUP_NOTES_H

#include "backup/disks.h"
#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>

#define NOTES_FORMAT 1
#define NOTES_DIR "checkpoints"           /* below the state directory */
#define NOTES_MAX 10000u                  /* notes of one VM */
#define NOTES_FILE_MAX (64u << 10)        /* bytes of one note's file */
#define NOTES_SPARE (12u << 10)           /* of these, kept free in a new note for a later parent and "broken" */
#define NOTES_TOTAL_MAX (64u << 20)       /* bytes of all files of one VM; usual notes have some 500 */
#define NOTES_DISKS_MAX 1024u             /* disks in one note: CONFIG_DISKS_MAX */
#define NOTES_STRING_MAX 1024u            /* bytes of a disk's name and of its hints */
#define NOTES_DESCRIPTION_MAX 4096u       /* bytes */
#define NOTES_PROBLEMS_MAX 1000u          /* problems kept by their words; more are counted */
#define NOTES_CREATED_MAX 253402300799999 /* ms: 9999-12-31T23:59:59.999Z, the last that RFC 3339 can write */

struct note_disk {
    char *name;    /* owned */
    uint64_t size; /* bytes, at creation */
    char *node;    /* owned, NULL: unknown. A hint for people, at creation */
    char *file;    /* owned, NULL: unknown. Likewise */
    char *extra;   /* owned: JSON object of keys that we do not know, or NULL */
};

/* Why a checkpoint cannot be used, as last seen. reason == NULL: nothing is known against it. */
struct note_broken {
    char *disk;   /* owned, NULL: all of it */
    char *reason; /* owned: a reason_name(), or a newer program's */
    char *text;   /* owned: a sentence */
    char *extra;  /* owned: as above */
};

/* Read by everybody, changed by the functions below only. */
struct note {
    char *name;         /* owned */
    int64_t created_ms; /* unix time */
    char *description;  /* owned, never NULL */
    char *parent_name;  /* owned, NULL: a root. May name a note that is not there (its file is lost or unreadable) */
    size_t ndisks;
    struct note_disk *disks; /* owned, in the order given */
    struct note_broken broken;
    char *extra;  /* owned: JSON object of keys that we do not know, or NULL */
    size_t bytes; /* of its document when it was read or made */

    /* relations, all borrowed from the set and new after each change of it */
    struct note *parent;  /* NULL: a root, or the parent has no note */
    struct note *child;   /* the first child, NULL: a leaf */
    struct note *sibling; /* the next child of the same parent, or the next root */
    size_t nchildren;
    unsigned depth; /* 0: a root */

    /* private */
    int64_t age_ms; /* created_ms, but never before the parent's */
    char mark;
    bool cyclic;    /* was its own ancestor in the files */
    bool elsewhere; /* its file says that it belongs to another VM */
};

/*
 * The notes of one VM. notes[] is the topological order: by creation, and nobody stands before its parent even if
 * clocks went backwards; among equals by depth, then by name. The last one is always a leaf.
 */
struct notes {
    char *vm; /* owned */
    size_t nnotes;
    struct note **notes; /* owned, and so is each */
    struct note *root;   /* the first root; the others follow along sibling */

    /* private */
    struct note **by_name;
    size_t nalloc;
    size_t ndangling; /* notes whose parent has no note */
    size_t bytes;
};

/* -- changes to be written ----------------------------------------------------------------------------------------- */

struct notes_op {
    char *name; /* owned: the checkpoint */
    char *text; /* owned: the new content of its file; NULL: the file goes */
};

/* Starts zeroed; the functions below add to its end, so that several can be written at once. Written in the order made.
 */
struct notes_change {
    size_t nops, ndone, nalloc;
    struct notes_op *ops; /* owned */
};
void notes_change_done(struct notes_change *c);

/* -- the set: memory only ------------------------------------------------------------------------------------------ */

/* An empty set. NULL: out of memory. */
struct notes *notes_new(const char *vm);
void notes_free(struct notes *set); /* NULL is fine */

struct note *notes_find(const struct notes *set, const char *name); /* NULL: no such note */

/* The newest leaf by creation: what a new checkpoint builds upon. It is the last of notes[]; NULL: there are none. */
const struct note *notes_current(const struct notes *set);

/*
 * Walks the descendants of top, parents first, each family together: begin with n = top; NULL: that was the last.
 *     for (n = notes_below(top, top); n; n = notes_below(top, n))
 */
const struct note *notes_below(const struct note *top, const struct note *n);
bool notes_is_ancestor(const struct note *ancestor, const struct note *n); /* of itself: no */

struct note_spec {
    const char *name;
    int64_t created_ms;      /* unix time */
    const char *parent;      /* NULL: notes_current(); "": none */
    const char *description; /* NULL: none */
    const struct note_disk *disks;
    size_t ndisks;
};
/*
 * Adds a note; the spec is borrowed for the call. -EEXIST: there is one of that name; -ENOENT: no such parent;
 * -EINVAL, -E2BIG, -ENOSPC (the limits above), -ENOMEM. Nothing has changed then.
 */
int notes_add(struct notes *set, const struct note_spec *spec, struct notes_change *change, struct failure *f);

/*
 * Takes the note out of the set; its children get its parent. Also those notes that name it as their parent while it
 * has no note lose that name. No such note: success, as the bitmap may have had none. -ENOMEM: nothing has changed.
 * name may be the note's own.
 */
int notes_remove(struct notes *set, const char *name, struct notes_change *change, struct failure *f);

/* The checkpoint is over on this disk, and goes on on others. Not noted: success. -ENOMEM: nothing has changed. */
int notes_drop_disk(struct notes *set, const char *name, const char *disk, struct notes_change *change,
                    struct failure *f);

/*
 * Remembers why the checkpoint cannot be used on this disk (NULL: at all); text NULL: reason_text(). The first one
 * stays unless the disk is the same; REASON_NONE takes back what was said of this disk (NULL: of any).
 * -ENOENT: no such note; -EINVAL: a disk's name of unlikely length; -ENOMEM.
 */
int notes_mark_broken(struct notes *set, const char *name, const char *disk, enum reason reason, const char *text,
                      struct notes_change *change, struct failure *f);

/* Whether it is usable on a disk as QEMU shows it now: the record decides, the note knows why there is none. */
enum reason note_reason(const struct note *n, const struct disk *d);

/*
 * Which notes to drop so that `keep` stay (0: no limit), the oldest first; call it when the new one is in. Writes up to
 * nout names, each borrowed until that note is removed, and returns how many there are. The current one is never
 * among them.
 */
size_t notes_over(const struct notes *set, size_t keep, const char **out, size_t nout);

/*
 * All notes in one document, owned by the caller: {"format", "vm", "checkpoints": […]}, parents first. A parent without
 * a note is left out. NULL: out of memory.
 */
struct json_object *notes_export(const struct notes *set);

/*
 * Takes in such a document (borrowed): new names are added; a name that is there is replaced in place and keeps its
 * children. All or nothing: a document of another VM or format, a name that is twice in it or not allowed, a parent
 * that is nowhere, a cycle or a passed limit is refused with -EINVAL, -EBADMSG (not such a document), -ENOTSUP, -E2BIG
 * or -ENOSPC and a sentence that names the note. Pointers to replaced notes end.
 */
int notes_import(struct notes *set, struct json_object *doc, struct notes_change *change, struct failure *f);

/* -- the files: these wait for the disk ---------------------------------------------------------------------------- */

/*
 * state_dir is a descriptor of the state directory (O_PATH is enough). Every success has reached the disk: the file,
 * and the directories that lead to it.
 */

struct notes_problem {
    char *file;       /* owned: below the state directory */
    char *checkpoint; /* owned: whose note it should be, NULL: the file's name does not tell */
    struct failure why;
};

/* Starts zeroed. */
struct notes_problems {
    size_t nproblems, nalloc;
    struct notes_problem *problems; /* owned, in no order */
    size_t nmore;                   /* that have been left out */
};
void notes_problems_done(struct notes_problems *p);

/*
 * Reads the notes of a VM; none yet: an empty set. What cannot be read is told in problems (may be NULL), one entry per
 * file, and stays where it is; files of an interrupted write are removed. Notes that are their own ancestors become
 * roots and are told, too; a note whose parent has none stands as a root. Fails only where the directory cannot be
 * read or memory ends.
 */
int notes_load(int state_dir, const char *vm, struct notes **ret_set, struct notes_problems *problems,
               struct failure *f);

/* Writes what has changed, in order. After a failure what is left may be tried again by the same call. */
int notes_apply(int state_dir, const char *vm, struct notes_change *change, struct failure *f);

/*
 * Writes one note; its file is the old one or the new one, whole, whenever the machine stops. A damaged file in its
 * place is set aside, not lost. The note is only read.
 */
int notes_save_one(int state_dir, const char *vm, const struct note *n, struct failure *f);
/* Removes the file of that note. None there, or one that is damaged and therefore not known to be it: success. */
int notes_delete_one(int state_dir, const char *vm, const char *name, struct failure *f);

/*
 * The VM has a new name: so have its directory and the files in it. Interrupted, it may be called again. -EEXIST: the
 * new name has notes already. Load the set anew afterwards.
 */
int notes_rename_vm(int state_dir, const char *from, const char *to, struct failure *f);

#endif
