#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Within linger= a client finds the same frozen disk again, and who only looks then takes nothing away from the pull that
# was whole; after it all is torn down, though nbdkit goes on, and the next client finds a new freeze.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
cp "$work/vda.img" "$work/before.img"
start_nbdkit -- "$work/vm.qmp" disk=vda checkpoint=monday linger=5 "${common[@]}"
starts()
{
    grep -c 'session [0-9a-f]* starts' "$nbdkit_log"
}

# One half by one client, the other half by the next one; the guest writes while the first is there, since to start a program
# may take a second of those that the freeze lingers.
PATH=/usr/bin:$PATH nbdsh -u "$(uri vda)" -c "
import qmpclient
open('$work/out.img', 'wb').write(h.pread(16 << 20, 0))
qmpclient.Qmp('$work/vm.look')('human-monitor-command', {
    'command-line': 'qemu-io -d /machine/peripheral/vda/virtio-backend \"write -q -P 0x77 0 4M\"'})
"
PATH=/usr/bin:$PATH nbdsh -u "$(uri vda)" -c 'open("'"$work/out.img"'", "ab").write(h.pread(16 << 20, 16 << 20))'
nbdinfo "$(uri vda)" >/dev/null
test "$(starts)" = 1
qemu-img compare -q -f raw -F qcow2 "$work/out.img" "$work/before.img"
nothing_left vm
test "$(bitmaps vm)" = "['monday']"
kill -0 $nbdkit_pid

# A new freeze: of the checkpoint's name there is one already, so the words must say so.
if nbdinfo "$(uri vda)" >/dev/null 2>&1; then
    exit 1
fi
expect "$(cat "$nbdkit_log")" 'monday.*(exists|already)'
stop_nbdkit
nothing_left vm

# linger=0: the end of the last client is the end of the freeze.
start_nbdkit -- "$work/vm.qmp" disk=vda linger=0 "${common[@]}"
nbdcopy "$(uri vda)" "$work/out.img"
nothing_left vm
nbdcopy "$(uri vda)" "$work/out.img"
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
test "$(starts)" = 3
stop_nbdkit
nothing_left vm
test -z "$(ls "$work/scratch")"
