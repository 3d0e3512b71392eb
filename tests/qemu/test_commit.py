#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""After a block commit every incremental since every checkpoint still reproduces the disk, however the records were
spread over the layers."""
import os

import harness
from commits import Layers
from harness import MIB
from qmpproxy import QmpProxy

LAYERS = 4  # the live one included
ROUNDS = int(os.environ.get('QPULL_TEST_ROUNDS', 2))
STEPS = 24


class Commit(Layers):
    def commit_of(self, top, base):
        """Layers are counted from below here; the live one is the last."""
        names = self.nodes
        args = ['--base', names[base]]
        if top == len(names) - 1:
            args += ['--active']
        else:
            args += ['--top', names[top]]
        return args

    def every_spread(self, top, base, options=''):
        """The guest writes before every command of the commit."""
        self.begin(QmpProxy, options=options)
        self.build(LAYERS)
        self.serve()
        self.check(self.names, 'before')
        self.proxy.at_each(lambda command: self.work(1))
        self.commit(*self.commit_of(top, base))
        self.proxy.at_each(None)
        self.assertNotIn('broken', self.states().values())
        self.assertNoJobs()
        self.check(self.names, f'{top} into {base}')
        del self.nodes[base + 1:top + 1]
        self.work()
        self.check(self.names, f'{top} into {base}, and after more work')
        self.daemon.stop()

    def test_live_layer_into_the_one_below(self):
        self.every_spread(3, 2)

    def test_live_layer_into_the_second_below(self):
        self.every_spread(3, 1)

    def test_live_layer_into_the_deepest(self):
        self.every_spread(3, 0)

    def test_second_layer_into_the_one_below(self):
        self.every_spread(2, 1)

    def test_second_layer_into_the_deepest(self):
        self.every_spread(2, 0)

    def test_third_layer_into_the_deepest(self):
        self.every_spread(1, 0)

    def test_a_record_that_others_clear_while_it_is_moved_is_refused(self):
        self.begin(QmpProxy)
        self.work()
        self.snapshot()
        self.checkpoint('c')
        self.work()
        self.serve()
        self.check(['c'], 'before')
        seen = []

        def clear(command):
            seen.append(command)
            if command == 'query-block' and seen.count('query-block') == 1 and 'block-commit' in seen:
                self.vm.look('block-dirty-bitmap-clear', {'node': self.nodes[-1], 'name': 'c'})
            if command == 'query-block' and 'block-commit' not in seen:
                seen.remove(command)
        self.proxy.at_each(clear)
        self.commit('--active')
        self.proxy.at_each(None)
        self.assertIn('query-block', seen)
        self.check([], 'after')
        self.assertEqual(self.reasons(), {'c': 'GAP'})
        self.daemon.stop()

    def test_images_opened_by_qemu_itself(self):
        """Nodes without a name of their own go away with the commit; file names do as well as node names."""
        self.begin()
        self.build(LAYERS)
        self.restart()
        self.serve()
        self.check(self.names, 'before')
        self.commit('--top', self.files[2], '--shallow')
        self.check(self.names, 'third into second')
        self.work()
        self.commit('--top', self.files[1], '--base', self.files[0])
        self.check(self.names, 'second into first')
        self.restart()
        self.daemon.wait_idle()
        self.check(self.names, 'restarted')
        self.work()
        done = self.commit('--active')
        self.assertIn(self.files[0], done.stdout)
        self.check(self.names, 'live into first')
        self.work()
        self.restart(self.files[0])
        self.daemon.wait_idle()
        self.work()
        self.check(self.names, 'restarted on the base')
        self.assertNoJobs()
        self.daemon.stop()

    def test_a_commit_does_not_blow_records_up(self):
        """A layer that stood for long holds much more than what changed since a checkpoint that began late in it."""
        for active in (False, True):
            self.begin()
            self.snapshot()
            self.vm.write('vda', 0, 6 * MIB, 7)
            self.checkpoint('late')
            self.vm.write('vda', MIB, 65536, 8)
            if not active:
                self.snapshot(['late'])
                self.vm.write('vda', 2 * MIB, 65536, 9)
            self.serve()
            before = self.check(['late'])
            self.commit(*(['--active'] if active else ['--top', self.nodes[1]]))
            self.assertEqual(self.states(), {'late': 'kept'})
            self.assertEqual(self.check(['late']), before)
            self.daemon.stop()
            self.vm.quit()

    def test_a_record_that_is_younger_than_its_layer_is_not_taken_for_the_whole(self):
        """Somebody makes a record of a checkpoint's name in a layer that was written before: its allocation counts."""
        for active in (False, True):
            self.begin()
            self.snapshot()
            self.work()
            self.checkpoint('c')
            self.snapshot()
            self.work()
            self.vm.look('block-dirty-bitmap-add', {'node': self.nodes[-1], 'name': 'c', 'persistent': True})
            if not active:
                self.snapshot()
            self.serve()
            self.check(['c'], 'before')
            self.commit(*self.commit_of(2, 0))
            self.check(['c'], f'after, active {active}')
            self.work()
            self.daemon.stop()
            self.vm.quit()

    def test_layers_of_different_granularity_and_cluster_size(self):
        self.begin(options='cluster_size=4096')
        self.checkpoint('fine', granularity=4096)
        self.checkpoint('coarse', granularity=1 << 20)
        self.work()
        self.snapshot(['fine', 'coarse'], options='cluster_size=65536')
        self.work()
        self.checkpoint('middle', granularity=512)
        self.work()
        self.snapshot(['fine', 'coarse', 'middle'], options='cluster_size=1M')
        self.work()
        self.serve()
        self.commit('--top', 'layer-1')
        self.check(self.names, 'second into first')
        self.work()
        self.commit('--active')
        self.check(self.names, 'live into first')
        self.work()
        self.check(self.names, 'later')
        self.daemon.stop()

    def test_a_disk_that_grew_with_its_layers(self):
        self.begin()
        self.work()
        self.checkpoint('small')
        self.work()
        self.grow(10 * MIB, ['small'])
        self.checkpoint('larger')
        self.work()
        self.grow(12 * MIB + 512, ['small', 'larger'])
        self.work()
        self.checkpoint('largest')
        self.work()
        self.serve()
        self.check(['largest'], 'before')
        self.assertEqual(self.reasons(), {'small': 'RESIZED', 'larger': 'RESIZED', 'largest': 'NONE'})
        self.commit('--top', 'layer-1')
        self.check(['largest'], 'second into first')
        self.work()
        self.commit('--active')
        usable = [name for name, reason in self.reasons().items() if reason == 'NONE']
        self.assertIn('largest', usable)  # whether the others fit again is not known for sure, so GAP is an answer
        self.check(usable, 'live into first, which grew')
        self.daemon.stop()

    def grow(self, size, names):
        self.snapshot(names, size=size)
        self.disk.model.image += bytes(size - len(self.disk.model.image))
        self.disk.size = self.disk.model.size = size

    def test_random_layers_and_commits(self):
        """Layers come with and without records, records begin anywhere and are spoiled by crashes, and any layers are
        committed into any; whatever is offered is right, and what was usable stays so."""
        for _ in range(ROUNDS):
            self.begin(QmpProxy, options=harness.rng.choice(('', 'cluster_size=4096')))
            self.serve()
            for step in range(STEPS):
                self.random_step(step)
            self.check(when='in the end')
            self.daemon.stop()
            self.vm.quit()

    def random_step(self, step):
        rng = harness.rng
        kind = rng.choice(('checkpoint', 'snapshot', 'snapshot', 'commit', 'commit', 'restart', 'crash', 'work'))
        live = [n for n, r in self.reasons().items() if r == 'NONE']
        if kind == 'checkpoint' and len(self.names) < 12:
            self.checkpoint(f'ck{step}')
        elif kind == 'snapshot' and len(self.files) < 6:
            self.snapshot(rng.sample(live, rng.randrange(len(live) + 1)), options=rng.choice(('', 'cluster_size=4096')))
        elif kind == 'restart' and rng.random() < 0.5:
            self.restart()
            self.daemon.wait_idle()
        elif kind == 'crash' and rng.random() < 0.3:
            self.vm.kill()
            self.boot(self.files[-1])
            self.daemon.wait_idle()
        elif kind == 'commit' and len(self.files) > 1:
            self.random_commit(step, set(live))
        self.work(3)

    def random_commit(self, step, usable):
        top = harness.rng.randrange(1, len(self.files))
        base = harness.rng.randrange(top)
        live = top == len(self.files) - 1
        self.proxy.at_each(lambda command: self.work(1))
        self.commit('--base', self.files[base], *(['--active'] if live else ['--top', self.files[top]]))
        self.proxy.at_each(None)
        self.assertNoJobs()
        del self.files[base + 1:top + 1]
        if len(self.nodes) > 1 or live:
            self.nodes = [self.vm.look('query-block')[-1]['inserted']['node-name']]
        self.assertNotIn('broken', self.states().values())
        offered = set(self.check(when=f'step {step}'))
        self.assertLessEqual(usable, offered, f'step {step}: {self.reasons()}')


if __name__ == '__main__':
    harness.main()
