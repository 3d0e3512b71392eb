/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * nbd: the server's side of the NBD protocol, bytes in, requests out: negotiation (newstyle, fixed) and transmission.
 * It knows no sockets, no loop and no disks; whoever owns the `struct nbd` (server/conn) moves the bytes and has the
 * answers. Every limit of what a client can make it keep is in nbd/limits.h. References in comments ("spec") are to the
 * NBD protocol document, doc/proto.md.
 *
 * Any one thread at a time. No call blocks. No callback is made after nbd_free().
 *
 * Flow: nbd_new() -> nbd_start() -> nbd_feed()* -> (ask -> nbd_answer_*())* -> (request -> nbd_reply_*())* -> hangup.
 * An `ask` must be answered by exactly one nbd_answer_*() call of its kind, at once or later; requests likewise by one
 * final nbd_reply_*(). Both may happen from inside the callback. Requests may be answered in any order.
 *
 * From inside a callback only nbd_answer_*(), nbd_reply_*(), nbd_inflight() and the two state questions may be called.
 * Callbacks, hangup too, may come out of any call but nbd_new() and nbd_free().
 */
#ifndef QPULL_NBD_NBD_H
#define QPULL_NBD_NBD_H

#include "qmp/base.h"

#include <stdbool.h>

#define NBD_NAME_MAX 4096 /* bytes, spec: "string size limit" */

struct nbd;

#define NBD_STATE_HOLE 1u
#define NBD_STATE_ZERO 2u
#define NBD_STATE_DIRTY 1u

/* Payload of one READ chunk on its way out. Made by the owner, passed through nbd to ops->send untouched. */
struct nbd_payload {
    const void *data; /* borrowed until release */
    size_t len;
    void (*release)(struct nbd_payload *p); /* called exactly once, when sent or dropped; may be NULL */
};

/* What a negotiating client wants to know. The struct is borrowed for the call, the strings in it until the answer. */
enum nbd_ask_type {
    NBD_ASK_LIST,     /* nbd_answer_list() */
    NBD_ASK_EXPORT,   /* INFO: nbd_answer_export(); nothing may be frozen for it */
    NBD_ASK_CONTEXTS, /* LIST/SET_META_CONTEXT: nbd_answer_contexts(); nothing may be frozen for it */
    NBD_ASK_OPEN,     /* GO, EXPORT_NAME: nbd_answer_export(), after which transmission begins */
};

struct nbd_ask {
    enum nbd_ask_type type;
    const char *export_name; /* "" is the default export; NULL for LIST; borrowed until the answer */
    size_t ncontexts; /* OPEN only: contexts that SET_META_CONTEXT selected for this very export; the index … */
    const char *const *contexts; /* … is that of nbd_reply_status()'s array; borrowed until the answer */
};

struct nbd_export {
    const char *name;        /* canonical name (NBD_INFO_NAME), borrowed for the call; NULL: none told */
    const char *description; /* (NBD_INFO_DESCRIPTION) likewise */
    uint64_t size;           /* bytes */
    /*
     * Bytes; powers of two but max_block. Told to clients that ask; all are held to min_block and max_block, so those
     * that do not ask fare badly unless min_block is 1 and max_block 32 MiB or more (the spec's defaults, also used for
     * 0).
     */
    uint32_t min_block, preferred_block, max_block;
    bool multi_conn;
    /*
     * TRIM is taken, on what is read-only for all else: it gives data back that this client needs no more. The spec
     * has TRIM for exports that can be written only, so it must be wanted (SHOULD: NBD_EPERM).
     */
    bool trim;
};

/* A validated request of the transmission phase. Borrowed from nbd; lives until its final reply. */
enum nbd_command { NBD_COMMAND_READ, NBD_COMMAND_STATUS, NBD_COMMAND_CACHE, NBD_COMMAND_TRIM };

