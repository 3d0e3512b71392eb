#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# nbdsh: reads, block status of two contexts at once, and a write that is refused.
. "$(dirname "$0")/functions.sh"
requires nbdsh nbdcopy
disk vda qcow2 4M
start_vm vm vda:qcow2
start_qpulld vm
nbdcopy "$(uri vm/vda@monday)" null:
wait_idle vm
guest_write vm vda 'write -q -P 5 3M 64k'
for u in "$(uri vm/vda)" "$(tcp_uri vm/vda)"; do
    # Its Python is the first in PATH, which need not be the one that has libnbd.
    PATH=/usr/bin:$PATH nbdsh -c 'h.add_meta_context("base:allocation")' \
        -c 'h.add_meta_context("qemu:dirty-bitmap:monday")' -c "h.connect_uri('$u')" -c '
assert h.get_size() == 4 << 20
assert h.pread(4096, 0) == b"\x11" * 4096
assert h.pread(65536, 3 << 20) == b"\5" * 65536
assert h.pread(1 << 20, (2 << 20) - 512) == bytes(512) + b"\x22" * ((1 << 20) - 512)
found = {}
h.block_status(4 << 20, 0, lambda context, offset, entries, error: found.update({context: entries}) or 0)
assert found["qemu:dirty-bitmap:monday"] == [3 << 20, 0, 65536, 1, (1 << 20) - 65536, 0], found
assert found["base:allocation"][:2] == [1 << 20, 0], found
assert h.is_read_only()
h.set_strict_mode(0)
try:
    h.pwrite(b"x" * 512, 0)
    raise SystemExit("a write went through")
except nbd.Error as e:
    assert e.errno == "EPERM", e.errno
h.shutdown()'
    wait_idle vm
done
stop_qpulld
