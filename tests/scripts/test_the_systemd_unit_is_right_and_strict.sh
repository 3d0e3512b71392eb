#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# systemd takes the unit without a word, calls its exposure low, and it says what this build installs.
set -eu -o pipefail

most=20 # tenths of systemd's 0 to 10 points (0: nothing is exposed); 14 with systemd 252

unit=${QPULL_BUILD_DIR:?says where the build is}/server/qpulld.service
if ! command -v systemd-analyze >/dev/null; then
    echo "skipped: no systemd-analyze" >&2
    exit 77
fi
work=$(mktemp -d /tmp/qpull-script-XXXXXX)
trap 'rm -rf "$work"' EXIT

grep -qE '^ExecStart=/.*/qpulld$' "$unit"
sed 's|^ExecStart=.*|ExecStart=/bin/true|' "$unit" >"$work/qpulld.service" # it is not installed
if ! systemd-analyze verify "$work/qpulld.service" >"$work/words" 2>&1 || [ -s "$work/words" ]; then
    if grep -qi 'failed to \(initialize manager\|create\|connect\)' "$work/words"; then
        echo "skipped: systemd-analyze does not run here: $(cat "$work/words")" >&2
        exit 77
    fi
    cat "$work/words" >&2
    exit 1
fi
systemd-analyze security --offline=true --threshold=$most "$work/qpulld.service" >"$work/words" ||
    {
        cat "$work/words" >&2
        exit 1
    }
tail -n 1 "$work/words"
sysusers=$(dirname "$0")/../../server/qpull.sysusers.conf
user=$(sed -n 's/^User=//p' "$unit")
grep -q "^u $user " "$sysusers"
if command -v systemd-sysusers >/dev/null; then
    mkdir -p "$work/root/etc"
    systemd-sysusers --root="$work/root" "$(realpath "$sysusers")" 2>"$work/words" || { cat "$work/words" >&2; exit 1; }
    grep -q "^$user:.*nologin" "$work/root/etc/passwd"
fi
