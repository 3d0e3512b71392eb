#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
# SIGTERM while a client waits for a QEMU that is not there, while a session comes up, and in the middle of reads from a QEMU
# that stands still: nbdkit ends by itself, and the next one finds a QEMU that is as it was.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 64M
start_vm vm vda:qcow2
qemu=${children[-1]}

# end_nbdkit STATUS: it ends, in time, and with this.
end_nbdkit()
{
    local status=0
    kill -TERM $nbdkit_pid
    timeout 60 tail --pid=$nbdkit_pid -f /dev/null
    wait $nbdkit_pid || status=$?
    check_nbdkit_log
    [ $status = "$1" ]
}

# Nobody listens at the monitor.
/usr/bin/python3 -c 'import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])' "$work/dead.qmp"
start_nbdkit -- "$work/dead.qmp" disk=vda timeout=400 "${common[@]}" # ctest waits no longer than 300 s
nbdinfo "$(uri vda)" >/dev/null 2>&1 &
wait_for 20 grep -q 'no QMP connection' "$nbdkit_log"
wait_for 20 grep -q 'open readonly' "$nbdkit_log"
end_nbdkit 0
expect "$(cat "$nbdkit_log")" 'given up: the client has gone, or nbdkit is ending'

# While a session comes up.
: >"$nbdkit_log"
start_nbdkit -- "$work/vm.qmp" disk=vda checkpoint=never "${common[@]}"
nbdinfo "$(uri vda)" >/dev/null 2>&1 &
wait_for 20 grep -q 'session [0-9a-f]* starts' "$nbdkit_log"
end_nbdkit 0
nothing_left vm
test "$(bitmaps vm)" = '[]'

# While data is read from a QEMU that stands still: what cannot be undone now is undone by the next one.
: >"$nbdkit_log"
start_nbdkit -- "$work/vm.qmp" disk=vda checkpoint=never "${common[@]}"
nbdinfo "$(uri vda)" >/dev/null
kill -STOP $qemu
nbdcopy "$(uri vda)" null: >/dev/null 2>&1 &
wait_for 20 grep -q 'pread count' "$nbdkit_log"
end_nbdkit 1
expect "$(cat "$nbdkit_log")" 'not everything could be undone'
kill -CONT $qemu

run_nbdkit "nbdcopy \"\$uri\" $work/out.img" -- "$work/vm.qmp" disk=vda "${common[@]}"
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
nothing_left vm
test "$(bitmaps vm)" = '[]'
check_nbdkit_log
