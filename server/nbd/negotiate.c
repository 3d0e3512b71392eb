/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * negotiate: the handshake, from the client's flags to the open export. One small function per option, below them the
 * table that ties them together, then the steps of the machine, then the owner's answers.
 */
#include "nbd/internal.h"

#include <assert.h>
#include <errno.h>

#define INFO_BIT(type) (1u << (type))

struct nbd_option {
    uint32_t option;
    uint32_t max_len;  /* bytes of data that we read; longer is refused */
    bool ignores_data; /* spec on ABORT: data is ignored rather than refused */
    bool needs_tls;    /* refused until TLS is up, where it is required */
    bool needs_fixed;  /* only for clients that said FIXED_NEWSTYLE */
    void (*fn)(struct nbd *n, struct codec_reader *data);
};

/* -- replies ------------------------------------------------------------------------------------------------------- */

static void reply(struct nbd *n, uint32_t type, const void *data, size_t len)
{
    uint8_t head[NBD_OPTION_REPLY_SIZE];
    uint8_t *p = head;

    p = codec_put64(p, NBD_OPTION_REPLY_MAGIC);
    p = codec_put32(p, n->option);
    p = codec_put32(p, type);
    codec_put32(p, (uint32_t)len);
    nbd_send(n, head, sizeof(head), NULL);
    if (len > 0)
        nbd_send(n, data, len, NULL);
}

static void reply_ack(struct nbd *n)
{
    reply(n, NBD_REP_ACK, NULL, 0);
}

static void reply_error(struct nbd *n, uint32_t type, const char *text)
{
    reply(n, type, text, codec_cut(text, NBD_MESSAGE_MAX));
}

static void reply_info_text(struct nbd *n, uint16_t info, const char *text)
{
    uint8_t data[2 + NBD_NAME_MAX];
    uint8_t *p = codec_put16(data, info);

    p = codec_put_bytes(p, text, codec_cut(text, NBD_NAME_MAX));
    reply(n, NBD_REP_INFO, data, (size_t)(p - data));
}

static void reply_context(struct nbd *n, uint32_t id, const char *name)
{
    uint8_t data[4 + NBD_NAME_MAX];
    uint8_t *p = codec_put32(data, id);

    p = codec_put_bytes(p, name, strlen(name));
    reply(n, NBD_REP_META_CONTEXT, data, (size_t)(p - data));
}

/* -- what lives as long as an option, or longer -------------------------------------------------------------------- */

void negotiate_forget_option(struct nbd *n)
{
    free(TAKE_PTR(n->body));
    n->body_len = n->body_want = 0;
    free(TAKE_PTR(n->name));
    n->infos = 0;
    n->nqueries = 0;
    n->row = NULL;
}

static void forget_context_names(struct nbd *n)
{
    for (size_t i = 0; n->contexts && i < n->ncontexts; i++)
        free(n->contexts[i]);
    free(TAKE_PTR(n->contexts));
    free(TAKE_PTR(n->context_export));
}

void negotiate_forget_contexts(struct nbd *n)
{
    forget_context_names(n);
    n->ncontexts = 0;
}

/* The option is answered. */
static void option_done(struct nbd *n)
{
    negotiate_forget_option(n);
    nbd_set_state(n, STATE_OPT_HEADER);
}

static void refuse(struct nbd *n, uint32_t type, const char *text)
{
    reply_error(n, type, text);
    option_done(n);
}

static void ask(struct nbd *n, enum nbd_ask_type type)
{
    struct nbd_ask a = {.type = type, .export_name = n->name};

    if (type == NBD_ASK_OPEN && n->ncontexts > 0 && strcmp(n->context_export, n->name) == 0) {
        a.ncontexts = n->ncontexts;
        a.contexts = (const char *const *)n->contexts;
    }
    n->ask = type;
    nbd_set_state(n, STATE_OPT_WAIT);
    n->ops->ask(n->arg, &a);
}

