/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* config: flags, the file, which of them wins, and that each mistake is named where it was made. */
#include "test.h"

#include "config.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

struct box {
    char dir[64], file[96];
    struct server_config *config;
    struct failure failure;
};

static int set_up(void **state)
{
    struct box *b = calloc(1, sizeof *b);

    (void)strcpy(b->dir, "/tmp/qpull-config-XXXXXX");
    if (!mkdtemp(b->dir))
        return -1;
    (void)snprintf(b->file, sizeof b->file, "%s/qpulld.conf", b->dir);
    *state = b;
    return 0;
}

static int tear_down(void **state)
{
    struct box *b = *state;

    config_free(b->config);
    (void)unlink(b->file);
    (void)rmdir(b->dir);
    free(b);
    return 0;
}

/* argv without its first word, ended by NULL; the box's file is always named. */
static int parse(struct box *b, const char *const *flags)
{
    char *argv[32] = {(char *)"qpulld", (char *)"--config", b->file};
    int argc = 3;

    for (; *flags; flags++)
        argv[argc++] = (char *)*flags;
    config_free(b->config);
    b->config = NULL;
    b->failure = (struct failure){0};
    return config_parse(argc, argv, &b->config, &b->failure);
}
#define PARSE(b, ...) parse(b, (const char *const[]){__VA_ARGS__, NULL})
#define PARSE_FILE_ONLY(b) parse(b, (const char *const[]){NULL})

