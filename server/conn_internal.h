/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* conn_internal: what conn.c (socket and life) and conn_ask.c (answers of the negotiation) share. Not for anybody else.
 */
#ifndef QPULL_CONN_INTERNAL_H
#define QPULL_CONN_INTERNAL_H

#include "conn.h"
#include "nbd/nbd.h"
#include "pull.h"
#include "tls.h"

/* In this order; a connection only moves down. */
enum conn_state {
    CONN_TALKING,  /* bytes go both ways; nbd has not hung up */
    CONN_FLUSHING, /* nbd has hung up; what it sent is on its way. No request is left */
    CONN_SHUT, /* our end is shut, or the socket is dead; nbd is freed. Waits for the client's end, and for reads of the
                  source */
    CONN_CLOSING, /* uv_close() is called; on_closed() frees it */
};

enum stay_state { STAY_NONE, STAY_ENTERING, STAY_ENTERED };

/* Something to send: a head, and behind it maybe a payload. */
struct conn_chunk {
    struct conn_chunk *next;
    struct nbd_payload *payload; /* given by nbd; released when written */
    size_t len;                  /* bytes of head */
    size_t sent;                 /* bytes of both that are out already */
    char head[];
};

struct conn {
    struct conn_set *set; /* borrowed */
    struct conn *next, *prev;
    uint64_t id;
    enum conn_state state;
    union {
        uv_handle_t handle;
        uv_stream_t stream;
        uv_pipe_t pipe;
        uv_tcp_t tcp;
    } sock;
    char identity[TLS_IDENTITY_MAX]; /* "uid:0", "ip:192.0.2.7"; with TLS who its certificate or key says it is */
    char origin[80];                 /* "uid:0", "ip:192.0.2.7", with TLS, too */
    struct access_who who;
    struct nbd *nbd; /* owned until CONN_SHUT */
    struct fair_member fair;
    bool has_turn; /* requests may be taken although there are other clients */

    /* input */
    bool reading, input_eof;
    size_t input_at, input_len; /* bytes in input that nbd has not taken */
    char input[CONN_READ_BUFFER];

    /* output: chunks wait in queue; those in batch are with libuv */
    struct conn_chunk *queue, *queue_last, *batch; /* owned */
    size_t head_bytes;                             /* of heads in queue and batch, with CONN_CHUNK_COST each */
    uint64_t submitted;                            /* bytes given to libuv, ever */
    uint64_t written;                              /* of them: taken by the client's socket when we last looked */
    uv_write_t write;
    uv_shutdown_t shutdown;
    uv_buf_t bufs[2 * CONN_BATCH_CHUNKS];
    bool shutting;  /* uv_shutdown() is under way */
    bool broken;    /* a chunk could not be queued: nothing may follow it */
    bool quiet;     /* not worth a line in the log */
    bool await_eof; /* CONN_SHUT: the client gets time to read our last words */

    /* TLS: conn_tls.c */
    struct tls *tls; /* owned; NULL: bytes go in clear */
    bool tls_wanted; /* STARTTLS is acknowledged: nothing is fed until TLS is up */
    bool tls_was_up;

    /* negotiation */
    struct catalog_ask ask;
    enum nbd_ask_type ask_type;
    bool asking; /* an ask of nbd is with us */
    bool parked; /* likewise, and nothing is done about it until the client has read more of its answers */
    struct nbd_ask parked_ask;
    bool opened;                    /* it was let into a session: it makes way for nobody any more */
    bool one_too_many, turned_away; /* its identity has as many as it may; and it has been told */

    /* the session */
    struct vm *vm; /* borrowed: of the stay */
    struct vm_stay stay;
    enum stay_state stay_state;
    char *disk, *checkpoint; /* owned: strings of the stay */
    char **contexts;         /* owned, each: negotiated contexts, in nbd's order */
    const char **since;      /* owned array: points into contexts */
    size_t ncontexts;
    char *export_name;                      /* owned: canonical; NULL: none is open */
    uint64_t size;                          /* bytes */
    struct ticket *ticket;                  /* entered: what it opens, it opens by this; NULL: by its own rights */
    char *ticket_identity, *ticket_session; /* owned: then whose session the stay is for */
    const char *asked;                      /* borrowed from nbd until the ask is answered: the export's name */
    bool secret;                            /* it looks like a ticket: not for the log */
    bool hushed;                            /* an error that may have it in it is being told: an end by it, likewise */
    struct pull pull;
    bool pulling;                 /* pull is initialised */
    bool mapped;                  /* it has its maps */
    struct nbd_request *unmapped; /* borrowed from nbd: a question that waits for them, and all input behind it; NULL */
    uint64_t taken_seen;          /* pull.ntaken at the last tick */