/* Takes len bytes as the export's name. NULL: done; else why not. */
static const char *take_name(struct nbd *n, struct codec_reader *data, size_t len)
{
    const uint8_t *bytes;

    if (!codec_read_bytes(data, len, &bytes))
        return "The export name is longer than the option that holds it";
    if (len > NBD_NAME_MAX)
        return "The export name is longer than 4096 bytes";
    if (memchr(bytes, '\0', len))
        return "The export name contains a NUL byte";
    n->name = strndup((const char *)bytes, len);
    return n->name ? NULL : "Out of memory";
}

/* -- the options --------------------------------------------------------------------------------------------------- */

static void opt_export_name(struct nbd *n, struct codec_reader *data)
{
    const char *problem = n->extended ? "NBD_OPT_EXPORT_NAME does not go with extended headers" : NULL;

    if (!problem)
        problem = take_name(n, data, data->left);
    if (problem)
        nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "%s", problem);
    else
        ask(n, NBD_ASK_OPEN);
}

static void opt_abort(struct nbd *n, struct codec_reader *data)
{
    reply_ack(n);
    nbd_finish(n, NBD_END_ABORT, 0, NULL);
}

static void opt_list(struct nbd *n, struct codec_reader *data)
{
    ask(n, NBD_ASK_LIST);
}

static void opt_starttls(struct nbd *n, struct codec_reader *data)
{
    if (n->tls_up) {
        refuse(n, NBD_REP_ERR_INVALID, "TLS is up already");
        return;
    }
    if (n->tls == NBD_TLS_OFF) {
        refuse(n, NBD_REP_ERR_UNSUP, "This server does not offer TLS here");
        return;
    }
    if (n->stash_len > 0) {
        /* It was sent before we had answered; what comes with it cannot be told from an injection into the clear text.
         */
        nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "The client sent NBD_OPT_STARTTLS without waiting for an answer");
        return;
    }
    reply_ack(n);
    negotiate_forget_option(n);
    nbd_set_state(n, STATE_TLS_WAIT);
    n->ops->starttls(n->arg);
}

/* INFO and GO: name length, name, number of information requests, those. */
static void opt_info_or_go(struct nbd *n, struct codec_reader *data)
{
    uint32_t len;
    uint16_t ninfos, info;
    const char *problem;

    if (!codec_read32(data, &len)) {
        refuse(n, NBD_REP_ERR_INVALID, "The option is too short for an export name");
        return;
    }
    problem = take_name(n, data, len);
    if (problem) {
        refuse(n, NBD_REP_ERR_INVALID, problem);
        return;
    }
    if (!codec_read16(data, &ninfos) || data->left != (size_t)ninfos * 2) {
        refuse(n, NBD_REP_ERR_INVALID, "The number of information requests does not fit the option's length");
        return;
    }
    while (codec_read16(data, &info)) {
        if (info <= NBD_INFO_BLOCK_SIZE) /* spec: unknown ones are ignored */
            n->infos |= INFO_BIT(info);
    }
    ask(n, n->option == NBD_OPT_GO ? NBD_ASK_OPEN : NBD_ASK_EXPORT);
}

static void opt_structured_reply(struct nbd *n, struct codec_reader *data)
{
    if (n->extended) {
        refuse(n, NBD_REP_ERR_EXT_HEADER_REQD, "Extended headers are negotiated already and take precedence");
        return;
    }
    n->structured = true;
    reply_ack(n);
    option_done(n);
}

static void opt_extended_headers(struct nbd *n, struct codec_reader *data)
{
    n->structured = n->extended = true;
    reply_ack(n);
    option_done(n);
}

/* Name length, name, number of queries, and for each its length and text. All is checked here, used after the answer.
 */