static void write_file(struct box *b, const char *text)
{
    FILE *file = fopen(b->file, "w");

    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static void assert_says(const struct box *b, const char *part)
{
    if (!strstr(b->failure.text, part))
        fail_msg("\"%s\" is not in \"%s\"", part, b->failure.text);
}

static void without_anything_the_contract_s_defaults_hold(void **state)
{
    struct box *b = *state;

    write_file(b, "");
    assert_int_equal(PARSE_FILE_ONLY(b), 0);
    assert_int_equal(b->config->nvms, 0);
    assert_int_equal(b->config->nlisteners, 1);
    assert_string_equal(b->config->listeners[0].text, "unix:/run/qpull/nbd.sock");
    assert_string_equal(b->config->control, "/run/qpull/control.sock");
    assert_string_equal(b->config->scratch, "/var/tmp");
    assert_string_equal(b->config->state, "/var/lib/qpull");
    assert_int_equal(b->config->linger_ms, 10000);
    assert_int_equal(b->config->hold_shutdown_ms, 0);
    assert_int_equal(b->config->idle_timeout_ms, 0);
    assert_int_equal(b->config->max_pause_ms, 1000);
    assert_int_equal(b->config->scratch_limit, 0);
    assert_int_equal(b->config->scratch_total_limit, 0);
    assert_int_equal(b->config->scratch_reserve, 256 << 20);
    assert_null(b->config->pidfile);
    assert_false(b->config->allow_plaintext);
    assert_int_equal(b->config->engine, ENGINE_AUTO);
    assert_int_equal(b->config->log_level, LOG_LEVEL_INFO);
}

static void a_whole_file_is_read(void **state)
{
    struct box *b = *state;

    write_file(b, "# a comment\n"
                  "[server]\n"
                  "listen = unix:/tmp/a.sock\n"
                  "listen = tcp:127.0.0.1:0\n"
                  "control = /tmp/c.sock\n"
                  "linger = 2.5\n"
                  "max-pause = 0.25\n"
                  "hold-shutdown = 90\n"
                  "max-connections = 7\n"
                  "keep-checkpoints = 30\n"
                  "engine = backup-job\n"
                  "scratch-limit = 12345\n"
                  "scratch-total-limit = 3g\n"
                  "scratch-reserve = 0\n"
                  "allow-plaintext = yes\n"
                  "log = debug\n"
                  "\n"
                  "[vm \"web server\"]\n"
                  "qmp = /run/web.qmp\n"
                  "disks = vda, vdb\n"
                  "    vdc\n"
                  "disk.root = vda\n"
                  "engine = copy-before-write\n"
                  "[vm \"db\"]\n"
                  "qmp = /run/db.qmp\n");
    assert_int_equal(PARSE_FILE_ONLY(b), 0);
    assert_int_equal(b->config->nlisteners, 2);
    assert_int_equal(b->config->listeners[1].type, LISTEN_TCP);
    assert_string_equal(b->config->listeners[1].host, "127.0.0.1");
    assert_int_equal(b->config->linger_ms, 2500);
    assert_int_equal(b->config->max_pause_ms, 250);
    assert_int_equal(b->config->hold_shutdown_ms, 90000);
    assert_int_equal(b->config->max_connections, 7);
    assert_int_equal(b->config->keep_checkpoints, 30);
    assert_int_equal(b->config->engine, ENGINE_JOB);
    assert_int_equal(b->config->scratch_limit, 12345);
    assert_int_equal(b->config->scratch_total_limit, 3ull << 30);
    assert_int_equal(b->config->scratch_reserve, 0);
    assert_true(b->config->allow_plaintext);
    assert_int_equal(b->config->log_level, LOG_LEVEL_DEBUG);
    assert_int_equal(b->config->nvms, 2);
    assert_string_equal(b->config->vms[0].name, "web server");
    assert_string_equal(b->config->vms[0].qmp, "/run/web.qmp");
    assert_int_equal(b->config->vms[0].ndisks, 3);
    assert_string_equal(b->config->vms[0].disks[2], "vdc");
    assert_true(b->config->vms[0].engine_said);
    assert_int_equal(b->config->vms[0].engine, ENGINE_CBW);
    assert_false(b->config->vms[1].engine_said);
    assert_int_equal(b->config->vms[0].nrenames, 1);
    assert_string_equal(b->config->vms[0].renames[0].name, "root");
    assert_string_equal(b->config->vms[0].renames[0].target, "vda");
    assert_string_equal(b->config->vms[1].qmp, "/run/db.qmp");
}

static void flags_win_over_the_file(void **state)
{
    struct box *b = *state;

    write_file(b, "[server]\nlinger = 1\nlisten = unix:/tmp/a\nlisten = unix:/tmp/b\n"
                  "[vm \"web\"]\nqmp = /run/old\ndisks = vda\n");
    assert_int_equal(PARSE(b, "--linger", "3", "--listen", "unix:/tmp/x", "--listen", "unix:/tmp/y", "--vm",
                           "web=/run/new", "--vm", "db=/run/db"),
                     0);
    assert_int_equal(b->config->linger_ms, 3000);
    assert_int_equal(b->config->nlisteners, 2);
    assert_string_equal(b->config->listeners[0].text, "unix:/tmp/x");
    assert_string_equal(b->config->listeners[1].text, "unix:/tmp/y");
    assert_int_equal(b->config->nvms, 2);
    assert_string_equal(b->config->vms[0].qmp, "/run/new");
    assert_int_equal(b->config->vms[0].ndisks, 1);
    assert_string_equal(b->config->vms[1].name, "db");
}

static void each_mistake_of_the_file_is_named_with_its_line(void **state)
{
    static const struct {
        const char *text, *place, *says;
    } rows[] = {
        {"[server]\n\nlingr = 3\n", ":3:", "unknown key \"lingr\""},
        {"[server]\nlinger = soon\n", ":2:", "\"soon\" is not a number of seconds"},
        {"[server]\nlinger = 1.2345\n", ":2:", "is not a number of seconds"},
        {"[server]\nlinger = 99999999999999999999\n", ":2:", "more than"},
        {"[server]\nhandshake-timeout = 0\n", ":2:", "0 would let"},
        {"[server]\nlinger = 1\nlinger = 1\n", ":3:", "\"linger\" is there twice"},
        {"[server]\nmax-connections = 0\n", ":2:", "from 1 to"},
        {"[server]\nmax-connections = -1\n", ":2:", "from 1 to"},
        {"[server]\nlog = loud\n", ":2:", "none of error, warning"},
        {"[server]\nengine = best\n", ":2:", "\"best\" is none of auto, copy-before-write, backup-job"},
        {"[vm \"a\"]\nqmp = /a\nengine = x\n", ":3:", "\"x\" is none of auto"},
        {"[vm \"a\"]\nqmp = /a\nengine = auto\nengine = auto\n", ":4:", "\"engine\" is there twice"},
        {"[server]\nallow-plaintext = maybe\n", ":2:", "neither yes nor no"},
        {"[server]\nlisten = tcp:::1:80\n", ":2:", "brackets"},
        {"[server]\nlisten = tcp:localhost\n", ":2:", "no port"},
        {"[server]\nlisten = tcp:localhost:70000\n", ":2:", "port"},
        {"[server]\nlisten = udp:1\n", ":2:", "none of unix:PATH"},
        {"[server]\nlisten = unix:/a\nlisten = unix:/a\n", ":3:", "twice"},
        {"[server]\ntls = maybe\n", ":2:", "\"tls\": \"maybe\" is none of off, on, require"},
        {"[server]\nconfig = /x\n", ":2:", "unknown key \"config\""},
        {"[server]\n[server]\n", ":2:", "[server] is there twice"},
        {"[servant]\n", ":1:", "unknown section"},
        {"[allow]\n[allow]\n", ":2:", "[allow] is there twice"},
        {"[allow]\npsk:a = *\nb = *\n", ":3:", "none of user:NAME"},
        {"[server]\nallow = psk:a\n", ":2:", "not WHO="},
        {"[vm \"a\"]\n[vm \"a\"]\n", ":2:", "there twice"},
        {"[vm \"a\"]\nqmp = /a\nqmp = /b\n", ":3:", "\"qmp\" is there twice"},
        {"[vm \"a\"]\ncolour = red\n", ":2:", "unknown key \"colour\" in [vm \"a\"]"},
        {"[vm \"a\"]\nqga = /a\nqga = /b\n", ":3:", "\"qga\" is there twice"},
        {"[vm \"a\"]\nquiesce = maybe\n", ":2:", "\"maybe\" is none of off, try, require"},
        {"[vm \"a\"]\nquiesce = try\nquiesce = off\n", ":3:", "\"quiesce\" is there twice"},
        {"[server]\nquiesce = yes\n", ":2:", "none of off, try, require"},
        {"[vm \"a\"]\n\n", ":1:", "has neither \"qmp\" nor"},
        {"[vm \"a\"]\nqmp = /a\ndisks = ,\n", ":3:", "names no disk"},
        {"[vm \"a\"]\nqmp = /a\ndisks = vda vda\n", ":3:", "there twice"},
        {"[vm \"a\"]\nqmp = /a\ndisk.a/b = vda\n", ":3:", "may not have"},
        {"[vm \"a\"]\nqmp = /a\ndisk.x = vda\ndisk.y = vda\n", ":4:", "has the name \"x\" already"},
        {"[vm \"a/b\"]\n", ":1:", "may not have"},
        {"[vm a]\n", ":1:", "unknown section"},
        {"linger = 3\n", ":1:", "before any section"},
        {"[server]\nthis is nothing\n", ":2:", "neither a section nor"},
        {"[server]\nlinger = 1\n  2\n", ":3:", "may not go on"},
        {"[server]\nscratch = "
         "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
         "x"
         "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
         "x\n",
         ":2:", "longer than"},
    };
    struct box *b = *state;

    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        write_file(b, rows[i].text);
        if (PARSE_FILE_ONLY(b) != -EINVAL)
            fail_msg("not refused: %s", rows[i].text);
        assert_null(b->config);
        assert_says(b, b->file);
        assert_says(b, rows[i].place);
        assert_says(b, rows[i].says);
    }
}

