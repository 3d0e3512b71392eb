/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* tls_creds: files to gnutls' credentials and priorities, and who a client has shown to be. */
#include "tls_internal.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <gnutls/x509.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PSK_FILE_MAX (1u << 20) /* bytes */
#define PSK_USER_MAX 128u       /* bytes; RFC 4279 5.3 wants 128 at least */
#define PSK_KEY_MIN 16u         /* bytes; less can be tried out */
#define PSK_KEY_MAX 64u         /* bytes; RFC 4279 5.3 */

/* -- files --------------------------------------------------------------------------------------------------------- */
/* What others can read is no secret any more: worth a word, but for the administrator to judge. */
static void note_open_file(const char *path, const char *what, struct failure *note)
{
    struct stat st;

    if (stat(path, &st) == 0 && (st.st_mode & (S_IRGRP | S_IROTH)))
        (void)failure_set(note, -EPERM, "%s %s can be read by others than its owner (mode %03o); 0600 is better", what,
                          path, (unsigned)(st.st_mode & 0777));
}

/* NULL: no memory. */
static char *join_path(const char *dir, const char *name)
{
    char *path;

    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

/* -- pre-shared keys ----------------------------------------------------------------------------------------------- */
static int hex_digit(char c)
{
    return isdigit((unsigned char)c) ? c - '0' : isxdigit((unsigned char)c) ? tolower((unsigned char)c) - 'a' + 10 : -1;
}

static int add_key(struct tls_creds *c, const char *user, size_t user_len, const char *hex, size_t hex_len,
                   struct failure *f)
{
    struct tls_key *all, *key;

    if (user_len == 0 || user_len > PSK_USER_MAX)
        return failure_set(f, -EINVAL, "the user's name is empty, or longer than %u bytes", PSK_USER_MAX);
    for (size_t i = 0; i < user_len; i++)
        if (!isgraph((unsigned char)user[i]))
            return failure_set(f, -EINVAL, "the user's name has a character that cannot be printed");
    if (hex_len % 2 || hex_len / 2 < PSK_KEY_MIN || hex_len / 2 > PSK_KEY_MAX)
        return failure_set(f, -EINVAL, "the key is not %u to %u bytes in hexadecimal", PSK_KEY_MIN, PSK_KEY_MAX);
    for (size_t i = 0; i < c->nkeys; i++)
        if (strlen(c->keys[i].user) == user_len && memcmp(c->keys[i].user, user, user_len) == 0)
            return failure_set(f, -EINVAL, "the user \"%s\" is there twice", c->keys[i].user);
    all = reallocarray(c->keys, c->nkeys + 1, sizeof *all);
    if (!all)
        return failure_set(f, -ENOMEM, "out of memory");
    c->keys = all;
    key = &all[c->nkeys];
    *key = (struct tls_key){.user = strndup(user, user_len), .len = (unsigned)(hex_len / 2)};
    if (!key->user)
        return failure_set(f, -ENOMEM, "out of memory");
    c->nkeys++;
    for (size_t i = 0; i < key->len; i++) {
        int high = hex_digit(hex[2 * i]), low = hex_digit(hex[2 * i + 1]);

        if (high < 0 || low < 0)
            return failure_set(f, -EINVAL, "the key is not hexadecimal");
        key->bytes[i] = (unsigned char)(high << 4 | low);
    }
    return 0;
}

/* Its lines never show up in a sentence: they are secret. */
static int parse_keys(struct tls_creds *c, const char *path, char *text, struct failure *f)
{
    unsigned line = 0;

    for (char *at = text, *next; at; at = next) {
        struct failure why = {0};
        char *colon;
        size_t len;

        line++;
        next = strchr(at, '\n');
        if (next)
            *next++ = 0;
        len = strcspn(at, "\r");
        if (len == 0 || *at == '#')
            continue;
        colon = memchr(at, ':', len);
        if (!colon)
            (void)failure_set(&why, -EINVAL, "this is not USER:HEXKEY");
        else
            (void)add_key(c, at, (size_t)(colon - at), colon + 1, len - (size_t)(colon + 1 - at), &why);
        if (why.err)
            return failure_set(f, why.err, "%s:%u: %s", path, line, why.text);
    }
    return c->nkeys > 0 ? 0 : failure_set(f, -EINVAL, "%s holds no key", path);
}

static int load_keys(struct tls_creds *c, const char *path, struct failure *f)
{
    char *text = malloc(PSK_FILE_MAX + 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC), r;
    size_t len = 0;
    ssize_t n = 0;

    if (!text)
        r = failure_set(f, -ENOMEM, "out of memory");
    else if (fd < 0)
        r = failure_set(f, -errno, "cannot read %s: %s", path, strerror(errno));
    else {
        while (len <= PSK_FILE_MAX && (n = read(fd, text + len, PSK_FILE_MAX + 1 - len)) > 0)
            len += (size_t)n;
        if (n < 0)
            r = failure_set(f, -errno, "cannot read %s: %s", path, strerror(errno));
        else if (len > PSK_FILE_MAX)
            r = failure_set(f, -EFBIG, "%s is longer than %u bytes", path, PSK_FILE_MAX);
        else if (memchr(text, 0, len))
            r = failure_set(f, -EINVAL, "%s is not a text file", path);
        else {
            text[len] = 0;
            r = parse_keys(c, path, text, f);
        }
        gnutls_memset(text, 0, len);
    }
    if (fd >= 0)
        close(fd);
    free(text);
    return r;
}

/* gnutls' callback, on a worker. 1: nobody is called so; gnutls goes on with a random key, so that nobody can tell. */
static int find_key(gnutls_session_t session, const gnutls_datum_t *user, gnutls_datum_t *key)
{
    const struct tls *t = gnutls_session_get_ptr(session);

    for (size_t i = 0; i < t->creds->nkeys; i++) {
        const struct tls_key *k = &t->creds->keys[i];

        if (strlen(k->user) != user->size || memcmp(k->user, user->data, user->size) != 0)
            continue;
        key->data = gnutls_malloc(k->len);
        if (!key->data)
            return -1;
        memcpy(key->data, k->bytes, k->len);
        key->size = k->len;
        return 0;
    }
    return 1;
}

static int load_psk(struct tls_creds *c, const char *path, struct failure *note, struct failure *f)
{
    int r = load_keys(c, path, f);

    if (r < 0)
        return r;
    note_open_file(path, "the keys in", note);
    r = gnutls_psk_allocate_server_credentials(&c->psk);
    if (r < 0)
        return failure_set(f, -ENOMEM, "cannot use the keys: %s", gnutls_strerror(r));
    gnutls_psk_set_server_credentials_function2(c->psk, find_key);
    if (asprintf(&c->text, "%zu pre-shared key%s in %s", c->nkeys, c->nkeys == 1 ? "" : "s", path) < 0) {
        c->text = NULL;
        return failure_set(f, -ENOMEM, "out of memory");
    }
    return 0;
}

/* -- certificates -------------------------------------------------------------------------------------------------- */
static void note_dates(struct tls_creds *c, const char *path, struct failure *note)
{
    time_t now = time(NULL), begins, ends;
    gnutls_x509_crt_t *all = NULL;
    unsigned n = 0;

    if (gnutls_certificate_get_x509_crt(c->x509, 0, &all, &n) < 0 || n == 0)
        return;
    begins = gnutls_x509_crt_get_activation_time(all[0]);
    ends = gnutls_x509_crt_get_expiration_time(all[0]);
    if (now < begins)
        (void)failure_set(note, -EINVAL, "the certificate %s is not valid yet: clients will refuse it", path);
    if (now > ends)
        (void)failure_set(note, -EINVAL, "the certificate %s has expired: clients will refuse it", path);
    for (unsigned i = 0; i < n; i++)
        gnutls_x509_crt_deinit(all[i]);
    gnutls_free(all);
}

/* Only a name that is not there means that there is no list: any doubt would let in whom the list keeps out. */
static int load_crl(struct tls_creds *c, const char *path, struct failure *f)
{
    struct stat st;
    int r;

    if (lstat(path, &st) < 0 && errno == ENOENT)
        return 0;
    if (access(path, R_OK) < 0)
        return failure_set(f, -errno, "cannot read the revocation list %s: %s", path, strerror(errno));
    r = gnutls_certificate_set_x509_crl_file(c->x509, path, GNUTLS_X509_FMT_PEM);
    if (r < 1)
        return failure_set(f, -EINVAL, "%s: %s", path,
                           r < 0 ? gnutls_strerror(r) : "there is no revocation list in it");
    c->has_crl = true;
    return 0;
}

static int load_x509(struct tls_creds *c, const char *dir, struct failure *note, struct failure *f)
{
    _cleanup_free_ char *ca = join_path(dir, "ca-cert.pem"), *cert = join_path(dir, "server-cert.pem");
    _cleanup_free_ char *key = join_path(dir, "server-key.pem"), *crl = join_path(dir, "ca-crl.pem");
    int r;

    if (!ca || !cert || !key || !crl)
        return failure_set(f, -ENOMEM, "out of memory");
    for (const char *const *path = (const char *const[]){ca, cert, key, NULL}; *path; path++)
        if (access(*path, R_OK) < 0)
            return errno == EACCES
                       ? failure_set(f, -errno, "cannot read %s: %s; this is user %u: give it to that user (chown)",
                                     *path, strerror(errno), (unsigned)geteuid())
                       : failure_set(f, -errno, "cannot read %s: %s (qpull certs init DIR makes what is needed)", *path,
                                     strerror(errno));
    r = gnutls_certificate_allocate_credentials(&c->x509);
    if (r < 0)
        return failure_set(f, -ENOMEM, "cannot use certificates: %s", gnutls_strerror(r));
    r = gnutls_certificate_set_x509_trust_file(c->x509, ca, GNUTLS_X509_FMT_PEM);
    if (r < 1)
        return failure_set(f, -EINVAL, "%s: %s", ca, r < 0 ? gnutls_strerror(r) : "there is no certificate in it");
    r = gnutls_certificate_set_x509_key_file(c->x509, cert, key, GNUTLS_X509_FMT_PEM);
    if (r < 0)
        return failure_set(f, -EINVAL, "%s, %s: %s", cert, key, gnutls_strerror(r));
    if (load_crl(c, crl, f) < 0)
        return f->err;
    note_open_file(key, "the key", note);
    note_dates(c, cert, note);
    if (asprintf(&c->text, "certificates in %s, %s revocation list", dir, c->has_crl ? "with a" : "no") < 0) {
        c->text = NULL;
        return failure_set(f, -ENOMEM, "out of memory");
    }
    return 0;
}

/* -- priorities ---------------------------------------------------------------------------------------------------- */
#define FLOOR "-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:%SERVER_PRECEDENCE"

/*
 * What the system's administrator allows, from TLS 1.2 on, and of its ciphers AES-128-GCM first, if it is among them:
 * 1.2 times as fast as AES-256-GCM here, and what clients name first is only their library's habit.
 */
static int set_priorities(struct tls_creds *c, struct failure *f)
{
    const char *kx = c->psk ? ":-KX-ALL:+ECDHE-PSK:+DHE-PSK" : "", *at = NULL;
    char text[1024];
    const unsigned *ciphers;
    gnutls_priority_t p;
    size_t len;
    int n, r;

    (void)snprintf(text, sizeof text, "%s%s", FLOOR, kx);
    r = gnutls_priority_init2(&p, text, &at, GNUTLS_PRIORITY_INIT_DEF_APPEND);
    if (r < 0)
        return failure_set(f, -EINVAL, "the system's TLS priorities cannot be used: %s", gnutls_strerror(r));
    len = (size_t)snprintf(text, sizeof text, "%s%s:-CIPHER-ALL", FLOOR, kx);
    n = gnutls_priority_cipher_list(p, &ciphers);
    for (int first = 1; first >= 0; first--)
        for (int i = 0; i < n && len < sizeof text - 64; i++)
            if ((ciphers[i] == GNUTLS_CIPHER_AES_128_GCM) == (first == 1))
                len += (size_t)snprintf(text + len, sizeof text - len, ":+%s",
                                        gnutls_cipher_get_name((gnutls_cipher_algorithm_t)ciphers[i]));
    gnutls_priority_deinit(p);
    r = gnutls_priority_init2(&c->priority, text, &at, GNUTLS_PRIORITY_INIT_DEF_APPEND);
    if (r < 0)
        return failure_set(f, -EINVAL, "the system's TLS priorities cannot be used: %s", gnutls_strerror(r));
    return 0;
}

/* -- life ---------------------------------------------------------------------------------------------------------- */
static void creds_free(struct tls_creds *c)
{
    if (c->priority)
        gnutls_priority_deinit(c->priority);
    if (c->x509)
        gnutls_certificate_free_credentials(c->x509);
    if (c->psk)
        gnutls_psk_free_server_credentials(c->psk);
    for (size_t i = 0; i < c->nkeys; i++) {
        gnutls_memset(c->keys[i].bytes, 0, sizeof c->keys[i].bytes);
        free(c->keys[i].user);
    }
    free(c->keys);
    free(c->text);
    free(c);
}

int tls_creds_load(const char *certs_dir, const char *psk_file, struct tls_creds **ret_creds, struct failure *ret_note,
                   struct failure *f)
{
    struct tls_creds *c = calloc(1, sizeof *c);
    int r;

    if (!c)
        return failure_set(f, -ENOMEM, "out of memory");
    c->nrefs = 1;
    r = certs_dir ? load_x509(c, certs_dir, ret_note, f) : load_psk(c, psk_file, ret_note, f);
    if (r == 0)
        r = set_priorities(c, f);
    if (r < 0) {
        creds_free(c);
        return r;
    }
    *ret_creds = c;
    return 0;
}

struct tls_creds *tls_creds_ref(struct tls_creds *creds)
{
    creds->nrefs++;
    return creds;
}

void tls_creds_unref(struct tls_creds *creds)
{
    if (creds && --creds->nrefs == 0)
        creds_free(creds);
}

bool tls_creds_have_crl(const struct tls_creds *creds)
{
    return creds->has_crl;
}

const char *tls_creds_text(const struct tls_creds *creds)
{
    return creds->text;
}

int tls_creds_apply(struct tls *t)
{
    int r = gnutls_priority_set(t->session, t->creds->priority);

    if (r == 0 && t->creds->psk)
        return gnutls_credentials_set(t->session, GNUTLS_CRD_PSK, t->creds->psk);
    if (r == 0)
        r = gnutls_credentials_set(t->session, GNUTLS_CRD_CERTIFICATE, t->creds->x509);
    if (r == 0) {
        /* A whole disk is behind it: who has no certificate of our CA has no business here. */
        gnutls_certificate_server_set_request(t->session, GNUTLS_CERT_REQUIRE);
        t->purpose = (gnutls_typed_vdata_st){GNUTLS_DT_KEY_PURPOSE_OID, (void *)GNUTLS_KP_TLS_WWW_CLIENT, 0};
        gnutls_session_set_verify_cert2(t->session, &t->purpose, 1, 0);
    }
    return r;
}

/* -- who is it ----------------------------------------------------------------------------------------------------- */
/* What can stand in a log and a rule as it is. */
static bool is_plain(const void *text, size_t len)
{
    const unsigned char *p = text;

    for (size_t i = 0; i < len; i++)
        if (!isprint(p[i]))
            return false;
    return len > 0;
}

static void add_name(struct tls_peer *p, const char *name, size_t len)
{
    if (p->nnames < TLS_NAMES_MAX && is_plain(name, len) && (p->names[p->nnames] = strndup(name, len)))
        p->nnames++;
}

static void take_names(struct tls_peer *p, gnutls_x509_crt_t crt)
{
    for (unsigned i = 0; i < TLS_NAMES_MAX; i++) {
        char name[TLS_IDENTITY_MAX], ip[INET6_ADDRSTRLEN];
        size_t len = sizeof name;
        int type = gnutls_x509_crt_get_subject_alt_name(crt, i, name, &len, NULL);

        if (type == GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE)
            return;
        if (type == GNUTLS_SAN_DNSNAME || type == GNUTLS_SAN_RFC822NAME || type == GNUTLS_SAN_URI)
            add_name(p, name, len);
        else if (type == GNUTLS_SAN_IPADDRESS && (len == 4 || len == 16) &&
                 inet_ntop(len == 4 ? AF_INET : AF_INET6, name, ip, sizeof ip))
            add_name(p, ip, strlen(ip));
    }
}

/* Where there are several nobody could say which is meant. */
static void take_cn(struct tls_peer *p, gnutls_x509_crt_t crt)
{
    char cn[TLS_IDENTITY_MAX], another[TLS_IDENTITY_MAX];
    size_t len = sizeof cn, another_len = sizeof another;

    if (gnutls_x509_crt_get_dn_by_oid(crt, GNUTLS_OID_X520_COMMON_NAME, 0, 0, cn, &len) == 0 &&
        gnutls_x509_crt_get_dn_by_oid(crt, GNUTLS_OID_X520_COMMON_NAME, 1, 0, another, &another_len) ==
            GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE &&
        is_plain(cn, len))
        p->cn = strndup(cn, len);
}

/* Two certificates never have one identity unless they have one subject: what is cut or cleaned would not be safe. */
static int take_subject(struct tls_peer *p, gnutls_x509_crt_t crt)
{
    unsigned char hash[32];
    size_t hash_len = sizeof hash, len;
    gnutls_datum_t dn = {0};
    int r = gnutls_x509_crt_get_dn3(crt, &dn, 0);
    bool usable = r == 0 && is_plain(dn.data, dn.size);

    if (usable)
        p->dn = strndup((const char *)dn.data, dn.size);
    take_cn(p, crt);
    usable = usable && dn.size + sizeof "x509:" <= sizeof p->identity;
    if (usable)
        (void)snprintf(p->identity, sizeof p->identity, "x509:%.*s", (int)dn.size, (const char *)dn.data);
    gnutls_free(dn.data);
    if (usable)
        return 0;
    r = gnutls_x509_crt_get_fingerprint(crt, GNUTLS_DIG_SHA256, hash, &hash_len);
    if (r < 0)
        return r;
    len = (size_t)snprintf(p->identity, sizeof p->identity, "x509:sha256:");
    for (size_t i = 0; i < hash_len; i++)
        len += (size_t)snprintf(p->identity + len, sizeof p->identity - len, "%02x", hash[i]);
    return 0;
}

int tls_creds_identify(struct tls *t)
{
    struct tls_peer *p = &t->peer;
    const gnutls_datum_t *chain;
    gnutls_x509_crt_t crt;
    unsigned n = 0;
    char *how;
    int r;

    how = gnutls_session_get_desc(t->session);
    (void)snprintf(p->session, sizeof p->session, "%s", how ? how : "TLS");
    gnutls_free(how);
    if (t->creds->psk) {
        const char *user = gnutls_psk_server_get_username(t->session);

        if (!user || !is_plain(user, strlen(user))) /* cannot be: it was found among ours */
            return GNUTLS_E_NO_CERTIFICATE_FOUND;
        (void)snprintf(p->identity, sizeof p->identity, "psk:%s", user);
        p->psk = strdup(user);
        return p->psk ? 0 : GNUTLS_E_MEMORY_ERROR;
    }
    chain = gnutls_certificate_get_peers(t->session, &n);
    if (!chain || n == 0)
        return GNUTLS_E_NO_CERTIFICATE_FOUND;
    r = gnutls_x509_crt_init(&crt);
    if (r < 0)
        return r;
    r = gnutls_x509_crt_import(crt, &chain[0], GNUTLS_X509_FMT_DER);
    if (r == 0)
        r = take_subject(p, crt);
    if (r == 0)
        take_names(p, crt);
    gnutls_x509_crt_deinit(crt);
    return r;
}
