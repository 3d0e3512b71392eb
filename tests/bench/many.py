#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""One qpulld for many VMs: all of them pulled at once, one nbdcopy each; a = each QEMU exports its frozen disk itself,
b = qpulld. QEMUs (not qemu-storage-daemons: their QMP has no add-fd, getfd and query-status, which qpulld needs) run no
guest and have the same image in memory. The daemon's memory is what it alone has written to (Private_Dirty): what an
idle VM adds to it, what a session adds when it is open, and at most while all are pulled.

    tests/bench/many.py [--rounds N] [--vms N]… [--json FILE] [--quick]"""
import sys
import threading
import time

import bench
import harness
import nbdpull
import worlds
from bench import GIB, MIB
from worlds import CLIENTS

COUNTS = (1, 10, 100)
TOTAL, LEAST, MOST = 3200 * MIB, 32 * MIB, 2048 * MIB  # to pull at once; of one disk
SAMPLE_S = 0.05


class Highest:
    """The highest of a number while it lives."""

    def __init__(self, look):
        self.look, self.most, self.end = look, look(), threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        while not self.end.wait(SAMPLE_S):
            self.most = max(self.most, self.look())

    def stop(self):
        self.end.set()
        self.thread.join()
        return self.most


def pull_all(places, gib, vms, daemon):
    qemu, own = sum(v.cpu() for v in vms), daemon.cpu() if daemon else 0
    done = bench.run_clients([CLIENTS['nbdcopy one connection'](p) for p in places])
    qemu, own = (sum(v.cpu() for v in vms) - qemu) / gib, ((daemon.cpu() - own) if daemon else 0) / gib
    return {'speed': gib / done.seconds, 'qemu': qemu, 'all': qemu + own + done.cpu / gib}


def by_qemu(vms, gib):
    sides = [worlds.Direct(vm) for vm in vms]
    try:
        return pull_all([s.places['vda'] for s in sides], gib, vms, None)
    finally:
        for side in sides:
            side.stop()


def dirty(daemon):
    return bench.memory(daemon.process.pid)['Private_Dirty']


def one_session(daemon, vm):
    """What start-up needed for a moment is given back to the system with the first session, not before."""
    nbdpull.drop(nbdpull.connect(daemon.place(f'{vm.name}/vda').uri))
    daemon.wait_idle(name=vm.name, timeout=120)


def by_qpulld(vms, gib, daemon, idle):
    """Sessions go up side by side, are pulled, and go away. idle: the daemon's memory without any."""
    places = [daemon.place(f'{vm.name}/vda') for vm in vms]
    began, holders = time.monotonic(), [None] * len(vms)

    def open_one(i):
        holders[i] = nbdpull.connect(places[i].uri)

    threads = [threading.Thread(target=open_one, args=(i,)) for i in range(len(vms))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if None in holders:
        raise AssertionError(f'not all sessions came up:\n{daemon.log()}')
    up, opened = time.monotonic() - began, dirty(daemon)
    highest = Highest(lambda: dirty(daemon))
    try:
        result = pull_all(places, gib, vms, daemon)
    finally:
        most = highest.stop()
    for h in holders:
        nbdpull.drop(h)
    for vm in vms:
        daemon.wait_idle(name=vm.name, timeout=120)
    return {**result, 'up': up, 'open': (opened - idle) / len(vms), 'most': (most - idle) / len(vms)}


def idle_memory(folder, vms):
    """What each idle VM adds to the daemon's memory."""
    found = []
    for some in (vms[:1], vms):
        daemon = worlds.Daemon(folder, {v.name: v for v in some}, name=f'idle{len(some)}', linger=0)
        one_session(daemon, some[0])
        found.append(dirty(daemon))
        daemon.stop()
    return (found[1] - found[0]) / (len(vms) - 1)


def measure(folder, n, count, quick):
    size = (4 * MIB if quick else max(LEAST, min(MOST, TOTAL // n))) // MIB * MIB
    gib, image = size * n / GIB, worlds.make_image(f'{folder}/disk.raw', size)
    vms = [worlds.Vm(folder, f'vm{i}', {'vda': image}, wait=False) for i in range(n)]
    for vm in vms:
        vm.wait()
    case, rows = f'{n} VM{"s" if n > 1 else ""}', []
    if n > 1:
        rows.append(bench.row(f'{case}: memory of an idle VM', 'KiB', [],
                              [idle_memory(folder, vms) / 1024 for _ in range(count)], 'less'))
    # All are one client's, and the defaults let one have 64 sessions and 128 connections; here each VM has two.
    daemon = worlds.Daemon(folder, {v.name: v for v in vms}, linger=0,
                           flags=[f'--max-sessions-per-client={n}', f'--max-connections-per-client={2 * n}'])
    one_session(daemon, vms[0])
    idle = dirty(daemon)
    found = bench.rounds({'a': lambda: by_qemu(vms, gib), 'b': lambda: by_qpulld(vms, gib, daemon, idle)}, count,
                         warm_up=not quick)
    a, b = found['a'], found['b']
    rows += [bench.row(f'{case}: {metric}', unit, [x[key] for x in a], [x[key] for x in b], better)
             for metric, unit, key, better in (('throughput', 'GiB/s', 'speed', 'more'),
                                               ('CPU of QEMU', 's/GiB', 'qemu', 'less'),
                                               ('CPU of all', 's/GiB', 'all', 'less'))]
    rows += [bench.row(f'{case}: {metric}', unit, [], [x[key] / scale for x in b], 'less')
             for metric, unit, key, scale in (('all sessions up', 's', 'up', 1),
                                              ('memory of an open session', 'KiB', 'open', 1024),
                                              ('memory of a session at most', 'KiB', 'most', 1024))]
    daemon.stop()
    for vm in vms:
        vm.kill()
    return rows


def main(argv):
    p = bench.parser(__doc__, rounds=5)
    p.add_argument('--vms', type=int, action='append')
    args = bench.parse(p, argv)
    rows = []
    try:
        for n in args.vms or ((1, 3) if args.quick else COUNTS):
            with bench.work_folder(memory=True) as folder:
                rows += measure(folder, n, args.rounds, args.quick)
    finally:
        harness.kill_children()
    bench.finish(args, rows)


if __name__ == '__main__':
    main(sys.argv[1:])
