/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What lineage_look() makes of one look after another: each test is a story of a disk, told as the chain of its image
 * files (top first) with the records in them.
 */
#include "backup/lineage.h"
#include "backup/state_file.h"
#include "lib/test.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SIZE ((uint64_t)1 << 20)
#define CLUSTER ((uint64_t)65536)

/* A layer: its file ("b", or "b:7" for another inode than the one that goes with the name), what its record "c" has. */
struct level {
    const char *file;
    int dirty; /* clusters; NONE: no record */
};
#define NONE (-1)
#define HUSK (-2) /* inconsistent */
#define OFF (-3)  /* somebody disabled it */
#define LEVELS_MAX 4

struct story {
    struct lineage *lineage;
    struct disk_list *last; /* owned: the look before */
    bool jobs, off, connected;
    uint64_t size, granularity;
    const char *disk; /* its name; NULL: "vda" */
};

static int begin(void **state)
{
    struct story *s = calloc(1, sizeof(*s));

    s->lineage = lineage_new();
    s->size = SIZE;
    s->granularity = CLUSTER;
    *state = s;
    return s->lineage ? 0 : -1;
}

static int end(void **state)
{
    struct story *s = *state;

    disk_list_free(s->last);
    lineage_free(s->lineage);
    free(s);
    return 0;
}

static void add_image(struct disk *d, const struct level *v)
{
    struct image *i = &d->images[d->nimages];
    const char *colon = strchr(v->file, ':');

    i->level = (unsigned)d->nimages++;
    i->file = strndup(v->file, colon ? (size_t)(colon - v->file) : strlen(v->file));
    i->node = strdup(i->file);
    i->ino = colon ? (uint64_t)strtoul(colon + 1, NULL, 10) : state_hash(v->file);
    i->dev = 1;
    i->read_only = d->nimages > 1;
}

static void add_layer(struct checkpoint *c, const struct level *v, unsigned depth, uint64_t granularity)
{
    struct layer *l = &c->layers[c->nlayers++];

    l->node = strndup(v->file, strcspn(v->file, ":"));
    l->depth = depth;
    l->merge = v->dirty >= 0;
    l->inconsistent = v->dirty == HUSK;
    l->stopped = v->dirty == OFF;
    l->granularity = granularity;
    l->dirty = (uint64_t)MAX(v->dirty, 0) * CLUSTER;
    c->reason = l->inconsistent ? REASON_INCONSISTENT : l->stopped ? REASON_BUSY : REASON_NONE;
    c->allocation_levels = (UINT64_C(1) << depth) - 1;
}

/* One disk with these layers, as disk_list_parse() would show it. */
static struct disk_list *make_list(const struct story *s, const struct level *levels)
{
    struct disk_list *l = calloc(1, sizeof(*l));
    struct disk *d = l->disks = calloc(1, sizeof(*d));
    struct checkpoint *c = d->checkpoints = calloc(1, sizeof(*c));

    l->ndisks = 1;
    d->name = strdup(s->disk ? s->disk : "vda");
    d->qdev = strdup("vda");
    d->qom_path = strdup("/vda");
    d->node = strdup("n");
    d->top = strdup("n");
    d->format = strdup("qcow2");
    d->size = s->size;
    d->images = calloc(LEVELS_MAX, sizeof(*d->images));
    c->name = strdup("c");
    c->layers = calloc(LEVELS_MAX, sizeof(*c->layers));
    d->ncheckpoints = 1;
    for (unsigned depth = 0; levels[depth].file; depth++) {
        add_image(d, &levels[depth]);
        if (levels[depth].dirty != NONE)
            add_layer(c, &levels[depth], depth, s->granularity);
    }
    if (!c->nlayers) {
        free(c->layers);
        free(c->name);
        d->ncheckpoints = 0;
    }
    return l;
}

/* The memory goes through its file's form between any two looks; what is not in the file is lost with a connection. */
static void write_and_read(struct story *s)
{
    char *text = lineage_encode(s->lineage, "vm"), *again;
    struct lineage *copy = NULL;
    struct failure f = {0};

    assert_non_null(text);
    if (lineage_decode(text, strlen(text), &copy, &f) < 0)
        fail_msg("%s", f.text);
    again = lineage_encode(copy, "vm");
    assert_string_equal(text, again);
    free(text);
    free(again);
    if (s->connected) {
        lineage_free(copy);
        return;
    }
    lineage_free(s->lineage);
    s->lineage = copy;
}

