/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The inside of the configuration's parser, shared by config.c (options, the file), config_listener.c (where clients come
 * in), config_vm.c (what is said about one VM) and config_value.c (words). Negative: the sentence is in f, without the spot where it was said.
 */
#ifndef QPULL_CONFIG_INTERNAL_H
#define QPULL_CONFIG_INTERNAL_H

#include "config.h"

/* config.c */
unsigned config_line_of(const struct server_config *c, const char *key); /* of the file; 0: by a flag, or not said */

/* config_value.c */
int config_set_string(char **to, const char *value, struct failure *f);
int config_set_seconds(unsigned *to_ms, const char *value, struct failure *f); /* "10", "0.5": three decimals at most */
int config_set_count(unsigned *to, const char *value, unsigned max, struct failure *f);
int config_set_size(uint64_t *to, const char *value, struct failure *f); /* "4096", "10G": powers of 1024 */
int config_set_rate(uint64_t *to, const char *value, struct failure *f); /* a size; 0: any */
int config_set_bool(bool *to, const char *value, struct failure *f);
int config_set_quiesce(enum quiesce_mode *to, const char *value, struct failure *f);
int config_set_give_back(enum config_give_back *to, const char *value, struct failure *f);
/* DIR, or where places are allowed alone (dir NULL) the JSON object of one. */
int config_set_scratch(char **dir, struct place **place, const char *value, struct failure *f);
int config_set_tls(enum config_tls *to, const char *value, struct failure *f);
int config_set_mode(unsigned *to, const char *value, struct failure *f);
int config_set_sandbox(enum sandbox_mode *to, const char *value, struct failure *f);
int config_set_path(char **to, const char *value, struct failure *f);
int config_set_engine(enum engine *to, const char *value, struct failure *f);

/* config_listener.c */
int config_add_listener(struct server_config *c, const char *value, struct failure *f);
void config_drop_listeners(struct server_config *c);

/* config_vm.c */
struct config_vm *config_find_vm(struct server_config *c, const char *name);
struct config_vm *config_add_vm(struct server_config *c, const char *name, struct failure *f); /* NULL: failed */
int config_set_vm(struct server_config *c, const char *value, bool by_flag, struct failure *f);
int config_set_qga(struct server_config *c, const char *value, bool by_flag, struct failure *f);
int config_set_disks(struct config_vm *vm, const char *value, bool goes_on, struct failure *f);
int config_set_rename(struct config_vm *vm, const char *name, const char *target, struct failure *f);
int config_set_image(struct config_vm *vm, const char *disk, const char *value, bool by_flag, struct failure *f);
int config_set_image_of(struct server_config *c, const char *value, bool by_flag, struct failure *f);
int config_set_vm_engine(struct config_vm *vm, const char *value, struct failure *f);

#endif
