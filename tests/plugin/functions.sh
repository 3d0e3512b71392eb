# shellcheck shell=bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Sourced by every test_*.sh here: what tests/scripts has, and nbdkit with the plugin of this build.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=${PYTHONPATH:-$here/../qemu}
# shellcheck source=tests/scripts/functions.sh
. "$here/../scripts/functions.sh"
requires nbdkit nbdcopy nbdinfo

plugin=$QPULL_BIN_DIR/nbdkit-qpull-plugin.so
if [ ! -e "$plugin" ]; then
    echo "skipped: no $plugin: it was built without nbdkit's headers" >&2
    exit 77
fi
mkdir -p "$work/scratch" "$work/state"
nbdkit_log=$work/nbdkit.log
# What every test says: the machine may be slow, and nothing shall be written outside of its folder.
common=(scratch="$work/scratch" state="$work/state" max-pause=30)

# A plugin with a sanitizer needs its library in nbdkit from the start (see wake_sanitizer.c).
preload=
libraries=$(ldd "$plugin")
for library in asan tsan; do
    path=$(sed -n "s,.*=> \(/.*/lib$library\.so[^ ]*\) .*,\1,p" <<<"$libraries")
    if [ -n "$path" ]; then
        preload=$path:$QPULL_TEST_TOOLS/wake_sanitizer.so
    fi
done

sanitized_nbdkit()
{
    LD_PRELOAD=$preload ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0} timeout -k 10 120 nbdkit "$@"
}

# run_nbdkit COMMAND WORD… -- PARAMETER…: "nbdkit --run", the command sees $uri. Words of nbdkit's own go before "--".
run_nbdkit()
{
    local command=$1 own=()
    shift
    while [ "$1" != -- ]; do
        own+=("$1")
        shift
    done
    shift
    # The sanitizer is not for the programs that nbdkit starts.
    sanitized_nbdkit -v -U - "${own[@]}" --run "unset LD_PRELOAD; $command" "$plugin" "$@" 2>>"$nbdkit_log"
}

# start_nbdkit WORD… -- PARAMETER…: at $socket, its process is $nbdkit_pid; returns when it accepts clients. $under is the
# program that it runs under, if any.
under=()
start_nbdkit()
{
    local own=()
    while [ "$1" != -- ]; do
        own+=("$1")
        shift
    done
    shift
    rm -f "$socket" "$work/nbdkit.pid"
    LD_PRELOAD=$preload ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0} "${under[@]}" nbdkit -f -v -U "$socket" \
        --pidfile="$work/nbdkit.pid" "${own[@]}" "$plugin" "$@" 2>>"$nbdkit_log" &
    nbdkit_pid=$!
    children+=($nbdkit_pid)
    wait_for 60 test -s "$work/nbdkit.pid"
}

# stop_nbdkit: it must end well and have nothing to hide.
stop_nbdkit()
{
    kill -TERM $nbdkit_pid
    wait $nbdkit_pid
    check_nbdkit_log
}

check_nbdkit_log()
{
    if [ -e "$nbdkit_log" ] && grep -E 'Sanitizer|runtime error' "$nbdkit_log"; then
        return 1
    fi
}

# nothing_left VM: no node, export, bitmap, job or descriptor of ours is in its QEMU.
nothing_left()
{
    wait_for 20 /usr/bin/python3 -c '
import re, sys, qmpclient
qmp = qmpclient.Qmp(sys.argv[1])
state = [qmp(c) for c in ("query-named-block-nodes", "query-block-exports", "query-fdsets", "query-jobs")]
sys.exit(bool(re.search("qpull-[0-9a-f]{8}-", str(state))))' "$work/$1.look"
}

# bitmaps VM: names of all bitmaps of its nodes.
bitmaps()
{
    look "$1" "sorted(b['name'] for n in qmp('query-named-block-nodes') for b in n.get('dirty-bitmaps', []) if 'name' in b)"
}

# increments VM: two checkpoints' worth of work: "monday" is made, then the guest writes, zeroes what held data, and
# discards. What the disk held on monday is $work/monday.img; every byte of the disk now is in $work/now.img.
make_increment()
{
    run_nbdkit "nbdcopy \"\$uri\" $work/monday.img" -- qmp="$work/$1.qmp" disk=vda checkpoint=monday "${common[@]}"
    guest_write "$1" vda 'write -q -P 0x33 5M 1M' # where nothing was
    guest_write "$1" vda 'write -q -P 0x44 256k 128k'
    guest_write "$1" vda 'write -q -z 2M 512k' # zeroes over data
    guest_write "$1" vda 'discard -q 2560k 256k'
    run_nbdkit "nbdcopy \"\$uri\" $work/now.img" -- qmp="$work/$1.qmp" disk=vda "${common[@]}"
}

# apply_increment IMAGE INCREMENT MAP: what the map calls dirty is copied onto the image.
apply_increment()
{
    /usr/bin/python3 -c '
import json, sys
with open(sys.argv[1], "r+b") as image, open(sys.argv[2], "rb") as increment:
    for e in json.load(open(sys.argv[3])):
        if e["type"] & 1:
            increment.seek(e["offset"])
            image.seek(e["offset"])
            image.write(increment.read(e["length"]))' "$@"
}

# play PARAMETERS: a documented command from stdin, in $work/out, with this plugin for "qpull" and this test's places; --run's
# command needs no sanitizer.
play()
{
    local script

    script=$(sed -e "s,/run/vm.qmp,$work/vm.qmp," -e "s,/run/qpull/nbd.sock,$socket,; s,--run ',--run 'unset LD_PRELOAD; ," \
        -e "s,nbdkit\( --filter=rate --filter=log\|\) qpull,played\1 $plugin $1,")
    (cd "$work/out" && eval "$script") 2>>"$nbdkit_log"
}

played()
{
    sanitized_nbdkit -v -U - "$@"
}

# same FILE FILE: byte by byte.
same()
{
    if ! cmp "$1" "$2"; then
        echo "$0: $1 and $2 differ" >&2
        return 1
    fi
}

# What failed may have had its words sent to nbdkit's log. A test that has more to undo says so in $undo.
undo=
show_log_and_cleanup()
{
    local status=$?
    set +e
    if [ $status -ne 0 ] && [ $status -ne 77 ] && [ -e "$nbdkit_log" ]; then
        tail -n 60 "$nbdkit_log" >&2
    fi
    $undo
    (exit $status) # which cleanup looks at
    cleanup
}
trap show_log_and_cleanup EXIT
set -o errtrace
