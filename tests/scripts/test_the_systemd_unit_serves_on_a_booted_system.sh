#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# systemd boots in a container (its own network, and what is written goes to a folder that is thrown away), qpull is
# installed there, and tests/qemu/booted.py is run: the unit's sandbox as it is, with real QEMUs.
set -eu -o pipefail

skip()
{
    echo "skipped: $*" >&2
    exit 77
}

top=$(cd "$(dirname "$0")/../.." && pwd)
build=${QPULL_BUILD_DIR:?says where the build is}
[ "${QPULL_BUILD_TYPE:?}" = Release ] || skip "sanitizers do not bear the unit's sandbox; the release build has this test"
[ "$(id -u)" = 0 ] || skip "only root can boot a container"
command -v systemd-nspawn >/dev/null || skip "no systemd-nspawn (Debian: systemd-container)"

work=$(mktemp -d /var/tmp/qpull-booted-XXXXXX)
root=$work/root
clean_up()
{
    umount "$root" 2>/dev/null || true
    rm -rf --one-file-system "$work" # never through a mount that would not go
}
trap clean_up EXIT
mkdir "$root" "$work/written" "$work/work"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/written,workdir=$work/work" "$root" ||
    skip "no overlay file system here"

# Where the default prefix has it; the unit names the program there.
DESTDIR=$root cmake --install "$build" --prefix /usr/local >"$work/words"
units=$root/etc/systemd/system
mkdir -p "$units" "$root/var/lib/vms"
rm -f "$root/etc/machine-id" "$units/default.target"
for unit in systemd-networkd-wait-online NetworkManager-wait-online; do
    ln -sf /dev/null "$units/$unit.service"
done
cat >"$units/booted.target" <<EOF
[Unit]
Requires=basic.target
After=basic.target
Wants=booted.service
AllowIsolate=yes
EOF
cat >"$units/booted.service" <<EOF
[Unit]
After=basic.target
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
Environment=TMPDIR=/var/lib/vms PYTHONDONTWRITEBYTECODE=1 QPULL_BIN_DIR=/usr/local/sbin PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ExecStart=/usr/bin/python3 $top/tests/qemu/booted.py
ExecStopPost=/bin/sh -c 'echo "\$EXIT_CODE \$EXIT_STATUS" >/booted.status'
StandardOutput=file:/booted.log
StandardError=inherit
TimeoutStartSec=90
EOF
# A clone in /tmp would be hidden by the container's own.
timeout -k 5 105 systemd-nspawn --quiet --directory="$root" --machine="qpull-$$" --register=no --keep-unit --private-network \
    --bind="$top" --console=pipe --boot systemd.unit=booted.target >"$work/console" 2>&1 </dev/null || true
if ! [ -e "$root/booted.log" ]; then
    grep -qi 'welcome to' "$work/console" || skip "no container can be booted here: $(tail -n 3 "$work/console")"
    cat "$work/console" >&2
    exit 1
fi
cat "$root/booted.log"
[ "$(cat "$root/booted.status")" = "exited 0" ]
