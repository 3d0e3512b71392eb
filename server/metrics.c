/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "metrics.h"
#include "conn.h"
#include "vm.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#define MS_PER_SECOND 1000.0
#define US_PER_SECOND 1000000.0

/* -- of each VM ---------------------------------------------------------------------------------------------------- */

static double connected(struct vm *vm)
{
    return vm_is_connected(vm);
}

static double connections(struct vm *vm)
{
    return (double)vm_nconnections(vm);
}

static double scratch(struct vm *vm)
{
    return (double)vm_scratch_used(vm);
}

static double last_setup(struct vm *vm)
{
    return (double)vm_counters(vm)->last_setup_ms / MS_PER_SECOND;
}

static double last_pause(struct vm *vm)
{
    return (double)vm_counters(vm)->last_pause_us / US_PER_SECOND;
}

static double longest_pause(struct vm *vm)
{
    return (double)vm_counters(vm)->longest_pause_us / US_PER_SECOND;
}

/* A number of a VM: of its counters at an offset, or what a function says. */
static const struct row {
    const char *name, *type, *help;
    size_t offset;
    double (*value)(struct vm *vm);
} rows[] = {
#define COUNTER(name, member, help)                                       \
    {                                                                     \
        name, "counter", help, offsetof(struct vm_counters, member), NULL \
    }
#define GAUGE(name, function, help)      \
    {                                    \
        name, "gauge", help, 0, function \
    }
    GAUGE("qpull_vm_connected", connected, "1 while the VM answers (QEMU's monitor, or its images), else 0."),
    COUNTER("qpull_sessions_started_total", started, "Sessions begun."),
    COUNTER("qpull_sessions_up_total", up, "Sessions that came up: the disks were frozen."),
    COUNTER("qpull_session_problems_total", problems, "Sessions that could not undo something in QEMU."),
    GAUGE("qpull_session_setup_seconds", last_setup, "How long the set-up of the last session took."),
    GAUGE("qpull_session_pause_seconds", last_pause, "How long the guest stood still at most for the last freeze."),
    GAUGE("qpull_session_longest_pause_seconds", longest_pause,
          "How long the guest stood still at most for any freeze since the daemon started."),
    COUNTER("qpull_checkpoints_kept_total", kept, "Checkpoints that a pull has made, one for each disk."),
    COUNTER("qpull_checkpoints_dropped_total", dropped,
            "Checkpoints that were dropped with their session, one for each disk that was opened."),
    COUNTER("qpull_client_bytes_total", client_bytes, "Disk data sent to NBD clients."),
    COUNTER("qpull_qemu_bytes_total", qemu_bytes, "Disk data read of QEMU for NBD clients."),
    COUNTER("qpull_session_connections_total", connections, "NBD connections that have opened a disk."),
    GAUGE("qpull_session_connections", connections, "NBD connections that have a disk open."),
    GAUGE("qpull_session_scratch_bytes", scratch, "Scratch space that the session holds."),
    COUNTER("qpull_sweeps_total", sweeps, "Looks for what a dead daemon left in QEMU."),
    COUNTER("qpull_sweep_problems_total", sweep_problems, "Sweeps that could not undo all they found."),
    COUNTER("qpull_sweep_leftovers_total", leftovers, "Sessions of dead daemons that were undone."),
};

static void print_head(FILE *out, const char *name, const char *type, const char *help)
{
    (void)fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

/* A label's value: backslash, quote and line feed are escaped (exposition format). */
static void print_label(FILE *out, const char *key, const char *value)
{
    (void)fprintf(out, "%s=\"", key);
    for (; *value; value++) {
        if (*value == '\\' || *value == '"')
            (void)fputc('\\', out);
        if (*value == '\n')
            (void)fputs("\\n", out);
        else
            (void)fputc(*value, out);
    }
    (void)fputc('"', out);
}

static void print_vm(FILE *out, const char *name, const struct vm *vm)
{
    (void)fprintf(out, "%s{", name);
    print_label(out, "vm", vm_name(vm));
}

static void print_rows(FILE *out, const struct server *s)
{
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        const struct row *row = &rows[i];

        print_head(out, row->name, row->type, row->help);
        for (size_t k = 0; k < server_nvms(s); k++) {
            struct vm *vm = server_vm_at(s, k);

            print_vm(out, row->name, vm);
            if (row->value)
                (void)fprintf(out, "} %.15g\n", row->value(vm));
            else
                (void)fprintf(out, "} %" PRIu64 "\n", *(const uint64_t *)((const char *)vm_counters(vm) + row->offset));
        }
    }
}

