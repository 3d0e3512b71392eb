/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * tls: one connection under it, over a socket pair, with gnutls as its client: handshakes, bytes both ways, what is
 * kept for a client that takes nothing, and how each of the ends ends.
 */
#include "lib/loop.h"
#include "lib/test.h"

#include "config.h"
#include "tls.h"

#include <errno.h>
#include <fcntl.h>
#include <gnutls/gnutls.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define KIB 1024u
#define USER "alice"
#define BOX_SLACK (24 * KIB) /* of a box: TLS_INLINE and headers of records */

struct rig {
    uv_loop_t loop;
    char path[64]; /* of the keys */
    struct tls_server server;
    uv_pipe_t pipe;
    struct tls *tls; /* NULL: none, or not yet */
    uint8_t *got;    /* owned: what came out of it */
    size_t ngot;
    ssize_t last; /* of tls_read() */
    unsigned ntaken;
    bool reading, closed;
    /* the client */
    int fd; /* -1: closed */
    gnutls_session_t session;
    gnutls_psk_client_credentials_t key;
    int shaken;     /* of gnutls_handshake() */
    uint8_t *heard; /* owned */
    size_t nheard;
    ssize_t receive; /* of gnutls_record_recv() */
};

static uint8_t byte_at(size_t i)
{
    return (uint8_t)(i * 2654435761u >> 23);
}

static uint8_t *bytes_of(size_t from, size_t len)
{
    uint8_t *bytes = malloc(len);

    assert_non_null(bytes);
    for (size_t i = 0; i < len; i++)
        bytes[i] = byte_at(from + i);
    return bytes;
}

static void append(uint8_t **to, size_t *n, const void *bytes, size_t len)
{
    *to = realloc(*to, *n + len);
    assert_non_null(*to);
    memcpy(*to + *n, bytes, len);
    *n += len;
}

/* -- the server ---------------------------------------------------------------------------------------------------- */
static void pump(struct rig *r);

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
    struct rig *r = handle->data;

    *buf = tls_room(r->tls);
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct rig *r = stream->data;

    if (n > 0)
        tls_received(r->tls, (size_t)n);
    else if (n < 0 && n != UV_ENOBUFS)
        tls_received_eof(r->tls);
    if (n < 0) {
        (void)uv_read_stop(stream);
        r->reading = n == UV_ENOBUFS; /* else it is at its end */
    }
    pump(r);
}

static void pump(struct rig *r)
{
    uint8_t bytes[16 * KIB];

    do {
        r->last = tls_read(r->tls, bytes, sizeof bytes);
        if (r->last > 0)
            append(&r->got, &r->ngot, bytes, (size_t)r->last);
    } while (r->last > 0);
    if (r->reading && tls_room(r->tls).len > 0)
        (void)uv_read_start((uv_stream_t *)&r->pipe, on_alloc, on_read);
    else
        (void)uv_read_stop((uv_stream_t *)&r->pipe);
}

static void on_taken(void *arg)
{
    struct rig *r = arg;

    r->ntaken++;
}

static void on_moved(void *arg)
{
    pump(arg);
}

static const struct tls_ops ops = {.taken = on_taken, .moved = on_moved};

static int set_up(void **state)
{
    static const unsigned char raw[] = "0123456789abcdef";
    const gnutls_datum_t key = {(unsigned char *)raw, 16};
    struct rig *r = calloc(1, sizeof(*r));
    struct tls_creds *creds = NULL;
    struct failure note = {0}, why = {0};
    int fd;

    assert_non_null(r);
    loop_init(&r->loop);
    (void)snprintf(r->path, sizeof r->path, "/tmp/qpull-tls-XXXXXX");
    fd = mkstemp(r->path);
    assert_true(fd >= 0 && dprintf(fd, USER ":30313233343536373839616263646566\n") > 0);
    (void)close(fd);
    assert_int_equal(tls_creds_load(NULL, r->path, &creds, &note, &why), 0);
    assert_int_equal(tls_server_init(&r->server, &r->loop, /* nthreads= */ 2, creds), 0);
    assert_int_equal(gnutls_psk_allocate_client_credentials(&r->key), 0);
    assert_int_equal(gnutls_psk_set_client_credentials(r->key, USER, &key, GNUTLS_PSK_KEY_RAW), 0);
    r->fd = -1;
    *state = r;
    return 0;
}

static void on_closed(uv_handle_t *handle)
{
    struct rig *r = handle->data;

    r->closed = true;
}

