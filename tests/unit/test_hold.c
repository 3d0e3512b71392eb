/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which QEMU may be held when its guest shuts down: only one of which we know what it would have done. */
#include "backup/hold.h"
#include "lib/test.h"

#include <errno.h>

#define LOOK(words, hold, f) hold_from_command_line(words, sizeof(words), hold, f)

static void a_qemu_that_says_nothing_of_it_is_held(void **state)
{
    static const char *const programs[] = {"/usr/bin/qemu-system-x86_64\0-m\0"
                                           "64",
                                           "qemu-kvm\0-m\0"
                                           "64",
                                           "/usr/libexec/qemu-kvm\0-m\0"
                                           "64",
                                           "kvm\0-id\0"
                                           "no-shutdown"};

    for (size_t i = 0; i < ARRAY_SIZE(programs); i++) {
        struct failure f = {0};
        enum hold hold = HOLD_NONE;
        size_t length = strlen(programs[i]) + 1;

        length += strlen(programs[i] + length) + 1;
        length += strlen(programs[i] + length) + 1;
        assert_int_equal(hold_from_command_line(programs[i], length, &hold, &f), 0);
        assert_int_equal(hold, HOLD_SHUTDOWN_AND_PANIC);
    }
}

static void a_qemu_that_was_told_to_stay_is_left_alone(void **state)
{
    struct failure f = {0};
    enum hold hold = HOLD_NONE;

    assert_int_equal(LOOK("qemu-system-x86_64\0-no-shutdown\0-S", &hold, &f), -ENOTSUP);
    assert_non_null(strstr(f.text, "'-no-shutdown'"));
    f = (struct failure){0};
    assert_int_equal(LOOK("qemu-system-x86_64\0--no-shutdown", &hold, &f), -ENOTSUP);
    f = (struct failure){0};
    assert_int_equal(LOOK("qemu-system-x86_64\0-action\0reboot=reset,shutdown=pause", &hold, &f), -ENOTSUP);
    assert_non_null(strstr(f.text, "'-action reboot=reset,shutdown=pause'"));
    assert_int_equal(hold, HOLD_NONE);
}

static void a_guest_that_panics_stays_where_somebody_wanted_it(void **state)
{
    struct failure f = {0};
    enum hold hold = HOLD_NONE;

    assert_int_equal(LOOK("qemu-system-x86_64\0-action\0panic=pause", &hold, &f), 0);
    assert_int_equal(hold, HOLD_SHUTDOWN);
    assert_int_equal(LOOK("qemu-system-x86_64\0-action\0shutdown=poweroff,panic=none,watchdog=pause", &hold, &f), 0);
    assert_int_equal(hold, HOLD_SHUTDOWN);
    assert_int_equal(LOOK("qemu-system-x86_64\0-action\0panic=exit-failure,watchdog=pause", &hold, &f), 0);
    assert_int_equal(hold, HOLD_SHUTDOWN_AND_PANIC);
}

static void who_is_no_qemu_is_not_asked_to_wait(void **state)
{
    struct failure f = {0};
    enum hold hold = HOLD_NONE;

    assert_int_equal(LOOK("/usr/sbin/libvirtd\0--timeout\0"
                          "120",
                          &hold, &f),
                     -ENOTSUP);
    f = (struct failure){0};
    assert_int_equal(hold_from_command_line("", 0, &hold, &f), -ENOTSUP);
    f = (struct failure){0};
    assert_int_equal(hold_from_command_line("qemu-system-x86_64", 18, &hold, &f), -ENOTSUP); /* cut */
    assert_int_equal(hold, HOLD_NONE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_qemu_that_says_nothing_of_it_is_held),
        cmocka_unit_test(a_qemu_that_was_told_to_stay_is_left_alone),
        cmocka_unit_test(a_guest_that_panics_stays_where_somebody_wanted_it),
        cmocka_unit_test(who_is_no_qemu_is_not_asked_to_wait),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
