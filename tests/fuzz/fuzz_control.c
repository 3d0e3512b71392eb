/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The control socket of a whole daemon that has one VM, whose QEMU answers questions about its disks and returns {} to
 * everything else. Bits of the first byte choose whether the client has negotiated, how its bytes are cut, and whether
 * it stays for its answers. Whatever it says: what it hears are JSON documents, at most one answer to each of its own,
 * and the daemon ends in order.
 *
 * To begin and end takes a daemon longer than most inputs. So there is one for each situation of its QEMU, and the next
 * input finds the same one unless this may have changed something: see is_as_before().
 */
#include "fuzz.h"
#include "lib/fake_qemu.h"
#include "lib/loop.h"
#include "lib/test.h"
#include "qmp/commands.h"
#include "qmp/stream.h"
#include "server.h"
#include "vm.h"

#include <assert.h>
#include <errno.h>
#include <ftw.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define TURNS_MAX 400u
#define IDLE_TURNS 12u /* of the loop without a byte of answer: the rest waits for something that may not come */
#define HEARD_MAX (1u << 20)
#define AGE_MAX 200u /* inputs of one daemon */

/* The first byte. */
enum { SILENT = 1, LEAVES = 2, PIECES = 4, SITUATION_SHIFT = 4, SITUATION_MASK = 3 };

struct world {
    uv_loop_t loop;
    struct fake_qemu *qemu;
    struct json_object *situation; /* borrowed from captures */
    struct server_config config;
    struct config_listener listener;
    struct config_vm vm;
    char control[96], state[96], nbd[96], text[112];
    struct server *server; /* NULL: none runs */
    unsigned age;
    bool changed; /* QEMU was asked for more than an answer */
    bool stopped;
    int client;
    struct qmp_stream heard;
    unsigned nanswers, nreturns, ngreetings;
};

static struct world worlds[SITUATION_MASK + 1], *w;
static struct json_object *captures;

/* -- QEMU ---------------------------------------------------------------------------------------------------------- */
static void on_command(struct fake_qemu *q, const struct fake_command *command, void *arg)
{
    struct world *world = arg;
    struct json_object *answer = qmp_get(world->situation, command->name);

    if (!answer && strcmp(command->name, "query-version") == 0)
        answer = qmp_get(captures, "version");
    world->changed |= !strstr(command->name, "query-");
    fake_qemu_return(q, command->id, json_object_get(answer));
}

/* -- the daemon ---------------------------------------------------------------------------------------------------- */
static void tear_down(void);

static void stop_all(void)
{
    for (w = worlds; w < worlds + ARRAY_SIZE(worlds); w++)
        if (w->server)
            tear_down();
}

static void prepare_world(const char *situation)
{
    const char *folder = fuzz_folder_path();

    loop_init(&w->loop);
    w->situation = qmp_get(captures, situation);
    CHECK(w->situation);
    (void)snprintf(w->control, sizeof(w->control), "%s/%s.control", folder, situation);
    (void)snprintf(w->state, sizeof(w->state), "%s/%s.state", folder, situation);
    (void)snprintf(w->nbd, sizeof(w->nbd), "%s/%s.nbd", folder, situation);
    (void)snprintf(w->text, sizeof(w->text), "unix:%s", w->nbd);
    w->listener = (struct config_listener){.type = LISTEN_UNIX, .text = w->text, .path = w->nbd};
    w->vm = (struct config_vm){.name = (char *)"web"};
    w->config = (struct server_config){.vms = &w->vm,
                                       .nvms = 1,
                                       .listeners = &w->listener,
                                       .nlisteners = 1,
                                       .control = w->control,
                                       .scratch = (char *)folder,
                                       .state = w->state,
                                       .storage_daemon = (char *)"/nonexistent",
                                       .max_pause_ms = 1000,
                                       .handshake_timeout_ms = 60000,
                                       .cbw_timeout_s = CONFIG_CBW_TIMEOUT_S,
                                       .max_connections = 1};
}

static void prepare(void)
{
    static const char *const situations[] = {"one", "bitmaps", "three_layers", "buses"};

    static_assert(ARRAY_SIZE(situations) == ARRAY_SIZE(worlds), "each has a world");
    if (captures)
        return;
    (void)signal(SIGPIPE, SIG_IGN); /* as the daemon does */
    log_init(LOG_LEVEL_ERROR);
    captures = json_object_from_file(FUZZ_CAPTURES);
    CHECK(captures);
    for (size_t i = 0; i < ARRAY_SIZE(worlds); i++) {
        w = &worlds[i];
        prepare_world(situations[i]);
    }
    (void)atexit(stop_all); /* before the folder is removed */
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    return remove(path);
}

/* No program is started for it: that would be a fourth of the time of an input. */
static void make_state(void)
{
    CHECK(nftw(w->state, remove_one, /* descriptors: */ 8, FTW_DEPTH | FTW_PHYS) == 0 || errno == ENOENT);
    CHECK(mkdir(w->state, 0700) == 0);
}

