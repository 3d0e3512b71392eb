#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# The README's commands for nbdkit are run as they stand there, but for paths: a full copy, the increment onto it, and the
# increment as a file.
. "$(dirname "$0")/functions.sh"

# readme N: the text of its Nth command.
readme()
{
    /usr/bin/python3 - "$here/../../README.md" "$1" <<'PYTHON'
import re
import sys

found = re.findall(r'^    nbdkit qpull(?:.*\\\n)*.*\n', open(sys.argv[1], encoding='utf-8').read(), re.M)
assert len(found) == 3, found
print(found[int(sys.argv[2])])
PYTHON
}

disk vda qcow2 32M
start_vm vm vda:qcow2
mkdir "$work/out"
own="${common[*]}"
readme 0 | play "$own"
qemu-img compare -q -U -f raw -F qcow2 "$work/out/vda.img" "$work/vda.img"
guest_write vm vda 'write -q -P 0x55 256k 128k'
guest_write vm vda 'write -q -z 0 512k'
run_nbdkit "nbdcopy \"\$uri\" $work/now.img" -- "$work/vm.qmp" "${common[@]}"
cp "$work/out/vda.img" "$work/monday.img"
readme 1 | play "$own"
same "$work/out/vda.img" "$work/now.img"
test "$(bitmaps vm)" = "['monday', 'tuesday']"
readme 2 | play "$own"
apply_increment "$work/monday.img" "$work/out/vda.inc" "$work/out/vda.json"
same "$work/monday.img" "$work/now.img"
nothing_left vm
check_nbdkit_log
