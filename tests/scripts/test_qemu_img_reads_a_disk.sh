#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# qemu-img info, convert, compare, map: plain NBD to them.
. "$(dirname "$0")/functions.sh"
disk vda qcow2 4096512
qemu-img convert -O raw "$work/vda.img" "$work/expected"
start_vm vm vda:qcow2
start_qpulld vm
for u in "$(uri vm/vda)" "$(tcp_uri vm/vda)"; do
    expect "$(qemu-img info "$u")" 'virtual size: 3.91 MiB \(4096512 bytes\)'
    wait_idle vm
    expect "$(qemu-img compare "$u" "$work/expected")" 'identical'
    wait_idle vm
    qemu-img convert -O qcow2 "$u" "$work/copy.qcow2"
    qemu-img compare -q "$work/copy.qcow2" "$work/expected"
    rm "$work/copy.qcow2"
    wait_idle vm
    expect "$(qemu-img map --output=json "$u")" '"start": 0, "length": 1048576, .*"data": true' \
        '"start": 1048576, "length": 1048576, .*"zero": true, "data": false'
    wait_idle vm
    qemu-io -r -f raw -c 'read -q -P 0x11 0 1M' -c 'read -q -P 0 1M 1M' -c 'read -q -P 0x22 2M 1M' "$u"
    wait_idle vm
done
stop_qpulld
