#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# With --tls=require the frozen disk is for those who know the key; who does not freezes nothing.
. "$(dirname "$0")/functions.sh"
requires psktool
if ! nbdkit --dump-config | grep -q '^tls=yes'; then
    echo "skipped: this nbdkit has no TLS" >&2
    exit 77
fi

disk vda qcow2 16M
start_vm vm vda:qcow2
psktool -u alice -p "$work/psk" >/dev/null 2>&1
start_nbdkit --tls=require --tls-psk="$work/psk" -- "$work/vm.qmp" disk=vda checkpoint=monday linger=0 "${common[@]}"
if nbdinfo "$(uri vda)" >/dev/null 2>&1; then
    exit 1
fi
test "$(grep -c 'session [0-9a-f]* starts' "$nbdkit_log")" = 0
PATH=/usr/bin:$PATH nbdsh -c "
h.set_uri_allow_local_file(True)
h.connect_uri('nbds+unix://alice@/vda?socket=$socket&tls-psk-file=$work/psk')
open('$work/out.img', 'wb').write(h.pread(16 << 20, 0))
h.shutdown()"
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
nothing_left vm
stop_nbdkit
test "$(bitmaps vm)" = "['monday']"
