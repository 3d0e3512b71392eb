/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * frozen_reader: reads ranges of an NBD export through source/nbd, exactly as qpulld does, and writes them to stdout
 * one after the other. For the tests that look at the source itself on a graph of a real QEMU, with and without its
 * bound on the reads.
 *
 *   frozen_reader SOCKET EXPORT CLUSTER OFFSET LENGTH [OFFSET LENGTH …]        CLUSTER 0: reads are not bounded
 *
 * All ranges are asked for at once. Exit status 0; 1 with a sentence on stderr.
 */
#include "source/nbd.h"

#include <stdio.h>
#include <stdlib.h>

#define FIRST_RANGE 4 /* index in argv */
#define TIMEOUT_MS 30000

struct reader {
    struct source *source;
    struct source_read *reads; /* owned */
    size_t nreads, npending;
    int err;
};

static void on_lost(void *arg, const struct failure *why)
{
    fprintf(stderr, "lost: %s\n", why->text);
}

static void on_read(struct source_read *r, int err)
{
    struct reader *reader = r->arg;

    if (err)
        reader->err = err;
    if (--reader->npending == 0)
        source_close(TAKE_PTR(reader->source), NULL, NULL);
}

static void on_open(void *arg, struct source *source, const struct failure *f)
{
    struct reader *reader = arg;

    if (f) {
        fprintf(stderr, "%s\n", f->text);
        reader->err = f->err;
        return;
    }
    reader->source = source;
    reader->npending = 1; /* ours, so that a refused read cannot close the source under the loop */
    for (size_t i = 0; i < reader->nreads; i++) {
        int r = source_read(source, &reader->reads[i]);

        if (r < 0)
            reader->err = r;
        else
            reader->npending++;
    }
    if (--reader->npending == 0)
        source_close(TAKE_PTR(reader->source), NULL, NULL);
}

int main(int argc, char **argv)
{
    struct reader reader = {.nreads = argc > FIRST_RANGE ? (size_t)(argc - FIRST_RANGE) / 2 : 0};
    struct source_nbd_config config = {.timeout_ms = TIMEOUT_MS};
    uv_loop_t loop;
    int r;

    if (reader.nreads == 0 || (argc - FIRST_RANGE) % 2 ||
        !(reader.reads = calloc(reader.nreads, sizeof(*reader.reads)))) {
        fprintf(stderr, "usage: frozen_reader SOCKET EXPORT CLUSTER OFFSET LENGTH [OFFSET LENGTH …]\n");
        return 1;
    }
    config.socket_path = argv[1];
    config.export_name = argv[2];
    config.cluster = (uint32_t)strtoul(argv[3], NULL, 0);
    for (size_t i = 0; i < reader.nreads; i++) {
        struct source_read *read = &reader.reads[i];

        read->offset = strtoull(argv[FIRST_RANGE + 2 * i], NULL, 0);
        read->length = strtoull(argv[FIRST_RANGE + 2 * i + 1], NULL, 0);
        read->buffer = calloc(1, read->length);
        read->cb = on_read;
        read->arg = &reader;
        if (!read->buffer)
            reader.err = -ENOMEM;
    }
    (void)uv_loop_init(&loop);
    r = source_nbd_open(&loop, &config, on_lost, on_open, &reader, NULL);
    if (r < 0)
        reader.err = r;
    (void)uv_run(&loop, UV_RUN_DEFAULT);
    (void)uv_loop_close(&loop);
    for (size_t i = 0; i < reader.nreads; i++) {
        if (!reader.err && fwrite(reader.reads[i].buffer, 1, reader.reads[i].length, stdout) != reader.reads[i].length)
            reader.err = -EIO;
        free(reader.reads[i].buffer);
    }
    free(reader.reads);
    if (reader.err)
        fprintf(stderr, "reading failed: %s\n", strerror(-reader.err));
    return reader.err ? 1 : 0;
}