static void each_mistake_of_a_flag_is_named_with_the_flag(void **state)
{
    static const struct {
        const char *flags[6], *says;
    } rows[] = {
        {{"--lingr", "3"}, "--lingr"},
        {{"--linger", "x"}, "--linger: \"x\" is not"},
        {{"--linger"}, "--linger wants a value"},
        {{"--engine", "fast"}, "--engine: \"fast\" is none of auto, copy-before-write, backup-job"},
        {{"--max-pause", "0"}, "no freeze takes no time at all"},
        {{"--max-pause", "1s"}, "\"1s\" is not a number of seconds"},
        {{"--linger", "1", "--linger", "1"}, "--linger is there twice"},
        {{"--vm", "web"}, "--vm: \"web\" is not NAME=QMP_SOCKET"},
        {{"--vm", "=/x"}, "--vm: the VM's name is empty"},
        {{"--vm", "web="}, "--vm: the path is empty"},
        {{"--vm", "a=/x", "--vm", "a=/y"}, "there twice"},
        {{"--vm", "a@b=/x"}, "may not have"},
        {{"--listen", "unix:"}, "--listen: the socket's path is empty"},
        {{"--qga", "a=/x"}, "--qga: there is no VM \"a\""},
        {{"--qga", "a"}, "--qga: \"a\" is not NAME=SOCKET"},
        {{"--vm", "a=/x", "--qga", "a=/y", "--qga", "a=/z"}, "--qga: the guest agent of VM \"a\" is there twice"},
        {{"--image", "a=/x"}, "--image: \"a=/x\" is not VM/DISK=PATH"},
        {{"--image", "a/b"}, "--image: \"a/b\" is not VM/DISK=PATH"},
        {{"--image", "a=/x/y=z"}, "--image: \"a=/x/y=z\" is not VM/DISK=PATH"},
        {{"--image", "/b=/x"}, "--image: the VM's name is empty"},
        {{"--image", "a/=/x"}, "--image: the disk's name is empty"},
        {{"--image", "a/b="}, "--image: the image of disk \"b\" has no path"},
        {{"--image", "a/b=raw:"}, "--image: the image of disk \"b\" has no path"},
        {{"--image", "a/b=/x", "--image", "a/b=/y"}, "--image: the image of disk \"b\" is there twice"},
        {{"--image", "a/b=/x", "--image", "a/c=/x"}, "--image: /x is the image of disk \"b\" already"},
        {{"--tls", "yes"}, "--tls: \"yes\" is none of off, on, require"},
        {{"--tls-certs", ""}, "--tls-certs: "},
        {{"--allow", "x=y"}, "--allow: \"x\" is none of user:NAME"},
        {{"--quiesce", "perhaps"}, "--quiesce: \"perhaps\" is none of"},
        {{"--threads", "0"}, "--threads: "},
        {{"--threads", "65"}, "--threads: "},
        {{"--scratch-limit", ""}, "--scratch-limit: \"\" is not a size"},
        {{"--scratch-limit", "-1"}, "is not a size"},
        {{"--scratch-limit", "G"}, "is not a size"},
        {{"--scratch-limit", "1X"}, "is not a size"},
        {{"--scratch-limit", "1GB"}, "is not a size"},
        {{"--scratch-limit", "1 G"}, "is not a size"},
        {{"--scratch-limit", "1.5G"}, "is not a size"},
        {{"--scratch-total-limit", "0x10"}, "--scratch-total-limit: \"0x10\" is not a size"},
        {{"--scratch-total-limit", "1048577T"}, "is more than 1048576T"},
        {{"--scratch-reserve", "99999999999999999999"}, "--scratch-reserve: \"99999999999999999999\" is more than"},
        {{"--scratch-reserve", "18446744073709551615T"}, "is more than"},
        {{"word"}, "\"word\""},
        {{"-x"}, "-x"},
    };
    struct box *b = *state;

    write_file(b, "");
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        if (parse(b, rows[i].flags) != -EINVAL)
            fail_msg("not refused: %s", rows[i].flags[0]);
        assert_null(b->config);
        assert_says(b, rows[i].says);
    }
}

