/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * qpull certs init: a small authority, certificates of the server and of clients, or pre-shared keys, in files with the
 * names that QEMU, libnbd and nbdkit look for. What is there already is kept, so that clients can be added later.
 */
#include "qpull.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <gnutls/crypto.h>
#include <gnutls/x509.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define YEAR (365L * 24 * 3600)
#define CA_YEARS 20 /* an authority that ends takes all clients along … */
#define CERT_YEARS 5
#define EARLY (24L * 3600) /* seconds that a client's clock may be late */
#define SERIAL_SIZE 16     /* bytes; RFC 5280 4.1.2.2: at most 20 */
#define PSK_SIZE 32        /* bytes */
#define NAME_MAX_LEN 64
#define KEYS_FILE "keys.psk"     /* QEMU's name */
#define KEYS_FILE_MAX (1u << 20) /* bytes; as qpulld takes them */

struct pair {
    gnutls_x509_crt_t crt;
    gnutls_x509_privkey_t key;
};

enum kind { KIND_CA, KIND_SERVER, KIND_CLIENT };

static enum exit_status gnutls_failed(const char *what, int r)
{
    return complain("%s: %s", what, gnutls_strerror(r));
}

/* -- files --------------------------------------------------------------------------------------------------------- */
static char *path_of(const char *dir, const char *name)
{
    char *path;

    if (asprintf(&path, "%s/%s", dir, name) < 0) {
        (void)fputs("qpull: out of memory\n", stderr);
        exit(EXIT_FAILED);
    }
    return path;
}

static enum exit_status make_dir(const char *path)
{
    struct stat st;

    if (mkdir(path, 0755) == 0)
        return EXIT_DONE;
    if (errno == EEXIST && stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        return EXIT_DONE;
    return complain("cannot make the folder %s: %s", path, strerror(errno));
}

/* In one step for whoever looks; the mode is that, whatever the umask. An old file is replaced. */
static enum exit_status write_file(const char *path, const void *data, size_t len, mode_t mode)
{
    _cleanup_free_ char *temporary = NULL;
    int fd;
    bool good;

    if (asprintf(&temporary, "%s.%d", path, (int)getpid()) < 0)
        return complain("out of memory");
    fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return complain("cannot write %s: %s", temporary, strerror(errno));
    good = write(fd, data, len) == (ssize_t)len && fchmod(fd, mode) == 0 && fsync(fd) == 0;
    if (close(fd) < 0 || !good || rename(temporary, path) < 0) {
        (void)complain("cannot write %s: %s", path, strerror(errno));
        (void)unlink(temporary);
        return EXIT_FAILED;
    }
    return EXIT_DONE;
}

/* EXIT_DONE with data NULL: there is no such file. */
static enum exit_status read_file(const char *path, gnutls_datum_t *ret_data)
{
    int r;

    *ret_data = (gnutls_datum_t){0};
    if (access(path, F_OK) < 0 && errno == ENOENT)
        return EXIT_DONE;
    r = gnutls_load_file(path, ret_data);
    return r < 0 ? complain("cannot read %s: %s", path, gnutls_strerror(r)) : EXIT_DONE;
}

/* -- certificates -------------------------------------------------------------------------------------------------- */
static enum exit_status load_or_make_key(const char *path, gnutls_x509_privkey_t *ret_key)
{
    gnutls_x509_privkey_t key;
    gnutls_datum_t pem;
    enum exit_status status = read_file(path, &pem);
    int r;

