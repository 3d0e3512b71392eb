/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What is said about one VM: its name, its disks and their names, its images. */
#include "config_internal.h"

#include <errno.h>

/* A name becomes part of export names VM/DISK@CHECKPOINT and of log lines. */
static int check_name(const char *what, const char *name, struct failure *f)
{
    if (!*name)
        return failure_set(f, -EINVAL, "the %s is empty", what);
    if (strlen(name) > CONFIG_NAME_MAX)
        return failure_set(f, -EINVAL, "the %s is longer than %u bytes", what, CONFIG_NAME_MAX);
    for (const unsigned char *s = (const unsigned char *)name; *s; s++)
        if (*s < 0x20 || *s == 0x7f || *s == '/' || *s == '@')
            return failure_set(f, -EINVAL, "the %s \"%s\" may not have \"/\", \"@\" or control characters in it", what,
                               name);
    return 0;
}

/* -- virtual machines ---------------------------------------------------------------------------------------------- */
struct config_vm *config_find_vm(struct server_config *c, const char *name)
{
    for (size_t i = 0; i < c->nvms; i++)
        if (strcmp(c->vms[i].name, name) == 0)
            return &c->vms[i];
    return NULL;
}

/* NULL: failed. */
struct config_vm *config_add_vm(struct server_config *c, const char *name, struct failure *f)
{
    struct config_vm *vms;

    if (check_name("VM's name", name, f) < 0)
        return NULL;
    if (c->nvms == CONFIG_VMS_MAX) {
        (void)failure_set(f, -EINVAL, "more than %u VMs", CONFIG_VMS_MAX);
        return NULL;
    }
    vms = reallocarray(c->vms, c->nvms + 1, sizeof *vms);
    if (vms) {
        c->vms = vms;
        vms[c->nvms] = (struct config_vm){.name = strdup(name)};
    }
    if (!vms || !vms[c->nvms].name) {
        (void)failure_set(f, -ENOMEM, "out of memory");
        return NULL;
    }
    return &vms[c->nvms++];
}

/* "NAME=" and what follows it: the VM, which another flag may name later. NULL: the sentence is in f. */
static struct config_vm *vm_of(struct server_config *c, const char *value, const char *follows, const char **ret_rest,
                               struct failure *f)
{
    _cleanup_free_ char *name = NULL;
    const char *equals = strchr(value, '=');
    struct config_vm *vm;

    if (!equals) {
        (void)failure_set(f, -EINVAL, "\"%s\" is not NAME=%s", value, follows);
        return NULL;
    }
    name = strndup(value, (size_t)(equals - value));
    if (!name) {
        (void)failure_set(f, -ENOMEM, "out of memory");
        return NULL;
    }
    vm = config_find_vm(c, name);
    *ret_rest = equals + 1;
    return vm ? vm : config_add_vm(c, name, f);
}

int config_set_vm(struct server_config *c, const char *value, bool by_flag, struct failure *f)
{
    const char *path;
    struct config_vm *vm = vm_of(c, value, "QMP_SOCKET", &path, f);

    if (!vm)
        return f->err;
    if (vm->qmp && (!by_flag || vm->by_flag))
        return failure_set(f, -EINVAL, "the VM \"%s\" is there twice", vm->name);
    vm->by_flag = by_flag;
    return config_set_path(&vm->qmp, path, f);
}

int config_set_qga(struct server_config *c, const char *value, bool by_flag, struct failure *f)
{
    const char *path;
    struct config_vm *vm = vm_of(c, value, "SOCKET", &path, f);

    if (!vm)
        return f->err;
    if (vm->qga && (!by_flag || vm->qga_by_flag))
        return failure_set(f, -EINVAL, "the guest agent of VM \"%s\" is there twice", vm->name);
    vm->qga_by_flag = by_flag;
    return config_set_path(&vm->qga, path, f);
}

