#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# The increment as a file of its own: what dirty-map= calls dirty, copied onto monday, is what the disk holds now.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
make_increment vm
run_nbdkit "nbdcopy \"\$uri\" $work/increment.img" -- "$work/vm.qmp" disk=vda since=monday map=dirty \
    dirty-map="$work/increment.json" "${common[@]}"
/usr/bin/python3 -c '
import json, sys
with open(sys.argv[1], "rb") as increment, open(sys.argv[3], "r+b") as image:
    for e in json.load(open(sys.argv[2])):
        if e["type"] & 1:
            increment.seek(e["offset"])
            image.seek(e["offset"])
            image.write(increment.read(e["length"]))' "$work/increment.img" "$work/increment.json" "$work/monday.img"
same "$work/monday.img" "$work/now.img"
check_nbdkit_log