static void a_file_that_is_named_but_missing_is_refused(void **state)
{
    struct box *b = *state;

    assert_int_equal(PARSE_FILE_ONLY(b), -EINVAL);
    assert_says(b, b->file);
    assert_says(b, "No such file");
}

static void help_and_version_come_before_any_mistake_of_the_file(void **state)
{
    struct box *b = *state;

    write_file(b, "nonsense\n");
    assert_int_equal(PARSE(b, "--help"), 0);
    assert_int_equal(b->config->wish, CONFIG_HELP);
    assert_int_equal(PARSE(b, "--version"), 0);
    assert_int_equal(b->config->wish, CONFIG_VERSION);
}

/* All paths into the box, so that the machine's own do not matter. */
static int check(struct box *b, const char *listen, const char *scratch, bool allow_plaintext)
{
    char control[96];

    (void)snprintf(control, sizeof control, "%s/control", b->dir);
    write_file(b, "");
    assert_int_equal(PARSE(b, "--listen", listen, "--scratch", scratch, "--state", b->dir, "--control", control,
                           allow_plaintext ? "--allow-plaintext" : NULL),
                     0);
    return config_check(b->config, &b->failure);
}

/* inih cuts a line at its first ":" or "=". */
static void rules_of_the_file_and_of_flags_add_up_whatever_signs_they_have(void **state)
{
    struct box *b = *state;
    const struct access_who key = {.psk = "alice"}, cert = {.dn = "CN=bob,O=x"}, nobody = {0};

    write_file(b, "[allow]\npsk:alice = web-*/list, db\ndn:CN=bob,O=x = db/pull\nany = open/list\n"
                  "[server]\nallow = any=more/pull\n");
    assert_int_equal(PARSE(b, "--allow", "any=most/control"), 0);
    assert_int_equal(access_rights(&b->config->access, &key, "web-1"), ACCESS_LIST);
    assert_int_equal(access_rights(&b->config->access, &cert, "web-1"), 0);
    assert_int_equal(access_rights(&b->config->access, &cert, "db"), ACCESS_PULL);
    assert_int_equal(access_rights(&b->config->access, &nobody, "db"), 0);
    assert_int_equal(access_rights(&b->config->access, &nobody, "open"), ACCESS_LIST);
    assert_int_equal(access_rights(&b->config->access, &nobody, "more"), ACCESS_PULL);
    assert_int_equal(access_rights(&b->config->access, &nobody, "most"), ACCESS_CONTROL);
}

