#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# nbdcopy as it is and with its knobs, over both kinds of socket: the same bytes as the image.
. "$(dirname "$0")/functions.sh"
requires nbdcopy
disk vda qcow2 4096512
qemu-img convert -O raw "$work/vda.img" "$work/expected"
start_vm vm vda:qcow2
start_qpulld vm
for u in "$(uri vm/vda)" "$(tcp_uri vm/vda)"; do
    for knobs in '' --connections=1 '--connections=8 --threads=8' --requests=1 --synchronous \
        '--requests=64 --request-size=33554432' --no-extents --allocated --destination-is-zero --queue-size=65536; do
        rm -f "$work/copy"
        # shellcheck disable=SC2086 # several words
        nbdcopy $knobs "$u" "$work/copy" || { echo "nbdcopy $knobs" >&2; exit 1; }
        cmp "$work/expected" "$work/copy"
        wait_idle vm
    done
    nbdcopy "$u" null:
    nbdcopy "$u" - >"$work/copy"
    cmp "$work/expected" "$work/copy"
    wait_idle vm
done
stop_qpulld
