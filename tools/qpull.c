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
    {.name = "doctor",
     .usage = "[VM]",
     .summary = "look whether all is well, and say what to do where it is not",
     .help =
         "Checks the daemon, its directories, and each VM: monitor, engine, disks, checkpoints, QEMU's NBD server,\n"
         "what earlier sessions left, and the self-test, which runs now if it has not run yet. It mends nothing.\n"
         "Exit status 0: all is well, or nothing worse than a note; 1: something is wrong.",
     .options = OPTION_JSON,
     .max_words = 1,
     .run = run_doctor},
    {.name = "checkpoint list",
     .usage = "VM [NAME]",
     .summary = "checkpoints, and which of them can carry an incremental pull",
     .help = "STATE is \"usable\", or why the record cannot be used: NO_SUCH_CHECKPOINT, INCONSISTENT, GAP, RESIZED,\n"
             "NOT_TRACKED, BUSY. CHANGED is what an incremental pull would move at most. Parents stand before their\n"
             "children, checkpoints without a note (made by others) at the end; \"*\" marks the current one.",
     .options = OPTION_JSON | OPTION_DISK | OPTION_TREE | OPTION_ROOTS | OPTION_LEAVES | OPTION_CHILDREN |
                OPTION_DESCENDANTS | OPTION_SIZE,
     .min_words = 1,
     .max_words = 2,
     .run = run_checkpoint_list},
    {.name = "checkpoint show",
     .usage = "VM [NAME]",
     .summary = "all that is known of one checkpoint, of the current one if no name is given",
     .options = OPTION_JSON,
     .min_words = 1,
     .max_words = 2,
     .run = run_checkpoint_show},
    {.name = "checkpoint create",
     .usage = "VM NAME",
     .summary = "begin to record changes now, without a backup",
     .help = "The records of all disks begin at one instant. Disks that can keep none (raw, qcow2 version 2) are left\n"
             "out, unless they are named.",
     .options = OPTION_JSON | OPTION_DISK | OPTION_DESCRIPTION | OPTION_PARENT,
     .min_words = 2,
     .max_words = 2,
     .run = run_checkpoint_create},
    {.name = "checkpoint delete",
     .usage = "VM NAME",
     .summary = "drop a checkpoint's records from all disks, or from some",
     .help = "Other checkpoints are not touched: each has a record of its own.",
     .options = OPTION_JSON | OPTION_DISK | OPTION_WITH_DESCENDANTS | OPTION_DESCENDANTS | OPTION_NOTE_ONLY,
     .min_words = 2,
     .max_words = 2,
     .run = run_checkpoint_delete},
    {.name = "checkpoint adopt",
     .usage = "VM [NAME]",
     .summary = "note a record that somebody else made, or correct a note",
     .help = "Without NAME all usable records that have no note. A record must be usable on at least one disk. With\n"
             "--accept a record is taken for right of which qpulld knows that somebody changed the image behind its\n"
             "back (GAP, RESIZED): say it only if you know better.",
     .options = OPTION_JSON | OPTION_DESCRIPTION | OPTION_PARENT | OPTION_ACCEPT,
     .min_words = 1,
     .max_words = 2,
     .run = run_checkpoint_adopt},
    {.name = "checkpoint invalidate",
     .usage = "VM DISK",
     .summary = "the disk was restored from a backup: none of its checkpoints counts any more",
     .help = "Say it before the VM starts with the restored image. They are listed as GAP until they are deleted; the\n"
             "next pull of the disk is a full one.",
     .options = OPTION_JSON,
     .min_words = 2,
     .max_words = 2,
     .run = run_checkpoint_invalidate},
    {.name = "checkpoint can-increment",
     .usage = "VM NAME",
     .summary = "per disk: would a pull since NAME be incremental, and if not, why",
     .help = "Exit status 0: all disks that were asked about; 1: some are not.",
     .options = OPTION_JSON | OPTION_DISK,
     .min_words = 2,
     .max_words = 2,
     .run = run_checkpoint_can_increment},
    {.name = "checkpoint export",
     .usage = "VM",
     .summary = "print the notes of a VM as JSON, to be imported on another host",
     .help = "The records themselves travel in the images.",
     .options = OPTION_JSON,
     .min_words = 1,
     .max_words = 1,
     .run = run_checkpoint_export},
    {.name = "checkpoint import",
     .usage = "VM FILE",
     .summary = "take in what \"export\" printed (\"-\": from standard input)",
     .help = "All or nothing. A note of a name that is there is replaced.",
     .options = OPTION_JSON,
     .min_words = 2,
     .max_words = 2,
     .run = run_checkpoint_import},
    {.name = "checkpoint rename-vm",
     .usage = "OLD NEW",
     .summary = "the VM called OLD is configured as NEW now: give it its notes",
     .options = OPTION_JSON,
     .min_words = 2,
     .max_words = 2,
     .run = run_checkpoint_rename_vm},
    {.name = "commit",
     .usage = "VM/DISK",
     .summary = "merge images of a disk into one below them; checkpoints stay right",
     .help = "The data of the images from top down to above base go into base, and so do their checkpoints' records.\n"
             "NODE is the name of a node in QEMU, or of an image file as QEMU knows it.\n"
             "When the live image was committed, the guest goes on in base: start the VM with that one from then on.\n"
             "Of a VM that is powered off, the image that it is started with goes on, empty and over base; with\n"
             "--delete it is gone, and base is to be given to the VM and to qpulld's --image.\n"
             "QEMU closes the images that were merged, unless something else uses them. --delete keeps, and\n"
             "names, a file that is not seen to be a layer of this disk: by its own head, and by QEMU's lock.\n"
             "Interrupted (^C), the commit is cancelled.",
     .options = OPTION_JSON | OPTION_TOP | OPTION_BASE | OPTION_SHALLOW | OPTION_ACTIVE | OPTION_DELETE | OPTION_FORCE |
                OPTION_QUIET,
     .min_words = 1,
     .max_words = 1,
     .run = run_commit},
    {.name = "begin",
     .usage = "VM",
     .summary = "freeze a VM's disks and print the NBD URIs to read them by",
     .help = "One URI on each line; which session it is, and how long it stands, is said on stderr (--json has all).\n"
             "It stands until \"qpull end\", or until nobody has read it for qpulld's --begin-timeout (an hour), or\n"
             "until --ttl is over, whoever reads. Nothing but \"qpull end\" keeps its checkpoint.\n"
             "The URIs are for this user on this machine. With --ticket they are for whoever has them: each disk for\n"
             "one client, once. Hand them out as you would a password.\n"
             "TIME is a number of seconds, or has s, m, h or d behind it. SIZE: bytes, or with K, M, G or T.",
     .options = OPTION_JSON | OPTION_DISK | OPTION_CHECKPOINT | OPTION_KEEP | OPTION_TICKET | OPTION_TTL | OPTION_RATE |
                OPTION_QUIET,
     .min_words = 1,
     .max_words = 1,
     .run = run_begin},
    {.name = "end",
     .usage = "SESSION",
     .summary = "end a session of \"qpull begin\"",
     .help =
         "What becomes of its checkpoint: --commit keeps it on all disks that it was begun for, --rollback on none;\n"
         "without either it is kept on those whose last reader said goodbye and was answered without an error.\n"
         "Exit status 1 where it could not be kept.",
     .options = OPTION_JSON | OPTION_COMMIT | OPTION_ROLLBACK | OPTION_QUIET,
     .min_words = 1,
     .max_words = 1,
     .run = run_end},
    {.name = "certs init",
     .usage = "DIR",
     .summary = "make certificates or keys for TLS, and say how to use them",
     .help =
         "An authority, a certificate for qpulld and one for each --client (without one: for \"client\"), or with\n"
         "--psk a key for each user. Nothing that is there is made anew: say it again with other names to add\n"
         "clients. Folder DIR is for qpulld's --tls-certs, or DIR/keys.psk for --tls-psk; each DIR/clients/NAME is\n"
         "for that client, as libnbd (nbdcopy, nbdinfo) and QEMU want it. Keys have mode 0600.",
     .options = OPTION_CLIENT | OPTION_PSK | OPTION_HOST,
     .min_words = 1,
     .max_words = 1,
     .run = run_certs_init},
    {.name = "metrics",
     .usage = "",
     .summary = "the daemon's numbers, for Prometheus",
     .help = "The text exposition format, version 0.0.4. docs/METRICS.md has the table.",
     .run = run_metrics},
};

