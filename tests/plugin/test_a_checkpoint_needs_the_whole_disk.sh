#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# A checkpoint is kept where all has been handed out, and dropped where a client has got only a part.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 32M
start_vm vm vda:qcow2
run_nbdkit 'PATH=/usr/bin:$PATH nbdsh -u "$uri" -c "h.pread(65536, 0)"' -- "$work/vm.qmp" disk=vda checkpoint=half "${common[@]}"
test "$(bitmaps vm)" = '[]'
run_nbdkit 'nbdinfo "$uri"' -- "$work/vm.qmp" disk=vda checkpoint=looked "${common[@]}"
test "$(bitmaps vm)" = '[]'
run_nbdkit 'nbdcopy "$uri" null:' -- "$work/vm.qmp" disk=vda checkpoint=whole "${common[@]}"
test "$(bitmaps vm)" = "['whole']"
nothing_left vm
check_nbdkit_log
