#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Scratch runs full (256 MiB of its file system are for others): the guest goes on, reads fail in words, no checkpoint is kept, nothing is left, and nbdkit freezes no
# second time. The next nbdkit does.
. "$(dirname "$0")/functions.sh"
if ! mkdir "$work/small" || ! mount -t tmpfs -o size=264m none "$work/small" 2>/dev/null; then
    echo "skipped: no right to mount a small file system" >&2
    exit 77
fi
undo="umount -l $work/small"

disk vda qcow2 64M
qemu-io -f qcow2 -c 'write -q -P 0x55 16M 32M' "$work/vda.img"
start_vm vm vda:qcow2
start_nbdkit -- "$work/vm.qmp" disk=vda checkpoint=never linger=0 scratch="$work/small" state="$work/state" max-pause=30
PATH=/usr/bin:$PATH nbdsh -u "$(uri vda)" -c "
import subprocess
assert h.pread(4096, 0) == bytes([0x11]) * 4096
subprocess.run(['bash', '-c', '''
    set -eu
    /usr/bin/python3 -c 'import sys, qmpclient
qmp = qmpclient.Qmp(sys.argv[1])
for i in range(16):
    said = qmp(\"human-monitor-command\", {\"command-line\": f\"qemu-io -d /machine/peripheral/vda/virtio-backend \\\\\"write -q -P 0x66 {16 + i}M 1M\\\\\"\"})
    assert not said.strip(), said' $work/vm.look'''], check=True)
try:
    for at in range(16 << 20, 32 << 20, 1 << 20):
        assert h.pread(1 << 20, at) == bytes([0x55]) * (1 << 20), at
    raise SystemExit('all is there, with 8 MiB for 16')
except nbd.Error as e:
    assert e.errno == 'EIO', e
"
expect "$(cat "$nbdkit_log")" "error: disk 'vda': .*scratch"
nothing_left vm
if nbdinfo "$(uri vda)" >/dev/null 2>&1; then
    exit 1
fi
expect "$(cat "$nbdkit_log")" 'must not be mixed'
stop_nbdkit
nothing_left vm
test "$(bitmaps vm)" = '[]'
test -z "$(ls "$work/small")"
run_nbdkit "nbdcopy \"\$uri\" $work/out.img" -- "$work/vm.qmp" disk=vda "${common[@]}"
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
test "$(od -An -tx1 -j 16777216 -N1 "$work/out.img")" = ' 66'
nothing_left vm