static void start(void)
{
    struct failure why = {0};

    make_state();
    w->qemu = fake_qemu_new(&w->loop, NULL, on_command, w);
    w->vm.qmp = (char *)fake_qemu_path(w->qemu);
    CHECK(server_new(&w->loop, &w->config, &w->server, &why) == 0);
    if (server_listen(w->server, &why) < 0 || server_start(w->server, &why) < 0) {
        fprintf(stderr, "%s\n", why.text);
        abort();
    }
    loop_turn(&w->loop, 30); /* it finds its QEMU */
    w->changed = false;
    w->age = 0;
}

static void on_stopped(void *arg, bool clean)
{
    CHECK(clean);
    w->stopped = true;
}

static void tear_down(void)
{
    w->stopped = false;
    server_stop(TAKE_PTR(w->server), on_stopped, NULL);
    loop_until(&w->loop, w->stopped);
    fake_qemu_free(w->qemu);
    CHECK(uv_run(&w->loop, UV_RUN_DEFAULT) == 0); /* also what a worker thread has begun, as main() does */
}

/* -- the client ---------------------------------------------------------------------------------------------------- */
static void connect_client(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", w->control);
    w->client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(w->client >= 0 && connect(w->client, (struct sockaddr *)&address, sizeof(address)) == 0);
    qmp_stream_init(&w->heard, HEARD_MAX);
    w->nanswers = w->nreturns = w->ngreetings = 0;
}

static int on_document(void *arg, struct json_object *doc)
{
    bool answer = qmp_get(doc, "return") || qmp_get(doc, "error");

    CHECK(answer + !!qmp_get(doc, "event") + !!qmp_get(doc, "QMP") == 1);
    w->nanswers += answer;
    w->nreturns += !!qmp_get(doc, "return");
    w->ngreetings += !!qmp_get(doc, "QMP");
    CHECK(w->ngreetings == 1); /* and before everything else */
    return 0;
}

static bool hear(void)
{
    char bytes[16384];
    bool any = false;
    ssize_t n;

    while ((n = recv(w->client, bytes, sizeof(bytes), 0)) > 0) {
        CHECK(qmp_stream_feed(&w->heard, bytes, (size_t)n, on_document, NULL, NULL) == 0);
        any = true;
    }
    return any;
}

static void settle(void)
{
    for (unsigned turns = 0, idle = 0; turns < TURNS_MAX && idle < IDLE_TURNS; turns++) {
        (void)uv_run(&w->loop, UV_RUN_NOWAIT);
        idle = hear() ? 0 : idle + 1;
    }
}

static void say(const void *data, size_t len, size_t piece)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = send(w->client, (const char *)data + at, MIN(piece, len - at), MSG_NOSIGNAL);

        if (n < 0 && errno != EAGAIN)
            return; /* it has closed */
        at += (size_t)MAX(n, 0);
        loop_turn(&w->loop, 2);
        (void)hear();
    }
}

/* -- an input ------------------------------------------------------------------------------------------------------ */
/* As many as the daemon can at most have taken for commands. */
static unsigned count_documents(const struct input *in)
{
    unsigned n = 0;

    for (size_t i = 0; i < in->size; i++)
        n += in->data[i] == '}';
    return n;
}

struct said {
    unsigned ncommands, nqueries; /* queries: whatever changes nothing */
};

static int on_said(void *arg, struct json_object *doc)
{
    struct said *said = arg;
    const char *name = qmp_get_string(doc, "execute");

    said->ncommands++;
    said->nqueries += name && (strncmp(name, "query-", strlen("query-")) == 0 || strcmp(name, "qmp_capabilities") == 0);
    return 0;
}

/* Whether the daemon is what it was before this input, as far as the next can tell: the client has had all its answers,
 * none but those to queries can have been good, and QEMU was only asked. */
static bool is_as_before(const struct input *in, bool negotiated)
{
    struct said said = {.ncommands = negotiated, .nqueries = negotiated};
    struct qmp_stream own;

    qmp_stream_init(&own, HEARD_MAX);
    (void)qmp_stream_feed(&own, (const char *)in->data, in->size, on_said, &said, NULL);
    qmp_stream_done(&own);
    return !w->changed && w->nanswers >= said.ncommands && w->nreturns <= said.nqueries;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char negotiate[] = "{\"execute\": \"qmp_capabilities\"}";
    struct input in = {data, size};
    uint8_t first = input_byte(&in);

    prepare();
    w = &worlds[(first >> SITUATION_SHIFT) & SITUATION_MASK];
    if (!w->server)
        start();
    connect_client();
    if (!(first & SILENT))
        say(negotiate, sizeof(negotiate) - 1, sizeof(negotiate));
    say(in.data, in.size, first & PIECES ? 7 : size + 1);
    if (!(first & LEAVES))
        settle();
    CHECK(w->nanswers <= count_documents(&in) + 2); /* the negotiation's, and last words about what is no JSON */
    (void)close(w->client);
    qmp_stream_done(&w->heard);
    loop_turn(&w->loop, 3);
    if ((first & LEAVES) || ++w->age >= AGE_MAX || !is_as_before(&in, !(first & SILENT)))
        tear_down();
    return 0;
}
