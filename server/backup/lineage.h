/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * lineage: what is remembered of a VM's disks from one look to the next, so that what others did to them in between is
 * found out: of which image files each consisted, which file held the record of each checkpoint, how much was marked in
 * it, and how large the disk was (docs/decisions/0009-lineage.md). It refuses records that QEMU alone would show as
 * good; it never makes one good that QEMU shows as bad.
 *
 * Not the notes (backup/notes): those say what a checkpoint means to people, and nobody has to have made a note.
 * Without a memory (new host, empty state directory) the bitmaps alone decide.
 *
 * Memory only, any one thread; the two functions on files wait for the disk.
 */
#ifndef QPULL_BACKUP_LINEAGE_H
#define QPULL_BACKUP_LINEAGE_H

#include "backup/disks.h"
#include "backup/jobs.h"

#define LINEAGE_FORMAT 1
#define LINEAGE_DIR "lineage"          /* below the state directory: VM.json each */
#define LINEAGE_FILE_MAX (16u << 20)   /* bytes; a checkpoint on one disk has some 300 */
#define LINEAGE_CHECKPOINTS_MAX 10000u /* of one disk, those that are gone included */
#define LINEAGE_ABSENT_MAX 1000u       /* of one disk: names that are not to be seen any more */
#define LINEAGE_DISKS_MAX 1024u        /* of one VM, those that were unplugged included */

struct lineage;

struct lineage *lineage_new(void); /* NULL: out of memory */
void lineage_free(struct lineage *l);

/*
 * Compares the disks (after disk_list_stat()) with what is remembered, gives each checkpoint that is not right any more
 * its reason and text, and remembers what it sees. jobs: block jobs of others are under way, so what they promised
 * (lineage_promise()) is still to come. -ENOMEM: the list is not to be trusted.
 */
int lineage_look(struct lineage *l, struct disk_list *disks, bool jobs);

/*
 * Before lineage_look(), of a VM that runs: what it has left behind is remembered. all: also of disks without
 * checkpoints. -ENOMEM.
 */
int lineage_look_running(struct lineage *l, const struct disk_list *disks, bool all);
/* Before lineage_look(), of images that no VM runs on. -ESTALE: one was left behind, f says which. */
int lineage_look_stopped(const struct lineage *l, const struct disk_list *disks, struct failure *f);

/* Whether what should be in the file has changed since lineage_saved(). Dirty counts count when they grew by a lot. */
bool lineage_is_dirty(const struct lineage *l);
void lineage_saved(struct lineage *l);
void lineage_unsaved(struct lineage *l); /* it could not be written */

/*
 * The record in that layer has been made to hold all that the checkpoint's record held when it was last looked at, so
 * it may stand alone once a block job of that kind has taken the other layers away: after a stream only together with
 * what the layer has allocated, and of a commit only when it has ended. Nothing is known of this disk or checkpoint:
 * nothing is promised. -ENOMEM.
 */
int lineage_promise(struct lineage *l, const struct disk *d, const char *checkpoint, const struct image *layer,
                    enum job_kind kind);
/* The connection is lost: whether commits have ended is not known, nor whether it will be the same QEMU again. */
void lineage_lost(struct lineage *l);

/* It stands alone already, or was promised to; or nothing can be promised of this checkpoint. */
bool lineage_is_promised(const struct lineage *l, const char *disk, const char *checkpoint, const struct image *layer);
/* The node of the layer that holds the checkpoint's record as it was when last looked at; NULL: none does. Borrowed. */
const char *lineage_root(const struct lineage *l, const struct disk *d, const char *checkpoint);

/* The record was removed, or is about to be made, on purpose: what comes under that name is a new one. disk NULL: on
 * all. */
void lineage_forget(struct lineage *l, const char *disk, const char *checkpoint);
/*
 * It was removed where that was possible, but lies on in layers that QEMU cannot write: from now on these are nobody's.
 * d is as it was before the removal. -ENOMEM.
 */
int lineage_bury(struct lineage *l, const struct disk *d, const char *checkpoint);
/*
 * The disk was restored from a backup: whatever checkpoints the next look finds on it are a GAP from then on. Known by
 * name only, it need not have been seen before. -E2BIG: too many disks; -ENOMEM.
 */
int lineage_restored(struct lineage *l, const char *disk);
/* Whatever is held against the checkpoint is forgiven: what the next look sees is taken for right. disk NULL: on all.
 */
void lineage_accept(struct lineage *l, const char *disk, const char *checkpoint);
/*
 * Our own commit has ended, and the record may lie in another layer now. That alone is forgiven; and what the next look
 * finds must mark what was marked when it was last looked at.
 */
void lineage_moved(struct lineage *l, const char *disk, const char *checkpoint);

/*
 * old, emptied here and freed by the caller: what was remembered of the same disks under another name of the VM, before
 * l began. It counts, and whatever l has found out since then against a checkpoint, too; nothing is forgiven. -E2BIG:
 * too many for one memory; -ENOMEM. Then part of it may have been taken over, which refuses more and allows nothing.
 */
int lineage_inherit(struct lineage *l, struct lineage *old);

/* Why a checkpoint that is remembered is not on that disk any more, one static sentence; NULL: not remembered. */
const char *lineage_why_lost(const struct lineage *l, const char *disk, const char *checkpoint);

/* The memory as text, owned by the caller (NULL: out of memory), and back. -EBADMSG, -ENOTSUP, -E2BIG, -ENOMEM. */
char *lineage_encode(const struct lineage *l, const char *vm);
int lineage_decode(const char *text, size_t len, struct lineage **ret_lineage, struct failure *f);

/* -- these wait for the disk --------------------------------------------------------------------------------------- */

/*
 * None yet: an empty one. A file that is damaged or of another format is set aside and told in f, which is a failure
 * for people: an empty one is returned all the same. Negative (and no lineage) only when the memory ends.
 */
int lineage_load(int state_dir, const char *vm, struct lineage **ret_lineage, struct failure *f);
/* The old file or the new one is there, whole, whenever the machine stops. Success has reached the disk. */
int lineage_save(int state_dir, const char *vm, const char *text, struct failure *f);
/* None there: success. */
int lineage_remove(int state_dir, const char *vm);

#endif
