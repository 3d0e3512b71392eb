/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Heads of qcow2 images, right and wrong ones: which backing file they name. */
#include "backup/qcow2.h"
#include "qmp/base.h"
#include "test.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HEAD_SIZE 20 /* as far as it is read: the name may follow at once */

static const unsigned char good[HEAD_SIZE] = {'Q', 'F', 'I', 0xfb, 0, 0,         0, 3, 0, 0,
                                              0,   0,   0,   0,    0, HEAD_SIZE, 0, 0, 0, 4};
static char name[QCOW2_NAME_MAX + 1];

static int read_head(const unsigned char *head, size_t len, const char *rest, size_t rest_len)
{
    int fd = memfd_create("head", MFD_CLOEXEC), r;

    assert_true(fd >= 0);
    assert_int_equal(write(fd, head, len), len);
    assert_int_equal(write(fd, rest, rest_len), rest_len);
    r = qcow2_read_backing(fd, name);
    (void)close(fd);
    return r;
}

static int read_changed(size_t at, unsigned char byte)
{
    unsigned char head[HEAD_SIZE];

    memcpy(head, good, sizeof(head));
    head[at] = byte;
    return read_head(head, sizeof(head), "base", 4);
}

static void the_name_is_what_stands_there(void **state)
{
    assert_int_equal(read_head(good, sizeof(good), "base and more", 13), 0);
    assert_string_equal(name, "base");
    assert_int_equal(read_changed(7, 2), 0); /* the version */
    assert_string_equal(name, "base");
    assert_int_equal(read_changed(15, 0), 0); /* no backing file */
    assert_string_equal(name, "");
}

static void the_longest_name_is_read_and_no_longer_one(void **state)
{
    unsigned char head[HEAD_SIZE];
    char longest[QCOW2_NAME_MAX + 1];

    memset(longest, 'x', sizeof(longest));
    memcpy(head, good, sizeof(head));
    head[18] = QCOW2_NAME_MAX >> 8;
    head[19] = QCOW2_NAME_MAX & 0xff;
    assert_int_equal(read_head(head, sizeof(head), longest, sizeof(longest)), 0);
    assert_int_equal(strlen(name), QCOW2_NAME_MAX);
    head[18] = (QCOW2_NAME_MAX + 1) >> 8;
    head[19] = (QCOW2_NAME_MAX + 1) & 0xff;
    assert_int_equal(read_head(head, sizeof(head), longest, sizeof(longest)), -EBADMSG);
}

static void what_is_no_qcow2_image_names_nothing(void **state)
{
    assert_int_equal(read_head(good, 0, "", 0), -EBADMSG);
    assert_int_equal(read_head(good, sizeof(good) - 1, "", 0), -EBADMSG);
    assert_int_equal(read_changed(0, 'q'), -EBADMSG);
    assert_int_equal(read_changed(7, 1), -EBADMSG);
    assert_int_equal(read_changed(7, 4), -EBADMSG);
    assert_int_equal(read_changed(8, 0xff), -EBADMSG);  /* the offset, negative */
    assert_int_equal(read_changed(14, 0xff), -EBADMSG); /* behind the end */
    assert_int_equal(read_changed(16, 0xff), -EBADMSG); /* the length */
    assert_int_equal(read_head(good, sizeof(good), "bas", 3), -EBADMSG);
    assert_int_equal(read_head(good, sizeof(good), "b\0se", 4), -EBADMSG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_name_is_what_stands_there),
        cmocka_unit_test(the_longest_name_is_read_and_no_longer_one),
        cmocka_unit_test(what_is_no_qcow2_image_names_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
