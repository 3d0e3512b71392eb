/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The checkpoints' records through a commit: what base gets before the job, what is merged when the job has copied, the
 * check, and what is taken back when nothing comes of it. Why in this order: docs/decisions/0007-commit.md.
 *
 * One transaction for each checkpoint, one after the other: a merge that fails spoils exactly one.
 */
#include "backup/commit_impl.h"

#include <errno.h>
#include <stdio.h>

#define OPENING_SPEED 1u /* bytes a second: this job is to make base writable for a moment, not to copy */

static struct qmp_bitmap in_base(const struct commit *c, const char *name)
{
    return (struct qmp_bitmap){c->base_node, name};
}

static bool is_made(const struct commit *c, const char *name)
{
    for (size_t i = 0; i < c->nmade; i++) {
        if (strcmp(c->made[i], name) == 0)
            return true;
    }
    return false;
}

/* Said before the command is sent: its answer may be lost. */
static int note_made(struct commit *c, const char *name)
{
    char **made;

    if (is_made(c, name))
        return 0;
    made = realloc(c->made, (c->nmade + 1) * sizeof(*made));
    if (!made)
        return -ENOMEM;
    c->made = made;
    if (!(made[c->nmade] = strdup(name)))
        return -ENOMEM;
    c->nmade++;
    return 0;
}

/* It was refused, so what base may hold of that name is not ours. */
static void note_not_made(struct commit *c, const char *name)
{
    for (size_t i = 0; i < c->nmade; i++) {
        if (strcmp(c->made[i], name) != 0)
            continue;
        free(c->made[i]);
        c->made[i] = c->made[--c->nmade];
        return;
    }
}

/* -- before the job ------------------------------------------------------------------------------------------------ */

/*
 * Base only reads until a job makes it writable, and then the job writes at once. A record that must see the job's
 * first byte, or that must be on disk before the graph changes, therefore comes into base by a job that is cancelled
 * again (an intermediate one makes base read-only again, which stores it). Empty, as it is, it is true: what the
 * committed layers hold is still counted by themselves.
 */
static bool is_made_early(const struct commit *c, const struct commit_record *r)
{
    return (r->action == COMMIT_MAKE && (r->needs_marks || (r->needs_store && !c->active))) ||
           (r->action == COMMIT_HUSK && r->needs_store);
}

bool commit_needs_opening(const struct commit *c)
{
    for (size_t i = 0; i < c->plan.nrecords; i++) {
        if (is_made_early(c, &c->plan.records[i]))
            return true;
    }
    return false;
}

static void on_made(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    struct failure next = {0};

    if (f) {
        if (f->err == -EREMOTEIO) /* one transaction: all of them, or none */
            while (c->nmade)
                free(c->made[--c->nmade]);
        rig_step_done(calls, f);
        return;
    }
    commit_go_on(c, rig_no_jobs(&c->rig.seq, &next), &next);
}

static void on_opened(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    struct json_object *args;
    struct failure next = {0};

    if (f) {
        rig_step_done(calls, f);
        return;
    }
    args = qmp_args_transaction();
    for (size_t i = 0; i < c->plan.nrecords; i++) {
        const struct commit_record *r = &c->plan.records[i];

        if (!is_made_early(c, r))
            continue;
        if (note_made(c, r->name) < 0)
            (void)failure_set(&next, -ENOMEM, "out of memory");
        qmp_action_bitmap_add(args, in_base(c, r->name), r->granularity, true, r->action == COMMIT_HUSK);
    }
    if (next.err) {
        json_object_put(args);
        rig_step_done(calls, &next);
        return;
    }
    calls_add(calls, "transaction", args, QMP_NO_FD, 0, NULL);
    commit_go_on(c, calls_wait(calls, on_made, &next), &next);
}

int commit_step_open(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    if (!commit_needs_opening(c))
        return SEQ_DONE;
    calls_add(
        &c->rig.calls, "block-commit",
        qmp_args_block_commit(c->job, c->node, c->top_node, c->base_node, /* auto_finalize= */ false, OPENING_SPEED),
        QMP_NO_FD, 0, NULL);
    return calls_wait(&c->rig.calls, on_opened, f);
}

/* -- when the job has copied --------------------------------------------------------------------------------------- */