struct nbd_request {
    enum nbd_command command;
    uint64_t offset; /* bytes */
    uint64_t length; /* bytes, > 0, offset + length <= size; READ: <= max_block */
    bool df;         /* READ: the answer must be one chunk (spec: NBD_CMD_FLAG_DF) */
    bool one;        /* STATUS: one extent a context is enough (NBD_CMD_FLAG_REQ_ONE) */
    bool in_order;   /* READ: the client speaks simple replies: chunks must come in order and cannot fail half-way */
    void *owner;     /* the owner's to use, NULL at first */
    /* private */
    struct nbd *nbd; /* NULL: not in flight */
    struct nbd_request *next;
    uint64_t cookie;
    uint64_t sent; /* READ: payload bytes handed to send so far */
};

/* Why the connection ends; tells a good end from a bad one. */
enum nbd_end {
    NBD_END_DISC,     /* the client said NBD_CMD_DISC and has all its answers */
    NBD_END_ABORT,    /* NBD_OPT_ABORT */
    NBD_END_PROTOCOL, /* the client broke the rules; failure says how */
    NBD_END_EOF,      /* the client's end of file came without DISC */
    NBD_END_LOST,     /* our side: nbd_fail(), an error after EXPORT_NAME or in the middle of a simple reply */
};

struct nbd_ops {
    void (*ask)(void *arg, const struct nbd_ask *ask);
    void (*request)(void *arg, struct nbd_request *r);
    /*
     * Send head (len 0: none), then payload (may be NULL; given). head is borrowed for the call. Never refused: the
     * owner stops feeding when its queue is long (that, and the bound on requests in flight, is the back-pressure).
     */
    void (*send)(void *arg, const void *head, size_t len, struct nbd_payload *payload);
    /*
     * The end: flush what was sent, then close. Comes exactly once, when no request is in flight any more. Every call
     * that still follows is ignored (answers to a pending ask included), but nbd_free(), which must wait until the call
     * that this came out of has returned. why is never NULL; its err is 0 where nothing went wrong.
     */
    void (*hangup)(void *arg, enum nbd_end end, const struct failure *why);
    /*
     * The client's STARTTLS was acknowledged: what is sent from now on, and every byte that nbd_feed() has not taken,
     * is TLS. Ends with nbd_tls_ready(), or nbd_fail(). May be NULL where nbd_offer_tls() is not used.
     */
    void (*starttls)(void *arg);
};

enum nbd_tls {
    NBD_TLS_OFF,      /* STARTTLS is not known here */
    NBD_TLS_ON,       /* the client may ask for it */
    NBD_TLS_REQUIRED, /* the client must ask for it before anything else */
};

int nbd_new(const struct nbd_ops *ops, void *arg, struct nbd **ret_nbd); /* ops borrowed for life */
void nbd_free(struct nbd *n);                                            /* NULL is fine; requests die with it */

void nbd_offer_tls(struct nbd *n, enum nbd_tls mode); /* before nbd_start(); NBD_TLS_OFF otherwise */

void nbd_start(struct nbd *n); /* sends the greeting */

/*
 * Consumes up to len bytes; returns how many were taken. Fewer than len: an ask is waiting and the small buffer
 * (limits.h) is full, or NBD_INFLIGHT_MAX requests are in flight, or TLS begins (ops->starttls). Feed the rest after
 * the next answer or final reply; or transmission has begun, and then requests come as the owner wants them: what was
 * taken while the answer to GO was awaited is looked at first, one request for each call, and the call takes nothing.
 * After the end everything is taken and ignored.
 */
size_t nbd_feed(struct nbd *n, const void *bytes, size_t len);
/* In transmission: there are such bytes, and nbd_feed() goes on with them whether it is given others or not. */
bool nbd_has_more(const struct nbd *n);
/*
 * No more bytes will come; feed what is left before. An ask that waits is given up: hangup(NBD_END_EOF) at once.
 * Requests in flight still want their replies first.
 */
