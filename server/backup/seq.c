/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/seq.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>

static const char *const phase_names[] = {
    [SEQ_IDLE] = "IDLE",     [SEQ_UP] = "UP",     [SEQ_TOP] = "TOP",
    [SEQ_COMMIT] = "COMMIT", [SEQ_DOWN] = "DOWN", [SEQ_END] = "END",
};
static_assert(ARRAY_SIZE(phase_names) == SEQ_END + 1, "every phase has a name");

static void walk(struct seq *s);

static void trace(struct seq *s, const char *what, const char *sentence)
{
    char text[768];

    if (!s->ops->on_trace)
        return;
    (void)snprintf(text, sizeof(text), "step %u/%u \"%s\": %s%s%s", MIN(s->at + 1, s->nsteps), s->nsteps,
                   s->at < s->nsteps ? s->steps[s->at].name : "top", what, *sentence ? ": " : "", sentence);
    s->ops->on_trace(s, text);
}

static void set_phase(struct seq *s, enum seq_phase phase)
{
    char text[64];

    assert(phase > s->phase); /* a walk never turns upwards again */
    (void)snprintf(text, sizeof(text), "%s -> %s", phase_names[s->phase], phase_names[phase]);
    s->phase = phase;
    if (s->ops->on_trace)
        s->ops->on_trace(s, text);
}

int seq_init(struct seq *s, uv_loop_t *loop, const struct seq_step *steps, unsigned nsteps, const struct seq_ops *ops)
{
    memset(s, 0, sizeof(*s));
    s->steps = steps;
    s->nsteps = nsteps;
    s->ops = ops;
    return uv_timer_init(loop, &s->timer);
}

static void on_timer_closed(uv_handle_t *h)
{
    struct seq *s = container_of((uv_timer_t *)h, struct seq, timer);

    s->ops->on_end(s, &s->problems);
}

static void end(struct seq *s)
{
    set_phase(s, SEQ_END);
    uv_close((uv_handle_t *)&s->timer, on_timer_closed);
}

static void on_timer(uv_timer_t *t)
{
    walk(container_of(t, struct seq, timer));
}

/* Owners are never called from inside their own calls, and the walk never runs inside itself: it begins from the loop.
 */
static void walk_later(struct seq *s, unsigned ms)
{
    (void)uv_timer_start(&s->timer, on_timer, ms, 0); /* fails for a closing handle only; that comes at the end */
}

/* The advance functions: the step at s->at has ended; may the walk go on at once? */
static bool advance_up(struct seq *s, const struct failure *f)
{
    if (f) {
        trace(s, "failed", f->text);
        set_phase(s, SEQ_DOWN); /* from this very step: its lost reply may have had an effect */
        s->ops->on_failed(s, f);
        return true;
    }
    s->at++;
    if (s->stopping) {
        s->at--;
        set_phase(s, SEQ_DOWN);
    } else if (s->at == s->nsteps) {
        set_phase(s, SEQ_TOP);
        s->ops->on_top(s);
        return false;
    }
    return true;
}

static void begin_down(struct seq *s)
{
    s->at = s->nsteps - 1;
    set_phase(s, SEQ_DOWN);
}

static bool advance_commit(struct seq *s, const struct failure *f)
{
    if (f) {
        trace(s, "could not be committed", f->text);
        (void)failure_copy(&s->problems, f);
        begin_down(s);
    } else if (++s->at == s->nsteps) {
        begin_down(s);
    }
    return true;
}

static bool advance_down(struct seq *s, const struct failure *f)
{
    if (f) {
        trace(s, "undo failed", f->text);
        s->ntries++;
        /* Without a connection no number of tries helps; the sweep does, when QEMU answers again. */
        if (s->ntries < SEQ_UNDO_TRIES && f->err != -ENOTCONN) {
            walk_later(s, SEQ_UNDO_RETRY_MS);
            return false;
        }
        (void)failure_set(&s->problems, f->err, "undoing \"%s\" failed: %s", s->steps[s->at].name, f->text);
    }
    s->ntries = 0;
    if (s->at == 0) {
        end(s);
        return false;
    }
    s->at--;
    return true;
}

static seq_step_fn current_fn(const struct seq *s)
{
    const struct seq_step *step = &s->steps[s->at];

    switch (s->phase) {
    case SEQ_UP:
        return step->up;
    case SEQ_COMMIT:
        return step->commit;
    case SEQ_DOWN:
        return step->down;
    default:
        return NULL;
    }
}

static bool advance(struct seq *s, const struct failure *f)
{
    switch (s->phase) {
    case SEQ_UP:
        return advance_up(s, f);
    case SEQ_COMMIT:
        return advance_commit(s, f);
    case SEQ_DOWN:
        return advance_down(s, f);
    default:
        return false;
    }
}

static void walk(struct seq *s)
{
    bool go = true;

    if (s->phase == SEQ_UP && s->stopping)
        set_phase(s, SEQ_DOWN);
    while (go) {
        struct failure f = {0};
        seq_step_fn fn = current_fn(s);
        int r = SEQ_DONE;

        if (fn) {
            s->waiting = true;
            r = fn(s, &f);
            if (r == 0)
                return;
            s->waiting = false;
            if (r < 0)
                (void)failure_set(&f, r, "%s", strerror(-r));
        }
        go = advance(s, r < 0 ? &f : NULL);
    }
}

static void on_deadline(uv_timer_t *t)
{
    struct seq *s = container_of(t, struct seq, timer);

    s->on_deadline(s);
}

void seq_deadline(struct seq *s, unsigned ms, void (*cb)(struct seq *s))
{
    s->on_deadline = cb;
    (void)uv_timer_start(&s->timer, on_deadline, ms, 0);
}

void seq_done(struct seq *s, const struct failure *f)
{
    assert(s->waiting);
    s->waiting = false;
    (void)uv_timer_stop(&s->timer);
    if (advance(s, f && f->err ? f : NULL))
        walk(s);
}

void seq_start(struct seq *s)
{
    set_phase(s, SEQ_UP);
    walk_later(s, 0);
}

void seq_start_at_top(struct seq *s)
{
    s->at = s->nsteps;
    set_phase(s, SEQ_TOP);
}

void seq_stop(struct seq *s, bool commit)
{
    if (s->stopping)
        return;
    s->stopping = true;
    if (s->phase == SEQ_IDLE) {
        end(s);
    } else if (s->phase == SEQ_TOP) {
        if (commit) {
            s->at = 0;
            set_phase(s, SEQ_COMMIT);
        } else {
            begin_down(s);
        }
        walk_later(s, 0);
    }
    /* On the way up the function under way ends first; on the way down there is nothing to add. */
}

void seq_describe(const struct seq *s, char *buf, size_t size)
{
    (void)snprintf(buf, size, "%u/%u %s", MIN(s->at + 1, s->nsteps), s->nsteps,
                   s->phase == SEQ_TOP   ? "up"
                   : s->phase == SEQ_END ? "ended"
                   : s->at < s->nsteps   ? s->steps[s->at].name
                                         : "");
}
