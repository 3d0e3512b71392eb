/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/agent.h"

#include "lib/fake_agent.h"
#include "lib/loop.h"
#include "lib/test.h"
#include "qmp/agent_reader.h"

#include <errno.h>
#include <unistd.h>

#define SOON_MS 150 /* a deadline that is meant to pass */
#define LONG_MS LOOP_DEADLINE_MS

struct world {
    uv_loop_t loop;
    struct fake_agent *guest;
    struct agent *agent;
    unsigned nanswers;
    int err;
    char text[512];
    char ret[256];
    bool inside, again;
};

static int set_up(void **state)
{
    struct world *w = calloc(1, sizeof(*w));

    assert_non_null(w);
    loop_init(&w->loop);
    w->guest = fake_agent_new(&w->loop);
    assert_int_equal(agent_new(&w->loop, w->guest->path, -1, &w->agent), 0);
    *state = w;
    return 0;
}

static int tear_down(void **state)
{
    struct world *w = *state;

    if (w->agent)
        agent_close(w->agent, NULL, NULL);
    fake_agent_free(w->guest);
    loop_done(&w->loop);
    free(w);
    return 0;
}

static void on_answer(void *arg, struct json_object *ret, const struct failure *f)
{
    struct world *w = arg;

    assert_false(w->inside);
    w->nanswers++;
    w->err = f ? f->err : 0;
    (void)snprintf(w->text, sizeof(w->text), "%s", f ? f->text : "");
    (void)snprintf(w->ret, sizeof(w->ret), "%s", ret ? json_object_to_json_string(ret) : "");
    if (w->again) {
        w->again = false;
        assert_int_equal(agent_call(w->agent, "guest-fsfreeze-status", AGENT_AFTER_SYNC, LONG_MS, on_answer, w), 0);
    }
}

static void start(struct world *w, const char *command, enum agent_order order, unsigned ms)
{
    w->inside = true;
    assert_int_equal(agent_call(w->agent, command, order, ms, on_answer, w), 0);
    w->inside = false;
}

static int call(struct world *w, const char *command, enum agent_order order, unsigned ms)
{
    unsigned before = w->nanswers;

    start(w, command, order, ms);
    loop_until(&w->loop, w->nanswers > before);
    assert_int_equal(w->nanswers, before + 1);
    return w->err;
}

static void a_call_is_answered(void **state)
{
    struct world *w = *state;

    assert_int_equal(call(w, "guest-fsfreeze-freeze", AGENT_AFTER_SYNC, LONG_MS), 0);
    assert_string_equal(w->ret, "2");
    assert_int_equal(call(w, "guest-fsfreeze-status", AGENT_AT_ONCE, LONG_MS), 0);
    assert_string_equal(w->ret, "\"frozen\"");
    assert_int_equal(call(w, NULL, AGENT_AFTER_SYNC, LONG_MS), 0);
    assert_int_equal(w->guest->nclients, 1);
    assert_int_equal(w->guest->nheard[FAKE_SYNC], 3);
}

static void one_call_at_a_time(void **state)
{
    struct world *w = *state;

    start(w, NULL, AGENT_AFTER_SYNC, LONG_MS);
    assert_int_equal(agent_call(w->agent, NULL, AGENT_AFTER_SYNC, LONG_MS, on_answer, w), -EBUSY);
    loop_until(&w->loop, w->nanswers == 1);
}

static void the_next_call_may_come_from_within_an_answer(void **state)
{
    struct world *w = *state;

    w->again = true;
    start(w, "guest-fsfreeze-freeze", AGENT_AFTER_SYNC, LONG_MS);
    loop_until(&w->loop, w->nanswers == 2);
    assert_string_equal(w->ret, "\"frozen\"");
}

static void a_guest_without_an_agent_is_told_and_finds_no_freeze_later(void **state)
{
    struct world *w = *state;

    w->guest->faults[FAKE_SYNC] = FAKE_LATE;
    assert_int_equal(call(w, "guest-fsfreeze-freeze", AGENT_AFTER_SYNC, SOON_MS), -ETIMEDOUT);
    assert_non_null(strstr(w->text, "does not answer"));
    fake_agent_wake(w->guest);
    assert_int_equal(call(w, "guest-fsfreeze-status", AGENT_AFTER_SYNC, LONG_MS), 0);
    assert_string_equal(w->ret, "\"thawed\"");
    assert_int_equal(w->guest->nheard[FAKE_FREEZE], 0);
}

