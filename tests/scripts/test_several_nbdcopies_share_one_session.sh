#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Two disks pulled side by side by one client are one session, and both checkpoints are kept.
. "$(dirname "$0")/functions.sh"
requires nbdcopy
disk vda qcow2 4M
disk vdb qcow2 4M
start_vm vm vda:qcow2 vdb:qcow2
linger=1 start_qpulld vm
nbdcopy "$(uri vm/vda@monday)" "$work/a" &
first=$!
nbdcopy "$(uri vm/vdb@monday)" "$work/b"
wait $first
wait_idle vm
expect "$(grep -c 'starts for' "$work/qpulld.log")" '^1$'
found=$(look vm "sorted(qmpclient.bitmaps(qmp))")
expect "$found" "^\[\('node-vda', 'monday'\), \('node-vdb', 'monday'\)\]$"
cmp "$work/a" <(qemu-img convert -U -O raw "$work/vda.img" "$work/expected" && cat "$work/expected")
cmp "$work/a" "$work/b"
stop_qpulld
