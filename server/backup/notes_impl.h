/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * notes_impl: what the three parts of backup/notes share: the set (notes.c), documents (notes_json.c), files
 * (notes_file.c). For these only.
 */
#ifndef QPULL_BACKUP_NOTES_IMPL_H
#define QPULL_BACKUP_NOTES_IMPL_H

#include "backup/notes.h"

#include <limits.h>

/* -- notes.c ------------------------------------------------------------------------------------------------------- */

void note_free(struct note *n); /* NULL and half-built ones are fine */
static inline void note_freep(struct note **n)
{
    note_free(*n);
}

/* What holds for every note wherever it comes from; the sentence begins with what is wrong. -EINVAL */
int note_check(const char *name, int64_t created_ms, const char *description, const struct note_disk *disks,
               size_t ndisks, struct failure *f);
/* -ENOSPC: a set of that many notes and bytes is too large. */
int notes_check_room(const struct notes *set, size_t nnotes, size_t bytes, struct failure *f);

/* Makes room for n notes in all. -ENOMEM */
int notes_reserve(struct notes *set, size_t n);
/* Gives the set one more, for which there is room, without looking at relations; notes_relink() must follow. */
void notes_append(struct notes *set, struct note *n);
/*
 * Sorts and computes all relations. Notes that are their own ancestors become roots with ->cyclic set.
 * Returns how many these are.
 */
size_t notes_relink(struct notes *set);

/* The file of `name` is to have this content (moved; NULL: is to go). -ENOMEM, and text is freed. */
int notes_change_push(struct notes_change *c, const char *name, char *text);
/* Drops what was added past nops. */
void notes_change_cut(struct notes_change *c, size_t nops);

/* -- notes_json.c -------------------------------------------------------------------------------------------------- */

/* The content of the note's file, owned by the caller; NULL: out of memory. */
char *note_encode(const struct note *n, const char *vm);
/*
 * Reads a file's content. ret_vm (may be NULL): owned by the caller, the VM that it names. -EBADMSG: damaged, -ENOTSUP:
 * of another format, -EINVAL: a name that is not allowed, -ENOMEM.
 */
int note_decode(const char *text, size_t len, struct note **ret_note, char **ret_vm, struct failure *f);

/* -- notes_file.c -------------------------------------------------------------------------------------------------- */

#define NOTES_SUFFIX ".json"

#endif
