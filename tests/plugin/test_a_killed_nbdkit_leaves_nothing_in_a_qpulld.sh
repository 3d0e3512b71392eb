#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# With server=: kill -9 while the disk is being frozen, in the middle of a read, with idle clients, and at the end: qpulld
# tears down, and keeps no checkpoint of what was not copied; and when qpulld is killed, clients get errors, not zeroes.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
start_qpulld vm
daemon=(server=unix:"$socket" vm=vm disk=vda checkpoint=never)
qpulld_socket=$socket
for phase in setup read idle end; do
    socket=$work/nbdkit.sock
    : >"$nbdkit_log"
    case $phase in
    setup)
        start_nbdkit -- "${daemon[@]}"
        nbdinfo "$(uri vda)" >/dev/null 2>&1 &
        wait_for 20 grep -q 'session [0-9a-f]* starts' "$work/qpulld.log"
        ;;
    read)
        start_nbdkit --filter=rate -- "${daemon[@]}" rate=4M
        nbdcopy "$(uri vda)" null: >/dev/null 2>&1 &
        wait_for 20 grep -q 'pread count' "$nbdkit_log"
        ;;
    idle)
        start_nbdkit -- "${daemon[@]}"
        qemu-io -r -f raw -c 'read 0 32M' -c 'sleep 20000' "$(uri vda)" >/dev/null 2>&1 &
        children+=($!)
        wait_for 20 grep -q 'pread count' "$nbdkit_log"
        ;;
    end)
        start_nbdkit -- "${daemon[@]}"
        PATH=/usr/bin:$PATH nbdsh -u "$(uri vda)" -c 'h.pread(65536, 0)'
        kill -TERM $nbdkit_pid
        ;;
    esac
    kill -9 $nbdkit_pid || [ $phase = end ] # which may have come
    wait $nbdkit_pid || true
    socket=$qpulld_socket
    wait_idle vm
    nothing_left vm
    test "$(bitmaps vm)" = '[]'
    check_nbdkit_log
done

# The other way round: qpulld is killed. Its successor's freeze is another instant.
socket=$work/nbdkit.sock
start_nbdkit -- "${daemon[@]}"
PATH=/usr/bin:$PATH nbdsh -u "$(uri vda)" -c "
import os, signal
h.pread(4096, 0)
os.kill($qpulld_pid, signal.SIGKILL)
try:
    h.pread(4096, 2 << 20)
    raise SystemExit('a read without a qpulld')
except nbd.Error as e:
    assert e.errno == 'EIO', e
"
socket=$qpulld_socket
start_qpulld vm
socket=$work/nbdkit.sock
if nbdinfo "$(uri vda)" >/dev/null 2>&1; then
    exit 1
fi
expect "$(cat "$nbdkit_log")" 'may be another instant, and must not be mixed'
kill -TERM $nbdkit_pid
wait $nbdkit_pid
socket=$qpulld_socket
nothing_left vm
test "$(bitmaps vm)" = '[]'
stop_qpulld
check_nbdkit_log
