/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* control_internal: what control.c (the wire) and control_commands.c (the commands) share. Not for anybody else. */
#ifndef QPULL_CONTROL_INTERNAL_H
#define QPULL_CONTROL_INTERNAL_H

#include "control.h"

#include <json-c/json.h>

struct control_client;
struct control_call;

#define CONTROL_ARGS_MAX 8

/* What an argument must be. STRINGS: one string, or an array of them. */
enum control_type { CONTROL_STRING, CONTROL_STRINGS, CONTROL_OBJECT, CONTROL_NUMBER, CONTROL_BOOL };

struct control_param {
    const char *name;
    bool required;
    enum control_type type;
};
#define REQUIRED true

/* A command with "vm" wants the right for that VM; one without is for everybody (0: it shows what they may see), or for
 * who may do all with all. */
#define CONTROL_ADMIN (ACCESS_ALL + 1u)

struct control_command {
    const char *name;
    unsigned right; /* enum access_right, CONTROL_ADMIN, or 0 */
    struct control_param params[CONTROL_ARGS_MAX];
    size_t size; /* bytes of the structure that begins with a struct control_call; 0: of that alone */
    /* Ends, now or later, with one of control_return() and control_error(). args is borrowed for the call, never NULL.
     */
    void (*run)(struct control_call *call, struct json_object *args);
    /* The client is gone: nobody wants the answer. Forgets what is under way; the call is freed then. NULL: it goes on
     * to its end, unheard. */
    void (*forget)(struct control_call *call);
};

/* A command on its way; heap, zeroed but for these. */
struct control_call {
    struct server *server; /* borrowed */
    const struct control_command *command;
    struct control_client *client; /* NULL: gone */
    struct json_object *id;        /* owned: the client's, or NULL */
    struct control_call *next, *prev;
};

/* Both end the call, which is gone then. value is given; NULL is an empty object. */
void control_return(struct control_call *call, struct json_object *value);
void control_error(struct control_call *call, const char *class, const char *fmt, ...) _printf_(3, 4);
void control_fail(struct control_call *call, const struct failure *f);

#define CONTROL_GENERIC "GenericError"
#define CONTROL_NO_COMMAND "CommandNotFound"
#define CONTROL_NO_DEVICE "DeviceNotFound"
#define CONTROL_NO_VM "There is no VM \"%s\" here"

/* One file of commands each. */
struct control_table {
    const struct control_command *commands;
    size_t ncommands;
};
#define CONTROL_TABLES 5
extern const struct control_table control_general, control_checkpoints, control_jobs, control_sessions, control_metrics;
/* All of them. */
extern const struct control_table *const control_tables[CONTROL_TABLES];

/* Shared by the files with commands. The string argument of that name, or NULL. */
const char *control_string(struct json_object *args, const char *name);
/* "disk": one string or several. The array is the caller's, the strings are borrowed from args. NULL: out of memory. */
const char **control_strings(struct json_object *args, const char *name, size_t *ret_n);
/* Who asks, and what of enum access_right it may do with that VM. */
uid_t control_uid(const struct control_call *call);
unsigned control_rights(const struct control_call *call, const struct vm *vm);
/* Whether this VM is there for the client. */
bool control_sees(const struct control_call *call, const struct vm *vm);
/* The VM that "vm" names; NULL: the call is answered, and gone. */
struct vm *control_vm(struct control_call *call, struct json_object *args);

/* {"major": 0, …} of this program. */
struct json_object *control_version_to_json(void);

#endif
