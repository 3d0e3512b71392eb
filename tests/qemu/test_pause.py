#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long the guest stands still for the freeze; and a guest that is stopped for it goes on, whatever dies."""
import json
import threading

import harness
import nbd
import nbdpull
import slowsync
from harness import MIB, Disk
from qmpproxy import QmpProxy


class NoReopen(QmpProxy):
    """Stands before a QEMU that refuses every blockdev-reopen. die_at(name, daemon): the daemon is killed when that
    command comes, which QEMU never gets; for "stop" and what comes after it only."""

    def __init__(self, folder, guest):
        self.victim, self.death, self.stopping_guest, self.died = None, None, False, threading.Event()
        super().__init__(folder, guest)

    def die_at(self, name, daemon):
        self.died.clear()
        self.stopping_guest = False
        self.victim, self.death = daemon, name

    def _command(self, client, qemu, line, fds):
        message = json.loads(line)
        name = message.get('execute')
        if name == 'blockdev-reopen':
            error = {'class': 'GenericError', 'desc': 'not in this test'}
            client.sendall(json.dumps({'id': message.get('id'), 'error': error}).encode() + b'\r\n')
            self.stopping_guest = True
            return True
        if name == self.death and self.stopping_guest:
            self.death = None
            self.victim.kill()
            self.died.set()
            return False
        return super()._command(client, qemu, line, fds)


