#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random years in the life of some disks (randomops.py), and an incremental since every checkpoint that must reproduce
them byte by byte. Alone, a few sequences; as tests/soak/checkpoints, as many as wanted. The environment:
  QPULL_TEST_SEED       the first sequence's seed; a failing one is replayed exactly
  QPULL_TEST_SEQUENCES  how many (1: a sample; the soak has them by the hundred)
  QPULL_TEST_LENGTH     operations in each (60; the soak: 200)
  QPULL_TEST_KEEP_OPS   "3,17,60": only these operations of it, as a shortened sequence is told
  QPULL_TEST_SHORTEN    set: a sequence that fails is made as short as it gets, by leaving out and trying again
  QPULL_TEST_KNOWN      troubles that are known and only counted, of stream,commit,shrink,late (wrong incrementals)
"""
import gc
import os
import shutil
import sys
import tempfile
import time
import traceback

import harness
import randomops
from randomworld import Choices, Found, World

KNOWN_TROUBLE = ''  # names, with commas between
SHORTEN_SECONDS = 900


def plan(seed, length):
    """[(number, operation)]"""
    r = Choices(seed, 'plan')
    operations, weights = zip(*randomops.OPERATIONS)
    return list(enumerate(r.choices(operations, weights, k=length)))


class Run:
    """One sequence, from an empty folder to its end. .failure: (kind, words) or None; .trace: what was done."""

    def __init__(self, seed, operations, known):
        self.failure, self.trace, self.done, self.ends = None, [], 0, []
        base = tempfile.gettempdir()
        folder = tempfile.mkdtemp(prefix='qpull-random-', dir=base if len(base) < 50 else '/tmp')
        world = World(folder, seed, known, self.trace.append)
        self.stats = world.stats
        try:
            self.walk(world, seed, operations)
        except Exception as e:  # whatever it is, it belongs to this sequence
            kind = e.kind if isinstance(e, Found) else type(e).__name__
            self.failure = kind, f'{e}\n{traceback.format_exc(limit=-4)}'
            self.ends = [f'--- end of {x.log_path}\n{x.log()[-3000:]}' for x in (world.vm, world.daemon)]
        finally:
            world.kill()
            del world
            gc.collect()  # megabytes in cycles: too few objects for Python to care
            if self.failure and os.environ.get('QPULL_TEST_KEEP'):
                print(f'kept: {folder}', flush=True)
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def walk(self, world, seed, operations):
        world.start()
        for number, operation in operations:
            self.trace.append(f'#{number} {operation.__name__}')
            world.step = number
            randomops.perform(world, Choices(seed, number), operation)
            self.done += 1
        # At the end everything is looked at once more.
        self.trace.append('the end')
        randomops.perform(world, Choices(seed, 'end'), randomops.restart_qemu)
        randomops.perform(world, Choices(seed, 'end'), randomops.incremental)
        world.daemon_gone()
        world.daemon.stop()
        world.daemon.check_log()


def shorten(seed, operations, failure, known):
    """Fewer operations that fail in the same way: halves, quarters … are left out while it goes on failing."""
    deadline, step = time.monotonic() + SHORTEN_SECONDS, max(1, len(operations) // 2)
    while time.monotonic() < deadline:
        at, shorter = 0, False
        while at < len(operations) and time.monotonic() < deadline:
            trial = operations[:at] + operations[at + step:]
            run = Run(seed, trial, known)
            if run.failure and run.failure[0] == failure[0]:
                operations, shorter = trial[:run.done + 1], True
            else:
                at += step
        if step == 1 and not shorter:
            break
        step = max(1, step // 2)
    return operations


def tell(seed, length, operations, run):
    print(f'FAILED: {run.failure[0]}: {run.failure[1]}\nafter:', *run.trace, *run.ends, sep='\n', flush=True)
    print(f'replay with QPULL_TEST_SEED={seed} QPULL_TEST_SEQUENCES=1 QPULL_TEST_LENGTH={length} '
          f'QPULL_TEST_KEEP_OPS={",".join(str(n) for n, _ in operations)}', flush=True)


def one(seed, length, known):
    """The finished Run."""
    operations = plan(seed, length)
    kept = os.environ.get('QPULL_TEST_KEEP_OPS')
    if kept is not None:
        operations = [operations[int(n)] for n in kept.split(',') if n]
    run = Run(seed, operations, known)
    if run.failure:
        if os.environ.get('QPULL_TEST_SHORTEN'):
            operations = shorten(seed, operations[:run.done + 1], run.failure, known)
            run = Run(seed, operations, known)
            if not run.failure:
                run.failure = 'flaky', 'the shortened sequence failed, but not again'
        tell(seed, length, operations, run)
    return run


class RandomYears(harness.Case):
    @classmethod
    def setUpClass(cls):
        harness.bin_dir()

    def test_every_incremental_reproduces_the_disk_whatever_happened_to_it(self):
        known = os.environ.get('QPULL_TEST_KNOWN', KNOWN_TROUBLE).split(',')
        length = int(os.environ.get('QPULL_TEST_LENGTH') or 60)
        for i in range(int(os.environ.get('QPULL_TEST_SEQUENCES') or 1)):
            with self.subTest(seed=harness.seed + i):
                run = one(harness.seed + i, length, known)
                self.assertIsNone(run.failure)
                compared, mattered = (run.stats[f'incrementals {x}'] for x in ('compared', 'that mattered'))
                print(f'({run.done} operations, {compared} incrementals compared, {mattered} over changes)', end=' ')


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True)
    harness.main()