static void opt_meta_context(struct nbd *n, struct codec_reader *data)
{
    struct codec_reader queries;
    uint32_t len;
    const uint8_t *query;
    const char *problem;

    if (n->option == NBD_OPT_SET_META_CONTEXT)
        negotiate_forget_contexts(n); /* spec: also when the option fails */
    if (!n->structured) {
        refuse(n, NBD_REP_ERR_INVALID, "Metadata contexts need structured replies or extended headers first");
        return;
    }
    if (!codec_read32(data, &len)) {
        refuse(n, NBD_REP_ERR_INVALID, "The option is too short for an export name");
        return;
    }
    problem = take_name(n, data, len);
    if (problem) {
        refuse(n, NBD_REP_ERR_INVALID, problem);
        return;
    }
    if (!codec_read32(data, &n->nqueries)) {
        refuse(n, NBD_REP_ERR_INVALID, "The option is too short for the number of queries");
        return;
    }
    if (n->nqueries > NBD_QUERIES_MAX) {
        refuse(n, NBD_REP_ERR_TOO_BIG, "Too many metadata queries in one option");
        return;
    }
    queries = *data;
    for (uint32_t i = 0; i < n->nqueries; i++) {
        if (!codec_read32(data, &len) || !codec_read_bytes(data, len, &query)) {
            refuse(n, NBD_REP_ERR_INVALID, "A metadata query is longer than the option that holds it");
            return;
        }
        if (len > NBD_NAME_MAX) {
            refuse(n, NBD_REP_ERR_INVALID, "A metadata query is longer than 4096 bytes");
            return;
        }
    }
    if (data->left > 0) {
        refuse(n, NBD_REP_ERR_INVALID, "The option is longer than its metadata queries");
        return;
    }
    n->queries = queries;
    ask(n, NBD_ASK_CONTEXTS);
}

#define INFO_DATA_MAX (4 + NBD_NAME_MAX + 2 + 2 * NBD_INFO_REQUESTS_MAX)

static const struct nbd_option options[] = {
    /* option                 max_len        ignores, tls,   fixed */
    {NBD_OPT_EXPORT_NAME, NBD_NAME_MAX, false, true, false, opt_export_name},
    {NBD_OPT_ABORT, 0, true, false, true, opt_abort},
    {NBD_OPT_LIST, 0, false, true, true, opt_list},
    {NBD_OPT_STARTTLS, 0, false, false, true, opt_starttls},
    {NBD_OPT_INFO, INFO_DATA_MAX, false, true, true, opt_info_or_go},
    {NBD_OPT_GO, INFO_DATA_MAX, false, true, true, opt_info_or_go},
    {NBD_OPT_STRUCTURED_REPLY, 0, false, true, true, opt_structured_reply},
    {NBD_OPT_LIST_META_CONTEXT, NBD_META_DATA_MAX, false, true, true, opt_meta_context},
    {NBD_OPT_SET_META_CONTEXT, NBD_META_DATA_MAX, false, true, true, opt_meta_context},
    {NBD_OPT_EXTENDED_HEADERS, 0, false, true, true, opt_extended_headers},
};

static const struct nbd_option *find_option(uint32_t option)
{
    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        if (options[i].option == option)
            return &options[i];
    }
    return NULL;
}

/* -- steps --------------------------------------------------------------------------------------------------------- */

static void on_flags(struct nbd *n)
{
    uint32_t flags = codec_get32(n->head);

    if (flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)) {
        nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "The client set unknown handshake flags: 0x%08x", flags);
        return;
    }
    n->fixed = flags & NBD_FLAG_C_FIXED_NEWSTYLE;
    n->nozeroes = flags & NBD_FLAG_C_NO_ZEROES;
    nbd_set_state(n, STATE_OPT_HEADER);
}

/* Drops the option's data, then refuses it; type 0: does it, without the data. */
static void skip_option(struct nbd *n, uint32_t type, const char *text)
{
    if (n->skip_left > NBD_OPTION_SKIP_MAX) {
        nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "Option %u has too much data: %llu bytes", n->option,
                   (unsigned long long)n->skip_left);
        return;
    }
    n->refusal = type;
    n->refusal_text = text;
    nbd_set_state(n, STATE_OPT_SKIP);
}

