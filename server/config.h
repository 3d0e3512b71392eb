/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * config: what the daemon is told to do, from flags and from an INI file, and every limit of the program (the
 * protocol's own are in nbd/limits.h). Parsing touches nothing but the file; config_check() looks at the paths and
 * makes the default directories. A configuration is complete or refused: nothing starts half.
 *
 * Owned by main() for the life of the process, read-only once checked. Any one thread.
 */
#ifndef QPULL_CONFIG_H
#define QPULL_CONFIG_H

#include "access.h"
#include "backup/engine.h"
#include "backup/place.h"
#include "backup/quiesce.h"
#include "log.h"
#include "privileges.h"
#include "qmp/base.h"
#include "sandbox.h"

#include <stdbool.h>
#include <stdio.h>
#include <sys/socket.h>

/* -- defaults of the contract (docs: qpulld) ----------------------------------------------------------------------- */
#define CONFIG_FILE "/etc/qpull/qpulld.conf"
/* A build that counts coverage writes files where it was built; LeakSanitizer is a debugger, and would be kept out. */
#ifdef QPULL_NO_SANDBOX
#define CONFIG_SANDBOX SANDBOX_OFF
#else
#define CONFIG_SANDBOX SANDBOX_AUTO
#endif
#define CONFIG_RUN_DIR "/run/qpull"
#define CONFIG_LISTEN "unix:" CONFIG_RUN_DIR "/nbd.sock"
#define CONFIG_CONTROL CONFIG_RUN_DIR "/control.sock"
#define CONFIG_SCRATCH "/var/tmp"
#define CONFIG_STATE "/var/lib/qpull"
#define CONFIG_SCRATCH_RESERVE (256ull << 20) /* bytes; more than SCRATCH_RATE in SCRATCH_LOOK_MIN_MS */
/*
 * A guest's write waits so long for its copy to scratch, then the snapshot is given up. A third of what guests give
 * their disks (30 s: Linux for SCSI, ATA and NVMe), more than a disk that retries takes for one sector (7 s, ERC/TLER).
 */
#define CONFIG_CBW_TIMEOUT_S 10u
#define CONFIG_SHARED_MEMORY (256ull << 20) /* bytes: some 120 disks that are read at the same time */
#define CONFIG_STORAGE_DAEMON "qemu-storage-daemon"
#define CONFIG_LINGER_MS 10000u
#define CONFIG_HANDSHAKE_TIMEOUT_MS 30000u
#define CONFIG_IDLE_TIMEOUT_MS 0u /* never */
#define CONFIG_MAX_PAUSE_MS 1000u
#define CONFIG_SESSION_TIMEOUT_MS 0u /* never */
#define CONFIG_MAX_CONNECTIONS 256u
#define CONFIG_MAX_CONNECTIONS_PER_CLIENT 128u /* of one identity: half is left for others */
#define CONFIG_MAX_SESSIONS_PER_CLIENT 64u     /* likewise: VMs that one pulls at a time */
#define CONFIG_BEGIN_TIMEOUT_MS 3600000u       /* of `qpull begin`: an hour without a client */

/* -- limits of the configuration ----------------------------------------------------------------------------------- */
#define CONFIG_VMS_MAX 4096u
#define CONFIG_LISTENERS_MAX 64u
#define CONFIG_RULES_MAX 4096u     /* of who may do what */
#define CONFIG_DISKS_MAX 1024u     /* names in one VM's disks=, and disk.NAME= lines */
#define CONFIG_NAME_MAX 64u        /* bytes of a VM's or a disk's name; the VM's is part of a socket's file name */
#define CONFIG_SECONDS_MAX 604800u /* of any --…-timeout and of --linger */
#define CONFIG_CBW_TIMEOUT_MAX_S 3600u
#define CONFIG_CONNECTIONS_MAX 65536u
#define CONFIG_SIZE_MAX (1ull << 60)  /* of any SIZE: no file system holds more, and sums of them stay numbers */
#define CONFIG_CHECKPOINTS_MAX 10000u /* of --keep-checkpoints; backup/notes.h keeps no more notes of a VM */

/* -- limits of one NBD connection (server/conn, server/pull) ------------------------------------------------------- */
#define CONN_READ_BUFFER 4096u  /* bytes read from the socket at once: 146 requests */
#define CONN_PIECE (256u << 10) /* bytes asked of a source at once; nbdcopy's size, and the best one measured */
#define CONN_SLOW \
    (128u << 20)      /* bytes in a tick: who takes less, as over any network up to 2 Gbit/s, waits for itself */
#define CONN_LOANS 4u /* pieces that wait for the client in memory of the source's, which is short: a quarter of it */
#define CONN_WINDOW (4u << 20) /* bytes of payload being read or sent: 16 pieces, QEMU's own depth */
#define CONN_MAX_REQUESTS 64u  /* requests in flight past which nothing more is read from the socket */
#define CONN_MAX_UNSENT \
    (256u << 10) /* bytes of reply heads, maps and options unsent, likewise; payload has CONN_WINDOW */
#define CONN_BATCH_BYTES (1u << 20)  /* handed to one write at most … */
#define CONN_BATCH_CHUNKS 32u        /* … in at most twice as many vectors */
#define CONN_NOW_LEAST (16u << 10)   /* bytes of a reply that is not worth waiting for others to be sent with */
#define CONN_SOCKET_BUFFER (2 << 20) /* send buffer of a unix socket: 1.2 to 1.5 times the throughput (measured) */
#define CONN_STUCK_MS 60000u   /* a client that takes no byte for so long is closed, where no idle-timeout is set */
#define CONN_FLUSH_MS 10000u   /* to take the last bytes after the end */
#define CONN_FAREWELL_MS 2000u /* then: to close its end, so that our close does not take them from it again (RST) */
#define CONN_TICK_MS 500u      /* how often deadlines are looked at */
#define CONN_BLOCK_MIN 1u      /* bytes; what NBD_INFO_BLOCK_SIZE tells */
#define CONN_BLOCK_PREFERRED 4096u /* likewise */
#define CONN_BLOCK_MAX (32u << 20) /* likewise; what qemu-img and nbdcopy never pass */

/* -- what slow and stuck clients may cost (docs/decisions/0015-clients.md) ------------------------------------------
 */
#define CONN_PIECE_SHORT (64u << 10)   /* CONN_PIECE where the budget is used up: a cluster; a divisor of it */
#define CONN_UNSENT_TOTAL (4u << 20)   /* CONN_MAX_UNSENT of all connections together; past it each has … */
#define CONN_LEAST_UNSENT (16u << 10)  /* … this much, and past half of it answers about a disk's status have … */
#define CONN_EXTENTS_SHORT 512u        /* … so many extents: 8 KiB */
#define CONN_CHUNK_COST 48u            /* bytes: what the smallest reply head takes besides its own */
#define CONN_SOCKET_TOTAL (64ul << 20) /* CONN_SOCKET_BUFFER of all: the kernel's memory, but memory */
#define CONN_VANISHED_S 60u            /* a TCP client that acknowledges nothing for so long is gone */

/* -- one client's connections (server/conn_limit) -------------------------------------------------------------------
 */
#define CONN_FAREWELLS_MAX \
    64u                     /* sockets whose clients have had the last word and have not closed; then the oldest goes */
#define CONN_LINES_MAX 100u /* lines of the log in a second about clients that come, are refused, or leave again */
#define CONN_REFUSED_MAX 16u /* that are one too many, and are told so, at a time; others are closed without a word */

/* -- TLS (server/tls, docs/decisions/0018-tls.md) -------------------------------------------------------------------
 */
#define TLS_READ_BUFFER 4096u      /* sealed bytes read from the socket at once: 80 requests */
#define TLS_PART (256u << 10)      /* bytes sealed by one job; 128 to 256 KiB was the best measured */
#define TLS_PART_SHORT (64u << 10) /* likewise, while all hold more than … */
#define TLS_SEALED_TOTAL                                                                                              \
    (8ul << 20)                       /* … so many sealed bytes that sockets have not taken; and then no job begins \
                                         before the last one's bytes are gone */
#define TLS_INLINE (16u << 10)        /* bytes that the loop thread seals itself: a record, some 10 us */
#define TLS_SPARE_BOXES 4u            /* of TLS_PART, kept for the next job */
#define TLS_HANDSHAKE_MAX (64u << 10) /* bytes of one handshake message of a client: its certificates */
/* Bytes from the socket without a plain one among them: a handshake, or a record and what belongs to TLS itself. gnutls
 * looks at TLS_HANDSHAKE_MAX when it has the whole message, which may say of itself that it has 16 MiB. */
#define TLS_BARREN_MAX (128u << 10)
#define TLS_HANDSHAKE_OUT (256u << 10) /* bytes that we may have to say in one go: certificates, names of many CAs */
#define TLS_ALERTS_MAX 16u             /* that are none of an end, in a row: a client that sends more has another aim */
#define TLS_THREADS_MAX 64u            /* of --threads … */
#define TLS_THREADS_DEFAULT_MAX 8u     /* … and where it is not said: one for each processor, up to so many */

/* -- how clients share us (server/fair) ---------------------------------------------------------------------------- */
#define FAIR_REQUESTS 4u /* that one client's turn takes, while there are others */
#define FAIR_READS 32u   /* in flight in one QEMU, of all clients, while several read; it works on 16 of a connection */
#define FAIR_READS_LEAST 2u /* … that each may have at least */

/* -- how fast a session may be read (server/rate) ------------------------------------------------------------------ */
#define CONFIG_RATE_LEAST (64u << 10) /* bytes a second; a client waits 4 s for nbdcopy's request then, no longer */
#define RATE_BURST_MS 100u            /* what was not used is there for so long: a busy loop comes late by less */
#define RATE_PIECES 16u               /* pieces in a second at least: what one connection's turn may take */

/* -- memory of all connections together (server/budget) ------------------------------------------------------------ */
/* Each connection may have CONN_PIECE_SHORT besides, so that none starves. A hundred that are stuck hold a piece each,
 * and a quarter is left for the others. */
#define BUDGET_TOTAL (32u << 20) /* bytes */
#define BUDGET_SPARE_PIECES 32u  /* free pieces kept for the next read */

/* -- one VM (server/vm) -------------------------------------------------------------------------------------------- */
#define VM_CALL_TIMEOUT_MS 30000u /* one QMP command; QEMU answers in ms unless it drains */
#define VM_ASKS_MAX 5u            /* rounds of questions until the answers agree */
#define VM_ROUNDS_BURST 20u       /* rounds that QEMU is asked at once, for whoever asks without end: each costs … */
#define VM_ROUND_REST_MS 20u      /* … its main loop, where the guest's disks are, 1 to 2 ms; then one in so long */
#define VM_JOB_NEWS_MS 5000u      /* qpull commit asks every 250 ms how it goes: so long its end can be asked for */
#define VM_RECENT_MS 50u          /* a client that has just connected asks once for its maps and once more with GO */
#define VM_LOOK_TIMEOUT_MS 5000u  /* stat() of the image files; then names must do */
#define VM_LINGER_STEP_MS \
    250u /* a session lingers on in such steps, VM_CALL_TIMEOUT_MS in all, while QEMU is being asked */
#define VM_STAYS_MAX 4096u /* connections that wait for or take part in one VM's session */
#define VM_SINCE_MAX 64u   /* dirty maps of one session */

/* -- images of a powered-off VM (server/images) -------------------------------------------------------------------- */
#define IMAGES_GREETING_MS 5000u /* for its monitor to speak, each of … */
#define IMAGES_GREETINGS 4u      /* … attempts: a machine under load starts a process in seconds */
#define IMAGES_REST_MS 200u      /* nobody needs them: so long until they are let go */
#define IMAGES_LINGER_MS 500u    /* likewise of a session: the VM cannot start meanwhile */
#define IMAGES_END_MS 10000u     /* qemu-storage-daemon gets so long to end in order, then it is killed */
#define IMAGES_WORDS_MAX 1024u   /* bytes of one line of its stderr in our log; longer ones are cut in pieces */

/* -- VMs that come and go (server/roster) -------------------------------------------------------------------------- */
#define ROSTER_LOOK_MS 100u /* a VM that is to go is looked at so often, until nobody uses it */

/* -- listeners ----------------------------------------------------------------------------------------------------- */
#define LISTEN_BACKLOG                                                                                                 \
    4096 /* the system cuts it to net.core.somaxconn; where it is full, clients of a unix socket fail at once (EAGAIN) \
          */
#define LISTEN_TURN 16u          /* clients taken at once, before others that are served have their turn */
#define LISTEN_RETRY_MS 1000u    /* after accepting failed for want of memory */
#define LISTEN_COMPLAIN_MS 1000u /* refused connections are logged at most this often */

/* -- qpull doctor (server/doctor) ---------------------------------------------------------------------------------- */
#define DOCTOR_TIMEOUT_MS 20000u /* what has not answered by then is called wrong */

/* -- sessions that are begun (server/lease, server/ticket) --------------------------------------------------------- */
#define LEASES_MAX 1024u         /* a VM has one at most */
#define LEASE_END_WAIT_MS 2000u  /* clients that have just ended get so long to be gone when the session is ended */
#define TICKETS_MAX 4096u        /* of all sessions: a name of unknown worth is compared with each, 0.1 us */
#define TICKET_IDENTITY_MAX 320u /* bytes of who a ticket is bound to: TLS_IDENTITY_MAX */

/* -- control socket ------------------------------------------------------------------------------------------------ */
#define CONTROL_CLIENTS_MAX 32u
#define CONTROL_CLIENTS_OURS 8u          /* of them: for root and our own user alone, who may have all of them */
#define CONTROL_CLIENTS_OF_USER 8u       /* of any other user */
#define CONTROL_DOCUMENT_MAX (64u << 10) /* bytes of one command */
#define CONTROL_READ_BUFFER 4096u
#define CONTROL_CALLS_MAX 16u             /* commands in flight per client; more wait in the socket */
#define CONTROL_UNSENT_MAX (8u << 20)     /* bytes of answers past which a client is closed: it does not read */
#define CONTROL_UNSENT_PAUSE (256u << 10) /* bytes of answers past which no more commands are read */
#define CONTROL_STUCK_MS 30000u           /* a client that takes no byte of its answers for so long is closed */

/* -- the process --------------------------------------------------------------------------------------------------- */
#define SERVER_DRAIN_MS 10000u /* connections get so long to take their last replies on SIGTERM */
#define SERVER_STOP_MS 30000u  /* and everything together; then the process ends anyhow */

struct config_rename {
    char *name;   /* owned */
    char *target; /* owned */
};

struct config_image {
    char *disk;         /* owned */
    char *path;         /* owned */
    const char *format; /* QEMU's name of it, a literal; NULL: was not named */
    bool by_flag;       /* private to the parser */
};

struct config_vm {
    char *name; /* owned */
    char *qmp;  /* owned: path of QEMU's QMP socket; NULL: there are only images */
    char *qga;  /* owned: path of its guest agent's socket, or NULL */
    enum quiesce_mode quiesce;
    bool quiesce_said; /* else [server]'s */
    char **disks;      /* owned: disks=, none: all */
    size_t ndisks;
    struct config_rename *renames; /* owned: disk.NAME= */
    size_t nrenames;
    struct config_image *images; /* owned: image.DISK= */
    size_t nimages;
    enum engine engine;  /* engine=; where it was not said, that of the server */
    struct place *place; /* owned: scratch=, a place of its own; NULL: as all others */
    /* private to the parser: where it was said */
    bool by_flag, qga_by_flag, disks_said, engine_said, scratch_said;
    unsigned line;
};

enum config_listener_type { LISTEN_UNIX, LISTEN_TCP, LISTEN_FD };

struct config_listener {
    enum config_listener_type type;
    char *text;                      /* owned: as it was said, "unix:/path" */
    const char *path;                /* UNIX: points into text */
    struct sockaddr_storage address; /* TCP: resolved by config_check() */
    unsigned line;                   /* of the file; 0: it was said by a flag */
    char *host;                      /* owned: TCP */
    char *port;                      /* owned: TCP, digits */
};

/* When what was copied for a session is freed before its end: never, when a client says TRIM, or besides when it has
 * been sent to one. */
enum config_give_back { GIVE_BACK_OFF, GIVE_BACK_TRIM, GIVE_BACK_READ };

/* ON: who comes to an address beyond loopback must use it all the same, unless allow_plaintext. */
enum config_tls { CONFIG_TLS_OFF, CONFIG_TLS_ON, CONFIG_TLS_REQUIRE };

enum config_wish { CONFIG_RUN, CONFIG_HELP, CONFIG_VERSION };

#define CONFIG_ROWS_MAX 48 /* rows of the option table */

struct server_config {
    enum config_wish wish;
    struct config_vm *vms; /* owned */
    size_t nvms;
    struct config_listener *listeners; /* owned */
    size_t nlisteners;
    char *control, *scratch, *state; /* owned: paths; scratch may be a JSON object: then it is no path, but … */
    struct place *place;             /* … owned: what it says */
    char *storage_daemon;            /* owned: qemu-storage-daemon, by path or by name */
    char *pidfile;                   /* owned, or NULL */
    char *file;                      /* owned: the file that was read, or NULL */
    unsigned hold_shutdown_ms;       /* 0: off */
    unsigned max_pause_ms;           /* never 0 */
    unsigned linger_ms, handshake_timeout_ms, idle_timeout_ms, session_timeout_ms;
    unsigned max_connections, max_connections_per_client, max_sessions_per_client;
    uint64_t rate;                               /* bytes a second of a session; 0: any */
    unsigned begin_timeout_ms;                   /* 0: never */
    unsigned keep_checkpoints;                   /* of each VM; 0: all */
    uint64_t scratch_limit, scratch_total_limit; /* bytes; 0: no limit */
    uint64_t scratch_reserve;                    /* bytes; 0: none */
    enum engine engine;                          /* of VMs that do not say their own */
    uint64_t shared_memory;                      /* bytes; 0: none */
    unsigned cbw_timeout_s;
    enum config_give_back give_back;
    enum log_level log_level;
    bool allow_plaintext;
    struct access access; /* owned */
    enum config_tls tls;
    char *tls_certs, *tls_psk; /* owned: a directory or a file: one of them unless tls is OFF */
    unsigned threads;          /* 0: by the number of processors */
    enum quiesce_mode quiesce;
    unsigned socket_mode;      /* of unix sockets; 0: was not said */
    char *socket_group, *user; /* owned: as they were said, or NULL … */
    gid_t socket_gid;          /* … and what they are, of config_check() */
    struct privileges become;
    enum sandbox_mode sandbox;
    /* private to the parser: where the file set each row (0: it did not), and how often flags did */
    unsigned line_in_file[CONFIG_ROWS_MAX];
    unsigned char said_by_flag[CONFIG_ROWS_MAX];
};

/*
 * Flags and, if there is one, the file. -EINVAL and a sentence that names the flag, or the file and the line.
 * ret_config is owned by the caller; set on success only.
 */
int config_parse(int argc, char *const *argv, struct server_config **ret_config, struct failure *f);

/* Paths exist and can be used, addresses resolve, nothing is open to the network that should not. Makes CONFIG_RUN_DIR
 * and CONFIG_STATE where they are used and missing. */
int config_check(struct server_config *c, struct failure *f);
/* These VMs, perhaps read later than c, whose values hold for all of them. Part of config_check(). */
int config_check_vms(const struct server_config *c, const struct config_vm *vms, size_t nvms, struct failure *f);

/* The same was said of both; a name is not looked at. */
bool config_vm_alike(const struct config_vm *a, const struct config_vm *b);
void config_vm_done(struct config_vm *vm); /* what it holds */

/* r, and where the file has the key's value, its name and line before the sentence in f. */
int config_blame(const struct server_config *c, const char *key, int r, struct failure *f);

/* The same of all directories, with the rights that we have now: after we have become another user. */
int config_check_paths(const struct server_config *c, struct failure *f);

/* Whether only this machine can reach a TCP address. */
bool config_is_loopback(const struct sockaddr_storage *a);

void config_free(struct server_config *c); /* NULL is fine */

void config_print_help(FILE *out);

#endif