class Pause(harness.Case):
    def session(self, daemon, export='vm/vda'):
        """What query-sessions says while it is up; then it ends."""
        h = nbdpull.connect(daemon.uri(export))
        told = daemon.ask('query-sessions')[0]
        h.shutdown()
        daemon.wait_idle()
        return told

    def status(self, guest):
        return guest.look('query-status')['status']

    def test_what_the_host_holds_back_is_written_before_the_freeze_and_not_during_it(self):
        with slowsync.slow(self.folder, rate=32):
            guest = self.guest(Disk('vda', 64 * MIB))
            daemon = self.qpulld(guest, linger=0)
        self.session(daemon)  # the self-test
        before = guest.state()
        for at in range(0, 48 * MIB, MIB):
            guest.write('vda', at, MIB, 1 + at)
        load = guest.load('vda', kinds=('write',), size=4 * MIB, max=4096, pause_us=20000, **{'from': 56 * MIB})
        told = self.session(daemon)
        result = load.stop()
        self.assertEqual(told['frozen-by'], 'blockdev-reopen')
        self.assertGreater(told['flush-ms'], 1000)  # 48 MiB
        self.assertGreater(told['pause-us'], 0)
        self.assertLess(told['pause-us'] / 1000, told['flush-ms'] / 2)
        self.assertLess(result['slowest-us'] / 1000, told['flush-ms'] * 3 / 4)
        self.assertEqual(result['errors'], 0)
        self.assertRegex(daemon.log(), r'session \w+ is up, 1 disk frozen, the guest\'s I/O stood still for [\d.]+ ms')
        self.assertEqual(daemon.vm()['last-session']['pause-us'], told['pause-us'])
        self.assertNothingLeft(guest, daemon, before)
        guest.check()

    def test_a_freeze_that_would_take_longer_than_max_pause_is_refused_with_the_figures(self):
        with slowsync.slow(self.folder, ms=300):
            guest = self.guest(Disk('vda', 16 * MIB), Disk('vdb', 16 * MIB, cache={'direct': True}))
        daemon = self.qpulld(guest, linger=0, flags=['--max-pause=0.1'])
        before = guest.state()
        load = guest.load('vda', kinds=('write',), pause_us=5000)
        with self.assertRaises(nbd.Error) as refusal:
            nbdpull.connect(daemon.uri('vm/vda'))
        self.assertRegex(refusal.exception.string + daemon.log(),
                         r'stand still for about \d{3,} ms, longer than the 100 that --max-pause allows: so long takes a '
                         r"flush of disk 'vda' at the \d\. try")
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)
        daemon.stop()
        self.session(self.qpulld(guest, linger=0, flags=['--max-pause=60'], name='patient'))
        self.assertEqual(load.stop()['errors'], 0)
        guest.check()

    def test_where_blockdev_reopen_is_refused_a_short_stop_makes_one_instant(self):
        disks = (Disk('vda', 24 * MIB), Disk('vdb', 24 * MIB), Disk('vdc', 24 * MIB))
        guest = self.guest(*disks)
        daemon = self.qpulld({'vm': NoReopen(self.folder, guest)}, linger=1)
        before = guest.state()
        guest.order_start([d.name for d in disks], seed=5)
        for _ in range(3):
            handles = [nbdpull.connect(daemon.uri(f'vm/{d.name}')) for d in disks]
            told = daemon.ask('query-sessions')[0]
            harness.check_order([nbdpull.read_all(h) for h in handles], 5)
            self.assertEqual(told['frozen-by'], 'stop')
            self.assertGreater(told['pause-us'], 0)
            self.assertEqual(self.status(guest), 'running')
            for h in handles:
                h.shutdown()
            daemon.wait_idle()
        self.assertGreater(guest.order_stop()['records'], 10)
        self.assertRegex(daemon.log(), r'warning: .*stopped the guest for its freeze: .*not in this test')
        self.assertNothingLeft(guest, daemon, before)
        guest.check()

    def test_a_guest_that_a_killed_daemon_left_stopped_is_let_go_on_by_its_successor(self):
        guest = self.guest(Disk('vda', 16 * MIB), Disk('vdb', 16 * MIB))
        proxy = NoReopen(self.folder, guest)
        daemon = self.qpulld({'vm': proxy}, linger=0)
        before = guest.state()
        loads = [guest.load(d, pause_us=2000) for d in ('vda', 'vdb')]
        for death in ('stop', 'qom-set', 'cont', 'blockdev-del'):
            daemon.wait_idle()
            proxy.die_at(death, daemon)
            with self.assertRaises(nbd.Error):
                nbdpull.connect(daemon.uri('vm/vda'))
            self.assertTrue(proxy.died.wait(30), death)
            stopped = death in ('qom-set', 'cont')
            harness.wait_until(lambda want='paused' if stopped else 'running': self.status(guest) == want, 10, death)
            daemon.start()
            daemon.wait_idle()
            self.assertEqual(self.status(guest), 'running', f'killed at {death}')
            self.assertEqual(guest.state(), before, f'killed at {death}')
        for load in loads:
            ops = load.status()['ops']
            harness.wait_until(lambda: load.status()['ops'] > ops + 10, 30, 'the guest\'s work')
            result = load.stop()
            self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertNothingLeft(guest, daemon, before)
        guest.check()

    def test_a_guest_that_its_user_has_stopped_stays_stopped(self):
        guest = self.guest(Disk('vda', 16 * MIB), Disk('vdb', 16 * MIB))
        proxy = NoReopen(self.folder, guest)
        daemon = self.qpulld({'vm': proxy}, linger=0)
        self.session(daemon)
        before = guest.state()
        guest.look('stop')
        told = self.session(daemon)
        self.assertEqual((told['frozen-by'], told['pause-us']), ('while stopped', 0))
        self.assertEqual(self.status(guest), 'paused')
        proxy.die_at('qom-set', daemon)
        with self.assertRaises(nbd.Error):
            nbdpull.connect(daemon.uri('vm/vda'))
        self.assertTrue(proxy.died.wait(30))
        daemon.start()
        daemon.wait_idle()
        self.assertEqual(self.status(guest), 'paused')
        guest.look('cont')  # QEMU 7.2 lets go of descriptors only now
        harness.wait_until(lambda: guest.state() == before and not guest.deleted_fds(), 20, 'the last traces')
        guest.write('vda', 0, 4096, 7)
        guest.check()


if __name__ == '__main__':
    harness.main()
