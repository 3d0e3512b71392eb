#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""From NBD_OPT_GO to the first byte of frozen data, on an idle guest, and for how long its I/O was held meanwhile.

    tests/bench/freeze.py [--rounds N] [--disks 1,4,8] [--since] [--bare] [--json FILE] [NAME=BIN_DIR …]

Every NAME is one more build whose daemon takes its turn (A B A B …), each at a monitor of its own; without any it is
QPULL_BIN_DIR alone. --since: each session asks for a dirty map, too. --bare: no guest runs in QEMU."""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '../qemu'))
import harness  # noqa: E402
import nbd  # noqa: E402
import nbdpull  # noqa: E402
from harness import MIB, Disk  # noqa: E402

SIZE = 64 * MIB
CHECKPOINT = 'before'
VALUES = ('go-ms', 'first-byte-ms', 'setup-ms', 'flush-ms', 'pause-ms')


def one_session(daemon, disk, since):
    h = nbd.NBD()
    for context in [nbdpull.ALLOCATION] + [nbdpull.dirty_context(CHECKPOINT)] * since:
        h.add_meta_context(context)
    h.set_opt_mode(True)
    h.connect_uri(daemon.uri(f'vm/{disk}'))
    begin = time.perf_counter()
    h.opt_go()
    went = time.perf_counter()
    h.pread(4096, 0)
    end = time.perf_counter()
    session = daemon.ask('query-sessions')[0]
    h.shutdown()
    daemon.wait_idle()
    return dict(zip(VALUES, ((went - begin) * 1000, (end - begin) * 1000, session['setup-ms'], session['flush-ms'],
                             session['pause-us'] / 1000)))


def measure(builds, rounds, ndisks, since, bare):
    names = [f'vd{"abcdefghijklmnop"[i]}' for i in range(ndisks)]
    found = {b: {v: [] for v in VALUES} for b in builds}
    with tempfile.TemporaryDirectory(prefix='qpull-bench-') as folder:
        guest = (harness.Bare if bare else harness.Guest)(folder, [Disk(n, SIZE) for n in names])
        for n in names:
            guest.write(n, 0, MIB, 1)
        monitors = (guest.qmp_path, guest.spare_qmp_path)
        daemons = {b: harness.Qpulld(folder, {'vm': monitors[i % 2]}, linger=0, name=f'd{i}', start=False,
                                     program=f'{path}/qpulld') for i, (b, path) in enumerate(builds.items())}
        if since:
            for d in list(daemons.values())[:1]:
                d.start()
                d.qpull('checkpoint', 'create', 'vm', CHECKPOINT)
                d.stop()
        if len(builds) <= len(monitors):
            for d in daemons.values():
                d.start()
                one_session(d, names[0], since)  # the self-test of QEMU, and whatever is slow but once
        for _ in range(rounds):
            for b in harness.rng.sample(list(builds), len(builds)):
                if len(builds) > len(monitors):
                    daemons[b].start()
                    one_session(daemons[b], names[0], since)
                for v, value in one_session(daemons[b], names[0], since).items():
                    found[b][v].append(value)
                if len(builds) > len(monitors):
                    daemons[b].stop()
        for d in daemons.values():
            if d.process and d.process.poll() is None:
                d.stop()
        guest.kill()
    return found


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split('\n\n')[1].strip())
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--disks', default='1,4,8')
    parser.add_argument('--since', action='store_true')
    parser.add_argument('--bare', action='store_true')
    parser.add_argument('--json')
    parser.add_argument('builds', nargs='*', metavar='NAME=BIN_DIR')
    o = parser.parse_args()
    builds = dict(b.split('=', 1) for b in o.builds) or {'qpulld': harness.bin_dir()}
    report = {'qemu': '.'.join(map(str, harness.qemu_version())), 'rounds': o.rounds, 'since': o.since, 'rows': []}
    print(f'QEMU {report["qemu"]}, median (least to most) of {o.rounds}, ms', flush=True)
    for ndisks in map(int, o.disks.split(',')):
        for build, found in measure(builds, o.rounds, ndisks, o.since, o.bare).items():
            row = {'disks': ndisks, 'build': build}
            for v in VALUES:
                row[v] = {'median': statistics.median(found[v]), 'least': min(found[v]), 'most': max(found[v])}
            report['rows'].append(row)
            print(f'{ndisks} disks, {build}: ' + '; '.join(
                f'{v[:-3]} {row[v]["median"]:.1f} ({row[v]["least"]:.1f}-{row[v]["most"]:.1f})' for v in VALUES),
                flush=True)
    if o.json:
        with open(o.json, 'w', encoding='utf-8') as out:
            json.dump(report, out, indent=1)
            out.write('\n')


if __name__ == '__main__':
    main()
