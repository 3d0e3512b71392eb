#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Two QEMUs in two nbdkits, with the default place for notes shared.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
disk vdb qcow2 16M
start_vm one vda:qcow2
start_vm two vdb:qcow2
start_nbdkit -- "$work/one.qmp" disk=vda linger=60 "${common[@]}"
first=$nbdkit_pid one=$socket
socket=$work/two.sock
start_nbdkit -- "$work/two.qmp" disk=vdb linger=60 "${common[@]}"
nbdcopy "$(uri vdb)" "$work/two.img" &
other=$!
nbdcopy "nbd+unix:///vda?socket=$one" "$work/one.img"
wait $other
qemu-img compare -q -U -f raw -F qcow2 "$work/one.img" "$work/vda.img"
qemu-img compare -q -U -f raw -F qcow2 "$work/two.img" "$work/vdb.img"
stop_nbdkit
nbdkit_pid=$first
stop_nbdkit
nothing_left one
nothing_left two
