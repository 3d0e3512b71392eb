/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The inside of the configuration's parser, shared by config.c (options, the file) and config_vm.c (what is said about
 * one VM). Negative: the sentence is in f, without the place where it was said.
 */
#ifndef QPULL_CONFIG_INTERNAL_H
#define QPULL_CONFIG_INTERNAL_H

#include "config.h"

/* config.c */
/* DIR, or where places are allowed alone (dir NULL) the JSON object of one. */
int config_set_scratch(char **dir, struct place **place, const char *value, struct failure *f);
int config_set_path(char **to, const char *value, struct failure *f);
int config_set_engine(enum engine *to, const char *value, struct failure *f);

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
void config_vm_done(struct config_vm *vm);

#endif
