/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * internal: what the three files of the machine share: nbd.c (feeding, life and end), negotiate.c (handshake) and
 * transmit.c (requests and replies). Not for anybody else.
 */
#ifndef QPULL_NBD_INTERNAL_H
#define QPULL_NBD_INTERNAL_H

#include "nbd/codec.h"
#include "nbd/limits.h"
#include "nbd/nbd.h"
#include "nbd/wire.h"

/* The states, in the order in which they can follow; nbd_set_state() has the allowed moves. */
enum nbd_state {
    STATE_NEW,        /* nothing sent. nbd_start() -> FLAGS */
    STATE_FLAGS,      /* the greeting is out, client flags are awaited -> OPT_HEADER */
    STATE_OPT_HEADER, /* between two options -> OPT_BODY, OPT_SKIP */
    STATE_OPT_BODY,   /* an option we read: data goes into body -> OPT_HEADER, OPT_WAIT, TLS_WAIT */
    STATE_OPT_SKIP,   /* an option whose data is not read: dropped, then answered -> OPT_HEADER */
    STATE_OPT_WAIT,   /* the owner has an ask; input goes to the stash -> OPT_HEADER, REQ_HEADER */
    STATE_TLS_WAIT,   /* STARTTLS is acknowledged, the owner shakes hands; no input is taken -> OPT_HEADER */
    STATE_REQ_HEADER, /* transmission, between two requests -> REQ_SKIP */
    STATE_REQ_SKIP,   /* drops the payload of a refused request, then answers it -> REQ_HEADER */
    STATE_DRAIN,      /* the end is decided, input is ignored, requests in flight are awaited -> CLOSED */
    STATE_CLOSED,     /* hangup was called; everything is ignored */
};

/* A request as it stands on the wire. */
struct wire_request {
    uint16_t flags, type;
    uint64_t cookie, offset, length;
};

struct nbd_input {
    const uint8_t *p; /* borrowed for the call */
    size_t left;      /* bytes */
};

/*
 * 840 bytes; 4.5 KiB more in transmission (requests); up to 70 KiB more while an option is at hand (body, name, stash),
 * and what the selected contexts' names take.
 */
struct nbd {
    const struct nbd_ops *ops; /* borrowed for life */
    void *arg;                 /* the owner's */
    enum nbd_state state;
    bool running;  /* inside run(): answers and replies made now are carried on by it */
    bool mute;     /* the reply stream is broken: nothing more may be sent */
    bool fixed;    /* the client said FIXED_NEWSTYLE */
    bool nozeroes; /* the client said NO_ZEROES */
    bool tls_up;
    enum nbd_tls tls;
    bool structured, extended; /* reply form; extended implies structured */
    bool transmitting;         /* an export is open */

    uint8_t head[NBD_EXTENDED_REQUEST_SIZE]; /* header being collected */
    size_t head_len;
    uint8_t *stash; /* owned, NBD_STASH_MAX bytes or NULL: input taken in OPT_WAIT, from stash_pos on not processed */
    size_t stash_pos, stash_len;

    /* the option at hand */
    unsigned noptions;
    uint32_t option;
    uint8_t *body;                /* owned: its data, until it is answered */
    size_t body_len, body_want;   /* bytes */
    uint64_t skip_left;           /* bytes of an option or payload still to drop */
    const struct nbd_option *row; /* NULL: unknown */
    uint32_t refusal;             /* OPT_SKIP: reply type of the answer; 0: the option is done all the same */
    const char *refusal_text;     /* a literal */
    char *name;                   /* owned: export it speaks of, until it is answered */
    unsigned infos;               /* INFO, GO: bits 1 << NBD_INFO_* */
    struct codec_reader queries;  /* META_CONTEXT: where they begin in body */
    uint32_t nqueries;
    enum nbd_ask_type ask; /* OPT_WAIT: what was asked */

    /* metadata contexts selected */
    char *context_export; /* owned: the name they were selected for */
    char **contexts;      /* owned, each; NULL in transmission, where the number is enough */
    size_t ncontexts;

    /* transmission */
    uint64_t size; /* bytes */
    uint32_t min_block, max_block;
    bool trim;
    struct nbd_request *requests; /* owned: array of NBD_INFLIGHT_MAX */
    struct nbd_request *idle;     /* list of those not in flight */
    size_t ninflight;
    struct wire_request skipped; /* REQ_SKIP: the request that is refused */
    int skipped_err;
    const char *skipped_text; /* a literal */

    enum nbd_end end; /* from DRAIN on */
    struct failure why;
};

/* -- nbd.c --------------------------------------------------------------------------------------------------------- */
void nbd_set_state(struct nbd *n, enum nbd_state state);
/* Collects want bytes into head; true when they are there, and head_len is 0 again. */
bool nbd_collect(struct nbd *n, struct nbd_input *in, size_t want);
/* Drops up to skip_left bytes; true when all are gone. */
bool nbd_skip(struct nbd *n, struct nbd_input *in);
void nbd_send(struct nbd *n, const void *head, size_t len, struct nbd_payload *payload);
/* Decides the end; the first one counts. err 0: nothing is wrong, no sentence. */
void nbd_finish(struct nbd *n, enum nbd_end end, int err, const char *fmt, ...) _printf_(4, 5);
/* The last request in flight may have gone. */
void nbd_try_close(struct nbd *n);
/* Goes on with stashed options after an answer; requests wait until they are fed. */
void nbd_resume(struct nbd *n);

/* -- negotiate.c --------------------------------------------------------------------------------------------------- */
/* One step on the input; false: it needs more, or an answer. The same for transmit_step(). */
bool negotiate_step(struct nbd *n, struct nbd_input *in);
void negotiate_forget_option(struct nbd *n);
void negotiate_forget_contexts(struct nbd *n);

/* -- transmit.c ---------------------------------------------------------------------------------------------------- */
int transmit_init(struct nbd *n, const struct nbd_export *e); /* -ENOMEM */
/* What the client is told of e. */
uint16_t transmit_flags(const struct nbd *n, const struct nbd_export *e);
uint32_t transmit_min_block(const struct nbd_export *e);
uint32_t transmit_max_block(const struct nbd_export *e);
uint32_t transmit_context_id(size_t i);
bool transmit_step(struct nbd *n, struct nbd_input *in);

#endif
