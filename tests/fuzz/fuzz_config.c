/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The configuration, as a file and as flags: up to the first 0 the input is the file, then flags with 0 between. What
 * is taken keeps its limits; what is refused is refused in words.
 */
#include "config.h"
#include "fuzz.h"

#include <errno.h>
#include <sys/mman.h>

#define FLAGS_MAX 16

/* Other files than ours are none of its business ("--conf" is short for "--config"). */
static bool names_a_file(const char *word)
{
    return strncmp(word, "--conf", 6) == 0;
}

static void check_name(const char *name)
{
    CHECK(name && name[0] && strlen(name) <= CONFIG_NAME_MAX);
}

static void check(const struct server_config *c)
{
    CHECK(c->nvms <= CONFIG_VMS_MAX && c->nlisteners <= CONFIG_LISTENERS_MAX && c->nlisteners > 0);
    CHECK(c->control && c->scratch && c->state);
    CHECK(c->max_connections <= CONFIG_CONNECTIONS_MAX && c->threads <= TLS_THREADS_MAX);
    CHECK(c->access.nrules <= CONFIG_RULES_MAX);
    CHECK(c->handshake_timeout_ms > 0 && c->cbw_timeout_s > 0);
    for (size_t i = 0; i < c->nlisteners; i++)
        CHECK(c->listeners[i].text && (c->listeners[i].type != LISTEN_TCP || c->listeners[i].host));
    for (size_t i = 0; i < c->nvms; i++) {
        const struct config_vm *vm = &c->vms[i];

        check_name(vm->name);
        CHECK(vm->qmp || vm->nimages > 0);
        CHECK(vm->ndisks <= CONFIG_DISKS_MAX && vm->nrenames <= CONFIG_DISKS_MAX && vm->nimages <= CONFIG_DISKS_MAX);
        for (size_t k = 0; k < vm->ndisks; k++)
            CHECK(vm->disks[k][0]);
        for (size_t k = 0; k < vm->nrenames; k++) {
            check_name(vm->renames[k].name);
            CHECK(vm->renames[k].target[0]);
        }
        for (size_t k = 0; k < vm->nimages; k++) {
            check_name(vm->images[k].disk);
            CHECK(vm->images[k].path[0]);
        }
        for (size_t k = 0; k < i; k++)
            CHECK(strcmp(vm->name, c->vms[k].name) != 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1;
    static char path[64];
    struct input in = {data, size}, file = input_take_text(&in);
    char *argv[FLAGS_MAX + 3] = {(char *)"qpulld", (char *)"--config", path}, *words[FLAGS_MAX];
    struct server_config *config = NULL;
    struct failure why = {0};
    int argc = 3, nwords = 0, r;

    if (fd < 0) {
        fd = memfd_create("config", MFD_CLOEXEC);
        CHECK(fd >= 0);
        (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    }
    CHECK(ftruncate(fd, 0) == 0 && pwrite(fd, file.data, file.size, 0) == (ssize_t)file.size);
    while (in.size > 0 && nwords < FLAGS_MAX) {
        struct input word = input_take_text(&in);

        words[nwords] = input_string(&word);
        if (!names_a_file(words[nwords]))
            argv[argc++] = words[nwords];
        nwords++;
    }
    r = config_parse(argc, argv, &config, &why);
    CHECK((r < 0) == (config == NULL));
    CHECK(r >= 0 || (why.err < 0 && why.text[0]));
    if (config && config->wish != CONFIG_HELP && config->wish != CONFIG_VERSION)
        check(config);
    config_free(config);
    for (int i = 0; i < nwords; i++)
        free(words[i]);
    return 0;
}