static enum reason look_at(struct story *s, const struct level *levels)
{
    const struct checkpoint *c;

    disk_list_free(s->last);
    s->last = make_list(s, levels);
    if (!s->off)
        assert_int_equal(lineage_look_running(s->lineage, s->last, true), 0);
    assert_int_equal(lineage_look(s->lineage, s->last, s->jobs), 0);
    write_and_read(s);
    c = disk_checkpoint(&s->last->disks[0], "c");
    if (c && c->reason == REASON_GAP)
        assert_non_null(c->text);
    return c ? c->reason : REASON_NO_SUCH_CHECKPOINT;
}

#define look(s, ...) look_at(s, (const struct level[]){__VA_ARGS__, {NULL, NONE}})
#define expect(reason, s, ...) assert_string_equal(reason_name(look(s, __VA_ARGS__)), #reason)

/* Whether images that the VM left behind are among these; they are not looked at any further then. */
static bool is_left_at(struct story *s, const struct level *levels)
{
    struct disk_list *list = make_list(s, levels);
    struct failure f = {0};
    int r = lineage_look_stopped(s->lineage, list, &f);

    assert_true(r == 0 || r == -ESTALE);
    assert_int_equal(r, f.err);
    disk_list_free(list);
    return r < 0;
}

#define is_left(s, ...) is_left_at(s, (const struct level[]){__VA_ARGS__, {NULL, NONE}})

static const struct image *image_of(const struct story *s, const char *file)
{
    const struct disk *d = &s->last->disks[0];

    for (size_t i = 0; i < d->nimages; i++) {
        if (strcmp(d->images[i].file, file) == 0)
            return &d->images[i];
    }
    return NULL;
}

static void a_record_that_grows_stays_right(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 0});
    expect(NONE, s, {"b", 3});
    expect(NONE, s, {"b", 3});
}

static void overlays_may_come_and_go_above_the_record(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 1});
    expect(NONE, s, {"t", NONE}, {"b", 2});
    expect(NONE, s, {"u", 0}, {"t", NONE}, {"b", 2});
    expect(NONE, s, {"u", 0}, {"b", 2}); /* t went into the one or the other */
    expect(NONE, s, {"b", 2});           /* committed, or thrown away */
    expect(NONE, s, {"v", 0}, {"b", 2});
}

static void layers_below_may_go_but_not_come(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", 1}, {"m", NONE}, {"b", NONE});
    expect(NONE, s, {"t", 1}, {"b", NONE});
    expect(NONE, s, {"t", 1}, {"b", NONE});
    expect(GAP, s, {"t", 1}, {"m", NONE}, {"b", NONE});
    expect(GAP, s, {"t", 1}, {"b", NONE}); /* a verdict stays */
}

static void a_file_below_that_was_replaced_is_a_gap(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", 1}, {"b", NONE});
    expect(GAP, s, {"t", 1}, {"b:7", NONE});
}

static void the_record_alone_does_not_make_up_for_its_file(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 1});
    expect(GAP, s, {"b:7", 1});
}

static void a_file_under_another_name_is_the_same_file(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b:7", 1});
    expect(NONE, s, {"c:7", 1});
    expect(NONE, s, {"t", NONE}, {"c:7", 1});
}

static void a_file_that_cannot_be_seen_is_known_by_its_name(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b:0", 1}); /* no inode: nothing to see */
    expect(NONE, s, {"b:0", 2});
    expect(GAP, s, {"c:0", 2});
}

static void a_file_that_is_seen_at_last_is_known_by_itself_from_then_on(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b:0", 1});
    expect(NONE, s, {"b:7", 2});
    expect(GAP, s, {"b:8", 3});
}

static void a_layer_with_the_record_that_is_streamed_away_is_a_gap(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", 0}, {"b", 4});
    expect(GAP, s, {"t", 1});
}

static void a_record_removed_from_below_is_a_gap(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", 0}, {"b", 4});
    expect(GAP, s, {"t", 1}, {"b", NONE});
}

