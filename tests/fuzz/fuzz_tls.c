/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A hostile client of a server/conn that has TLS, on a real socket, with gnutls on its side: what it says in clear,
 * inside TLS, around it and instead of it. The first byte chooses the server's and the client's credentials and the
 * version; then come operations (enum op). Whatever it does: nothing of what is there is told in clear where TLS is
 * required, nobody without the right key gets in, and nothing is left when it has gone.
 *
 * gnutls takes its random numbers from the system: that an input finds something may depend on them. Few do.
 */
#include "certs.h"
#include "conn_internal.h"
#include "conn_world.h"
#include "fuzz.h"

#include <gnutls/gnutls.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

/* The first byte. */
enum { REQUIRED = 1, X509 = 2, WRONG = 4, OLD = 8, NEW = 16, BEGUN = 32 };

enum op {
    SAY,        /* bytes as they are: in clear, or as records of TLS */
    SHAKE,      /* goes on with the handshake, so many flights; 0: to its end */
    SAY_SEALED, /* bytes inside of TLS */
    MANGLE,     /* of what gnutls sends next, one byte is changed */
    CUT,        /* likewise, the end is left out */
    BYE,        /* TLS's own end; bit 0: and the socket's */
    REKEY,      /* or another handshake, where that is how it is called */
    ALERT,      /* some of them */
    NOPS
};

#define TURNS_MAX 4000u
#define IDLE_TURNS 4u
#define FLIGHTS_MAX 12u
#define OUT_MAX (64u << 10) /* bytes of the server's that are looked at */
#define PSK_USER "fuzz"

static const uint8_t right_key[32] = {1, 2, 3}, wrong_key[32] = {3, 2, 1};

struct hostile {
    int fd;
    gnutls_session_t session;
    bool sealed;     /* STARTTLS was said by BEGUN, or an operation of TLS was done: bytes that come are records */
    bool up;         /* the handshake is over */
    struct bytes in; /* records that gnutls has not taken */
    size_t in_at;
    struct bytes out; /* what gnutls wants to send */
    struct bytes clear;
    uint8_t mangle_at, mangle_with, cut;
};

static struct {
    struct world *w;
    struct tls_server tls;
    struct tls_creds *psk, *x509;
    gnutls_psk_client_credentials_t client_psk, client_wrong;
    gnutls_certificate_credentials_t client_x509, client_nobody;
} all;

/* -- the server ---------------------------------------------------------------------------------------------------- */
static struct tls_creds *load(const char *certs, const char *psk)
{
    struct failure note = {0}, why = {0};
    struct tls_creds *creds = NULL;

    if (tls_creds_load(certs, psk, &creds, &note, &why) < 0) {
        fprintf(stderr, "%s\n", why.text);
        abort();
    }
    return creds;
}

static void make_psk(void)
{
    gnutls_datum_t key = {(unsigned char *)right_key, sizeof(right_key)},
                   wrong = {(unsigned char *)wrong_key, sizeof(wrong_key)};
    char path[128];
    FILE *file;

    (void)snprintf(path, sizeof(path), "%s/keys.psk", fuzz_folder_path());
    file = fopen(path, "w");
    CHECK(file && fprintf(file, PSK_USER ":") > 0);
    for (size_t i = 0; i < sizeof(right_key); i++)
        CHECK(fprintf(file, "%02x", right_key[i]) == 2);
    CHECK(fclose(file) == 0 && chmod(path, 0600) == 0);
    all.psk = load(NULL, path);
    CHECK(gnutls_psk_allocate_client_credentials(&all.client_psk) == 0 &&
          gnutls_psk_allocate_client_credentials(&all.client_wrong) == 0);
    CHECK(gnutls_psk_set_client_credentials(all.client_psk, PSK_USER, &key, GNUTLS_PSK_KEY_RAW) == 0 &&
          gnutls_psk_set_client_credentials(all.client_wrong, PSK_USER, &wrong, GNUTLS_PSK_KEY_RAW) == 0);
}

static void make_x509(void)
{
    const char *folder = fuzz_folder_path();
    char cert[128], key[128];

    certs_make(folder);
    (void)snprintf(cert, sizeof(cert), "%s/clients/me/client-cert.pem", folder);
    (void)snprintf(key, sizeof(key), "%s/clients/me/client-key.pem", folder);
    all.x509 = load(folder, NULL);
    CHECK(gnutls_certificate_allocate_credentials(&all.client_x509) == 0 &&
          gnutls_certificate_allocate_credentials(&all.client_nobody) == 0);
    CHECK(gnutls_certificate_set_x509_key_file(all.client_x509, cert, key, GNUTLS_X509_FMT_PEM) == 0);
}