static void spoil(struct commit *c, size_t i, const char *why)
{
    struct commit_result *r = &c->results[i];

    r->state = COMMIT_BROKEN;
    (void)failure_set(&r->why, -EIO, "%s", why);
}

static void merge_all(const struct commit *c, const struct commit_record *r, struct json_object *args)
{
    struct qmp_bitmap *sources = calloc(r->nsources + 1, sizeof(*sources));

    for (size_t i = 0; sources && i < r->nsources; i++)
        sources[i] = (struct qmp_bitmap){r->sources[i], r->name};
    if (sources && r->nsources)
        qmp_action_bitmap_merge(args, in_base(c, r->name), sources, r->nsources);
    else if (!sources) /* a merge that QEMU refuses is better than one that is left out */
        qmp_action_bitmap_merge(args, in_base(c, r->name), &(struct qmp_bitmap){"", ""}, 1);
    free(sources);
}

/*
 * Ours, made early, and no layer's allocation has to stand in: what the job's own writes have marked in it is more than
 * need be. Only where nobody writes to base but the job, which has ended its writes.
 */
static bool may_begin_anew(const struct commit *c, const struct commit_record *r)
{
    const struct commit_record *was = commit_plan_find(&c->plan, r->name);

    return !c->active && is_made(c, r->name) && was && !was->needs_marks && r->nsources == was->nsources;
}

/* What is to be done for record i: a transaction, or nothing (NULL). Broken ones are said in the results. */
static struct json_object *plan_actions(struct commit *c, size_t i)
{
    const struct commit_record *r = &c->fresh.records[i], *was = commit_plan_find(&c->plan, r->name);
    struct json_object *args = qmp_args_transaction();

    switch (r->action) {
    case COMMIT_LEAVE:
        break;
    case COMMIT_MERGE:
        if (!is_made(c, r->name) && (!was || was->action != COMMIT_MERGE)) {
            spoil(c, i, "its record in the base image came while data were committed, and has not seen all of them");
            break;
        }
        if (may_begin_anew(c, r))
            qmp_action_bitmap_clear(args, in_base(c, r->name));
        merge_all(c, r, args);
        break;
    case COMMIT_MAKE:
        if (r->needs_marks) {
            spoil(c, i, "a record of it went away while data were committed");
            break;
        }
        if (note_made(c, r->name) < 0)
            spoil(c, i, "out of memory");
        qmp_action_bitmap_add(args, in_base(c, r->name), r->granularity, true, false);
        merge_all(c, r, args);
        break;
    case COMMIT_HUSK:
        if (note_made(c, r->name) < 0)
            spoil(c, i, "out of memory");
        qmp_action_bitmap_add(args, in_base(c, r->name), 0, true, true);
        break;
    case COMMIT_DROP:
        spoil(c, i, "the base image keeps no bitmaps");
        if (r->stays_above)
            qmp_action_bitmap_remove(args, (struct qmp_bitmap){c->live_node, r->name});
        break;
    }
    if (qmp_array_length(qmp_get(args, "actions")) > 0)
        return args;
    json_object_put(args);
    return NULL;
}

static void next_record(struct commit *c);

/* Only a refusal is the checkpoint's own misfortune; without a connection nothing is known, and the commit fails. */
static bool is_refusal(const struct failure *f)
{
    return f->err == -EREMOTEIO || f->err == -ENODEV;
}

static void on_record(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    const struct commit_record *r = &c->fresh.records[c->at];

    if (f && (!is_refusal(f) || r->action == COMMIT_DROP)) {
        rig_step_done(calls, f);
        return;
    }
    if (f) {
        if (r->action == COMMIT_MAKE || r->action == COMMIT_HUSK)
            note_not_made(c, r->name);
        spoil(c, c->at, f->text);
    }
    c->at++;
    next_record(c);
}

/* -- are they right? ----------------------------------------------------------------------------------------------- */

/* Why base's record of that name cannot be trusted; NULL: it can, or base need not have one. */
static const char *distrust(const struct commit *c, const struct commit_record *r, struct json_object *base)
{
    struct json_object *b = named_bitmap(base, r->name);
    bool is_ours = is_made(c, r->name);

    if (r->action == COMMIT_LEAVE || r->action == COMMIT_DROP)
        return NULL;
    if (!b)
        return "its record is not in the base image, although QEMU made it";
    if (r->action == COMMIT_HUSK || r->reason != REASON_NONE)
        return NULL;
    if (qmp_get_bool(b, "inconsistent") || !qmp_get_bool(b, "recording") || (is_ours && !qmp_get_bool(b, "persistent")))
        return "its record in the base image does not record, or is not stored";
    if ((uint64_t)qmp_get_int(b, "count") < r->least)
        return "its record in the base image says less than the parts it was made of";
    return NULL;
}