static void a_promise_is_kept_when_the_job_ends(void **state)
{
    struct story *s = *state;

    s->jobs = true;
    expect(NONE, s, {"t", 0}, {"b", 4});
    assert_false(lineage_is_promised(s->lineage, "vda", "c", image_of(s, "t")));
    assert_string_equal(lineage_root(s->lineage, &s->last->disks[0], "c"), "b");
    assert_int_equal(lineage_promise(s->lineage, &s->last->disks[0], "c", image_of(s, "t"), JOB_STREAM), 0);
    assert_true(lineage_is_promised(s->lineage, "vda", "c", image_of(s, "t")));
    expect(NONE, s, {"t", 5}, {"b", 4});
    s->jobs = false;
    expect(NONE, s, {"t", 6});
    assert_int_equal(s->last->disks[0].checkpoints[0].allocation_levels, 1); /* its own layer's, too */
    expect(NONE, s, {"u", NONE}, {"t", 6});
    assert_int_equal(s->last->disks[0].checkpoints[0].allocation_levels, 3);
    expect(GAP, s, {"t", 5}); /* and watched from then on */
}

/* Of a stream, and then a commit of ours: what was streamed is in no record, so the allocation counts on. */
static void a_record_that_needs_its_layers_allocation_needs_it_when_it_is_accepted(void **state)
{
    struct story *s = *state;

    s->jobs = true;
    expect(NONE, s, {"t", 0}, {"b", 4});
    assert_int_equal(lineage_promise(s->lineage, &s->last->disks[0], "c", image_of(s, "t"), JOB_STREAM), 0);
    s->jobs = false;
    expect(NONE, s, {"u", 0}, {"t", 6});
    lineage_accept(s->lineage, NULL, "c");
    expect(NONE, s, {"t", 6});
    assert_int_equal(s->last->disks[0].checkpoints[0].allocation_levels, 1);
    expect(NONE, s, {"u", 0}, {"t", 6});
    assert_int_equal(s->last->disks[0].checkpoints[0].allocation_levels, 3);
    lineage_forget(s->lineage, NULL, "c"); /* made anew */
    expect(NONE, s, {"t", 0});
    assert_int_equal(s->last->disks[0].checkpoints[0].allocation_levels, 0);
}

/* m(c) goes into b, under what is above it; seen: that was there at the last look. */
static void begin_commit(struct story *s, bool seen)
{
    lineage_forget(s->lineage, NULL, "c");
    s->jobs = true;
    if (seen)
        expect(NONE, s, {"t", 2}, {"m", 4}, {"b", NONE});
    else
        expect(NONE, s, {"m", 4}, {"b", NONE});
    assert_int_equal(lineage_promise(s->lineage, &s->last->disks[0], "c", image_of(s, "b"), JOB_COMMIT), 0);
    write_and_read(s);
    s->jobs = false;
}

static void a_commit_cut_short_leaves_no_base_to_go_back_to(void **state)
{
    struct story *s = *state;

    begin_commit(s, true);
    expect(GAP, s, {"b", 5});
    begin_commit(s, true);
    expect(GAP, s, {"n", NONE}, {"b", 5}); /* under a new layer */
    begin_commit(s, true);
    expect(GAP, s, {"t", 2}, {"m", NONE}, {"b", 5}); /* it has not ended */
    begin_commit(s, true);
    expect(NONE, s, {"t", 2}, {"m", 4}, {"b", 5}); /* goes on as before */
    expect(GAP, s, {"t", 2}, {"b", 5});
}

static void a_commit_that_has_ended_leaves_a_base_to_go_back_to(void **state)
{
    struct story *s = *state;

    begin_commit(s, true);
    s->jobs = true; /* of another disk */
    expect(NONE, s, {"n", NONE}, {"t", 2}, {"b", 5});
    expect(NONE, s, {"n", NONE}, {"b", 5});
    expect(NONE, s, {"b", 5});
}

static void a_commit_that_ends_unseen_is_known_by_the_connection_or_by_what_stood_above(void **state)
{
    struct story *s = *state;

    s->connected = true;
    begin_commit(s, false);
    expect(NONE, s, {"n", NONE}, {"b", 5}); /* a layer came after the last look */
    begin_commit(s, false);
    lineage_lost(s->lineage);
    expect(GAP, s, {"n", NONE}, {"b", 5});
    begin_commit(s, true);
    lineage_lost(s->lineage);
    expect(NONE, s, {"n", NONE}, {"t", 2}, {"b", 5});
    lineage_lost(s->lineage);
    expect(NONE, s, {"b", 5});
}