static void prepare(void)
{
    if (all.w)
        return;
    CHECK(world_set_up((void **)&all.w) == 0);
    make_psk();
    make_x509();
    CHECK(tls_server_init(&all.tls, &all.w->loop, /* nthreads= */ 1, tls_creds_ref(all.psk)) == 0);
    all.w->set.tls = &all.tls;
}

static bool is_busy(void)
{
    for (const struct conn *c = all.w->set.first; c; c = c->next)
        if (c->tls && tls_is_busy(c->tls))
            return true;
    return false;
}

/* -- the client ---------------------------------------------------------------------------------------------------- */
static ssize_t on_pull(gnutls_transport_ptr_t arg, void *to, size_t len)
{
    struct hostile *h = arg;

    len = MIN(len, h->in.len - h->in_at);
    if (len == 0) {
        gnutls_transport_set_errno(h->session, EAGAIN);
        return -1;
    }
    memcpy(to, h->in.data + h->in_at, len);
    h->in_at += len;
    return (ssize_t)len;
}

static ssize_t on_push(gnutls_transport_ptr_t arg, const void *from, size_t len)
{
    struct hostile *h = arg;

    put_raw(&h->out, from, len);
    return (ssize_t)len;
}

static bool hear(struct hostile *h)
{
    uint8_t bytes[16384];
    bool any = false;
    ssize_t n;

    while ((n = recv(h->fd, bytes, sizeof(bytes), MSG_DONTWAIT)) > 0) {
        struct bytes *to = h->sealed ? &h->in : &h->clear;

        any = true;
        if (to->len < OUT_MAX)
            put_raw(to, bytes, (size_t)n);
    }
    return any;
}

static void settle(struct hostile *h)
{
    for (unsigned turns = 0, idle = 0; turns < TURNS_MAX && idle < IDLE_TURNS; turns++) {
        bool busy = is_busy();

        (void)uv_run(&all.w->loop, busy ? UV_RUN_ONCE : UV_RUN_NOWAIT);
        idle = hear(h) || busy ? 0 : idle + 1;
    }
}

