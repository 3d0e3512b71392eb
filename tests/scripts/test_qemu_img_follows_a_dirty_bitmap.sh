#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# qemu-img map with x-dirty-bitmap: how QEMU's own tools do an incremental.
. "$(dirname "$0")/functions.sh"
requires nbdcopy
disk vda qcow2 4M
start_vm vm vda:qcow2
start_qpulld vm
nbdcopy "$(uri vm/vda@monday)" "$work/full"
wait_idle vm
guest_write vm vda 'write -q -P 5 3M 64k'
options="driver=nbd,export=vm/vda,server.type=unix,server.path=$socket,x-dirty-bitmap=qemu:dirty-bitmap:monday"
map=$(qemu-img map --output=json --image-opts "$options")
# What is dirty is "data": false there (block/nbd.c: the flag has the place of a hole).
expect "$map" '"start": 3145728, "length": 65536, .*"data": false' '"start": 0, "length": 3145728, .*"data": true'
wait_idle vm
stop_qpulld
