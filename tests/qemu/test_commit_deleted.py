#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A checkpoint that is deleted stays deleted, although a layer that only reads still holds a part of its record: qpull
commits that layer without it."""
import harness
from commits import Layers
from qmpclient import QmpError


class Deleted(Layers):
    def build_deleted(self, layers, records):
        """'gone' began in layer records[0] and was recorded in all of records, 'kept' in each layer; one is deleted."""
        self.begin()
        for layer in range(layers):
            if layer:
                self.snapshot([n for n, where in (('gone', records), ('kept', range(layers)))
                               if layer in where and layer > where[0]])
            self.work(2)
            self.checkpoint(*(['gone'] if layer == records[0] else []), *(['kept'] if layer == 0 else []))
            self.work(2)
        self.serve()
        self.assertEqual(self.reasons(), {'gone': 'NONE', 'kept': 'NONE'})
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'gone'})
        del self.names['gone']

    def holders(self):
        """The nodes of the disk that hold a record of that name."""
        nodes = self.vm.look('query-named-block-nodes', {'flat': True})
        return {n['node-name'] for n in nodes if 'gone' in [b.get('name') for b in n.get('dirty-bitmaps', ())]}

    def test_a_commit_does_not_bring_a_deleted_checkpoint_back(self):
        """Its rest lies in a committed layer, in base, in both, below base or above top; each is what remains of it."""
        for records, base, top in (([1], 0, 1), ([0], 0, 1), ([0, 1], 0, 1), ([0, 1], 0, 2), ([0, 1, 2], 0, 3),
                                   ([0], 1, 2), ([0, 1], 1, 2), ([2], 0, 1), ([1, 2], 0, 1)):
            with self.subTest(records=records, base=base, top=top):
                self.build_deleted(4, records)
                active = top == 3
                stay = {self.nodes[i] for i in records if i < 3 and not base <= i <= top}
                before = {self.nodes[i] for i in records if i < 3}
                self.assertEqual(self.holders(), before)
                options = ['--active'] if active else ['--top', self.nodes[top]]
                self.commit('--base', self.nodes[base], *options)
                self.assertEqual(self.states(), {'kept': 'kept'})
                self.assertEqual(self.holders(), stay)
                self.assertEqual(self.reasons(), {'kept': 'NONE', **({'gone': 'NO_SUCH_CHECKPOINT'} if stay else {})})
                self.work()
                self.check(['kept'])
                if stay:
                    with self.assertRaisesRegex(QmpError, 'cannot be used again'):
                        self.daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'gone'})
                else:
                    self.daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'gone'})
                    self.names['gone'] = bytes(self.disk.model.image)
                    self.work()
                    self.check(['kept', 'gone'])
                self.daemon.stop()
                self.vm.quit()

    def test_whoever_was_told_that_it_is_deleted_does_not_see_it_again_after_a_crash_of_the_daemon(self):
        self.build_deleted(3, [0, 1, 2])
        self.daemon.kill()  # right after its answer
        self.daemon.start()
        self.daemon.wait_idle()
        self.assertEqual(self.reasons(), {'gone': 'NO_SUCH_CHECKPOINT', 'kept': 'NONE'})
        self.commit('--base', self.nodes[0], '--active')
        self.assertEqual(self.reasons(), {'kept': 'NONE'})
        self.check(['kept'])
        self.daemon.stop()

    def test_what_cannot_be_remembered_is_told(self):
        self.begin()
        self.checkpoint('gone')
        self.snapshot(['gone'])
        self.serve()
        self.reasons()
        with open(f'{self.daemon.state}/lineage.away', 'w'):
            pass
        harness.wait_until(lambda: harness.os.path.exists(f'{self.daemon.state}/lineage/vm.json'), 10, 'the memory')
        harness.os.rename(f'{self.daemon.state}/lineage', f'{self.folder}/lineage')
        harness.os.rename(f'{self.daemon.state}/lineage.away', f'{self.daemon.state}/lineage')
        answer = self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'gone'})
        self.assertRegex(answer['warning'], 'may be seen again.*lineage')
        self.assertEqual(self.reasons(), {'gone': 'NO_SUCH_CHECKPOINT'})
        harness.os.unlink(f'{self.daemon.state}/lineage')
        self.daemon.stop()


if __name__ == '__main__':
    harness.main()
