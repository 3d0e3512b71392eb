/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * conn_world: what the tests of server/conn share: one loop with a set of connections behind a real socket, clients on
 * the same loop, and VMs that are made up here (with their own vm_*() functions, so that the daemon's are not linked).
 */
#ifndef QPULL_TEST_CONN_WORLD_H
#define QPULL_TEST_CONN_WORLD_H

#include "test.h"

#include "conn.h"
#include "listen.h"
#include "loop.h"
#include "nbd/wire.h"
#include "nbd_peer.h"
#include "source/read_list.h"

#include <errno.h>

#define KIB 1024u
#define DISK_SIZE (8u << 20)

/* A frozen disk in memory; its answers come in the next turn, or when and in the order that a test wants. */
#define SLOTS 16u
#define SCARCE 12u
#define NOT_LENT 7u

struct disk_source {
    struct source source;
    uv_timer_t timer;
    uint8_t *data; /* owned */
    struct read_list reads;
    unsigned nreads; /* that wait */
    bool hold, reverse, lost;
    unsigned nlent;  /* loans that stand */
    unsigned nasked; /* reads that were to borrow; every NOT_LENT-th gets nothing */
};

struct vm {
    const char *name;
    uv_loop_t *loop;
    uv_timer_t timer; /* answers what is asked, in the next turn */
    struct disk disks[2];
    struct checkpoint checkpoints[2];
    struct disk_list list;
    struct disk_source source; /* one content for both disks */
    struct map *allocation, *dirty;
    struct vm_query *queries;
    struct vm_stay *stays; /* entered or entering */
    /* what a test wants */
    bool hold_entering, hold_queries;
    bool unmapped;          /* maps come with vm_map() */
    struct failure refusal; /* of entering */
    uint64_t rate;
    struct vm_counters counters;
    /* what it saw */
    unsigned nentered, nleft, ntold_lost;
    bool last_disc, last_failed;
    char since[64], checkpoint[64], disk[64], identity[64];
};

#define CLIENTS_MAX 120

struct client {
    uv_pipe_t pipe;
    uv_connect_t connect;
    struct bytes in; /* what came */
    bool connected, eof, open;
};

struct world {
    uv_loop_t loop;
    struct server_config config;
    struct vm vms[2];
    struct vm *vm_list[2];
    struct catalog catalog;
    struct conn_set set;
    struct listener *listener;
    char dir[32], path[64];
    struct client clients[CLIENTS_MAX];
    bool set_closed;
};

enum form { SIMPLE, STRUCTURED };
#define FLAGS_SIMPLE (NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE)

/* The maps are there now: tells all who have entered. */
void vm_map(struct vm *vm);
/* Answers one of the reads that wait, by its place among them. */
void vm_answer_read(struct vm *vm, unsigned i);
/* Answers what waits, and from now on at once. */
void vm_release_reads(struct vm *vm);
/* The session is lost, and all who stay are told. */
void vm_lose(struct vm *vm, const char *text);
/* Answers what is asked, in the next turn. */
void vm_answer_soon(struct vm *vm);

/* Set-up and tear-down of each test; the latter proves that nothing is left. */
int world_set_up(void **state);
int world_set_up_lending(void **state); /* whose disks lend memory to who reads */
int world_tear_down(void **state);

struct client *client_connect(struct world *w, size_t i);
void client_close(struct client *c);
void client_read(struct client *c, bool on);
/* What was said is forgotten. */
void client_say(struct client *c, struct bytes *b);
/* Exactly these bytes come; forgets both. */
void client_expect(struct world *w, struct client *c, struct bytes *want);
/* These, or as many others; forgets all three. */
void client_expect_either(struct world *w, struct client *c, struct bytes *want, struct bytes *other);
/* Connects, and negotiates up to the reply form, or up to an open export. */
struct client *client_greet(struct world *w, size_t i, enum form form);
struct client *client_open(struct world *w, size_t i, const char *name, enum form form);

void say_read(struct bytes *b, uint64_t cookie, uint64_t offset, uint32_t length);
void say_disc(struct bytes *b);

#endif
