#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# The documented command brings a copy of monday to what the disk holds now: data, zeroes over data, and all else.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
make_increment vm
test "$(bitmaps vm)" = "['monday']"
cp "$work/monday.img" "$work/copy.img"
run_nbdkit "nbdcopy --destination-is-zero --sparse=0 -- \"\$uri\" [ nbdkit --exit-with-parent file $work/copy.img ]" \
    --filter=stats -- "$work/vm.qmp" disk=vda since=monday map=both checkpoint=tuesday statsfile="$work/stats" \
    "${common[@]}"
same "$work/copy.img" "$work/now.img"
nothing_left vm
test "$(bitmaps vm)" = "['monday', 'tuesday']"
# Only what changed was read, 1 MiB, 512, 256 and 128 KiB, in nbdcopy's requests of 256 KiB.
expect "$(cat "$work/stats")" 'read: .*, (1\.88|2\.00) MiB,'
check_nbdkit_log