/* What a command may take besides its words. */
static const struct {
    unsigned bit;
    const char *name, *shown, *summary;
    int has_value; /* as getopt_long() says it */
} switches[] = {
    {OPTION_DISK, "disk", "--disk DISK", "this disk only; repeatable", required_argument},
    {OPTION_WATCH, "watch", "--watch", "go on", no_argument},
    {OPTION_TREE, "tree", "--tree", "draw who descends from whom", no_argument},
    {OPTION_ROOTS, "roots", "--roots", "those without a parent only", no_argument},
    {OPTION_LEAVES, "leaves", "--leaves", "those without children only", no_argument},
    {OPTION_CHILDREN, "children", "--children", "those whose parent is NAME", no_argument},
    {OPTION_DESCENDANTS, "descendants", "--descendants", "those that descend from NAME", no_argument},
    {OPTION_SIZE, "size", "--size", "sizes in bytes", no_argument},
    {OPTION_DESCRIPTION, "description", "--description T", "words to remember it by", required_argument},
    {OPTION_PARENT, "parent", "--parent NAME", "its parent (default: the current one; \"\": none)", required_argument},
    {OPTION_WITH_DESCENDANTS, "with-descendants", "--with-descendants", "and all that descend from it", no_argument},
    {OPTION_ACCEPT, "accept", "--accept", "its records are right, whatever others did", no_argument},
    {OPTION_NOTE_ONLY, "note-only", "--note-only", "forget the note, keep the records", no_argument},
    {OPTION_TOP, "top", "--top NODE", "begin with this image (default: the live one, which needs --active)",
     required_argument},
    {OPTION_BASE, "base", "--base NODE", "into this one (default: the deepest)", required_argument},
    {OPTION_SHALLOW, "shallow", "--shallow", "into the one right below top", no_argument},
    {OPTION_ACTIVE, "active", "--active", "top is the live image; the guest goes on in base", no_argument},
    {OPTION_DELETE, "delete", "--delete", "delete the merged images' files in the end", no_argument},
    {OPTION_FORCE, "force", "--force", "base keeps no bitmaps: checkpoints may be lost", no_argument},
    {OPTION_CLIENT, "client", "--client NAME", "a certificate for it; repeatable", required_argument},
    {OPTION_PSK, "psk", "--psk NAME", "a pre-shared key for it instead; repeatable", required_argument},
    {OPTION_HOST, "host", "--host NAME",
     "name or address of this server for its clients (default: its own name); repeatable", required_argument},
    {OPTION_CHECKPOINT, "checkpoint", "--checkpoint NAME", "the instant becomes this checkpoint, if it is kept",
     required_argument},
    {OPTION_KEEP, "keep", "--keep", "however long nobody reads it", no_argument},
    {OPTION_TICKET, "ticket", "--ticket", "URIs for others, each good for one client, once", no_argument},
    {OPTION_TTL, "ttl", "--ttl TIME", "it ends after so long, whoever reads: 90s, 30m, 2h, 1d", required_argument},
    {OPTION_RATE, "rate", "--rate SIZE", "a second, for all who read it together", required_argument},
    {OPTION_COMMIT, "commit", "--commit", "keep its checkpoint: the data are safe", no_argument},
    {OPTION_ROLLBACK, "rollback", "--rollback", "drop its checkpoint", no_argument},
    {OPTION_QUIET, "quiet", "--quiet", "no progress bar, no report", no_argument},
    {OPTION_JSON, "json", "--json", "for programs", no_argument},
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
           "  --json           for programs; all commands take it but metrics and certs\n"
           "  --version, --help (also of one command: qpull COMMAND --help)\n\n"
           "Exit status: 0 done, 1 failed, 2 wrong usage.\n");
}

