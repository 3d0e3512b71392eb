#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Installs what is missing to build qpull and to try or test it, on Debian 12 and 13:
#
#   tools/setup.sh build        compiler and libraries
#   tools/setup.sh demo         the same, and what tools/quickstart runs
#   tools/setup.sh test         the same, and what tests/run runs
#   tools/setup.sh analyze      the first, and what tests/analyze and tests/fuzz/run run
#   tools/setup.sh bench        what demo installs, and what tests/bench/run compares with
#   tools/setup.sh --list SET   prints the packages
#
# Says nothing and changes nothing where everything is there. Asks sudo where it is not run by root.
set -euo pipefail

build=(build-essential cmake ninja-build pkg-config libuv1-dev libjson-c-dev libnbd-dev libinih-dev libsystemd-dev
    libgnutls28-dev libseccomp-dev nbdkit-plugin-dev)
demo=(qemu-system-x86 qemu-system-common qemu-utils libnbd-bin python3 python3-libnbd)
fuzz=(clang libclang-rt-dev libcmocka-dev python3)
tests=("${fuzz[@]}" nbdkit gnutls-bin socat valgrind qemu-guest-agent e2fsprogs util-linux mount
    systemd-container)
analyze=("${fuzz[@]}" clang-tidy cppcheck)
bench=(openssl virtnbdbackup libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients util-linux mount)

die()
{
    echo "setup: $*" >&2
    exit 1
}

usage()
{
    sed -n '3,13s/^# \{0,1\}//p' "$0"
    exit "$1"
}

list=no
if [ "${1:-}" = --list ]; then
    list=yes
    shift
fi
case "${1:-}" in
build) packages=("${build[@]}") ;;
demo) packages=("${build[@]}" "${demo[@]}") ;;
test) packages=("${build[@]}" "${demo[@]}" "${tests[@]}") ;;
analyze) packages=("${build[@]}" "${analyze[@]}") ;;
bench) packages=("${build[@]}" "${demo[@]}" "${bench[@]}") ;;
-h | --help) usage 0 ;;
*) usage 2 >&2 ;;
esac
if [ $list = yes ]; then
    printf '%s\n' "${packages[@]}"
    exit 0
fi

command -v apt-get >/dev/null ||
    die "this is not Debian (no apt-get); install what these are called here: ${packages[*]}"

as_root=()
if [ "$(id -u)" != 0 ]; then
    as_root=(sudo)
fi

root_or_die()
{
    if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
        die "not root, and no sudo here; as root, run: $*"
    fi
}

apt()
{
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get -q -o DPkg::Lock::Timeout=120 "$@"
}

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) || state=absent
    [ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    root_or_die "apt-get update && apt-get install --no-install-recommends ${missing[*]}"
    echo "installing: ${missing[*]}"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    # Package lists may be absent (a fresh container) or too old; only then fetch them.
    if ! apt install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
        echo "fetching apt's package lists first"
        apt update >"$log" 2>&1 || { cat "$log" >&2; die "apt-get update failed (above): is there a network?"; }
        apt install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1 || {
            cat "$log" >&2
            die "apt-get could not install: ${missing[*]} (its words are above)"
        }
    fi
fi

# The guest's kernel is fetched with apt as well (and never installed); so the lists must be there and fresh.
if [ "$1" != build ] && [ "$1" != analyze ]; then
    guest="$(dirname "$0")/../tests/guest/build"
    if ! why=$("$guest" 2>&1 >/dev/null); then
        root_or_die "apt-get update"
        echo "fetching apt's package lists for the guest's kernel"
        apt update >/dev/null 2>&1 || die "apt-get update failed: is there a network?"
        "$guest" >/dev/null || die "the test guest cannot be built (above); at first it was: $why"
    fi
fi
