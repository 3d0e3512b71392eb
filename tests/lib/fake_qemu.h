/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * fake_qemu: the transport of a QMP server on the test's own loop: a unix socket in a temporary directory, one client
 * at a time as with QEMU (others wait in the queue without a greeting), greeting, capabilities, commands with their
 * file descriptors to a handler, and answers, events, rubbish and silence from it. It is not a model of QEMU: what a
 * command does is the handler's business.
 *
 * Loop thread only. Owned by the test until fake_qemu_free(); its handles close on the loop after that.
 */
#ifndef QPULL_TEST_FAKE_QEMU_H
#define QPULL_TEST_FAKE_QEMU_H

#include <json-c/json.h>
#include <stdbool.h>
#include <uv.h>

struct fake_qemu;

struct fake_qemu_options {
    bool mute;                /* accepts, and never greets */
    bool refuse_capabilities; /* answers qmp_capabilities with an error */
    bool deaf;                /* begins without reading: fake_qemu_listen_to() */
    size_t read_size;         /* bytes per recvmsg(), 0: FAKE_QEMU_READ_SIZE; 1: as QEMU 7.2 does */
    size_t write_size;        /* bytes per turn of the loop, 0: all that the socket takes */
    const char *name;         /* file name of the socket, borrowed for fake_qemu_new(); NULL: "qmp.sock" */
};

#define FAKE_QEMU_READ_SIZE 4096

struct fake_command {
    const char *name;         /* borrowed until the handler returns, as the rest */
    struct json_object *args; /* NULL: none */
    struct json_object *id;   /* NULL: none; json_object_get() to answer later */
    /* With read_size 1 only: */
    unsigned nfds;      /* how many descriptors came with bytes of this command (or white space before it) */
    bool fd_came_first; /* … and that the first of them came with its first byte */
};

/* Hears each command after qmp_capabilities; must answer (or not) with the calls below, now or later. */
typedef void (*fake_command_cb)(struct fake_qemu *q, const struct fake_command *command, void *arg);

/* Listens at once. options may be NULL, cb too: each command then returns {}. Fails the test if it cannot. */
struct fake_qemu *fake_qemu_new(uv_loop_t *loop, const struct fake_qemu_options *options, fake_command_cb cb,
                                void *arg);
void fake_qemu_free(struct fake_qemu *q); /* NULL is fine; from within the handler, too */

const char *fake_qemu_path(const struct fake_qemu *q);

/* Answers. id is borrowed, result given (NULL: {}). Without a client they are dropped. */
void fake_qemu_return(struct fake_qemu *q, struct json_object *id, struct json_object *result);
void fake_qemu_error(struct fake_qemu *q, struct json_object *id, const char *class, const char *desc);
/* data is given, NULL: none. Events before qmp_capabilities are not sent, as with QEMU. */
void fake_qemu_event(struct fake_qemu *q, const char *name, struct json_object *data);
void fake_qemu_send(struct fake_qemu *q, const char *bytes, size_t len);

/* The newest descriptor that came and was not taken; owned by the caller. -1: none. A newer one closes an older one. */
int fake_qemu_take_fd(struct fake_qemu *q);

void fake_qemu_hangup(struct fake_qemu *q);                 /* the client only: the next may come at once */
void fake_qemu_stop(struct fake_qemu *q);                   /* QEMU is gone: hangs up and removes the socket */
void fake_qemu_start(struct fake_qemu *q);                  /* … and there again, at the same path */
void fake_qemu_listen_to(struct fake_qemu *q, bool listen); /* reads what the client sends, or leaves it */
void fake_qemu_set_mute(struct fake_qemu *q, bool mute);    /* for the next client */

bool fake_qemu_has_client(const struct fake_qemu *q);    /* one that has entered command mode */
unsigned fake_qemu_nclients(const struct fake_qemu *q);  /* accepted so far */
unsigned fake_qemu_ncommands(const struct fake_qemu *q); /* heard so far, without qmp_capabilities */
unsigned fake_qemu_nfds(const struct fake_qemu *q);      /* received so far */

#endif
