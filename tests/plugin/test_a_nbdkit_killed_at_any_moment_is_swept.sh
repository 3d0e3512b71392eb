#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# kill -9 at random moments of a copy with a checkpoint, from nbdkit's start to its end: the next start sweeps, and copies
# what the disk holds. A checkpoint that stands was copied whole. QPULL_TEST_SEED replays; QPULL_TEST_ROUNDS: more of them.
. "$(dirname "$0")/functions.sh"

seed=${QPULL_TEST_SEED:-$RANDOM}
echo "QPULL_TEST_SEED=$seed"
RANDOM=$seed
disk vda qcow2 32M
start_vm vm vda:qcow2
for round in $(seq "${QPULL_TEST_ROUNDS:-6}"); do
    : >"$nbdkit_log"
    moment=$((RANDOM % 900))
    start_nbdkit -- "$work/vm.qmp" disk=vda "checkpoint=c$round" linger=0 "${common[@]}"
    nbdcopy "$(uri vda)" "$work/first.img" >/dev/null 2>&1 &
    copy=$!
    sleep "0.$(printf %03d $moment)"
    kill -9 $nbdkit_pid
    wait $nbdkit_pid || true
    status=0
    wait $copy || status=$?
    echo "round $round: killed after $moment ms, the copy ended with $status"
    run_nbdkit "nbdcopy \"\$uri\" $work/out.img" -- "$work/vm.qmp" disk=vda "${common[@]}"
    qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
    nothing_left vm
    if [ "$(bitmaps vm)" != '[]' ]; then
        test "$(bitmaps vm)" = "['c$round']"
        test $status = 0
        look vm "qmp('block-dirty-bitmap-remove', {'node': 'node-vda', 'name': 'c$round'})"
    fi
    test -z "$(ls "$work/scratch")"
    check_nbdkit_log
done
