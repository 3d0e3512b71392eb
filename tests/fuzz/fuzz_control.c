/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The control socket of a whole daemon that has one VM, whose QEMU answers questions about its disks and returns {} to
 * everything else. Bits of the first byte choose whether the client has negotiated, how its bytes are cut, and whether
 * it stays for its answers. Whatever it says: what it hears are JSON documents, at most one answer to each of its own,
 * and the daemon ends in order.
 */
#include "fuzz.h"
#include "lib/fake_qemu.h"
#include "lib/loop.h"
#include "lib/test.h"
#include "qmp/commands.h"
#include "qmp/stream.h"
#include "server.h"
#include "vm.h"

#include <errno.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define TURNS_MAX 400u
#define IDLE_TURNS 12u /* of the loop without a byte of answer: the rest waits for something that may not come */
#define HEARD_MAX (1u << 20)

/* The first byte. */
enum { SILENT = 1, LEAVES = 2, PIECES = 4, SITUATION_SHIFT = 4, SITUATION_MASK = 3 };

struct world {
    uv_loop_t loop;
    struct fake_qemu *qemu;
    struct json_object *captures, *situation;
    struct server_config config;
    struct config_vm vm;
    char control[96], state[96];
    int client;
    struct qmp_stream heard;
    unsigned nanswers, ngreetings;
    bool stopped;
};

static struct world w;

/* -- QEMU ---------------------------------------------------------------------------------------------------------- */
static void on_command(struct fake_qemu *q, const struct fake_command *command, void *arg)
{
    struct json_object *answer = qmp_get(w.situation, command->name);

    if (!answer && strcmp(command->name, "query-version") == 0)
        answer = qmp_get(w.captures, "version");
    fake_qemu_return(q, command->id, json_object_get(answer));
}

/* -- the daemon ---------------------------------------------------------------------------------------------------- */
static void prepare(void)
{
    static struct config_listener listener;
    static char nbd[96], text[112];

    if (w.captures)
        return;
    (void)signal(SIGPIPE, SIG_IGN); /* as the daemon does */
    log_init(LOG_LEVEL_ERROR);
    loop_init(&w.loop);
    w.captures = json_object_from_file(FUZZ_CAPTURES);
    CHECK(w.captures);
    (void)snprintf(w.control, sizeof(w.control), "%s/control.sock", fuzz_folder_path());
    (void)snprintf(w.state, sizeof(w.state), "%s/state", fuzz_folder_path());
    (void)snprintf(nbd, sizeof(nbd), "%s/nbd.sock", fuzz_folder_path());
    (void)snprintf(text, sizeof(text), "unix:%s", nbd);
    listener = (struct config_listener){.type = LISTEN_UNIX, .text = text, .path = nbd};
    w.vm = (struct config_vm){.name = (char *)"web"};
    w.config = (struct server_config){.vms = &w.vm,
                                      .nvms = 1,
                                      .listeners = &listener,
                                      .nlisteners = 1,
                                      .control = w.control,
                                      .scratch = (char *)fuzz_folder_path(),
                                      .state = w.state,
                                      .storage_daemon = (char *)"/nonexistent",
                                      .max_pause_ms = 1000,
                                      .handshake_timeout_ms = 1000,
                                      .cbw_timeout_s = CONFIG_CBW_TIMEOUT_S,
                                      .max_connections = 1};
}

static void remove_state(void)
{
    char command[128];

    if (rmdir(w.state) == 0 || errno == ENOENT)
        return;
    (void)snprintf(command, sizeof(command), "rm -rf %s", w.state);
    CHECK(system(command) == 0);
}

static struct server *start(void)
{
    struct server *s = NULL;
    struct failure why = {0};

    remove_state();
    CHECK(mkdir(w.state, 0700) == 0);
    w.qemu = fake_qemu_new(&w.loop, NULL, on_command, NULL);
    w.vm.qmp = (char *)fake_qemu_path(w.qemu);
    CHECK(server_new(&w.loop, &w.config, &s, &why) == 0);
    if (server_listen(s, &why) < 0 || server_start(s, &why) < 0) {
        fprintf(stderr, "%s\n", why.text);
        abort();
    }
    return s;
}

static void on_stopped(void *arg, bool clean)
{
    CHECK(clean);
    w.stopped = true;
}

static void stop(struct server *s)
{
    w.stopped = false;
    server_stop(s, on_stopped, NULL);
    loop_until(&w.loop, w.stopped);
    fake_qemu_free(w.qemu);
    loop_turn(&w.loop, 3);
    CHECK(!uv_loop_alive(&w.loop));
}

/* -- the client ---------------------------------------------------------------------------------------------------- */
static void connect_client(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", w.control);
    w.client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(w.client >= 0 && connect(w.client, (struct sockaddr *)&address, sizeof(address)) == 0);
    CHECK(qmp_stream_init(&w.heard, HEARD_MAX) == 0);
    w.nanswers = w.ngreetings = 0;
}

static int on_document(void *arg, struct json_object *doc)
{
    bool answer = qmp_get(doc, "return") || qmp_get(doc, "error");

    CHECK(answer + !!qmp_get(doc, "event") + !!qmp_get(doc, "QMP") == 1);
    w.nanswers += answer;
    w.ngreetings += !!qmp_get(doc, "QMP");
    CHECK(w.ngreetings == 1); /* and before everything else */
    return 0;
}

static bool hear(void)
{
    char bytes[16384];
    bool any = false;
    ssize_t n;

    while ((n = recv(w.client, bytes, sizeof(bytes), 0)) > 0) {
        CHECK(qmp_stream_feed(&w.heard, bytes, (size_t)n, on_document, NULL, NULL) == 0);
        any = true;
    }
    return any;
}

static void settle(void)
{
    for (unsigned turns = 0, idle = 0; turns < TURNS_MAX && idle < IDLE_TURNS; turns++) {
        (void)uv_run(&w.loop, UV_RUN_NOWAIT);
        idle = hear() ? 0 : idle + 1;
    }
}

static void say(const void *data, size_t len, size_t piece)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = send(w.client, (const char *)data + at, MIN(piece, len - at), MSG_NOSIGNAL);

        if (n < 0 && errno != EAGAIN)
            return; /* it has closed */
        at += (size_t)MAX(n, 0);
        loop_turn(&w.loop, 2);
        (void)hear();
    }
}

/* As many as the daemon can at most have taken for commands. */
static unsigned count_documents(const struct input *in)
{
    unsigned n = 0;

    for (size_t i = 0; i < in->size; i++)
        n += in->data[i] == '}';
    return n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char negotiate[] = "{\"execute\": \"qmp_capabilities\"}";
    static const char *const situations[] = {"one", "bitmaps", "three_layers", "buses"};
    struct input in = {data, size};
    uint8_t first = input_byte(&in);
    struct server *s;

    prepare();
    w.situation = qmp_get(w.captures, situations[(first >> SITUATION_SHIFT) & SITUATION_MASK]);
    s = start();
    loop_turn(&w.loop, 30); /* it finds its QEMU */
    connect_client();
    if (!(first & SILENT))
        say(negotiate, sizeof(negotiate) - 1, sizeof(negotiate));
    say(in.data, in.size, first & PIECES ? 7 : size + 1);
    if (!(first & LEAVES))
        settle();
    CHECK(w.nanswers <= count_documents(&in) + 2); /* the negotiation's, and last words about what is no JSON */
    (void)close(w.client);
    qmp_stream_done(&w.heard);
    stop(s);
    return 0;
}