/* The connection goes, and may be replaced. */
static void leave(struct rig *r)
{
    if (r->fd >= 0)
        (void)close(r->fd);
    r->fd = -1;
    if (r->session)
        gnutls_deinit(TAKE_PTR(r->session));
    if (r->tls) {
        tls_stop(r->tls);
        uv_close((uv_handle_t *)&r->pipe, on_closed);
        loop_until(&r->loop, r->closed && !tls_is_busy(r->tls));
        tls_free(TAKE_PTR(r->tls));
    }
    free(TAKE_PTR(r->got));
    free(TAKE_PTR(r->heard));
    r->ngot = r->nheard = 0;
    r->closed = false;
    r->ntaken = 0;
    assert_int_equal(r->server.sealed, 0);
}

static void on_server_closed(void *arg)
{
    struct rig *r = arg;

    r->closed = true;
}

static int tear_down(void **state)
{
    struct rig *r = *state;

    leave(r);
    tls_server_close(&r->server, on_server_closed, r);
    loop_until(&r->loop, r->closed);
    loop_done(&r->loop);
    gnutls_psk_free_client_credentials(r->key);
    (void)unlink(r->path);
    free(r);
    return 0;
}

/* -- the client ---------------------------------------------------------------------------------------------------- */
static void meet(struct rig *r, const char *versions)
{
    char priority[128];
    int pair[2];

    leave(r);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair), 0);
    assert_int_equal(uv_pipe_init(&r->loop, &r->pipe, 0), 0);
    assert_int_equal(uv_pipe_open(&r->pipe, pair[0]), 0);
    r->pipe.data = r;
    r->fd = pair[1];
    assert_int_equal(tls_new(&r->server, (uv_stream_t *)&r->pipe, &ops, r, &r->tls), 0);
    assert_int_equal(tls_state(r->tls), TLS_HANDSHAKE);
    assert_int_equal(gnutls_init(&r->session, GNUTLS_CLIENT | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL), 0);
    (void)snprintf(priority, sizeof priority, "NORMAL:-VERS-ALL:%s:-KX-ALL:+ECDHE-PSK:+DHE-PSK", versions);
    assert_int_equal(gnutls_priority_set_direct(r->session, priority, NULL), 0);
    assert_int_equal(gnutls_credentials_set(r->session, GNUTLS_CRD_PSK, r->key), 0);
    gnutls_transport_set_int(r->session, r->fd);
    r->shaken = GNUTLS_E_AGAIN;
    r->receive = GNUTLS_E_AGAIN;
    r->reading = true;
    pump(r);
}

/* Whether both sides have an end of it, well or not. */
static bool is_shaken(struct rig *r)
{
    if (r->shaken == GNUTLS_E_AGAIN)
        r->shaken = gnutls_handshake(r->session);
    return tls_state(r->tls) == TLS_FAILED || (r->shaken == 0 && tls_state(r->tls) == TLS_UP);
}

static void shake(struct rig *r, const char *versions)
{
    meet(r, versions);
    loop_until(&r->loop, is_shaken(r));
    assert_int_equal(r->shaken, 0);
    assert_int_equal(tls_state(r->tls), TLS_UP);
}

/* How much the client has taken. */
static size_t listen_on(struct rig *r)
{
    uint8_t bytes[16 * KIB];

    while ((r->receive = gnutls_record_recv(r->session, bytes, sizeof bytes)) > 0)
        append(&r->heard, &r->nheard, bytes, (size_t)r->receive);
    return r->nheard;
}

static size_t say(struct rig *r, const uint8_t *bytes, size_t len, size_t *at)
{
    ssize_t n;

    while (*at < len && (n = gnutls_record_send(r->session, bytes + *at, len - *at)) > 0)
        *at += (size_t)n;
    return r->ngot;
}

/* -- tests --------------------------------------------------------------------------------------------------------- */
static const char *const versions[] = {"+VERS-TLS1.2", "+VERS-TLS1.3"};

static void both_versions_shake_hands_and_tell_who_it_is(void **state)
{
    struct rig *r = *state;

    for (size_t i = 0; i < ARRAY_SIZE(versions); i++) {
        shake(r, versions[i]);
        assert_string_equal(tls_peer(r->tls)->identity, "psk:" USER);
        assert_string_equal(tls_peer(r->tls)->psk, USER);
        assert_null(tls_peer(r->tls)->dn);
        assert_non_null(strstr(tls_peer(r->tls)->session, versions[i] + strlen("+VERS-")));
        assert_true(i == 0 || strstr(tls_peer(r->tls)->session, "AES-128-GCM"));
    }
    assert_int_equal(r->server.nhandshakes, ARRAY_SIZE(versions));
    assert_int_equal(r->server.nfailed, 0);
}

