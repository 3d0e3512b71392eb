#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# A full pull with @NAME makes a checkpoint, nbdinfo --map=qemu:dirty-bitmap:NAME shows what changed since.
. "$(dirname "$0")/functions.sh"
requires nbdinfo nbdcopy
disk vda qcow2 4M
start_vm vm vda:qcow2
start_qpulld vm
nbdcopy "$(uri vm/vda@monday)" null:
wait_idle vm
guest_write vm vda 'write -q -P 5 3M 64k'
expect "$(nbdinfo "$(uri vm/vda)")" 'qemu:dirty-bitmap:monday'
wait_idle vm
for u in "$(uri vm/vda)" "$(tcp_uri vm/vda)"; do
    map=$(nbdinfo --map=qemu:dirty-bitmap:monday "$u" | tr -s ' ')
    expect "$map" '^ 0 3145728 0 clean' '^ 3145728 65536 1 dirty' '^ 3211264 983040 0 clean'
    wait_idle vm
done
if nbdinfo --map=qemu:dirty-bitmap:never "$(uri vm/vda)" 2>/dev/null; then
    exit 1
fi
stop_qpulld
