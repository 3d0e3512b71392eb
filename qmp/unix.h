/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * unix: a connection to a unix socket by its path, however long that is. No objects; does not wait; any thread.
 */
#ifndef QPULL_QMP_UNIX_H
#define QPULL_QMP_UNIX_H

/*
 * ret_fd is non-blocking, close-on-exec and owned by the caller, set where 0 or -EINPROGRESS is returned (then it is
 * writable when SO_ERROR tells how it went). Else why not: -ENOENT, -ECONNREFUSED (nobody listens), -EAGAIN (the queue
 * of those who wait for that socket is full), -EACCES, …
 */
int unix_connect(const char *path, int *ret_fd);

#endif
