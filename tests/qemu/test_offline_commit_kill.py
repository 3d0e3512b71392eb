#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 900
"""Every QMP command of a commit in a powered-off VM's images is refused, or is the last one before kill -9 of the storage
daemon or of qpulld: the image that the VM is started with shows what was written, and every checkpoint is right or refused."""
import os

import harness
from commits import OfflineLayers
from harness import MIB
from offline import content, storage_daemons

KINDS = ('refuse', 'before', 'after', 'parent-before', 'parent-after')
STEP = int(os.environ.get('QPULL_TEST_STEP', '12'))  # one command of so many, others in each run; 1: all of them
SMALL = 2 * MIB + 512
LAYERS = 3
PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'faulty_storage_daemon.py')


class OfflineCommitKilled(OfflineLayers):
    def setUp(self):
        self.plan, self.seen = f'{self.folder}/plan', f'{self.folder}/seen'
        self.set_plan('none', 0)
        os.environ.update(QPULL_FAULT_PLAN=self.plan, QPULL_FAULT_SEEN=self.seen)
        self.begin(size=SMALL)
        self.build(LAYERS)
        self.power_off()
        self.built = {path: self.read(path) for path in self.files}

    @staticmethod
    def read(path):
        with open(path, 'rb') as f:
            return f.read()

    def set_plan(self, kind, number):
        with open(self.plan, 'w', encoding='utf-8') as f:
            f.write(f'{kind} {number}')
        with open(self.seen, 'w', encoding='utf-8'):
            pass

    def heard(self):
        with open(self.seen, encoding='utf-8') as f:
            return f.read().split()

    def fresh(self):
        """The images as they were built, and a daemon that knows nothing of them but that."""
        for path, data in self.built.items():
            with open(path, 'wb') as f:
                f.write(data)
        self.life += 1
        self.files = list(self.built)
        self.set_plan('none', 0)
        self.serve(flags=[f'--storage-daemon={PROGRAM}'], name=f'q{self.life}')
        self.assertEqual(set(self.all_reasons().values()), {'NONE'})
        self.wait_closed(self.daemon)

    def all_reasons(self):
        return {c['name']: c['reason'] for c in self.daemon.ask('query-checkpoints', {'vm': 'vm', 'disk': 'vda'})}

    def end(self):
        self.daemon.stop()
        self.things.remove(self.daemon)

    def strike(self, kind, number, words):
        self.fresh()
        self.set_plan(kind, number)
        pids = set()

        done = self.commit(*words, check=False, timeout=60)
        pids.update(storage_daemons(self.daemon))
        heard = self.heard()
        if kind.startswith('parent'):
            self.daemon.kill()
            for pid in pids:
                self.wait_gone(pid)
            self.set_plan('none', 0)
            harness.wait_until(self.is_free, 20, 'the end of the storage daemon')
            self.daemon.start()
            self.await_turn()
            self.daemon.qpull('disks', 'vm', check=False)  # the next one to open the images clears up
        self.wait_closed(self.daemon, 30)
        self.set_plan('none', 0)
        return done.returncode == 0, heard

    def is_free(self):
        """Nobody holds the images any more."""
        return all(harness.run(['qemu-io', '-f', 'qcow2', '-c', 'read 0 512', p], check=False).returncode == 0
                   for p in self.files if os.path.exists(p))

    def judge(self, what, kind, well, words):
        """What the VM is started with is right, and so is each checkpoint that is offered; how many these are."""
        live = self.files[-1]
        if not os.path.exists(live):  # only where it is to be deleted, and base has everything
            self.assertIn('--delete', words, what)
            self.files = self.files[:1]
            self.end()
            self.serve(name=f'q{self.life}b')
        for path in self.files:
            status = harness.run(['qemu-img', 'check', '-q', path], check=False).returncode if os.path.exists(path) else 0
            self.assertIn(status, (0, 3), f'{what}: {path}')  # 3: leaked clusters, no harm
        self.assertSame(content(self.files[-1]), self.disk.model.image, what)
        offered = self.check(self.names if well else None, what)
        self.assertEqual([f for f in os.listdir(self.folder) if f.endswith('.qpull-new')], [], what)
        if kind == 'refuse':
            self.assertNotIn('INCONSISTENT', self.all_reasons().values(), what)
        self.wait_closed(self.daemon)
        return len(offered)

    def sweep(self, *words):
        self.fresh()
        self.commit(*words)
        self.wait_closed(self.daemon)
        commands = self.heard()
        self.end()
        runs = offered = 0
        for kind in KINDS:
            for number in range(1 + harness.rng.randrange(STEP), len(commands) + 1, STEP):
                well, heard = self.strike(kind, number, words)
                what = f'{kind} {number} ({heard[number - 1] if number <= len(heard) else "-"})'
                offered += self.judge(what, kind, well, words)
                if harness.rng.random() < 0.2 and self.files[-1].endswith('2'):
                    self.and_on(what)
                self.end()
                runs += 1
        print(f'{runs} faults, {offered} checkpoints were usable after them, commands: {" ".join(commands)}')
        self.assertGreater(offered, runs)

    def and_on(self, what):
        """The VM is started again, and goes on from there."""
        self.power_on()
        self.await_turn()
        before = bytes(self.disk.model.image)
        self.check(when=f'{what}, on')
        self.work(3)
        self.check(when=f'{what}, after work')
        self.power_off()
        self.await_turn()
        self.check(when=f'{what}, off again')
        self.disk.model.image[:] = before

    def test_a_commit_below_the_image_that_the_vm_is_started_with(self):
        self.sweep('--top', self.files[1])

    def test_a_commit_of_the_image_that_the_vm_is_started_with(self):
        self.sweep('--active')

    def test_a_commit_of_the_image_that_the_vm_is_started_with_which_is_deleted(self):
        self.sweep('--active', '--delete')


if __name__ == '__main__':
    harness.main()
