/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * server: the daemon as one object: its VMs, listeners, connections and control socket, how they start together and how
 * they end. It reads no argv and catches no signals (main does).
 *
 * Loop thread only. Owned by main(); a server that was started ends through server_stop().
 */
#ifndef QPULL_SERVER_H
#define QPULL_SERVER_H

#include "config.h"

#include <stdbool.h>
#include <uv.h>

struct server;
struct conn_set;
struct lease_set;
struct roster_change;
struct listen_file;
struct scratch_place;
struct ticket_book;
struct vm;

/* config is borrowed for life. Nothing is running when this fails. */
int server_new(uv_loop_t *loop, const struct server_config *config, struct server **ret_server, struct failure *f);

/*
 * The sockets, of clients whom nobody hears yet; then all else, with threads: in between rights can be given up.
 * Whatever of it fails, server_stop() is due.
 */
int server_listen(struct server *s, struct failure *f);
int server_start(struct server *s, struct failure *f);

/*
 * Stops accepting, answers what is in flight with errors, tears the sessions down, closes everything and frees the
 * server; cb comes later, as the last touch, in time: clean is false when SERVER_STOP_MS were not enough, and then the
 * loop still has handles.
 */
typedef void (*server_stop_cb)(void *arg, bool clean);
void server_stop(struct server *s, server_stop_cb cb, void *arg);
/* SIGHUP: certificates and keys are read anew, for handshakes from then on; where that fails the old ones stay. */
void server_reload_tls(struct server *s);
bool server_is_stopping(const struct server *s);

/* For the control socket. */
struct vm *server_vm(const struct server *s, const char *name);    /* borrowed; NULL: no such VM */
bool server_keeps_notes(const struct server *s, const char *name); /* also of a VM that is being stopped */
size_t server_nvms(const struct server *s);
struct vm *server_vm_at(const struct server *s, size_t i);
const struct access *server_access(const struct server *s);
/* Borrowed from now on, also for the modes of our sockets, for questions to come: who is in a session stays in it. */
void server_set_access(struct server *s, const struct access *access);
/* As roster_set(). */
int server_set_vms(struct server *s, struct config_vm *vms, size_t nvms, struct roster_change *ret_change);
const struct listen_file *server_socket_file(const struct server *s);
struct lease_set *server_leases(struct server *s);
struct ticket_book *server_tickets(struct server *s);
struct scratch_place *server_scratch(const struct server *s);
const struct server_config *server_config(const struct server *s);
uv_loop_t *server_loop(const struct server *s);
struct json_object *server_status_to_json(struct server *s); /* the caller owns it */

const struct conn_set *server_conns(const struct server *s); /* borrowed */
uint64_t server_scratch_used(const struct server *s);        /* bytes of all sessions */
uint64_t server_uptime_ms(const struct server *s);

size_t server_nlisteners(const struct server *s);
const char *server_address(const struct server *s, size_t i); /* with the real port */

#endif
