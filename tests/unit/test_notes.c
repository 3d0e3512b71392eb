/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* notes: the set in memory; who descends from whom, also against a model and after every step through the files. */
#include "notes_box.h"

#include <time.h>

/* -- relations ----------------------------------------------------------------------------------------------------- */

static void a_new_note_builds_on_the_newest_leaf(void **state)
{
    struct box *b = *state;

    assert_null(notes_current(b->set));
    assert_int_equal(box_add(b, "mon", NULL, 0), 0);
    assert_int_equal(box_add(b, "tue", NULL, 10), 0);
    assert_int_equal(box_add(b, "other", "", 20), 0);
    assert_int_equal(box_add(b, "wed", "tue", 30), 0);
    box_parent_is(b, "mon", NULL);
    box_parent_is(b, "tue", "mon");
    box_parent_is(b, "other", NULL);
    assert_string_equal(notes_current(b->set)->name, "wed");
    assert_int_equal(box_add(b, "thu", NULL, 40), 0);
    box_parent_is(b, "thu", "wed");
    assert_string_equal(box_order(b), "mon tue other wed thu");
}

static void clocks_that_go_backwards_put_nobody_before_its_parent(void **state)
{
    struct box *b = *state;

    assert_int_equal(box_add(b, "a", NULL, 1000), 0);
    assert_int_equal(box_add(b, "b", NULL, -5000), 0);
    box_parent_is(b, "b", "a");
    assert_string_equal(notes_current(b->set)->name, "b");
    assert_int_equal(box_add(b, "c", NULL, -4000), 0);
    box_parent_is(b, "c", "b");
    assert_string_equal(box_order(b), "a b c");
    assert_int_equal(box_note(b, "b")->created_ms, BORN - 5000);
}

static void a_disk_can_leave_a_note_that_goes_on(void **state)
{
    struct box *b = *state;
    char vda[] = "vda", vdb[] = "vdb";
    struct note_disk disks[] = {{.name = vda, .size = 1}, {.name = vdb, .size = 2}};
    struct note_spec spec = {.name = "mon", .created_ms = BORN, .disks = disks, .ndisks = ARRAY_SIZE(disks)};
    size_t nops;

    assert_int_equal(notes_add(b->set, &spec, &b->change, &b->failure), 0);
    nops = b->change.nops;
    assert_int_equal(notes_drop_disk(b->set, "mon", "vdc", &b->change, &b->failure), 0);
    assert_int_equal(notes_drop_disk(b->set, "tue", "vda", &b->change, &b->failure), 0);
    assert_int_equal(b->change.nops, nops);
    assert_int_equal(notes_drop_disk(b->set, "mon", "vda", &b->change, &b->failure), 0);
    assert_int_equal(b->change.nops, nops + 1);
    assert_null(strstr(b->change.ops[nops].text, "vda"));
    assert_non_null(strstr(b->change.ops[nops].text, "vdb"));
    assert_int_equal(box_note(b, "mon")->ndisks, 1);
    assert_string_equal(box_note(b, "mon")->disks[0].name, "vdb");
}

static void a_walk_below_meets_each_descendant_once_parents_first(void **state)
{
    struct box *b = *state;
    const struct note *top, *n;
    char met[64] = "";

    assert_int_equal(box_add(b, "r", "", 0), 0);
    assert_int_equal(box_add(b, "x", "r", 1), 0);
    assert_int_equal(box_add(b, "y", "r", 2), 0);
    assert_int_equal(box_add(b, "x1", "x", 3), 0);
    assert_int_equal(box_add(b, "x2", "x", 4), 0);
    assert_int_equal(box_add(b, "y1", "y", 5), 0);
    assert_int_equal(box_add(b, "r2", "", 6), 0);
    top = box_note(b, "r");
    for (n = notes_below(top, top); n; n = notes_below(top, n))
        (void)snprintf(met + strlen(met), sizeof(met) - strlen(met), "%s ", n->name);
    assert_string_equal(met, "x x1 x2 y y1 ");
    top = box_note(b, "y1");
    assert_null(notes_below(top, top));
    assert_string_equal(b->set->root->name, "r");
    assert_string_equal(b->set->root->sibling->name, "r2");
    assert_true(notes_is_ancestor(box_note(b, "r"), box_note(b, "x2")));
    assert_false(notes_is_ancestor(box_note(b, "y"), box_note(b, "x2")));
    assert_false(notes_is_ancestor(box_note(b, "y"), box_note(b, "y")));
}

