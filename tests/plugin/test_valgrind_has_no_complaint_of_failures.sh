#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
# What goes wrong, under valgrind: refused disks and checkpoints, a map that cannot be written, a client that is killed while
# it reads, an end while clients wait and read, a QEMU that dies under clients that read, a qpulld that does, nobody there.
. "$(dirname "$0")/functions.sh"
. "$here/valgrind.sh"

refused()
{
    if nbdinfo "$@" >/dev/null 2>&1; then
        echo "$0: not refused: $*" >&2
        return 1
    fi
}

# The clients of $nbdkit_log that read by now, from here on.
begin()
{
    : >"$nbdkit_log"
    start_nbdkit "$@"
}

# nbdkit before 1.34 may abort itself where a client with several requests under way is gone.
may_hang_up=no
if [ "$(printf '%s\n' 1.34 "$(nbdkit --version | sed 's/nbdkit //; s/ .*//')" | sort -V | head -1)" = 1.34 ]; then
    may_hang_up=yes
fi

# read_while_dies PID: a client reads, the process is killed, the next read fails.
read_while_dies()
{
    PATH=/usr/bin:$PATH nbdsh -u "$(uri vda)" -c "
import os, signal
h.pread(65536, 0)
os.kill($1, signal.SIGKILL)
try:
    h.pread(65536, 2 << 20)
    raise SystemExit('a read without its source')
except nbd.Error as e:
    assert e.errno == 'EIO', e
"
}

disk vda qcow2 64M
qemu-io -f qcow2 -c 'write -q -P 0x55 16M 32M' "$work/vda.img"
start_vm vm vda:qcow2
qemu=${children[-1]}

begin -- "$work/vm.qmp" checkpoint=never linger=0 timeout=120 "${common[@]}"
refused "$(uri nothing)"
end_nbdkit
expect "$(cat "$nbdkit_log")" "error: .*'nothing'"
nothing_left vm

begin -- "$work/vm.qmp" disk=vda since=friday map=dirty timeout=120 "${common[@]}"
refused "$(uri vda)"
end_nbdkit
expect "$(cat "$nbdkit_log")" 'friday'

run_nbdkit "nbdcopy \"\$uri\" $work/monday.img" -- "$work/vm.qmp" disk=vda checkpoint=monday "${common[@]}"
mkdir "$work/maps"
begin -- "$work/vm.qmp" disk=vda since=monday map=dirty dirty-map="$work/maps/vda.json" timeout=120 "${common[@]}"
rmdir "$work/maps"
refused "$(uri vda)"
end_nbdkit
expect "$(cat "$nbdkit_log")" 'dirty-map=.* cannot be written'
nothing_left vm

# Clients that are killed while they read, and nbdkit's end while others read.
if [ $may_hang_up = yes ]; then
    begin --filter=rate -- "$work/vm.qmp" disk=vda checkpoint=never linger=0 timeout=120 connection-rate=2M "${common[@]}"
    nbdcopy "$(uri vda)" null: >/dev/null 2>&1 &
    copy=$!
    wait_for 60 grep -q 'pread count' "$nbdkit_log"
    kill -9 $copy
    nothing_left vm
    : >"$nbdkit_log"
    for i in 1 2 3; do
        nbdcopy "$(uri vda)" null: >/dev/null 2>&1 &
        pids[i]=$!
    done
    wait_for 60 grep -q 'pread count' "$nbdkit_log"
    end_nbdkit
    for pid in "${pids[@]}"; do
        wait "$pid" || true
    done
    nothing_left vm
    test "$(bitmaps vm)" = "['monday']"
fi

# A qpulld that dies while a client reads; then nobody is there.
start_qpulld vm
daemon=$socket
socket=$work/nbdkit.sock
begin -- server=unix:"$daemon" vm=vm disk=vda timeout=120
refused "$(uri nothing)"
read_while_dies $qpulld_pid
refused "$(uri vda)"
refused --list "$(uri '')"
end_nbdkit
begin -- server=unix:"$daemon" vm=vm timeout=120
refused "$(uri '')"
end_nbdkit
socket=$daemon

# The same with QEMU; and a client that waits for one that is not there is told so by the end of nbdkit.
begin -- "$work/vm.qmp" disk=vda linger=0 timeout=120 "${common[@]}"
read_while_dies $qemu
: >"$nbdkit_log"
nbdinfo "$(uri vda)" >/dev/null 2>&1 &
copy=$!
wait_for 60 grep -q 'open readonly' "$nbdkit_log"
end_nbdkit
! wait $copy 2>/dev/null
