/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is remembered of a VM's disks, as it may lie on the disk: any text is refused in words, or is a memory that is
 * written and read again as the same, and with which a look at real disks can be judged. A damaged file is set aside
 * and not in the way.
 */
#include "backup/lineage_impl.h"
#include "backup/state_file.h"
#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#define VM "vm1"
#define MIB (1ull << 20)
#define IMAGES 3

/* The first byte. */
enum { LOOK = 1, RUNNING = 2, JOBS = 4, PROMISE = 8, BURY = 16, RESTORED = 32, INHERIT = 64, FILE_TOO = 128 };

static char *text_of(const struct lineage *l)
{
    char *text = lineage_encode(l, VM);

    CHECK(text);
    return text;
}

/* -- a disk as QEMU would show it ---------------------------------------------------------------------------------- */
struct shown {
    struct image images[IMAGES];
    struct layer layers[2];
    struct checkpoint checkpoints[2];
    struct disk disk;
    struct disk_list list;
};

static void show(struct shown *s)
{
    *s = (struct shown){
        .images = {{.node = (char *)"top", .file = (char *)"/a", .dev = 1, .ino = 2, .born_ns = 3},
                   {.node = (char *)"mid", .level = 1, .file = (char *)"/b", .read_only = true, .dev = 1, .ino = 4},
                   {.node = (char *)"low", .level = 2, .file = (char *)"/c", .read_only = true}},
        .layers = {{.node = (char *)"top", .merge = true, .granularity = 65536, .dirty = MIB},
                   {.node = (char *)"mid", .depth = 1, .merge = true, .granularity = 65536}},
    };
    s->checkpoints[0] = (struct checkpoint){.name = (char *)"m", .nlayers = 2, .layers = s->layers};
    s->checkpoints[1] = (struct checkpoint){.name = (char *)"n", .nlayers = 1, .layers = s->layers};
    s->disk = (struct disk){.name = (char *)"vda",
                            .node = (char *)"top",
                            .top = (char *)"top",
                            .format = (char *)"qcow2",
                            .size = 8 * MIB,
                            .tracked = true,
                            .nimages = IMAGES,
                            .images = s->images,
                            .ncheckpoints = 2,
                            .checkpoints = s->checkpoints};
    s->list = (struct disk_list){.ndisks = 1, .disks = &s->disk};
}

static void use(struct lineage *l, unsigned what)
{
    struct shown s;
    struct failure why = {0};
    const char *root;

    show(&s);
    if (what & RESTORED)
        (void)lineage_restored(l, "vda");
    if (what & RUNNING)
        CHECK(lineage_look_running(l, &s.list, what & JOBS) == 0);
    else if (lineage_look_stopped(l, &s.list, &why) < 0)
        CHECK(why.text[0]);
    if (what & LOOK)
        CHECK(lineage_look(l, &s.list, what & JOBS) == 0);
    if (what & PROMISE)
        CHECK(lineage_promise(l, &s.disk, "m", &s.images[1],
                              what & BURY      ? JOB_STREAM
                              : what & INHERIT ? JOB_COMMIT
                                               : JOB_MIRROR) == 0);
    if (what & RESTORED)
        lineage_lost(l);
    (void)lineage_is_promised(l, "vda", "m", &s.images[1]);
    root = lineage_root(l, &s.disk, "m");
    CHECK(!root || strlen(root) == 3);
    if (what & BURY)
        CHECK(lineage_bury(l, &s.disk, "n") == 0);
    show(&s);
    CHECK(lineage_look(l, &s.list, false) == 0);
    for (size_t i = 0; i < 2; i++)
        CHECK(s.checkpoints[i].reason <= REASON_BUSY);
    (void)lineage_why_lost(l, "vda", "gone");
    lineage_accept(l, NULL, "m");
    lineage_forget(l, "vda", "n");
}

static void files(const struct input *in)
{
    static int state_dir = -1;
    char path[128];
    struct lineage *l = NULL;
    struct failure why = {0};
    int fd;

    (void)snprintf(path, sizeof(path), "%s/" LINEAGE_DIR, fuzz_folder_path());
    if (state_dir < 0) {
        CHECK(mkdir(path, 0700) == 0);
        state_dir = open(fuzz_folder_path(), O_PATH | O_DIRECTORY | O_CLOEXEC);
    }
    (void)snprintf(path, sizeof(path), "%s/" LINEAGE_DIR "/" VM ".json", fuzz_folder_path());
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, in->data, in->size) == (ssize_t)in->size);
    (void)close(fd);
    CHECK(lineage_load(state_dir, VM, &l, &why) == 0 && l);
    CHECK((why.err != 0) == (access(path, F_OK) < 0)); /* set aside, and told */
    lineage_free(l);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    unsigned what = input_byte(&in);
    _cleanup_free_ char *bytes = input_string(&in), *first = NULL, *second = NULL, *used = NULL;
    struct lineage *l = NULL, *copy = NULL, *other = NULL;
    struct failure why = {0};
    int r = lineage_decode(bytes, in.size, &l, &why);

    CHECK((r < 0) == (l == NULL) && (r == 0 || (why.err == r && why.text[0])));
    if (what & FILE_TOO)
        files(&in);
    if (!l)
        return 0;
    first = text_of(l);
    CHECK(lineage_decode(first, strlen(first), &copy, &why) == 0);
    second = text_of(copy);
    CHECK(strcmp(first, second) == 0);
    use(l, what);
    used = text_of(l);
    CHECK(lineage_decode(used, strlen(used), &other, &why) == 0); /* what we write can be read */
    if (what & INHERIT)
        (void)lineage_inherit(copy, other);
    lineage_free(other);
    lineage_free(copy);
    lineage_free(l);
    return 0;
}
