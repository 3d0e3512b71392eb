/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "qmp/outbox.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

struct outbox_item {
    struct outbox_item *next;
    uint64_t id;
    int fd; /* owned until the first byte is sent; -1: none, or gone */
    size_t len, sent;
    char bytes[];
};

static void item_free(struct outbox_item *i)
{
    if (i->fd >= 0)
        close(i->fd);
    free(i);
}

/* args is given. NULL: no memory. */
static struct json_object *command_object(const char *command, struct json_object *args, uint64_t id)
{
    struct json_object *o = json_object_new_object();
    bool ok = o != NULL;

    ok = ok && json_object_object_add(o, "execute", json_object_new_string(command)) == 0;
    if (ok && args) {
        ok = json_object_object_add(o, "arguments", args) == 0;
        args = ok ? NULL : args;
    }
    ok = ok && json_object_object_add(o, "id", json_object_new_int64((int64_t)id)) == 0;
    json_object_put(args);
    if (!ok) {
        json_object_put(o);
        return NULL;
    }
    return o;
}

/* A newline ends the command: QEMU does not need one, people and line readers do. NULL: no memory. */
static struct outbox_item *item_new(struct json_object *object, uint64_t id)
{
    size_t len = 0;
    const char *text =
        json_object_to_json_string_length(object, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE, &len);
    struct outbox_item *i = text ? malloc(sizeof(*i) + len + 1) : NULL;

    if (!i)
        return NULL;
    *i = (struct outbox_item){.id = id, .fd = -1, .len = len + 1};
    memcpy(i->bytes, text, len);
    i->bytes[len] = '\n';
    return i;
}

int outbox_put(struct outbox *b, const char *command, struct json_object *args, uint64_t id, int fd, size_t max_unsent)
{
    struct json_object *object = command_object(command, args, id);
    struct outbox_item *i = object ? item_new(object, id) : NULL;
    int r = 0;

    json_object_put(object);
    if (!i)
        return -ENOMEM;
    if (i->len > max_unsent - MIN(b->unsent, max_unsent))
        r = -ENOBUFS;
    if (r == 0 && fd >= 0) {
        i->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (i->fd < 0)
            r = -errno;
    }
    if (r < 0) {
        item_free(i);
        return r;
    }
    *(b->last ? &b->last->next : &b->first) = i;
    b->last = i;
    b->unsent += i->len;
    return 0;
}

/*
 * One sendmsg() never holds bytes of two commands. Linux gives the descriptor to whoever reads the first byte of the
 * message, and QEMU to the next command that takes one: so it arrives with its command's first byte, and only there.
 */
static ssize_t item_send(struct outbox_item *i, int sock)
{
    struct iovec iov = {.iov_base = i->bytes + i->sent, .iov_len = i->len - i->sent};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};

    if (i->fd >= 0) {
        struct cmsghdr *cmsg;

        msg.msg_control = control;
        msg.msg_controllen = sizeof(control);
        cmsg = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(cmsg), &i->fd, sizeof(int));
    }
    return sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Takes out the item after before, NULL: the first. */
static void outbox_remove_after(struct outbox *b, struct outbox_item *before)
{
    struct outbox_item **from = before ? &before->next : &b->first;
    struct outbox_item *i = *from;

    *from = i->next;
    if (b->last == i)
        b->last = before;
    b->unsent -= i->len - i->sent;
    item_free(i);
}

int outbox_flush(struct outbox *b, int sock)
{
    while (b->first) {
        struct outbox_item *i = b->first;
        ssize_t n = item_send(i, sock);

        if (n < 0) {
            if (errno == EINTR)
                continue;
            return errno == EAGAIN ? 0 : -errno;
        }
        i->sent += (size_t)n;
        b->unsent -= (size_t)n;
        if (i->fd >= 0) {
            close(i->fd);
            i->fd = -1;
        }
        if (i->sent == i->len)
            outbox_remove_after(b, NULL);
    }
    return 0;
}

void outbox_drop(struct outbox *b, uint64_t id)
{
    struct outbox_item *before = NULL;

    for (struct outbox_item *i = b->first; i; before = i, i = i->next) {
        if (i->id != id)
            continue;
        if (i->sent == 0)
            outbox_remove_after(b, before);
        return;
    }
}

bool outbox_is_empty(const struct outbox *b)
{
    return !b->first;
}

void outbox_done(struct outbox *b)
{
    while (b->first)
        outbox_remove_after(b, NULL);
}
