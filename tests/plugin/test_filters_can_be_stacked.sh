#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# nbdkit's filters, stacked on one another and each alone, change nothing about the data; and do what they are for.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
run_nbdkit "nbdcopy \"\$uri\" $work/out.img" --filter=log --filter=stats --filter=limit --filter=cow --filter=readahead \
    --filter=blocksize --filter=retry --filter=rate --filter=ip -- "$work/vm.qmp" disk=vda rate=800M logfile="$work/log" \
    statsfile="$work/stats" limit=8 maxdata=64k allow="uid:$(id -u)" deny=all "${common[@]}"
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
grep -q 'Read' "$work/log"
expect "$(cat "$work/stats")" 'read: '
nothing_left vm

single=(exitlast exportname noextents nocache)
kept="'exitlast', 'exportname', 'nocache', 'noextents'"
if [ -e "$(nbdkit --dump-config | sed -n 's/^filterdir=//p')/nbdkit-cacheextents-filter.so" ]; then # until nbdkit 1.46
    single+=(cacheextents)
    kept="'cacheextents', $kept"
fi
for filter in "${single[@]}"; do
    run_nbdkit "nbdcopy \"\$uri\" $work/$filter.img" --filter=$filter -- "$work/vm.qmp" disk=vda checkpoint=$filter "${common[@]}"
    qemu-img compare -q -U -f raw -F qcow2 "$work/$filter.img" "$work/vda.img"
done
test "$(bitmaps vm)" = "[$kept]"

# What a client writes into the cow filter stays there: the next client sees the disk.
run_nbdkit "qemu-io -f raw -c 'write -q -P 0x99 0 64k' -c 'read -q -P 0x99 0 64k' \"\$uri\" && nbdcopy \"\$uri\" $work/cow.img" \
    --filter=cow -- "$work/vm.qmp" disk=vda "${common[@]}"
qemu-img compare -q -U -f raw -F qcow2 "$work/exitlast.img" "$work/vda.img"
test "$(od -An -tx1 -N1 "$work/cow.img")" = ' 99'

# Who is not let in by the filter freezes nothing.
: >"$nbdkit_log"
if run_nbdkit 'nbdinfo "$uri"' --filter=ip -- "$work/vm.qmp" disk=vda deny=all "${common[@]}" 2>/dev/null; then
    exit 1
fi
test "$(grep -c 'session [0-9a-f]* starts' "$nbdkit_log")" = 0
nothing_left vm
check_nbdkit_log
