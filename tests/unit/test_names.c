/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* How our things in a QEMU are called, and what a checkpoint may be called. */
#include "backup/names.h"
#include "lib/test.h"

#include <errno.h>
#include <stdio.h>

#define ID "0123abcd"

static void every_name_is_taken_apart_as_it_was_made(void **state)
{
    static const unsigned numbers[] = {0, 1, 9, 10, 99, 100, NAMES_MAX_DISKS};

    for (unsigned k = 0; k < NAMES_NKINDS; k++) {
        for (size_t i = 0; i < ARRAY_SIZE(numbers); i++) {
            char name[NAMES_SIZE], id[NAMES_ID_SIZE] = "";
            enum names_kind kind = NAMES_NKINDS;
            unsigned n = ~0u;

            assert_ptr_equal(names_make(name, ID, (enum names_kind)k, numbers[i]), name);
            assert_true(strlen(name) < NAMES_SIZE - 1); /* so snprintf() has cut nothing */
            assert_true(names_is_ours(name));
            assert_true(names_parse(name, id, &kind, &n));
            assert_string_equal(id, ID);
            assert_int_equal(kind, k);
            assert_int_equal(n, numbers[i]);
        }
    }
}

static void names_of_different_things_differ(void **state)
{
    char a[NAMES_SIZE], b[NAMES_SIZE];

    for (unsigned i = 0; i < NAMES_NKINDS; i++) {
        for (unsigned k = 0; k < NAMES_NKINDS; k++) {
            bool same = strcmp(names_make(a, ID, (enum names_kind)i, 1), names_make(b, ID, (enum names_kind)k, 1)) == 0;

            assert_int_equal(same, i == k);
        }
    }
    assert_string_not_equal(names_make(a, ID, NAMES_CBW, 1), names_make(b, ID, NAMES_CBW, 11));
    assert_string_not_equal(names_make(a, ID, NAMES_CBW, 1), names_make(b, "0123abce", NAMES_CBW, 1));
}

static void what_is_not_ours_to_the_letter_is_not_taken_apart(void **state)
{
    static const char *const foreign[] = {
        "",
        "vda",
        "qpull",
        "qpull-",
        "Qpull-0123abcd-cbw0",
        " qpull-0123abcd-cbw0",
        "qpull-0123abcd",
        "qpull-0123abcd-",
        "qpull-0123abcd-cbw", /* no number */
        "qpull-0123abcd-cbw-1",
        "qpull-0123abcd-cbw0000", /* we number up to 999 */
        "qpull-0123abcd-cbw0 ",
        "qpull-0123abcd-cbw0x",
        "qpull-0123abcd-cbwx0",
        "qpull-0123abcd-other0",
        "qpull-0123ABCD-cbw0",
        "qpull-0123abc-cbw0",
        "qpull-0123abcde-cbw0",
        "qpull-0123abcg-cbw0",
        "qpull-0123abcd_cbw0",
        "qpull-mine",
    };

    for (size_t i = 0; i < ARRAY_SIZE(foreign); i++) {
        char id[NAMES_ID_SIZE] = "untouch";
        enum names_kind kind = NAMES_CUT;
        unsigned n = 42;

        if (names_parse(foreign[i], id, &kind, &n))
            fail_msg("'%s' is taken for ours", foreign[i]);
        assert_string_equal(id, "untouch");
        assert_int_equal(kind, NAMES_CUT);
        assert_int_equal(n, 42);
    }
    assert_false(names_parse(NULL, (char[NAMES_ID_SIZE]){0}, &(enum names_kind){0}, &(unsigned){0}));
    assert_false(names_is_ours(NULL));
    assert_false(names_is_ours("vda"));
    assert_true(names_is_ours("qpull-mine")); /* the whole prefix is kept for us */
}

static void ids_are_eight_hex_digits_and_new_each_time(void **state)
{
    char last[NAMES_ID_SIZE] = "", id[NAMES_ID_SIZE];

    for (unsigned i = 0; i < 100; i++) {
        names_new_id(id);
        assert_int_equal(strlen(id), NAMES_ID_SIZE - 1);
        assert_int_equal(strspn(id, "0123456789abcdef"), NAMES_ID_SIZE - 1);
        assert_string_not_equal(id, last);
        strcpy(last, id);
    }
}

static void expect_refused(const char *name, const char *sentence_has)
{
    struct failure f = {0};

    assert_int_equal(name_check(name, &f), -EINVAL);
    assert_int_equal(f.err, -EINVAL);
    if (!strstr(f.text, sentence_has))
        fail_msg("the refusal of '%s' says: %s", name, f.text);
}

static void checkpoints_have_names_that_people_choose(void **state)
{
    static const char *const good[] = {"a",    "monday", "2026-11-20 22:15", "daily.7", "über-Größe",
                                       "日本", "qpull",  "Qpull-x",          "x:y",     "#1"};

    for (size_t i = 0; i < ARRAY_SIZE(good); i++) {
        struct failure f = {0};

        if (name_check(good[i], &f) < 0)
            fail_msg("'%s' is refused: %s", good[i], f.text);
        assert_int_equal(f.err, 0);
    }
}

static void checkpoints_have_no_names_that_cannot_be_said_in_an_export_name(void **state)
{
    expect_refused("", "needs a name");
    expect_refused("a/b", "0x2f");
    expect_refused("a@b", "0x40");
    expect_refused("a\nb", "0x0a");
    expect_refused("\x01", "0x01");
    expect_refused("\xff", "UTF-8");
    expect_refused("a\xc3", "UTF-8");             /* cut short */
    expect_refused("\xc0\xaf", "UTF-8");          /* '/' in too many bytes */
    expect_refused("\xed\xa0\x80", "UTF-8");      /* half of a surrogate pair */
    expect_refused("\xf4\x90\x80\x80", "UTF-8"); /* past the last code point */
    expect_refused("a\x7f", "0x7f");
    expect_refused("qpull-a", "temporary");
    expect_refused("qpull-", "temporary");
}

static void the_longest_checkpoint_name_has_255_bytes(void **state)
{
    char name[NAMES_CHECKPOINT_MAX + 2];
    struct failure f = {0};

    memset(name, 'x', sizeof(name));
    name[NAMES_CHECKPOINT_MAX + 1] = '\0';
    expect_refused(name, "256 bytes");
    name[NAMES_CHECKPOINT_MAX] = '\0';
    assert_int_equal(name_check(name, &f), 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_name_is_taken_apart_as_it_was_made),
        cmocka_unit_test(names_of_different_things_differ),
        cmocka_unit_test(what_is_not_ours_to_the_letter_is_not_taken_apart),
        cmocka_unit_test(ids_are_eight_hex_digits_and_new_each_time),
        cmocka_unit_test(checkpoints_have_names_that_people_choose),
        cmocka_unit_test(checkpoints_have_no_names_that_cannot_be_said_in_an_export_name),
        cmocka_unit_test(the_longest_checkpoint_name_has_255_bytes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
