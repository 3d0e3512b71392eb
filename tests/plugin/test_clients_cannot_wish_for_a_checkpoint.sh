#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Which checkpoint is made is for who starts nbdkit: an export name with "@", which means one to qpulld, is no disk here.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 8M
start_vm vm vda:qcow2
start_qpulld vm
uris='nbdinfo "nbd+unix:///vda@mine?socket=$unixsocket" || nbdcopy "nbd+unix:///vda@mine?socket=$unixsocket" null:'
refused()
{
    : >"$nbdkit_log"
    if run_nbdkit "$uris" -- "$@" 2>/dev/null; then
        echo "there is an export vda@mine: $*" >&2
        exit 1
    fi
    expect "$(cat "$nbdkit_log")" "error: .*vda@mine"
    nothing_left vm
    test "$(bitmaps vm)" = '[]'
}
refused server=unix:"$socket" vm=vm
refused server=unix:"$socket" vm=vm disk=vda
refused server=unix:"$socket" vm=vm checkpoint=theirs
stop_qpulld
refused "$work/vm.qmp" "${common[@]}"
refused "$work/vm.qmp" disk=vda "${common[@]}"
