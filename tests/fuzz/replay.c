/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * replay: a main() for a fuzz target built without libFuzzer: gives it each file that is named, or that lies in a
 * folder that is named, once. A folder that does not exist counts as empty; nothing to replay at all is a skipped test
 * (77).
 */
#include "qmp/base.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>

#define EXIT_SKIPPED 77
#define FILE_MAX (16u << 20) /* bytes; corpora are small */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned nreplayed;

static int replay_stream(FILE *file)
{
    uint8_t *data = malloc(FILE_MAX), *exact;
    size_t size;

    if (!data)
        return -1;
    size = fread(data, 1, FILE_MAX, file);
    /* A block of just that size, so that reading beyond it is seen. */
    exact = realloc(data, MAX(size, 1));
    if (!exact)
        exact = data;
    (void)LLVMFuzzerTestOneInput(exact, size); /* a hint for libFuzzer's corpus, nothing to us */
    free(exact);
    nreplayed++;
    return 0;
}

static int replay_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    int ret;

    if (!file) {
        perror(path);
        return -1;
    }
    ret = replay_stream(file);
    (void)fclose(file);
    return ret;
}

static int replay_folder(const char *path, DIR *dir)
{
    int ret = 0;

    for (struct dirent *e = readdir(dir); e && ret == 0; e = readdir(dir)) {
        _cleanup_free_ char *file = NULL;

        if (e->d_name[0] == '.')
            continue;
        if (asprintf(&file, "%s/%s", path, e->d_name) < 0)
            return -1;
        ret = replay_file(file);
    }
    return ret;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        DIR *dir = opendir(argv[i]);
        int ret = 0;

        if (dir) {
            ret = replay_folder(argv[i], dir);
            (void)closedir(dir);
        } else if (errno == ENOTDIR) {
            ret = replay_file(argv[i]);
        } else if (errno != ENOENT) {
            perror(argv[i]);
            ret = -1;
        }
        if (ret < 0)
            return EXIT_FAILURE;
    }
    printf("%u inputs replayed\n", nreplayed);
    if (nreplayed == 0)
        printf("skipped: there is no corpus to replay\n");
    return nreplayed == 0 ? EXIT_SKIPPED : EXIT_SUCCESS;
}