static void deleting_gives_the_children_to_the_grandparent(void **state)
{
    struct box *b = *state;

    assert_int_equal(box_add(b, "r", "", 0), 0);
    assert_int_equal(box_add(b, "m", "r", 1), 0);
    assert_int_equal(box_add(b, "x", "m", 2), 0);
    assert_int_equal(box_add(b, "y", "m", 3), 0);
    assert_int_equal(box_add(b, "z", "x", 4), 0);
    notes_change_done(&b->change);

    assert_int_equal(box_remove(b, "m"), 0); /* in the middle */
    box_parent_is(b, "x", "r");
    box_parent_is(b, "y", "r");
    box_parent_is(b, "z", "x");
    assert_int_equal(b->change.nops, 3); /* x and y are written, then m goes */
    assert_string_equal(b->change.ops[0].name, "x");
    assert_string_equal(b->change.ops[1].name, "y");
    assert_string_equal(b->change.ops[2].name, "m");
    assert_null(b->change.ops[2].text);
    notes_change_done(&b->change);

    assert_int_equal(box_remove(b, "z"), 0); /* a leaf */
    assert_int_equal(b->change.nops, 1);
    assert_int_equal(box_remove(b, box_note(b, "r")->name), 0); /* the root, by its own memory */
    box_parent_is(b, "x", NULL);
    box_parent_is(b, "y", NULL);
    assert_string_equal(box_order(b), "x y");
}

static void deleting_what_has_no_note_succeeds(void **state)
{
    struct box *b = *state;

    assert_int_equal(box_add(b, "a", NULL, 0), 0);
    notes_change_done(&b->change);
    assert_int_equal(box_remove(b, "nobody"), 0);
    assert_int_equal(b->change.nops, 0);
    assert_int_equal(box_remove(b, "a"), 0);
    assert_int_equal(box_remove(b, "a"), 0);
    assert_int_equal(b->set->nnotes, 0);
    assert_null(b->set->root);
}

/* -- refusals ------------------------------------------------------------------------------------------------------ */

static void what_cannot_be_a_note_is_refused_in_words(void **state)
{
    struct box *b = *state;
    static char long_name[257], long_text[NOTES_DESCRIPTION_MAX + 2];
    struct note_disk twice[] = {{.name = (char *)"vda"}, {.name = (char *)"vdb"}, {.name = (char *)"vda"}};
    struct note_disk nameless[] = {{.name = (char *)""}};
    struct note_spec spec = {.name = "new", .created_ms = BORN};

    (void)memset(long_name, 'n', sizeof(long_name) - 1);
    (void)memset(long_text, 't', sizeof(long_text) - 1);
    assert_int_equal(box_add(b, "a", NULL, 0), 0);
    notes_change_done(&b->change);

    assert_int_equal(box_add(b, "", NULL, 0), -EINVAL);
    assert_int_equal(box_add(b, "a/b", NULL, 0), -EINVAL);
    assert_int_equal(box_add(b, "a@b", NULL, 0), -EINVAL);
    assert_int_equal(box_add(b, "a\nb", NULL, 0), -EINVAL);
    assert_int_equal(box_add(b, long_name, NULL, 0), -EINVAL);
    box_says(b, "256 bytes");
    assert_int_equal(box_add(b, "a", NULL, 0), -EEXIST);
    box_says(b, "'a' already");
    assert_int_equal(box_add(b, "new", "nobody", 0), -ENOENT);
    box_says(b, "'nobody' that could be the parent");
    assert_int_equal(box_add(b, "new", "new", 0), -ENOENT);
    assert_int_equal(box_add(b, "new", NULL, -BORN - 1), -EINVAL);
    assert_int_equal(box_add(b, "new", NULL, NOTES_CREATED_MAX), -EINVAL);

    box_forget(b);
    spec.description = long_text;
    assert_int_equal(notes_add(b->set, &spec, &b->change, &b->failure), -EINVAL);
    box_says(b, "description has 4097 bytes");
    spec.description = NULL;
    spec.disks = twice;
    spec.ndisks = 3;
    box_forget(b);
    assert_int_equal(notes_add(b->set, &spec, &b->change, &b->failure), -EINVAL);
    box_says(b, "twice: 'vda'");
    spec.disks = nameless;
    spec.ndisks = 1;
    box_forget(b);
    assert_int_equal(notes_add(b->set, &spec, &b->change, &b->failure), -EINVAL);
    box_says(b, "number 1 has no name");

    assert_int_equal(b->change.nops, 0);
    assert_string_equal(box_order(b), "a");
}

