#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tools/quickstart shows, once everything is built: backups of a running guest, restored and compared.

It uses the guest and the helpers of the whole-system tests, which know every byte the guest wrote: a copy is right if
it is the guest's disk exactly as it was after some number of the guest's operations.
"""
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'tests', 'qemu'))
import harness  # noqa: E402
import nbdpull  # noqa: E402
from harness import MIB, Disk  # noqa: E402

SIZES = {'vda': 160 * MIB, 'vdb': 96 * MIB + 7 * 512}
ORDER_AREA = MIB        # at the start of each disk: numbered records, which show whether the copies are of one instant
ORDER_SEED, BLOCK, RING = 7, 4096, 256
LINGER = 3              # seconds; a session ends so long after its last client
VM = 'demo'


class Wrong(Exception):
    """The demonstration found that something is not as it should be."""


class Tour:
    def __init__(self, folder):
        self.folder = folder
        self.number = 0
        self.start = time.monotonic()

    def say(self, words):
        self.number += 1
        print(f'\n{self.number}. {words} ({time.monotonic() - self.start:.0f} s)', flush=True)

    def tell(self, words):
        print(f'   {words}', flush=True)

    def shell(self, *args):
        """Runs a command that a reader could type, and shows it with what it prints."""
        print(f'   $ {shlex.join(args)}', flush=True)
        program = harness.bin_dir() + '/' + args[0] if args[0].startswith('qpull') else args[0]
        done = subprocess.run([program, *args[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=300, check=False)
        for line in done.stdout.splitlines():
            print(f'     {line}', flush=True)
        if done.returncode:
            raise Wrong(f'{args[0]} ended with {done.returncode}')
        return done.stdout

    def qpull(self, *args):
        return self.shell('qpull', '--control', self.daemon.control, *args)

    def copy(self, name, export):
        """nbdcopy of one export into a file."""
        path = f'{self.folder}/{name}'
        before = time.monotonic()
        self.shell('nbdcopy', self.daemon.uri(export), path)
        size = os.path.getsize(path)
        self.tell(f'{size / MIB:.0f} MiB in {time.monotonic() - before:.1f} s')
        with open(path, 'rb') as f:
            return bytearray(f.read())

    def boot(self):
        self.say('Booting a guest with two qcow2 disks; it writes, zeroes, discards and reads back all the time')
        self.guest = harness.Guest(self.folder, [Disk(n, size) for n, size in SIZES.items()], name=VM, start=False)
        self.guest.start()
        for name, size in SIZES.items():
            self.guest.write(name, ORDER_AREA, 32 * MIB, 1)
            self.guest.flush(name)
        self.models = {n: d.model.copy() for n, d in self.guest.disks.items()}
        self.replayed = dict.fromkeys(SIZES, 0)
        self.graph = self.guest.state()
        self.loads = {n: self.guest.load(n, ('write', 'zero', 'discard', 'read'), pause_us=2000, **{'from': ORDER_AREA})
                      for n in SIZES}
        self.guest.order_start(list(SIZES), seed=ORDER_SEED, block=BLOCK, ring=RING)

    def ops(self):
        return {n: load.status()['ops'] for n, load in self.loads.items()}

    def judge(self, copies, earliest):
        """Each copy must be the guest's disk at one moment since `earliest`, and all of them of the same moment."""
        latest = self.ops()
        for name, copy in copies.items():
            model, load = self.models[name], self.loads[name]
            model.discard(0, ORDER_AREA)
            model.replay(load.plan, self.replayed[name], earliest[name])
            n, least = model.find_cut(copy, load.plan, earliest[name], latest[name] + 1)
            if n is None:
                raise Wrong(f'{name}: the copy is the disk at no moment; at best {least} sectors differ')
            self.replayed[name] = n
            self.tell(f'{name}: every byte is as the guest left it after {n} operations; '
                      f'it has done {latest[name]} by now')
        records = harness.check_order([copies[n] for n in SIZES], ORDER_SEED, 0, BLOCK, RING)
        self.tell(f'both disks are of one instant: records numbered across them end at {records[0]} and {records[1]}')

    def serve(self):
        self.say('Starting qpulld beside the guest')
        self.daemon = harness.Qpulld(self.folder, {VM: self.guest}, linger=LINGER, start=False)
        self.tell(f'$ {shlex.join(["qpulld", *self.daemon.flags])}')
        self.daemon.start()
        self.qpull('vms')
        self.qpull('disks')

    def full(self):
        self.say('A full backup with nbdcopy, which knows nothing of qpull; the name behind the @ becomes a checkpoint')
        earliest = self.ops()
        self.copies = {n: self.copy(f'{n}-full.raw', f'{VM}/{n}@full') for n in SIZES}
        self.judge(self.copies, earliest)
        self.wait_end()
        self.say('The session is over; the checkpoint it leaves remembers what the guest changes from now on')
        self.qpull('checkpoint', 'list', VM)

    def wait_end(self):
        """A session ends a moment after its last client left."""
        harness.wait_until(lambda: self.guest.look('query-block-exports') == [], 30 + LINGER, 'the end of the session')
        harness.wait_until(lambda: not any('qpull-' in n for n in self.guest.state()['nodes']), 30, 'the teardown')

    def incremental(self):
        self.say('The guest goes on writing; then an incremental backup: only what changed since "full" is read')
        before = self.ops()
        harness.wait_until(lambda: all(n > before[d] + 200 for d, n in self.ops().items()), 60, '200 more operations')
        earliest = self.ops()
        context = nbdpull.dirty_context('full')
        handles = {n: nbdpull.connect(self.daemon.uri(f'{VM}/{n}@inc1'), [context]) for n in SIZES}
        restored = {}
        for name, h in handles.items():
            if not h.can_meta_context(context):
                raise Wrong(f'{name}: no record of what changed since the full backup')
            self.tell(f'{self.daemon.uri(f"{VM}/{name}@inc1")}')
            changed = nbdpull.ranges_with(nbdpull.read_map(h, context))
            restored[name] = nbdpull.read_ranges(h, changed, bytearray(self.copies[name]))
            total = sum(length for _, length in changed)
            self.tell(f'{context}: {total / MIB:.1f} of {h.get_size() / MIB:.1f} MiB in {len(changed)} ranges, '
                      'copied over the full backup')
        self.say('For comparison, the same frozen disks once more in full; nbdcopy joins the open session')
        truth = {n: self.copy(f'{n}-inc1-truth.raw', f'{VM}/{n}@inc1') for n in SIZES}
        for name in SIZES:
            if restored[name] != truth[name]:
                raise Wrong(f'{name}: full + incremental is not the disk')
            self.tell(f'{name}: full + incremental is the same as the whole disk, byte for byte')
        self.judge(restored, earliest)
        for h in handles.values():
            h.shutdown()
        self.wait_end()
        self.qpull('checkpoint', 'list', VM)

    def goodbye(self):
        self.say('Stopping qpulld and looking for traces of it in the guest\'s QEMU')
        for checkpoint in ('full', 'inc1'):
            self.qpull('checkpoint', 'delete', VM, checkpoint)
        results = {n: load.stop() for n, load in self.loads.items()}
        records = self.guest.order_stop()
        self.daemon.stop()
        self.guest.check()
        state = self.guest.state()
        if state != self.graph:
            raise Wrong(f'QEMU is not as it was before:\n{self.graph}\n{state}')
        self.tell('none: nodes, exports, bitmaps, jobs and file descriptors are as before')
        for name, result in results.items():
            if result['errors'] or result['bad']:
                raise Wrong(f'the guest saw errors on {name}: {result}')
            self.tell(f'{name} in the guest: {result["ops"]} operations, 0 errors, 0 wrong bytes read back, '
                      f'the slowest took {result["slowest-us"] / 1000:.0f} ms')
        self.tell(f'{records["records"]} numbered records written')
        self.guest.poweroff()


def interrupted(number, frame):
    raise KeyboardInterrupt


def main():
    keep = '--keep' in sys.argv[1:]
    signal.signal(signal.SIGTERM, interrupted)
    folder = tempfile.mkdtemp(prefix='qpull-tour-', dir='/tmp')
    tour = Tour(folder)
    try:
        tour.boot()
        tour.serve()
        tour.full()
        tour.incremental()
        tour.goodbye()
        print(f'\nDone in {time.monotonic() - tour.start:.0f} s. README.md tells what to do with a guest of your own.')
        return 0
    except KeyboardInterrupt:
        print('\nquickstart: interrupted; everything it started is stopped', file=sys.stderr)
        return 130
    except (Wrong, AssertionError, TimeoutError, OSError, harness.GuestError, harness.QmpError, nbdpull.nbd.Error,
            harness.unittest.SkipTest) as e:
        print(f'\nquickstart: step {tour.number} failed: {e}', file=sys.stderr)
        for name in ('daemon', 'guest'):
            if hasattr(tour, name):
                print(f'--- {name}\'s log:\n{getattr(tour, name).log()}', file=sys.stderr)
        return 1
    finally:
        harness.kill_children()
        if keep:
            print(f'The copies are in {folder}')
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    sys.exit(main())