    /* deadlines, in loop time */
    uint64_t since_ms;    /* connected, moved on by the time that we took for answers */
    uint64_t asked_ms;    /* the ask came */
    uint64_t active_ms;   /* last request, or byte taken */
    uint64_t progress_ms; /* last byte taken by the client while something was unsent */
    uint64_t end_ms;      /* the end was decided */
    uint64_t shut_ms;     /* CONN_SHUT was reached */
    uint64_t born_ns;     /* connected, by uv_hrtime() */

    enum nbd_end end;   /* from CONN_FLUSHING on */
    struct failure why; /* likewise; err 0: a good end */
};

/* -- conn.c -------------------------------------------------------------------------------------------------------- */
/* Called last by every callback that enters a connection: moves it on as far as it can. The connection may be closing
 * then, but is not freed. */
void conn_settle(struct conn *c);
static inline bool conn_is_sending(const struct conn *c)
{
    return c->queue || c->batch || (c->tls && tls_is_sending(c->tls));
}
/* Bytes that the socket has taken: says only that it goes on, or does not. */
static inline uint64_t conn_progress(const struct conn *c)
{
    return c->tls ? tls_progress(c->tls) : c->submitted - uv_stream_get_write_queue_size(&c->sock.stream);
}
/* The batch is with the socket, or will never be. */
void conn_batch_done(struct conn *c, int status);
/* It has not taken what we have answered: nothing more is made for it. */
bool conn_is_full(const struct conn *c);

/* The socket is dead, or the client is beyond waiting for. Never from inside a callback of nbd. */
void conn_kill(struct conn *c, int err, const char *fmt, ...) _printf_(3, 4);

/* -- conn_who.c ---------------------------------------------------------------------------------------------------- */
/* Fills who and origin, and joins those who share us; from: in words, with process or port. Negative errno. */
int conn_identify(struct conn *c, char *from, size_t size);

/* -- conn_limit.c -------------------------------------------------------------------------------------------------- */
bool conn_limit_make_room(struct conn_set *s);                /* true: there is a place for one more */
void conn_limit_farewells(struct conn_set *s);                /* one more will come */
bool conn_limit_line(struct conn_set *s);                     /* a line about a client may be logged */
void conn_limit_check(struct conn *c);                        /* who it is is known now, or known better */
bool conn_limit_refuses(struct conn *c, struct failure *why); /* whatever it asks for */
void conn_limit_settle(struct conn *c);                       /* it has been told: now it goes */

/* -- conn_ticket.c ------------------------------------------------------------------------------------------------- */
/* True: it asks for an export by a ticket that is good. OPEN: it is entered, until conn_ticket_leave(). */
bool conn_ticket_find(struct conn *c, const struct nbd_ask *ask, struct catalog_hit *ret_hit);
void conn_ticket_leave(struct conn *c, bool used); /* also if there is none. used: it was let in */
bool conn_ticket_is_meant(const struct nbd_ask *ask);

/* -- conn_care.c --------------------------------------------------------------------------------------------------- */
void conn_care(struct conn *c); /* every CONN_TICK_MS; conn_settle() comes after it */

/* -- conn_tls.c ---------------------------------------------------------------------------------------------------- */
void conn_tls_offer(struct conn *c);    /* before nbd_start() */
void conn_tls_starttls(struct conn *c); /* nbd's word */
void conn_tls_settle(struct conn *c);   /* until CONN_SHUT: begins it, tells nbd how it went */
/* Fills the empty input buffer with what has come; false: nothing has, or the end. */
bool conn_tls_input(struct conn *c);
struct json_object *conn_tls_to_json(const struct conn *c); /* NULL: in clear */

/* -- conn_ask.c ---------------------------------------------------------------------------------------------------- */
void conn_ask(struct conn *c, const struct nbd_ask *ask);
void conn_ask_parked(struct conn *c); /* goes on with it */
/* Gives up what waits for an answer. */
void conn_ask_forget(struct conn *c);
/* Ends the stay, unless a read of the source is in flight or there is none; true: there is none now. */
bool conn_try_leave(struct conn *c);
void conn_ask_done(struct conn *c);
/* Answers what waits for maps if it can be: they are there, or never will be. */
void conn_ask_mapped(struct conn *c);

#endif
