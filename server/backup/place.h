/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * place: another place for scratch than files of ours, said as a JSON object of QEMU's blockdev-add
 * (docs/decisions/0016-scratch-places.md). It checks the object as far as can be without a QEMU, and makes each disk's
 * node of it. QEMU opens what it names; its room, its rights and its secrets are none of ours.
 *
 * In strings of the object "%d" is the disk's name, "%v" the VM's, "%s" the session's id, "%%" a percent sign.
 *
 * A place never changes once it is made. Any thread.
 */
#ifndef QPULL_BACKUP_PLACE_H
#define QPULL_BACKUP_PLACE_H

#include "qmp/base.h"

#include <json-c/json.h>
#include <stdbool.h>

#define PLACE_TEXT_MAX 4096u /* bytes of the object as text */
#define PLACE_DEPTH_MAX 8    /* objects and arrays in one another */
/*
 * QEMU stands still while it connects to an NBD server, and its guest with it; without the option "open-timeout" for as
 * long as the server likes (7.2 to 10.0). Where the object does not say it, this is it.
 */
#define PLACE_OPEN_TIMEOUT_S 2

struct place;

struct place_names {
    const char *vm, *disk, *session;
};

static inline bool place_is_meant(const char *value)
{
    return *value == '{';
}

/* -EINVAL and a sentence, without the place where it was said; -EAGAIN: so far it is right, but it has no end. */
int place_parse(const char *text, struct place **ret_place, struct failure *f);
void place_free(struct place *p); /* NULL is fine */

const char *place_text(const struct place *p);
/* Two disks, or two VMs, would get one place unless their names are in it. */
bool place_tells_disks(const struct place *p);
bool place_tells_vms(const struct place *p); /* by their names or by the sessions' */

/* Arguments of blockdev-add but for the node's name; owned by the receiver. -EINVAL: a name that may not stand there.
 */
int place_node(const struct place *p, const struct place_names *names, struct json_object **ret_args,
               struct failure *f);

#endif
