/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* images_look: formats found by their files' heads and not believed blindly, programs, and who holds a file. */
#include "test.h"

#include "images_look.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

struct box {
    char dir[64], path[96];
    struct image_kind kind;
    struct failure failure;
};

static int set_up(void **state)
{
    struct box *b = calloc(1, sizeof *b);

    (void)strcpy(b->dir, "/tmp/qpull-look-XXXXXX");
    if (!mkdtemp(b->dir))
        return -1;
    *state = b;
    return 0;
}

static int tear_down(void **state)
{
    struct box *b = *state;

    (void)rmdir(b->dir);
    free(b);
    return 0;
}

/* A file of this name that begins so, looked at; it is gone afterwards. */
static int look(struct box *b, const char *name, const char *format, const void *head, size_t len)
{
    struct config_image image = {.disk = (char *)"vda", .path = b->path, .format = format};
    int fd, r;

    (void)snprintf(b->path, sizeof b->path, "%s/%s", b->dir, name);
    fd = open(b->path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, head, len), len);
    (void)close(fd);
    b->failure = (struct failure){0};
    b->kind = (struct image_kind){0};
    r = images_look(&image, &b->kind, &b->failure);
    (void)unlink(b->path);
    return r;
}

static void what_a_file_begins_like_is_its_format(void **state)
{
    static const struct {
        const char *head;
        size_t len;
        const char *format;
    } rows[] = {
        {"", 0, "raw"},
        {"x", 1, "raw"},
        {"QFI\xfb\0\0\0\3", 8, "qcow2"},
        {"QFI\xfb\0\0\0\2", 8, "qcow2"},
        {"vhdxfile", 8, "vhdx"},
        {"conectix", 8, "vpc"},
        {"<<< Oracle VM VirtualBox Disk Image >>>", 39, "vdi"},
        {"QFI", 3, "raw"},
    };
    struct box *b = *state;

    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        if (look(b, "image", NULL, rows[i].head, rows[i].len) < 0)
            fail_msg("row %zu: %s", i, b->failure.text);
        assert_string_equal(b->kind.format, rows[i].format);
        assert_string_equal(b->kind.protocol, "file");
    }
}

static void a_name_that_contradicts_the_content_is_refused_until_a_format_is_said(void **state)
{
    struct box *b = *state;

    assert_int_equal(look(b, "a.qcow2", NULL, "x", 1), -EINVAL);
    assert_non_null(strstr(b->failure.text, "not in qcow2 format"));
    assert_int_equal(look(b, "a.raw", NULL, "QFI\xfb\0\0\0\3", 8), -EINVAL);
    assert_non_null(strstr(b->failure.text, "not raw as its name says"));
    assert_int_equal(look(b, "a.qcow2", "raw", "x", 1), 0);
    assert_string_equal(b->kind.format, "raw");
    assert_int_equal(look(b, "a.raw", "qcow2", "QFI\xfb\0\0\0\3", 8), 0);
    assert_string_equal(b->kind.format, "qcow2");
}

static void formats_that_are_not_served_are_named(void **state)
{
    struct box *b = *state;

    assert_int_equal(look(b, "image", NULL, "LUKS\xba\xbe", 6), -EINVAL);
    assert_non_null(strstr(b->failure.text, "LUKS"));
    assert_int_equal(look(b, "image", NULL, "QFI\xfb\0\0\0\1", 8), -EINVAL);
    assert_non_null(strstr(b->failure.text, "qcow version 1"));
    assert_int_equal(look(b, "image", "raw", "LUKS\xba\xbe", 6), 0);
}

/* A guest's raw disk may hold any bytes: a backing file or a data file of the host is not opened on its word. */
static void a_file_that_was_not_said_to_be_qcow2_may_not_refer_to_others(void **state)
{
    struct box *b = *state;
    char backing[104] = "QFI\xfb\0\0\0\3", data[104] = "QFI\xfb\0\0\0\3";

    backing[15] = 104; /* backing_file_offset */
    data[79] = 4;      /* incompatible feature bit 2 */
    assert_int_equal(look(b, "image", NULL, backing, sizeof backing), -EINVAL);
    assert_non_null(strstr(b->failure.text, "over another file"));
    assert_int_equal(look(b, "disk.img", NULL, data, sizeof data), -EINVAL);
    assert_int_equal(look(b, "image.qcow2", NULL, backing, sizeof backing), 0);
    assert_int_equal(look(b, "image", "qcow2", data, sizeof data), 0);
    data[7] = 2; /* version 2 has no features: these bytes say something else */
    assert_int_equal(look(b, "image", NULL, data, sizeof data), 0);
}

