#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM that gets another name: what was done to its disks before is held against its checkpoints under the new name,
too, wherever qpulld was killed in between."""
import json
import os
import shutil
import time

import harness
import nbdpull
from harness import MIB, Disk
from qmpclient import Qmp
from truth import own_copy, replay

OLD, NEW = 'vm', 'new name'
OLD_MEMORY, NEW_MEMORY = 'lineage/vm.json', 'lineage/new%20name.json'


class Renamed(harness.Case):
    """One checkpoint is cleared by others while no daemon runs, the other one stays as it is. Only the memory tells them
    apart."""

    def setUp(self):
        self.vm = self.bare(Disk('vda', 8 * MIB))
        self.daemons = self.moved = 0
        first = self.qpulld(self.vm, linger=0)
        self.state = first.state
        for name in ('cleared', 'good'):
            first.ask('checkpoint-create', {'vm': OLD, 'name': name})
        self.former = bytes(own_copy(self.vm, 'vda'))
        self.vm.write('vda', MIB, 2 * MIB, 1)
        first.wait_idle()
        self.assertEqual(self.reasons(first, OLD), {'cleared': 'NONE', 'good': 'NONE'})
        first.stop()
        self.vm.look('block-dirty-bitmap-clear', {'node': 'node-vda', 'name': 'cleared'})
        self.vm.write('vda', 2 * MIB, MIB, 2)
        self.now = bytes(own_copy(self.vm, 'vda'))

    def daemon(self, name, state=None):
        self.daemons += 1
        daemon = self.qpulld({name: self.vm}, linger=0, state=state or self.state, name=f'd{self.daemons}')
        daemon.wait_idle(name=name)
        return daemon

    def reasons(self, daemon, vm):
        return {c['name']: c['reason'] for c in daemon.ask('query-checkpoints', {'vm': vm})}

    def rename(self, daemon, check=True):
        return daemon.qpull('checkpoint', 'rename-vm', OLD, NEW, check=check)

    def check(self, daemon, vm=NEW):
        """The one is refused, from the other the disk is restored."""
        self.assertEqual(self.reasons(daemon, vm), {'cleared': 'GAP', 'good': 'NONE'})
        h = nbdpull.connect(daemon.uri(f'{vm}/vda'), [nbdpull.dirty_context('good')])
        restored, _ = replay(h, 'good', self.former)
        h.shutdown()
        self.assertSame(restored, self.now, 'since good')
        daemon.wait_idle(name=vm)

    def there(self, *files):
        return [os.path.exists(f'{self.state}/{f}') for f in files]

    def test_what_was_remembered_under_the_old_name_counts_under_the_new_one(self):
        daemon = self.daemon(NEW)
        self.assertEqual(self.reasons(daemon, NEW)['cleared'], 'NONE')  # the bitmaps alone cannot tell
        self.rename(daemon)
        self.check(daemon)
        self.assertEqual(self.there(OLD_MEMORY, NEW_MEMORY), [False, True])
        daemon.stop()
        daemon = self.daemon(NEW)
        self.check(daemon)
        daemon.ask('checkpoint-delete', {'vm': NEW, 'name': 'cleared'})
        daemon.ask('checkpoint-create', {'vm': NEW, 'name': 'cleared'})
        self.assertEqual(self.reasons(daemon, NEW), {'cleared': 'NONE', 'good': 'NONE'})
        daemon.stop()

    def test_what_was_found_out_under_the_new_name_stays(self):
        daemon = self.daemon(NEW)
        self.assertEqual(self.reasons(daemon, NEW)['good'], 'NONE')  # by now it has been looked at
        self.vm.look('block-dirty-bitmap-clear', {'node': 'node-vda', 'name': 'good'})
        self.assertEqual(self.reasons(daemon, NEW), {'cleared': 'NONE', 'good': 'GAP'})
        self.vm.write('vda', 0, 8 * MIB, 3)  # the old memory alone would take it for good again
        self.rename(daemon)
        self.assertEqual(self.reasons(daemon, NEW)['good'], 'GAP')
        daemon.stop()

    def test_killed_anywhere_it_refuses_what_is_not_right_under_both_names(self):
        """Of each state that a daemon killed in between can leave a copy is made from those before and after it."""
        daemon = self.daemon(NEW)
        daemon.stop()
        before, after = f'{self.folder}/before', f'{self.folder}/after'
        shutil.copytree(self.state, before)
        daemon = self.daemon(NEW)
        self.rename(daemon)
        daemon.kill()
        os.rename(self.state, after)

        def left(memory, notes, old_memory):
            """The new memory is written, then the notes have the new name, then the old memory is removed."""
            shutil.rmtree(self.state, ignore_errors=True)
            shutil.copytree(before, self.state)
            if memory:
                shutil.copyfile(f'{after}/{NEW_MEMORY}', f'{self.state}/{NEW_MEMORY}')
            if notes:
                shutil.rmtree(f'{self.state}/checkpoints')
                shutil.copytree(f'{after}/checkpoints', f'{self.state}/checkpoints')
            if not old_memory:
                os.unlink(f'{self.state}/{OLD_MEMORY}')

        for state in ((False, False, True), (True, False, True), (True, True, True), (True, True, False)):
            left(*state)
            daemon = self.daemon(NEW)
            if state[0]:
                self.check(daemon)
            if not state[1]:
                self.rename(daemon)  # once more
            self.check(daemon)
            self.assertEqual(self.there('checkpoints/vm', 'checkpoints/new%20name/good.json'), [False, True])
            daemon.stop()
            if state[2]:  # or the VM has its old name again
                left(*state)
                daemon = self.daemon(OLD)
                self.check(daemon, OLD)
                daemon.stop()

    def test_killed_at_any_moment_it_refuses_what_is_not_right(self):
        before = f'{self.folder}/before'
        shutil.copytree(self.state, before)
        for _ in range(12):
            shutil.rmtree(self.state)
            shutil.copytree(before, self.state)
            daemon = self.daemon(NEW)
            control = Qmp(daemon.control)
            command = {'execute': 'checkpoint-rename-vm', 'arguments': {'vm': NEW, 'from': OLD}}
            control.sock.sendall(json.dumps(command).encode() + b'\n')
            time.sleep(harness.rng.random() * 0.015)  # it takes some 6 ms
            daemon.kill()
            control.close()
            moved = not self.there('checkpoints/vm')[0]
            self.moved += moved
            daemon = self.daemon(NEW)
            if not moved:
                self.rename(daemon)
            self.check(daemon)
            daemon.stop()
        print(f'({self.moved} of 12 had moved)', end=' ')

    def test_the_notes_do_not_move_before_the_memory_is_stored_nor_the_memory_go_before_the_notes_have_moved(self):
        for block in (NEW_MEMORY, 'checkpoints/new%20name'):
            path = f'{self.state}/{block}'
            daemon = self.daemon(NEW)
            harness.wait_until(lambda: os.path.exists(f'{self.state}/{NEW_MEMORY}'), 10, 'the memory')
            if os.path.exists(path):
                os.unlink(path)
            os.makedirs(f'{path}/in the way')
            done = self.rename(daemon, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, 'lineage|notes')
            self.assertEqual(self.there('checkpoints/vm/good.json', OLD_MEMORY), [True, True])
            daemon.kill()
            shutil.rmtree(path)
        daemon = self.daemon(NEW)
        self.rename(daemon)
        self.check(daemon)
        daemon.stop()

    def test_a_damaged_memory_is_told(self):
        with open(f'{self.state}/{OLD_MEMORY}', 'w') as f:
            f.write('{')
        daemon = self.daemon(NEW)
        done = self.rename(daemon)
        self.assertRegex(done.stdout + done.stderr, 'damaged')
        self.assertEqual(self.reasons(daemon, NEW), {'cleared': 'NONE', 'good': 'NONE'})
        daemon.stop()


if __name__ == '__main__':
    harness.main()