static void next_repair(struct commit *c);

/*
 * A record that could not be merged must not pass for a whole one. Where other layers hold that name, too, they would,
 * once base has none: then it stays, but does not record, which makes the checkpoint unusable for as long as it is
 * there.
 */
static struct json_object *plan_repair(const struct commit *c, const struct commit_record *r, struct json_object *base,
                                       const char **ret_command)
{
    bool is_there = named_bitmap(base, r->name);

    if (!is_there && !r->stays_above)
        return NULL;
    if (!is_there) {
        *ret_command = "block-dirty-bitmap-add";
        return qmp_args_bitmap_add(in_base(c, r->name), 0, true, true);
    }
    *ret_command = r->stays_above || r->stays_below ? "block-dirty-bitmap-disable" : "block-dirty-bitmap-remove";
    return qmp_args_strings("node", c->base_node, "name", r->name, NULL);
}

static void on_repaired(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);

    if (f) { /* nothing has changed yet: better no commit than a lie */
        rig_step_done(calls, f);
        return;
    }
    c->at++;
    next_repair(c);
}

static void next_repair(struct commit *c)
{
    struct json_object *base = graph_named(c->rig.answers[1], c->base_node);
    struct failure f = {0};

    for (; c->at < c->fresh.nrecords; c->at++) {
        const struct commit_record *r = &c->fresh.records[c->at];
        const char *command = NULL;
        struct json_object *args;

        if (c->results[c->at].state != COMMIT_BROKEN || r->action == COMMIT_DROP)
            continue;
        args = plan_repair(c, r, base, &command);
        if (!args)
            continue;
        calls_add(&c->rig.calls, command, args, QMP_NO_FD, 0, NULL);
        commit_go_on(c, calls_wait(&c->rig.calls, on_repaired, &f), &f);
        return;
    }
    rig_step_done(&c->rig.calls, NULL);
}

/* Returns whether one was found that had seemed right. */
static bool verify(struct commit *c)
{
    struct json_object *base = graph_named(c->rig.answers[1], c->base_node);
    bool found = false;

    for (size_t i = 0; i < c->fresh.nrecords; i++) {
        const char *why = distrust(c, &c->fresh.records[i], base);

        if (!why || c->results[i].state == COMMIT_BROKEN)
            continue;
        spoil(c, i, why);
        found = true;
    }
    return found;
}

static void on_verified(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);

    if (f) {
        rig_step_done(calls, f);
        return;
    }
    (void)verify(c);
    c->at = 0;
    next_repair(c);
}

static void look_again(struct commit *c)
{
    struct failure f = {0};

    commit_go_on(c, rig_ask_graph(&c->rig, on_verified, &f), &f);
}

/* Where QEMU refuses it, it stays what it was: nobody's. */
static void on_buried(struct calls *calls, const struct failure *f)
{
    if (f && !is_refusal(f))
        rig_step_done(calls, f);
    else
        look_again(commit_of_calls(calls));
}

/* Base can be written now: what it holds of deleted checkpoints goes, before anybody takes it for a record. */
static void bury(struct commit *c)
{
    struct failure f = {0};
    bool any = false;

    for (size_t i = 0; i < c->ndead; i++) {
        if (!named_bitmap(c->chain.layers[c->plan.base], c->dead[i]) ||
            !named_bitmap(c->now.layers[c->fresh.base], c->dead[i]))
            continue; /* what came while the job ran is somebody else's */
        calls_add(&c->rig.calls, "block-dirty-bitmap-remove",
                  qmp_args_strings("node", c->base_node, "name", c->dead[i], NULL), QMP_NO_FD, 0, NULL);
        any = true;
    }
    if (any)
        commit_go_on(c, calls_wait(&c->rig.calls, on_buried, &f), &f);
    else
        look_again(c);
}

