#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backup costs the guest's writes. A real guest writes 4 KiB at random places of a raw disk, a little pause after
each, through spans of time in turn: without a backup; with a frozen disk that nobody reads; with a client that reads as
fast as it can; with one that asks for much and takes nothing. Frozen by qpulld, and as libvirt does it (a backup job
with sync=none into a qcow2 scratch file, which QEMU exports), in the same guest. Latencies are the guest's own.

    tests/bench/guest.py [--rounds N] [--span SECONDS] [--mib N] [--json FILE] [--quick]"""
import contextlib
import sys
import threading
import time

import bench
import harness
import nbdpull
import rawnbd
import worlds
from bench import MIB

PAUSE_US = 500
STALLED_READS, STALLED_LENGTH = 16, 256 << 10  # what the client asks for that takes nothing
METRICS = (('p50', 'us', 'p50-us', 'less'), ('p99', 'us', 'p99-us', 'less'), ('slowest', 'us', 'slowest-us', 'less'),
           ('writes', '1/s', 'rate', 'more'))


class NoModel:
    """The bytes do not matter here."""

    def replay(self, *_):
        pass


class Libvirt:
    """What libvirt 9 tells QEMU to do for a pull backup, seen by its QMP; in the order of it."""

    def __init__(self, guest, folder):
        self.guest, self.socket, self.scratch = guest, f'{folder}/libvirt.nbd', f'{folder}/libvirt.scratch'

    @contextlib.contextmanager
    def session(self):
        q, disk = self.guest.look, self.guest.disks['vda']
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', self.scratch, str(disk.size)])
        q('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': self.socket}}})
        q('blockdev-add', {'driver': 'qcow2', 'node-name': 'scratch', 'backing': disk.node,
                           'file': {'driver': 'file', 'filename': self.scratch}})
        q('transaction', {'actions': [{'type': 'blockdev-backup', 'data': {
            'job-id': 'backup', 'device': disk.node, 'target': 'scratch', 'sync': 'none', 'auto-finalize': True,
            'auto-dismiss': True}}]})
        q('block-export-add', {'type': 'nbd', 'id': 'export', 'node-name': 'scratch', 'name': 'vda'})
        try:
            yield worlds.Place('vda', self.socket, None)
        finally:
            q('nbd-server-stop')
            harness.wait_until(lambda: not q('query-block-exports'), 30, 'the end of the export')
            q('block-job-cancel', {'device': 'backup'})
            harness.wait_until(lambda: not q('query-jobs'), 30, 'the end of the job')
            q('blockdev-del', {'node-name': 'scratch'})


class Qpull:
    def __init__(self, guest, folder):
        self.daemon = worlds.Daemon(folder, {'vm': guest}, linger=0)

    @contextlib.contextmanager
    def session(self):
        place = self.daemon.place('vm/vda')
        holder = nbdpull.connect(place.uri)
        try:
            yield place
        finally:
            nbdpull.drop(holder)
            self.daemon.wait_idle()


@contextlib.contextmanager
def nobody(_):
    yield


@contextlib.contextmanager
def reader(place):
    """nbdcopy, again and again."""
    end, problems = threading.Event(), []

    def read():
        try:
            while not end.is_set():
                bench.run_clients([worlds.CLIENTS['nbdcopy'](place)])
        except AssertionError as e:
            problems.append(e)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    if problems:
        raise problems[0]


@contextlib.contextmanager
def stalled(place):
    raw = rawnbd.Raw(place.path)
    raw.go(place.export)
    for i in range(STALLED_READS):
        raw.request(rawnbd.CMD_READ, i * STALLED_LENGTH, STALLED_LENGTH, cookie=i)
    try:
        yield
    finally:
        raw.close()


SCENES = {'idle session': nobody, 'full-speed pull': reader, 'stalled client': stalled}


def span(guest, seconds):
    """The guest's writes through a span of time."""
    began = time.monotonic()
    load = guest.load('vda', ['write'], max=4096, pause_us=PAUSE_US)
    time.sleep(seconds)
    result = load.stop()
    return {**result, 'rate': result['ops'] / (time.monotonic() - began)}


def with_session(guest, way, scene, seconds):
    with way.session() as place, SCENES[scene](place):
        return span(guest, seconds)


def main(argv):
    p = bench.parser(__doc__, rounds=7)
    p.add_argument('--span', type=float, help='seconds of each (default 4)')
    p.add_argument('--mib', type=int, help='size of the disk (default 1024)')
    args = bench.parse(p, argv)
    seconds, size = args.span or (0.2 if args.quick else 4), (args.mib or (16 if args.quick else 1024)) * MIB
    rows = []
    try:
        with bench.work_folder() as folder:
            disk = harness.Disk('vda', size, 'raw', path=worlds.make_image(f'{folder}/vda.raw', size))
            disk.model = NoModel()
            guest = harness.Guest(folder, [disk])
            ways = {'libvirt': Libvirt(guest, folder), 'qpulld': Qpull(guest, folder)}
            variants = {'none': lambda: span(guest, seconds)}
            for scene in SCENES:
                for name, way in ways.items():
                    variants[f'{scene} {name}'] = lambda w=way, s=scene: with_session(guest, w, s, seconds)
            found = bench.rounds(variants, args.rounds, warm_up=not args.quick)
            guest.check()
            ways['qpulld'].daemon.stop()
            guest.kill()
        pairs = [(f'{scene} against libvirt\'s', f'{scene} libvirt', f'{scene} qpulld') for scene in SCENES]
        pairs += [('idle session against none', 'none', 'idle session qpulld')]
        pairs += [(f'{scene} against idle session', 'idle session qpulld', f'{scene} qpulld')
                  for scene in ('full-speed pull', 'stalled client')]
        for name, a, b in pairs:
            rows += [bench.row(f'{name}: {metric}', unit, [x[key] for x in found[a]], [x[key] for x in found[b]], better)
                     for metric, unit, key, better in METRICS]
    finally:
        harness.kill_children()
    bench.finish(args, rows)


if __name__ == '__main__':
    main(sys.argv[1:])
