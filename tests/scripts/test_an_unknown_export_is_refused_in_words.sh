#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# What the stock clients show of a refusal, and the empty name where there is more than one disk.
. "$(dirname "$0")/functions.sh"
requires nbdinfo
disk vda qcow2 4M
disk vdb qcow2 4M
start_vm vm vda:qcow2 vdb:qcow2
start_qpulld vm
for export in vm/nowhere nowhere/vda '' vm/vda@qpull-x; do
    if nbdinfo --size "$(uri "$export")" 2>"$work/words"; then
        echo "\"$export\" was opened" >&2
        exit 1
    fi
    if qemu-img info "$(uri "$export")" 2>"$work/words"; then
        exit 1
    fi
    case $export in
        vm/nowhere) expect "$(cat "$work/words")" 'has no disk "nowhere".*nbdinfo --list' ;;
        nowhere/vda) expect "$(cat "$work/words")" 'no export "nowhere/vda".*VM/DISK' ;;
        '') expect "$(cat "$work/words")" 'means the only disk, but there are 2' ;;
        *) expect "$(cat "$work/words")" 'kept for temporary objects' ;;
    esac
done
stop_qpulld
