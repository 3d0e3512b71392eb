/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/place.h"

#include "qmp/commands.h"

#include <errno.h>
#include <stdio.h>

struct place {
    char *text;               /* owned */
    struct json_object *node; /* owned */
    bool disk, vm, session;   /* which names stand in it */
};

/* Drivers that forget what is written to them: a restored disk would be full of zeros. */
static const char *const forgetful[] = {"null-co", "null-aio"};
/* For tests of QEMU; their "image" is a node, where others have a word of their own by that name ("rbd"). */
static const char *const test_drivers[] = {"blkdebug", "blklogwrites", "blkreplay", "blkverify"};
/*
 * Keys that hold nodes. A name there would be somebody else's node: we would write to it, and cut its connection when
 * we let go of scratch that has stalled.
 */
static const char *const children[] = {"file", "backing", "target", "children", "data-file"};

/* -- the check ----------------------------------------------------------------------------------------------------- */

static int check_string(struct place *p, const char *s, struct failure *f)
{
    for (; *s; s++) {
        if (*s != '%')
            continue;
        switch (*++s) {
        case 'd':
            p->disk = true;
            break;
        case 'v':
            p->vm = true;
            break;
        case 's':
            p->session = true;
            break;
        case '%':
            break;
        default:
            return failure_set(f, -EINVAL,
                               "after \"%%\" there may be d (the disk), v (the VM), s (the session) or another %%");
        }
    }
    return 0;
}

static bool is_in(const char *const *list, size_t n, const char *s)
{
    for (size_t i = 0; i < n; i++) {
        if (strcmp(list[i], s) == 0)
            return true;
    }
    return false;
}

static int check_key(const char *key, struct json_object *value, struct failure *f)
{
    bool text = json_object_is_type(value, json_type_string);
    bool named = text && is_in(children, ARRAY_SIZE(children), key);

    for (size_t i = 0; is_in(children, ARRAY_SIZE(children), key) && i < qmp_array_length(value); i++)
        named |= json_object_is_type(json_object_array_get_idx(value, i), json_type_string);

    if (strcmp(key, "node-name") == 0)
        return failure_set(f, -EINVAL, "\"node-name\" is ours to choose");
    if (strcmp(key, "read-only") == 0 && json_object_get_boolean(value))
        return failure_set(f, -EINVAL, "\"read-only\": scratch is written to");
    if (named)
        return failure_set(
            f, -EINVAL, "\"%s\" names a node that is not ours; write the whole node in its place, as an object", key);
    if (strcmp(key, "driver") != 0)
        return 0;
    if (!text)
        return failure_set(f, -EINVAL, "\"driver\" is not a string");
    if (is_in(forgetful, ARRAY_SIZE(forgetful), json_object_get_string(value)))
        return failure_set(f, -EINVAL, "driver \"%s\" keeps nothing of what is written to it",
                           json_object_get_string(value));
    if (is_in(test_drivers, ARRAY_SIZE(test_drivers), json_object_get_string(value)))
        return failure_set(f, -EINVAL, "driver \"%s\" is for tests", json_object_get_string(value));
    return 0;
}

static int check_value(struct place *p, struct json_object *value, int depth, struct failure *f)
{
    int r = 0;

    if (depth > PLACE_DEPTH_MAX)
        return failure_set(f, -EINVAL, "more than %d objects in one another", PLACE_DEPTH_MAX);
    switch (json_object_get_type(value)) {
    case json_type_string:
        return check_string(p, json_object_get_string(value), f);
    case json_type_object: {
        json_object_object_foreach(value, key, member)
        {
            r = check_key(key, member, f);
            if (r == 0)
                r = check_value(p, member, depth + 1, f);
            if (r < 0)
                return r;
        }
        return 0;
    }
    case json_type_array:
        for (size_t i = 0; r == 0 && i < json_object_array_length(value); i++)
            r = check_value(p, json_object_array_get_idx(value, i), depth + 1, f);
        return r;
    default:
        return 0;
    }
}

static int parse_json(const char *text, struct json_object **ret_node, struct failure *f)
{
    struct json_tokener *t = json_tokener_new();
    enum json_tokener_error error;
    size_t end;
    int r = 0;

    if (!t)
        return failure_set(f, -ENOMEM, "out of memory");
    json_tokener_set_flags(t, JSON_TOKENER_STRICT);
    *ret_node = json_tokener_parse_ex(t, text, (int)strlen(text) + 1);
    error = json_tokener_get_error(t);
    end = json_tokener_get_parse_end(t);
    if (error == json_tokener_continue || error == json_tokener_error_parse_eof)
        r = failure_set(f, -EAGAIN, "the JSON object has no end");
    else if (error != json_tokener_success)
        r = failure_set(f, -EINVAL, "no JSON at \"%.20s\": %s", text + end, json_tokener_error_desc(error));
    json_tokener_free(t);
    if (r == 0 && !json_object_object_get_ex(*ret_node, "driver", NULL))
        r = failure_set(f, -EINVAL, "the JSON object has no \"driver\"");
    return r;
}

