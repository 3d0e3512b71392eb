#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# "cmake --install" puts the plugin where nbdkit looks for it, below DESTDIR, with its man page; from there it is loaded.
. "$(dirname "$0")/functions.sh"
requires cmake

build=$(cd "$QPULL_BIN_DIR/.." && pwd)
mkdir "$work/root"
(cd "$build" && DESTDIR=$work/root cmake -DCMAKE_INSTALL_LOCAL_ONLY=1 -P plugin/cmake_install.cmake) >"$work/install.log"
where=$(sed -n 's/^QPULL_NBDKIT_PLUGINDIR:PATH=//p' "$build/CMakeCache.txt") # a packager may have said another place
if [ -z "${QPULL_OTHER_PLUGINDIR:-}" ]; then
    test "$where" = "$(nbdkit --dump-config | sed -n 's/^plugindir=//p')"
fi
plugin=$work/root$where/nbdkit-qpull-plugin.so
expect "$(sanitized_nbdkit "$plugin" --dump-plugin)" '^name=qpull' 'qpull_maps=allocation dirty both' "^path=$plugin"
page=$(find "$work/root" -name 'nbdkit-qpull-plugin.1*')
expect "$(cat "$page")" 'qpull'

disk vda qcow2 16M
start_vm vm vda:qcow2
run_nbdkit "nbdcopy \"\$uri\" $work/out.img" -- "$work/vm.qmp" disk=vda "${common[@]}"
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
nothing_left vm

# By its name, as users say it, where nbdkit's own folder may be lent to it.
if mount --version >/dev/null 2>&1 && unshare -m true 2>/dev/null; then
    unshare -m bash -c "
        set -eu
        mkdir '$work/plugins'
        cp -a '$where'/. '$work/plugins/'
        cp '$plugin' '$work/plugins/'
        mount --bind '$work/plugins' '$where'
        LD_PRELOAD='$preload' ASAN_OPTIONS=detect_leaks=0 nbdkit qpull --dump-plugin" >"$work/dump"
    expect "$(cat "$work/dump")" '^name=qpull' "^path=$where/nbdkit-qpull-plugin.so"
fi
