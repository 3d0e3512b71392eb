/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * catalog: what can be exported, found out by asking the VMs: the list of all disks, and the meaning of one export name
 * (VM/DISK, VM/DISK@NAME, or the empty name where there is exactly one disk). Freezes nothing and knows no NBD.
 *
 * Loop thread only. The catalog is the server's; a question is embedded in whoever asks.
 */
#ifndef QPULL_CATALOG_H
#define QPULL_CATALOG_H

#include "vm.h"

struct catalog {
    struct vm **vms; /* borrowed: the server's */
    size_t nvms;
};

/* NULL: no such VM. */
struct vm *catalog_vm(const struct catalog *c, const char *name);

struct catalog_entry {
    char *name;        /* owned: "VM/DISK" */
    char *description; /* owned: a few words, or NULL */
};

/* What an export name means. Borrowed until the callback returns, but vm. */
struct catalog_hit {
    struct vm *vm;
    const struct disk *disk;
    const char *checkpoint; /* of @NAME, or NULL */
    bool by_ticket;         /* nobody is to be told whose it is */
};

struct catalog_ask {
    /* Whether this VM is there for who asks; one that is not makes no difference to the answer, nor to its time. NULL:
     * all are. */
    bool (*sees)(const struct catalog_ask *a, const struct vm *vm);
    uint64_t content_ns; /* of a find: as of struct vm_query */
    /* entries of a list (borrowed until the callback returns); what cannot be asked now is left out */
    void (*on_list)(struct catalog_ask *a, const struct catalog_entry *entries, size_t nentries);
    /* one of hit and f is NULL */
    void (*on_find)(struct catalog_ask *a, const struct catalog_hit *hit, const struct failure *f);
    /* private */
    struct catalog_query *queries; /* owned: one for each VM that is asked */
    size_t nqueries, npending;
    char *name;                    /* owned: export name that is looked for; NULL: a list */
    struct catalog_entry *entries; /* owned */
    size_t nentries;
    const struct catalog *catalog; /* of the empty name: asked once more */
    struct failure failure;        /* of a list: no memory; of a find: the first that went wrong */
};

/*
 * Each answers once, later; or returns negative and never answers. sees, content_ns, and on_list or on_find are set by
 * the caller, the rest zeroed or left as the last callback left it.
 */
int catalog_list_start(const struct catalog *c, struct catalog_ask *a);
int catalog_find_start(const struct catalog *c, struct catalog_ask *a, const char *export_name, struct failure *f);
/* What is said of a name that nothing has. -ENOENT */
int catalog_unknown(const char *export_name, struct failure *f);
/* No callback any more; also if nothing is under way. */
void catalog_forget(struct catalog_ask *a);

/* "10 GiB", "512 MiB", "1000 bytes": the largest unit that keeps the number exact enough. */
char *catalog_size(char *to, size_t size, uint64_t bytes);

#endif
