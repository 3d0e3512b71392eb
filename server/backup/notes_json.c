/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Notes as documents: one file's content, and the export of a whole set. Keys that we do not know are kept as text and
 * written again. Names go through byte by byte, also where they are not UTF-8 (QEMU's monitor makes no such bitmaps).
 */
#include "backup/notes_impl.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <time.h>

#define FILE_DEPTH 32  /* levels of nesting in a file */
#define EXTRA_DEPTH 24 /* likewise in a value that we do not know: it stands at most three levels down */
#define MS_PER_S 1000
#define RFC3339_SIZE 32 /* "9999-12-31T23:59:59.999Z" has 24 */

static const char *const note_keys[] = {"format", "name",        "vm",    "created", "created_ms",
                                        "parent", "description", "disks", "broken",  NULL};
static const char *const disk_keys[] = {"name", "size", "node", "file", NULL};
static const char *const broken_keys[] = {"disk", "reason", "text", NULL};

static void json_putp(struct json_object **o)
{
    (void)json_object_put(*o); /* NULL is fine */
}
#define _cleanup_json_ _cleanup_(json_putp)

static void tokener_freep(struct json_tokener **t)
{
    if (*t)
        json_tokener_free(*t);
}

/* -- writing ------------------------------------------------------------------------------------------------------- */

/* value is moved; NULL: out of memory */
static bool put(struct json_object *o, const char *key, struct json_object *value)
{
    if (!value)
        return false;
    if (json_object_object_add(o, key, value) == 0)
        return true;
    (void)json_object_put(value);
    return false;
}

/* NULL becomes null. */
static bool put_text(struct json_object *o, const char *key, const char *text)
{
    return text ? put(o, key, json_object_new_string(text)) : json_object_object_add(o, key, NULL) == 0;
}

static bool put_hint(struct json_object *o, const char *key, const char *text)
{
    return !text || put_text(o, key, text);
}

static bool put_created(struct json_object *o, int64_t created_ms)
{
    char text[RFC3339_SIZE], day[RFC3339_SIZE];
    time_t s = created_ms / MS_PER_S;
    struct tm tm;

    if (!gmtime_r(&s, &tm) || !strftime(day, sizeof(day), "%Y-%m-%dT%H:%M:%S", &tm))
        return false;
    (void)snprintf(text, sizeof(text), "%.19s.%03dZ", day, (int)(created_ms % MS_PER_S));
    return put_text(o, "created", text) && put(o, "created_ms", json_object_new_int64(created_ms));
}

static bool put_extra(struct json_object *o, const char *extra)
{
    _cleanup_json_ struct json_object *e = NULL;

    if (!extra)
        return true;
    e = json_tokener_parse(extra);
    if (!e)
        return false;
    json_object_object_foreach(e, key, value)
    {
        if (json_object_object_add(o, key, json_object_get(value)) < 0) {
            (void)json_object_put(value);
            return false;
        }
    }
    return true;
}

static struct json_object *encode_disks(const struct note *n)
{
    _cleanup_json_ struct json_object *a = json_object_new_array();

    for (size_t i = 0; a && i < n->ndisks; i++) {
        const struct note_disk *d = &n->disks[i];
        struct json_object *o = json_object_new_object();

        if (!o || json_object_array_add(a, o) < 0) {
            (void)json_object_put(o);
            return NULL;
        }
        if (!put_text(o, "name", d->name) || !put(o, "size", json_object_new_uint64(d->size)) ||
            !put_hint(o, "node", d->node) || !put_hint(o, "file", d->file) || !put_extra(o, d->extra))
            return NULL;
    }
    return TAKE_PTR(a);
}

static bool put_broken(struct json_object *o, const struct note_broken *b)
{
    _cleanup_json_ struct json_object *v = NULL;

    if (!b->reason)
        return put_text(o, "broken", NULL);
    v = json_object_new_object();
    return v && put_text(v, "disk", b->disk) && put_text(v, "reason", b->reason) && put_text(v, "text", b->text) &&
           put_extra(v, b->extra) && put(o, "broken", TAKE_PTR(v));
}

static struct json_object *note_to_json(const struct note *n, const char *vm, const char *parent)
{
    _cleanup_json_ struct json_object *o = json_object_new_object();

    if (!o || !put(o, "format", json_object_new_int(NOTES_FORMAT)) || !put_text(o, "name", n->name) ||
        !put_text(o, "vm", vm) || !put_created(o, n->created_ms) || !put_text(o, "parent", parent) ||
        !put_text(o, "description", n->description) || !put(o, "disks", encode_disks(n)) ||
        !put_broken(o, &n->broken) || !put_extra(o, n->extra))
        return NULL;
    return TAKE_PTR(o);
}

char *note_encode(const struct note *n, const char *vm)
{
    _cleanup_json_ struct json_object *o = note_to_json(n, vm, n->parent_name);
    const char *text;
    size_t len;
    char *out;

    if (!o)
        return NULL;
    text = json_object_to_json_string_length(
        o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED | JSON_C_TO_STRING_NOSLASHESCAPE, &len);
    if (!text)
        return NULL;
    out = malloc(len + 2);
    if (!out)
        return NULL;
    memcpy(out, text, len);
    memcpy(out + len, "\n", 2);
    return out;
}

struct json_object *notes_export(const struct notes *set)
{
    _cleanup_json_ struct json_object *doc = json_object_new_object();
    struct json_object *a = json_object_new_array();

    if (!doc || !a || json_object_object_add(doc, "checkpoints", a) < 0) {
        (void)json_object_put(a);
        return NULL;
    }
    for (size_t i = 0; i < set->nnotes; i++) {
        const struct note *n = set->notes[i];
        struct json_object *o = note_to_json(n, set->vm, n->parent ? n->parent->name : NULL);

        if (!o || json_object_array_add(a, o) < 0) {
            (void)json_object_put(o);
            return NULL;
        }
    }
    if (!put(doc, "format", json_object_new_int(NOTES_FORMAT)) || !put_text(doc, "vm", set->vm))
        return NULL;
    return TAKE_PTR(doc);
}

/* -- reading ------------------------------------------------------------------------------------------------------- */

static int damaged(struct failure *f, const char *key, const char *what)
{
    (void)failure_set(f, -EBADMSG, "its \"%s\" %s", key, what);
    return -EBADMSG;
}

static int no_memory(struct failure *f)
{
    (void)failure_set(f, -ENOMEM, "out of memory for the notes of checkpoints");
    return -ENOMEM;
}

/* Owned by the caller; absent or null: NULL. */
static int get_text(struct json_object *o, const char *key, char **ret_text, struct failure *f)
{
    struct json_object *v = NULL;
    char *text;

    if (!json_object_object_get_ex(o, key, &v) || !v)
        return 0;
    if (!json_object_is_type(v, json_type_string))
        return damaged(f, key, "is not a text");
    text = strdup(json_object_get_string(v));
    if (!text)
        return no_memory(f);
    if (strlen(text) != (size_t)json_object_get_string_len(v)) {
        free(text);
        return damaged(f, key, "holds a zero byte");
    }
    *ret_text = text;
    return 0;
}

static int get_text_always(struct json_object *o, const char *key, char **ret_text, struct failure *f)
{
    int r = get_text(o, key, ret_text, f);

    return r == 0 && !*ret_text ? damaged(f, key, "is missing") : r;
}

static int get_number(struct json_object *o, const char *key, uint64_t max, uint64_t *ret_number, struct failure *f)
{
    struct json_object *v = NULL;

    if (!json_object_object_get_ex(o, key, &v))
        return damaged(f, key, "is missing");
    /* json-c gives 0 for a negative number that is asked for as uint64, and cuts one that is too large. */
    if (!json_object_is_type(v, json_type_int) || json_object_get_int64(v) < 0 || json_object_get_uint64(v) > max)
        return damaged(f, key, "is not a number, or out of range");
    *ret_number = json_object_get_uint64(v);
    return 0;
}

static int get_format(struct json_object *o, struct failure *f)
{
    uint64_t format = 0;
    int r = get_number(o, "format", INT32_MAX, &format, f);

    if (r < 0)
        return r;
    if (format != NOTES_FORMAT)
        return failure_set(f, -ENOTSUP, "it is of format %" PRIu64 ", this program reads format %d only", format,
                           NOTES_FORMAT);
    return 0;
}

static bool is_known(const char *key, const char *const *known)
{
    for (; *known; known++) {
        if (strcmp(*known, key) == 0)
            return true;
    }
    return false;
}

/* What is not known of o, as text. */
static int get_extra(struct json_object *o, const char *const *known, char **ret_extra, struct failure *f)
{
    _cleanup_json_ struct json_object *e = json_object_new_object(), *again = NULL;
    _cleanup_(tokener_freep) struct json_tokener *t = NULL;
    const char *text;

    if (!e)
        return no_memory(f);
    json_object_object_foreach(o, key, value)
    {
        if (!is_known(key, known) && json_object_object_add(e, key, json_object_get(value)) < 0) {
            (void)json_object_put(value);
            return no_memory(f);
        }
    }
    if (json_object_object_length(e) == 0)
        return 0;
    text = json_object_to_json_string_ext(e, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);
    t = json_tokener_new_ex(EXTRA_DEPTH);
    if (!text || !t)
        return no_memory(f);
    again = json_tokener_parse_ex(t, text, -1);
    if (!again)
        return failure_set(f, -EBADMSG, "it has unknown keys that are nested too deeply");
    *ret_extra = strdup(text);
    return *ret_extra ? 0 : no_memory(f);
}

static int decode_disk(struct json_object *o, struct note_disk *d, struct failure *f)
{
    int r;

    if (!json_object_is_type(o, json_type_object))
        return damaged(f, "disks", "are not all objects");
    r = get_text_always(o, "name", &d->name, f);
    r = r < 0 ? r : get_number(o, "size", UINT64_MAX, &d->size, f);
    r = r < 0 ? r : get_text(o, "node", &d->node, f);
    r = r < 0 ? r : get_text(o, "file", &d->file, f);
    return r < 0 ? r : get_extra(o, disk_keys, &d->extra, f);
}

static int decode_disks(struct json_object *o, struct note *n, struct failure *f)
{
    struct json_object *a = NULL;
    size_t ndisks;
    int r = 0;

    if (!json_object_object_get_ex(o, "disks", &a) || !json_object_is_type(a, json_type_array))
        return damaged(f, "disks", "are missing or not an array");
    ndisks = json_object_array_length(a);
    if (ndisks > NOTES_DISKS_MAX)
        return damaged(f, "disks", "are too many");
    if (ndisks)
        n->disks = calloc(ndisks, sizeof(*n->disks));
    if (ndisks && !n->disks)
        return no_memory(f);
    while (r == 0 && n->ndisks < ndisks) {
        r = decode_disk(json_object_array_get_idx(a, n->ndisks), &n->disks[n->ndisks], f);
        n->ndisks++;
    }
    return r;
}

static int decode_broken(struct json_object *o, struct note_broken *b, struct failure *f)
{
    struct json_object *v = NULL;
    int r;

    if (!json_object_object_get_ex(o, "broken", &v) || !v)
        return 0;
    if (!json_object_is_type(v, json_type_object))
        return damaged(f, "broken", "is neither null nor an object");
    r = get_text(v, "disk", &b->disk, f);
    r = r < 0 ? r : get_text_always(v, "reason", &b->reason, f);
    r = r < 0 ? r : get_text(v, "text", &b->text, f);
    r = r < 0 ? r : get_extra(v, broken_keys, &b->extra, f);
    if (r == 0 && !b->text)
        b->text = strdup("");
    return r == 0 && !b->text ? no_memory(f) : r;
}

static int note_from_json(struct json_object *o, struct note **ret_note, char **ret_vm, struct failure *f)
{
    _cleanup_(note_freep) struct note *n = calloc(1, sizeof(*n));
    _cleanup_free_ char *vm = NULL;
    uint64_t created = 0;
    int r;

    if (!n)
        return no_memory(f);
    if (!json_object_is_type(o, json_type_object))
        return failure_set(f, -EBADMSG, "it is not a JSON object");
    r = get_format(o, f);
    r = r < 0 ? r : get_text_always(o, "name", &n->name, f);
    r = r < 0 ? r : get_text_always(o, "vm", &vm, f);
    r = r < 0 ? r : get_number(o, "created_ms", NOTES_CREATED_MAX, &created, f);
    r = r < 0 ? r : get_text(o, "parent", &n->parent_name, f);
    r = r < 0 ? r : get_text(o, "description", &n->description, f);
    r = r < 0 ? r : decode_disks(o, n, f);
    r = r < 0 ? r : decode_broken(o, &n->broken, f);
    r = r < 0 ? r : get_extra(o, note_keys, &n->extra, f);
    if (r < 0)
        return r;
    n->created_ms = (int64_t)created;
    if (!n->description)
        n->description = strdup("");
    if (!n->description)
        return no_memory(f);
    r = note_check(n->name, n->created_ms, n->description, n->disks, n->ndisks, f);
    if (r < 0)
        return r;
    *ret_note = TAKE_PTR(n);
    if (ret_vm)
        *ret_vm = TAKE_PTR(vm);
    return 0;
}

int note_decode(const char *text, size_t len, struct note **ret_note, char **ret_vm, struct failure *f)
{
    _cleanup_(tokener_freep) struct json_tokener *t = json_tokener_new_ex(FILE_DEPTH);
    _cleanup_json_ struct json_object *o = NULL;
    enum json_tokener_error error;
    size_t end;
    int r;

    if (!t)
        return no_memory(f);
    o = json_tokener_parse_ex(t, text, (int)MIN(len, (size_t)NOTES_FILE_MAX));
    error = json_tokener_get_error(t);
    end = json_tokener_get_parse_end(t);
    if (!o && error == json_tokener_continue)
        return failure_set(f, -EBADMSG, "it ends in the middle (after %zu bytes)", len);
    if (!o)
        return failure_set(f, -EBADMSG, "it is not JSON (byte %zu: %s)", end, json_tokener_error_desc(error));
    while (end < len && text[end] && strchr(" \t\r\n", text[end]))
        end++;
    if (end != len)
        return failure_set(f, -EBADMSG, "something follows its end (byte %zu)", end);
    r = note_from_json(o, ret_note, ret_vm, f);
    if (r == 0)
        (*ret_note)->bytes = len;
    return r;
}

/* -- taking in a document ------------------------------------------------------------------------------------------ */

/* The notes of the document, in an own set without relations. */
static int decode_document(struct notes *fresh, struct json_object *doc, struct failure *f)
{
    struct json_object *a = NULL;
    _cleanup_free_ char *vm = NULL;
    int r;

    if (!json_object_is_type(doc, json_type_object))
        return failure_set(f, -EINVAL, "the document is not a JSON object");
    r = get_format(doc, f);
    r = r < 0 ? r : get_text_always(doc, "vm", &vm, f);
    if (r < 0)
        return r;
    if (strcmp(vm, fresh->vm) != 0)
        return failure_set(f, -EINVAL,
                           "the document has the notes of VM '%s', not of VM '%s'; if it is the same VM, "
                           "change the names in the document",
                           vm, fresh->vm);
    if (!json_object_object_get_ex(doc, "checkpoints", &a) || !json_object_is_type(a, json_type_array))
        return damaged(f, "checkpoints", "are missing or not an array");
    r = notes_check_room(fresh, json_object_array_length(a), 0, f);
    if (r < 0)
        return r;
    if (notes_reserve(fresh, json_object_array_length(a)) < 0)
        return no_memory(f);
    for (size_t i = 0; i < json_object_array_length(a); i++) {
        _cleanup_free_ char *note_vm = NULL;
        struct failure why = {0};
        struct note *n = NULL;

        r = note_from_json(json_object_array_get_idx(a, i), &n, &note_vm, &why);
        if (r < 0 || !n || !note_vm)
            return failure_set(f, r, "note %zu of the document: %s", i + 1, why.text);
        notes_append(fresh, n);
        if (strcmp(note_vm, fresh->vm) != 0)
            return failure_set(f, -EINVAL, "note %zu of the document, '%s', is of VM '%s', not of VM '%s'", i + 1,
                               n->name, note_vm, fresh->vm);
    }
    return 0;
}

/* Whether fresh and what stays of set make a sound whole; `whole` has room for both and borrows their notes. */
static int check_whole(struct notes *whole, const struct notes *set, struct notes *fresh, struct failure *f)
{
    for (size_t i = 1; i < fresh->nnotes; i++) {
        if (strcmp(fresh->by_name[i - 1]->name, fresh->by_name[i]->name) == 0)
            return failure_set(f, -EINVAL, "the document has two notes of checkpoint '%s'", fresh->by_name[i]->name);
    }
    for (size_t i = 0; i < set->nnotes; i++) {
        if (!notes_find(fresh, set->notes[i]->name))
            notes_append(whole, set->notes[i]);
    }
    for (size_t i = 0; i < fresh->nnotes; i++)
        notes_append(whole, fresh->notes[i]);
    (void)notes_relink(whole);
    for (size_t i = 0; i < whole->nnotes; i++) {
        if (whole->notes[i]->cyclic)
            return failure_set(f, -EINVAL,
                               "checkpoint '%s' would be its own ancestor; correct the parents in the "
                               "document",
                               whole->notes[i]->name);
    }
    for (size_t i = 0; i < fresh->nnotes; i++) {
        if (fresh->notes[i]->parent_name && !fresh->notes[i]->parent)
            return failure_set(f, -EINVAL,
                               "checkpoint '%s' has a parent that neither the document nor VM '%s' has: "
                               "'%s'",
                               fresh->notes[i]->name, set->vm, fresh->notes[i]->parent_name);
    }
    return notes_check_room(whole, whole->nnotes, whole->bytes, f);
}

static int push_fresh(struct notes *fresh, struct notes_change *change, struct failure *f)
{
    for (size_t i = 0; i < fresh->nnotes; i++) {
        struct note *n = fresh->notes[i];
        char *text = note_encode(n, fresh->vm);

        if (!text)
            return no_memory(f);
        fresh->bytes += n->bytes = strlen(text);
        if (n->bytes > NOTES_FILE_MAX) {
            free(text);
            return failure_set(f, -E2BIG, "the note of checkpoint '%s' has %zu bytes, at most %u are kept", n->name,
                               n->bytes, NOTES_FILE_MAX);
        }
        if (notes_change_push(change, n->name, text) < 0)
            return no_memory(f);
    }
    return 0;
}

static void notes_freep(struct notes **set)
{
    notes_free(*set);
}

int notes_import(struct notes *set, struct json_object *doc, struct notes_change *change, struct failure *f)
{
    _cleanup_(notes_freep) struct notes *fresh = notes_new(set->vm), *whole = notes_new(set->vm);
    size_t nops = change->nops;
    int r;

    if (!fresh || !whole)
        return no_memory(f);
    r = decode_document(fresh, doc, f);
    if (r == 0)
        (void)notes_relink(fresh);
    if (r == 0 && notes_reserve(whole, set->nnotes + fresh->nnotes) < 0)
        r = no_memory(f);
    if (r == 0) /* parents first: stopped in between, nobody stands below nobody */
        r = push_fresh(fresh, change, f);
    if (r == 0)
        r = check_whole(whole, set, fresh, f);
    if (r < 0) {
        notes_change_cut(change, nops);
        whole->nnotes = 0;       /* they belong to the other two */
        (void)notes_relink(set); /* the relations of the whole stand in them */
        return r;
    }
    for (size_t i = 0; i < set->nnotes; i++) {
        if (notes_find(fresh, set->notes[i]->name))
            note_free(set->notes[i]);
    }
    fresh->nnotes = set->nnotes = 0; /* all are in the whole now */
    free(TAKE_PTR(set->notes));
    free(TAKE_PTR(set->by_name));
    free(set->vm);
    *set = *whole;
    *whole = (struct notes){0};
    return 0;
}
