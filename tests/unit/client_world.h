/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * client_world: what the tests of qmp/client share: a client, the fake QEMU at its other end, and a record of all that
 * was heard from both. It judges nothing but the rules that hold always (no answer from within a call, and so on).
 * Lives on the test's stack; loop thread only.
 */
#ifndef QPULL_TEST_CLIENT_WORLD_H
#define QPULL_TEST_CLIENT_WORLD_H

#include "lib/fake_qemu.h"
#include "lib/loop.h"
#include "lib/test.h"
#include "qmp/client.h"

#define MAX_HELD 8
#define LONG_MS 20000 /* a deadline that must not be met */
#define SHORT_MS 20   /* one that must */

struct world {
    uv_loop_t loop;
    const uv_loop_t *clock;    /* borrowed: the loop it runs on */
    struct fake_qemu *qemu;    /* owned, may be NULL */
    struct qmp_client *client; /* owned, NULL: closed */
    unsigned nready, nlost;
    struct failure why;  /* of the last loss */
    uint64_t lost_at[8]; /* loop time, ms */
    char *greeting;      /* owned: of the last one */
    unsigned nanswers;   /* of all calls */
    unsigned nanswers_at_loss;
    bool close_when_ready, close_when_lost, closed;
    struct json_object *held[MAX_HELD]; /* owned ids of "hold" commands */
    unsigned nheld;
    char order[256];              /* names of the commands as they came */
    unsigned nfds_with[MAX_HELD]; /* per command, as they came */
    bool fd_came_first[MAX_HELD];
    unsigned ncommands;
};

struct answer {
    struct qmp_call call;
    struct world *world;
    unsigned n;      /* how often it came */
    unsigned number; /* among all answers, from 1 */
    struct failure f;
    char *ret;             /* owned, NULL: no return value */
    bool close_client;     /* … from within the callback */
    struct answer *cancel; /* likewise */
};

struct ear {
    struct qmp_watch watch;
    struct world *world;
    unsigned n;               /* events heard */
    char last[128];           /* "NAME data" or "NAME -" */
    struct ear *remove, *add; /* … from within the callback */
    bool close_client;        /* likewise */
    const char *event;
};

extern const struct qmp_client_ops world_ops;
extern const struct qmp_client_limits quick; /* to reconnect at once */

/*
 * The fake QEMU's commands: "echo" returns its arguments, "hold" is answered by release(), "fail" answers with the
 * error that stands in its arguments, "hangup" hangs up, "last-words" answers first; no other is answered.
 */
void world_init(struct world *w, const struct fake_qemu_options *options);
void world_connect(struct world *w, const struct qmp_client_limits *limits);
/* The usual beginning, both of the above: a client in command mode. */
void world_up(struct world *w, const struct fake_qemu_options *options);
void world_close(struct world *w); /* the client, unless it is closed */
void world_down(struct world *w);

/* Answers the i-th "hold"; result is JSON text. */
void release(struct world *w, unsigned i, const char *result);

/* args is JSON text or NULL. */
void ask(struct world *w, struct answer *a, const char *command, const char *args);
void ask_with_fd(struct world *w, struct answer *a, const char *command, const char *args, int fd, unsigned timeout_ms);
void on_answer(struct qmp_call *call, struct json_object *ret, const struct failure *f);
void answer_done(struct answer *a);

/* Proves that the connection still works, and that everything before has been dealt with. */
void round_trip(struct world *w);

void hear(struct world *w, struct ear *e, const char *event);

unsigned open_fds(void); /* of this process */

size_t more_than_a_socket_holds(void);
char *big_args(size_t len); /* {"x":"000…"} of len bytes; owned by the caller */

#endif
