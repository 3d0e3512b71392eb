#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# VM/DISK@NAME in URIs, plain and as %40.
. "$(dirname "$0")/functions.sh"
requires nbdcopy nbdinfo
disk vda qcow2 4M
start_vm vm vda:qcow2
start_qpulld vm
nbdcopy "$(uri vm/vda%40one)" null:
wait_idle vm
nbdcopy "$(tcp_uri vm/vda%40two)" null:
wait_idle vm
nbdcopy "$(uri vm%2Fvda%40t%C3%A4g)" null:
wait_idle vm
qemu-img convert -O raw "$(uri vm/vda@three)" "$work/copy"
wait_idle vm
expect "$(look vm "sorted(name for _, name in qmpclient.bitmaps(qmp))")" "^\['one', 'three', 'two', 'täg'\]$"
stop_qpulld