/* disks= of a VM: names, with commas or blanks between them. */
int config_set_disks(struct config_vm *vm, const char *value, bool goes_on, struct failure *f)
{
    if (vm->disks_said && !goes_on)
        return failure_set(f, -EINVAL, "\"disks\" is there twice");
    vm->disks_said = true;
    for (const char *s = value + strspn(value, ", \t"); *s; s += strspn(s, ", \t")) {
        size_t len = strcspn(s, ", \t");
        char **disks;

        if (vm->ndisks == CONFIG_DISKS_MAX)
            return failure_set(f, -EINVAL, "more than %u disks", CONFIG_DISKS_MAX);
        disks = reallocarray(vm->disks, vm->ndisks + 1, sizeof *disks);
        if (!disks)
            return failure_set(f, -ENOMEM, "out of memory");
        vm->disks = disks;
        disks[vm->ndisks] = strndup(s, len);
        if (!disks[vm->ndisks])
            return failure_set(f, -ENOMEM, "out of memory");
        vm->ndisks++;
        for (size_t i = 0; i + 1 < vm->ndisks; i++)
            if (strcmp(disks[i], disks[vm->ndisks - 1]) == 0)
                return failure_set(f, -EINVAL, "the disk \"%s\" is there twice", disks[i]);
        s += len;
    }
    if (vm->ndisks == 0)
        return failure_set(f, -EINVAL, "\"disks\" names no disk; leave it out for all disks");
    return 0;
}

int config_set_vm_engine(struct config_vm *vm, const char *value, struct failure *f)
{
    if (vm->engine_said)
        return failure_set(f, -EINVAL, "\"engine\" is there twice");
    vm->engine_said = true;
    return config_set_engine(&vm->engine, value, f);
}

int config_set_rename(struct config_vm *vm, const char *name, const char *target, struct failure *f)
{
    struct config_rename *renames;
    int r;

    r = check_name("disk's name", name, f);
    if (r < 0)
        return r;
    if (!*target)
        return failure_set(f, -EINVAL, "\"disk.%s\" names no qdev id and no node", name);
    for (size_t i = 0; i < vm->nrenames; i++) {
        if (strcmp(vm->renames[i].name, name) == 0)
            return failure_set(f, -EINVAL, "\"disk.%s\" is there twice", name);
        if (strcmp(vm->renames[i].target, target) == 0)
            return failure_set(f, -EINVAL, "\"%s\" has the name \"%s\" already", target, vm->renames[i].name);
    }
    if (vm->nrenames == CONFIG_DISKS_MAX)
        return failure_set(f, -EINVAL, "more than %u disk names", CONFIG_DISKS_MAX);
    renames = reallocarray(vm->renames, vm->nrenames + 1, sizeof *renames);
    if (!renames)
        return failure_set(f, -ENOMEM, "out of memory");
    vm->renames = renames;
    renames[vm->nrenames] = (struct config_rename){.name = strdup(name), .target = strdup(target)};
    vm->nrenames++;
    if (!renames[vm->nrenames - 1].name || !renames[vm->nrenames - 1].target)
        return failure_set(f, -ENOMEM, "out of memory");
    return 0;
}

/* -- images -------------------------------------------------------------------------------------------------------- */

/*
 * The formats that may be named. What is not named is found by looking (server/images_look.c).
 * QEMU writes bitmaps into qcow2 only; the others can be read.
 */
static const char *const formats[] = {"raw", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"};

static const char *named_format(const char *value)
{
    for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
        size_t len = strlen(formats[i]);

        if (strncmp(value, formats[i], len) == 0 && value[len] == ':')
            return formats[i];
    }
    return NULL;
}

static void image_done(struct config_image *image)
{
    free(image->disk);
    free(image->path);
}

