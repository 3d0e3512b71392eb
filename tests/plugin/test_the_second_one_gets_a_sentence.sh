#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Who comes second to a QEMU gets a sentence: at the same monitor, at another one, and with the same notes.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
mkdir "$work/other"
start_nbdkit -- "$work/vm.qmp" disk=vda linger=60 "${common[@]}"
nbdinfo "$(uri vda)" >/dev/null
second()
{
    : >"$work/second.log"
    local since=$SECONDS
    if nbdkit_log=$work/second.log run_nbdkit 'nbdinfo "$uri"' -- "$@" 2>/dev/null; then
        echo "the second one was let in: $*" >&2
        exit 1
    fi
    test $((SECONDS - since)) -lt 100 # it ended by itself
}
second "$work/vm.qmp" disk=vda scratch="$work/scratch" state="$work/other" timeout=8
expect "$(cat "$work/second.log")" 'error: .*(another|other) client'
second "$work/vm.look" disk=vda scratch="$work/scratch" state="$work/other" vm=vm timeout=8
expect "$(cat "$work/second.log")" "another qpulld or nbdkit \(process $nbdkit_pid, user $(id -u)\) is at work in this QEMU"
second "$work/vm.look" disk=vda "${common[@]}" vm=vm timeout=8
expect "$(cat "$work/second.log")" "another qpulld or nbdkit \(process $nbdkit_pid\) keeps the notes"
# The first one has not noticed any of that.
nbdcopy "$(uri vda)" "$work/out.img"
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
stop_nbdkit
nothing_left vm