static void a_note_that_would_outgrow_its_file_is_refused(void **state)
{
    struct box *b = *state;
    static struct note_disk disks[NOTES_DISKS_MAX];
    static char names[NOTES_DISKS_MAX][101];
    struct note_spec spec = {.name = "big", .created_ms = BORN, .disks = disks, .ndisks = NOTES_DISKS_MAX};

    for (unsigned i = 0; i < NOTES_DISKS_MAX; i++) {
        (void)snprintf(names[i], sizeof(names[i]), "%0100u", i);
        disks[i].name = names[i];
    }
    assert_int_equal(notes_add(b->set, &spec, &b->change, &b->failure), -E2BIG);
    box_says(b, "name fewer disks");
    assert_int_equal(b->set->nnotes, 0);
    assert_int_equal(b->change.nops, 0);
    spec.ndisks = 100;
    box_forget(b);
    assert_int_equal(notes_add(b->set, &spec, &b->change, &b->failure), 0);
}

static void all_notes_together_are_bounded(void **state)
{
    struct box *b = *state;
    static struct note_disk disks[40];
    static char long_name[NOTES_STRING_MAX + 1];
    struct note_spec spec = {.name = "", .created_ms = BORN, .disks = disks, .ndisks = ARRAY_SIZE(disks)};
    char names[ARRAY_SIZE(disks)][8], name[16];
    int r = 0;

    (void)memset(long_name, 'n', NOTES_STRING_MAX);
    for (unsigned i = 0; i < ARRAY_SIZE(disks); i++) {
        (void)snprintf(names[i], sizeof(names[i]), "%u", i);
        disks[i] = (struct note_disk){.name = names[i], .node = long_name};
    }
    for (unsigned i = 0; r == 0; i++) {
        (void)snprintf(name, sizeof(name), "%u", i);
        spec.name = name;
        r = notes_add(b->set, &spec, &b->change, &b->failure);
        notes_change_done(&b->change);
    }
    assert_int_equal(r, -ENOSPC);
    box_says(b, "64 MiB together");
    assert_true(b->set->bytes <= NOTES_TOTAL_MAX && b->set->bytes > NOTES_TOTAL_MAX - NOTES_FILE_MAX);
    assert_int_equal(box_remove(b, "0"), 0);
    assert_int_equal(notes_add(b->set, &spec, &b->change, NULL), 0); /* there is room again */
}

/* -- what is known against a checkpoint ---------------------------------------------------------------------------- */

static int mark(struct box *b, const char *disk, enum reason reason)
{
    box_forget(b);
    return notes_mark_broken(b->set, "a", disk, reason, NULL, &b->change, &b->failure);
}

