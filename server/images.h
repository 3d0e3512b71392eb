/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * images: the disks of a powered-off VM: files, and the qemu-storage-daemon that holds them while somebody needs them.
 * It finds the program, starts it, opens every image for reading under QEMU's image lock, hears of its death, and ends
 * it in order. What is done with the images is the VM's business (server/vm_images).
 *
 * Only while it is open does anybody hold a file. The storage daemon dies with us, in order (server/child): nothing is
 * left behind by a kill -9 of ours.
 *
 * Loop thread only. Owned by its VM.
 */
#ifndef QPULL_IMAGES_H
#define QPULL_IMAGES_H

#include "config.h"
#include "qmp/client.h"

struct images;

struct images_config {
    uv_loop_t *loop;
    const char *vm;                    /* name; copied */
    const struct config_image *images; /* borrowed for life */
    size_t nimages;
    const char *program; /* of the storage daemon: a path or a name; borrowed for life */
    const char *state;   /* copied: path of the state directory, where the sockets are */
    int state_dir;       /* the same, an O_PATH descriptor; borrowed for life */
};

struct images_ops {
    /* All images are open for reading; their nodes are called disk0, disk1, … in the order of the configuration. */
    void (*on_open)(void *arg, struct qmp_client *qmp /* borrowed until on_closed */, const char *version);
    /* The daemon's monitor is gone, and so is what was asked of it; on_lost comes when the daemon has ended. */
    void (*on_dying)(void *arg);
    /* They could not be opened, or the daemon died. At most once after each images_open(); images_close() is due. */
    void (*on_lost)(void *arg, const struct failure *why);
    /* Nobody has wanted them for IMAGES_REST_MS: images_close(), unless somebody does now. */
    void (*on_rested)(void *arg);
    void (*on_closed)(void *arg); /* after images_close() */
};

/* config is borrowed for the call, ops for life. */
int images_new(const struct images_config *config, const struct images_ops *ops, void *arg, struct images **ret_images);
/* Only while closed, before or after; cb is the last touch. */
void images_free(struct images *im, void (*cb)(void *arg), void *arg);

/* Somebody needs them: nothing when they are open or being opened, or still being closed (ask again in on_closed). */
void images_open(struct images *im);
/* Nobody needs them any more. */
void images_rest(struct images *im);
/* Nothing uses the QMP client any more. Also in mid-opening; nothing when they are closed or being closed. */
void images_close(struct images *im);
bool images_is_closed(const struct images *im);

/* The socket of the daemon's NBD server, a name in the state directory; it listens while the images are open. */
const char *images_nbd_socket(const struct images *im);
const char *images_path(const struct images *im, const char *disk); /* NULL: no such disk */
/* What query-block would say if each image were a device's; the caller owns it. */
struct json_object *images_query_block(const struct images *im);
/* [{"disk", "path", "format"}]; the caller owns it. */
struct json_object *images_to_json(const struct images *im);
/* "closed", "opening", … for status. */
const char *images_state_name(const struct images *im);

#endif
