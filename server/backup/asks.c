/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * One more map, of a checkpoint that nobody asked for when the session began. A bitmap cannot join an export that
 * stands, so a second export of the same frozen node carries it for as long as it is read. The walk goes up this little
 * table and down again for each ask.
 */
#include "backup/late.h"
#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>

/*
 * The freeze has drained, so the layers' records have all from before it; without a transaction, since somebody may run
 * a block job by now (see 0009 on drains).
 */
static void merge_since(struct session *s, const struct session_ask *a, struct qmp_bitmap target)
{
    const struct checkpoint *c = session_usable_since(s, a->disk, a->since);

    calls_add(&s->late.calls, "block-dirty-bitmap-add",
              qmp_args_bitmap_add(target, c ? c->granularity : 0, false, true), QMP_NO_FD, 0, NULL);
    for (size_t l = 0; c && l < c->nlayers; l++) {
        struct qmp_bitmap source = {c->layers[l].node, c->name};

        if (c->layers[l].merge)
            calls_add(&s->late.calls, "block-dirty-bitmap-merge", qmp_args_bitmap_merge(target, &source, 1), QMP_NO_FD,
                      0, NULL);
    }
}

static int late_merge_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    const struct session_ask *a = s->asks;
    char access[NAMES_SIZE], late[NAMES_SIZE];

    merge_since(
        s, a, (struct qmp_bitmap){session_view(s, a->disk, access), names_make(late, s->rig.id, NAMES_LATE, a->disk)});
    return rig_wait(&s->late, f);
}

static int late_export_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);

    late_add_export(s, s->asks->disk);
    return rig_wait(&s->late, f);
}

static void on_late_map(void *arg, struct map *map, const struct failure *f)
{
    struct session *s = arg;

    s->late_reading = NULL;
    s->late_map = map;
    seq_done(&s->late.seq, f);
}

static int late_read_up(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);
    char name[NAMES_SIZE], context[sizeof(DIRTY_CONTEXT) + NAMES_SIZE];
    struct source_nbd_config config = {
        .socket_path = s->rig.server_address,
        .export_name = names_make(name, s->rig.id, NAMES_LATE, s->asks->disk),
        .timeout_ms = s->rig.timeout_ms,
    };

    (void)snprintf(context, sizeof(context), DIRTY_CONTEXT "%s", name);
    return source_nbd_map(s->rig.loop, &config, context, on_late_map, s, &s->late_reading);
}

static int late_no_bitmaps(struct seq *q, struct failure *f)
{
    struct session *s = session_of_late(q);

    if (late_is_stuck(s))
        return SEQ_DONE;
    late_remove_bitmap(s, s->asks->disk);
    return calls_wait(&s->late.calls, late_on_gone, f);
}

static const struct seq_step late_steps[] = {
    {"merge the record", late_merge_up, late_no_bitmaps, NULL},
    {"add an export for the map", late_export_up, late_no_exports, NULL},
    {"read the map", late_read_up, NULL, NULL},
};

static void on_late_end(struct seq *q, const struct failure *problems)
{
    struct session *s = session_of_late(q);
    struct session_ask *a = s->asks;
    struct map *map = TAKE_PTR(s->late_map);
    struct failure f = s->ask_failure;
    _cleanup_free_ char *context = NULL;

    rig_done(&s->late);
    s->late_running = false;
    if (problems->err)
        (void)failure_copy(&s->problems, problems);
    if (late_is_stuck(s) && s->status == SESSION_UP)
        session_fail(s, &f);
    memset(&s->ask_failure, 0, sizeof(s->ask_failure));
    if (!f.err && !map)
        (void)failure_set(&f, -ECANCELED, "the session ends");
    if (!f.err && (asprintf(&context, DIRTY_CONTEXT "%s", a->since) < 0 ||
                   session_add_map(s, a->disk, context, TAKE_PTR(map)) < 0 ||
                   maps_fill_in(s, a->disk, session_usable_since(s, a->disk, a->since), context) < 0))
        (void)failure_set(&f, -ENOMEM, "out of memory for a map");
    if (!f.err)
        maps_tell_ready(s, a->disk, context);
    map_free(map);
    s->asks = a->next;
    free(TAKE_PTR(a->since));
    a->session = NULL;
    if (a->cb)
        a->cb(a, f.err ? &f : NULL);
    session_late_next(s);
    session_late_idle(s);
}

static const struct seq_ops late_ops = {
    .on_top = late_on_top,
    .on_failed = late_on_failed,
    .on_end = on_late_end,
};

void asks_next(struct session *s)
{
    if (s->asks)
        late_start(s, late_steps, ARRAY_SIZE(late_steps), &late_ops);
}

static int push_ask(struct session *s, struct session_ask *a)
{
    struct session_ask **tail = &s->asks;

    a->session = s;
    a->next = NULL;
    while (*tail)
        tail = &(*tail)->next;
    *tail = a;
    session_late_next(s);
    return 0;
}

int session_ask_start(struct session *s, struct session_ask *a, const char *disk, const char *since,
                      void (*cb)(struct session_ask *a, const struct failure *f))
{
    if (s->status != SESSION_UP || s->failed)
        return -ENOTCONN;
    memset(a, 0, sizeof(*a));
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        if (strcmp(s->disks[i].disk->name, disk) != 0)
            continue;
        if (!session_usable_since(s, i, since))
            return -ENOENT;
        a->cb = cb;
        a->disk = i;
        a->since = strdup(since);
        return a->since ? push_ask(s, a) : -ENOMEM;
    }
    return -ENOENT;
}

/* The one under way cannot leave the queue: a stand-in takes its place. */
void session_ask_forget(struct session_ask *a)
{
    struct session *s = a->session;
    struct session_ask **p;

    if (!s)
        return;
    for (p = &s->asks; *p != a; p = &(*p)->next)
        ;
    a->session = NULL;
    if (p != &s->asks || s->mapping || !s->late_running) {
        *p = a->next;
        free(TAKE_PTR(a->since));
        return;
    }
    s->stand_in = *a;
    s->stand_in.cb = NULL;
    s->stand_in.session = s;
    a->since = NULL;
    *p = &s->stand_in;
}

void session_late_cancel(struct session *s)
{
    struct failure f = {0};
    bool under_way = s->late_running && !s->mapping; /* the first of the queue */
    struct session_ask *waiting = !under_way ? TAKE_PTR(s->asks) : s->asks ? TAKE_PTR(s->asks->next) : NULL;

    (void)failure_set(&f, -ECANCELED, "the session ends");
    while (waiting) {
        struct session_ask *a = waiting;

        waiting = a->next;
        free(TAKE_PTR(a->since));
        a->session = NULL;
        a->cb(a, &f);
    }
    if (s->late_running)
        seq_stop(&s->late.seq, false);
}