static void a_promise_ends_with_the_jobs(void **state)
{
    struct story *s = *state;

    s->jobs = true;
    expect(NONE, s, {"t", 0}, {"b", 4});
    assert_int_equal(lineage_promise(s->lineage, &s->last->disks[0], "c", image_of(s, "t"), JOB_MIRROR), 0);
    s->jobs = false;
    expect(NONE, s, {"t", 4}, {"b", 4}); /* the job was cancelled */
    expect(GAP, s, {"t", 4});
}

static void a_cleared_record_is_a_gap_for_good(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 5});
    expect(GAP, s, {"b", 4});
    expect(GAP, s, {"b", 9});
}

static void a_record_that_was_disabled_has_a_hole_for_good(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 0});
    expect(BUSY, s, {"b", OFF});
    expect(GAP, s, {"b", 9});
    lineage_forget(s->lineage, "vda", "c");
    expect(BUSY, s, {"b", OFF}); /* what it missed before anybody looked is not known either */
    expect(GAP, s, {"b", 9});
    lineage_forget(s->lineage, "vda", "c");
    expect(NONE, s, {"t", 0}, {"b", 1});
    expect(NONE, s, {"t", OFF}, {"b", 1}); /* what the layer has allocated counts */
    expect(NONE, s, {"t", 0}, {"b", 1});
}

static void a_right_record_after_an_inconsistent_one_is_another_one(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 1});
    expect(INCONSISTENT, s, {"b", HUSK});
    expect(GAP, s, {"b", 5});
    lineage_forget(s->lineage, "vda", "c");
    expect(INCONSISTENT, s, {"b", HUSK});
    expect(GAP, s, {"b", 5});
}

static void a_record_cleared_above_the_deepest_one_spoils_nothing(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", 5}, {"b", 4});
    expect(NONE, s, {"t", 0}, {"b", 4}); /* what the layer has allocated counts */
}

static void another_granularity_is_another_record(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 2});
    s->granularity = CLUSTER / 2;
    expect(GAP, s, {"b", 8});
}

static void another_size_is_refused_for_good(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 2});
    s->size = 2 * SIZE;
    expect(RESIZED, s, {"b", 2});
    s->size = SIZE;
    expect(RESIZED, s, {"b", 2});
}

static void what_qemu_says_against_a_record_is_said_first(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 2});
    s->size = 2 * SIZE;
    expect(INCONSISTENT, s, {"b", HUSK});
}

static void a_name_that_was_lost_and_comes_again_is_not_the_old_record(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 2});
    expect(NO_SUCH_CHECKPOINT, s, {"b", NONE});
    assert_non_null(lineage_why_lost(s->lineage, "vda", "c"));
    expect(GAP, s, {"b", 2});
    assert_null(lineage_why_lost(s->lineage, "vda", "c"));
}

static void a_file_that_was_away_and_comes_back_is_a_gap(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", 2}, {"b", NONE});
    expect(NO_SUCH_CHECKPOINT, s, {"b", NONE});
    assert_non_null(lineage_why_lost(s->lineage, "vda", "c"));
    expect(GAP, s, {"t", 2}, {"b", NONE});
}

static void what_was_removed_on_purpose_may_come_anew(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 5});
    lineage_forget(s->lineage, "vda", "c");
    expect(NONE, s, {"b", 0});
    lineage_forget(s->lineage, NULL, "c");
    s->size = 2 * SIZE;
    expect(NONE, s, {"t", 0}, {"b:7", NONE});
}

static void what_is_accepted_is_taken_for_right(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 5});
    expect(GAP, s, {"b:7", 1});
    lineage_accept(s->lineage, "vdb", "c");
    expect(GAP, s, {"b:7", 1});
    lineage_accept(s->lineage, NULL, "c");
    expect(NONE, s, {"b:7", 1});
    expect(GAP, s, {"b:8", 1});
}

static void what_is_moved_is_no_more_than_moved(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", 5}, {"b", NONE});
    lineage_moved(s->lineage, "vda", "c");
    expect(NONE, s, {"b", 5});
    expect(GAP, s, {"a", 5});
    lineage_moved(s->lineage, "vda", "c"); /* a look came before the word */
    expect(NONE, s, {"a", 5});
    lineage_moved(s->lineage, "vda", "c");
    expect(GAP, s, {"b", 2}); /* somebody cleared it meanwhile */
    lineage_moved(s->lineage, "vda", "c");
    expect(GAP, s, {"b", 9});
    lineage_accept(s->lineage, NULL, "c");
    expect(NONE, s, {"b", 2});
}

