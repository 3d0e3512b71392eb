/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * privileges: a daemon that was begun as root becomes another user, for good. It knows nothing of what is open by then.
 *
 * Before there is a second thread; nothing is owned.
 */
#ifndef QPULL_PRIVILEGES_H
#define QPULL_PRIVILEGES_H

#include "qmp/base.h"

#include <limits.h>
#include <stdbool.h>
#include <sys/types.h>

struct privileges {
    bool set; /* else: stay who we are */
    char name[LOGIN_NAME_MAX];
    uid_t uid;
    gid_t gid;
};

/* Who "NAME" or "NAME:GROUP" is. -EINVAL and a sentence: no such user or group, or root. */
int privileges_find(const char *text, struct privileges *ret_privileges, struct failure *f);

/*
 * User, groups (all that the system has this user in), no capability, and no program that we start gets any. It is
 * looked afterwards whether that is so and whether there is a way back. Where we are that user already only the latter
 * is done.
 */
int privileges_drop(const struct privileges *p, struct failure *f);

#endif