static void on_option_header(struct nbd *n)
{
    uint32_t len = codec_get32(n->head + 12);

    if (codec_get64(n->head) != NBD_OPTION_MAGIC) {
        nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "The client sent something that is not an NBD option");
        return;
    }
    n->option = codec_get32(n->head + 8);
    n->row = find_option(n->option);
    n->skip_left = len;
    if (++n->noptions > NBD_OPTIONS_MAX) {
        nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "The client sent more than %d options", NBD_OPTIONS_MAX);
        return;
    }
    if (!n->fixed && (!n->row || n->row->needs_fixed)) {
        nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "The client sent option %u without fixed newstyle negotiation",
                   n->option);
        return;
    }
    if (n->tls == NBD_TLS_REQUIRED && !n->tls_up && (!n->row || n->row->needs_tls)) {
        if (n->option == NBD_OPT_EXPORT_NAME)
            nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "The client opens an export without TLS, which is required here");
        else
            skip_option(n, NBD_REP_ERR_TLS_REQD, "This server requires TLS (NBD_OPT_STARTTLS) first");
        return;
    }
    if (!n->row) {
        skip_option(n, NBD_REP_ERR_UNSUP, "This server does not know that option");
        return;
    }
    if (n->row->ignores_data) {
        skip_option(n, 0, NULL);
        return;
    }
    if (len > n->row->max_len) {
        if (n->option == NBD_OPT_EXPORT_NAME) /* it has no errors */
            nbd_finish(n, NBD_END_PROTOCOL, -EPROTO, "The export name is longer than 4096 bytes");
        else if (n->row->max_len == 0)
            skip_option(n, NBD_REP_ERR_INVALID, "This option takes no data");
        else
            skip_option(n, NBD_REP_ERR_TOO_BIG, "The option has more data than this server takes");
        return;
    }
    n->body_want = len;
    n->body_len = 0;
    n->body = malloc(MAX(len, 1));
    if (!n->body) {
        skip_option(n, NBD_REP_ERR_PLATFORM, "Out of memory");
        return;
    }
    nbd_set_state(n, STATE_OPT_BODY);
}

static bool collect_body(struct nbd *n, struct nbd_input *in)
{
    size_t len = MIN(in->left, n->body_want - n->body_len);

    codec_put_bytes(n->body + n->body_len, in->p, len);
    n->body_len += len;
    in->p += len;
    in->left -= len;
    return n->body_len == n->body_want;
}

static void on_option(struct nbd *n)
{
    struct codec_reader data = {n->body, n->body_len};

    n->row->fn(n, &data);
}

static void on_skipped(struct nbd *n)
{
    if (n->refusal)
        refuse(n, n->refusal, n->refusal_text);
    else
        on_option(n);
}

bool negotiate_step(struct nbd *n, struct nbd_input *in)
{
    switch (n->state) {
    case STATE_FLAGS:
        if (!nbd_collect(n, in, NBD_CLIENT_FLAGS_SIZE))
            return false;
        on_flags(n);
        return true;
    case STATE_OPT_HEADER:
        if (!nbd_collect(n, in, NBD_OPTION_SIZE))
            return false;
        on_option_header(n);
        return true;
    case STATE_OPT_BODY:
        if (!collect_body(n, in))
            return false;
        on_option(n);
        return true;
    case STATE_OPT_SKIP:
        if (!nbd_skip(n, in))
            return false;
        on_skipped(n);
        return true;
    default:
        return false;
    }
}

/* -- answers ------------------------------------------------------------------------------------------------------- */

/* False: the connection has ended meanwhile. An answer that nobody asked for is our own mistake. */
static bool may_answer(const struct nbd *n, enum nbd_ask_type type, enum nbd_ask_type or_type)
{
    if (nbd_is_ending(n))
        return false;
    assert(n->state == STATE_OPT_WAIT);
    assert(n->ask == type || n->ask == or_type);
    return true;
}

void nbd_answer_list(struct nbd *n, const struct nbd_list_entry *entries, size_t nentries)
{
    if (!may_answer(n, NBD_ASK_LIST, NBD_ASK_LIST))
        return;
    for (size_t i = 0; i < nentries; i++) {
        uint8_t data[4 + NBD_NAME_MAX + NBD_NAME_MAX];
        uint8_t *p = data;
        size_t len = strlen(entries[i].name);

        if (len > NBD_NAME_MAX)
            continue; /* nobody could open it */
        p = codec_put32(p, (uint32_t)len);
        p = codec_put_bytes(p, entries[i].name, len);
        if (entries[i].description)
            p = codec_put_bytes(p, entries[i].description, codec_cut(entries[i].description, NBD_NAME_MAX));
        reply(n, NBD_REP_SERVER, data, (size_t)(p - data));
    }
    reply_ack(n);
    option_done(n);
    nbd_resume(n);
}

