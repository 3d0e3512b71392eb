/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "backup/calls.h"

#include "qmp/commands.h"

#include <errno.h>

struct slot {
    struct qmp_call call;
    struct calls *set;   /* borrowed: the set outlives its calls */
    const char *command; /* borrowed: a literal */
    char what[64];       /* the object it was about, for the sentence */
    unsigned index;
    calls_ret_cb on_ret;
    calls_refused_cb on_refused; /* NULL: a refusal fails the set */
};

void calls_init(struct calls *c, struct qmp_client *qmp, unsigned timeout_ms)
{
    memset(c, 0, sizeof(*c));
    c->qmp = qmp;
    c->timeout_ms = timeout_ms;
}

static bool is_refusal(const struct failure *f)
{
    return f->err == -EREMOTEIO || f->err == -ENODEV || f->err == -ENOSYS;
}

static void fail_slot(struct calls *c, const struct slot *slot, const struct failure *f)
{
    const char *verb = is_refusal(f) ? "QEMU said " : "";
    struct failure worded = {0};

    (void)failure_set(&worded, f->err, "%s%s%s: %s%s%s%s", slot->command, *slot->what ? " " : "", slot->what, verb,
                      *verb ? "'" : "", f->text, *verb ? "'" : "");
    if (slot->on_refused && is_refusal(f))
        slot->on_refused(c, slot->index, &worded);
    else
        (void)failure_copy(&c->failure, &worded);
}

static void on_answer(struct qmp_call *call, struct json_object *ret, const struct failure *f)
{
    struct slot *slot = container_of(call, struct slot, call);
    struct calls *c = slot->set;
    struct failure mine = {0};

    if (!f && slot->on_ret && slot->on_ret(c, slot->index, ret, &mine) < 0)
        f = &mine;
    if (f)
        fail_slot(c, slot, f);
    free(slot);
    if (--c->npending == 0 && c->done) {
        struct failure failure = c->failure;

        memset(&c->failure, 0, sizeof(c->failure));
        TAKE_PTR(c->done)(c, failure.err ? &failure : NULL);
    }
}

/* The object a command is about, as its arguments name it. */
static const char *object_of(struct json_object *args)
{
    static const char *const keys[] = {"node-name", "id", "path", "opaque", "name", "node"};

    for (size_t i = 0; i < ARRAY_SIZE(keys); i++) {
        const char *value = qmp_get_string(args, keys[i]);

        if (value)
            return value;
    }
    return "";
}

void calls_add(struct calls *c, const char *command, struct json_object *args, int fd, unsigned index,
               calls_ret_cb on_ret)
{
    calls_try(c, command, args, fd, index, on_ret, NULL);
}

void calls_try(struct calls *c, const char *command, struct json_object *args, int fd, unsigned index,
               calls_ret_cb on_ret, calls_refused_cb on_refused)
{
    struct slot *slot = calloc(1, sizeof(*slot));
    struct failure f = {0};
    int r;

    if (!slot) {
        json_object_put(args);
        (void)failure_set(&c->failure, -ENOMEM, "%s: out of memory", command);
        return;
    }
    slot->set = c;
    slot->command = command;
    slot->index = index;
    slot->on_ret = on_ret;
    slot->on_refused = on_refused;
    (void)strncat(slot->what, object_of(args), sizeof(slot->what) - 1);
    r = qmp_call_start(c->qmp, &slot->call, command, args, fd, c->timeout_ms, on_answer, NULL);
    if (r < 0) {
        (void)failure_set(&f, r, "%s", r == -ENOTCONN ? "QEMU is not connected" : strerror(-r));
        fail_slot(c, slot, &f);
        free(slot);
        return;
    }
    c->npending++;
}

int calls_wait(struct calls *c, calls_done_cb done, struct failure *f)
{
    struct failure failure = c->failure;

    if (c->npending) {
        c->done = done;
        return 0;
    }
    memset(&c->failure, 0, sizeof(c->failure));
    return failure.err ? failure_copy(f, &failure) : 1;
}