static void print_command_help(const struct command *c)
{
    printf("Usage: qpull %s %s\n%s.\n", c->name, c->usage, c->summary);
    if (c->help)
        printf("\n%s\n", c->help);
    printf("\n  --control PATH   qpulld's control socket (default " QPULL_CONTROL ")\n");
    for (size_t i = 0; i < ARRAY_SIZE(switches); i++)
        if (c->options & switches[i].bit)
            printf("  %-16s %s\n", switches[i].shown, switches[i].summary);
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
    for (size_t i = 0; i < ARRAY_SIZE(switches); i++)
        if (args->given & switches[i].bit & ~c->options)
            return misused("\"%s\" does not take --%s", c->name, switches[i].name);
    if (nwords - used < c->min_words || nwords - used > c->max_words)
        return misused("%s arguments: qpull %s %s", nwords - used < c->min_words ? "too few" : "too many", c->name,
                       c->usage);
    for (size_t i = used; i < nwords; i++)
        args->words[args->nwords++] = words[i];
    return c->run(args);
}

#define OPTIONS_REPEATABLE (OPTION_DISK | OPTION_CLIENT | OPTION_PSK | OPTION_HOST)

static int take_one_more(const char **to, size_t *n, const char *name, const char *value)
{
    if (*n == QPULL_DISKS_MAX) {
        (void)misused("more than %d --%s", QPULL_DISKS_MAX, name);
        return -1;
    }
    to[(*n)++] = value;
    return 0;
}

