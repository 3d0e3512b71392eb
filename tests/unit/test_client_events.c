/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "client_world.h"

static void a_watch_hears_its_events_only(void **state)
{
    struct ear stop = {0}, all = {0}, never = {0};
    struct world w;

    world_up(&w, NULL);
    hear(&w, &stop, "STOP");
    hear(&w, &all, NULL);
    hear(&w, &never, "STO");
    fake_qemu_event(w.qemu, "STOP", NULL);
    fake_qemu_event(w.qemu, "JOB_STATUS_CHANGE", json_tokener_parse("{\"id\": \"j\"}"));
    round_trip(&w);
    assert_int_equal(stop.n, 1);
    assert_string_equal(stop.last, "STOP -");
    assert_int_equal(all.n, 2);
    assert_string_equal(all.last, "JOB_STATUS_CHANGE {\"id\":\"j\"}");
    assert_int_equal(never.n, 0);
    world_down(&w);
}

static void a_watch_survives_a_lost_connection(void **state)
{
    struct ear e = {0};
    struct world w;

    world_init(&w, NULL);
    world_connect(&w, &quick);
    hear(&w, &e, "STOP"); /* before there is a connection */
    loop_until(&w.loop, w.nready == 1);
    fake_qemu_event(w.qemu, "STOP", NULL);
    round_trip(&w);
    fake_qemu_hangup(w.qemu);
    loop_until(&w.loop, w.nready == 2);
    fake_qemu_event(w.qemu, "STOP", NULL);
    round_trip(&w);
    assert_int_equal(e.n, 2);
    world_down(&w);
}

/* Three watches; the one in the middle removes one of them during the first of two events. */
static void removing(unsigned which, const unsigned expected[3])
{
    struct ear e[3] = {0};
    struct world w;

    world_up(&w, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(e); i++)
        hear(&w, &e[i], "STOP");
    e[1].remove = &e[which];
    fake_qemu_event(w.qemu, "STOP", NULL);
    fake_qemu_event(w.qemu, "STOP", NULL);
    round_trip(&w);
    for (size_t i = 0; i < ARRAY_SIZE(e); i++) {
        assert_int_equal(e[i].n, expected[i]);
        qmp_watch_remove(&e[i].watch); /* once more for one of them */
    }
    world_down(&w);
}

static void a_watch_may_be_removed_during_an_event(void **state)
{
    removing(0, (const unsigned[]){1, 2, 2});
    removing(1, (const unsigned[]){2, 1, 2});
    removing(2, (const unsigned[]){2, 2, 0});
}

static void a_watch_added_during_an_event_hears_the_next(void **state)
{
    struct ear adds = {0}, added = {0};
    struct world w;

    world_up(&w, NULL);
    hear(&w, &adds, "STOP");
    added = (struct ear){.world = &w, .event = "STOP"};
    adds.add = &added;
    fake_qemu_event(w.qemu, "STOP", NULL);
    round_trip(&w);
    assert_int_equal(added.n, 0);
    adds.add = NULL;
    fake_qemu_event(w.qemu, "STOP", NULL);
    round_trip(&w);
    assert_int_equal(added.n, 1);
    /* Removed and added anew in each event, as a watch that arms itself again: never heard twice, no endless loop. */
    adds.add = &adds;
    fake_qemu_event(w.qemu, "STOP", NULL);
    round_trip(&w);
    assert_int_equal(adds.n, 3);
    world_down(&w);
}

static void a_watch_may_be_removed_after_the_client(void **state)
{
    struct ear on = {0}, never_on = {0};
    struct world w;

    world_up(&w, NULL);
    hear(&w, &on, "STOP");
    world_down(&w);
    qmp_watch_remove(&on.watch);
    qmp_watch_remove(&never_on.watch);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_watch_hears_its_events_only),
        cmocka_unit_test(a_watch_survives_a_lost_connection),
        cmocka_unit_test(a_watch_may_be_removed_during_an_event),
        cmocka_unit_test(a_watch_added_during_an_event_hears_the_next),
        cmocka_unit_test(a_watch_may_be_removed_after_the_client),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
