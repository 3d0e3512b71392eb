/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* access: which rule means whom, and what it gives. */
#include "access.h"
#include "config.h"
#include "lib/test.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#define DEFAULT ((unsigned)(ACCESS_LIST | ACCESS_PULL | ACCESS_CHECKPOINT))
#define STRANGER ((uid_t)54321)

static struct access one(const char *rule)
{
    struct access a = {0};
    struct failure f = {0};

    if (access_add(&a, rule, &f) < 0)
        fail_msg("%s: %s", rule, f.text);
    return a;
}

static unsigned rights(const char *rule, const struct access_who *who, const char *vm)
{
    struct access a = one(rule);
    unsigned r = access_rights(&a, who, vm);

    access_done(&a);
    return r;
}

static struct access_who at(const char *text)
{
    struct access_who who = {0};
    struct sockaddr_in *in = (struct sockaddr_in *)&who.address;
    struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&who.address;

    if (inet_pton(AF_INET, text, &in->sin_addr) == 1)
        in->sin_family = AF_INET;
    else if (inet_pton(AF_INET6, text, &in6->sin6_addr) == 1)
        in6->sin6_family = AF_INET6;
    else
        fail_msg("%s", text);
    return who;
}

static void without_rules_root_and_our_own_user_may_do_all_and_nobody_else_anything(void **state)
{
    struct access a = {0};
    const struct access_who root = {.has_peer = true}, own = {.has_peer = true, .uid = geteuid()},
                            stranger = {.has_peer = true, .uid = STRANGER}, tls = {.psk = "root", .dn = "CN=root"},
                            zero_without_a_peer = {0}, local = at("127.0.0.1");
    const struct access_who *const others[] = {&stranger, &tls, &zero_without_a_peer, &local};

    assert_int_equal(access_rights(&a, &root, "vm"), ACCESS_ALL);
    assert_int_equal(access_rights(&a, &own, "vm"), ACCESS_ALL);
    assert_true(access_is_admin(&a, &root) && access_may_connect(&a, &own));
    for (size_t i = 0; i < ARRAY_SIZE(others); i++) {
        assert_int_equal(access_rights(&a, others[i], "vm"), 0);
        assert_false(access_is_admin(&a, others[i]));
        assert_false(access_may_connect(&a, others[i]));
    }
}

static void users_and_groups_are_those_of_the_peer(void **state)
{
    gid_t groups[] = {7, 9};
    const struct access_who who = {.has_peer = true, .uid = STRANGER, .groups = groups, .ngroups = 2},
                            no_peer = {.uid = STRANGER, .groups = groups, .ngroups = 2};

    assert_int_equal(rights("uid:54321=*", &who, "vm"), DEFAULT);
    assert_int_equal(rights("uid:54320=*", &who, "vm"), 0);
    assert_int_equal(rights("gid:9=*", &who, "vm"), DEFAULT);
    assert_int_equal(rights("gid:8=*", &who, "vm"), 0);
    assert_int_equal(rights("user:root=*", &who, "vm"), 0);
    assert_int_equal(rights("group:root=*", &who, "vm"), 0);
    assert_int_equal(rights("uid:54321=*", &no_peer, "vm"), 0);
    assert_int_equal(rights("gid:9=*", &no_peer, "vm"), 0);
}

static void tls_names_match_only_what_tls_has_verified(void **state)
{
    static const char *const sans[] = {"a.backup.example", "uri:x"};
    const struct access_who cert = {.dn = "CN=alice,O=Example", .cn = "alice", .sans = sans, .nsans = 2},
                            psk = {.psk = "alice"};

    assert_int_equal(rights("dn:CN=alice,O=Example=web-*", &cert, "web-1"), DEFAULT);
    assert_int_equal(rights("dn:CN=alice,O=Example=web-*", &cert, "db"), 0);
    assert_int_equal(rights("dn:CN=alice=*", &cert, "vm"), 0);
    assert_int_equal(rights("dn:*,O=Example=*", &cert, "vm"), DEFAULT);
    assert_int_equal(rights("cn:alice=*", &cert, "vm"), DEFAULT);
    assert_int_equal(rights("cn:alice=*", &psk, "vm"), 0);
    assert_int_equal(rights("san:*.backup.example=*", &cert, "vm"), DEFAULT);
    assert_int_equal(rights("san:*.example.org=*", &cert, "vm"), 0);
    assert_int_equal(rights("psk:alice=*", &psk, "vm"), DEFAULT);
    assert_int_equal(rights("psk:*=*", &psk, "vm"), 0); /* a name, not a glob: whoever has a key is one of them */
    assert_int_equal(rights("psk:alice=*", &cert, "vm"), 0);
}

