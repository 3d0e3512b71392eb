#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# What the compiler and the linker can do for us is in the programs and in the plugin, looked at in the files themselves.
set -eu -o pipefail

if [ "${QPULL_BUILD_TYPE:-}" != Release ]; then
    echo "skipped: this is no release build (QPULL_BUILD_TYPE=${QPULL_BUILD_TYPE:-})" >&2
    exit 77
fi
if ! command -v readelf >/dev/null; then
    echo "skipped: no readelf" >&2
    exit 77
fi
failed=0

# check WORDS COMMAND…
check()
{
    local words=$1
    shift
    if ! "$@"; then
        echo "$file: $words" >&2
        failed=1
    fi
}

has()
{
    grep -qE -- "$2" <<<"$1"
}

lacks()
{
    ! grep -qE -- "$2" <<<"$1"
}

for name in qpulld qpull nbdkit-qpull-plugin.so; do
    file=$QPULL_BIN_DIR/$name
    [ -e "$file" ] || continue # the plugin, where there is no nbdkit
    headers=$(readelf -W -h -l "$file") dynamic=$(readelf -W -d "$file") symbols=$(readelf -W --dyn-syms "$file")
    # Those of our own files: what the C library's start files say of themselves is another matter.
    flags=$(readelf --debug-dump=info "$file" 2>/dev/null | grep -E 'DW_AT_producer.*-fPI[CE]' || true)
    check "does not lie anywhere in memory (no PIE)" has "$headers" 'Type: +DYN'
    check "has no RELRO" has "$headers" 'GNU_RELRO'
    check "binds late: RELRO is not full" has "$dynamic" 'BIND_NOW|FLAGS.*NOW'
    check "has text relocations" lacks "$dynamic" 'TEXTREL'
    check "has no word about its stack" has "$headers" 'GNU_STACK'
    check "has an executable stack" lacks "$headers" 'GNU_STACK.*RWE'
    check "has memory that is written and run" lacks "$headers" 'LOAD.*RWE'
    check "has a search path of its own" lacks "$dynamic" 'RPATH|RUNPATH'
    check "has no stack protector" has "$symbols" '__stack_chk_fail'
    check "calls none of the checked functions (fortify)" has "$symbols" '_chk@GLIBC'
    if [ -n "$flags" ]; then # gcc notes them
        check "is not all built against stack clashes" lacks "$(grep -v -- -fstack-clash-protection <<<"$flags" || true)" .
        check "is not all built with stack protectors" lacks "$(grep -v -- -fstack-protector-strong <<<"$flags" || true)" .
        if has "$headers" 'X86-64'; then # the file's own mark is lost where the C library's start files have none
            check "does not mark where calls may land" lacks "$(grep -v -- -fcf-protection <<<"$flags" || true)" .
        fi
    fi
done
exit $failed
