#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Every example of the man page is run as it stands there, but for paths, and does what is said.
. "$(dirname "$0")/functions.sh"

# example NAME: the text of it.
example()
{
    /usr/bin/python3 - "$here/../../plugin/nbdkit-qpull-plugin.pod" "$1" <<'PYTHON'
import re
import sys

pod = open(sys.argv[1], encoding='ascii').read()
print(re.search(rf'^=for comment example {sys.argv[2]}\n\n((?: .*\n)+)', pod, re.M).group(1))
PYTHON
}

disk vda qcow2 32M
start_vm vm vda:qcow2
mkdir "$work/out"
own="${common[*]}"
example full | play "$own"
qemu-img compare -q -U -f raw -F qcow2 "$work/out/vda.img" "$work/vda.img"
guest_write vm vda 'write -q -P 0x44 256k 128k'
guest_write vm vda 'write -q -z 2M 512k'
cp "$work/out/vda.img" "$work/monday.img"
run_nbdkit "nbdcopy \"\$uri\" $work/now.img" -- "$work/vm.qmp" "${common[@]}"
example apply | play "$own"
same "$work/out/vda.img" "$work/now.img"
test "$(bitmaps vm)" = "['monday', 'tuesday']"
example file | play "$own"
test -s "$work/out/increment.img"
grep -q dirty "$work/out/increment.json"
rm "$work/out/vda.img"
example filters | play "$own"
same "$work/out/vda.img" "$work/now.img"
start_qpulld vm
rm "$work/out/vda.img"
example through | play ''
same "$work/out/vda.img" "$work/now.img"
stop_qpulld
check_nbdkit_log
