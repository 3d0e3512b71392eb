/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * limits: everything that one NBD client can make us keep or do, and why the number is what it is. NBD_NAME_MAX (nbd.h)
 * is the spec's own. Constants only.
 */
#ifndef QPULL_NBD_LIMITS_H
#define QPULL_NBD_LIMITS_H

/*
 * Options a connection may send before it has to come to a point. A client that asks INFO and META_CONTEXT of some
 * hundred disks over one connection fits; endless haggling, which no request timeout would end, does not.
 */
#define NBD_OPTIONS_MAX 1024

/* Information requests of INFO and GO that we read. The spec knows four; nobody asks for more than some of them. */
#define NBD_INFO_REQUESTS_MAX 256

/* Data of LIST/SET_META_CONTEXT, kept while the owner looks for the answer: a long name and some hundred queries. */
#define NBD_META_DATA_MAX 65536

/* Queries in one of them. Each is compared with every context of the export, so this bounds work, not memory. */
#define NBD_QUERIES_MAX 256

/*
 * Contexts that one connection may select. Each is a chunk in every BLOCK_STATUS reply and a map in memory; a client
 * compares a handful of checkpoints at most.
 */
#define NBD_CONTEXTS_MAX 64

/*
 * Data of a refused option that we drop before we answer. Beyond this the connection ends: reading on would be work for
 * nothing. No option of the spec comes near.
 */
#define NBD_OPTION_SKIP_MAX (1u << 20)

/*
 * Bytes taken while an ask is not answered yet. The spec lets a client send nothing then; the reading goes on only so
 * that a client that leaves is noticed, and a few hasty options do no harm.
 */
#define NBD_STASH_MAX 1024

/* Requests in flight: what nbdcopy sends by default (QEMU's client: 16). Each costs sizeof(struct nbd_request). */
#define NBD_INFLIGHT_MAX 64

/*
 * Payload of a refused request that we drop before we answer. The spec asks servers to bear less than 2^25; libnbd and
 * nbdkit go up to 2^26.
 */
#define NBD_PAYLOAD_SKIP_MAX (1u << 26)

/*
 * Longest READ with the "don't fragment" flag. The spec demands 65,536 at least. Such a chunk must be finished with
 * zeros when the disk fails half-way, and its pieces must be put in order by the owner, so it is not to be long.
 */
#define NBD_DF_MAX (1u << 20)

/* Ceiling of nbd_export.max_block: the length of a data chunk (8 more) then fits the 32 bits of its header. */
#define NBD_BLOCK_MAX (1u << 30)

/* max_block where the owner names none: what the spec lets a client assume. */
#define NBD_BLOCK_DEFAULT (1u << 25)

/*
 * Extents in one BLOCK_STATUS reply, all contexts together: 256 KiB in the wider form. The spec's own advice is 2^20 in
 * one chunk; a client just asks again where the answer stopped, and 64 replies carry a million extents.
 */
#define NBD_EXTENTS_MAX 16384

/* Bytes of a sentence to the client: that of a struct failure (the spec's limit is 4096). */
#define NBD_MESSAGE_MAX 512

#endif