static void a_listener_open_to_the_network_must_be_allowed(void **state)
{
    struct box *b = *state;

    assert_int_equal(check(b, "tcp:127.0.0.1:0", b->dir, false), 0);
    assert_int_equal(b->config->listeners[0].address.ss_family, AF_INET);
    assert_int_equal(check(b, "tcp:127.1.2.3:0", b->dir, false), 0);
    assert_int_equal(check(b, "tcp:[::1]:0", b->dir, false), 0);
    assert_int_equal(check(b, "tcp:[::ffff:127.0.0.1]:0", b->dir, false), 0);
    assert_int_equal(check(b, "tcp:0.0.0.0:10809", b->dir, false), -EINVAL);
    assert_says(b, "--allow-plaintext");
    assert_int_equal(check(b, "tcp:[::]:10809", b->dir, false), -EINVAL);
    assert_int_equal(check(b, "tcp:192.0.2.1:10809", b->dir, false), -EINVAL);
    assert_int_equal(check(b, "tcp:[::ffff:192.0.2.1]:10809", b->dir, false), -EINVAL);
    assert_int_equal(check(b, "tcp:0.0.0.0:10809", b->dir, true), 0);
}

/* Up to four words of flags, after a listener. */
static int check_tls(struct box *b, const char *listen, const char *a1, const char *a2, const char *a3, const char *a4)
{
    char control[96];

    (void)snprintf(control, sizeof control, "%s/control", b->dir);
    write_file(b, "");
    assert_int_equal(
        PARSE(b, "--listen", listen, "--scratch", b->dir, "--state", b->dir, "--control", control, a1, a2, a3, a4), 0);
    return config_check(b->config, &b->failure);
}