/* Queries that LIST understands as "all of these"; SET must not (spec, and docs/interop/nbd.txt of QEMU). */
static const char *const wildcards[] = {"base:", "qemu:", "qemu:dirty-bitmap:"};

static bool query_matches(const uint8_t *query, size_t len, const char *name, bool wild)
{
    if (strlen(name) == len && memcmp(query, name, len) == 0)
        return true;
    for (size_t i = 0; wild && i < ARRAY_SIZE(wildcards); i++) {
        if (strlen(wildcards[i]) == len && memcmp(query, wildcards[i], len) == 0)
            return strncmp(name, wildcards[i], len) == 0;
    }
    return false;
}

static bool any_query_matches(const struct nbd *n, const char *name, bool wild)
{
    struct codec_reader queries = n->queries;
    uint32_t len;
    const uint8_t *query;

    if (wild && n->nqueries == 0)
        return true;
    for (uint32_t i = 0; i < n->nqueries; i++) {
        if (!codec_read32(&queries, &len) || !codec_read_bytes(&queries, len, &query))
            return false; /* cannot be: opt_meta_context() has looked */
        if (query_matches(query, len, name, wild))
            return true;
    }
    return false;
}

static void list_contexts(struct nbd *n, const char *const *names, size_t nnames)
{
    for (size_t i = 0; i < nnames; i++) {
        if (strlen(names[i]) <= NBD_NAME_MAX && any_query_matches(n, names[i], true))
            reply_context(n, 0, names[i]); /* spec: the id means nothing here */
    }
    reply_ack(n);
}

/* 0, -ENOMEM or -E2BIG; what was selected so far stands in n. */
static int select_contexts(struct nbd *n, const char *const *names, size_t nnames)
{
    n->context_export = TAKE_PTR(n->name);
    n->ncontexts = 0;
    n->contexts = calloc(NBD_CONTEXTS_MAX, sizeof(*n->contexts));
    if (!n->contexts)
        return -ENOMEM;
    for (size_t i = 0; i < nnames; i++) {
        if (strlen(names[i]) > NBD_NAME_MAX || !any_query_matches(n, names[i], false))
            continue;
        if (n->ncontexts == NBD_CONTEXTS_MAX)
            return -E2BIG;
        n->contexts[n->ncontexts] = strdup(names[i]);
        if (!n->contexts[n->ncontexts])
            return -ENOMEM;
        n->ncontexts++;
    }
    return 0;
}

static void set_contexts(struct nbd *n, const char *const *names, size_t nnames)
{
    int err = select_contexts(n, names, nnames);

    if (err < 0) {
        negotiate_forget_contexts(n);
        if (err == -E2BIG)
            reply_error(n, NBD_REP_ERR_TOO_BIG, "Too many metadata contexts for one connection");
        else
            reply_error(n, NBD_REP_ERR_PLATFORM, "Out of memory");
        return;
    }
    for (size_t i = 0; i < n->ncontexts; i++)
        reply_context(n, transmit_context_id(i), n->contexts[i]);
    reply_ack(n);
}

void nbd_answer_contexts(struct nbd *n, const char *const *names, size_t nnames)
{
    if (!may_answer(n, NBD_ASK_CONTEXTS, NBD_ASK_CONTEXTS))
        return;
    if (n->option == NBD_OPT_SET_META_CONTEXT)
        set_contexts(n, names, nnames);
    else
        list_contexts(n, names, nnames);
    option_done(n);
    nbd_resume(n);
}