static void a_record_carried_over_marks_what_it_marked(void **state)
{
    struct story *s = *state;

    s->jobs = true;
    expect(NONE, s, {"t", 5}, {"b", NONE});
    assert_int_equal(lineage_promise(s->lineage, &s->last->disks[0], "c", image_of(s, "b"), JOB_MIRROR), 0);
    s->jobs = false;
    expect(GAP, s, {"b", 3});
}

static void a_disk_with_another_name_is_known_by_its_record(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"b", 5});
    s->disk = "vdb";
    expect(NONE, s, {"t", NONE}, {"b", 5});
    s->disk = "vdc";
    expect(GAP, s, {"t", NONE}, {"b", 4}); /* cleared meanwhile */
    s->disk = "vdd";
    expect(GAP, s, {"b", 9});
    s->disk = "vde";
    expect(NONE, s, {"o", 1});             /* another disk */
    lineage_forget(s->lineage, NULL, "c"); /* made anew */
    s->disk = "vdf";
    expect(NONE, s, {"b", 0});
    s->disk = "vdg";
    expect(NONE, s, {"b", 2});
    s->disk = "vdh";
    s->size = 2 * SIZE;
    expect(RESIZED, s, {"b", 2});
}

static void a_disk_with_another_name_still_needs_its_layers_allocation(void **state)
{
    struct story *s = *state;

    s->jobs = true;
    expect(NONE, s, {"t", 0}, {"b", 4});
    assert_int_equal(lineage_promise(s->lineage, &s->last->disks[0], "c", image_of(s, "t"), JOB_STREAM), 0);
    s->jobs = false;
    expect(NONE, s, {"t", 6});
    s->disk = "vdb";
    expect(NONE, s, {"t", 6});
    assert_int_equal(s->last->disks[0].checkpoints[0].allocation_levels, 1);
}

static void a_restored_disk_has_no_checkpoint_that_counts(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", 1}, {"b", 5});
    assert_int_equal(lineage_restored(s->lineage, "vda"), 0);
    write_and_read(s);
    expect(GAP, s, {"t", 1}, {"b", 5});
    expect(GAP, s, {"t", 2}, {"b", 5});
    lineage_forget(s->lineage, NULL, "c"); /* made anew */
    expect(NONE, s, {"t", 0});
}

static void a_disk_that_was_never_seen_can_be_restored_too(void **state)
{
    struct story *s = *state;

    assert_int_equal(lineage_restored(s->lineage, "vdb"), 0);
    assert_int_equal(lineage_restored(s->lineage, "vda"), 0);
    expect(GAP, s, {"b", 5});
    lineage_accept(s->lineage, "vda", "c");
    expect(NONE, s, {"b", 5});
}

static void a_buried_record_is_nobodys_until_its_layer_is_gone(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", 1}, {"b", 5});
    assert_int_equal(lineage_bury(s->lineage, &s->last->disks[0], "c"), 0);
    expect(NO_SUCH_CHECKPOINT, s, {"t", NONE}, {"b", 5});
    assert_int_equal(s->last->disks[0].ncheckpoints, 1); /* it is told, so that nobody takes the name */
    expect(NO_SUCH_CHECKPOINT, s, {"u", NONE}, {"t", NONE}, {"b", 5});
    assert_null(lineage_why_lost(s->lineage, "vda", "c"));
    expect(NONE, s, {"u", 0}, {"t", NONE}, {"b", 5}); /* somebody makes one all the same: a new one */
    lineage_forget(s->lineage, "vda", "c");
    expect(NO_SUCH_CHECKPOINT, s, {"u", NONE});
    expect(NONE, s, {"u", 0});
}

static void what_a_running_vm_has_left_behind_is_known_until_it_runs_on_it(void **state)
{
    struct story *s = *state;

    expect(NO_SUCH_CHECKPOINT, s, {"u", NONE}, {"t", NONE}, {"b", NONE});
    assert_false(is_left(s, {"u", NONE}, {"t", NONE}, {"b", NONE}));
    expect(NO_SUCH_CHECKPOINT, s, {"b", NONE});
    assert_true(is_left(s, {"u", NONE}, {"t", NONE}, {"b", NONE}));
    assert_true(is_left(s, {"t", NONE}, {"b", NONE}));
    assert_false(is_left(s, {"b", NONE}));
    assert_false(is_left(s, {"v", NONE}, {"b", NONE}));   /* a new layer */
    assert_false(is_left(s, {"t:9", NONE}, {"b", NONE})); /* another file under that name */
    expect(NO_SUCH_CHECKPOINT, s, {"t", NONE}, {"b", NONE});
    assert_false(is_left(s, {"t", NONE}, {"b", NONE}));
    assert_true(is_left(s, {"u", NONE}, {"t", NONE}, {"b", NONE}));
}

