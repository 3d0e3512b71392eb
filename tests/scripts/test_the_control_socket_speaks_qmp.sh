#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Greeting, capabilities, ids, errors: what any QMP shell expects; and nobody else may use it.
. "$(dirname "$0")/functions.sh"
requires socat
disk vda qcow2 4M
start_vm vm vda:qcow2
start_qpulld vm
wait_idle vm
commands=('{"execute": "qmp_capabilities", "id": 1}'
    '{"execute": "query-disks", "arguments": {"vm": "vm"}, "id": {"a": 2}}' '{"execute": "nonsense", "id": "x"}')
talk=$(printf '%s\n' "${commands[@]}" | socat -t 5 - "UNIX-CONNECT:$control") # it shuts its writing side and waits
expect "$(sed -n 1p <<<"$talk")" '"QMP"' '"qpull"'
for pattern in '^\{"return": ?\{ ?\}, ?"id": ?1\}' '"vda".*"size": ?4194304.*"a": ?2' 'CommandNotFound.*"id": ?"x"'; do
    expect "$(sed -n '2,$p' <<<"$talk")" "$pattern"
done
expect "$(stat -c %a "$control")" '^600$'
expect "$(stat -c %a "$socket")" '^6[06][06]$'
stop_qpulld