/* INFO and GO: the export itself always, all else where it was asked for. */
static void reply_infos(struct nbd *n, const struct nbd_export *e)
{
    uint8_t data[14]; /* NBD_INFO_BLOCK_SIZE is the longest */
    uint8_t *p = data;

    p = codec_put16(p, NBD_INFO_EXPORT);
    p = codec_put64(p, e->size);
    p = codec_put16(p, transmit_flags(n, e));
    reply(n, NBD_REP_INFO, data, (size_t)(p - data));
    if (n->infos & INFO_BIT(NBD_INFO_NAME) && e->name)
        reply_info_text(n, NBD_INFO_NAME, e->name);
    if (n->infos & INFO_BIT(NBD_INFO_DESCRIPTION) && e->description)
        reply_info_text(n, NBD_INFO_DESCRIPTION, e->description);
    if (n->infos & INFO_BIT(NBD_INFO_BLOCK_SIZE)) {
        p = codec_put16(data, NBD_INFO_BLOCK_SIZE);
        p = codec_put32(p, transmit_min_block(e));
        p = codec_put32(p, MAX(e->preferred_block, transmit_min_block(e)));
        p = codec_put32(p, transmit_max_block(e));
        reply(n, NBD_REP_INFO, data, (size_t)(p - data));
    }
    reply_ack(n);
}

/* The whole answer to EXPORT_NAME: no magic, no type. */
static void reply_export_name(struct nbd *n, const struct nbd_export *e)
{
    uint8_t data[8 + 2 + NBD_EXPORT_NAME_ZEROES] = {0};
    uint8_t *p = codec_put64(data, e->size);

    p = codec_put16(p, transmit_flags(n, e));
    nbd_send(n, data, n->nozeroes ? (size_t)(p - data) : sizeof(data), NULL);
}

static void open_export(struct nbd *n, const struct nbd_export *e)
{
    if (n->ncontexts > 0 && strcmp(n->context_export, n->name) != 0)
        negotiate_forget_contexts(n); /* they were selected for another export */
    if (n->option == NBD_OPT_EXPORT_NAME)
        reply_export_name(n, e);
    else
        reply_infos(n, e);
    forget_context_names(n);
    negotiate_forget_option(n);
    n->transmitting = true;
    nbd_set_state(n, STATE_REQ_HEADER);
}

void nbd_answer_export(struct nbd *n, const struct nbd_export *e)
{
    if (!may_answer(n, NBD_ASK_EXPORT, NBD_ASK_OPEN))
        return;
    if (n->ask == NBD_ASK_OPEN && transmit_init(n, e) < 0) {
        /* For the owner the export is open: there is no way back to where another could be asked for. */
        nbd_finish(n, NBD_END_LOST, -ENOMEM, "Out of memory");
        return;
    }
    if (n->ask == NBD_ASK_OPEN) {
        open_export(n, e);
    } else {
        reply_infos(n, e);
        option_done(n);
    }
    nbd_resume(n);
}

static uint32_t error_type(int err)
{
    switch (err) {
    case -ENOENT:
        return NBD_REP_ERR_UNKNOWN;
    case -EACCES:
    case -EPERM:
    case -EBUSY:
        return NBD_REP_ERR_POLICY;
    case -ESHUTDOWN:
        return NBD_REP_ERR_SHUTDOWN;
    case -EINVAL:
        return NBD_REP_ERR_INVALID;
    default:
        return NBD_REP_ERR_PLATFORM;
    }
}

void nbd_answer_error(struct nbd *n, const struct failure *why)
{
    if (!may_answer(n, n->ask, n->ask))
        return;
    if (n->option == NBD_OPT_EXPORT_NAME) {
        nbd_finish(n, NBD_END_LOST, why->err, "%s", why->text);
        return;
    }
    refuse(n, error_type(why->err), why->text);
    nbd_resume(n);
}

void nbd_tls_ready(struct nbd *n)
{
    if (nbd_is_ending(n))
        return;
    assert(n->state == STATE_TLS_WAIT);
    n->tls_up = true;
    n->structured = n->extended = false; /* spec: nothing said in the clear counts */
    negotiate_forget_contexts(n);
    nbd_set_state(n, STATE_OPT_HEADER);
}