static void tls_needs_one_kind_of_credentials(void **state)
{
    static const char local[] = "tcp:127.0.0.1:0", all[] = "tcp:0.0.0.0:0";
    struct box *b = *state;

    assert_int_equal(check_tls(b, local, "--tls=on", "--tls-certs=/x", NULL, NULL), 0);
    assert_int_equal(b->config->tls, CONFIG_TLS_ON);
    assert_string_equal(b->config->tls_certs, "/x");
    assert_int_equal(b->config->threads, 0);
    assert_int_equal(check_tls(b, all, "--tls=require", "--tls-psk=/x", "--threads=3", NULL), 0);
    assert_int_equal(b->config->tls, CONFIG_TLS_REQUIRE);
    assert_string_equal(b->config->tls_psk, "/x");
    assert_int_equal(b->config->threads, 3);
    assert_int_equal(check_tls(b, all, "--tls=on", "--tls-psk=/x", NULL, NULL), 0); /* there it is required */
    assert_int_equal(check_tls(b, local, "--tls=on", NULL, NULL, NULL), -EINVAL);
    assert_says(b, "--tls on needs --tls-certs DIR or --tls-psk FILE");
    assert_int_equal(check_tls(b, local, "--tls=require", NULL, NULL, NULL), -EINVAL);
    assert_says(b, "--tls require needs");
    assert_int_equal(check_tls(b, local, "--tls-certs=/x", NULL, NULL, NULL), -EINVAL);
    assert_says(b, "--tls-certs needs --tls on or --tls require");
    assert_int_equal(check_tls(b, local, "--tls=off", "--tls-psk=/x", NULL, NULL), -EINVAL);
    assert_says(b, "--tls-psk needs --tls on");
    assert_int_equal(check_tls(b, local, "--tls=on", "--tls-psk=/x", "--tls-certs=/x", NULL), -EINVAL);
    assert_says(b, "cannot both be used");
}

static void paths_that_cannot_be_used_are_named(void **state)
{
    struct box *b = *state;
    char listen[512];

    assert_int_equal(check(b, "tcp:127.0.0.1:0", "/nowhere/at/all", false), -EINVAL);
    assert_says(b, "scratch directory /nowhere/at/all");
    assert_int_equal(check(b, "tcp:127.0.0.1:0", b->file, false), -EINVAL);
    assert_says(b, "is not a directory");
    assert_int_equal(check(b, "unix:/nowhere/at/all/nbd.sock", b->dir, false), -EINVAL);
    assert_says(b, "/nowhere/at/all");
    (void)snprintf(listen, sizeof listen, "unix:%s/%0200d", b->dir, 0);
    assert_int_equal(check(b, listen, b->dir, false), -EINVAL);
    assert_says(b, "longer than");
    assert_int_equal(unsetenv("LISTEN_FDS"), 0);
    assert_int_equal(check(b, "fd", b->dir, false), -EINVAL);
    assert_says(b, "LISTEN_FDS");
}

static void a_qmp_path_may_be_missing_but_not_be_something_else(void **state)
{
    struct box *b = *state;
    char vm[128], control[96];

    write_file(b, "");
    (void)snprintf(control, sizeof control, "%s/control", b->dir);
    (void)snprintf(vm, sizeof vm, "web=%s/not-there", b->dir);
    assert_int_equal(PARSE(b, "--listen", "tcp:127.0.0.1:0", "--scratch", b->dir, "--state", b->dir, "--control",
                           control, "--vm", vm),
                     0);
    assert_int_equal(config_check(b->config, &b->failure), 0);
    (void)snprintf(vm, sizeof vm, "web=%s", b->file);
    assert_int_equal(PARSE(b, "--listen", "tcp:127.0.0.1:0", "--scratch", b->dir, "--state", b->dir, "--control",
                           control, "--vm", vm),
                     0);
    assert_int_equal(config_check(b->config, &b->failure), -EINVAL);
    assert_says(b, "is not a socket");
}