/* One of the switches; negative: it is there twice, and that is said. */
static int take_switch(struct args *args, unsigned bit, const char *name, const char *value)
{
    if (args->given & bit & ~OPTIONS_REPEATABLE) {
        (void)misused("--%s is there twice", name);
        return -1;
    }
    args->given |= bit;
    if (bit == OPTION_DESCRIPTION)
        args->description = value;
    if (bit == OPTION_PARENT)
        args->parent = value;
    if (bit == OPTION_CHECKPOINT)
        args->checkpoint = value;
    if (bit == OPTION_TTL)
        args->ttl = value;
    if (bit == OPTION_RATE)
        args->rate = value;
    if (bit == OPTION_TOP)
        args->top = value;
    if (bit == OPTION_BASE)
        args->base = value;
    if (bit == OPTION_DISK)
        return take_one_more(args->disks, &args->ndisks, name, value);
    if (bit == OPTION_CLIENT)
        return take_one_more(args->clients, &args->nclients, name, value);
    if (bit == OPTION_PSK)
        return take_one_more(args->psks, &args->npsks, name, value);
    if (bit == OPTION_HOST)
        return take_one_more(args->hosts, &args->nhosts, name, value);
    return 0;
}

int main(int argc, char **argv)
{
    enum { CHOICE_CONTROL = 256, CHOICE_VERSION, CHOICE_SWITCH };
    struct option options[ARRAY_SIZE(switches) + 4] = {
        {"control", required_argument, NULL, CHOICE_CONTROL},
        {"version", no_argument, NULL, CHOICE_VERSION},
        {"help", no_argument, NULL, 'h'},
    };
    struct args args = {.control = QPULL_CONTROL};
    bool help = false;
    int choice;

    for (size_t i = 0; i < ARRAY_SIZE(switches); i++)
        options[3 + i] = (struct option){switches[i].name, switches[i].has_value, NULL, CHOICE_SWITCH + (int)i};
    (void)signal(SIGPIPE, SIG_IGN);
    opterr = 0;
    while ((choice = getopt_long(argc, argv, ":h", options, NULL)) != -1)
        switch (choice) {
        case CHOICE_CONTROL:
            args.control = optarg;
            break;
        case CHOICE_VERSION:
            printf("qpull %s\n", QPULL_VERSION);
            return EXIT_DONE;
        case 'h':
            help = true;
            break;
        case ':':
            return misused("%s wants a value", argv[optind - 1]);
        case '?':
            return misused("unknown or ambiguous option %s", argv[optind - 1]);
        default:
            if (take_switch(&args, switches[choice - CHOICE_SWITCH].bit, switches[choice - CHOICE_SWITCH].name,
                            optarg) < 0)
                return EXIT_USAGE;
        }
    if ((size_t)(argc - optind) > QPULL_WORDS_MAX)
        return misused("too many words");
    return run(&args, argv + optind, (size_t)(argc - optind), help);
}
