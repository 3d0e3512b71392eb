/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The memory as one JSON document, and its file. */
#include "backup/lineage_impl.h"
#include "backup/state_file.h"
#include "qmp/commands.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>

#define SUFFIX ".json"
#define ASIDE ".damaged"

static const char *const absences[] = {[ABSENCE_NONE] = "none", [ABSENCE_REMOVED] = "removed", [ABSENCE_AWAY] = "away"};

/* -- writing ------------------------------------------------------------------------------------------------------- */

static void put_uint(struct json_object *o, const char *key, uint64_t value)
{
    (void)json_object_object_add(o, key, json_object_new_uint64(value));
}

static struct json_object *image_to_json(const struct past_image *i)
{
    struct json_object *o = qmp_args_strings("file", i->file, NULL);

    put_uint(o, "dev", i->dev);
    put_uint(o, "ino", i->ino);
    (void)json_object_object_add(o, "born-ns", json_object_new_int64(i->born_ns));
    return o;
}

static struct json_object *past_to_json(const struct past *p)
{
    struct json_object *o =
        qmp_args_strings("name", p->name, "cause", cause_name(p->cause), "absence", absences[p->absence], NULL);
    struct json_object *roots = json_object_new_array();

    put_uint(o, "size", p->size);
    (void)json_object_object_add(o, "buried", json_object_new_boolean(p->buried));
    (void)json_object_object_add(o, "fill", json_object_new_boolean(p->fill));
    put_uint(o, "least", p->least);
    for (size_t i = 0; i < p->nroots; i++) {
        struct json_object *root = image_to_json(&p->roots[i].at);

        put_uint(root, "granularity", p->roots[i].granularity);
        put_uint(root, "dirty", p->roots[i].dirty);
        (void)json_object_object_add(root, "fill", json_object_new_boolean(p->roots[i].fill));
        (void)json_object_object_add(root, "commit", json_object_new_boolean(p->roots[i].commit));
        (void)json_object_array_add(roots, root);
    }
    (void)json_object_object_add(o, "roots", roots);
    return o;
}

static struct json_object *disk_to_json(const struct past_disk *d)
{
    struct json_object *o = qmp_args_strings("name", d->name, NULL);
    struct json_object *images = json_object_new_array(), *pasts = json_object_new_array(),
                       *retired = json_object_new_array();

    for (size_t i = 0; i < d->nimages; i++)
        (void)json_object_array_add(images, image_to_json(&d->images[i]));
    for (size_t i = 0; i < d->npasts; i++)
        (void)json_object_array_add(pasts, past_to_json(&d->pasts[i]));
    for (size_t i = 0; i < d->nretired; i++)
        (void)json_object_array_add(retired, image_to_json(&d->retired[i]));
    (void)json_object_object_add(o, "restored", json_object_new_boolean(d->restored));
    (void)json_object_object_add(o, "images", images);
    (void)json_object_object_add(o, "retired", retired);
    (void)json_object_object_add(o, "checkpoints", pasts);
    return o;
}

char *lineage_encode(const struct lineage *l, const char *vm)
{
    struct json_object *o = qmp_args_strings("vm", vm, NULL), *disks = json_object_new_array();
    const char *text;
    char *copy;

    (void)json_object_object_add(o, "format", json_object_new_int(LINEAGE_FORMAT));
    for (size_t i = 0; i < l->ndisks; i++)
        (void)json_object_array_add(disks, disk_to_json(&l->disks[i]));
    (void)json_object_object_add(o, "disks", disks);
    text = json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED);
    copy = text ? strdup(text) : NULL;
    json_object_put(o);
    return copy;
}

/* -- reading ------------------------------------------------------------------------------------------------------- */

static uint64_t get_uint(struct json_object *o, const char *key)
{
    return json_object_get_uint64(qmp_get(o, key));
}

