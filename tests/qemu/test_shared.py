#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
"""Frozen disks are read through memory shared with QEMU. Whoever breaks that way, the client sees right bytes and no
error, the guest goes on, and nothing is left."""
import os
import re
import signal
import time

import nbd

import harness
import nbdpull
from harness import MIB, Disk
from qmpproxy import QmpProxy

SIZE = 48 * MIB + 3 * 512


def shared_sizes(pid):
    """What a process shares with QEMUs, piece by piece, in MiB of data; the rings besides are small."""
    sizes = []
    for n in os.listdir(f'/proc/{pid}/fd'):
        try:
            if os.readlink(f'/proc/{pid}/fd/{n}').startswith('/memfd:qpull-vhost'):
                sizes.append(os.stat(f'/proc/{pid}/fd/{n}').st_size // MIB)
        except FileNotFoundError:  # of something else: the control connection of the last question is being closed
            pass
    return sorted(sizes)


class Shared(harness.Case):
    def ready(self, *flags, **options):
        """A guest with data, the bytes it had at the freeze of the first client, and that client."""
        self.vm = self.guest(Disk('vda', SIZE))
        self.before = self.vm.state()
        self.vm.write('vda', 0, 8 * MIB, 11)
        self.vm.write('vda', 20 * MIB, 24 * MIB, 12)
        self.frozen = bytearray(self.vm.disks['vda'].model.image)
        self.daemon = self.qpulld(options.pop('vms', self.vm), linger=0, flags=flags)
        self.client = nbdpull.connect(self.daemon.uri('vm/vda'))

    def shared(self):
        return self.daemon.ask('query-sessions')[0]['shared-disks']

    def wait_shared(self, n=1):
        harness.wait_until(lambda: self.shared() == n, 20, f'{n} shared disks')

    def vhost_export(self):
        return next((e['id'] for e in self.vm.look('query-block-exports') if e['type'] == 'vhost-user-blk'), None)

    def remains(self):
        """The cut node, which no device uses after the freeze, and the export for the flush before it."""
        nodes = [n['node-name'] for n in self.vm.look('query-named-block-nodes', {'flat': True})]
        exports = [e['id'] for e in self.vm.look('query-block-exports')]
        return [name for name in nodes + exports if re.fullmatch('qpull-.*-(cut|live)[0-9]+', name)]

    def finish(self):
        self.client.shutdown()
        self.daemon.wait_idle()
        self.vm.check()
        self.assertNothingLeft(self.vm, self.daemon, self.before)
        self.daemon.stop()

    def notes(self):
        with open(self.daemon.log_path, encoding='utf-8') as f:
            return [line for line in f if 'over NBD, without shared memory' in line]

    def test_bytes_come_through_shared_memory_whatever_the_guest_writes(self):
        self.ready()
        self.wait_shared()
        load = self.vm.load('vda', pause_us=500)
        for request, in_flight in ((1 << 18, 8), (4096 * 3 + 512, 16), (8 * MIB, 2)):
            self.assertSame(nbdpull.read_all(self.client, request, in_flight), self.frozen, f'by {request}')
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertEqual(self.notes(), [])
        self.finish()

    def test_what_only_the_freeze_needs_goes_once_maps_are_read(self):
        self.ready()
        harness.wait_until(lambda: not self.remains(), 20, 'a session without what only its freeze needs')
        self.assertSame(nbdpull.read_all(self.client), self.frozen)
        self.finish()

    def test_without_room_disks_are_read_over_nbd(self):
        self.ready('--shared-memory=0')
        self.assertEqual(self.shared(), 0)
        self.assertIsNone(self.vhost_export())
        self.assertSame(nbdpull.read_all(self.client), self.frozen)
        self.finish()

    def test_too_little_room_is_said_and_is_no_harm(self):
        self.ready('--shared-memory=1M')
        self.assertSame(nbdpull.read_all(self.client), self.frozen)
        self.assertEqual((self.shared(), len(self.notes())), (0, 1))
        self.assertIn('--shared-memory', self.notes()[0])
        self.finish()

    def test_the_less_room_is_left_the_smaller_is_what_a_disk_gets(self):
        vm = self.guest(*(Disk(name, 4 * MIB) for name in ('vda', 'vdb', 'vdc', 'vdd', 'vde', 'vdf', 'vdg')))
        before, daemon = vm.state(), self.qpulld(vm, linger=0, flags=['--shared-memory=16M'])
        clients = {name: nbdpull.connect(daemon.uri(f'vm/{name}')) for name in vm.disks}
        harness.wait_until(lambda: daemon.ask('query-sessions')[0]['shared-disks'] == 7, 20, '7 shared disks')
        self.assertEqual(shared_sizes(daemon.process.pid), [1, 1, 1, 2, 2, 4, 4])
        for name, client in clients.items():
            self.assertSame(nbdpull.read_all(client, MIB, 8), vm.disks[name].model.image, name)
            client.shutdown()
        daemon.wait_idle()
        self.assertEqual(shared_sizes(daemon.process.pid), [])
        self.assertNothingLeft(vm, daemon, before)

    def test_the_export_is_taken_away_in_mid_pull(self):
        self.ready()
        self.wait_shared()
        data, at = bytearray(len(self.frozen)), 0
        while at < len(data):
            length = min(3 * MIB, len(data) - at)
            if at == 12 * MIB:
                self.vm.look('block-export-del', {'id': self.vhost_export(), 'mode': 'hard'})
            nbdpull.read_ranges(self.client, [(at, length)], data)
            at += length
        self.assertSame(data, self.frozen)
        self.wait_shared(0)
        self.assertEqual(len(self.notes()), 1)
        self.finish()

    def test_a_refused_export_is_noted_once(self):
        vm = self.guest(Disk('vda', SIZE), name='refusing')
        proxy = RefusingProxy(self.folder, vm)
        self.addCleanup(proxy.close)
        before, daemon = vm.state(), self.qpulld({'vm': proxy}, linger=0)
        client = nbdpull.connect(daemon.uri('vm/vda'))
        self.assertEqual(daemon.ask('query-sessions')[0]['shared-disks'], 0)
        self.assertSame(nbdpull.read_all(client), vm.disks['vda'].model.image)
        client.shutdown()
        daemon.wait_idle()
        with open(daemon.log_path, encoding='utf-8') as f:
            self.assertEqual(f.read().count('over NBD, without shared memory'), 1)
        self.assertNothingLeft(vm, daemon, before)

    def test_the_guest_writes_on_while_the_daemon_stands_still_or_is_killed(self):
        self.ready()
        self.wait_shared()
        load = self.vm.load('vda', pause_us=500)
        pending = [self.client.aio_pread(nbd.Buffer(2 * MIB), i * 2 * MIB) for i in range(20)]
        self.client.poll(10)
        self.daemon.process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        before = load.status()['ops']
        harness.wait_until(lambda: load.status()['ops'] > before + 200, 30, 'the guest\'s writes')
        self.vm.look('stop')  # drains
        self.vm.look('cont')
        self.daemon.process.send_signal(signal.SIGCONT)
        harness.wait_until(lambda: self.client.poll(100) and self.client.aio_command_completed(pending[0]), 30, 'a read')
        self.daemon.kill()
        before = load.status()['ops']
        harness.wait_until(lambda: load.status()['ops'] > before + 200, 30, 'the guest\'s writes')
        self.vm.look('stop')
        self.vm.look('cont')
        self.assertIsNotNone(self.vhost_export())
        self.daemon.start()
        self.daemon.wait_idle()
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.client = nbdpull.connect(self.daemon.uri('vm/vda'))
        self.wait_shared()
        self.assertModel(self.vm.disks['vda'].model, nbdpull.read_all(self.client))
        self.finish()

    def test_sessions_leave_no_descriptor_and_no_memory_behind(self):
        self.ready()
        fds = {}
        processes = self.daemon.process, self.vm.process
        for n in range(6):
            self.wait_shared()
            nbdpull.read_ranges(self.client, [(0, 4 * MIB)], bytearray(len(self.frozen)))
            if n % 2:
                nbdpull.drop(self.client)
            else:
                self.client.shutdown()
            self.daemon.wait_idle()
            most = fds.setdefault(0, [count_fds(p) + 1 for p in processes])  # one more client of the control socket
            harness.wait_until(lambda: all(count_fds(p) <= m for p, m in zip(processes, most)), 10, f'fewer than {most}')
            for p in processes:
                with open(f'/proc/{p.pid}/maps', encoding='utf-8') as f:
                    self.assertNotIn('qpull-vhost', f.read())
            self.client = nbdpull.connect(self.daemon.uri('vm/vda'))
        self.finish()


def count_fds(process):
    return len(os.listdir(f'/proc/{process.pid}/fd'))


class RefusingProxy(QmpProxy):
    """Gives vhost-user exports a type that QEMU does not know: QEMU refuses, as one that was built without them does."""

    def _command(self, client, qemu, line, fds):
        return super()._command(client, qemu, line.replace(b'"vhost-user-blk"', b'"vhost-user-none"'), fds)


if __name__ == '__main__':
    harness.main()