static void the_log_escapes_what_could_forge_a_line(void **state)
{
    char to[64];

    assert_string_equal(log_escape(to, sizeof to, "plain, gr\xc3\xbc\xc3\x9f"), "plain, gr\xc3\xbc\xc3\x9f");
    assert_string_equal(log_escape(to, sizeof to, "a\nb\x1b[0m"), "a\\x0ab\\x1b[0m");
    assert_string_equal(log_escape(to, sizeof to, "\xff\xc0\xaf\xed\xa0\x80"), "\\xff\\xc0\\xaf\\xed\\xa0\\x80");
    assert_string_equal(log_escape(to, sizeof to,
                                   "\xc2\x9b"
                                   "1m"),
                        "\\xc2\\x9b1m");
    assert_string_equal(log_escape(to, 6, "abc\n"), "abc");
    assert_string_equal(log_escape(to, 4, "abcdef"), "abc");
}

static void images_are_named_by_vm_and_disk_with_or_without_a_format(void **state)
{
    struct box *b = *state;
    const struct config_vm *vm;

    write_file(b, "[vm \"web\"]\nimage.root=/file/root.qcow2\nimage.data = raw:/file/data=1\n");
    assert_int_equal(
        PARSE(b, "--image", "web/root=qcow2:/flag/root", "--image", "db/sda=./raw:x", "--vm", "db=/db.qmp"), 0);
    assert_int_equal(b->config->nvms, 2);
    vm = &b->config->vms[0];
    assert_null(vm->qmp);
    assert_int_equal(vm->nimages, 2);
    assert_string_equal(vm->images[0].disk, "root");
    assert_string_equal(vm->images[0].path, "/flag/root"); /* flags win */
    assert_string_equal(vm->images[0].format, "qcow2");
    assert_string_equal(vm->images[1].path, "/file/data=1");
    assert_string_equal(vm->images[1].format, "raw");
    vm = &b->config->vms[1];
    assert_string_equal(vm->qmp, "/db.qmp"); /* in either order */
    assert_string_equal(vm->images[0].path, "./raw:x");
    assert_null(vm->images[0].format);
    assert_string_equal(b->config->storage_daemon, "qemu-storage-daemon");
}

static void a_guest_agent_is_named_in_either_place(void **state)
{
    struct box *b = *state;

    write_file(b, "[server]\nquiesce = require\nqga = db=/run/db.qga\n"
                  "[vm \"web\"]\nqmp = /web.qmp\nqga = /web.qga\nquiesce = try\n");
    assert_int_equal(PARSE(b, "--qga", "web=/new.qga", "--vm", "db=/db.qmp"), 0);
    assert_int_equal(b->config->quiesce, QUIESCE_REQUIRE);
    assert_string_equal(b->config->vms[0].name, "db"); /* its agent came first */
    assert_string_equal(b->config->vms[0].qga, "/run/db.qga");
    assert_false(b->config->vms[0].quiesce_said);
    assert_string_equal(b->config->vms[1].qga, "/new.qga");
    assert_int_equal(b->config->vms[1].quiesce, QUIESCE_TRY);
    write_file(b, "");
    assert_int_equal(PARSE_FILE_ONLY(b), 0);
    assert_int_equal(b->config->quiesce, QUIESCE_OFF);
}

static void what_must_be_quiesced_has_an_agent(void **state)
{
    struct box *b = *state;
    char control[96];

    (void)snprintf(control, sizeof control, "%s/control", b->dir);
    write_file(b, "[vm \"web\"]\nqmp = /web.qmp\n");
    assert_int_equal(PARSE(b, "--listen", "tcp:127.0.0.1:0", "--scratch", b->dir, "--state", b->dir, "--control",
                           control, "--quiesce", "require"),
                     0);
    assert_int_equal(config_check(b->config, &b->failure), -EINVAL);
    assert_says(b, "VM \"web\": quiesce=require needs its guest agent");
    write_file(b, "[vm \"web\"]\nqmp = /web.qmp\nquiesce=off\n");
    assert_int_equal(PARSE(b, "--listen", "tcp:127.0.0.1:0", "--scratch", b->dir, "--state", b->dir, "--control",
                           control, "--quiesce", "require"),
                     0);
    assert_int_equal(config_check(b->config, &b->failure), 0);
}

