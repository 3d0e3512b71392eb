#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# The increment as a file of its own: what dirty-map= calls dirty, copied onto monday, is what the disk holds now.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
make_increment vm
run_nbdkit "nbdcopy \"\$uri\" $work/increment.img" -- "$work/vm.qmp" disk=vda since=monday map=dirty \
    dirty-map="$work/increment.json" "${common[@]}"
apply_increment "$work/monday.img" "$work/increment.img" "$work/increment.json"
same "$work/monday.img" "$work/now.img"
check_nbdkit_log
