#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Through a running qpulld: the same data, maps and checkpoints; qpulld alone freezes, and decides what is kept.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
make_increment vm
start_qpulld vm
daemon=(server=unix:"$socket" vm=vm disk=vda)
run_nbdkit 'PATH=/usr/bin:$PATH nbdsh -u "$uri" -c "h.pread(65536, 0)"' -- "${daemon[@]}" checkpoint=half
wait_idle vm
cp "$work/monday.img" "$work/copy.img"
run_nbdkit "nbdcopy --destination-is-zero --sparse=0 -- \"\$uri\" [ nbdkit --exit-with-parent file $work/copy.img ]" \
    -- "${daemon[@]}" since=monday map=both checkpoint=tuesday dirty-map="$work/dirty.json"
same "$work/copy.img" "$work/now.img"
wait_idle vm
test "$(bitmaps vm)" = "['monday', 'tuesday']"
if run_nbdkit 'nbdinfo "$uri"' -- "${daemon[@]}" since=friday map=dirty; then
    exit 1
fi
expect "$(cat "$nbdkit_log")" 'qemu:dirty-bitmap:friday is not offered'
expect "$(run_nbdkit 'nbdinfo --list "$uri"' -- server=unix:"$socket" vm=vm)" 'export="vda"'
nothing_left vm
stop_qpulld
check_nbdkit_log
