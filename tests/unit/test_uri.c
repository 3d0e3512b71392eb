/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* uri: what people and programs are told to connect to. libnbd takes such a URI apart; nothing here is asked of it. */
#include "lib/test.h"
#include "uri.h"

#include <limits.h>
#include <stdio.h>
#include <unistd.h>

static void expect(const struct server_config *config, const char *address, const char *name, const char *uri)
{
    _cleanup_free_ char *told = uri_of(config, address, name, /* local= */ false);

    assert_non_null(told);
    assert_string_equal(told, uri);
}

static const struct server_config off = {.tls = CONFIG_TLS_OFF}, on = {.tls = CONFIG_TLS_ON},
                                  required = {.tls = CONFIG_TLS_REQUIRE},
                                  on_or_not = {.tls = CONFIG_TLS_ON, .allow_plaintext = true};

static void a_socket_and_a_port_have_each_their_form(void **state)
{
    expect(&off, "unix:/run/qpull/nbd.sock", "web/vda", "nbd+unix:///web/vda?socket=/run/qpull/nbd.sock");
    expect(&off, "tcp:127.0.0.1:10809", "web/vda", "nbd://127.0.0.1:10809/web/vda");
    expect(&off, "tcp:[::1]:10809", "web/vda", "nbd://[::1]:10809/web/vda");
    expect(&off, "tcp:nas.example:10809", "", "nbd://nas.example:10809/");
}

/* docs/decisions/0018-tls.md: who must use it is told so by the scheme, and nobody else. */
static void tls_is_in_the_scheme_where_it_must_be_used(void **state)
{
    expect(&required, "unix:/s", "web/vda", "nbds+unix:///web/vda?socket=/s");
    expect(&required, "tcp:127.0.0.1:1", "web/vda", "nbds://127.0.0.1:1/web/vda");
    expect(&on, "unix:/s", "web/vda", "nbd+unix:///web/vda?socket=/s");
    expect(&on, "tcp:127.0.0.1:1", "web/vda", "nbd://127.0.0.1:1/web/vda");
    expect(&on, "tcp:[::1]:1", "web/vda", "nbd://[::1]:1/web/vda");
    expect(&on, "tcp:192.0.2.1:1", "web/vda", "nbds://192.0.2.1:1/web/vda");
    expect(&on, "tcp:[2001:db8::1]:1", "web/vda", "nbds://[2001:db8::1]:1/web/vda");
    expect(&on_or_not, "tcp:192.0.2.1:1", "web/vda", "nbd://192.0.2.1:1/web/vda");
}

static void what_means_something_in_a_uri_is_encoded(void **state)
{
    expect(&off, "unix:/a b/c?d#e&f%", "w b/v+d@n=1", "nbd+unix:///w%20b/v%2Bd%40n%3D1?socket=/a%20b/c%3Fd%23e%26f%25");
    expect(&off, "tcp:h:1", "Az09-._~/", "nbd://h:1/Az09-._~/");
    expect(&off, "tcp:h:1", "\xc3\xa9\x01\x7f", "nbd://h:1/%C3%A9%01%7F"); /* bytes, whatever they mean */
}

static void any_address_is_told_as_this_machine_s_name(void **state)
{
    char host[HOST_NAME_MAX + 1] = "", wanted[HOST_NAME_MAX + 64];

    assert_int_equal(gethostname(host, sizeof(host) - 1), 0);
    (void)snprintf(wanted, sizeof(wanted), "nbd://%s:10809/web/vda", host);
    expect(&off, "tcp:0.0.0.0:10809", "web/vda", wanted);
    expect(&off, "tcp:[::]:10809", "web/vda", wanted);
    (void)snprintf(wanted, sizeof(wanted), "nbds://%s:10809/web/vda", host);
    expect(&on, "tcp:0.0.0.0:10809", "web/vda", wanted);
    expect(&off, "tcp:10.0.0.0:10809", "web/vda", "nbd://10.0.0.0:10809/web/vda"); /* just an address */
}

static void what_is_for_this_machine_only_is_no_port(void **state)
{
    _cleanup_free_ char *socket = uri_of(&off, "unix:/s", "web/vda", /* local= */ true);

    assert_string_equal(socket, "nbd+unix:///web/vda?socket=/s");
    assert_null(uri_of(&off, "tcp:127.0.0.1:1", "web/vda", /* local= */ true));
    assert_null(uri_of(&off, "tcp:0.0.0.0:1", "web/vda", /* local= */ true));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_socket_and_a_port_have_each_their_form),
        cmocka_unit_test(tls_is_in_the_scheme_where_it_must_be_used),
        cmocka_unit_test(what_means_something_in_a_uri_is_encoded),
        cmocka_unit_test(any_address_is_told_as_this_machine_s_name),
        cmocka_unit_test(what_is_for_this_machine_only_is_no_port),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
