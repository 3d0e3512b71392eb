#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What recording checkpoints cost the guest's writes: small random writes to a qcow2 disk with 0, 1, 10, 20 and 100
recording bitmaps, interleaved, as ratios to none. CPU is QEMU's own, which other load on the machine hardly changes.

    tests/bench/checkpoint_cost.py [ROUNDS] [--json FILE]"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '../qemu'))
import harness  # noqa: E402
from harness import MIB  # noqa: E402
from qmpclient import Qmp  # noqa: E402

COUNTS = (0, 1, 10, 20, 100)
SIZE, WRITES, LENGTH, DEPTH = 1024 * MIB, 60000, 4096, 16
STEP = 4096 * 4099  # odd, so that the writes wander over the whole disk


def cpu_seconds(pid):
    with open(f'/proc/{pid}/stat', encoding='ascii') as f:
        fields = f.read().rsplit(')', 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


class Disk:
    """A QEMU whose only disk is written through an NBD export of its own, standing in for the guest."""

    def __init__(self, folder, nbitmaps):
        self.nbitmaps, self.socket = nbitmaps, f'{folder}/{nbitmaps}.nbd'
        path, monitor = f'{folder}/{nbitmaps}.qcow2', f'{folder}/{nbitmaps}.qmp'
        harness.run(['qemu-img', 'create', '-f', 'qcow2', '-o', 'preallocation=metadata', path, str(SIZE)])
        self.process = harness.spawn(['qemu-system-x86_64', '-machine', 'none', '-nodefaults', '-display', 'none',
                                      '-qmp', f'unix:{monitor},server=on,wait=off'])
        harness.wait_until(lambda: os.path.exists(monitor), 20, 'the monitor')
        self.qmp = Qmp(monitor)
        self.qmp('blockdev-add', {'node-name': 'disk', 'driver': 'qcow2', 'file': {'driver': 'file', 'filename': path}})
        for i in range(nbitmaps):
            self.qmp('block-dirty-bitmap-add', {'node': 'disk', 'name': f'checkpoint{i}', 'persistent': True})
        self.qmp('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': self.socket}}})
        self.qmp('block-export-add', {'type': 'nbd', 'id': 'e', 'node-name': 'disk', 'name': 'd', 'writable': True})

    def bench(self):
        """(seconds, QEMU's CPU seconds) of the same writes as ever."""
        cpu, began = cpu_seconds(self.process.pid), time.monotonic()
        harness.run(['qemu-img', 'bench', '-w', '-f', 'raw', '-c', str(WRITES), '-d', str(DEPTH), '-s', str(LENGTH),
                     '-S', str(STEP % SIZE), f'nbd+unix:///d?socket={self.socket}'])
        return time.monotonic() - began, cpu_seconds(self.process.pid) - cpu


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('rounds', nargs='?', type=int, default=5)
    parser.add_argument('--json')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None) as folder:
        try:
            disks = [Disk(folder, n) for n in COUNTS]
            for disk in disks:
                disk.bench()  # warms up
            rounds = []
            for _ in range(args.rounds):
                order = harness.rng.sample(disks, len(disks))
                took = {disk.nbitmaps: disk.bench() for disk in order}
                rounds.append([took[n] for n in COUNTS])
        finally:
            harness.kill_children()
    version = subprocess.run(['qemu-system-x86_64', '--version'], capture_output=True, text=True, check=True).stdout
    print(f'{version.splitlines()[0]}; {WRITES} writes of {LENGTH} bytes, queue depth {DEPTH}, in memory; '
          f'{args.rounds} rounds; ratio to none: median (range)')
    result = []
    for i, n in enumerate(COUNTS):
        row = {'bitmaps': n}
        for what, k in (('time', 0), ('cpu', 1)):
            ratios = [r[i][k] / r[0][k] for r in rounds]
            row[what] = {'median': statistics.median(ratios), 'min': min(ratios), 'max': max(ratios)}
        row['cpu-us-per-write'] = statistics.median(r[i][1] for r in rounds) / WRITES * 1e6
        result.append(row)
        print('{:>4} checkpoints: time {:.2f} ({:.2f}-{:.2f})  CPU of QEMU {:.2f} ({:.2f}-{:.2f}), {:.1f} us a write'.format(
            n, *row['time'].values(), *row['cpu'].values(), row['cpu-us-per-write']))
    if args.json:
        with open(args.json, 'w', encoding='ascii') as f:
            json.dump(result, f, indent=1)


if __name__ == '__main__':
    main()