    if (status != EXIT_DONE)
        return status;
    r = gnutls_x509_privkey_init(&key);
    if (r == 0 && pem.data) {
        r = gnutls_x509_privkey_import2(key, &pem, GNUTLS_X509_FMT_PEM, NULL, 0);
        if (r < 0)
            status = gnutls_failed(path, r);
    } else if (r == 0) {
        r = gnutls_x509_privkey_generate(key, GNUTLS_PK_ECDSA, GNUTLS_CURVE_TO_BITS(GNUTLS_ECC_CURVE_SECP256R1), 0);
        if (r == 0)
            r = gnutls_x509_privkey_export2_pkcs8(key, GNUTLS_X509_FMT_PEM, NULL, GNUTLS_PKCS_PLAIN, &pem);
        status = r < 0 ? gnutls_failed("cannot make a key", r) : write_file(path, pem.data, pem.size, 0600);
    }
    if (pem.data)
        gnutls_memset(pem.data, 0, pem.size);
    gnutls_free(pem.data);
    *ret_key = key;
    return status;
}

static int add_host(gnutls_x509_crt_t crt, const char *host)
{
    unsigned char address[16];
    unsigned len = 0;

    if (inet_pton(AF_INET, host, address) == 1)
        len = 4;
    else if (inet_pton(AF_INET6, host, address) == 1)
        len = 16;
    return len > 0 ? gnutls_x509_crt_set_subject_alt_name(crt, GNUTLS_SAN_IPADDRESS, address, len, GNUTLS_FSAN_APPEND)
                   : gnutls_x509_crt_set_subject_alt_name(crt, GNUTLS_SAN_DNSNAME, host, (unsigned)strlen(host),
                                                          GNUTLS_FSAN_APPEND);
}

static int name_hosts(gnutls_x509_crt_t crt, const struct args *args, const char *own)
{
    static const char *const always[] = {"localhost", "127.0.0.1", "::1"};
    int r = args->nhosts == 0 && own[0] ? add_host(crt, own) : 0;

    for (size_t i = 0; r == 0 && i < args->nhosts; i++)
        r = add_host(crt, args->hosts[i]);
    for (size_t i = 0; r == 0 && i < ARRAY_SIZE(always); i++)
        r = add_host(crt, always[i]);
    return r;
}

/* Fills in all but the names of hosts. */
static int describe(gnutls_x509_crt_t crt, enum kind kind, const char *name, gnutls_x509_privkey_t key)
{
    unsigned char serial[SERIAL_SIZE], id[64];
    size_t id_size = sizeof id;
    time_t now = time(NULL);
    int r = gnutls_rnd(GNUTLS_RND_NONCE, serial, sizeof serial);

    serial[0] = (unsigned char)((serial[0] & 0x3f) | 0x40); /* positive, and of one length */
    r = r ? r : gnutls_x509_crt_set_version(crt, 3);
    r = r ? r : gnutls_x509_crt_set_serial(crt, serial, sizeof serial);
    r = r ? r : gnutls_x509_crt_set_activation_time(crt, now - EARLY);
    r = r ? r : gnutls_x509_crt_set_expiration_time(crt, now + (kind == KIND_CA ? CA_YEARS : CERT_YEARS) * YEAR);
    r = r ? r : gnutls_x509_crt_set_dn_by_oid(crt, GNUTLS_OID_X520_COMMON_NAME, 0, name, (unsigned)strlen(name));
    r = r ? r : gnutls_x509_crt_set_key(crt, key);
    r = r ? r : gnutls_x509_crt_get_key_id(crt, 0, id, &id_size);
    r = r ? r : gnutls_x509_crt_set_subject_key_id(crt, id, id_size);
    r = r ? r : gnutls_x509_crt_set_basic_constraints(crt, kind == KIND_CA, -1);
    r = r ? r
          : gnutls_x509_crt_set_key_usage(crt, kind == KIND_CA ? GNUTLS_KEY_KEY_CERT_SIGN | GNUTLS_KEY_CRL_SIGN
                                                               : GNUTLS_KEY_DIGITAL_SIGNATURE);
    if (kind != KIND_CA)
        r = r ? r
              : gnutls_x509_crt_set_key_purpose_oid(
                    crt, kind == KIND_SERVER ? GNUTLS_KP_TLS_WWW_SERVER : GNUTLS_KP_TLS_WWW_CLIENT, 0);
    return r;
}

static int sign(gnutls_x509_crt_t crt, const struct pair *ca)
{
    unsigned char id[64];
    size_t id_size = sizeof id;
    int r = gnutls_x509_crt_get_subject_key_id(ca->crt, id, &id_size, NULL);

    r = r ? r : gnutls_x509_crt_set_authority_key_id(crt, id, id_size);
    return r ? r : gnutls_x509_crt_sign2(crt, ca->crt, ca->key, GNUTLS_DIG_SHA256, 0);
}

/* The pair in dir; what is missing of it is made. ca NULL: it signs itself. Sets *ret_new if there is a new one. */
static enum exit_status load_or_make_pair(const char *dir, enum kind kind, const char *name, const struct pair *ca,
                                          const struct args *args, struct pair *ret, bool *ret_new)
{
    static const char *const stems[] = {[KIND_CA] = "ca", [KIND_SERVER] = "server", [KIND_CLIENT] = "client"};
    char cert_name[32], key_name[32];
    _cleanup_free_ char *cert_path = NULL, *key_path = NULL;
    gnutls_datum_t pem;
    enum exit_status status;
    int r;

    (void)snprintf(cert_name, sizeof cert_name, "%s-cert.pem", stems[kind]);
    (void)snprintf(key_name, sizeof key_name, "%s-key.pem", stems[kind]);
    cert_path = path_of(dir, cert_name);
    key_path = path_of(dir, key_name);
    status = read_file(cert_path, &pem);
    if (status != EXIT_DONE)
        return status;
    if (pem.data && access(key_path, F_OK) < 0) {
        gnutls_free(pem.data);
        return complain("%s is there without its key %s: another one cannot be made with it", cert_path, key_path);
    }
    status = load_or_make_key(key_path, &ret->key);
    if (status != EXIT_DONE)
        return status;
    r = gnutls_x509_crt_init(&ret->crt);
    *ret_new = !pem.data;
    if (r == 0 && pem.data) {
        r = gnutls_x509_crt_import(ret->crt, &pem, GNUTLS_X509_FMT_PEM);
        gnutls_free(pem.data);
        return r < 0 ? gnutls_failed(cert_path, r) : EXIT_DONE;
    }
    r = r ? r : describe(ret->crt, kind, name, ret->key);
    if (r == 0 && kind == KIND_SERVER)
        r = name_hosts(ret->crt, args, name);
    r = r ? r : sign(ret->crt, ca ? ca : ret);
    r = r ? r : gnutls_x509_crt_export2(ret->crt, GNUTLS_X509_FMT_PEM, &pem);
    if (r < 0)
        return gnutls_failed("cannot make a certificate", r);
    status = write_file(cert_path, pem.data, pem.size, 0644);
    gnutls_free(pem.data);
    return status;
}

static void pair_done(struct pair *p)
{
    gnutls_x509_crt_deinit(p->crt);
    gnutls_x509_privkey_deinit(p->key);
}

/* -- what to do with them ------------------------------------------------------------------------------------------ */
/* As it can stand in a URI's query. */
static void print_escaped(const char *path)
{
    for (; *path; path++)
        if (strchr("/-._~", *path) || (*path >= '0' && *path <= '9') || ((*path | 32) >= 'a' && (*path | 32) <= 'z'))
            (void)putchar(*path);
        else
            printf("%%%02X", (unsigned char)*path);
}

static void print_uri(const char *user, const char *host, const char *key, const char *path)
{
    printf("    nbds://%s%s%s/VM/DISK?%s=", user, *user ? "@" : "", host, key);
    print_escaped(path);
    (void)putchar('\n');
}

static enum exit_status make_client(const char *dir, const char *name, const char *host, const struct pair *ca,
                                    const struct args *args)
{
    _cleanup_free_ char *folder = path_of(dir, name), *ca_path = path_of(folder, "ca-cert.pem");
    struct pair client = {0};
    gnutls_datum_t pem = {0};
    bool is_new = false;
    enum exit_status status = make_dir(folder);
    int r;

    if (status == EXIT_DONE)
        status = load_or_make_pair(folder, KIND_CLIENT, name, ca, args, &client, &is_new);
    pair_done(&client);
    if (status != EXIT_DONE)
        return status;
    r = gnutls_x509_crt_export2(ca->crt, GNUTLS_X509_FMT_PEM, &pem);
    status = r < 0 ? gnutls_failed("cannot write the authority's certificate", r)
                   : write_file(ca_path, pem.data, pem.size, 0644);
    gnutls_free(pem.data);
    if (status != EXIT_DONE)
        return status;
    printf("\nclient %s (%s): copy %s to its host; then, there,\n", name, is_new ? "new" : "kept", folder);
    print_uri("", host, "tls-certificates", folder);
    printf("    --object tls-creds-x509,id=tls0,endpoint=client,dir=%s   (qemu-img, qemu-nbd)\n", folder);
    return EXIT_DONE;
}

static enum exit_status make_certificates(const char *dir, const char *clients, const char *own,
                                          const struct args *args)
{
    _cleanup_free_ char *server_path = path_of(dir, "server-cert.pem");
    static const char *const one[] = {"client"};
    const char *const *names = args->nclients ? args->clients : one;
    const char *host = args->nhosts ? args->hosts[0] : own;
    struct pair ca = {0}, server = {0};
    char ca_name[NAME_MAX_LEN + 32];
    bool is_new = false;
    enum exit_status status;

    if (args->nhosts && access(server_path, F_OK) == 0)
        return complain("%s is there already; remove it and say --host again to have one with other names",
                        server_path);
    (void)snprintf(ca_name, sizeof ca_name, "qpull authority of %s", host);
    status = load_or_make_pair(dir, KIND_CA, ca_name, NULL, args, &ca, &is_new);
    if (status == EXIT_DONE) {
        printf("authority (%s): %s/ca-cert.pem; who has %s/ca-key.pem can make clients\n", is_new ? "new" : "kept", dir,
               dir);
        status = load_or_make_pair(dir, KIND_SERVER, host, &ca, args, &server, &is_new);
    }
    if (status == EXIT_DONE)
        printf("server (%s):    qpulld --tls require --tls-certs %s", is_new ? "new" : "kept", dir);
    for (size_t i = 0; status == EXIT_DONE && i < (args->nclients ? args->nclients : 1); i++)
        printf(" --allow 'cn:%s=*'", names[i]);
    if (status == EXIT_DONE)
        printf("\n");
    for (size_t i = 0; status == EXIT_DONE && i < (args->nclients ? args->nclients : 1); i++)
        status = make_client(clients, names[i], host, &ca, args);
    pair_done(&server);
    pair_done(&ca);
    return status;
}

/* -- pre-shared keys ----------------------------------------------------------------------------------------------- */
/* The line of a user, or NULL; its length without the end. */
static const char *find_line(const char *keys, const char *user, size_t *ret_len)
{
    size_t user_len = strlen(user);

    for (const char *at = keys; at && *at; at = strchr(at, '\n'), at = at ? at + 1 : NULL)
        if (strncmp(at, user, user_len) == 0 && at[user_len] == ':') {
            *ret_len = strcspn(at, "\r\n");
            return at;
        }
    return NULL;
}

static enum exit_status make_psk(const char *path, const char *clients, const char *name, const char *host)
{
    _cleanup_free_ char *folder = path_of(clients, name), *client_path = path_of(folder, KEYS_FILE);
    _cleanup_free_ char *all = NULL, *line = NULL;
    unsigned char key[PSK_SIZE];
    char hex[2 * PSK_SIZE + 1];
    gnutls_datum_t old;
    const char *found;
    size_t len;
    enum exit_status status = make_dir(folder);
    bool is_new;
    int r;

