/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* workers: what runs on a thread comes back to the loop, all of it, whatever the moment of the end. */
#include "test.h"

#include "loop.h"
#include "workers.h"

#define NJOBS 200

struct job {
    struct work work;
    struct workers *workers;
    uv_thread_t loop_thread, ran_on;
    unsigned nruns, ndone, again; /* again: how often it submits itself once more */
    unsigned *order;
    unsigned at; /* when it ran */
};

static void run(struct work *w)
{
    struct job *j = container_of(w, struct job, work);

    j->ran_on = uv_thread_self();
    j->nruns++;
    if (j->order)
        j->at = (*j->order)++;
}

static void done(struct work *w)
{
    struct job *j = container_of(w, struct job, work);
    uv_thread_t self = uv_thread_self();

    assert_true(uv_thread_equal(&self, &j->loop_thread));
    j->ndone++;
    if (j->again > 0) {
        j->again--;
        workers_submit(j->workers, &j->work);
    }
}

static struct job new_job(struct workers *ws)
{
    return (struct job){.work = {.run = run, .done = done}, .workers = ws, .loop_thread = uv_thread_self()};
}

static void on_closed(void *arg)
{
    *(bool *)arg = true;
}

static void work_runs_on_a_thread_and_ends_on_the_loop(void **state)
{
    uv_loop_t loop;
    struct workers *ws;
    struct job jobs[NJOBS];
    bool closed = false;

    loop_init(&loop);
    assert_int_equal(workers_new(&loop, 3, &ws), 0);
    for (size_t i = 0; i < NJOBS; i++) {
        jobs[i] = new_job(ws);
        jobs[i].again = i % 3;
        workers_submit(ws, &jobs[i].work);
    }
    for (size_t i = 0; i < NJOBS; i++) {
        loop_until(&loop, jobs[i].ndone == 1 + i % 3);
        assert_int_equal(jobs[i].nruns, 1 + i % 3);
        assert_false(uv_thread_equal(&jobs[i].ran_on, &jobs[i].loop_thread));
    }
    workers_close(ws, on_closed, &closed);
    loop_until(&loop, closed);
    loop_done(&loop);
}

static void one_thread_works_in_the_order_of_submission(void **state)
{
    uv_loop_t loop;
    struct workers *ws;
    struct job jobs[NJOBS];
    unsigned order = 0;
    bool closed = false;

    loop_init(&loop);
    assert_int_equal(workers_new(&loop, 1, &ws), 0);
    for (size_t i = 0; i < NJOBS; i++) {
        jobs[i] = new_job(ws);
        jobs[i].order = &order;
        workers_submit(ws, &jobs[i].work);
    }
    /* Closed with all of it before it: everything is done nevertheless. */
    workers_close(ws, on_closed, &closed);
    loop_until(&loop, closed);
    for (size_t i = 0; i < NJOBS; i++) {
        assert_int_equal(jobs[i].ndone, 1);
        assert_int_equal(jobs[i].at, i);
    }
    loop_done(&loop);
}

static void there_is_at_least_one_thread_and_no_more_than_wanted(void **state)
{
    assert_true(workers_default(64) >= 1);
    assert_int_equal(workers_default(1), 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(work_runs_on_a_thread_and_ends_on_the_loop),
        cmocka_unit_test(one_thread_works_in_the_order_of_submission),
        cmocka_unit_test(there_is_at_least_one_thread_and_no_more_than_wanted),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
