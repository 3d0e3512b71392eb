#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a guest's I/O stands still for the freeze: the slowest of its own small writes while a session comes up, for
1, 3 and 8 disks, with clean host caches and with 1 GiB of dirty ones, beside what the daemon says of the pause.

    tests/bench/pause_cost.py [ROUNDS] [--bin DIR]… [--accel kvm] [--rate MB] [--disks 1,3] [--stop] [--json FILE]

Each DIR (default: what the tests use) has a qpulld; several are compared within the same guests. --rate makes the
images' storage slow: a flush takes so long as writing back what was written since the last one would."""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '../qemu'))
import harness  # noqa: E402
import nbdpull  # noqa: E402
import slowsync  # noqa: E402
import test_pause  # noqa: E402
from harness import MIB, Disk  # noqa: E402

LOAD = 16 * MIB  # of each disk: what the guest's own writer uses
WINDOW_S = 0.7  # before a session and after it: what the guest's writer sees without one


class Guest(harness.Guest):
    accel = 'tcg'

    def arguments(self):
        args = super().arguments()
        args[args.index('-accel') + 1] = self.accel
        return args

    def dirty(self, value, size):
        """Fills the host's page cache, past the guest."""
        each = size // len(self.disks)
        for name in self.disks:
            path = next(d['qdev'] for d in self.look('query-block') if f'/{name}/' in f'/{d.get("qdev")}/')
            for at in range(0, each, 64 * MIB):
                line = f'qemu-io -d {path} "write -q -P {value} {LOAD + at} {min(64 * MIB, each - at)}"'
                words = self.look('human-monitor-command', {'command-line': line})
                if words.strip():
                    raise AssertionError(words)

    def window(self, action):
        """(the slowest write of the guest in ms, what action() returned)"""
        loads = [self.load(d, kinds=('write',), size=LOAD, max=4096, pause_us=1000) for d in self.disks]
        time.sleep(WINDOW_S / 2)
        result = action()
        time.sleep(WINDOW_S / 2)
        return max(load.stop()['slowest-us'] for load in loads) / 1000, result


def session(daemon, name):
    def run():
        h = nbdpull.connect(daemon.uri(f'vm/{name}'))
        told = daemon.ask('query-sessions')
        h.shutdown()
        daemon.wait_idle()
        return told[0] if told else {}
    return run


def measure(folder, ndisks, programs, rounds, args):
    disks = [Disk(f'vd{chr(97 + i)}', 2048 * MIB, options='preallocation=metadata') for i in range(ndisks)]
    Guest.accel = args.accel
    guest = Guest(folder, disks, memory=256)
    proxy = test_pause.NoReopen(folder, guest) if args.stop else guest
    rows = []
    for number in range(rounds):
        for dirty in (False, True):
            for program in harness.rng.sample(programs, len(programs)):
                daemon = harness.Qpulld(folder, {'vm': proxy}, linger=0, program=f'{program}/qpulld', start=False)
                if 'pause' not in harness.run([daemon.program, '--help']).stdout:
                    daemon.flags = [f for f in daemon.flags if not f.startswith('--max-pause')]
                daemon.start()
                session(daemon, disks[0].name)()  # the self-test
                for name in guest.disks:
                    guest.flush(name)
                if dirty:
                    guest.dirty(number % 255 + 1, args.dirty * MIB)
                alone, _ = guest.window(lambda: time.sleep(0.2))
                felt, told = guest.window(session(daemon, disks[0].name))
                rows.append({'disks': ndisks, 'dirty': dirty, 'bin': program, 'alone-ms': alone, 'felt-ms': felt,
                             'pause-ms': told.get('pause-us', 0) / 1000, 'flush-ms': told.get('flush-ms'),
                             'setup-ms': told.get('setup-ms')})
                print(rows[-1], file=sys.stderr, flush=True)
                daemon.stop()
    guest.kill()
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('rounds', nargs='?', type=int, default=5)
    parser.add_argument('--bin', action='append')
    parser.add_argument('--accel', default='tcg')
    parser.add_argument('--rate', type=int, default=0)
    parser.add_argument('--disks', default='1,3,8')
    parser.add_argument('--stop', action='store_true', help='blockdev-reopen is refused')
    parser.add_argument('--dirty', type=int, default=1024, metavar='MB', help='over all disks')
    parser.add_argument('--json')
    args = parser.parse_args()
    programs, rows = args.bin or [harness.bin_dir()], []
    for ndisks in map(int, args.disks.split(',')):
        with tempfile.TemporaryDirectory(dir='/dev/shm' if args.rate else '/var/tmp') as folder:
            try:
                with slowsync.slow(folder, args.rate):
                    rows += measure(folder, ndisks, programs, args.rounds, args)
            finally:
                harness.kill_children()
    print(f'{args.rounds} rounds; median (worst) in ms of the guest\'s slowest write without a session, with one, of the '
          'pause the daemon says, of its flush ahead, of set-up')
    for key in dict.fromkeys((r['disks'], r['dirty'], r['bin']) for r in rows):
        mine = [r for r in rows if (r['disks'], r['dirty'], r['bin']) == key]
        words = [f'{statistics.median(v):7.1f} ({max(v):.1f})' for v in
                 ([r[k] or 0 for r in mine] for k in ('alone-ms', 'felt-ms', 'pause-ms', 'flush-ms', 'setup-ms'))]
        print(f'{key[0]} disks, {"dirty" if key[1] else "clean"}, {key[2]}: {"  ".join(words)}')
    if args.json:
        with open(args.json, 'w', encoding='ascii') as f:
            json.dump(rows, f, indent=1)


if __name__ == '__main__':
    main()