static void addresses_match_by_prefix_in_both_families(void **state)
{
    static const struct {
        const char *rule, *address;
        bool meant;
    } cases[] = {
        {"ip:192.0.2.7=*", "192.0.2.7", true},
        {"ip:192.0.2.7=*", "192.0.2.8", false},
        {"ip:192.0.2.0/24=*", "192.0.2.255", true},
        {"ip:192.0.2.0/24=*", "192.0.3.0", false},
        {"ip:192.0.2.0/23=*", "192.0.3.1", true},
        {"ip:192.0.2.7=*", "::ffff:192.0.2.7", true},
        {"ip:0.0.0.0/0=*", "203.0.113.1", true},
        {"ip:0.0.0.0/0=*", "2001:db8::1", false},
        {"ip:2001:db8::/33=*", "2001:db8:1::", true},
        {"ip:2001:db8::/33=*", "2001:db8:8000::", false},
        {"ip:::1=*", "::1", true},
    };
    const struct access_who nobody = {0};

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct access_who who = at(cases[i].address);

        if ((rights(cases[i].rule, &who, "vm") != 0) != cases[i].meant)
            fail_msg("%s, %s", cases[i].rule, cases[i].address);
    }
    assert_int_equal(rights("ip:0.0.0.0/0=*", &nobody, "vm"), 0);
    assert_int_equal(rights("any=*", &nobody, "vm"), DEFAULT);
}

static void rights_add_up_over_rules_and_vms(void **state)
{
    struct access a = one("any=web-*/list, db/pull+list ,*/control");
    const struct access_who who = {0};
    struct failure f = {0};

    assert_int_equal(access_rights(&a, &who, "web-1"), ACCESS_LIST | ACCESS_CONTROL);
    assert_int_equal(access_rights(&a, &who, "db"), ACCESS_LIST | ACCESS_PULL | ACCESS_CONTROL);
    assert_int_equal(access_rights(&a, &who, "other"), ACCESS_CONTROL);
    assert_false(access_is_admin(&a, &who));
    assert_int_equal(access_add(&a, "any=*/list+pull+checkpoint", &f), 0);
    assert_true(access_is_admin(&a, &who));
    access_done(&a);
}

static void mistakes_are_named(void **state)
{
    static const struct {
        const char *rule, *words;
    } cases[] = {
        {"alice", "not WHO="},
        {"alice=*", "none of user:NAME"},
        {"any=", "name is empty"},
        {"any=a,,b", "name is empty"},
        {"any=*/", "none of list"},
        {"any=*/write", "none of list"},
        {"any=*/list+list", "there twice"},
        {"psk:=*", "names nobody"},
        {"uid:4294967295=*", "no user id"},
        {"uid:-1=*", "no user id"},
        {"gid:1x=*", "no group id"},
        {"user:no-such-user-here=*", "there is no user"},
        {"group:no-such-group-here=*", "there is no group"},
        {"ip:192.0.2=*", "no address"},
        {"ip:192.0.2.0/33=*", "from 0 to 32"},
        {"ip:2001:db8::/129=*", "from 0 to 128"},
        {"ip:192.0.2.0/=*", "from 0 to 32"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct access a = {0};
        struct failure f = {0};

        assert_int_equal(access_add(&a, cases[i].rule, &f), -EINVAL);
        if (!strstr(f.text, cases[i].words))
            fail_msg("%s: \"%s\"", cases[i].rule, f.text);
        access_done(&a);
    }
}

static void there_are_at_most_so_many_rules(void **state)
{
    struct access a = {0};
    struct failure f = {0};

    for (unsigned i = 0; i < CONFIG_RULES_MAX; i++)
        assert_int_equal(access_add(&a, "any=vm", &f), 0);
    assert_int_equal(access_add(&a, "any=vm", &f), -EINVAL);
    assert_non_null(strstr(f.text, "more than"));
    access_done(&a);
}

static void only_rules_of_the_system_s_users_open_the_sockets(void **state)
{
    static const struct {
        const char *rule;
        bool opens;
    } cases[] = {{"psk:a=*", false}, {"ip:192.0.2.1=*", false}, {"cn:a=*", false},
                 {"uid:1=*", true},  {"gid:1=*", true},         {"any=*", true}};

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct access a = one(cases[i].rule);

        assert_int_equal(access_names_users(&a), cases[i].opens);
        access_done(&a);
    }
}

static void the_system_tells_a_peer_s_user_and_groups(void **state)
{
    struct access_who who;
    bool found = false;
    int fds[2];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    assert_int_equal(access_peer(fds[0], &who), 0);
    assert_true(who.has_peer);
    assert_int_equal(who.uid, geteuid());
    for (size_t i = 0; i < who.ngroups; i++)
        found = found || who.groups[i] == getegid();
    assert_true(found);
    access_who_done(&who);
    close(fds[0]);
    close(fds[1]);
    assert_true(access_peer(fds[0], &who) < 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_rules_root_and_our_own_user_may_do_all_and_nobody_else_anything),
        cmocka_unit_test(users_and_groups_are_those_of_the_peer),
        cmocka_unit_test(tls_names_match_only_what_tls_has_verified),
        cmocka_unit_test(addresses_match_by_prefix_in_both_families),
        cmocka_unit_test(rights_add_up_over_rules_and_vms),
        cmocka_unit_test(mistakes_are_named),
        cmocka_unit_test(there_are_at_most_so_many_rules),
        cmocka_unit_test(only_rules_of_the_system_s_users_open_the_sockets),
        cmocka_unit_test(the_system_tells_a_peer_s_user_and_groups),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
