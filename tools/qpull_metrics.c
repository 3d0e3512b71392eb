/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpull_metrics: the daemon's numbers, as it says them. */
#include "qpull.h"

#include <stdio.h>

enum exit_status run_metrics(const struct args *args)
{
    struct daemon *d;
    struct json_object *answer = NULL;
    enum exit_status status = daemon_open(args->control, &d);
    const char *text;

    if (status != EXIT_DONE)
        return status;
    status = daemon_ask(d, &answer, "metrics", NULL);
    daemon_close(d);
    if (status != EXIT_DONE)
        return status;
    text = answer_text(answer, "text");
    if (!text)
        status = complain("qpulld has no metrics: is it older than this qpull?");
    else if (fputs(text, stdout) < 0 || fflush(stdout) < 0)
        status = complain("the metrics cannot be written");
    json_object_put(answer);
    return status;
}