static void what_is_changed_while_the_vm_is_off_leaves_nothing_behind(void **state)
{
    struct story *s = *state;

    expect(NONE, s, {"t", NONE}, {"b", 1});
    s->off = true;
    expect(NONE, s, {"b", 1});
    assert_false(is_left(s, {"t", NONE}, {"b", 1}));
    s->off = false;
    expect(GAP, s, {"x", NONE}, {"y", 1}); /* another disk altogether */
    assert_false(is_left(s, {"b", 1}));
}

static void only_so_many_left_images_are_remembered(void **state)
{
    struct story *s = *state;
    char name[8];

    for (unsigned i = 0; i < 20; i++) {
        (void)snprintf(name, sizeof(name), "t%u", i);
        expect(NO_SUCH_CHECKPOINT, s, {name, NONE}, {"b", NONE});
        expect(NO_SUCH_CHECKPOINT, s, {"b", NONE});
        assert_true(is_left(s, {name, NONE}, {"b", NONE}));
    }
    assert_true(is_left(s, {"t12", NONE}, {"b", NONE}));
    assert_false(is_left(s, {"t11", NONE}, {"b", NONE}));
}

/* The VM has another name: a new memory begins, which what was remembered up to now becomes part of at inherit(). */
static struct lineage *rename_vm(struct story *s)
{
    struct lineage *old = s->lineage;

    s->lineage = lineage_new();
    assert_non_null(s->lineage);
    return old;
}

static void inherit(struct story *s, struct lineage *old)
{
    lineage_saved(s->lineage);
    assert_int_equal(lineage_inherit(s->lineage, old), 0);
    assert_true(lineage_is_dirty(s->lineage));
    lineage_free(old);
}

static void what_happened_before_the_vm_was_renamed_counts(void **state)
{
    struct story *s = *state;
    struct lineage *old;

    expect(NONE, s, {"t", 5}, {"b", NONE});
    old = rename_vm(s);
    expect(NONE, s, {"t", 2}, {"b", NONE}); /* was cleared; nothing tells */
    inherit(s, old);
    expect(GAP, s, {"t", 3}, {"b", NONE});
    lineage_forget(s->lineage, NULL, "c");
    expect(NONE, s, {"t", 1}, {"b", NONE});
    old = rename_vm(s);
    expect(NONE, s, {"t", 1}, {"b:7", NONE}); /* the file below is another one */
    inherit(s, old);
    expect(GAP, s, {"t", 1}, {"b:7", NONE});
    old = rename_vm(s);
    inherit(s, old); /* no look in between */
    expect(GAP, s, {"t", 1}, {"b:7", NONE});
}

static void what_happened_after_the_vm_was_renamed_counts_too(void **state)
{
    struct story *s = *state;
    struct lineage *old;

    expect(NONE, s, {"t", 5}, {"b", NONE});
    old = rename_vm(s);
    expect(NONE, s, {"t", 6}, {"b", NONE});
    expect(GAP, s, {"t", 1}, {"b", NONE});
    inherit(s, old);
    expect(GAP, s, {"t", 9}, {"b", NONE});
    lineage_forget(s->lineage, NULL, "c");
    expect(NONE, s, {"t", NONE}, {"b", 1});
    old = rename_vm(s);
    expect(NONE, s, {"t", NONE}, {"b", 1});
    assert_int_equal(lineage_bury(s->lineage, &s->last->disks[0], "c"), 0);
    inherit(s, old);
    expect(NO_SUCH_CHECKPOINT, s, {"t", NONE}, {"b", 1});
    old = rename_vm(s);
    expect(NONE, s, {"t", NONE}, {"b", 1}); /* a new memory sees it again */
    inherit(s, old);
    expect(NO_SUCH_CHECKPOINT, s, {"t", NONE}, {"b", 1});
}