static void the_first_reason_stays_until_it_is_taken_back(void **state)
{
    struct box *b = *state;
    const struct note_broken *broken;

    assert_int_equal(box_add(b, "a", NULL, 0), 0);
    broken = &box_note(b, "a")->broken;
    assert_null(broken->reason);
    assert_int_equal(mark(b, "vda", REASON_INCONSISTENT), 0);
    assert_string_equal(broken->reason, "INCONSISTENT");
    assert_string_equal(broken->text, reason_text(REASON_INCONSISTENT));
    assert_int_equal(mark(b, "vdb", REASON_GAP), 0);
    assert_string_equal(broken->disk, "vda");
    assert_int_equal(mark(b, "vda", REASON_RESIZED), 0);
    assert_string_equal(broken->reason, "RESIZED");
    assert_int_equal(mark(b, "vdb", REASON_NONE), 0);
    assert_string_equal(broken->reason, "RESIZED");
    assert_int_equal(mark(b, NULL, REASON_NONE), 0);
    assert_null(broken->reason);
    assert_int_equal(mark(b, NULL, REASON_NO_SUCH_CHECKPOINT), 0);
    assert_null(broken->disk);
    assert_int_equal(notes_mark_broken(b->set, "b", NULL, REASON_GAP, NULL, &b->change, &b->failure), -ENOENT);

    assert_int_equal(box_write(b), 0);
    box_load(b, VM);
    assert_string_equal(box_note(b, "a")->broken.reason, "NO_SUCH_CHECKPOINT");
    assert_int_equal(box_remove(b, "a"), 0); /* a broken one can be deleted */
}

static void the_record_in_qemu_decides_and_the_note_knows_why_it_is_gone(void **state)
{
    struct box *b = *state;
    struct checkpoint record = {.name = (char *)"a", .reason = REASON_NONE};
    struct disk with = {.name = (char *)"vda", .ncheckpoints = 1, .checkpoints = &record};
    struct disk without = {.name = (char *)"vda"};

    assert_int_equal(box_add(b, "a", NULL, 0), 0);
    assert_int_equal(note_reason(box_note(b, "a"), &with), REASON_NONE);
    assert_int_equal(note_reason(box_note(b, "a"), &without), REASON_NO_SUCH_CHECKPOINT);
    assert_int_equal(mark(b, "vda", REASON_RESIZED), 0);
    assert_int_equal(note_reason(box_note(b, "a"), &with), REASON_NONE);
    assert_int_equal(note_reason(box_note(b, "a"), &without), REASON_RESIZED);
    without.name = (char *)"vdb";
    assert_int_equal(note_reason(box_note(b, "a"), &without), REASON_NO_SUCH_CHECKPOINT);
}

/* -- retention ----------------------------------------------------------------------------------------------------- */

static void retention_drops_the_oldest_and_never_the_current(void **state)
{
    struct box *b = *state;
    const char *names[8];

    assert_int_equal(notes_over(b->set, 3, names, 8), 0);
    for (int i = 0; i < 5; i++)
        assert_int_equal(box_add(b, (char[]){(char)('a' + i), '\0'}, NULL, i == 4 ? -100000 : i), 0);
    assert_int_equal(notes_over(b->set, 0, names, 8), 0);
    assert_int_equal(notes_over(b->set, 5, names, 8), 0);
    assert_int_equal(notes_over(b->set, 3, names, 1), 2);
    assert_string_equal(names[0], "a");
    assert_int_equal(notes_over(b->set, 1, names, 8), 4);
    for (int i = 0; i < 4; i++)
        assert_int_equal(box_remove(b, names[i]), 0);
    assert_string_equal(box_order(b), "e"); /* the newest, although its clock says otherwise */
    box_parent_is(b, "e", NULL);
}

/* -- documents ----------------------------------------------------------------------------------------------------- */

static int import(struct box *b, const char *text)
{
    struct json_object *doc = json_tokener_parse(text);
    int r;

    assert_non_null(doc);
    box_forget(b);
    r = notes_import(b->set, doc, &b->change, &b->failure);
    (void)json_object_put(doc);
    return r;
}

#define DOC(notes) "{\"format\":1,\"vm\":\"vm1\",\"checkpoints\":[" notes "]}"
#define NOTE(name, parent)                                                                       \
    "{\"format\":1,\"vm\":\"vm1\",\"name\":\"" name "\",\"parent\":" parent ",\"created_ms\":5," \
    "\"description\":\"new\",\"disks\":[{\"name\":\"vda\",\"size\":18446744073709551615}]}"

