#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Sockets in use are not taken; sockets of a daemon that died are.
. "$(dirname "$0")/functions.sh"
requires nbdinfo
disk vda qcow2 4M
start_vm vm vda:qcow2
start_qpulld vm
others=(--vm="vm=$work/vm.qmp" --scratch="$work" --state="$work/others")
mkdir "$work/others"
if timeout 20 qpulld "${others[@]}" --listen=unix:"$socket" --control="$work/other" 2>"$work/words"; then
    exit 1
fi
expect "$(cat "$work/words")" "another qpulld listens on $socket"
if timeout 20 qpulld "${others[@]}" --listen=unix:"$work/other" --control="$control" 2>"$work/words"; then
    exit 1
fi
expect "$(cat "$work/words")" "$control"
if timeout 20 qpulld --vm="vm=$work/vm.qmp" --scratch="$work" --state="$work/state" --listen=unix:"$work/other" \
    --control="$work/other2" 2>"$work/words"; then
    exit 1
fi
expect "$(cat "$work/words")" "keeps the notes of a VM of this name in the same state directory"
expect "$(nbdinfo --size "$(uri vm/vda)")" '^4194304$'
kill -9 $qpulld_pid
wait $qpulld_pid || true
test -S "$socket"
start_qpulld vm
wait_idle vm
expect "$(nbdinfo --size "$(uri vm/vda)")" '^4194304$'
stop_qpulld
test ! -e "$socket" -a ! -e "$control" -a ! -e "$work/pid"
