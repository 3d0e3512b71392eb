#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SIGSEGV and SIGABRT, as a crash in a filter brings them, in the middle of reads by several clients: the guest writes on, the
# next nbdkit sweeps and copies, no checkpoint is kept.
. "$(dirname "$0")/functions.sh"
ulimit -c 0
export ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_abort=0 TSAN_OPTIONS=handle_segv=0:handle_abort=0

disk vda qcow2 64M
qemu-io -f qcow2 -c 'write -q -P 0x55 16M 32M' "$work/vda.img"
start_vm vm vda:qcow2
for signal in SEGV ABRT; do
    start_nbdkit --filter=rate -- "$work/vm.qmp" disk=vda checkpoint=never rate=16M "${common[@]}"
    pids=()
    for i in 1 2 3; do
        nbdcopy "$(uri vda)" null: >/dev/null 2>&1 &
        pids+=($!)
    done
    wait_for 20 grep -q 'pread count' "$nbdkit_log"
    status=0
    kill -$signal $nbdkit_pid
    wait $nbdkit_pid || status=$?
    test $status = $((128 + $(kill -l $signal)))
    for pid in "${pids[@]}"; do
        ! wait "$pid"
    done
    check_nbdkit_log
    : >"$nbdkit_log"
    guest_write vm vda 'write -q -P 0x44 256k 128k'
    run_nbdkit "nbdcopy \"\$uri\" $work/out.img" -- "$work/vm.qmp" disk=vda "${common[@]}"
    qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
    test "$(od -An -tx1 -j 262144 -N1 "$work/out.img")" = ' 44'
    nothing_left vm
    test "$(bitmaps vm)" = '[]'
    test -z "$(ls "$work/scratch")"
    : >"$nbdkit_log"
done
