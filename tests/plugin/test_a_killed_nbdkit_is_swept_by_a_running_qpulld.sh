#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# What a killed nbdkit has left, a running qpulld sweeps as soon as it gets the monitor.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
mkdir "$work/other"
start_nbdkit -- "$work/vm.qmp" disk=vda linger=60 checkpoint=never scratch="$work/scratch" state="$work/other"
nbdinfo "$(uri vda)" >/dev/null
socket=$work/qpulld.sock
start_qpulld vm
kill -9 $nbdkit_pid
wait $nbdkit_pid || true
nothing_left vm
nbdcopy "nbd://127.0.0.1:$port/vm/vda" "$work/out.img"
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
stop_qpulld
check_nbdkit_log
