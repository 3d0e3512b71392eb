#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Disks of odd sizes, and reads at odd places by many threads at once: every byte is right, as data, as zeroes, in a map.
. "$(dirname "$0")/functions.sh"

odd()
{
    local name=$1 format=$2 size=$3
    qemu-img create -q -f "$format" "$work/$name.img" "$size"
    qemu-io -f "$format" -c "write -q -P 0x11 0 $((size / 3 / 512 * 512))" \
        -c "write -q -P 0x22 $(((size - 1) / 512 * 512)) 512" "$work/$name.img" >/dev/null
}

odd tiny raw 512
odd sector qcow2 $((1024 * 1024 + 512))
odd prime qcow2 $((7919 * 512))
disks=(tiny sector prime)
start_vm vm tiny:raw sector:qcow2 prime:qcow2
start_nbdkit -- "$work/vm.qmp" linger=60 "${common[@]}"
for d in "${disks[@]}"; do
    nbdcopy "$(uri $d)" "$work/$d.out"
    format=qcow2
    [ $d != tiny ] || format=raw
    qemu-img convert -q -U -f $format -O raw "$work/$d.img" "$work/$d.raw"
    same "$work/$d.out" "$work/$d.raw"
    nbdinfo --map "$(uri $d)" >"$work/map"
    test "$(awk '{n += $2} END {print n}' "$work/map")" = "$(stat -c %s "$work/$d.raw")"
done
/usr/bin/python3 - "$(uri prime)" "$work/prime.raw" "${QPULL_TEST_SEED:-$RANDOM}" <<'PYTHON'
import random
import sys

import nbd

print(f'QPULL_TEST_SEED={sys.argv[3]}')
random.seed(int(sys.argv[3]))
image = open(sys.argv[2], 'rb').read()
h = nbd.NBD()
h.connect_uri(sys.argv[1])
assert h.get_size() == len(image)
flying = []
for _ in range(600):
    at = random.choice((random.randrange(len(image)), len(image) - 1, random.randrange(len(image)) // 512 * 512))
    n = min(random.choice((1, 511, 512, 513, 65537, 1 << 20, 4 << 20)), len(image) - at)
    buffer = nbd.Buffer(n)
    flying.append((at, n, buffer, h.aio_pread(buffer, at)))
    if len(flying) < 32:
        continue
    at, n, buffer, cookie = flying.pop(0)
    while not h.aio_command_completed(cookie):
        h.poll(-1)
    assert buffer.to_bytearray() == image[at:at + n], (at, n)
for at, n, buffer, cookie in flying:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
    assert buffer.to_bytearray() == image[at:at + n], (at, n)
h.shutdown()
PYTHON
stop_nbdkit
nothing_left vm
