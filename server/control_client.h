/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* control_client: what control.c (the wire) and control_places.c (who may be at it) share. Not for anybody else. */
#ifndef QPULL_CONTROL_CLIENT_H
#define QPULL_CONTROL_CLIENT_H

#include "control_internal.h"
#include "qmp/stream.h"

struct control_client {
    struct control *control; /* borrowed */
    struct control_client *next, *prev;
    uint64_t id;
    uint64_t born_ms; /* connected, in loop time */
    struct access_who who;
    uv_pipe_t pipe;
    struct qmp_stream stream;
    bool negotiated; /* qmp_capabilities was said */
    bool reading, closing;
    bool last_words;            /* closes when all is written */
    bool doomed;                /* closed at the next tick */
    bool heard_out;             /* it has shut its writing side: closes when all is answered */
    struct control_call *calls; /* owned */
    size_t ncalls;
    size_t unsent;      /* bytes handed to libuv and not written */
    size_t unsent_seen; /* of libuv's queue, when progress was last looked at */
    uint64_t progress_ms;
    char input[CONTROL_READ_BUFFER];
};

struct control {
    struct server *server;          /* borrowed */
    struct listener *listener;      /* owned */
    struct control_client *clients; /* owned */
    size_t nclients;
    uint64_t next_id;
    uv_timer_t tick;  /* runs while there is a client */
    uint64_t told_ms; /* when the log was last told of one who was turned away; 0: never */
    uint64_t nuntold; /* who was turned away since then */
    bool closing;
    void (*on_closed)(void *arg);
    void *arg;
};

/* -- control.c ----------------------------------------------------------------------------------------------------- */
/* It is freed when its socket is closed; calls that nobody wants to hear end. Closing it again does nothing. */
void control_client_close(struct control_client *client);
/* The caller's. id: the client's, or NULL. */
struct json_object *control_error_document(struct json_object *id, const char *class, const char *text);

/* -- control_places.c ---------------------------------------------------------------------------------------------- */
/* Tells it why, if the socket takes the words at once, and closes: who is not wanted keeps no place. */
void control_turn_away(struct control_client *client, const char *fmt, ...) _printf_(2, 3);
void control_tell_untold(struct control *c); /* now and then: of those whom the log was not told of */
/* False: it has been turned away. */
bool control_check_connect(struct control_client *client);
bool control_check_place(struct control_client *client);

#endif
