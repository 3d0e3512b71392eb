#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
# Clients that open, read, ask for extents and caching, and leave, several at a time; maps, a checkpoint, an increment; twice
# from the first client to the end of the freeze; and nbdkit's end, under valgrind.
. "$(dirname "$0")/functions.sh"
. "$here/valgrind.sh"

disk vda qcow2 16M
start_vm vm vda:qcow2
start_nbdkit -- "$work/vm.qmp" disk=vda checkpoint=monday linger=0 timeout=120 "${common[@]}"
nbdinfo --list "$(uri vda)" >/dev/null
nothing_left vm
nbdinfo --map "$(uri vda)" >/dev/null
nothing_left vm
qemu-io -r -f raw -c 'read 0 512' -c 'sleep 60000' "$(uri vda)" >/dev/null 2>&1 & # holds the freeze
children+=($!)
wait_for 60 grep -q 'pread count' "$nbdkit_log"
for i in 1 2 3; do
    nbdcopy "$(uri vda)" "$work/out$i.img" &
    pids[i]=$!
    nbdinfo --map "$(uri vda)" >"$work/map$i" &
    pids[10 + i]=$!
    qemu-io -r -f raw -c 'read -q 1000 4M' -c 'read -q -P 0x22 2M 1M' "$(uri vda)" >/dev/null &
    pids[20 + i]=$!
done
PATH=/usr/bin:$PATH nbdsh -u "$(uri vda)" -c 'h.cache(1 << 20, 4096); h.pread(513, 511)'
for pid in "${pids[@]}"; do
    wait "$pid"
done
for i in 1 2 3; do
    same "$work/map$i" "$work/map1"
    qemu-img compare -q -U -f raw -F qcow2 "$work/out$i.img" "$work/vda.img"
done
kill "${children[-1]}"
nothing_left vm
end_nbdkit
test "$(bitmaps vm)" = "['monday']"

guest_write vm vda 'write -q -P 0x44 256k 128k'
for map in dirty both; do
    start_nbdkit -- "$work/vm.qmp" disk=vda since=monday map=$map dirty-map="$work/$map.json" timeout=120 "${common[@]}"
    nbdcopy "$(uri vda)" "$work/increment.img"
    end_nbdkit
    grep -q '"dirty"' "$work/$map.json"
done
nothing_left vm

# Through a qpulld.
start_qpulld vm
daemon=$socket
socket=$work/nbdkit.sock
start_nbdkit -- server=unix:"$daemon" vm=vm timeout=120
nbdinfo --list "$(uri '')" >/dev/null
for i in 1 2 3; do
    nbdcopy "$(uri vda)" "$work/out$i.img" &
    pids[i]=$!
done
wait "${pids[1]}" "${pids[2]}" "${pids[3]}"
nbdinfo --map "$(uri vda)" >/dev/null
end_nbdkit
wait_idle vm
qemu-img compare -q -U -f raw -F qcow2 "$work/out1.img" "$work/vda.img"
socket=$daemon
stop_qpulld
