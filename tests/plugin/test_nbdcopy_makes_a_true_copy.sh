#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# An unmodified nbdcopy gets the whole disk, and nothing is left in QEMU when nbdkit has ended.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
run_nbdkit "nbdcopy \"\$uri\" $work/out.img" -- "$work/vm.qmp" disk=vda "${common[@]}"
nothing_left vm
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
test "$(bitmaps vm)" = '[]'
check_nbdkit_log
