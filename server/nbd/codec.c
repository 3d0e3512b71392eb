/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "nbd/codec.h"

#include <endian.h>
#include <string.h>

uint8_t *codec_put16(uint8_t *p, uint16_t v)
{
    uint16_t v_be = htobe16(v);

    memcpy(p, &v_be, sizeof(v_be));
    return p + sizeof(v_be);
}

uint8_t *codec_put32(uint8_t *p, uint32_t v)
{
    uint32_t v_be = htobe32(v);

    memcpy(p, &v_be, sizeof(v_be));
    return p + sizeof(v_be);
}

uint8_t *codec_put64(uint8_t *p, uint64_t v)
{
    uint64_t v_be = htobe64(v);

    memcpy(p, &v_be, sizeof(v_be));
    return p + sizeof(v_be);
}

uint8_t *codec_put_bytes(uint8_t *p, const void *bytes, size_t len)
{
    if (len > 0)
        memcpy(p, bytes, len);
    return p + len;
}

uint16_t codec_get16(const uint8_t *p)
{
    uint16_t v_be;

    memcpy(&v_be, p, sizeof(v_be));
    return be16toh(v_be);
}

uint32_t codec_get32(const uint8_t *p)
{
    uint32_t v_be;

    memcpy(&v_be, p, sizeof(v_be));
    return be32toh(v_be);
}

uint64_t codec_get64(const uint8_t *p)
{
    uint64_t v_be;

    memcpy(&v_be, p, sizeof(v_be));
    return be64toh(v_be);
}

bool codec_read_bytes(struct codec_reader *r, size_t len, const uint8_t **ret_bytes)
{
    if (r->left < len)
        return false;
    *ret_bytes = r->p;
    r->p += len;
    r->left -= len;
    return true;
}

bool codec_read16(struct codec_reader *r, uint16_t *ret_v)
{
    const uint8_t *p;

    if (!codec_read_bytes(r, sizeof(*ret_v), &p))
        return false;
    *ret_v = codec_get16(p);
    return true;
}

bool codec_read32(struct codec_reader *r, uint32_t *ret_v)
{
    const uint8_t *p;

    if (!codec_read_bytes(r, sizeof(*ret_v), &p))
        return false;
    *ret_v = codec_get32(p);
    return true;
}

size_t codec_cut(const char *s, size_t max)
{
    size_t len = strnlen(s, max + 1);

    if (len <= max)
        return len;
    len = max;
    while (len > 0 && ((unsigned char)s[len] & 0xc0) == 0x80) /* 10xxxxxx: inside a character */
        len--;
    return len;
}
