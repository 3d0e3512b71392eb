#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# nbdinfo --map: base:allocation of the frozen disk.
. "$(dirname "$0")/functions.sh"
requires nbdinfo
disk vda qcow2 4M
start_vm vm vda:qcow2
start_qpulld vm
for u in "$(uri vm/vda)" "$(tcp_uri vm/vda)"; do
    map=$(nbdinfo --map "$u" | tr -s ' ')
    expect "$map" '^ 0 1048576 0 data' '^ 1048576 1048576 3 hole,zero' '^ 2097152 1048576 0 data' \
        '^ 3145728 1048576 3 hole,zero'
    wait_idle vm
done
nbdinfo --map=qemu:allocation-depth "$(uri vm/vda)" >/dev/null
stop_qpulld
