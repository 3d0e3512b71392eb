# shellcheck shell=bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Sourced by every test_*.sh: a folder of its own in $work, a QEMU without a guest, a qpulld, and an end that leaves
# nothing. A command that fails ends the test, with its line. QPULL_BIN_DIR says where qpulld is.
set -eu -o pipefail

export PATH=${QPULL_BIN_DIR:?says where qpulld is}:$PATH
export PYTHONPATH=${PYTHONPATH:-$(dirname "$0")/../qemu} PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d /tmp/qpull-script-XXXXXX)
children=()
socket=$work/nbd.sock
control=$work/control.sock
trap cleanup EXIT
trap 'echo "$0: line $LINENO: \"$BASH_COMMAND\" failed" >&2' ERR

cleanup()
{
    local status=$?
    {
        for pid in "${children[@]}"; do
            kill -9 "$pid" || true
        done
        wait
    } 2>/dev/null # the shell tells of each
    if [ $status -ne 0 ] && [ $status -ne 77 ] && [ -e "$work/qpulld.log" ]; then
        tail -n 40 "$work/qpulld.log" >&2
    fi
    rm -rf "$work"
}

# requires PROGRAM…: the test is skipped where one is missing.
requires()
{
    for program; do
        if ! command -v "$program" >/dev/null; then
            echo "skipped: no $program" >&2
            exit 77
        fi
    done
}
requires qpulld qemu-system-x86_64 qemu-img qemu-io

# wait_for SECONDS COMMAND…: until it succeeds.
wait_for()
{
    local until=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -ge $until ]; then
            echo "not in time: $*" >&2
            return 1
        fi
        sleep 0.05
    done
}

# disk NAME FORMAT SIZE [OPTIONS]: an image, pattern 0x11 in its first MiB and 0x22 in its third.
disk()
{
    qemu-img create -q -f "$2" ${4:+-o "$4"} "$work/$1.img" "$3"
    qemu-io -f "$2" -c 'write -q -P 0x11 0 1M' -c 'write -q -P 0x22 2M 1M' "$work/$1.img"
}

# start_vm NAME DISK:FORMAT…: its monitors are $work/NAME.qmp and $work/NAME.look.
start_vm()
{
    local name=$1 args=()
    shift
    for pair; do
        local d=${pair%:*} f=${pair#*:}
        args+=(-blockdev "driver=$f,node-name=node-$d,discard=unmap,file.driver=file,file.filename=$work/$d.img")
        args+=(-device "virtio-blk-pci,id=$d,drive=node-$d")
    done
    qemu-system-x86_64 -accel tcg -machine pc -m 64 -nodefaults -no-user-config -display none -name "$name" \
        -qmp "unix:$work/$name.qmp,server=on,wait=off" -qmp "unix:$work/$name.look,server=on,wait=off" \
        "${args[@]}" </dev/null >"$work/$name.log" 2>&1 &
    children+=($!)
    wait_for 20 test -S "$work/$name.look"
}

# look NAME PYTHON: an expression with qmp(command, arguments) on the VM's other monitor; its value is printed.
look()
{
    /usr/bin/python3 -c 'import sys, qmpclient; qmp = qmpclient.Qmp(sys.argv[1]); print(eval(sys.argv[2]))' \
        "$work/$1.look" "$2"
}

# guest_write NAME DISK QEMU-IO-COMMAND: through the device, as a guest does it.
guest_write()
{
    local device=/machine/peripheral/$2/virtio-backend

    look "$1" "qmp('human-monitor-command', {'command-line': 'qemu-io -d $device \"$3\"'})"
}

# start_qpulld VM… [-- FLAG…]: $linger seconds of linger, 0 if it is not set. $port is its TCP port.
start_qpulld()
{
    local args=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        args+=("--vm=$1=$work/$1.qmp")
        shift
    done
    [ $# -eq 0 ] || shift
    mkdir -p "$work/scratch" "$work/state"
    rm -f "$work/pid"
    qpulld "${args[@]}" --listen=unix:"$socket" --listen=tcp:127.0.0.1:0 --allow=ip:127.0.0.1=\* --control="$control" \
        --scratch="$work/scratch" --state="$work/state" --pidfile="$work/pid" --linger="${linger:-0}" --log=debug "$@" \
        >"$work/stdout" 2>>"$work/qpulld.log" &
    qpulld_pid=$!
    children+=($qpulld_pid)
    wait_for 20 test -e "$work/pid"
    wait_for 20 grep -q 127.0.0.1 "$work/stdout"
    port=$(sed -n 's/.*127\.0\.0\.1:\([0-9]*\).*/\1/p' "$work/stdout")
}

# uri EXPORT, tcp_uri EXPORT: it must need no escapes.
uri()
{
    echo "nbd+unix:///$1?socket=$socket"
}

tcp_uri()
{
    echo "nbd://127.0.0.1:$port/$1"
}

# wait_idle NAME: no session is left.
wait_idle()
{
    wait_for 20 /usr/bin/python3 -c '
import sys, qmpclient
vm = [v for v in qmpclient.Qmp(sys.argv[1])("query-vms") if v["name"] == sys.argv[2]][0]
sys.exit(vm["session"] is not None or vm["state"] != "ready")' "$control" "$1"
}

# stop_qpulld: it must end well and have nothing to hide.
stop_qpulld()
{
    kill -TERM $qpulld_pid
    wait $qpulld_pid
    if grep -E 'Sanitizer|runtime error' "$work/qpulld.log"; then
        return 1
    fi
}

# expect TEXT PATTERN…: extended regular expressions that must be found in it.
expect()
{
    local text=$1
    shift
    for pattern; do
        if ! grep -qE -- "$pattern" <<<"$text"; then
            echo "$0: \"$pattern\" is not in: $text" >&2
            exit 1
        fi
    done
}
