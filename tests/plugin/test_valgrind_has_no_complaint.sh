#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
# Clients, maps, a checkpoint and the end, under valgrind: no wrong access, and no block of the plugin's is lost.
. "$(dirname "$0")/functions.sh"
requires valgrind
if [ -n "$preload" ]; then
    echo "skipped: valgrind cannot run a program with sanitizers" >&2
    exit 77
fi

disk vda qcow2 16M
start_vm vm vda:qcow2
# Without dlclose() valgrind can still name the plugin's functions in the end.
cat >"$work/nbdkit.supp" <<'EOF'
{
   not ours: what libraries keep for their own life
   Memcheck:Leak
   ...
   fun:call_init*
}
EOF
valgrind -q --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite --error-exitcode=99 \
    --child-silent-after-fork=no --suppressions="$here/../valgrind.supp" --suppressions="$work/nbdkit.supp" \
    --log-file="$work/valgrind.%p" nbdkit -f -U "$socket" --pidfile="$work/nbdkit.pid" "$plugin" "$work/vm.qmp" disk=vda \
    checkpoint=monday linger=1 timeout=120 "${common[@]}" 2>>"$nbdkit_log" &
nbdkit_pid=$!
children+=($nbdkit_pid)
wait_for 60 test -s "$work/nbdkit.pid"
nbdinfo --map "$(uri vda)" >/dev/null
for i in 1 2 3; do
    nbdcopy "$(uri vda)" "$work/out$i.img" &
    pids[i]=$!
done
wait "${pids[@]}"
kill -TERM $nbdkit_pid
status=0
wait $nbdkit_pid || status=$?
cat "$work"/valgrind.* >&2
test $status = 0
qemu-img compare -q -U -f raw -F qcow2 "$work/out1.img" "$work/vda.img"
test "$(bitmaps vm)" = "['monday']"
nothing_left vm
