/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "child.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define CANNOT_START 127 /* as a shell says it */

bool child_is_one(int argc, char *const *argv)
{
    return argc > 3 && strcmp(argv[1], CHILD_WORD) == 0;
}

int child_main(int argc, char *const *argv)
{
    pid_t parent = (pid_t)strtol(argv[2], NULL, 10);

    /* SIGTERM: it ends in order, and what it holds is stored. */
    if (prctl(PR_SET_PDEATHSIG, SIGTERM) < 0)
        return CANNOT_START;
    if (getppid() != parent) /* it died before we asked */
        return EXIT_SUCCESS;
    (void)execv(argv[3], argv + 3);
    (void)fprintf(stderr, "cannot start %s: %s\n", argv[3], strerror(errno));
    return CANNOT_START;
}
