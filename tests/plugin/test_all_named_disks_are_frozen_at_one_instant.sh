#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# All named disks are frozen at one instant: what the guest writes after the first open is in none of them.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
disk vdb raw 16M
start_vm vm vda:qcow2 vdb:raw
start_nbdkit -- "$work/vm.qmp" disk=vda disk=vdb linger=60 "${common[@]}"
nbdinfo "$(uri vda)" >/dev/null
guest_write vm vda 'write -q -P 0x77 0 1M'
guest_write vm vdb 'write -q -P 0x77 0 1M'
expect "$(nbdinfo --list "$(uri '')")" 'export="vda"' 'export="vdb"'
for d in vda vdb; do
    nbdcopy "$(uri $d)" "$work/$d.raw"
    test "$(od -An -tx1 -N1 "$work/$d.raw")" = ' 11'
done
nbdcopy "$(uri '')" "$work/default.raw" # the first named one
same "$work/default.raw" "$work/vda.raw"
if nbdinfo "$(uri vdc)" 2>/dev/null; then
    exit 1
fi
stop_nbdkit
expect "$(cat "$nbdkit_log")" "no export 'vdc'"
nothing_left vm
