#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Sixteen clients at once share one freeze.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
start_nbdkit -- "$work/vm.qmp" disk=vda linger=60 "${common[@]}"
nbdinfo "$(uri vda)" >/dev/null
cp "$work/vda.img" "$work/before.img"
guest_write vm vda 'write -q -P 0x77 0 4M'
pids=()
for i in $(seq 16); do
    nbdcopy "$(uri vda)" "$work/out$i.img" &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    wait "$pid"
done
for i in $(seq 16); do
    qemu-img compare -q -f raw -F qcow2 "$work/out$i.img" "$work/before.img"
done
test "$(grep -c 'session [0-9a-f]* starts' "$nbdkit_log")" = 1
stop_nbdkit
nothing_left vm