static void what_is_sent_at_once_is_done_by_an_agent_that_wakes_up(void **state)
{
    struct world *w = *state;

    w->guest->nfrozen = 2;
    w->guest->faults[FAKE_SYNC] = FAKE_LATE;
    assert_int_equal(call(w, "guest-fsfreeze-thaw", AGENT_AT_ONCE, SOON_MS), -ETIMEDOUT);
    fake_agent_wake(w->guest);
    assert_int_equal(w->guest->nfrozen, 0);
}

static void a_late_answer_is_not_taken_for_the_next_one(void **state)
{
    struct world *w = *state;

    w->guest->faults[FAKE_FREEZE] = FAKE_LATE;
    assert_int_equal(call(w, "guest-fsfreeze-freeze", AGENT_AFTER_SYNC, SOON_MS), -ETIMEDOUT);
    assert_non_null(strstr(w->text, "did not answer 'guest-fsfreeze-freeze'"));
    start(w, "guest-fsfreeze-status", AGENT_AT_ONCE, LONG_MS);
    loop_until(&w->loop, w->guest->nheard[FAKE_STATUS] == 1);
    fake_agent_wake(w->guest); /* "2" comes first */
    loop_until(&w->loop, w->nanswers == 2);
    assert_string_equal(w->ret, "\"frozen\"");
}

static void a_call_that_is_forgotten_is_followed_by_another(void **state)
{
    struct world *w = *state;

    w->guest->faults[FAKE_FREEZE] = FAKE_LATE;
    start(w, "guest-fsfreeze-freeze", AGENT_AFTER_SYNC, LONG_MS);
    loop_until(&w->loop, w->guest->nheard[FAKE_FREEZE] == 1);
    agent_forget(w->agent);
    start(w, "guest-fsfreeze-thaw", AGENT_AT_ONCE, LONG_MS);
    loop_until(&w->loop, w->guest->nheard[FAKE_THAW] == 1);
    fake_agent_wake(w->guest);
    loop_until(&w->loop, w->nanswers == 1);
    assert_string_equal(w->ret, "2"); /* it thawed what was frozen meanwhile */
    assert_int_equal(w->guest->nfrozen, 0);
}

static void stale_and_torn_talk_before_the_sync_is_skipped(void **state)
{
    static const char stale[] = "turn\": 3}\n{\"return\": 9}\n\xff{\"return\": 1}\n{\"return\": ]\n\xff\xff{\"ret";
    struct world *w = *state;

    assert_int_equal(call(w, NULL, AGENT_AFTER_SYNC, LONG_MS), 0);
    w->guest->nfrozen = 1;
    fake_agent_send(w->guest, stale, sizeof(stale) - 1);
    assert_int_equal(call(w, "guest-fsfreeze-thaw", AGENT_AFTER_SYNC, LONG_MS), 0);
    assert_string_equal(w->ret, "1");
}

static void a_second_client_waits_unheard(void **state)
{
    struct world *w = *state;
    struct agent *other;

    assert_int_equal(agent_new(&w->loop, w->guest->path, -1, &other), 0);
    assert_int_equal(agent_call(other, NULL, AGENT_AFTER_SYNC, LONG_MS, on_answer, w), 0);
    loop_until(&w->loop, w->nanswers == 1);
    assert_int_equal(call(w, NULL, AGENT_AFTER_SYNC, SOON_MS), -ETIMEDOUT);
    assert_non_null(strstr(w->text, "in use by another program"));
    agent_close(other, NULL, NULL);
    assert_int_equal(call(w, NULL, AGENT_AFTER_SYNC, LONG_MS), 0);
}

static void nobody_at_the_socket_is_told(void **state)
{
    struct world *w = *state;

    fake_agent_stop(w->guest);
    assert_int_equal(call(w, NULL, AGENT_AFTER_SYNC, LONG_MS), -ENOENT);
    assert_non_null(strstr(w->text, "nobody listens"));
}

static void a_lost_connection_is_made_again(void **state)
{
    struct world *w = *state;

    w->guest->faults[FAKE_STATUS] = FAKE_HANGS_UP;
    assert_int_equal(call(w, "guest-fsfreeze-status", AGENT_AFTER_SYNC, LONG_MS), -ECONNRESET);
    w->guest->faults[FAKE_STATUS] = FAKE_GOOD;
    assert_int_equal(agent_fd(w->agent), -1);
    assert_int_equal(call(w, "guest-fsfreeze-status", AGENT_AFTER_SYNC, LONG_MS), 0);
    assert_int_equal(w->guest->nclients, 2);
}

