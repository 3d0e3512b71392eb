#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# kill -9 before a session, while it comes up, in the middle of a read, while it lingers and while it is torn down: the next
# start sweeps.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 64M
start_vm vm vda:qcow2
qemu=${children[-1]}
for phase in start setup read linger teardown; do
    case $phase in
    start) start_nbdkit -- "$work/vm.qmp" disk=vda "${common[@]}" ;;
    setup)
        start_nbdkit -- "$work/vm.qmp" disk=vda checkpoint=never "${common[@]}"
        nbdinfo "$(uri vda)" >/dev/null 2>&1 &
        wait_for 20 grep -q 'session [0-9a-f]* starts' "$nbdkit_log"
        ;;
    read)
        start_nbdkit --filter=rate -- "$work/vm.qmp" disk=vda checkpoint=never rate=4M "${common[@]}"
        nbdcopy "$(uri vda)" null: >/dev/null 2>&1 &
        wait_for 20 grep -q 'pread count' "$nbdkit_log"
        ;;
    linger)
        start_nbdkit -- "$work/vm.qmp" disk=vda checkpoint=never linger=60 "${common[@]}"
        nbdinfo "$(uri vda)" >/dev/null
        ;;
    teardown)
        start_nbdkit -- "$work/vm.qmp" disk=vda checkpoint=whole linger=60 "${common[@]}"
        nbdcopy "$(uri vda)" null:
        kill -STOP $qemu
        kill -TERM $nbdkit_pid
        wait_for 20 grep -q 'UP -> GOING_DOWN' "$nbdkit_log"
        ;;
    esac
    kill -9 $nbdkit_pid
    wait $nbdkit_pid || true
    kill -CONT $qemu
    check_nbdkit_log
    : >"$nbdkit_log"
    run_nbdkit "nbdcopy \"\$uri\" $work/out.img" -- "$work/vm.qmp" disk=vda "${common[@]}"
    qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
    nothing_left vm
    test "$(bitmaps vm)" = '[]'
    test -z "$(ls "$work/scratch")"
    : >"$nbdkit_log"
done
