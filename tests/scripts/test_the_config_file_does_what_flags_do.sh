#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# VMs, chosen disks and new names from a file.
. "$(dirname "$0")/functions.sh"
requires nbdinfo
disk vda qcow2 4M
disk vdb qcow2 8M
disk vdc raw 4M
start_vm vm vda:qcow2 vdb:qcow2 vdc:raw
cat >"$work/conf" <<EOF
[server]
linger = 0
[vm "guest one"]
qmp = $work/vm.qmp
disks = vda, node-vdb
disk.data = vdb
EOF
start_qpulld -- --config="$work/conf"
wait_idle 'guest one'
list=$(nbdinfo --list "$(uri '')")
expect "$list" 'export="guest one/vda"' 'export="guest one/data"'
expect "$(grep -c '^export=' <<<"$list")" '^2$'
expect "$(nbdinfo --size "$(uri 'guest%20one/data')")" '^8388608$'
wait_idle 'guest one'
stop_qpulld
