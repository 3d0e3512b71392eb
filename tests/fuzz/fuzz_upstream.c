/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A hostile NBD server in QEMU's place, for all of source/nbd that trusts none: opening and reading, maps, pokes and
 * flushes. The first byte says what is asked; then each piece of what the server says is a length (two bytes, little
 * end first) and its bytes, sent when we have nothing more to do. It hangs up at the end. Whatever it says: each thing
 * asked for is answered once, reads that are said to be good are all filled, and nothing is left.
 */
#include "fuzz.h"
#include "source/nbd.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/un.h>

#define NREADS 6u
#define READ_MAX (1u << 20)
#define TURNS_MAX 2000u
#define IDLE_TURNS 3u /* of the loop in which nothing came: it waits for the server */
#define CONTEXT "base:allocation"

enum asked { ASK_READS, ASK_MAP, ASK_POKE, ASK_FLUSH, ASK_NASKED };

struct read {
    struct source_read read;
    bool flying;
};

struct world {
    uv_loop_t loop;
    int listener, server; /* of the hostile one */
    char path[96];
    unsigned nanswers, nlost, nclosed;
    struct source *source;
    struct read reads[NREADS];
    uint8_t *buffer; /* owned: of all reads */
    size_t turn;     /* which read comes next */
    uint64_t moved;  /* bytes that we sent */
};

static struct world w;

/* -- the server ---------------------------------------------------------------------------------------------------- */
static void listen_once(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (w.listener > 0)
        return;
    w.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    (void)snprintf(w.path, sizeof(w.path), "%s/nbd.sock", fuzz_folder_path());
    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", w.path);
    CHECK(bind(w.listener, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(w.listener, 8) == 0);
    CHECK(uv_loop_init(&w.loop) == 0);
}

/* What we say to it is not looked at. True: something came. */
static bool drain(void)
{
    char dropped[65536];
    ssize_t n;
    bool any = false;

    while (w.server >= 0 && (n = recv(w.server, dropped, sizeof(dropped), MSG_DONTWAIT)) > 0)
        any = true;
    return any;
}

/* Until we wait for the server. */
static void settle(void)
{
    for (unsigned turns = 0, idle = 0; turns < TURNS_MAX && idle < IDLE_TURNS; turns++) {
        (void)uv_run(&w.loop, UV_RUN_NOWAIT);
        idle = drain() ? 0 : idle + 1;
    }
}

/* -- what is asked ------------------------------------------------------------------------------------------------- */
static void on_read(struct source_read *r, int err)
{
    struct read *read = container_of(r, struct read, read);

    CHECK(read->flying && err <= 0);
    read->flying = false;
    w.nanswers++;
    if (err == 0) /* the sanitizer of addresses sees whether the block is still there; all of it may be read */
        for (size_t i = 0; i < r->length; i++)
            w.moved += ((uint8_t *)r->buffer)[i];
}

static void read_something(uint64_t size)
{
    struct read *r = &w.reads[w.turn++ % NREADS];
    uint64_t offset = size / NREADS * (w.turn % NREADS);

    if (r->flying || size == 0)
        return;
    r->read = (struct source_read){.offset = offset, .length = MIN(size - offset, READ_MAX / NREADS), .cb = on_read};
    r->read.buffer = w.buffer + (size_t)(r - w.reads) * (READ_MAX / NREADS);
    r->flying = source_read(w.source, &r->read) == 0;
}

static void on_lost(void *arg, const struct failure *why)
{
    CHECK(why->err < 0 && why->text[0]);
    w.nlost++;
}

static void on_open(void *arg, struct source *s, const struct failure *f)
{
    w.nanswers++;
    CHECK((s != NULL) == (f == NULL) && (!f || (f->err < 0 && f->text[0])));
    w.source = s;
    for (unsigned i = 0; s && i < NREADS; i++)
        read_something(s->size);
}

static void on_map(void *arg, struct map *map, const struct failure *f)
{
    w.nanswers++;
    CHECK((map != NULL) == (f == NULL) && (!f || (f->err < 0 && f->text[0])));
    map_free(map);
}

static void on_done(void *arg, const struct failure *f)
{
    w.nanswers++;
    CHECK(!f || (f->err < 0 && f->text[0]));
}

static void on_closed(void *arg)
{
    w.nclosed++;
}

static void ask(enum asked what, bool cluster)
{
    struct source_nbd_config config = {.socket_path = w.path, .export_name = "qpull-x", .cluster = cluster ? 65536 : 0};

    switch (what) {
    case ASK_READS:
        CHECK(source_nbd_open(&w.loop, &config, on_lost, on_open, NULL, NULL) == 0);
        break;
    case ASK_MAP:
        CHECK(source_nbd_map(&w.loop, &config, CONTEXT, on_map, NULL, NULL) == 0);
        break;
    case ASK_POKE:
        CHECK(source_nbd_poke(&w.loop, &config, 512, w.buffer, 4096, on_done, NULL, NULL) == 0);
        break;
    case ASK_FLUSH:
        CHECK(source_nbd_flush(&w.loop, &config, on_done, NULL) == 0);
        break;
    case ASK_NASKED:
        break;
    }
    w.server = accept4(w.listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    CHECK(w.server >= 0);
}

static void say(struct input *in)
{
    while (in->size > 0) {
        size_t len = (size_t)input_byte(in) | (size_t)input_byte(in) << 8;
        struct input piece = input_take(in, len);

        while (piece.size > 0) {
            ssize_t n = send(w.server, piece.data, piece.size, MSG_NOSIGNAL | MSG_DONTWAIT);

            if (n < 0 && errno != EAGAIN)
                return; /* we have hung up */
            piece.data += MAX(n, 0);
            piece.size -= (size_t)MAX(n, 0);
            settle();
        }
        if (w.source)
            read_something(w.source->size);
        settle();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    uint8_t first = input_byte(&in);

    listen_once();
    w.nanswers = w.nlost = w.nclosed = 0;
    w.source = NULL;
    w.turn = 0;
    memset(w.reads, 0, sizeof(w.reads));
    w.buffer = calloc(1, READ_MAX);
    CHECK(w.buffer);
    ask((enum asked)(first % ASK_NASKED), first & 64);
    settle();
    say(&in);
    if (first & 128 && w.source) /* we end it, in the midst of things */
        source_close(TAKE_PTR(w.source), on_closed, NULL);
    (void)close(w.server);
    w.server = -1;
    settle();
    if (w.source)
        source_close(TAKE_PTR(w.source), on_closed, NULL);
    (void)uv_run(&w.loop, UV_RUN_DEFAULT); /* nothing is left, or the fuzzer's own deadline says so */
    CHECK(w.nanswers > 0 && w.nlost <= 1);
    for (unsigned i = 0; i < NREADS; i++)
        CHECK(!w.reads[i].flying);
    free(w.buffer);
    return 0;
}