static void a_disk_and_a_checkpoint_of_the_new_name_alone_stay(void **state)
{
    struct story *s = *state;
    struct lineage *old;
    struct disk_list *l;

    expect(NONE, s, {"b", 5});
    old = rename_vm(s);
    for (unsigned i = 0; i < 2; i++) {
        l = make_list(s, (const struct level[]){{"b", 5}, {NULL, NONE}});
        if (i == 0)
            l->disks[0].name[0] = 'w';
        else
            l->disks[0].checkpoints[0].name[0] = 'd';
        assert_int_equal(lineage_look(s->lineage, l, false), 0);
        disk_list_free(l);
    }
    inherit(s, old);
    expect(NONE, s, {"b", 5});
    assert_non_null(lineage_why_lost(s->lineage, "vda", "d"));
    l = make_list(s, (const struct level[]){{"b", 4}, {NULL, NONE}});
    l->disks[0].name[0] = 'w';
    assert_int_equal(lineage_look(s->lineage, l, false), 0);
    assert_int_equal(l->disks[0].checkpoints[0].reason, REASON_GAP);
    disk_list_free(l);
}

static void counts_are_written_when_they_grew_by_much(void **state)
{
    struct story *s = *state;
    struct disk_list *l;
    static const struct {
        int dirty;
        bool write;
    } counts[] = {{100, true}, {100, false}, {101, false}, {124, false}, {125, true}, {126, false}};

    for (size_t i = 0; i < ARRAY_SIZE(counts); i++) {
        l = make_list(s, (const struct level[]){{"b", counts[i].dirty}, {NULL, NONE}});
        assert_int_equal(lineage_look(s->lineage, l, false), 0);
        assert_int_equal(lineage_is_dirty(s->lineage), counts[i].write);
        if (counts[i].write)
            lineage_saved(s->lineage);
        assert_false(lineage_is_dirty(s->lineage));
        disk_list_free(l);
    }
    lineage_unsaved(s->lineage);
    assert_true(lineage_is_dirty(s->lineage));
}

static void of_names_long_gone_the_oldest_are_forgotten(void **state)
{
    struct story *s = *state;
    char first[] = "c0", kept[16];

    for (unsigned i = 0; i <= LINEAGE_ABSENT_MAX; i++) {
        struct disk_list *l = make_list(s, (const struct level[]){{"b", 0}, {NULL, NONE}});

        free(l->disks[0].checkpoints[0].name);
        assert_true(asprintf(&l->disks[0].checkpoints[0].name, "c%u", i) > 0);
        assert_int_equal(lineage_look(s->lineage, l, false), 0);
        disk_list_free(l);
    }
    assert_int_equal(look(s, {"b", 0}), REASON_NONE); /* "c": now all the others are gone */
    (void)snprintf(kept, sizeof(kept), "c%u", LINEAGE_ABSENT_MAX);
    assert_null(lineage_why_lost(s->lineage, "vda", first));
    assert_non_null(lineage_why_lost(s->lineage, "vda", "c1"));
    assert_non_null(lineage_why_lost(s->lineage, "vda", kept));
}

/* -- the file ------------------------------------------------------------------------------------------------------ */