static void older_versions_are_not_spoken(void **state)
{
    struct rig *r = *state;

    meet(r, "+VERS-TLS1.1");
    loop_until(&r->loop, is_shaken(r));
    assert_int_equal(tls_state(r->tls), TLS_FAILED);
    assert_int_equal(r->server.nfailed, 1);
}

static void bytes_of_any_number_come_through_in_their_order(void **state)
{
    static const size_t sizes[] = {1,
                                   TLS_INLINE - 1,
                                   TLS_INLINE,
                                   TLS_INLINE + 1,
                                   TLS_PART - 1,
                                   TLS_PART,
                                   TLS_PART + 1,
                                   TLS_PART + TLS_INLINE + 1,
                                   3 * TLS_PART + 7};
    struct rig *r = *state;

    for (size_t v = 0; v < ARRAY_SIZE(versions); v++) {
        shake(r, versions[v]);
        for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
            size_t len = sizes[i], before = r->nheard, ngot = r->ngot, at = 0, third = len / 3, head = MIN(len, 20);
            _cleanup_free_ uint8_t *bytes = bytes_of(i, len);
            /* As replies are: a small one before each part, and one that is empty. */
            uv_buf_t bufs[] = {uv_buf_init((char *)bytes, (unsigned)head), uv_buf_init((char *)bytes, 0),
                               uv_buf_init((char *)bytes + head, (unsigned)(len - head > third ? third : 0)),
                               uv_buf_init((char *)bytes, 0)};

            bufs[3] = uv_buf_init((char *)bytes + head + bufs[2].len, (unsigned)(len - head - bufs[2].len));
            r->ntaken = 0;
            tls_write(r->tls, bufs, ARRAY_SIZE(bufs));
            loop_until(&r->loop, listen_on(r) == before + len && r->ntaken == 1 && !tls_is_sending(r->tls));
            assert_memory_equal(r->heard + before, bytes, len);
            loop_until(&r->loop, say(r, bytes, len, &at) == ngot + len);
            assert_memory_equal(r->got + ngot, bytes, len);
        }
        assert_int_equal(r->server.sealed, 0);
    }
}

static void who_takes_nothing_has_two_boxes_kept_for_him_and_no_more(void **state)
{
    struct rig *r = *state;
    size_t len = 4u << 20;
    _cleanup_free_ uint8_t *bytes = bytes_of(3, len);
    uv_buf_t buf = uv_buf_init((char *)bytes, (unsigned)len);
    uint64_t progress;

    shake(r, "+VERS-TLS1.3");
    tls_write(r->tls, &buf, 1);
    do { /* until nothing moves any more */
        progress = tls_progress(r->tls) + r->server.sealed;
        loop_turn(&r->loop, 20);
        loop_until(&r->loop, !tls_is_busy(r->tls));
    } while (progress != tls_progress(r->tls) + r->server.sealed);
    assert_int_equal(r->ntaken, 0);
    assert_true(r->server.sealed > 0);
    assert_true(r->server.sealed <= 2 * (TLS_PART + BOX_SLACK));
    loop_until(&r->loop, listen_on(r) == len && r->ntaken == 1);
    assert_memory_equal(r->heard, bytes, len);
    loop_until(&r->loop, !tls_is_sending(r->tls));
    assert_int_equal(r->server.sealed, 0);
}

static void a_wrong_key_gets_nowhere(void **state)
{
    static const unsigned char raw[] = "0123456789abcdeF";
    const gnutls_datum_t wrong = {(unsigned char *)raw, 16};
    struct rig *r = *state;

    gnutls_psk_free_client_credentials(r->key);
    assert_int_equal(gnutls_psk_allocate_client_credentials(&r->key), 0);
    assert_int_equal(gnutls_psk_set_client_credentials(r->key, USER, &wrong, GNUTLS_PSK_KEY_RAW), 0);
    for (size_t i = 0; i < ARRAY_SIZE(versions); i++) {
        meet(r, versions[i]);
        loop_until(&r->loop, is_shaken(r));
        assert_int_equal(tls_state(r->tls), TLS_FAILED);
        assert_non_null(strstr(tls_why(r->tls)->text, "the TLS handshake failed"));
        assert_int_equal(r->ngot, 0);
        assert_int_equal(r->server.nfailed, i + 1);
    }
}

