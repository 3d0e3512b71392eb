#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Whoever dies, at whichever command to QEMU: nothing is left behind, and the busy guest notices nothing."""
import functools
import socket
import threading
import time

import harness
import nbdpull
import rawnbd
from harness import MIB, Disk
from qmpproxy import QmpProxy

ROUNDS_MAX = 400  # far more than a session has commands
SWEEP_COMMANDS = 25  # about as many as a sweep with one session to undo has


class Killed(harness.Case):
    def setUp(self):
        self.disks = (Disk('vda', 32 * MIB + 3 * 512), Disk('vdb', 24 * MIB, fmt='raw'))
        self.vm = self.guest(*self.disks)
        self.vm.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': 'since', 'persistent': True})
        self.before = self.vm.state()
        self.loads = [self.vm.load(d.name, pause_us=2000) for d in self.disks]
        self.proxy = QmpProxy(self.folder, self.vm)
        self.addCleanup(self.proxy.close)

    def finish(self, daemon):
        """The guest saw no error and lost nothing, and the next session works."""
        h = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.dirty_context('since')])
        self.assertTrue(h.can_meta_context(nbdpull.dirty_context('since')))
        data = nbdpull.read_all(h)
        h.shutdown()
        daemon.wait_idle()
        load = self.loads[0]
        n, least = harness.model.Model(harness.library(), self.disks[0].size).find_cut(data, load.plan, 0,
                                                                                      load.status()['ops'] + 10)
        self.assertIsNotNone(n, f'no instant of the load; at least {least} sectors differ')
        for load in self.loads:
            result = load.stop()
            self.assertEqual((result['errors'], result['bad']), (0, 0))
            self.assertGreater(result['ops'], 100)
        self.assertNothingLeft(self.vm, daemon, self.before)
        self.vm.check()
        self.vm.poweroff()
        for disk in self.disks:
            self.assertModel(disk.model, self.raw(disk), disk.name)

    def leftovers(self, daemon):
        state = self.vm.state()
        if 'new' in [b['name'] for b in state['nodes']['node-vda']['bitmaps']]:  # it ended well before the blow
            daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'new'})
            state = self.vm.state()
        return state

    def test_the_daemon_is_killed_at_every_command(self):
        # The self-test is part of the first session after each start. Teardown is killed as set-up is.
        daemon = self.qpulld({'vm': self.proxy}, linger=0)
        daemon.wait_idle()
        number, rounds, begun = 0, 0, set()
        while number < ROUNDS_MAX:
            blow = 'before' if number % 2 else 'after'
            struck = threading.Event()

            def strike(event=struck, daemon=daemon):
                daemon.kill()
                event.set()
                return False
            self.proxy.at(number, **{blow: strike})
            rawnbd.pull_a_little(daemon.socket, 'vm/vda@new', 'qemu:dirty-bitmap:since')
            if not struck.is_set():
                try:
                    daemon.wait_idle()
                except (ConnectionError, FileNotFoundError):  # the blow came meanwhile
                    struck.wait(10)
            commands = list(self.proxy.commands)
            self.proxy.off()
            if not struck.is_set():
                break
            begun.add(commands[-1])
            if number % 3 == 0:  # its successor dies, too, while it sweeps
                again = threading.Event()
                self.proxy.at(harness.rng.randrange(SWEEP_COMMANDS), before=functools.partial(strike, again))
                try:
                    daemon.start()
                except AssertionError:  # dead already
                    pass
                again.wait(0.5)
                self.proxy.off()
                daemon.kill()
            daemon.start()
            daemon.wait_idle()
            state = self.leftovers(daemon)
            self.assertEqual(state, self.before, f'killed {blow} command {number}, {commands[-1]}')
            self.assertEqual(self.vm.deleted_fds(), [], f'killed {blow} command {number}')
            self.assertEqual(daemon.files_left(), [])
            number += 1
            rounds += 1
        print(f'{rounds} blows at {sorted(begun)}', flush=True)
        self.assertGreater(rounds, 60)
        self.assertLess(rounds, ROUNDS_MAX)
        self.leftovers(daemon)
        self.finish(daemon)

    def test_the_client_is_gone_at_every_command(self):
        daemon = self.qpulld({'vm': self.proxy}, linger=0)
        daemon.wait_idle()
        rawnbd.pull_a_little(daemon.socket, 'vm/vda@new', 'qemu:dirty-bitmap:since')  # the self-test
        daemon.wait_idle()
        self.leftovers(daemon)
        number = 0
        while number < ROUNDS_MAX:
            raw = rawnbd.Raw(daemon.socket)
            struck = threading.Event()

            def leave(raw=raw, struck=struck):
                struck.set()
                raw.sock.shutdown(socket.SHUT_RDWR)
                time.sleep(0.01)  # the daemon hears of it while the command is on its way
            self.proxy.at(number, before=leave)
            try:
                raw.go('vm/vda@new', contexts=['qemu:dirty-bitmap:since'])
            except (OSError, EOFError, ValueError):
                pass
            up = not struck.is_set()
            raw.close()
            daemon.wait_idle()
            self.proxy.off()
            problems = (daemon.vm()['last-session'] or {}).get('problems')
            self.assertIsNone(problems)
            self.assertEqual(self.vm.state(), self.before, f'left at command {number}')
            self.assertEqual(self.vm.deleted_fds(), [])
            if up:
                break
            number += 1
        self.assertGreater(number, 20)
        self.finish(daemon)

    def test_clients_are_killed_at_random_while_they_pull(self):
        daemon = self.qpulld(self.vm, linger=0)
        for _ in range(15):
            client = harness.spawn(['nbdcopy', daemon.uri('vm/vda@new'), 'null:'], stderr=-3)
            time.sleep(harness.rng.random() * 0.15)
            client.kill()
            client.wait()
            daemon.wait_idle()
            self.assertEqual(self.leftovers(daemon), self.before)
            self.assertEqual(self.vm.deleted_fds(), [])
        self.finish(daemon)

    def test_the_daemon_is_killed_at_random_while_it_serves(self):
        daemon = self.qpulld(self.vm, linger=1)
        for i in range(12):
            client = harness.spawn(['nbdcopy', daemon.uri('vm/vdb'), 'null:'], stderr=-3)
            time.sleep(harness.rng.random() * (0.3 if i % 2 else 1.4))
            daemon.kill()
            began = time.monotonic()
            client.wait(20)
            self.assertLess(time.monotonic() - began, 5)
            daemon.start()
            daemon.wait_idle()
            self.assertNothingLeft(self.vm, daemon, self.before)
        self.finish(daemon)


if __name__ == '__main__':
    harness.main()