/* Those that are not one number. */
static void print_ends(FILE *out, const struct server *s)
{
    static const char name[] = "qpull_sessions_ended_total";

    print_head(out, name, "counter", "Sessions that are over, by reason.");
    for (size_t k = 0; k < server_nvms(s); k++) {
        const struct vm *vm = server_vm_at(s, k);

        for (unsigned end = 0; end < VM_ENDS; end++) {
            print_vm(out, name, vm);
            (void)fputc(',', out);
            print_label(out, "reason", vm_end_name(end));
            (void)fprintf(out, "} %" PRIu64 "\n", vm_counters(vm)->ended[end]);
        }
    }
}

static void print_setups(FILE *out, const struct server *s)
{
    static const char name[] = "qpull_session_setups_seconds";

    print_head(out, name, "summary", "How long set-ups took that came up.");
    for (size_t k = 0; k < server_nvms(s); k++) {
        const struct vm *vm = server_vm_at(s, k);

        print_vm(out, "qpull_session_setups_seconds_sum", vm);
        (void)fprintf(out, "} %.15g\n", (double)vm_counters(vm)->setup_ms / MS_PER_SECOND);
        print_vm(out, "qpull_session_setups_seconds_count", vm);
        (void)fprintf(out, "} %" PRIu64 "\n", vm_counters(vm)->nsetups);
    }
}

/* -- of the daemon ------------------------------------------------------------------------------------------------- */

static void print_one(FILE *out, const char *name, const char *type, const char *help, double value)
{
    print_head(out, name, type, help);
    (void)fprintf(out, "%s %.15g\n", name, value);
}

/* -1: cannot be told. */
static double count_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    double n = -1; /* the directory's own is not counted */

    if (!dir)
        return -1;
    for (const struct dirent *e; (e = readdir(dir));)
        n += e->d_name[0] != '.';
    (void)closedir(dir);
    return n;
}

static double resident_bytes(void)
{
    FILE *f = fopen("/proc/self/statm", "re");
    unsigned long pages = 0;
    int n;

    if (!f)
        return -1;
    n = fscanf(f, "%*u %lu", &pages); /* NOLINT(cert-err34-c): the kernel's own number */
    (void)fclose(f);
    return n == 1 ? (double)pages * (double)sysconf(_SC_PAGESIZE) : -1;
}

static void print_daemon(FILE *out, const struct server *s)
{
    const struct conn_set *conns = server_conns(s);
    const struct budget *budget = &conns->budget;

    print_head(out, "qpull_build_info", "gauge", "1; the version is in the label.");
    (void)fprintf(out, "qpull_build_info{version=\"%s\"} 1\n", QPULL_VERSION);
    print_one(out, "qpull_uptime_seconds", "gauge", "Since the daemon began.",
              (double)server_uptime_ms(s) / MS_PER_SECOND);
    print_one(out, "qpull_connections", "gauge", "NBD connections.", (double)conns->nconns);
    print_one(out, "qpull_connections_limit", "gauge", "As many as there may be (--max-connections).",
              conns->config->max_connections);
    print_one(out, "qpull_connections_total", "counter", "NBD connections ever accepted.", (double)conns->ntotal);
    print_one(out, "qpull_connections_refused_total", "counter", "NBD connections closed because all were taken.",
              (double)conns->nrefused);
    print_one(out, "qpull_connections_evicted_total", "counter",
              "NBD connections closed while they negotiated, because another needed the place.",
              (double)conns->nevicted);
    print_one(out, "qpull_buffer_bytes", "gauge", "Memory that holds disk data for NBD clients.", (double)budget->used);
    print_one(out, "qpull_buffer_limit_bytes", "gauge", "As much as it may be, but for one small buffer each.",
              (double)budget->limit);
    print_one(out, "qpull_buffer_highest_bytes", "gauge", "The most that it ever was.", (double)budget->most);
    print_one(out, "qpull_reply_bytes", "gauge", "Memory that holds answers without disk data, not yet sent.",
              (double)conns->head_bytes);
    print_one(out, "qpull_scratch_bytes", "gauge", "Scratch space that all sessions hold.",
              (double)server_scratch_used(s));
    print_one(out, "qpull_process_open_fds", "gauge", "File descriptors of the daemon.", count_fds());
    print_one(out, "qpull_process_resident_memory_bytes", "gauge", "Memory of the daemon (RSS).", resident_bytes());
}

char *metrics_text(const struct server *s)
{
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);

    if (!out)
        return NULL;
    print_daemon(out, s);
    print_rows(out, s);
    print_ends(out, s);
    print_setups(out, s);
    if (fclose(out) == 0)
        return text;
    free(text);
    return NULL;
}