static void a_vm_in_the_file_has_qmp_or_images(void **state)
{
    struct box *b = *state;

    write_file(b, "[vm \"web\"]\ndisks=a\n");
    assert_int_equal(PARSE_FILE_ONLY(b), -EINVAL);
    assert_non_null(strstr(b->failure.text, ":1: the VM \"web\" has neither \"qmp\" nor an \"image.DISK\""));
    write_file(b, "[vm \"web\"]\nimage.a=/x\nimage.a=/y\n");
    assert_int_equal(PARSE_FILE_ONLY(b), -EINVAL);
    assert_non_null(strstr(b->failure.text, ":3: the image of disk \"a\" is there twice"));
}

/* Whatever is said of a VM: one of them more makes another VM of it, the same makes none. */
static void a_vm_is_alike_when_the_same_was_said(void **state)
{
    static const char *const lines[] = {
        "disks = a b",
        "disks = a",
        "disk.root = a",
        "disk.root = b",
        "disk.boot = a",
        "image.a = /x",
        "image.a = /y",
        "image.a = raw:/x",
        "image.b = /x",
        "quiesce = off",
        "quiesce = try",
        "qga = /x",
        "qga = /y",
        "engine = auto",
        "engine = backup-job",
        "scratch = {\"driver\": \"file\", \"filename\": \"/x/1/%v-%d\"}",
        "scratch = {\"driver\": \"file\", \"filename\": \"/x/2/%v-%d\"}",
        "",
    };
    struct server_config *of[ARRAY_SIZE(lines)] = {0};
    struct box *b = *state;
    char text[256];

    for (size_t i = 0; i < ARRAY_SIZE(lines); i++) {
        (void)snprintf(text, sizeof text, "# %zu\n[vm \"web\"]\nqmp = /q\n%s\n", i, lines[i]);
        write_file(b, text);
        assert_int_equal(PARSE_FILE_ONLY(b), 0);
        of[i] = b->config;
        b->config = NULL;
        assert_int_equal(PARSE_FILE_ONLY(b), 0);
        assert_true(config_vm_alike(&of[i]->vms[0], &b->config->vms[0]));
    }
    for (size_t i = 0; i < ARRAY_SIZE(lines); i++)
        for (size_t k = 0; k < ARRAY_SIZE(lines); k++)
            assert_int_equal(config_vm_alike(&of[i]->vms[0], &of[k]->vms[0]), i == k);
    for (size_t i = 0; i < ARRAY_SIZE(lines); i++)
        config_free(of[i]);
    write_file(b, "[vm \"web\"]\nqmp = /r\n");
    assert_int_equal(PARSE_FILE_ONLY(b), 0);
    of[0] = b->config;
    b->config = NULL;
    write_file(b, "[vm \"web\"]\nqmp = /q\n");
    assert_int_equal(PARSE_FILE_ONLY(b), 0);
    assert_false(config_vm_alike(&of[0]->vms[0], &b->config->vms[0]));
    config_free(of[0]);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(without_anything_the_contract_s_defaults_hold),
        TEST(a_whole_file_is_read),
        TEST(flags_win_over_the_file),
        TEST(each_mistake_of_the_file_is_named_with_its_line),
        TEST(each_mistake_of_a_flag_is_named_with_the_flag),
        TEST(a_file_that_is_named_but_missing_is_refused),
        TEST(help_and_version_come_before_any_mistake_of_the_file),
        TEST(rules_of_the_file_and_of_flags_add_up_whatever_signs_they_have),
        TEST(a_listener_open_to_the_network_must_be_allowed),
        TEST(tls_needs_one_kind_of_credentials),
        TEST(paths_that_cannot_be_used_are_named),
        TEST(a_qmp_path_may_be_missing_but_not_be_something_else),
        TEST(images_are_named_by_vm_and_disk_with_or_without_a_format),
        TEST(a_guest_agent_is_named_in_either_place),
        TEST(what_must_be_quiesced_has_an_agent),
        TEST(a_vm_in_the_file_has_qmp_or_images),
        TEST(a_vm_is_alike_when_the_same_was_said),
        TEST(the_log_escapes_what_could_forge_a_line),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