static void nor_does_what_looks_like_vmdk_or_qed_unless_it_was_said(void **state)
{
    static const struct {
        const char *head, *format, *file;
        size_t len;
    } rows[] = {
        {"# Disk DescriptorFile\nRW 2048 FLAT \"/etc/shadow\" 0\n", "vmdk", "disk.vmdk", 50},
        {"KDMV\1\0\0\0", "vmdk", "disk.vmdk", 8},
        {"COWD\1\0\0\0", "vmdk", "disk.vmdk", 8},
        {"QED\0\0\0\1\0", "qed", "disk.qed", 8},
    };
    struct box *b = *state;
    char *said;

    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        assert_int_equal(look(b, "disk.img", NULL, rows[i].head, rows[i].len), -EINVAL);
        assert_true(asprintf(&said, "say %s:%s/disk.img or raw:", rows[i].format, b->dir) > 0);
        assert_non_null(strstr(b->failure.text, said));
        free(said);
        assert_int_equal(look(b, "disk.img", "raw", rows[i].head, rows[i].len), 0);
        assert_string_equal(b->kind.format, "raw");
        assert_int_equal(look(b, "disk.img", rows[i].format, rows[i].head, rows[i].len), 0);
        assert_int_equal(look(b, rows[i].file, NULL, rows[i].head, rows[i].len), 0);
        assert_string_equal(b->kind.format, rows[i].format);
    }
}

static void what_is_no_file_is_refused_at_once(void **state)
{
    struct box *b = *state;
    struct config_image image = {.disk = (char *)"vda", .path = b->path};

    (void)snprintf(b->path, sizeof b->path, "%s/x", b->dir);
    assert_int_equal(images_look(&image, &b->kind, &b->failure), -ENOENT);
    assert_int_equal(mkfifo(b->path, 0600), 0);
    b->failure.err = 0;
    assert_int_equal(images_look(&image, &b->kind, &b->failure), -EINVAL); /* and does not wait for a writer */
    (void)unlink(b->path);
    image.path = b->dir;
    b->failure.err = 0;
    assert_int_equal(images_look(&image, &b->kind, &b->failure), -EINVAL);
}

static void programs_are_found_as_a_shell_would(void **state)
{
    struct failure f = {0};
    char *path = NULL;

    assert_int_equal(images_find_program("sh", &path, &f), 0);
    assert_int_equal(access(path, X_OK), 0);
    free(path);
    assert_int_equal(images_find_program("/bin/sh", &path, &f), 0);
    assert_string_equal(path, "/bin/sh");
    free(path);
    assert_int_equal(images_find_program("no-such-program-anywhere", &path, &f), -ENOENT);
    f.err = 0;
    assert_int_equal(images_find_program("/tmp", &path, &f), -ENOENT); /* a directory is none */
}

static void a_process_that_has_a_file_open_is_told_unless_it_is_left_out(void **state)
{
    struct box *b = *state;
    const pid_t me = getpid();
    char text[128] = "", pid[32];
    int fd;

    (void)snprintf(b->path, sizeof b->path, "%s/held", b->dir);
    fd = open(b->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    (void)snprintf(pid, sizeof pid, "(PID %d)", (int)me);
    assert_true(images_find_holder(b->path, NULL, 0, text, sizeof text));
    assert_non_null(strstr(text, pid));
    assert_false(images_find_holder(b->path, &me, 1, text, sizeof text));
    (void)close(fd);
    assert_false(images_find_holder(b->path, NULL, 0, text, sizeof text));
    (void)unlink(b->path);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(what_a_file_begins_like_is_its_format),
        TEST(a_name_that_contradicts_the_content_is_refused_until_a_format_is_said),
        TEST(formats_that_are_not_served_are_named),
        TEST(a_file_that_was_not_said_to_be_qcow2_may_not_refer_to_others),
        TEST(nor_does_what_looks_like_vmdk_or_qed_unless_it_was_said),
        TEST(what_is_no_file_is_refused_at_once),
        TEST(programs_are_found_as_a_shell_would),
        TEST(a_process_that_has_a_file_open_is_told_unless_it_is_left_out),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
