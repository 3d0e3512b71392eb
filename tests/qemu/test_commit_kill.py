#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 900
"""Whoever dies, at whichever command of a block commit: the disk is what was written, and every checkpoint reproduces it
or is refused. A third of the commands, chosen at random, in each run; all of them with QPULL_TEST_ALL=1."""
import os
import threading

import harness
from commits import Layers
from harness import MIB
from qmpproxy import QmpProxy

COMMANDS_MAX = 200  # far more than a commit has
STEP = 1 if os.environ.get('QPULL_TEST_ALL') else 3
SWEEP_COMMANDS = 12  # about as many as the successor of a killed daemon begins with
SMALL = 2 * MIB + 512


class CommitKilled(Layers):
    def prepare(self, layers):
        self.begin(QmpProxy, size=SMALL)
        self.build(layers)
        self.serve()

    def end(self):
        self.daemon.kill()
        self.daemon.check_log()
        self.vm.kill()
        self.things.remove(self.vm)
        self.things.remove(self.daemon)

    def strike_at(self, number, when, blow):
        """The commit with that blow at that command, not counting questions; whether there was such a command."""
        struck, seen = threading.Event(), []

        def strike():
            blow()
            struck.set()
            return False

        def count(command):
            if command.startswith(('query-', 'x-debug-', 'qmp_')):
                return
            if len(seen) == number:
                self.proxy.number = len(self.proxy.commands)
                setattr(self.proxy, when, strike)
            seen.append(command)
        self.proxy.off()
        self.proxy.at_each(count)
        done = self.commit(*self.arguments, check=False)
        self.proxy.at_each(None)
        self.proxy.off()
        if not struck.is_set():
            self.assertEqual(done.returncode, 0, done.stderr)
        return struck.is_set()

    def every_command(self, layers, blow, recover):
        number, offered, blows = harness.rng.randrange(STEP), 0, 0
        while number < COMMANDS_MAX:
            self.prepare(layers)
            when = harness.rng.choice(('before', 'after'))
            if not self.strike_at(number, when, blow):
                self.check(self.names, 'no blow')
                self.end()
                break
            blows += 1
            recover(number)
            self.assertNoJobs()
            where = f'blow {when} command {number}'
            offered += len(self.check(when=where))
            self.work(3)
            self.check(when=f'{where}, and later')
            self.end()
            number += STEP
        print(f'{blows} blows, {offered} checkpoints were usable after them', end=' ', flush=True)
        self.assertGreater(blows, 6 // STEP)
        self.assertLess(number, COMMANDS_MAX)
        return offered, blows

    def daemon_dies(self, layers, *arguments):
        self.arguments = arguments

        def recover(number):
            if number % 3 == 0:  # its successor dies, too, while it sweeps
                again = threading.Event()

                def strike():
                    self.daemon.kill()
                    again.set()
                    return False
                self.proxy.at(harness.rng.randrange(SWEEP_COMMANDS), before=strike)
                try:
                    self.daemon.start()
                except AssertionError:  # dead already
                    pass
                again.wait(0.5)
                self.proxy.off()
                self.daemon.kill()
            self.daemon.start()
            self.daemon.wait_idle()
            # A record that came into base unseen cannot be told from one that somebody put there: refused, never wrong.
            self.assertLessEqual(set(self.reasons().values()), {'NONE', 'GAP'}, number)

        offered, _ = self.every_command(layers, lambda: self.daemon.kill(), recover)
        self.assertGreater(offered, 0)

    def qemu_dies(self, layers, *arguments):
        self.arguments = arguments

        def blow():
            root = self.vm.look('query-block')[-1]['inserted']['node-name']
            self.live = self.files[self.nodes.index(root)]
            self.vm.process.kill()

        def recover(_):
            self.vm.kill()
            self.boot(self.live)
            self.daemon.wait_idle()

        return self.every_command(layers, blow, recover)

    def test_the_daemon_dies_during_an_active_commit(self):
        self.daemon_dies(3, '--active')

    def test_the_daemon_dies_during_a_commit_below_the_live_layer(self):
        self.daemon_dies(3, '--top', 'layer-1')

    def test_the_daemon_dies_during_a_commit_far_below_the_live_layer(self):
        self.daemon_dies(4, '--top', 'layer-1')

    def test_qemu_dies_during_an_active_commit(self):
        self.qemu_dies(3, '--active')

    def test_qemu_dies_during_a_commit_below_the_live_layer(self):
        self.qemu_dies(3, '--top', 'layer-1')

    def test_qemu_dies_during_a_commit_far_below_the_live_layer(self):
        """Layers that only read keep their records through it, and may not pass for the whole."""
        offered, blows = self.qemu_dies(4, '--top', 'layer-1')
        self.assertGreater(offered, blows)

    def test_qemu_dies_between_the_graph_and_the_records(self):
        """When the overlay names base already, and base has not stored its records yet: too short a time to be met by
        chance, so the images are put into that state by hand."""
        self.prepare(4)
        self.arguments = ['--top', 'layer-1']
        finalize = []

        def count(command):
            if command == 'job-finalize':
                self.vm.process.kill()
                finalize.append(command)
        self.proxy.at_each(count)
        done = self.commit(*self.arguments, check=False)
        self.proxy.at_each(None)
        self.assertEqual((len(finalize), done.returncode), (1, 1))
        self.vm.kill()
        harness.run(['qemu-img', 'rebase', '-u', '-b', self.files[0], '-F', 'qcow2', self.files[2]])
        self.boot(self.files[-1])
        self.daemon.wait_idle()
        self.assertGreater(len(self.check(when='graph without records')), 0)
        self.daemon.stop()


if __name__ == '__main__':
    harness.main()
