#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Every QMP command that a powered-off VM's storage daemon gets, refused, or the last thing it hears before kill -9."""
import os

import harness
import nbd
import nbdpull
from offline import OfflineCase, content, records, storage_daemons

KINDS = ('refuse', 'before', 'after')
STEP = int(os.environ.get('QPULL_TEST_STEP', '4'))  # one command of so many, others in each run; 1: all of them


class Faults(OfflineCase):
    def setUp(self):
        self.plan, self.seen = f'{self.folder}/plan', f'{self.folder}/seen'
        self.path, self.below = f'{self.folder}/a.qcow2', f'{self.folder}/below.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', self.below, '4M'])
        harness.run(['qemu-io', '-c', 'write -P 3 0 4M', self.below])
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', self.below, '-F', 'qcow2', self.path])
        harness.run(['qemu-io', '-c', 'write -P 4 1M 64k', self.path])
        self.expected = content(self.path)
        self.set_plan('none', 0)
        os.environ.update(QPULL_FAULT_PLAN=self.plan, QPULL_FAULT_SEEN=self.seen)
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'faulty_storage_daemon.py')
        self.daemon = self.serve({'vda': self.path}, flags=[f'--storage-daemon={program}'])

    def set_plan(self, kind, number):
        with open(self.plan, 'w', encoding='utf-8') as f:
            f.write(f'{kind} {number}')
        with open(self.seen, 'w', encoding='utf-8'):
            pass

    def fresh(self):
        """One good record of an earlier time, and nothing else."""
        for name in records(self.path):
            harness.run(['qemu-img', 'bitmap', '--remove', self.path, name])
        harness.run(['qemu-img', 'check', '-q', '-r', 'leaks', self.path])
        harness.run(['qemu-img', 'bitmap', '--add', self.path, 'old'])

    def heard(self):
        with open(self.seen, encoding='utf-8') as f:
            return f.read().split()

    def judge(self, what, kind):
        self.wait_closed(self.daemon, 30)
        status = harness.run(['qemu-img', 'check', '-q', self.path], check=False).returncode
        self.assertIn(status, (0, 3), what)  # 3: leaked clusters, no harm
        self.assertSame(content(self.path), self.expected, what)
        found = records(self.path)
        self.set_plan('none', 0)
        told = self.reasons(self.daemon)
        self.wait_closed(self.daemon)
        self.assertEqual({n: 'in-use' in f for n, f in found.items()},
                         {n: r == 'INCONSISTENT' for (_, n), r in told.items()
                          if r != 'NO_SUCH_CHECKPOINT'}, what)  # a note may outlive a record that was not stored
        if kind == 'refuse':
            self.assertNotIn('INCONSISTENT', told.values(), what)
        return found

    def sweep(self, do, allowed):
        """do() under every fault; allowed(records' names, did it say that it went well) judges what stands then."""
        self.fresh()
        self.set_plan('none', 0)
        self.assertTrue(do())
        self.wait_closed(self.daemon)
        commands = self.heard()
        self.assertTrue(allowed(set(records(self.path)), True))
        runs = 0
        for kind in KINDS:
            for number in range(1 + harness.rng.randrange(STEP), len(commands) + 1, STEP):
                self.fresh()
                self.set_plan(kind, number)
                what = f'{kind} {number} ({commands[number - 1]})'
                well = do()
                found = self.judge(what, kind)
                self.assertTrue(allowed(set(found), well), f'{what}: {found}, said to have gone well: {well}')
                self.assertEqual(storage_daemons(self.daemon), [])
                runs += 1
        self.assertGreaterEqual(runs, len(KINDS) * (len(commands) // STEP))
        print(f'{runs} faults, commands: {" ".join(commands)}')
        self.daemon.stop()

    def test_a_pull_with_a_checkpoint(self):
        def pull():
            try:
                h = nbdpull.connect(self.daemon.uri('vm/vda@new'), [nbdpull.dirty_context('old')])
                self.assertSame(nbdpull.read_all(h), self.expected)
                # "old" stands in the overlay, and nothing was written since
                self.assertEqual(nbdpull.ranges_with(nbdpull.read_map(h, nbdpull.dirty_context('old'))), [])
                h.shutdown()
            except nbd.Error:
                return False
            return True

        # After a good pull the checkpoint may be missing all the same (the log and the status say so); after one that
        # failed it may not be there.
        self.sweep(pull, lambda names, well: 'old' in names and (well or 'new' not in names))

    def test_a_checkpoint_made(self):
        def make():
            return self.daemon.qpull('checkpoint', 'create', 'vm', 'new', check=False).returncode == 0

        # What is said to be there is there; what failed may have been made.
        self.sweep(make, lambda names, well: 'old' in names and ('new' in names or not well))

    def test_a_checkpoint_deleted(self):
        def delete():
            return self.daemon.qpull('checkpoint', 'delete', 'vm', 'old', check=False).returncode == 0

        self.sweep(delete, lambda names, well: 'old' not in names if well else True)


if __name__ == '__main__':
    harness.main()