static void next_record(struct commit *c)
{
    struct failure f = {0};

    for (; c->at < c->fresh.nrecords; c->at++) {
        struct json_object *args = plan_actions(c, c->at);

        if (!args)
            continue;
        calls_add(&c->rig.calls, "transaction", args, QMP_NO_FD, 0, NULL);
        commit_go_on(c, calls_wait(&c->rig.calls, on_record, &f), &f);
        return;
    }
    bury(c);
}

static int make_results(struct commit *c)
{
    c->results = calloc(c->fresh.nrecords + 1, sizeof(*c->results));
    for (size_t i = 0; c->results && i < c->fresh.nrecords; i++) {
        const struct commit_record *r = &c->fresh.records[i];

        if (!(c->results[i].checkpoint = strdup(r->name)))
            return -ENOMEM;
        if (r->reason == REASON_NONE)
            continue;
        c->results[i].state = COMMIT_UNUSABLE;
        (void)failure_set(&c->results[i].why, -EIO, "%s: %s", reason_name(r->reason), reason_text(r->reason));
    }
    return c->results ? 0 : -ENOMEM;
}

/* The layers are looked at anew: somebody else may have made or removed records meanwhile. */
static int plan_anew(struct commit *c, struct failure *f)
{
    size_t top = 0, base = 0;
    int r = chain_init(&c->now, c->rig.answers[1], c->rig.answers[2], c->node, f);

    if (r < 0 || (r = chain_find(&c->now, c->top_node, &top, f)) < 0 ||
        (r = chain_find(&c->now, c->base_node, &base, f)) < 0)
        return r;
    c->now.dead = (const char *const *)c->dead;
    c->now.ndead = c->ndead;
    if (base <= top || (top == 0) != c->active)
        return failure_set(f, -EPIPE, "the layers of the disk have changed while data were committed");
    if ((r = commit_plan_make(&c->fresh, &c->now, top, base, f)) < 0)
        return r;
    return make_results(c) < 0 ? failure_set(f, -ENOMEM, "out of memory") : 0;
}

static void on_copied(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    struct failure mine = {0};

    if (!f && plan_anew(c, &mine) < 0)
        f = &mine;
    if (f) {
        rig_step_done(calls, f);
        return;
    }
    c->at = 0;
    next_record(c);
}

int commit_step_records(struct seq *s, struct failure *f)
{
    return rig_ask_graph(rig_of_seq(s), on_copied, f);
}

/* -- after the graph has changed ----------------------------------------------------------------------------------- */

static void on_checked(struct calls *calls, const struct failure *f)
{
    struct commit *c = commit_of_calls(calls);
    struct failure mine = {0};

    /* QEMU (7.2) stores base's bitmaps when it makes base read-only, and is silent where it cannot. */
    if (!f && c->still_socket && !qmp_get_bool(graph_named(c->rig.answers[1], c->base_node), "ro")) {
        (void)failure_set(&mine, -EIO,
                          "the data are committed, but QEMU could not make base '%s' read-only again: "
                          "what it holds of checkpoints may not be stored",
                          c->base_file);
        f = &mine;
    }
    c->at = 0;
    if (!f && verify(c))
        next_repair(c);
    else
        rig_step_done(calls, f);
}

int commit_step_check(struct seq *s, struct failure *f)
{
    return rig_ask_graph(rig_of_seq(s), on_checked, f);
}

/* -- when nothing comes of it -------------------------------------------------------------------------------------- */

/* What base has got from us goes again, as far as base is writable. What stays makes a record say more, never less. */
static void on_withdrawn(struct calls *calls, const struct failure *f)
{
    rig_step_done(calls, NULL);
}

static int withdraw(struct commit *c, struct failure *f)
{
    while (c->nmade) {
        _cleanup_free_ char *name = c->made[--c->nmade];

        calls_add(&c->rig.calls, "block-dirty-bitmap-remove",
                  qmp_args_strings("node", c->base_node, "name", name, NULL), QMP_NO_FD, 0, NULL);
    }
    return calls_wait(&c->rig.calls, on_withdrawn, f);
}

/* While the job stands it cannot end by itself before job-finalize; and when that is sent, the records must stay. */
int commit_withdraw_before(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    return c->finishing || c->active ? SEQ_DONE : withdraw(c, f);
}

int commit_withdraw_after(struct seq *s, struct failure *f)
{
    struct commit *c = commit_of_seq(s);

    return c->finishing ? SEQ_DONE : withdraw(c, f);
}