    if (status == EXIT_DONE)
        status = read_file(path, &old);
    if (status != EXIT_DONE)
        return status;
    if (old.size > KEYS_FILE_MAX) {
        gnutls_free(old.data);
        return complain("%s is too long", path);
    }
    all = calloc(1, old.size + NAME_MAX_LEN + sizeof hex + 8);
    if (!all) {
        gnutls_free(old.data);
        return complain("out of memory");
    }
    if (old.size > 0)
        memcpy(all, old.data, old.size);
    gnutls_free(old.data);
    found = find_line(all, name, &len);
    is_new = !found;
    if (found && asprintf(&line, "%.*s\n", (int)len, found) < 0)
        line = NULL;
    if (!found) {
        r = gnutls_rnd(GNUTLS_RND_KEY, key, sizeof key);
        if (r < 0)
            return gnutls_failed("cannot make a key", r);
        for (size_t i = 0; i < sizeof key; i++)
            (void)snprintf(hex + 2 * i, 3, "%02x", key[i]);
        if (asprintf(&line, "%s:%s\n", name, hex) < 0)
            line = NULL;
        len = strlen(all);
        if (line)
            (void)sprintf(all + len, "%s%s", len > 0 && all[len - 1] != '\n' ? "\n" : "", line);
    }
    if (!line)
        return complain("out of memory");
    if (is_new)
        status = write_file(path, all, strlen(all), 0600);
    if (status == EXIT_DONE)
        status = write_file(client_path, line, strlen(line), 0600);
    if (status != EXIT_DONE)
        return status;
    printf("\nclient %s (%s): copy %s to its host; then, there,\n", name, is_new ? "new" : "kept", folder);
    print_uri(name, host, "tls-psk-file", client_path);
    printf("    --object tls-creds-psk,id=tls0,endpoint=client,username=%s,dir=%s   (qemu-img, qemu-nbd)\n", name,
           folder);
    return EXIT_DONE;
}

static enum exit_status make_keys(const char *dir, const char *clients, const char *own, const struct args *args)
{
    _cleanup_free_ char *path = path_of(dir, KEYS_FILE);
    enum exit_status status = EXIT_DONE;

