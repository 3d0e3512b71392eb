#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# nbdinfo --list: VM/DISK of all VMs; a VM that does not run is left out.
. "$(dirname "$0")/functions.sh"
requires nbdinfo
disk vda qcow2 4M
disk vdb raw 4M
disk vdc qcow2 8M
start_vm one vda:qcow2 vdb:raw
start_vm two vdc:qcow2
start_qpulld one two asleep
wait_idle one
wait_idle two
for u in "$(uri '')" "$(tcp_uri '')"; do
    list=$(nbdinfo --list "$u")
    expect "$list" 'export="one/vda"' 'export="one/vdb"' 'export="two/vdc"' 'export-size: 8388608' \
        'raw disk of VM "one"'
    expect "$(grep -c '^export=' <<<"$list")" '^3$'
done
stop_qpulld
