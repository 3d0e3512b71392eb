/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpull_table: tables for people, and the members of answers. */
#include "qpull.h"

#include <inttypes.h>
#include <stdio.h>

static void out_of_memory(void)
{
    (void)complain("out of memory");
    exit(EXIT_FAILED); /* NOLINT(concurrency-mt-unsafe): one thread */
}

void table_add(struct table *t, const char *fmt, ...)
{
    char **cells = reallocarray(t->cells, t->ncells + 1, sizeof *cells);
    char *text = NULL;
    va_list ap;

    if (!cells)
        out_of_memory();
    t->cells = cells;
    va_start(ap, fmt);
    if (vasprintf(&text, fmt, ap) < 0)
        out_of_memory();
    va_end(ap);
    /* Names come from QEMU and from clients: none may steer the terminal. */
    for (unsigned char *s = (unsigned char *)text; *s; s++)
        if (*s < 0x20 || *s == 0x7f || (s[0] == 0xc2 && s[1] >= 0x80 && s[1] < 0xa0))
            *s = '?';
    cells[t->ncells++] = text;
}

/* Characters, not bytes: good enough for names; wide ones put their line out of step and nothing else. */
static size_t width_of(const char *text)
{
    size_t n = 0;

    for (; *text; text++)
        n += ((unsigned char)*text & 0xc0) != 0x80;
    return n;
}

static void print_cell(const char *text, size_t width, bool right, bool last)
{
    int pad = (int)(width - width_of(text));

    if (right)
        printf("%*s%s", pad, "", text);
    else
        printf("%s%*s", text, last ? 0 : pad, "");
    printf("%s", last ? "\n" : "  ");
}

void table_print(const struct table *t)
{
    size_t widths[TABLE_COLUMNS_MAX];

    if (t->ncolumns == 0)
        return;
    for (size_t c = 0; c < t->ncolumns; c++) {
        widths[c] = width_of(t->columns[c].title);
        for (size_t i = c; i < t->ncells; i += t->ncolumns)
            widths[c] = MAX(widths[c], width_of(t->cells[i]));
    }
    for (size_t c = 0; c < t->ncolumns; c++)
        print_cell(t->columns[c].title, widths[c], t->columns[c].right, c + 1 == t->ncolumns);
    for (size_t i = 0; i < t->ncells; i++) {
        size_t c = i % t->ncolumns;
        print_cell(t->cells[i], widths[c], t->columns[c].right, c + 1 == t->ncolumns);
    }
}

void table_done(struct table *t)
{
    for (size_t i = 0; i < t->ncells; i++)
        free(t->cells[i]);
    free(t->cells);
    t->cells = NULL;
    t->ncells = 0;
}

const char *size_text(char to[32], uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double n = (double)bytes;
    size_t unit = 0;

    while (n >= 1024 && unit + 1 < ARRAY_SIZE(units)) {
        n /= 1024;
        unit++;
    }
    (void)snprintf(to, 32, n == (double)(uint64_t)n ? "%.0f %s" : "%.1f %s", n, units[unit]);
    return to;
}

const char *time_text(char to[32], uint64_t seconds)
{
    char days[24] = "";

    if (seconds >= 86400)
        (void)snprintf(days, sizeof days, "%" PRIu64 "d ", seconds / 86400);
    (void)snprintf(to, 32, "%s%02u:%02u:%02u", days, (unsigned)(seconds / 3600 % 24), (unsigned)(seconds / 60 % 60),
                   (unsigned)(seconds % 60));
    return to;
}

void print_json(struct json_object *o)
{
    printf("%s\n", json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED |
                                                         JSON_C_TO_STRING_NOSLASHESCAPE));
}

static struct json_object *member(struct json_object *o, const char *key, enum json_type type)
{
    struct json_object *value;

    if (!json_object_object_get_ex(o, key, &value) || !json_object_is_type(value, type))
        return NULL;
    return value;
}

const char *answer_text(struct json_object *o, const char *key)
{
    struct json_object *value = member(o, key, json_type_string);

    return value ? json_object_get_string(value) : NULL;
}

uint64_t answer_number(struct json_object *o, const char *key)
{
    struct json_object *value = member(o, key, json_type_int);

    return value ? json_object_get_uint64(value) : 0;
}

bool answer_bool(struct json_object *o, const char *key)
{
    struct json_object *value = member(o, key, json_type_boolean);

    return value && json_object_get_boolean(value);
}

struct json_object *answer_array(struct json_object *o, const char *key)
{
    return member(o, key, json_type_array);
}
