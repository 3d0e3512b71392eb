/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qpull: the command-line tool: which command is meant, and whether its words make sense. */
#include "qpull.h"

#include <getopt.h>
#include <signal.h>
#include <stdio.h>

static const struct command commands[] = {
    {.name = "vms", .usage = "", .summary = "the VMs that qpulld knows", .options = OPTION_JSON, .run = run_vms},
    {.name = "disks",
     .usage = "[VM]",
     .summary = "the disks that can be pulled",
     .help = "Exports are named VM/DISK, or VM/DISK@CHECKPOINT to make a checkpoint of the instant of the pull.",
     .options = OPTION_JSON,
     .max_words = 1,
     .run = run_disks},
    {.name = "status",
     .usage = "[--watch]",
     .summary = "sessions and connections",
     .help = "With --watch it is shown anew every second, until interrupted.",
     .options = OPTION_JSON | OPTION_WATCH,
     .run = run_status},
    {.name = "checkpoint list",
     .usage = "VM [--disk DISK]",
     .summary = "checkpoints, and which of them can carry an incremental pull",
     .help = "STATE is \"usable\", or why the record cannot be used: INCONSISTENT, GAP, RESIZED, NOT_TRACKED, BUSY.\n"
             "CHANGED is what an incremental pull would move at most.",
     .options = OPTION_JSON | OPTION_DISK,
     .min_words = 1,
     .max_words = 1,
     .run = run_checkpoint_list},
    {.name = "checkpoint create",
     .usage = "VM NAME [--disk DISK]",
     .summary = "begin to record changes now, without a backup",
     .help = "The records of all disks begin at one instant. Disks that can keep none (raw, qcow2 version 2) are left out.",
     .options = OPTION_JSON | OPTION_DISK,
     .min_words = 2,
     .max_words = 2,
     .run = run_checkpoint_create},
    {.name = "checkpoint delete",
     .usage = "VM NAME [--disk DISK]",
     .summary = "drop a checkpoint's records from all disks, or from one",
     .help = "Other checkpoints are not touched: each has a record of its own.",
     .options = OPTION_JSON | OPTION_DISK,
     .min_words = 2,
     .max_words = 2,
     .run = run_checkpoint_delete},
};

enum exit_status complain(const char *fmt, ...)
{
    va_list ap;

    (void)fputs("qpull: ", stderr);
    va_start(ap, fmt);
    (void)vfprintf(stderr, fmt, ap);
    va_end(ap);
    (void)fputc('\n', stderr);
    return EXIT_FAILED;
}

static enum exit_status misused(const char *fmt, ...) _printf_(1, 2);

static enum exit_status misused(const char *fmt, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    (void)complain("%s; see qpull --help", text);
    return EXIT_USAGE;
}

static void print_help(void)
{
    printf("Usage: qpull [--control PATH] COMMAND [ARGUMENT]…\n"
           "Looks after qpulld, which serves frozen views of the disks of running QEMU guests over NBD.\n\n");
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        char line[64];
        (void)snprintf(line, sizeof line, "%s %s", commands[i].name, commands[i].usage);
        printf("  %-40s %s\n", line, commands[i].summary);
    }
    printf("\n  --control PATH   qpulld's control socket (default " QPULL_CONTROL ")\n"
           "  --json           for programs; all commands take it\n"
           "  --version, --help (also of one command: qpull COMMAND --help)\n\n"
           "Exit status: 0 done, 1 failed, 2 wrong usage.\n");
}

static void print_command_help(const struct command *c)
{
    printf("Usage: qpull %s %s\n%s.\n", c->name, c->usage, c->summary);
    if (c->help)
        printf("\n%s\n", c->help);
    printf("\n  --control PATH   qpulld's control socket (default " QPULL_CONTROL ")\n");
    if (c->options & OPTION_DISK)
        printf("  --disk DISK      this disk only\n");
    if (c->options & OPTION_WATCH)
        printf("  --watch          go on\n");
    if (c->options & OPTION_JSON)
        printf("  --json           for programs\n");
}

/* The command that the first words name; ret_used: how many words. NULL: none. */
static const struct command *find_command(char *const *words, size_t nwords, size_t *ret_used)
{
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        char two[64];

        if (nwords >= 1 && strcmp(commands[i].name, words[0]) == 0) {
            *ret_used = 1;
            return &commands[i];
        }
        if (nwords < 2)
            continue;
        (void)snprintf(two, sizeof two, "%s %s", words[0], words[1]);
        if (strcmp(commands[i].name, two) == 0) {
            *ret_used = 2;
            return &commands[i];
        }
    }
    return NULL;
}

static enum exit_status run(struct args *args, char *const *words, size_t nwords, bool help)
{
    static const struct {
        unsigned bit;
        const char *name;
    } names[] = {{OPTION_JSON, "--json"}, {OPTION_WATCH, "--watch"}, {OPTION_DISK, "--disk"}};
    const struct command *c;
    size_t used;

    if (nwords == 0) {
        if (help) {
            print_help();
            return EXIT_DONE;
        }
        return misused("no command was given");
    }
    c = find_command(words, nwords, &used);
    if (!c)
        return misused("there is no command \"%s%s%s\"", words[0], nwords > 1 ? " " : "", nwords > 1 ? words[1] : "");
    if (help) {
        print_command_help(c);
        return EXIT_DONE;
    }
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (args->given & names[i].bit & ~c->options)
            return misused("\"%s\" does not take %s", c->name, names[i].name);
    if (nwords - used < c->min_words || nwords - used > c->max_words)
        return misused("%s arguments: qpull %s %s", nwords - used < c->min_words ? "too few" : "too many", c->name,
                       c->usage);
    for (size_t i = used; i < nwords; i++)
        args->words[args->nwords++] = words[i];
    return c->run(args);
}

int main(int argc, char **argv)
{
    enum { CHOICE_CONTROL = 256, CHOICE_JSON, CHOICE_WATCH, CHOICE_DISK, CHOICE_VERSION };
    static const struct option options[] = {
        {"control", required_argument, NULL, CHOICE_CONTROL},
        {"json", no_argument, NULL, CHOICE_JSON},
        {"watch", no_argument, NULL, CHOICE_WATCH},
        {"disk", required_argument, NULL, CHOICE_DISK},
        {"version", no_argument, NULL, CHOICE_VERSION},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    struct args args = {.control = QPULL_CONTROL};
    bool help = false;
    int choice;

    (void)signal(SIGPIPE, SIG_IGN);
    opterr = 0;
    while ((choice = getopt_long(argc, argv, ":h", options, NULL)) != -1)
        switch (choice) {
        case CHOICE_CONTROL:
            args.control = optarg;
            break;
        case CHOICE_JSON:
            args.given |= OPTION_JSON;
            break;
        case CHOICE_WATCH:
            args.given |= OPTION_WATCH;
            break;
        case CHOICE_DISK:
            if (args.given & OPTION_DISK)
                return misused("--disk is there twice");
            args.given |= OPTION_DISK;
            args.disk = optarg;
            break;
        case CHOICE_VERSION:
            printf("qpull %s\n", QPULL_VERSION);
            return EXIT_DONE;
        case 'h':
            help = true;
            break;
        case ':':
            return misused("%s wants a value", argv[optind - 1]);
        default:
            return misused("unknown or ambiguous option %s", argv[optind - 1]);
        }
    if ((size_t)(argc - optind) > QPULL_WORDS_MAX)
        return misused("too many words");
    return run(&args, argv + optind, (size_t)(argc - optind), help);
}