static void a_refusal_is_fit_to_print(void **state)
{
    struct world *w = *state;

    w->guest->faults[FAKE_FREEZE] = FAKE_REFUSES;
    assert_int_equal(call(w, "guest-fsfreeze-freeze", AGENT_AFTER_SYNC, LONG_MS), -EREMOTEIO);
    assert_string_equal(w->text, "the guest agent refused 'guest-fsfreeze-freeze': no?thank ?you");
}

static void hostile_answers_end_the_call_and_not_us(void **state)
{
    struct world *w = *state;

    w->guest->faults[FAKE_STATUS] = FAKE_RUBBISH;
    assert_int_equal(call(w, "guest-fsfreeze-status", AGENT_AFTER_SYNC, LONG_MS), -EPROTO);
    w->guest->faults[FAKE_STATUS] = FAKE_FLOODS;
    assert_int_equal(call(w, "guest-fsfreeze-status", AGENT_AFTER_SYNC, LONG_MS), -EMSGSIZE);
    w->guest->faults[FAKE_STATUS] = FAKE_GOOD;
    w->guest->faults[FAKE_SYNC] = FAKE_FLOODS;
    assert_int_equal(call(w, "guest-fsfreeze-status", AGENT_AFTER_SYNC, LONG_MS), -EMSGSIZE);
    agent_hang_up(w->agent); /* what of the flood is still on its way */
    w->guest->faults[FAKE_SYNC] = FAKE_GOOD;
    assert_int_equal(call(w, "guest-fsfreeze-status", AGENT_AFTER_SYNC, LONG_MS), 0);
}

static void a_connection_that_is_there_already_is_used(void **state)
{
    struct world *w = *state;
    struct agent *other;
    int fd;

    assert_int_equal(call(w, NULL, AGENT_AFTER_SYNC, LONG_MS), 0);
    fd = dup(agent_fd(w->agent));
    agent_close(TAKE_PTR(w->agent), NULL, NULL);
    loop_turn(&w->loop, 3);
    assert_int_equal(agent_new(&w->loop, w->guest->path, fd, &other), 0);
    w->agent = other;
    assert_int_equal(call(w, "guest-fsfreeze-thaw", AGENT_AT_ONCE, LONG_MS), 0);
    assert_int_equal(w->guest->nclients, 1);
}

static void closing_in_the_middle_is_silent(void **state)
{
    struct world *w = *state;

    w->guest->faults[FAKE_FREEZE] = FAKE_DEAF;
    start(w, "guest-fsfreeze-freeze", AGENT_AFTER_SYNC, LONG_MS);
    loop_until(&w->loop, w->guest->nheard[FAKE_FREEZE] == 1);
    agent_close(TAKE_PTR(w->agent), NULL, NULL);
    loop_turn(&w->loop, 5);
    assert_int_equal(w->nanswers, 0);
}

static void a_path_that_fits_no_address_is_refused(void **state)
{
    struct world *w = *state;
    char path[200];
    struct agent *other;

    memset(path, 'x', sizeof(path) - 1);
    path[sizeof(path) - 1] = '\0';
    assert_int_equal(agent_new(&w->loop, path, -1, &other), -ENAMETOOLONG);
}

#define T(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_call_is_answered),
        T(one_call_at_a_time),
        T(the_next_call_may_come_from_within_an_answer),
        T(a_guest_without_an_agent_is_told_and_finds_no_freeze_later),
        T(what_is_sent_at_once_is_done_by_an_agent_that_wakes_up),
        T(a_late_answer_is_not_taken_for_the_next_one),
        T(a_call_that_is_forgotten_is_followed_by_another),
        T(stale_and_torn_talk_before_the_sync_is_skipped),
        T(a_second_client_waits_unheard),
        T(nobody_at_the_socket_is_told),
        T(a_lost_connection_is_made_again),
        T(a_refusal_is_fit_to_print),
        T(hostile_answers_end_the_call_and_not_us),
        T(a_connection_that_is_there_already_is_used),
        T(closing_in_the_middle_is_silent),
        T(a_path_that_fits_no_address_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
