#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# NBD_CMD_CACHE is taken, of data, zeroes, and the disk's odd end; what was only cached has been handed out to nobody.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 33554944 # 32 MiB and a sector
start_vm vm vda:qcow2
cache='
assert h.can_cache()
for at, n in ((0, 4096), (512, 3 << 20), (3 << 20, 8 << 20), (h.get_size() - 512, 512), (1, 1)):
    h.cache(n, at)
for at in range(0, h.get_size(), 8 << 20):
    h.cache(min(8 << 20, h.get_size() - at), at)
assert h.pread(1, 100) == bytes([0x11])'
run_nbdkit "PATH=/usr/bin:\$PATH nbdsh -u \"\$uri\" -c '$cache'" -- "$work/vm.qmp" disk=vda checkpoint=cached "${common[@]}"
test "$(bitmaps vm)" = '[]'
run_nbdkit "PATH=/usr/bin:\$PATH nbdsh -u \"\$uri\" -c '$cache'; nbdcopy \"\$uri\" null:" -- "$work/vm.qmp" disk=vda \
    checkpoint=copied "${common[@]}"
test "$(bitmaps vm)" = "['copied']"
nothing_left vm
check_nbdkit_log