static void an_exported_set_comes_back_the_same(void **state)
{
    struct box *b = *state;
    struct note_disk disks[] = {{(char *)"vda", UINT64_MAX, (char *)"#block1", (char *)"/img/a \"b\".qcow2", NULL},
                                {(char *)"vdb", 0, NULL, NULL, NULL}};
    struct note_spec spec = {.name = "full", .created_ms = BORN, .description = "l\n\"", .disks = disks, .ndisks = 2};
    struct notes *copy = notes_new(VM);
    struct json_object *doc;

    assert_int_equal(notes_add(b->set, &spec, &b->change, &b->failure), 0);
    assert_int_equal(box_add(b, "x", NULL, 3), 0);
    assert_int_equal(box_add(b, "y", "full", 2), 0);
    assert_int_equal(notes_mark_broken(b->set, "x", "vda", REASON_GAP, "why", &b->change, &b->failure), 0);
    notes_change_done(&b->change);
    doc = notes_export(b->set);
    assert_int_equal(notes_import(copy, doc, &b->change, &b->failure), 0);
    box_same(b->set, copy);
    assert_int_equal(b->change.nops, 3);
    assert_int_equal(notes_find(copy, "full")->disks[0].size, UINT64_MAX);
    assert_int_equal(notes_import(copy, doc, &b->change, &b->failure), 0); /* and over itself */
    box_same(b->set, copy);
    (void)json_object_put(doc);
    notes_free(copy);

    /* What the change says is what the files become. */
    assert_int_equal(box_write(b), 0);
    copy = TAKE_PTR(b->set);
    box_load(b, VM);
    box_same(copy, b->set);
    notes_free(copy);
}

static void an_imported_note_replaces_in_place_and_keeps_its_children(void **state)
{
    struct box *b = *state;

    assert_int_equal(box_add(b, "r", "", 0), 0);
    assert_int_equal(box_add(b, "m", "r", 1), 0);
    assert_int_equal(box_add(b, "c", "m", 2), 0);
    assert_int_equal(import(b, DOC(NOTE("m", "null") "," NOTE("new", "\"c\""))), 0);
    assert_string_equal(box_note(b, "m")->description, "new");
    box_parent_is(b, "m", NULL);
    box_parent_is(b, "c", "m");
    box_parent_is(b, "new", "c");
    assert_int_equal(b->set->nnotes, 4);
}

static void a_document_that_does_not_fit_is_refused_and_changes_nothing(void **state)
{
    struct box *b = *state;
    struct json_object *before, *after;
    static const struct {
        int err;
        const char *doc, *says;
    } bad[] = {
        {-EINVAL, "[]", "not a JSON object"},
        {-EBADMSG, "{}", "\"format\" is missing"},
        {-ENOTSUP, "{\"format\":2,\"vm\":\"vm1\",\"checkpoints\":[]}", "format 2"},
        {-EINVAL, "{\"format\":1,\"vm\":\"vm2\",\"checkpoints\":[]}", "of VM 'vm2', not of VM 'vm1'"},
        {-EBADMSG, "{\"format\":1,\"vm\":\"vm1\"}", "\"checkpoints\""},
        {-EBADMSG, DOC("7"), "note 1 of the document"},
        {-EINVAL, DOC(NOTE("x", "null") "," NOTE("x", "null")), "two notes of checkpoint 'x'"},
        {-EINVAL, DOC(NOTE("x", "\"y\"") "," NOTE("y", "\"x\"")), "its own ancestor"},
        {-EINVAL, DOC(NOTE("x", "\"x\"")), "its own ancestor"},
        {-EINVAL, DOC(NOTE("a", "\"b\"")), "its own ancestor"}, /* b stands in the set, below a */
        {-EINVAL, DOC(NOTE("x", "\"nobody\"")), "'nobody'"},
        {-EINVAL, DOC("{\"format\":1,\"vm\":\"vm2\",\"name\":\"x\",\"created_ms\":5,\"disks\":[]}"),
         "'x', is of VM 'vm2'"},
        {-EINVAL, DOC(NOTE("x/y", "null")), "note 1 of the document"},
        {-EINVAL, DOC(NOTE("ok", "null") "," NOTE("", "null")), "note 2 of the document"},
        {-EBADMSG, DOC("{\"format\":1,\"vm\":\"vm1\",\"name\":\"x\\u0000y\"}"), "zero byte"},
    };

    assert_int_equal(box_add(b, "a", NULL, 0), 0);
    assert_int_equal(box_add(b, "b", NULL, 1), 0);
    notes_change_done(&b->change);
    before = notes_export(b->set);
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        if (import(b, bad[i].doc) != bad[i].err)
            fail_msg("%s: %d %s", bad[i].doc, b->failure.err, b->failure.text);
        box_says(b, bad[i].says);
        assert_int_equal(b->change.nops, 0);
        box_parent_is(b, "b", "a");
        after = notes_export(b->set);
        assert_true(json_object_equal(before, after));
        (void)json_object_put(after);
    }
    (void)json_object_put(before);
}

