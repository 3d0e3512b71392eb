#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Filters stacked on one another change nothing about the data.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
run_nbdkit "nbdcopy \"\$uri\" $work/out.img" --filter=log --filter=stats --filter=limit --filter=cow --filter=readahead \
    --filter=blocksize --filter=retry --filter=rate -- "$work/vm.qmp" disk=vda rate=800M logfile="$work/log" \
    statsfile="$work/stats" limit=8 maxdata=64k "${common[@]}"
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
nothing_left vm
check_nbdkit_log
