#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a freeze costs a busy guest, by engine: its slowest write while a session goes up, interleaved with the same
span of time without a session; and whether its discards get through during a session.

    tests/bench/engines.py [ROUNDS [DISKS…]]      (default: 10 rounds of 1, 4 and 8 disks)"""
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '../qemu'))
import harness  # noqa: E402
import nbdpull  # noqa: E402
from harness import MIB, Disk  # noqa: E402

SIZE = 64 * MIB
BEFORE_S, AFTER_S = 0.15, 0.3  # of load around the freeze
ENGINES = ('copy-before-write', 'backup-job')


def both_daemons(guest, folder):
    """One for each engine, each at a monitor of its own: QEMU serves one session at a time."""
    paths = {ENGINES[0]: guest.qmp_path, ENGINES[1]: guest.spare_qmp_path}
    return {e: harness.Qpulld(folder, {'vm': path}, flags=[f'--engine={e}'], linger=0, name=f'd{e[0]}')
            for e, path in paths.items()}


def one_round(guest, names, daemon):
    """(slowest write in ms, set-up in ms) of a session, or of the same time without one."""
    loads = [guest.load(n, ['write'], max=65536, pause_us=500) for n in names]
    time.sleep(BEFORE_S)
    setup = 0
    if daemon:
        h = nbdpull.connect(daemon.uri(f'vm/{names[0]}'))
        setup = daemon.ask('query-sessions')[0]['setup-ms']
    time.sleep(AFTER_S)
    slowest = max(load.stop()['slowest-us'] for load in loads) / 1000
    if daemon:
        h.shutdown()
        daemon.wait_idle()
    return slowest, setup


def measure(rounds, ndisks, cache):
    names = [f'vd{"abcdefgh"[i]}' for i in range(ndisks)]
    with tempfile.TemporaryDirectory(prefix='qpull-bench-') as folder:
        guest = harness.Guest(folder, [Disk(n, SIZE, cache=cache) for n in names], smp=2)
        daemons = both_daemons(guest, folder)
        found = {e: [] for e in (None, *ENGINES)}
        for e in ENGINES:  # the self-test, and whatever is slow but once
            one_round(guest, names, daemons[e])
        for _ in range(rounds):
            for e in harness.rng.sample(list(found), len(found)):
                found[e].append(one_round(guest, names, daemons.get(e)))
        for e, values in found.items():
            slow, setup = [v[0] for v in values], [v[1] for v in values]
            print(f'{ndisks} disks, cache {"none" if cache else "writeback"}, {e or "no session":17}: slowest write '
                  f'median {statistics.median(slow):6.1f} ms, most {max(slow):6.1f} ms; '
                  f'set-up {statistics.median(setup):4.0f} ms', flush=True)
        guest.check()
        for daemon in daemons.values():
            daemon.stop()
        guest.kill()


def discards():
    with tempfile.TemporaryDirectory(prefix='qpull-bench-') as folder:
        guest = harness.Guest(folder, [Disk('vda', SIZE, fmt='raw')])
        daemons = both_daemons(guest, folder)
        for e in ENGINES:
            guest.write('vda', 0, 32 * MIB, 1)
            guest.flush('vda')
            h = nbdpull.connect(daemons[e].uri('vm/vda'))
            before = os.stat(guest.disks['vda'].path).st_blocks * 512
            guest.discard('vda', 0, 32 * MIB)
            after = os.stat(guest.disks['vda'].path).st_blocks * 512
            print(f'{e}: a discard of 32 MiB during a session gives back {(before - after) / MIB:.0f} MiB', flush=True)
            h.shutdown()
            daemons[e].wait_idle()
        for daemon in daemons.values():
            daemon.stop()
        guest.kill()


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    print(f'QEMU {".".join(map(str, harness.qemu_version()))}', flush=True)
    discards()
    for ndisks in [int(n) for n in sys.argv[2:]] or (1, 4, 8):
        for cache in ({}, {'direct': True}):
            measure(rounds, ndisks, cache)


if __name__ == '__main__':
    main()
