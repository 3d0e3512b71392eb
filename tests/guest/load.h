/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * load: the guest's disks and its background work on them: one thread per load, and one for the numbered records.
 *
 * Started and stopped from the command thread only. Answers are written into the caller's buffer as "key=value …".
 */
#ifndef QPULL_GUEST_LOAD_H
#define QPULL_GUEST_LOAD_H

#include "pattern.h"

#define NAME_LEN 32
#define MAX_DISKS 16
#define IO_ALIGN 4096           /* what O_DIRECT asks of buffers */
#define MAX_LOAD_LEN (1u << 18) /* longest operation of a load: the kernel does not split it, so it is there or not */

/* Opens the disk with this serial number (or /dev name) with O_DIRECT; waits a little for one that is being plugged in.
 */
int disk_open(const char *name, uint64_t *ret_size);
int disk_zero(int fd, uint64_t offset, uint64_t len);
int disk_discard(int fd, uint64_t offset, uint64_t len);
uint64_t now_us(void);

/* Every failed operation since boot, by command or load, comes here; any thread. */
void error_note(const char *disk, const char *what, uint64_t offset, int error);
void error_report(char *answer, size_t len);

/* 0 or negative errno with a sentence in answer. Plan sizes of 0 mean the whole disk. limit 0: until stopped. */
int load_start(const char *disk, struct load_plan *plan, uint64_t limit, uint32_t pause_us, char *answer, size_t len);
int load_status(const char *disk, char *answer, size_t len);
/* Waits for the load's limit if wait is set, stops it otherwise. */
int load_stop(const char *disk, bool wait, char *answer, size_t len);

int order_start(char *const *disks, unsigned ndisks, uint64_t seed, uint64_t at, uint32_t block, uint32_t ring,
                char *answer, size_t len);
int order_status(char *answer, size_t len);
int order_stop(char *answer, size_t len);

#endif