int config_set_image(struct config_vm *vm, const char *disk, const char *value, bool by_flag, struct failure *f)
{
    const char *format = named_format(value);
    const char *path = value + (format ? strlen(format) + 1 : 0);
    struct config_image *images, *old = NULL, new = {.format = format, .by_flag = by_flag};

    if (check_name("disk's name", disk, f) < 0)
        return f->err;
    if (!*path)
        return failure_set(f, -EINVAL, "the image of disk \"%s\" has no path", disk);
    for (size_t i = 0; i < vm->nimages; i++) {
        if (strcmp(vm->images[i].disk, disk) == 0)
            old = &vm->images[i];
        else if (strcmp(vm->images[i].path, path) == 0)
            return failure_set(f, -EINVAL, "%s is the image of disk \"%s\" already", path, vm->images[i].disk);
    }
    if (old && (!by_flag || old->by_flag))
        return failure_set(f, -EINVAL, "the image of disk \"%s\" is there twice", disk);
    if (!old && vm->nimages == CONFIG_DISKS_MAX)
        return failure_set(f, -EINVAL, "more than %u images", CONFIG_DISKS_MAX);
    new.disk = strdup(disk);
    new.path = strdup(path);
    images = old ? vm->images : reallocarray(vm->images, vm->nimages + 1, sizeof *images);
    if (images)
        vm->images = images;
    if (!new.disk || !new.path || !images) {
        image_done(&new);
        return failure_set(f, -ENOMEM, "out of memory");
    }
    if (old) {
        image_done(old);
        *old = new;
    } else {
        images[vm->nimages++] = new;
    }
    return 0;
}

/* VM/DISK=PATH: a VM's name has no "/", and the first "=" ends the disk's name. */
int config_set_image_of(struct server_config *c, const char *value, bool by_flag, struct failure *f)
{
    const char *slash = strchr(value, '/'), *equals = strchr(value, '=');
    _cleanup_free_ char *name = NULL, *disk = NULL;
    struct config_vm *vm;

    if (!slash || !equals || equals < slash)
        return failure_set(f, -EINVAL, "\"%s\" is not VM/DISK=PATH", value);
    name = strndup(value, (size_t)(slash - value));
    disk = strndup(slash + 1, (size_t)(equals - slash - 1));
    if (!name || !disk)
        return failure_set(f, -ENOMEM, "out of memory");
    vm = config_find_vm(c, name);
    if (!vm)
        vm = config_add_vm(c, name, f);
    return vm ? config_set_image(vm, disk, equals + 1, by_flag, f) : f->err;
}

/* -- one VM, as it was and as it is ----------------------------------------------------------------------------------
 */
static bool same(const char *a, const char *b)
{
    return a && b ? strcmp(a, b) == 0 : a == b;
}

static bool same_disks(const struct config_vm *a, const struct config_vm *b)
{
    if (a->ndisks != b->ndisks || a->nrenames != b->nrenames)
        return false;
    for (size_t i = 0; i < a->ndisks; i++)
        if (!same(a->disks[i], b->disks[i]))
            return false;
    for (size_t i = 0; i < a->nrenames; i++)
        if (!same(a->renames[i].name, b->renames[i].name) || !same(a->renames[i].target, b->renames[i].target))
            return false;
    return true;
}

static bool same_images(const struct config_vm *a, const struct config_vm *b)
{
    if (a->nimages != b->nimages)
        return false;
    for (size_t i = 0; i < a->nimages; i++) {
        const struct config_image *x = &a->images[i], *y = &b->images[i];

        if (!same(x->disk, y->disk) || !same(x->path, y->path) || !same(x->format, y->format))
            return false;
    }
    return true;
}

bool config_vm_alike(const struct config_vm *a, const struct config_vm *b)
{
    return same(a->qmp, b->qmp) && same(a->qga, b->qga) && a->quiesce_said == b->quiesce_said &&
           (!a->quiesce_said || a->quiesce == b->quiesce) && a->engine_said == b->engine_said &&
           (!a->engine_said || a->engine == b->engine) &&
           same(a->place ? place_text(a->place) : NULL, b->place ? place_text(b->place) : NULL) && same_disks(a, b) &&
           same_images(a, b);
}

void config_vm_done(struct config_vm *vm)
{
    for (size_t i = 0; i < vm->ndisks; i++)
        free(vm->disks[i]);
    for (size_t i = 0; i < vm->nrenames; i++) {
        free(vm->renames[i].name);
        free(vm->renames[i].target);
    }
    for (size_t i = 0; i < vm->nimages; i++)
        image_done(&vm->images[i]);
    free(vm->disks);
    free(vm->renames);
    free(vm->images);
    place_free(vm->place);
    free(vm->name);
    free(vm->qmp);
    free(vm->qga);
}