void nbd_feed_eof(struct nbd *n);
/* After ops->starttls: the handshake is done; bytes fed from now on come out of TLS. */
void nbd_tls_ready(struct nbd *n);

/* The disk is lost or the server goes down: no new requests, those in flight still want their (error) replies, then
 * hangup(NBD_END_LOST). During negotiation: hangup at once. */
void nbd_fail(struct nbd *n, const struct failure *why);

bool nbd_in_transmission(const struct nbd *n); /* an export is open, hangup has not come */
bool nbd_is_ending(const struct nbd *n);       /* no new request will come */
size_t nbd_inflight(const struct nbd *n);      /* requests not yet finally replied to */

/* -- answers to ask ------------------------------------------------------------------------------------------------ */
struct nbd_list_entry {
    const char *name;
    const char *description; /* may be NULL */
};
void nbd_answer_list(struct nbd *n, const struct nbd_list_entry *entries, size_t nentries);
/*
 * All contexts this export has, e.g. "base:allocation", "qemu:dirty-bitmap:monday"; nbd matches the queries, the
 * "qemu:", "qemu:dirty-bitmap:" and "base:" wild cards included (LIST only, spec and QEMU's docs/interop/nbd.txt).
 */
void nbd_answer_contexts(struct nbd *n, const char *const *names, size_t nnames);
void nbd_answer_export(struct nbd *n, const struct nbd_export *e);
/*
 * Fits every ask. why->err: -ENOENT: NBD_REP_ERR_UNKNOWN, -EACCES/-EPERM/-EBUSY: ERR_POLICY, -ESHUTDOWN: ERR_SHUTDOWN,
 * -EINVAL: ERR_INVALID, all others: ERR_PLATFORM; the sentence goes to the client. EXPORT_NAME has no errors: it hangs
 * up.
 */
void nbd_answer_error(struct nbd *n, const struct failure *why);

/* -- replies to request -------------------------------------------------------------------------------------------- */
/*
 * READ: the piece [offset, offset + payload->len) of the request. Structured replies without DF: any order, any number
 * of pieces. With in_order or df: ascending without gaps from r->offset. The reply is final, and r gone, when all bytes
 * are in. payload is given.
 */
void nbd_reply_data(struct nbd_request *r, uint64_t offset, struct nbd_payload *payload);
/* READ: this piece reads as zeros (spec: NBD_REPLY_TYPE_OFFSET_HOLE). Not with in_order or df. Counts like data. */
void nbd_reply_hole(struct nbd_request *r, uint64_t offset, uint32_t length);

/*
 * STATUS: one entry per negotiated context, same order as nbd_ask.contexts: runs as a map keeps them, for a million of
 * them are sent from there without another copy. Run i begins at starts[i], ascending, and the last one ends at end;
 * the first one holds r->offset (else, or where there is none, the client gets EIO). nbd cuts to the request and to
 * what the reply forms and REQ_ONE allow. Final.
 */
struct nbd_status {
    const uint64_t *starts; /* borrowed for the call, as flags */
    const uint32_t *flags;  /* of that context: base:allocation's NBD_STATE_*, dirty-bitmap's bit 0, or a depth */
    size_t nruns;
    uint64_t end;
};
void nbd_reply_status(struct nbd_request *r, const struct nbd_status *status, size_t nstatus);
/* How many runs per context are worth giving for r. */
size_t nbd_status_max_extents(const struct nbd_request *r);

void nbd_reply_done(struct nbd_request *r); /* CACHE, TRIM: final */
/*
 * Final, for every command, also half-way through a READ. A simple reply that has begun cannot tell the error any more:
 * the machine goes silent and hangs up (NBD_END_LOST) once no request is in flight. err: negative errno, mapped to the
 * protocol's; sentence may be NULL.
 */
void nbd_reply_error(struct nbd_request *r, int err, const char *sentence);

#endif