int place_parse(const char *text, struct place **ret_place, struct failure *f)
{
    struct place *p;
    int r;

    if (strlen(text) > PLACE_TEXT_MAX)
        return failure_set(f, -EINVAL, "the JSON object is longer than %u bytes", PLACE_TEXT_MAX);
    p = calloc(1, sizeof(*p));
    if (!p || !(p->text = strdup(text))) {
        free(p);
        return failure_set(f, -ENOMEM, "out of memory");
    }
    r = parse_json(text, &p->node, f);
    if (r == 0)
        r = check_value(p, p->node, 1, f);
    if (r < 0) {
        place_free(p);
        return r;
    }
    *ret_place = p;
    return 0;
}

void place_free(struct place *p)
{
    if (!p)
        return;
    json_object_put(p->node);
    free(p->text);
    free(p);
}

const char *place_text(const struct place *p)
{
    return p->text;
}

bool place_tells_disks(const struct place *p)
{
    return p->disk;
}

bool place_tells_vms(const struct place *p)
{
    return p->vm || p->session;
}

/* -- one disk's node ----------------------------------------------------------------------------------------------- */

static int check_name(const char *what, const char *name, struct failure *f)
{
    /* It may become a part of a path or of a URI. */
    if (strchr(name, '/') || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return failure_set(f, -EINVAL, "the %s's name '%s' cannot stand in the name of a scratch place", what, name);
    return 0;
}

/* NULL: out of memory. */
static char *expand(const char *from, const struct place_names *names)
{
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    bool bad;

    if (!out)
        return NULL;
    for (; *from; from++) {
        if (*from != '%') {
            (void)fputc(*from, out);
            continue;
        }
        switch (*++from) {
        case 'd':
            (void)fputs(names->disk, out);
            break;
        case 'v':
            (void)fputs(names->vm, out);
            break;
        case 's':
            (void)fputs(names->session, out);
            break;
        default: /* "%%": all others were refused */
            (void)fputc('%', out);
            break;
        }
    }
    bad = ferror(out);
    bad |= fclose(out) != 0;
    if (bad)
        free(TAKE_PTR(text));
    return text;
}

/* What a node wants to be good scratch, where the object does not say it. */
static void complete_node(struct json_object *node)
{
    struct json_object *driver;

    if (!json_object_object_get_ex(node, "driver", &driver))
        return;
    if (!json_object_object_get_ex(node, "discard", NULL))
        (void)json_object_object_add(node, "discard", json_object_new_string("unmap"));
    if (strcmp(json_object_get_string(driver), "nbd") == 0 && !json_object_object_get_ex(node, "open-timeout", NULL))
        (void)json_object_object_add(node, "open-timeout", json_object_new_int(PLACE_OPEN_TIMEOUT_S));
}

/* A deep copy with the names in it. NULL: out of memory, or JSON's own null. */
static struct json_object *fill_in(struct json_object *from, const struct place_names *names, bool *failed)
{
    struct json_object *to = NULL;

    switch (json_object_get_type(from)) {
    case json_type_string: {
        _cleanup_free_ char *text = expand(json_object_get_string(from), names);

        *failed |= !text || !(to = json_object_new_string(text));
        return to;
    }
    case json_type_object: {
        to = json_object_new_object();
        json_object_object_foreach(from, key, member) *failed |=
            !to || json_object_object_add(to, key, fill_in(member, names, failed)) < 0;
        if (to)
            complete_node(to);
        return to;
    }
    case json_type_array:
        to = json_object_new_array();
        for (size_t i = 0; i < json_object_array_length(from); i++)
            *failed |= !to || json_object_array_add(to, fill_in(json_object_array_get_idx(from, i), names, failed)) < 0;
        return to;
    default:
        return json_object_get(from);
    }
}

int place_node(const struct place *p, const struct place_names *names, struct json_object **ret_args, struct failure *f)
{
    struct json_object *node;
    bool failed = false;

    if ((p->disk && check_name("disk", names->disk, f) < 0) || (p->vm && check_name("VM", names->vm, f) < 0))
        return f->err;
    node = fill_in(p->node, names, &failed);
    if (failed || !node) {
        json_object_put(node);
        return failure_set(f, -ENOMEM, "out of memory");
    }
    *ret_args = node;
    return 0;
}