static void damaged_memory_is_told_and_set_aside(void **state)
{
    static const char *const texts[] = {
        "",
        "{",
        "[]",
        "{\"format\": \"x\"}",
        "{\"format\": 2, \"disks\": []}",
        "{\"format\": 1, \"disks\": [{}]}",
        "{\"format\": 1, \"disks\": [{\"name\": \"vda\", \"images\": [{}]}]}",
        "{\"format\": 1, \"disks\": [{\"name\": \"vda\", \"checkpoints\": [{\"name\": 1}]}]}",
        ("{\"format\": 1, \"disks\": [{\"name\": \"vda\", \"checkpoints\": [{\"name\": \"c\", "
         "\"roots\": [{},{},{},{},{}]}]}]}"),
    };
    char dir[] = "/tmp/qpull-lineage-XXXXXX", command[64];
    struct failure f = {0};
    int fd;

    assert_non_null(mkdtemp(dir));
    fd = open(dir, O_PATH | O_DIRECTORY);
    for (size_t i = 0; i < ARRAY_SIZE(texts); i++) {
        struct lineage *l = NULL;

        memset(&f, 0, sizeof(f));
        assert_int_equal(lineage_save(fd, "vm/1", texts[i], &f), 0);
        assert_int_equal(lineage_load(fd, "vm/1", &l, &f), 0);
        if (!f.err)
            fail_msg("taken for good: %s", texts[i]);
        lineage_free(l);
        memset(&f, 0, sizeof(f));
        assert_int_equal(lineage_load(fd, "vm/1", &l, &f), 0); /* set aside: an empty one, and nothing to tell */
        assert_int_equal(f.err, 0);
        lineage_free(l);
    }
    (void)close(fd);
    (void)snprintf(command, sizeof(command), "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

static void what_a_newer_program_held_against_a_checkpoint_stays(void **state)
{
    static const char text[] =
        "{\"format\": 1, \"disks\": [{\"name\": \"vda\", \"checkpoints\": [{\"name\": \"c\", \"size\": "
        "1048576, \"cause\": \"news\", \"absence\": \"none\", \"roots\": [{\"file\": \"b\", "
        "\"granularity\": 65536}]}]}]}";
    struct story *s = *state;
    struct failure f = {0};

    lineage_free(s->lineage);
    assert_int_equal(lineage_decode(text, strlen(text), &s->lineage, &f), 0);
    expect(GAP, s, {"b", 1});
}

#define story_test(name) cmocka_unit_test_setup_teardown(name, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        story_test(a_record_that_grows_stays_right),
        story_test(overlays_may_come_and_go_above_the_record),
        story_test(layers_below_may_go_but_not_come),
        story_test(a_file_below_that_was_replaced_is_a_gap),
        story_test(the_record_alone_does_not_make_up_for_its_file),
        story_test(a_file_under_another_name_is_the_same_file),
        story_test(a_file_that_cannot_be_seen_is_known_by_its_name),
        story_test(a_file_that_is_seen_at_last_is_known_by_itself_from_then_on),
        story_test(a_layer_with_the_record_that_is_streamed_away_is_a_gap),
        story_test(a_record_removed_from_below_is_a_gap),
        story_test(a_promise_is_kept_when_the_job_ends),
        story_test(a_record_that_needs_its_layers_allocation_needs_it_when_it_is_accepted),
        story_test(a_commit_cut_short_leaves_no_base_to_go_back_to),
        story_test(a_commit_that_has_ended_leaves_a_base_to_go_back_to),
        story_test(a_commit_that_ends_unseen_is_known_by_the_connection_or_by_what_stood_above),
        story_test(a_promise_ends_with_the_jobs),
        story_test(a_cleared_record_is_a_gap_for_good),
        story_test(a_record_that_was_disabled_has_a_hole_for_good),
        story_test(a_right_record_after_an_inconsistent_one_is_another_one),
        story_test(a_record_cleared_above_the_deepest_one_spoils_nothing),
        story_test(another_granularity_is_another_record),
        story_test(another_size_is_refused_for_good),
        story_test(what_qemu_says_against_a_record_is_said_first),
        story_test(a_name_that_was_lost_and_comes_again_is_not_the_old_record),
        story_test(a_file_that_was_away_and_comes_back_is_a_gap),
        story_test(what_was_removed_on_purpose_may_come_anew),
        story_test(what_is_accepted_is_taken_for_right),
        story_test(what_is_moved_is_no_more_than_moved),
        story_test(a_record_carried_over_marks_what_it_marked),
        story_test(a_disk_with_another_name_is_known_by_its_record),
        story_test(a_disk_with_another_name_still_needs_its_layers_allocation),
        story_test(a_restored_disk_has_no_checkpoint_that_counts),
        story_test(a_disk_that_was_never_seen_can_be_restored_too),
        story_test(what_a_running_vm_has_left_behind_is_known_until_it_runs_on_it),
        story_test(what_is_changed_while_the_vm_is_off_leaves_nothing_behind),
        story_test(only_so_many_left_images_are_remembered),
        story_test(a_buried_record_is_nobodys_until_its_layer_is_gone),
        story_test(what_happened_before_the_vm_was_renamed_counts),
        story_test(what_happened_after_the_vm_was_renamed_counts_too),
        story_test(a_disk_and_a_checkpoint_of_the_new_name_alone_stay),
        story_test(counts_are_written_when_they_grew_by_much),
        story_test(of_names_long_gone_the_oldest_are_forgotten),
        story_test(damaged_memory_is_told_and_set_aside),
        story_test(what_a_newer_program_held_against_a_checkpoint_stays),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