static void send_bytes(struct hostile *h, const uint8_t *data, size_t len)
{
    while (len > 0) {
        ssize_t n = send(h->fd, data, len, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (n < 0 && errno != EAGAIN)
            return; /* it has hung up */
        data += MAX(n, 0);
        len -= (size_t)MAX(n, 0);
        settle(h);
    }
}

/* What gnutls wants to send, as the input wants it to be. */
static void flush(struct hostile *h)
{
    struct bytes out = h->out;

    h->out = (struct bytes){0};
    if (out.len == 0)
        return;
    if (h->mangle_with)
        out.data[h->mangle_at % out.len] ^= h->mangle_with;
    send_bytes(h, out.data, out.len - MIN(h->cut, out.len));
    h->mangle_with = h->cut = 0;
    bytes_done(&out);
}

static void shake(struct hostile *h, unsigned nflights)
{
    h->sealed = true;
    for (unsigned i = 0; !h->up && i < (nflights ? nflights : FLIGHTS_MAX); i++) {
        int r = gnutls_handshake(h->session);

        flush(h);
        settle(h);
        h->up = r == 0;
        if (r < 0 && gnutls_error_is_fatal(r))
            return;
    }
}

static void read_sealed(struct hostile *h)
{
    uint8_t dropped[4096];

    while (h->up && gnutls_record_recv(h->session, dropped, sizeof(dropped)) > 0)
        ;
}

static void operate(struct hostile *h, struct input *in)
{
    uint8_t word = input_byte(in);
    struct input bytes;
    size_t len;

    switch ((enum op)(word % NOPS)) {
    case SAY:
    case SAY_SEALED:
        len = input_byte(in);
        len |= (size_t)(word & 0x80 ? input_byte(in) : 0) << 8;
        bytes = input_take(in, len);
        if (word % NOPS == SAY)
            send_bytes(h, bytes.data, bytes.size);
        else if (h->up && bytes.size > 0)
            (void)gnutls_record_send(h->session, bytes.data, bytes.size);
        break;
    case SHAKE:
        shake(h, word / NOPS);
        break;
    case MANGLE:
        h->mangle_at = input_byte(in);
        h->mangle_with = input_byte(in);
        break;
    case CUT:
        h->cut = input_byte(in);
        break;
    case BYE:
        if (h->up)
            (void)gnutls_bye(h->session, GNUTLS_SHUT_WR);
        flush(h);
        if (word & 0x80)
            (void)shutdown(h->fd, SHUT_WR);
        break;
    case REKEY:
        if (h->up && gnutls_protocol_get_version(h->session) >= GNUTLS_TLS1_3)
            (void)gnutls_session_key_update(h->session, word & 0x80 ? GNUTLS_KU_PEER : 0);
        else if (h->up)
            (void)gnutls_handshake(h->session);
        break;
    case ALERT:
        for (unsigned i = 0; h->up && i <= word / NOPS; i++)
            (void)gnutls_alert_send(h->session, GNUTLS_AL_WARNING, GNUTLS_A_UNRECOGNIZED_NAME);
        break;
    case NOPS:
        break;
    }
    flush(h);
    settle(h);
    read_sealed(h);
}

static void start_session(struct hostile *h, uint8_t first)
{
    const char *priority = first & X509 ? "NORMAL" : "NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK";
    const char *versions = first & OLD ? ":-VERS-ALL:+VERS-TLS1.2" : first & NEW ? ":-VERS-ALL:+VERS-TLS1.3" : "";
    char words[128];
    int r;

    CHECK(gnutls_init(&h->session, GNUTLS_CLIENT | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL) == 0);
    (void)snprintf(words, sizeof(words), "%s%s", priority, versions);
    CHECK(gnutls_priority_set_direct(h->session, words, NULL) == 0);
    if (first & X509)
        r = gnutls_credentials_set(h->session, GNUTLS_CRD_CERTIFICATE,
                                   first & WRONG ? all.client_nobody : all.client_x509);
    else
        r = gnutls_credentials_set(h->session, GNUTLS_CRD_PSK, first & WRONG ? all.client_wrong : all.client_psk);
    CHECK(r == 0);
    gnutls_transport_set_ptr(h->session, h);
    gnutls_transport_set_pull_function(h->session, on_pull);
    gnutls_transport_set_push_function(h->session, on_push);
}

static void connect_client(struct hostile *h)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", all.w->path);
    h->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(h->fd >= 0 && connect(h->fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    settle(h);
}

/* -- what must be true --------------------------------------------------------------------------------------------- */
/* Words that it has not said itself. */
static void check_no_secret(const struct bytes *told, const uint8_t *data, size_t size)
{
    static const char *const secrets[] = {"web/", "vda", "vdb", "qcow2", "monday", "MiB"};

    for (size_t i = 0; told->len > 0 && i < ARRAY_SIZE(secrets); i++) {
        size_t len = strlen(secrets[i]);

        CHECK(!memmem(told->data, told->len, secrets[i], len) || memmem(data, size, secrets[i], len));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char starttls[] = "\0\0\0\3IHAVEOPT\0\0\0\5\0\0\0"; /* and the 0 at its end */
    struct input in = {data, size};
    uint8_t first = input_byte(&in);
    struct hostile h = {0};
    struct vm *vm;

    prepare();
    vm = &all.w->vms[0];
    vm->nentered = vm->nleft = 0;
    all.w->config.tls = first & REQUIRED ? CONFIG_TLS_REQUIRE : CONFIG_TLS_ON;
    tls_server_set_creds(&all.tls, tls_creds_ref(first & X509 ? all.x509 : all.psk));
    connect_client(&h);
    start_session(&h, first);
    if (first & BEGUN) {
        send_bytes(&h, (const uint8_t *)starttls, sizeof(starttls));
        settle(&h);
        h.sealed = true;
    }
    while (in.size > 0)
        operate(&h, &in);
    if (first & REQUIRED) {
        check_no_secret(&h.clear, data, size);
        CHECK(!(first & WRONG) || vm->nentered == 0);
        CHECK(h.up || vm->nentered == 0);
    }
    (void)close(h.fd);
    h.fd = -1;
    loop_until(&all.w->loop, all.w->set.nopen == 0);
    CHECK(vm->nentered == vm->nleft && !vm->stays && all.w->set.budget.used == 0 && all.tls.sealed == 0);
    gnutls_deinit(h.session);
    bytes_done(&h.in);
    bytes_done(&h.out);
    bytes_done(&h.clear);
    return 0;
}
