#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# What is said wrongly is refused before anything begins, in words.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 8M
start_vm vm vda:qcow2
refused()
{
    local pattern=$1
    shift
    if sanitized_nbdkit -U - --run true "$plugin" "$@" 2>"$work/words"; then
        echo "not refused: $*" >&2
        exit 1
    fi
    expect "$(cat "$work/words")" "$pattern"
}
refused 'qmp=SOCKET must be said' disk=vda
refused 'qmp=.*No such file' qmp="$work/none"
refused 'is not a socket' qmp="$work/vda.img"
refused 'map=dirty needs since=' qmp="$work/vm.qmp" map=dirty "${common[@]}"
refused 'must be allocation, dirty or both' qmp="$work/vm.qmp" map=all
refused 'disk=vda is there twice' qmp="$work/vm.qmp" disk=vda disk=vda
refused 'quiesce=require needs qga=' qmp="$work/vm.qmp" quiesce=require "${common[@]}"
refused 'exclude each other' qmp="$work/vm.qmp" server=unix:/x
refused 'needs vm=NAME' server=unix:"$work/vm.qmp"
refused 'matter of the qpulld' server=unix:"$work/vm.qmp" vm=vm scratch=/tmp
refused 'must be unix:PATH' server=tcp:localhost vm=vm
refused 'unknown parameter "disks"' qmp="$work/vm.qmp" disks=vda
refused 'number of seconds' qmp="$work/vm.qmp" timeout=soon
refused 'has no effect' qmp="$work/vm.qmp" since=monday "${common[@]}"
for twice in map=dirty timeout=5 linger=5 max-pause=5 quiesce=off scratch="$work" state="$work" checkpoint=a since=a vm=a; do
    refused "${twice%%=*}= is there twice" qmp="$work/vm.qmp" $twice $twice
done
place='{"driver":"file","filename":"/tmp/x"}'
refused 'scratch= is there twice' qmp="$work/vm.qmp" scratch="$place" scratch="$place"
refused 'scratch=.*: is not a directory' qmp="$work/vm.qmp" scratch="$work/vda.img"
refused 'state=.*: No such file' qmp="$work/vm.qmp" scratch="$work" state="$work/none"
refused 'is no regular file' qmp="$work/vm.qmp" since=monday dirty-map=/dev/stdout "${common[@]}"
refused 'dirty-map= needs since' qmp="$work/vm.qmp" dirty-map="$work/x" "${common[@]}"
refused 'name the same checkpoint' qmp="$work/vm.qmp" since=monday checkpoint=monday map=dirty "${common[@]}"
refused "checkpoint=a/b: .*" qmp="$work/vm.qmp" checkpoint=a/b "${common[@]}"
refused 'vm=a@b: must be' qmp="$work/vm.qmp" vm=a@b "${common[@]}"
refused 'number of seconds' qmp="$work/vm.qmp" linger=-1
refused 'number of seconds' qmp="$work/vm.qmp" timeout=99999999999999999999
refused 'must be off, try or require' qmp="$work/vm.qmp" quiesce=yes
expect "$(sanitized_nbdkit "$plugin" --help)" 'SOCKET' 'checkpoint=NAME'
expect "$(sanitized_nbdkit "$plugin" --dump-plugin)" 'qpull_maps=allocation dirty both' 'magic_config_key=qmp' \
    'thread_model=parallel'
