#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Clean areas are holes, dirty data is data, dirty zeroes are zeroes that are no holes; dirty-map= tells the same as QEMU.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
make_increment vm
run_nbdkit "nbdinfo --map --json \"\$uri\" >$work/types.json" -- "$work/vm.qmp" disk=vda since=monday map=dirty \
    dirty-map="$work/dirty.json" "${common[@]}"
start_qpulld vm
nbdinfo --map=qemu:dirty-bitmap:monday --json "$(uri vm/vda)" >"$work/qemu.json"
stop_qpulld
/usr/bin/python3 - "$work" <<'PYTHON'
import json
import sys

def load(name):
    return [e for e in json.load(open(f'{sys.argv[1]}/{name}.json'))]

K = 1024
ours, qemu = load('dirty'), load('qemu')
assert ours == qemu, (ours, qemu)
types = [(e['offset'] // K, e['length'] // K, e['type']) for e in load('types') if e['type'] != 3]
assert types == [(256, 128, 0), (2048, 768, 2), (5120, 1024, 0)], types
PYTHON
check_nbdkit_log
