/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* nbd: life and end of the machine, and the loop that feeds its two halves (negotiate.c, transmit.c). */
#include "nbd/nbd.h"
#include "nbd/internal.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>

/* -- states -------------------------------------------------------------------------------------------------------- */

#define TO(state) (1u << STATE_##state)

static const unsigned moves[] = {
    [STATE_NEW] = TO(FLAGS) | TO(DRAIN),
    [STATE_FLAGS] = TO(OPT_HEADER) | TO(DRAIN),
    [STATE_OPT_HEADER] = TO(OPT_BODY) | TO(OPT_SKIP) | TO(DRAIN),
    [STATE_OPT_BODY] = TO(OPT_HEADER) | TO(OPT_WAIT) | TO(TLS_WAIT) | TO(DRAIN),
    [STATE_OPT_SKIP] = TO(OPT_HEADER) | TO(DRAIN),
    [STATE_OPT_WAIT] = TO(OPT_HEADER) | TO(REQ_HEADER) | TO(DRAIN),
    [STATE_TLS_WAIT] = TO(OPT_HEADER) | TO(DRAIN),
    [STATE_REQ_HEADER] = TO(REQ_SKIP) | TO(DRAIN),
    [STATE_REQ_SKIP] = TO(REQ_HEADER) | TO(DRAIN),
    [STATE_DRAIN] = TO(CLOSED),
    [STATE_CLOSED] = 0,
};
static_assert(ARRAY_SIZE(moves) == STATE_CLOSED + 1, "every state has its moves");

void nbd_set_state(struct nbd *n, enum nbd_state state)
{
    bool allowed = moves[n->state] & (1u << state);

    assert(allowed);
    (void)allowed;
    n->state = state;
}

/* -- life ---------------------------------------------------------------------------------------------------------- */

int nbd_new(const struct nbd_ops *ops, void *arg, struct nbd **ret_nbd)
{
    struct nbd *n = calloc(1, sizeof(*n));

    if (!n)
        return -ENOMEM;
    n->ops = ops;
    n->arg = arg;
    *ret_nbd = n;
    return 0;
}

void nbd_free(struct nbd *n)
{
    if (!n)
        return;
    assert(!n->running);
    negotiate_forget_option(n);
    negotiate_forget_contexts(n);
    free(n->stash);
    free(n->requests);
    free(n);
}

void nbd_offer_tls(struct nbd *n, enum nbd_tls mode)
{
    assert(n->state == STATE_NEW);
    assert(mode == NBD_TLS_OFF || n->ops->starttls);
    n->tls = mode;
}

