#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# nbdinfo, on a unix socket and over TCP: size, flags, contexts; and it freezes nothing for longer than it stays.
. "$(dirname "$0")/functions.sh"
requires nbdinfo
disk vda qcow2 4096512
start_vm vm vda:qcow2
start_qpulld vm
for u in "$(uri vm/vda)" "$(tcp_uri vm/vda)" "$(uri '')"; do
    expect "$(nbdinfo --size "$u")" '^4096512$'
    nbdinfo --is read-only "$u"
    nbdinfo --can multi-conn "$u"
    nbdinfo --can structured-reply "$u"
    expect "$(nbdinfo "$u")" 'base:allocation' 'qemu:allocation-depth' 'export-size: 4096512'
    expect "$(nbdinfo --json "$u")" '"export-size": 4096512' '"is_read_only": true'
    wait_idle vm
done
expect "$(look vm "len(qmp('query-block-exports'))")" '^0$'
stop_qpulld