/* -- against a model ----------------------------------------------------------------------------------------------- */

#define MODEL_NOTES 40
#define MODEL_STEPS 300
#define MODEL_RUNS 12

struct model {
    struct model_note {
        char name[16];
        int parent; /* -1: none */
        bool there;
        int64_t age_ms;
    } notes[MODEL_NOTES];
    unsigned nmade;
    uint64_t random;
};

static uint64_t draw(struct model *m, uint64_t n)
{
    m->random = m->random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407); /* Knuth's MMIX */
    return (m->random >> 33) % n;
}

static int64_t model_age(const struct model *m, int i)
{
    int64_t age = m->notes[i].age_ms;

    for (int p = m->notes[i].parent; p >= 0; p = m->notes[p].parent)
        age = MAX(age, m->notes[p].age_ms);
    return age;
}

static int model_depth(const struct model *m, int i)
{
    int depth = 0;

    while ((i = m->notes[i].parent) >= 0)
        depth++;
    return depth;
}

static bool model_before(const struct model *m, int i, int k)
{
    int64_t x = model_age(m, i), y = model_age(m, k);

    if (x != y)
        return x < y;
    if (model_depth(m, i) != model_depth(m, k))
        return model_depth(m, i) < model_depth(m, k);
    if (m->notes[i].age_ms != m->notes[k].age_ms)
        return m->notes[i].age_ms < m->notes[k].age_ms;
    return strcmp(m->notes[i].name, m->notes[k].name) < 0;
}

static bool model_leaf(const struct model *m, int i)
{
    for (int k = 0; k < MODEL_NOTES; k++) {
        if (m->notes[k].there && m->notes[k].parent == i)
            return false;
    }
    return true;
}

/* The newest leaf, -1: there are no notes. */
static int model_current(const struct model *m)
{
    int best = -1;

    for (int i = 0; i < MODEL_NOTES; i++) {
        if (m->notes[i].there && model_leaf(m, i) && (best < 0 || model_before(m, best, i)))
            best = i;
    }
    return best;
}

static void model_add(struct model *m, struct box *b, int i)
{
    struct model_note *n = &m->notes[i];
    int how = (int)draw(m, 4), parent = (int)draw(m, MODEL_NOTES);
    const char *given = NULL;

    if (how == 0)
        given = "";
    else if (how == 1 && m->notes[parent].there)
        given = m->notes[parent].name;
    n->parent = !given ? model_current(m) : *given ? parent : -1;
    n->age_ms = (int64_t)draw(m, 50); /* many are equal, many backwards */
    (void)snprintf(n->name, sizeof(n->name), "%u.%%", ++m->nmade);
    assert_int_equal(box_add(b, n->name, given, n->age_ms), 0);
    n->there = true;
}

static void model_remove(struct model *m, struct box *b, int i)
{
    assert_int_equal(box_remove(b, m->notes[i].name), 0);
    m->notes[i].there = false;
    for (int k = 0; k < MODEL_NOTES; k++) {
        if (m->notes[k].there && m->notes[k].parent == i)
            m->notes[k].parent = m->notes[i].parent;
    }
}

