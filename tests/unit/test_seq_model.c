/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The runner of step tables at random: tables, failures and stops, against a model that is nothing but the header's
 * words. */
#include "seq_world.h"

#include <time.h>

#define NROUNDS 3000
#define MAX_TURNS 10000

static uint64_t seed;

/* splitmix64 (Steele, Lea, Flood 2014) */
static unsigned random_below(unsigned n)
{
    uint64_t z = (seed += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (unsigned)((z ^ (z >> 31)) % n);
}

/* What the header promises, in the plainest words: no phases, no callbacks. */
struct model {
    const struct world *w;
    char log[LOG_SIZE];
    unsigned nevents;
    bool stopped, committing; /* the first stop's word */
    bool problem;
};

static void model_event(struct model *m, const char *fmt, ...) _printf_(2, 3);
static void model_event(struct model *m, const char *fmt, ...)
{
    size_t used = strlen(m->log);
    va_list ap;

    va_start(ap, fmt);
    (void)vsnprintf(m->log + used, sizeof(m->log) - used, fmt, ap);
    va_end(ap);
    m->nevents++;
    for (size_t i = 0; i < ARRAY_SIZE(m->w->stop_at); i++) {
        if (m->nevents != m->w->stop_at[i] || m->stopped)
            continue;
        m->stopped = true;
        m->committing = m->w->commit[i];
    }
}

static bool model_call(struct model *m, enum column column, unsigned i)
{
    const struct plan *p = &m->w->plans[column][i];

    if (p->missing)
        return true;
    model_event(m, "%c%u ", "udc"[column], i);
    return !(p->err && p->nfailures);
}

static void model_run(struct model *m)
{
    unsigned at = 0;

    for (; at < m->w->nsteps; at++) {
        bool well = model_call(m, UP, at);

        if (!well)
            model_event(m, "F ");
        if (!well || m->stopped)
            break;
    }
    if (at == m->w->nsteps) {
        model_event(m, "T ");
        if (!m->stopped) { /* the test stops it there */
            m->stopped = true;
            m->committing = m->w->commit[0];
        }
        for (unsigned i = 0; m->committing && i < m->w->nsteps; i++) {
            if (!model_call(m, COMMIT, i)) {
                m->problem = true;
                break;
            }
        }
        at--;
    }
    for (unsigned i = at + 1; i-- > 0;)
        m->problem |= !model_call(m, DOWN, i);
    model_event(m, "E");
}

static void plan_at_random(struct world *w)
{
    unsigned nfailures = random_below(3);

    for (unsigned c = 0; c < NCOLUMNS; c++) {
        for (unsigned i = 0; i < w->nsteps; i++)
            w->plans[c][i] = (struct plan){.missing = random_below(6) == 0, .later = random_below(2)};
    }
    while (nfailures-- > 0) {
        enum column c = (enum column)random_below(NCOLUMNS);

        /* Tries again take real time: undo fails here only in the way that is final. */
        w->plans[c][random_below(w->nsteps)].err = c == DOWN ? -ENOTCONN : -EIO;
    }
    for (unsigned c = 0; c < NCOLUMNS; c++) {
        for (unsigned i = 0; i < w->nsteps; i++)
            w->plans[c][i].nfailures = w->plans[c][i].err ? FOR_EVER : 0;
    }
    for (size_t i = 0; i < ARRAY_SIZE(w->stop_at); i++) {
        w->stop_at[i] = random_below(3) ? 1 + random_below(3 * w->nsteps + 2) : 0;
        w->commit[i] = random_below(2);
    }
}

static void everything_that_happens_is_what_the_model_says(void **state)
{
    const char *wish = getenv("QPULL_TEST_SEED");

    seed = wish ? strtoull(wish, NULL, 10) : (uint64_t)time(NULL);
    print_message("seed: QPULL_TEST_SEED=%llu\n", (unsigned long long)seed);
    for (unsigned round = 0; round < NROUNDS; round++) {
        struct model m = {0};
        struct world w;

        world_init(&w, 1 + random_below(MAX_STEPS));
        plan_at_random(&w);
        m.w = &w;
        model_run(&m);
        world_begin(&w);
        start(&w);
        for (unsigned turn = 0; turn < MAX_TURNS && !is_at_rest(&w); turn++)
            loop_turn(&w.loop, 1); /* nothing here takes time */
        if (!w.ended)
            halt(&w, w.commit[0]);
        for (unsigned turn = 0; turn < MAX_TURNS && !w.ended; turn++)
            loop_turn(&w.loop, 1);
        if (strcmp(w.log, m.log) != 0 || !w.problems.err != !m.problem)
            fail_msg("round %u: %s(problems: %d), the model: %s(%d)", round, w.log, w.problems.err, m.log, m.problem);
        world_done(&w);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(everything_that_happens_is_what_the_model_says),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
