/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Steps about scratch that is not simply a file of ours on a disk that answers: nodes made of a place's JSON, and the
 * way down from scratch that has stalled.
 */
#include "backup/steps.h"

#include "qmp/commands.h"

#include <errno.h>
#include <unistd.h>

/* -- places -------------------------------------------------------------------------------------------------------- */

static int open_next(struct session *s, struct failure *f);

static void on_place_open(struct calls *c, const struct failure *f)
{
    struct session *s = session_of_calls(c);
    const char *disk = s->disks[s->next_place].disk->name;
    struct failure mine = {0};
    int r = 0;

    if (f)
        r = failure_set(&mine, f->err, "the scratch place of disk '%s': %s", disk, f->text);
    if (r == 0 && ++s->next_place < s->rig.ndisks) {
        r = open_next(s, &mine);
        if (r == 0)
            return;
    }
    seq_done(&s->rig.seq, r < 0 ? &mine : NULL);
}

static int open_next(struct session *s, struct failure *f)
{
    const struct place_names names = {.vm = s->vm, .disk = s->disks[s->next_place].disk->name, .session = s->rig.id};
    struct json_object *args = NULL;
    char name[NAMES_SIZE];

    if (place_node(s->place, &names, &args, f) < 0)
        return f->err;
    (void)json_object_object_add(args, "node-name",
                                 json_object_new_string(names_make(name, s->rig.id, NAMES_SCRATCH, s->next_place)));
    calls_add(&s->rig.calls, "blockdev-add", args, QMP_NO_FD, s->next_place, NULL);
    return calls_wait(&s->rig.calls, on_place_open, f);
}

/* One after another, as long as it goes well: QEMU, and its guest, stand still while it waits for a server. */
int step_places_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    s->next_place = 0;
    return open_next(s, f);
}

/* -- letting go ---------------------------------------------------------------------------------------------------- */

/*
 * In a worker thread. Whatever drains waits for the copies that hang on a file system, and the guest with it: so the
 * file system is waited for first, while the guest runs on. A truncate to the size that a file has waits for the writes
 * to it that are under way (they hold the inode's lock, whatever the file system) and changes nothing.
 */
static void wait_for_files(struct rig *r)
{
    struct session *s = container_of(r, struct session, rig);

    for (unsigned i = 0; i < r->ndisks; i++) {
        struct session_disk *d = &s->disks[i];

        if (d->scratch_fd >= 0 && ftruncate(d->scratch_fd, (off_t)d->disk->size) < 0)
            continue; /* whether it works does not matter, only when */
    }
}

static void after_wait(struct rig *r)
{
    seq_done(&r->seq, NULL);
}

int step_let_go(struct seq *q, struct failure *f)
{
    struct session *s = session_of_seq(q);

    return s->place ? rig_cut_scratch(q, f) : rig_work(rig_of_seq(q), wait_for_files, after_wait, f);
}