void nbd_start(struct nbd *n)
{
    uint8_t greeting[NBD_GREETING_SIZE];
    uint8_t *p = greeting;

    p = codec_put64(p, NBD_MAGIC);
    p = codec_put64(p, NBD_OPTION_MAGIC);
    codec_put16(p, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    nbd_set_state(n, STATE_FLAGS);
    nbd_send(n, greeting, sizeof(greeting), NULL);
}

void nbd_send(struct nbd *n, const void *head, size_t len, struct nbd_payload *payload)
{
    if (!n->mute)
        n->ops->send(n->arg, head, len, payload);
    else if (payload && payload->release)
        payload->release(payload);
}

/* -- input --------------------------------------------------------------------------------------------------------- */

bool nbd_collect(struct nbd *n, struct nbd_input *in, size_t want)
{
    size_t len = MIN(in->left, want - n->head_len);

    codec_put_bytes(n->head + n->head_len, in->p, len);
    n->head_len += len;
    in->p += len;
    in->left -= len;
    if (n->head_len < want)
        return false;
    n->head_len = 0;
    return true;
}

bool nbd_skip(struct nbd *n, struct nbd_input *in)
{
    size_t len = MIN(in->left, n->skip_left);

    in->p += len;
    in->left -= len;
    n->skip_left -= len;
    return n->skip_left == 0;
}

/* False: more input or an answer is needed to go on. */
static bool step(struct nbd *n, struct nbd_input *in)
{
    switch (n->state) {
    case STATE_FLAGS:
    case STATE_OPT_HEADER:
    case STATE_OPT_BODY:
    case STATE_OPT_SKIP:
        return negotiate_step(n, in);
    case STATE_REQ_HEADER:
    case STATE_REQ_SKIP:
        return transmit_step(n, in);
    case STATE_NEW:
    case STATE_OPT_WAIT:
    case STATE_TLS_WAIT:
        return false;
    case STATE_DRAIN:
    case STATE_CLOSED:
        in->left = 0;
        return false;
    }
    return false;
}

/* Goes on as far as it can, or until transmission begins; returns how many bytes were taken. */
static size_t run(struct nbd *n, const uint8_t *bytes, size_t len)
{
    struct nbd_input in = {bytes, len};
    bool transmitting = n->transmitting;

    n->running = true;
    while (n->transmitting == transmitting && step(n, &in))
        ;
    n->running = false;
    return len - in.left;
}

/* Keeps input while an ask waits; returns how many bytes there was room for. */
static size_t put_stash(struct nbd *n, const uint8_t *bytes, size_t len)
{
    if (len == 0)
        return 0;
    if (!n->stash)
        n->stash = malloc(NBD_STASH_MAX);
    if (!n->stash)
        return 0; /* then it stays with the owner */
    len = MIN(len, NBD_STASH_MAX - n->stash_len);
    codec_put_bytes(n->stash + n->stash_len, bytes, len);
    n->stash_len += len;
    return len;
}

static void run_stash(struct nbd *n, size_t most)
{
    n->stash_pos += run(n, n->stash + n->stash_pos, MIN(n->stash_len - n->stash_pos, most));
    if (n->stash_pos == n->stash_len) {
        free(TAKE_PTR(n->stash));
        n->stash_pos = n->stash_len = 0;
    }
}

void nbd_resume(struct nbd *n)
{
    if (!n->running && !n->transmitting && n->stash_pos < n->stash_len)
        run_stash(n, SIZE_MAX);
}

size_t nbd_feed(struct nbd *n, const void *bytes, size_t len)
{
    size_t taken = 0;

    assert(!n->running && n->state != STATE_NEW);
    nbd_resume(n);
    if (nbd_has_more(n))
        run_stash(n, NBD_REQUEST_SIZE);
    else if (n->stash_pos == n->stash_len)
        taken = run(n, bytes, len);
    if (n->state == STATE_OPT_WAIT)
        taken += put_stash(n, (const uint8_t *)bytes + taken, len - taken);
    return taken;
}

bool nbd_has_more(const struct nbd *n)
{
    return n->transmitting && n->stash_pos < n->stash_len;
}

void nbd_feed_eof(struct nbd *n)
{
    nbd_finish(n, NBD_END_EOF, -ECONNRESET, "The client closed the connection without saying so");
}

/* -- end ----------------------------------------------------------------------------------------------------------- */

void nbd_finish(struct nbd *n, enum nbd_end end, int err, const char *fmt, ...)
{
    va_list ap;

    if (nbd_is_ending(n))
        return;
    n->end = end;
    n->why.err = err;
    va_start(ap, fmt);
    if (err)
        (void)vsnprintf(n->why.text, sizeof(n->why.text), fmt, ap); /* cutting a sentence short is fine */
    va_end(ap);
    nbd_set_state(n, STATE_DRAIN);
    nbd_try_close(n);
}

void nbd_try_close(struct nbd *n)
{
    if (n->state != STATE_DRAIN || n->ninflight > 0)
        return;
    nbd_set_state(n, STATE_CLOSED);
    n->ops->hangup(n->arg, n->end, &n->why);
}

void nbd_fail(struct nbd *n, const struct failure *why)
{
    nbd_finish(n, NBD_END_LOST, why->err, "%s", why->text);
}

/* -- questions ----------------------------------------------------------------------------------------------------- */

bool nbd_in_transmission(const struct nbd *n)
{
    return n->transmitting && n->state != STATE_CLOSED;
}

bool nbd_is_ending(const struct nbd *n)
{
    return n->state == STATE_DRAIN || n->state == STATE_CLOSED;
}

size_t nbd_inflight(const struct nbd *n)
{
    return n->ninflight;
}
