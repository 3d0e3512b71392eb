#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Block commits in the images of a VM that is powered off: the disk and every incremental are right then, and when the VM
runs again."""
import json
import os

import harness
from commits import OfflineLayers
from offline import content

LAYERS = 4  # the one that the VM is started with included
ROUNDS = int(os.environ.get('QPULL_TEST_ROUNDS', 2))
STEPS = 24


class OfflineCommit(OfflineLayers):
    def every_spread(self, top, base, *flags):
        """Layers are counted from below; flags are --delete, --shallow or nothing."""
        self.begin()
        self.build(LAYERS)
        self.power_off()
        self.serve()
        self.check(self.names, 'before')
        live, old = top == LAYERS - 1, list(self.files)
        words = ['--active'] if live else ['--top', self.files[top]]
        if '--shallow' not in flags:
            words += ['--base', self.files[base]]
        done = self.commit(*words, *flags)
        self.assertIn(f"committed '{self.files[top]}' into '{self.files[base]}'", done.stdout)
        self.assertNotIn('broken', self.states().values())
        self.wait_closed(self.daemon)
        keeps = live and '--delete' not in flags  # the VM's image goes on, empty
        del self.files[base + 1:top + (0 if keeps else 1)]
        self.assertSame(content(self.files[-1]), self.disk.model.image, 'the disk')
        self.check_images()
        self.assertEqual({f for f in old if not os.path.exists(f)},
                         set(old[base + 1:top + 1]) if '--delete' in flags else set())
        self.assertEqual(len(self.chain(self.files[-1])), len(self.files))
        if keeps:
            self.assertIn(f'{old[-1]} is an empty image', done.stdout)
            self.assertEqual(self.allocated(old[-1]), 0)
        elif live:
            self.assertIn(f'--image vm/vda={self.files[-1]}', done.stdout)
            self.daemon.stop()
            self.serve()
        self.check(self.names, f'{top} into {base}')
        self.goes_on(f'{top} into {base}')

    def goes_on(self, what):
        """With the same memory of the disk: on, off, and on again."""
        for turn in range(2):
            self.power_on()
            self.await_turn()
            self.check(self.names, f'{what}, on {turn}')
            self.work()
            self.check(self.names, f'{what}, on {turn} and after work')
            self.power_off()
            self.await_turn()
            self.check(self.names, f'{what}, off {turn}')
        self.check_images()
        self.daemon.stop()

    @staticmethod
    def chain(path):
        return json.loads(harness.run(['qemu-img', 'info', '--backing-chain', '--output=json', path]).stdout)

    @staticmethod
    def allocated(path):
        runs = json.loads(harness.run(['qemu-img', 'map', '--output=json', path]).stdout)
        return sum(r['length'] for r in runs if r['depth'] == 0 and (r['data'] or r['zero'] and r['present']))

    def test_top_layer_into_the_one_below(self):
        self.every_spread(3, 2, '--shallow')

    def test_top_layer_into_the_second_below(self):
        self.every_spread(3, 1)

    def test_top_layer_into_the_deepest(self):
        self.every_spread(3, 0, '--delete')

    def test_top_layer_into_the_one_below_and_deleted(self):
        self.every_spread(3, 2, '--delete')

    def test_second_layer_into_the_one_below(self):
        self.every_spread(2, 1, '--shallow', '--delete')

    def test_second_layer_into_the_deepest(self):
        self.every_spread(2, 0, '--delete')

    def test_third_layer_into_the_deepest(self):
        self.every_spread(1, 0)

    def test_random_commits_while_the_vm_is_on_and_off(self):
        for _ in range(ROUNDS):
            self.is_off = False
            self.begin(options=harness.rng.choice(('', 'cluster_size=4096')))
            self.serve()
            done = [self.random_step(step) for step in range(STEPS)]
            print(' '.join(done), end=' ', flush=True)
            self.check(when='in the end')
            if not self.is_off:
                self.vm.quit()
            self.check_images()
            self.daemon.stop()

    def random_step(self, step):
        rng = harness.rng
        usable = {n for n, r in self.reasons().items() if r == 'NONE'}
        kinds = ['commit', 'commit', 'switch'] if self.is_off else ['work', 'checkpoint', 'snapshot', 'snapshot', 'commit',
                                                                   'switch', 'switch']
        kind = rng.choice(kinds)
        where = f'step {step}: {kind}, {"off" if self.is_off else "on"}'
        if kind == 'switch':
            self.switch()
        elif kind == 'checkpoint' and len(self.names) < 12:
            self.checkpoint(f'ck{step}')
        elif kind == 'snapshot' and len(self.files) < 6:
            self.snapshot(rng.sample(sorted(usable), rng.randrange(len(usable) + 1)),
                          options=rng.choice(('', 'cluster_size=4096')))
        elif kind == 'commit' and len(self.files) > 1:
            self.random_commit()
        if not self.is_off:
            self.work(3)
        self.assertLessEqual(usable, set(self.check(when=where)), f'{where}: {self.reasons()}')
        return kind

    def switch(self):
        if self.is_off:
            self.power_on()
        else:
            self.power_off()
            self.restart_daemon_for_the_image()
        self.await_turn()

    def restart_daemon_for_the_image(self):
        """With the image that the VM is started with by now."""
        flag = f'--image=vm/vda={self.files[-1]}'
        if flag not in self.daemon.flags:
            self.daemon.stop()
            self.daemon.flags = [flag if f.startswith('--image') else f for f in self.daemon.flags]
            self.daemon.start()

    def random_commit(self):
        top = harness.rng.randrange(1, len(self.files))
        base = harness.rng.randrange(top)
        live, delete = top == len(self.files) - 1, harness.rng.random() < 0.5
        self.commit('--base', self.files[base], *(['--active'] if live else ['--top', self.files[top]]),
                    *(['--delete'] if delete else []))
        self.assertNotIn('broken', self.states().values())
        keeps = live and self.is_off and not delete
        del self.files[base + 1:top + (0 if keeps else 1)]
        if self.is_off:
            self.wait_closed(self.daemon)
            self.restart_daemon_for_the_image()
            self.await_turn()
        else:
            self.nodes = [self.vm.look('query-block')[-1]['inserted']['node-name']]


if __name__ == '__main__':
    harness.main()