static void bytes_that_nobody_sealed_end_it_and_are_never_read(void **state)
{
    static const uint8_t forged[] = {23, 3, 3, 0, 32, 'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T'};
    struct rig *r = *state;
    uint8_t record[37] = {0};

    memcpy(record, forged, sizeof forged);
    for (size_t i = 0; i < ARRAY_SIZE(versions); i++) {
        shake(r, versions[i]);
        assert_int_equal(send(r->fd, record, sizeof record, MSG_NOSIGNAL), sizeof record);
        loop_until(&r->loop, tls_state(r->tls) == TLS_FAILED);
        assert_true(r->last < 0 && r->last != -EAGAIN);
        assert_int_equal(tls_why(r->tls)->err, r->last);
        assert_int_equal(r->ngot, 0);
        assert_int_equal(tls_read(r->tls, record, sizeof record), r->last); /* and so it stays */
    }
}

/* What is in clear after NBD_OPT_STARTTLS is no handshake, whoever has sent it. */
static void words_in_clear_are_no_handshake(void **state)
{
    static const char clear[] = "IHAVEOPT\0\0\0\3\0\0\0"; /* and the 0 at its end */
    struct rig *r = *state;

    meet(r, "+VERS-TLS1.3");
    assert_int_equal(send(r->fd, clear, sizeof clear, MSG_NOSIGNAL), sizeof clear);
    loop_until(&r->loop, tls_state(r->tls) == TLS_FAILED);
    assert_int_equal(r->ngot, 0);
    assert_int_equal(r->server.nfailed, 1);
}

static void a_handshake_message_without_end_is_not_waited_for(void **state)
{
    /* A ClientHello of 16 MiB, in records of 4 KiB. */
    static const uint8_t begin[] = {22, 3, 1, 16, 0, 1, 255, 255, 255, 3, 3};
    struct rig *r = *state;
    uint8_t record[5 + 4 * KIB] = {0};
    size_t said = 0;

    meet(r, "+VERS-TLS1.2");
    memcpy(record, begin, sizeof begin);
    while (tls_state(r->tls) == TLS_HANDSHAKE && said < 2 * TLS_BARREN_MAX) {
        ssize_t n = send(r->fd, record, sizeof record, MSG_NOSIGNAL);

        if (n > 0) {
            assert_int_equal(n, sizeof record);
            said += (size_t)n;
            memset(record + 5, 0, sizeof begin - 5);
        }
        loop_turn(&r->loop, 2);
        loop_until(&r->loop, !tls_is_busy(r->tls));
    }
    assert_int_equal(tls_state(r->tls), TLS_FAILED);
    assert_non_null(strstr(tls_why(r->tls)->text, "too much"));
    assert_true(said > TLS_HANDSHAKE_MAX); /* certificates may be long */
    assert_int_equal(r->server.nfailed, 1);
}

/* One warning after the other, each looked at by itself. Returns how many bytes at least. */
static size_t warn(struct rig *r, unsigned n)
{
    size_t said = 0;

    for (; n > 0 && tls_state(r->tls) == TLS_UP; n--) {
        assert_int_equal(gnutls_alert_send(r->session, GNUTLS_AL_WARNING, GNUTLS_A_NO_RENEGOTIATION), 0);
        said += 2; /* the alert itself */
        loop_turn(&r->loop, 2);
    }
    return said;
}

static void what_is_no_data_is_heard_for_so_long_and_no_longer(void **state)
{
    struct rig *r = *state;
    unsigned n = 0;

    shake(r, "+VERS-TLS1.2");
    for (size_t i = 0; i < 8; i++) { /* with data now and then: as much as is wanted */
        size_t at = 0;
        (void)warn(r, 1500);
        loop_until(&r->loop, say(r, (const uint8_t *)"data", 4, &at) == 4 * (i + 1));
    }
    assert_true(warn(r, TLS_BARREN_MAX) < TLS_BARREN_MAX);
    assert_int_equal(tls_state(r->tls), TLS_FAILED);
    assert_non_null(strstr(tls_why(r->tls)->text, "too much"));

    shake(r, "+VERS-TLS1.3");
    for (; tls_state(r->tls) == TLS_UP && n < 1000; n++) {
        assert_int_equal(gnutls_session_key_update(r->session, 0), 0);
        loop_turn(&r->loop, 2);
    }
    assert_int_equal(tls_state(r->tls), TLS_FAILED);
}

