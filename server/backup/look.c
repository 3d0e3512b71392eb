/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a session looks at once a second while it is up: its age, and whether its frozen view still stands. QEMU tells
 * of a broken snapshot in no other way than by failing reads (no event, no counter), and a client that does not read
 * just now would find out much later (docs/decisions/0015-clients.md).
 */
#include "backup/steps.h"

#include <errno.h>

#define LOOK_MS 1000u

static void on_looked(struct source_read *r, int err)
{
    struct session_disk *d = r->arg;

    d->looking = false;
    /* Other errors may be the image's own, and pass; who reads there is told. */
    if (err == -ESTALE && d->session->status == SESSION_UP)
        session_lost(d->session, d->disk->name, -ESTALE, SESSION_BROKEN);
}

static void look_at_views(struct session *s)
{
    for (unsigned i = 0; i < s->rig.ndisks; i++) {
        struct session_disk *d = &s->disks[i];

        if (d->looking || !d->bare)
            continue;
        d->look = (struct source_read){.length = MIN(sizeof(d->look_buffer), d->disk->size),
                                       .buffer = d->look_buffer,
                                       .sure = true,
                                       .cb = on_looked,
                                       .arg = d};
        d->looking = source_read(d->bare, &d->look) == 0;
    }
}

static void look_at_age(struct session *s)
{
    struct failure f = {0};

    if (!s->timeout_s || uv_hrtime() - s->up_ns < s->timeout_s * UINT64_C(1000000000))
        return;
    (void)failure_set(&f, -ETIME,
                      "session %s of VM '%s' is given up: it has been up for the %u seconds that --session-timeout "
                      "allows; what was pulled to its end before is kept",
                      s->rig.id, s->vm, s->timeout_s);
    session_fail(s, &f);
}

static void on_look(uv_timer_t *t)
{
    struct session *s = container_of(t, struct session, look);

    look_at_age(s);
    if (!s->failed && !s->still) /* an image that nobody writes to has no snapshot to break */
        look_at_views(s);
}

void session_look_start(struct session *s)
{
    (void)uv_timer_start(&s->look, on_look, LOOK_MS, LOOK_MS);
}

void session_look_stop(struct session *s)
{
    (void)uv_timer_stop(&s->look);
}