    printf("server: qpulld --tls require --tls-psk %s", path);
    for (size_t i = 0; i < args->npsks; i++)
        printf(" --allow 'psk:%s=*'", args->psks[i]);
    printf("\n");
    for (size_t i = 0; status == EXIT_DONE && i < args->npsks; i++)
        status = make_psk(path, clients, args->psks[i], args->nhosts ? args->hosts[0] : own);
    return status;
}

/* -- the command --------------------------------------------------------------------------------------------------- */
/* It becomes the name of a folder, of a certificate and of a user. */
static bool is_name(const char *name)
{
    static const char good[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";

    return *name && *name != '.' && *name != '-' && strlen(name) <= NAME_MAX_LEN && !name[strspn(name, good)];
}

static enum exit_status check_names(const char *const *names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!is_name(names[i]))
            return complain("\"%s\" is no name: letters, digits, \"-\", \"_\" and \".\", at most %d of them", names[i],
                            NAME_MAX_LEN);
    return EXIT_DONE;
}

enum exit_status run_certs_init(const struct args *args)
{
    _cleanup_free_ char *dir = NULL, *clients = NULL;
    char own[NAME_MAX_LEN + 1] = "";
    enum exit_status status;

    if (args->npsks && args->nclients)
        return complain("--client makes certificates and --psk makes keys: qpulld uses one or the other");
    if (check_names(args->clients, args->nclients) != EXIT_DONE || check_names(args->psks, args->npsks) != EXIT_DONE)
        return EXIT_USAGE;
    if (gethostname(own, sizeof own - 1) < 0 || !is_name(own))
        (void)strcpy(own, "localhost");
    status = make_dir(args->words[0]);
    if (status != EXIT_DONE)
        return status;
    dir = realpath(args->words[0], NULL);
    if (!dir)
        return complain("%s: %s", args->words[0], strerror(errno));
    clients = path_of(dir, "clients");
    status = make_dir(clients);
    if (status != EXIT_DONE)
        return status;
    return args->npsks ? make_keys(dir, clients, own, args) : make_certificates(dir, clients, own, args);
}
