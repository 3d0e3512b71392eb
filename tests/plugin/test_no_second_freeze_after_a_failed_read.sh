#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# After a read that failed this nbdkit freezes no second time: a filter that comes again would mix two instants.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
qemu=${children[-1]}
start_nbdkit -- "$work/vm.qmp" disk=vda linger=0 timeout=60 "${common[@]}"
PATH=/usr/bin:$PATH nbdsh -u "$(uri vda)" -c "
import os, signal
h.pread(4096, 0)
os.kill($qemu, signal.SIGKILL)
try:
    h.pread(4096, 2 << 20)
    raise SystemExit('a read without a QEMU')
except nbd.Error as e:
    assert e.errno == 'EIO', e
"
rm -f "$work/vm.qmp" "$work/vm.look"
start_vm vm vda:qcow2
if nbdinfo "$(uri vda)" 2>/dev/null; then
    exit 1
fi
expect "$(cat "$nbdkit_log")" 'is another instant, and must not be mixed'
stop_nbdkit
nothing_left vm
