#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# raw and qcow2 version 2: pulled as they are, but @NAME is refused with the reason.
. "$(dirname "$0")/functions.sh"
requires nbdcopy
disk vda raw 4M
disk vdb qcow2 4M compat=0.10
start_vm vm vda:raw vdb:qcow2
start_qpulld vm
for d in vda vdb; do
    if nbdcopy "$(uri "vm/$d@monday")" null: 2>/dev/null; then
        exit 1
    fi
    if qemu-img info "$(uri "vm/$d@monday")" 2>"$work/words"; then
        exit 1
    fi
    expect "$(cat "$work/words")" "disk '$d' of VM 'vm' cannot keep a checkpoint \(NOT_TRACKED\)"
    nbdcopy "$(uri "vm/$d")" "$work/copy"
    cmp -n 1048576 "$work/copy" <(head -c 1048576 /dev/zero | tr '\0' '\21')
    wait_idle vm
done
stop_qpulld
