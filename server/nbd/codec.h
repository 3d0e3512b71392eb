/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * codec: big-endian integers and strings, to and from bytes. Knows no message of the protocol. No state; any thread.
 */
#ifndef QPULL_NBD_CODEC_H
#define QPULL_NBD_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Each writes at p and returns the place behind. */
uint8_t *codec_put16(uint8_t *p, uint16_t v);
uint8_t *codec_put32(uint8_t *p, uint32_t v);
uint8_t *codec_put64(uint8_t *p, uint64_t v);
uint8_t *codec_put_bytes(uint8_t *p, const void *bytes, size_t len);

uint16_t codec_get16(const uint8_t *p);
uint32_t codec_get32(const uint8_t *p);
uint64_t codec_get64(const uint8_t *p);

/* Reads from bytes that may be too few: false then, and nothing is taken. */
struct codec_reader {
    const uint8_t *p; /* borrowed */
    size_t left;      /* bytes */
};
bool codec_read16(struct codec_reader *r, uint16_t *ret_v);
bool codec_read32(struct codec_reader *r, uint32_t *ret_v);
/* Points into the bytes read from. */
bool codec_read_bytes(struct codec_reader *r, size_t len, const uint8_t **ret_bytes);

/* How many bytes of s to send so that at most max go out and no UTF-8 character is cut in two. */
size_t codec_cut(const char *s, size_t max);

#endif
