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
here_dirs=(scratch="$work/scratch" state="$work/state" max-pause=30)

# A plugin with a sanitizer needs its library in nbdkit from the start. The programs that nbdkit starts need it not.
preload=
for library in asan tsan; do
    if ldd "$plugin" | grep -q "lib$library\.so"; then
        preload=$(ldd "$plugin" | sed -n "s,.*=> \(/.*/lib$library\.so[^ ]*\) .*,\1,p")
    fi
done

# nbdkit_qpull PARAMETER…: in the foreground of a subshell, so that --run and & work as they do with nbdkit. Words of
# nbdkit's own go before: nbdkit_qpull --filter=log … qmp=…
nbdkit_qpull()
{
    local own=() given=() word
    for word; do
        case $word in
        -*) own+=("$word") ;;
        *) break ;;
        esac
        shift
    done
    given=("$@")
    LD_PRELOAD=$preload ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0} nbdkit "${own[@]}" "$plugin" "${given[@]}"
}

# start_nbdkit WORD… -- PARAMETER…: at $socket, its process is $nbdkit_pid; returns when it accepts clients.
start_nbdkit()
{
    local own=()
    while [ "$1" != -- ]; do
        own+=("$1")
        shift
    done
    shift
    rm -f "$socket" "$work/nbdkit.pid"
    LD_PRELOAD=$preload ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0} nbdkit -f -v -U "$socket" \
        --pidfile="$work/nbdkit.pid" "${own[@]}" "$plugin" "$@" 2>>"$nbdkit_log" &
    nbdkit_pid=$!
    children+=($nbdkit_pid)
    wait_for 30 test -s "$work/nbdkit.pid"
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
import sys, qmpclient
qmp = qmpclient.Qmp(sys.argv[1])
state = [qmp(c) for c in ("query-named-block-nodes", "query-block-exports", "query-fdsets", "query-jobs")]
sys.exit("qpull-" in str(state))' "$work/$1.look"
}

# bitmaps VM: names of all bitmaps of its nodes.
bitmaps()
{
    look "$1" "sorted(b['name'] for n in qmp('query-named-block-nodes') for b in n.get('dirty-bitmaps', []) if 'name' in b)"
}

# frozen_copy VM DISK FILE: what the disk holds now, as QEMU itself reads it, while nobody writes.
same()
{
    if ! cmp "$1" "$2"; then
        echo "$0: $1 and $2 differ" >&2
        return 1
    fi
}

at_exit_show_log()
{
    if [ -e "$nbdkit_log" ]; then
        tail -n 60 "$nbdkit_log" >&2
    fi
}
trap 'echo "$0: line $LINENO: \"$BASH_COMMAND\" failed" >&2; at_exit_show_log' ERR