static int image_of(struct json_object *o, struct past_image *i)
{
    const char *file = qmp_get_string(o, "file");

    if (!file)
        return -EBADMSG;
    *i = (struct past_image){.file = strdup(file),
                             .dev = get_uint(o, "dev"),
                             .ino = get_uint(o, "ino"),
                             .born_ns = qmp_get_int(o, "born-ns")};
    return i->file ? 0 : -ENOMEM;
}

static int roots_of(struct json_object *roots, struct past *p)
{
    size_t n = qmp_array_length(roots);

    if (n > ROOTS_MAX)
        return -E2BIG;
    for (; p->nroots < n; p->nroots++) {
        struct json_object *o = json_object_array_get_idx(roots, p->nroots);
        struct past_root *root = &p->roots[p->nroots];
        int r = image_of(o, &root->at);

        if (r < 0)
            return r;
        root->granularity = get_uint(o, "granularity");
        root->dirty = root->written = get_uint(o, "dirty");
        root->fill = qmp_get_bool(o, "fill");
        root->commit = qmp_get_bool(o, "commit");
    }
    return 0;
}

/* A word that is not known stands for something held against the checkpoint by a newer program. */
static enum cause cause_of(const char *name)
{
    for (int c = 0; name && c < CAUSE_NCAUSES; c++) {
        if (strcmp(cause_name((enum cause)c), name) == 0)
            return (enum cause)c;
    }
    return CAUSE_LAYER_GONE;
}

static enum absence absence_of(const char *name)
{
    for (size_t i = 0; name && i < ARRAY_SIZE(absences); i++) {
        if (strcmp(absences[i], name) == 0)
            return (enum absence)i;
    }
    return ABSENCE_AWAY;
}

static int past_of(struct json_object *o, struct past_disk *d)
{
    const char *name = qmp_get_string(o, "name");
    struct past *p;

    if (!name)
        return -EBADMSG;
    if (!(p = past_disk_add(d, name)))
        return -ENOMEM;
    p->size = get_uint(o, "size");
    p->cause = cause_of(qmp_get_string(o, "cause"));
    p->absence = absence_of(qmp_get_string(o, "absence"));
    p->buried = qmp_get_bool(o, "buried");
    p->fill = qmp_get_bool(o, "fill");
    p->least = get_uint(o, "least");
    return roots_of(qmp_get(o, "roots"), p);
}

static int disk_of(struct json_object *o, struct lineage *l)
{
    struct json_object *images = qmp_get(o, "images"), *pasts = qmp_get(o, "checkpoints"),
                       *retired = qmp_get(o, "retired");
    const char *name = qmp_get_string(o, "name");
    size_t nimages = qmp_array_length(images), npasts = qmp_array_length(pasts), nretired = qmp_array_length(retired);
    struct past_disk *d;
    int r = 0;

    if (!name)
        return -EBADMSG;
    if (npasts > LINEAGE_CHECKPOINTS_MAX || nretired > RETIRED_MAX)
        return -E2BIG;
    if (!(d = lineage_add_disk(l, name)) || !(d->images = calloc(nimages + 1, sizeof(*d->images))))
        return -ENOMEM;
    d->restored = qmp_get_bool(o, "restored");
    for (; r == 0 && d->nimages < nimages; d->nimages += r == 0)
        r = image_of(json_object_array_get_idx(images, d->nimages), &d->images[d->nimages]);
    for (; r == 0 && d->nretired < nretired; d->nretired += r == 0)
        r = image_of(json_object_array_get_idx(retired, d->nretired), &d->retired[d->nretired]);
    for (size_t i = 0; r == 0 && i < npasts; i++)
        r = past_of(json_object_array_get_idx(pasts, i), d);
    return r;
}

static int decode(struct json_object *o, struct lineage *l)
{
    struct json_object *disks = qmp_get(o, "disks");
    size_t n = qmp_array_length(disks);
    int r = 0;

    if (qmp_get_int(o, "format") != LINEAGE_FORMAT)
        return qmp_get(o, "format") ? -ENOTSUP : -EBADMSG;
    if (n > LINEAGE_DISKS_MAX)
        return -E2BIG;
    for (size_t i = 0; r == 0 && i < n; i++)
        r = disk_of(json_object_array_get_idx(disks, i), l);
    return r;
}

