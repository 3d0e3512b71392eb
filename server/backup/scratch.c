/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/scratch.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

/* One file of a look. */
struct seen {
    uint64_t serial; /* of its user, who may be gone when the look has ended */
    unsigned index;
    int fd; /* owned by the look */
    bool known;
    uint64_t used;
};

struct scratch_place {
    uv_loop_t *loop;
    char *dir; /* owned */
    struct scratch_limits limits;
    struct scratch_user *users;
    uint64_t last_serial;
    uv_timer_t timer;

    /* the look: the worker's while `looking` */
    uv_work_t work;
    bool looking;
    struct seen *seen; /* owned */
    size_t nseen;
    bool free_known;
    uint64_t free; /* bytes on the file system, for those who are not root */

    bool closing;
    void (*on_closed)(void *arg);
    void *arg;
};

static void on_time(uv_timer_t *t);

int scratch_new(uv_loop_t *loop, const char *dir, const struct scratch_limits *limits, struct scratch_place **ret_place)
{
    struct scratch_place *p = calloc(1, sizeof(*p));

    if (!p || !(p->dir = strdup(dir))) {
        free(p);
        return -ENOMEM;
    }
    p->loop = loop;
    p->limits = *limits;
    (void)uv_timer_init(loop, &p->timer);
    *ret_place = p;
    return 0;
}

static void on_timer_closed(uv_handle_t *h)
{
    struct scratch_place *p = container_of((uv_timer_t *)h, struct scratch_place, timer);
    void (*cb)(void *arg) = p->on_closed;
    void *arg = p->arg;

    free(p->dir);
    free(p);
    cb(arg);
}

void scratch_close(struct scratch_place *p, void (*cb)(void *arg), void *arg)
{
    assert(!p->users && !p->closing);
    p->closing = true;
    p->on_closed = cb;
    p->arg = arg;
    if (!p->looking)
        uv_close((uv_handle_t *)&p->timer, on_timer_closed);
}

/* -- questions ----------------------------------------------------------------------------------------------------- */

const char *scratch_dir(const struct scratch_place *p)
{
    return p->dir;
}

const struct scratch_limits *scratch_limits(const struct scratch_place *p)
{
    return &p->limits;
}

uint64_t scratch_used(const struct scratch_user *u)
{
    uint64_t used = 0;

    for (unsigned i = 0; i < u->nfiles; i++)
        used += u->files[i].used;
    return used;
}

uint64_t scratch_used_by_all(const struct scratch_place *p)
{
    uint64_t used = 0;

    for (const struct scratch_user *u = p->users; u; u = u->next)
        used += scratch_used(u);
    return used;
}

static uint64_t used_by_staying(const struct scratch_place *p)
{
    uint64_t used = 0;

    for (const struct scratch_user *u = p->users; u; u = u->next)
        used += u->leaving_ms ? 0 : scratch_used(u);
    return used;
}

int scratch_check_quota(const struct scratch_place *p, struct failure *f)
{
    uint64_t used = used_by_staying(p);

    if (p->limits.all == 0 || used < p->limits.all - p->limits.all / SCRATCH_LAST_PART)
        return 0;
    return failure_set(f, -ENOSPC,
                       "the sessions that stand hold %llu bytes of scratch, and --scratch-total-limit allows %llu to "
                       "all together; try again when one has ended, or raise the limit",
                       (unsigned long long)used, (unsigned long long)p->limits.all);
}

static int ask_free(int fd, uint64_t *ret_free)
{
    struct statvfs st;

    if (fstatvfs(fd, &st) < 0)
        return -errno;
    /* A file system without a size, as a tmpfs with size=0, says 0 of everything. */
    *ret_free = st.f_blocks ? (uint64_t)st.f_bavail * st.f_frsize : UINT64_MAX;
    return 0;
}

int scratch_check_room(const struct scratch_place *p, int fd, struct failure *f)
{
    uint64_t room = 0;
    int r;

    if (p->limits.reserve == 0)
        return 0;
    r = ask_free(fd, &room);
    if (r < 0)
        return failure_set(f, r, "how much is free on the file system of '%s' cannot be asked: %s", p->dir,
                           strerror(-r));
    if (room > p->limits.reserve)
        return 0;
    return failure_set(f, -ENOSPC,
                       "%llu bytes are free on the file system of '%s', and --scratch-reserve keeps %llu for others; "
                       "make room, name another --scratch, or lower the reserve",
                       (unsigned long long)room, p->dir, (unsigned long long)p->limits.reserve);
}

/* Bytes; never, where there is no limit. */
static uint64_t to_limit(uint64_t used, uint64_t limit)
{
    return limit == 0 ? UINT64_MAX : used < limit ? limit - used : 0;
}

/* -- who goes ------------------------------------------------------------------------------------------------------ */

static uint64_t now_ms(const struct scratch_place *p)
{
    return MAX(uv_now(p->loop), 1); /* 0 means "stays" */
}

void scratch_going(struct scratch_user *u)
{
    if (u->place && !u->leaving_ms)
        u->leaving_ms = now_ms(u->place);
}

static void give_up(struct scratch_user *u, enum scratch_limit limit, uint64_t allowed, uint64_t found)
{
    struct scratch_over over = {.limit = limit, .allowed = allowed, .found = found};

    scratch_going(u);
    u->on_over(u, &over);
}

/* Whose end makes the most room. It has also done most to use it up. NULL: nobody who stays holds anything. */
static struct scratch_user *largest(struct scratch_place *p)
{
    struct scratch_user *found = NULL;

    for (struct scratch_user *u = p->users; u; u = u->next) {
        if (!u->leaving_ms && scratch_used(u) > (found ? scratch_used(found) : 0))
            found = u;
    }
    return found;
}