static void who_leaves_in_the_middle_of_a_handshake_is_told_of(void **state)
{
    struct rig *r = *state;

    meet(r, "+VERS-TLS1.2");
    assert_int_equal(gnutls_handshake(r->session), GNUTLS_E_AGAIN);
    loop_until(&r->loop, !tls_is_busy(r->tls) && !tls_is_sending(r->tls));
    assert_int_equal(shutdown(r->fd, SHUT_WR), 0);
    loop_until(&r->loop, tls_state(r->tls) == TLS_FAILED);
    assert_non_null(strstr(tls_why(r->tls)->text, "left in its middle"));
    assert_int_equal(r->server.nfailed, 1);
}

static void each_side_hears_when_the_other_says_goodbye(void **state)
{
    struct rig *r = *state;
    size_t at = 0;

    for (size_t i = 0; i < ARRAY_SIZE(versions); i++) {
        shake(r, versions[i]);
        at = 0;
        (void)say(r, (const uint8_t *)"last", 4, &at);
        assert_int_equal(gnutls_bye(r->session, GNUTLS_SHUT_WR), 0);
        loop_until(&r->loop, r->last == 0);
        assert_int_equal(r->ngot, 4);
        assert_int_equal(tls_state(r->tls), TLS_UP);
        tls_bye(r->tls);
        loop_until(&r->loop, listen_on(r) == 0 && r->receive == 0);
    }
}

static void a_connection_may_be_stopped_while_a_worker_has_it(void **state)
{
    struct rig *r = *state;
    size_t len = 4u << 20;
    _cleanup_free_ uint8_t *bytes = bytes_of(5, len);
    uv_buf_t buf = uv_buf_init((char *)bytes, (unsigned)len);

    shake(r, "+VERS-TLS1.3");
    tls_write(r->tls, &buf, 1);
    assert_true(tls_is_busy(r->tls));
    leave(r); /* waits, and proves that nothing is kept */
    meet(r, "+VERS-TLS1.3");
    assert_int_equal(gnutls_handshake(r->session), GNUTLS_E_AGAIN);
    loop_until(&r->loop, tls_is_busy(r->tls) || tls_is_sending(r->tls) || tls_progress(r->tls) > 0);
    leave(r);
    assert_int_equal(r->server.nfailed, 1);
}

static void broken_key_files_are_refused_in_words(void **state)
{
    static const struct {
        const char *text;
        mode_t mode;
    } files[] = {
        {"", 0600},
        {"alice\n", 0600},
        {":00\n", 0600},
        {"alice:0g0g0g0g0g0g0g0g\n", 0600},
        {"alice:000\n", 0600},
        {"alice:\n", 0600},
    };
    char path[] = "/tmp/qpull-tls-keys-XXXXXX";
    int fd = mkstemp(path);

    assert_true(fd >= 0);
    for (size_t i = 0; i < ARRAY_SIZE(files); i++) {
        struct failure note = {0}, why = {0};
        struct tls_creds *creds = NULL;

        assert_int_equal(ftruncate(fd, 0), 0);
        assert_int_equal(pwrite(fd, files[i].text, strlen(files[i].text), 0), strlen(files[i].text));
        assert_int_equal(fchmod(fd, files[i].mode), 0);
        assert_true(tls_creds_load(NULL, path, &creds, &note, &why) < 0);
        assert_null(creds);
        assert_non_null(strstr(why.text, path));
        assert_null(strstr(why.text, "0g0g")); /* no part of a key */
    }
    (void)close(fd);
    (void)unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(both_versions_shake_hands_and_tell_who_it_is, set_up, tear_down),
        cmocka_unit_test_setup_teardown(older_versions_are_not_spoken, set_up, tear_down),
        cmocka_unit_test_setup_teardown(bytes_of_any_number_come_through_in_their_order, set_up, tear_down),
        cmocka_unit_test_setup_teardown(who_takes_nothing_has_two_boxes_kept_for_him_and_no_more, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_wrong_key_gets_nowhere, set_up, tear_down),
        cmocka_unit_test_setup_teardown(bytes_that_nobody_sealed_end_it_and_are_never_read, set_up, tear_down),
        cmocka_unit_test_setup_teardown(words_in_clear_are_no_handshake, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_handshake_message_without_end_is_not_waited_for, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_is_no_data_is_heard_for_so_long_and_no_longer, set_up, tear_down),
        cmocka_unit_test_setup_teardown(who_leaves_in_the_middle_of_a_handshake_is_told_of, set_up, tear_down),
        cmocka_unit_test_setup_teardown(each_side_hears_when_the_other_says_goodbye, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_connection_may_be_stopped_while_a_worker_has_it, set_up, tear_down),
        cmocka_unit_test(broken_key_files_are_refused_in_words),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