static void model_compare(const struct model *m, const struct notes *set)
{
    size_t nthere = 0, nroots = 0, bytes = set->bytes;

    for (int i = 0; i < MODEL_NOTES; i++) {
        const struct model_note *expected = &m->notes[i];
        const struct note *n, *c;
        size_t nchildren = 0, nbelow = 0, position = 0;

        if (!expected->there)
            continue;
        nthere++;
        n = notes_find(set, expected->name);
        assert_non_null(n);
        assert_int_equal(n->depth, model_depth(m, i));
        assert_true(expected->parent < 0 ? !n->parent
                                         : n->parent && strcmp(n->parent->name, m->notes[expected->parent].name) == 0);
        for (int k = 0; k < MODEL_NOTES; k++) {
            int up = k;

            nchildren += m->notes[k].there && m->notes[k].parent == i;
            position += m->notes[k].there && model_before(m, k, i);
            while (m->notes[k].there && (up = m->notes[up].parent) >= 0)
                nbelow += up == i;
        }
        assert_ptr_equal(set->notes[position], n);
        assert_int_equal(n->nchildren, nchildren);
        for (c = n->child; c; c = c->sibling) {
            assert_ptr_equal(c->parent, n);
            nchildren--;
        }
        assert_int_equal(nchildren, 0);
        for (c = notes_below(n, n); c; c = notes_below(n, c)) {
            assert_true(notes_is_ancestor(n, c));
            nbelow--;
        }
        assert_int_equal(nbelow, 0);
        nroots += !n->parent;
        bytes -= n->bytes;
    }
    assert_int_equal(bytes, 0);
    assert_int_equal(set->nnotes, nthere);
    for (const struct note *r = set->root; r; r = r->sibling)
        nroots--;
    assert_int_equal(nroots, 0);
    if (nthere)
        assert_string_equal(notes_current(set)->name, m->notes[model_current(m)].name);
}

static void random_trees_stay_what_the_model_says_in_memory_and_in_files(void **state)
{
    struct box *b = *state;
    const char *given = getenv("QPULL_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 10) : (uint64_t)time(NULL);

    print_message("QPULL_TEST_SEED=%llu\n", (unsigned long long)seed);
    for (unsigned run = 0; run < MODEL_RUNS; run++) {
        struct model m = {.random = seed + run};

        for (unsigned step = 0; step < MODEL_STEPS; step++) {
            int i = (int)draw(&m, MODEL_NOTES);

            if (m.notes[i].there)
                model_remove(&m, b, i);
            else
                model_add(&m, b, i);
            model_compare(&m, b->set);
            if (draw(&m, 10) == 0) {
                struct notes *before = b->set;

                assert_int_equal(box_write(b), 0);
                b->set = NULL;
                box_load(b, VM);
                assert_int_equal(b->problems.nproblems, 0);
                box_same(before, b->set);
                notes_free(before);
                model_compare(&m, b->set);
            }
        }
        while (b->set->nnotes)
            assert_int_equal(box_remove(b, b->set->notes[0]->name), 0);
        assert_int_equal(box_write(b), 0);
    }
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, box_up, box_down)
    const struct CMUnitTest tests[] = {
        T(a_new_note_builds_on_the_newest_leaf),
        T(clocks_that_go_backwards_put_nobody_before_its_parent),
        T(a_disk_can_leave_a_note_that_goes_on),
        T(a_walk_below_meets_each_descendant_once_parents_first),
        T(deleting_gives_the_children_to_the_grandparent),
        T(deleting_what_has_no_note_succeeds),
        T(what_cannot_be_a_note_is_refused_in_words),
        T(a_note_that_would_outgrow_its_file_is_refused),
        T(all_notes_together_are_bounded),
        T(the_first_reason_stays_until_it_is_taken_back),
        T(the_record_in_qemu_decides_and_the_note_knows_why_it_is_gone),
        T(retention_drops_the_oldest_and_never_the_current),
        T(an_exported_set_comes_back_the_same),
        T(an_imported_note_replaces_in_place_and_keeps_its_children),
        T(a_document_that_does_not_fit_is_refused_and_changes_nothing),
        T(random_trees_stay_what_the_model_says_in_memory_and_in_files),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