/* What those who are going will have given back soon. */
static uint64_t coming_free(const struct scratch_place *p)
{
    uint64_t used = 0;

    for (const struct scratch_user *u = p->users; u; u = u->next) {
        if (u->leaving_ms && now_ms(p) - u->leaving_ms < SCRATCH_LEAVE_MS)
            used += scratch_used(u);
    }
    return used;
}

static void judge(struct scratch_place *p)
{
    const struct scratch_limits *l = &p->limits;
    struct scratch_user *u;

    for (u = p->users; l->session && u; u = u->next) {
        if (!u->leaving_ms && scratch_used(u) > l->session)
            give_up(u, SCRATCH_SESSION, l->session, scratch_used(u));
    }
    while (l->all && used_by_staying(p) > l->all && (u = largest(p)))
        give_up(u, SCRATCH_ALL, l->all, used_by_staying(p));
    while (l->reserve && p->free_known && to_limit(p->free, l->reserve) > coming_free(p) && (u = largest(p)))
        give_up(u, SCRATCH_RESERVE, l->reserve, p->free);
}

/* -- the look ------------------------------------------------------------------------------------------------------ */

/* Bytes until the next limit. */
static uint64_t margin(const struct scratch_place *p)
{
    uint64_t least = to_limit(used_by_staying(p), p->limits.all);

    for (const struct scratch_user *u = p->users; u; u = u->next) {
        if (!u->leaving_ms)
            least = MIN(least, to_limit(scratch_used(u), p->limits.session));
    }
    if (p->limits.reserve && p->free_known)
        least = MIN(least, p->free > p->limits.reserve ? p->free - p->limits.reserve : 0);
    return least;
}

static void look_later(struct scratch_place *p)
{
    uint64_t ms = margin(p) / (SCRATCH_RATE / 1000);

    (void)uv_timer_start(&p->timer, on_time, MAX(MIN(ms, SCRATCH_LOOK_MAX_MS), SCRATCH_LOOK_MIN_MS), 0);
}

/* In a worker thread. */
static void look(uv_work_t *work)
{
    struct scratch_place *p = container_of(work, struct scratch_place, work);

    for (size_t i = 0; i < p->nseen; i++) {
        struct seen *s = &p->seen[i];
        struct stat st;

        s->known = fstat(s->fd, &st) == 0;
        if (s->known)
            s->used = (uint64_t)st.st_blocks * 512; /* st_blocks counts 512 bytes whatever the file system, stat(2) */
        if (i == 0)
            p->free_known = ask_free(s->fd, &p->free) == 0;
        (void)close(s->fd);
    }
}

static struct scratch_user *find_user(struct scratch_place *p, uint64_t serial)
{
    struct scratch_user *u = p->users;

    while (u && u->serial != serial)
        u = u->next;
    return u;
}

static void after_look(uv_work_t *work, int status)
{
    struct scratch_place *p = container_of(work, struct scratch_place, work);

    p->looking = false;
    for (size_t i = 0; i < p->nseen; i++) {
        struct scratch_user *u = find_user(p, p->seen[i].serial);

        if (u && p->seen[i].known)
            u->files[p->seen[i].index].used = p->seen[i].used;
    }
    free(TAKE_PTR(p->seen));
    p->nseen = 0;
    if (p->closing) {
        uv_close((uv_handle_t *)&p->timer, on_timer_closed);
        return;
    }
    if (!p->users)
        return;
    judge(p);
    look_later(p);
}

/* A file that cannot be looked at for want of a descriptor or of memory keeps what it had: the next look comes soon. */
static void take_descriptors(struct scratch_place *p)
{
    size_t n = 0;

    for (const struct scratch_user *u = p->users; u; u = u->next)
        n += u->nfiles;
    p->seen = calloc(MAX(n, 1), sizeof(*p->seen));
    for (const struct scratch_user *u = p->users; p->seen && u; u = u->next) {
        for (unsigned i = 0; i < u->nfiles; i++) {
            int fd = fcntl(u->files[i].fd, F_DUPFD_CLOEXEC, 0);

            if (fd >= 0)
                p->seen[p->nseen++] = (struct seen){.serial = u->serial, .index = i, .fd = fd};
        }
    }
}

static void on_time(uv_timer_t *t)
{
    struct scratch_place *p = container_of(t, struct scratch_place, timer);

    if (p->looking || !p->users)
        return;
    take_descriptors(p);
    if (p->nseen == 0 || uv_queue_work(p->loop, &p->work, look, after_look) < 0) {
        for (size_t i = 0; i < p->nseen; i++)
            (void)close(p->seen[i].fd);
        free(TAKE_PTR(p->seen));
        p->nseen = 0;
        look_later(p);
        return;
    }
    p->looking = true;
}

/* -- users --------------------------------------------------------------------------------------------------------- */

void scratch_enter(struct scratch_place *p, struct scratch_user *u)
{
    u->place = p;
    u->serial = ++p->last_serial;
    u->leaving_ms = 0;
    u->prev = NULL;
    u->next = p->users;
    if (p->users)
        p->users->prev = u;
    p->users = u;
    if (!p->looking) /* else the next look comes after it */
        (void)uv_timer_start(&p->timer, on_time, 0, 0);
}

void scratch_leave(struct scratch_user *u)
{
    struct scratch_place *p = u->place;

    if (!p)
        return;
    *(u->prev ? &u->prev->next : &p->users) = u->next;
    if (u->next)
        u->next->prev = u->prev;
    u->place = NULL;
    if (!p->users && !p->looking)
        (void)uv_timer_stop(&p->timer);
}
