/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a QEMU says about its disks, under any answers: one JSON array of query-block, query-named-block-nodes and
 * x-debug-query-block-graph. A list of disks that can be walked comes of it, or a sentence.
 */
#include "backup/disks.h"
#include "fuzz.h"
#include "qmp/commands.h"

#include <errno.h>

static size_t walk(const char *s)
{
    CHECK(s);
    return strlen(s);
}

static void check(const struct disk_list *l)
{
    size_t n = 0;

    for (size_t i = 0; i < l->ndisks; i++) {
        const struct disk *d = &l->disks[i];

        n += walk(d->name) + walk(d->node) + walk(d->top) + walk(d->format) + walk(d->session);
        CHECK(d->nimages > 0 && strcmp(d->images[0].node, d->top) == 0);
        CHECK(disk_list_find(l, d->name) == d);
        for (size_t k = 0; k < d->nimages; k++)
            n += walk(d->images[k].node) + walk(d->images[k].file);
        for (size_t k = 0; k < d->ncheckpoints; k++) {
            const struct checkpoint *c = &d->checkpoints[k];

            n += walk(c->name) + walk(checkpoint_text(c)) + walk(reason_name(c->reason));
            CHECK(disk_checkpoint(d, c->name) == c);
            for (size_t m = 0; m < c->nlayers; m++) {
                CHECK(c->layers[m].depth < d->nimages);
                n += walk(c->layers[m].node);
            }
        }
    }
    CHECK(n < SIZE_MAX);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    _cleanup_free_ char *text = input_string(&in);
    struct json_object *all = json_tokener_parse(text), *block, *named, *graph;
    struct disk_list *list = NULL, *copy;
    struct failure why = {0};
    int r;

    if (json_object_is_type(all, json_type_array) && json_object_array_length(all) >= 3) {
        block = json_object_array_get_idx(all, 0);
        named = json_object_array_get_idx(all, 1);
        graph = json_object_array_get_idx(all, 2);
        (void)answers_agree(block, named, graph);
        r = disk_list_parse(block, named, graph, &list, &why);
        CHECK((r < 0) == (list == NULL) && (r >= 0 || why.text[0]));
        if (list) {
            check(list);
            copy = disk_list_copy(list);
            CHECK(copy);
            check(copy);
            disk_list_free(copy);
        }
        disk_list_free(list);
    }
    json_object_put(all);
    return 0;
}