int lineage_decode(const char *text, size_t len, struct lineage **ret_lineage, struct failure *f)
{
    struct json_tokener *tokener = json_tokener_new();
    struct lineage *l = lineage_new();
    struct json_object *o = tokener ? json_tokener_parse_ex(tokener, text, (int)len) : NULL;
    int r = !tokener || !l ? -ENOMEM : !o ? -EBADMSG : decode(o, l);

    json_object_put(o);
    json_tokener_free(tokener);
    if (r < 0) {
        lineage_free(l);
        return failure_set(f, r,
                           r == -ENOMEM    ? "out of memory"
                           : r == -ENOTSUP ? "it is of another format, which a newer program wrote"
                           : r == -E2BIG   ? "it holds more than is possible"
                                           : "it is damaged");
    }
    *ret_lineage = l;
    return 0;
}

/* -- the file ------------------------------------------------------------------------------------------------------ */

static int load(int state_dir, const char *vm, struct lineage **ret_lineage, struct failure *f)
{
    _cleanup_fd_ int dir = state_open_dir(state_dir, LINEAGE_DIR);
    _cleanup_free_ char *text = NULL;
    char file[NAME_MAX + 1], aside[NAME_MAX + 1];
    size_t len = 0;
    int r = dir < 0 ? dir : state_read(dir, state_name(vm, SUFFIX, file), LINEAGE_FILE_MAX, &text, &len, f);

    if (r == 0)
        r = lineage_decode(text, len, ret_lineage, f);
    if (r < 0 && r != -ENOENT && r != -ENOMEM && dir >= 0)
        (void)renameat(dir, file, dir, state_name(vm, ASIDE, aside)); /* else it is replaced when it is written next */
    return r;
}

int lineage_load(int state_dir, const char *vm, struct lineage **ret_lineage, struct failure *f)
{
    struct failure why = {0};
    struct lineage *l = NULL;
    int r = load(state_dir, vm, &l, &why);

    if (r == -ENOMEM || (r < 0 && !(l = lineage_new())))
        return failure_set(f, -ENOMEM, "out of memory");
    if (r < 0 && r != -ENOENT)
        (void)failure_set(
            f, r,
            "what is remembered of the disks of VM '%s' cannot be read (" LINEAGE_DIR
            " in the state directory): %s. It is set aside; what others did to the disks while qpulld was "
            "away is not found out this time",
            vm, why.err ? why.text : strerror(-r));
    *ret_lineage = l;
    return 0;
}

int lineage_remove(int state_dir, const char *vm)
{
    _cleanup_fd_ int dir = state_open_dir(state_dir, LINEAGE_DIR);
    char file[NAME_MAX + 1];

    if (dir < 0)
        return dir == -ENOENT ? 0 : dir;
    if (unlinkat(dir, state_name(vm, SUFFIX, file), 0) < 0)
        return errno == ENOENT ? 0 : -errno;
    return fsync(dir) < 0 ? -errno : 0;
}

int lineage_save(int state_dir, const char *vm, const char *text, struct failure *f)
{
    _cleanup_fd_ int dir = -1;
    char file[NAME_MAX + 1];
    size_t len = strlen(text);
    int r = len > LINEAGE_FILE_MAX ? -E2BIG : state_make_dir(state_dir, LINEAGE_DIR);

    if (r == 0)
        r = dir = state_open_dir(state_dir, LINEAGE_DIR);
    if (r >= 0)
        r = state_replace(dir, state_name(vm, SUFFIX, file), text, len);
    if (r == 0 && fsync(dir) < 0)
        r = -errno;
    return r < 0 ? failure_set(f, r,
                               "cannot write what is remembered of the disks of VM '%s' (" LINEAGE_DIR
                               " in the state directory): %s",
                               vm, strerror(-r))
                 : 0;
}
