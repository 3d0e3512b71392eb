#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 400
"""A QEMU full of things of others, named as libvirt names them, or nearly as we do: a daemon that is killed in any
step, and its successor that clears up after it, leave each of them exactly as it was."""
import array
import json
import socket
import threading

import harness
import nbdpull
import rawnbd
from harness import MIB, Disk
from qmpproxy import QmpProxy

BLOWS = 20
COMMANDS_MAX = 400  # far more than a session has
RECORD = 'libvirt-checkpoint-1'
# One letter too many or too few, another kind, another number: not ours.
NEARLY_OURS = ('qpull-', 'qpull-0123abcd-', 'qpull-0123abcd-cbw', 'qpull-0123abc-cbw0', 'qpull-0123ABCD-cbw0',
               'qpull-0123abcd-cbw0x', 'qpull-0123abcd-theirs0', 'qpul-0123abcd-cbw0')


class LibvirtDisk(Disk):
    """Both of its nodes have names, as libvirt gives them."""

    def __init__(self, name, number, size):
        super().__init__(name, size)
        self.node, self.storage = f'libvirt-{number}-format', f'libvirt-{number}-storage'

    def arguments(self):
        storage = {'driver': 'file', 'node-name': self.storage, 'filename': self.path, 'discard': 'unmap'}
        node = {'driver': self.fmt, 'node-name': self.node, 'discard': 'unmap', 'file': self.storage}
        return ['-blockdev', json.dumps(storage), '-blockdev', json.dumps(node),
                '-device', f'virtio-blk-pci,id={self.name},drive={self.node},serial={self.name}']


class Leftovers(harness.Case):
    def setUp(self):
        self.vm = self.bare(LibvirtDisk('virtio-disk0', 1, 16 * MIB), LibvirtDisk('virtio-disk1', 2, 8 * MIB))
        self.look = self.vm.look
        self.vm.write('virtio-disk0', 0, 4 * MIB, 1)
        self.add_things()
        self.before = self.picture()
        self.proxy = QmpProxy(self.folder, self.vm)
        self.addCleanup(self.proxy.close)

    def add_fd(self, path, **arguments):
        with open(path, 'w+b') as file:
            file.truncate(MIB)
            self.look.sock.sendmsg([json.dumps({'execute': 'add-fd', 'arguments': arguments}).encode() + b'\n'],
                                   [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [file.fileno()]))])
            self.look.wait_answer('add-fd')

    def add_things(self):
        look = self.look
        # checkpoints of libvirt: one records, one is done with; and a backup's work bitmap
        for name, disabled in ((RECORD, False), ('libvirt-checkpoint-0', True)):
            for node in ('libvirt-1-format', 'libvirt-2-format'):
                look('block-dirty-bitmap-add', {'node': node, 'name': name, 'persistent': True, 'disabled': disabled})
        look('block-dirty-bitmap-add', {'node': 'libvirt-1-format', 'name': 'backup-virtio-disk0', 'disabled': True})
        # what a backup and a copy by libvirt have beside the disk
        for i, name in enumerate(('libvirt-3-format', 'migration-virtio-disk0-format', 'libvirt-1-storage-scratch',
                                  *NEARLY_OURS[:1], *NEARLY_OURS[2:])):
            if not name.endswith('-'):  # QEMU takes no such name
                look('blockdev-add', {'driver': 'null-co', 'node-name': name, 'size': MIB + i * 512})
                look('block-dirty-bitmap-add', {'node': name, 'name': NEARLY_OURS[i % len(NEARLY_OURS)] + 'b'})
        look('blockdev-add', {'driver': 'copy-before-write', 'node-name': 'libvirt-backup-filter',
                              'file': 'libvirt-3-format', 'target': 'libvirt-1-storage-scratch'})
        look('object-add', {'qom-type': 'throttle-group', 'id': 'qpull-throttle'})
        look('object-add', {'qom-type': 'rng-builtin', 'id': 'objrng0'})
        look('object-add', {'qom-type': 'secret', 'id': 'libvirt-1-format-encryption-secret0', 'data': 'theirs'})
        # a job that is ready and never completed
        look('blockdev-add', {'driver': 'null-co', 'node-name': 'libvirt-9-format', 'size': MIB, 'read-zeroes': True})
        look('blockdev-add', {'driver': 'null-co', 'node-name': 'libvirt-10-format', 'size': MIB})
        look('blockdev-mirror', {'job-id': 'copy-vdz-libvirt-9-format', 'device': 'libvirt-9-format',
                                 'target': 'libvirt-10-format', 'sync': 'full'})
        look.wait_event('BLOCK_JOB_READY')
        # descriptors: in use, and not; with a tag, and without
        self.add_fd(f'{self.folder}/used', **{'fdset-id': 77, 'opaque': 'libvirt-7-storage0'})
        self.add_fd(f'{self.folder}/idle', opaque='qpull-0123abcd-theirs0')
        self.add_fd(f'{self.folder}/plain')
        look('blockdev-add', {'driver': 'file', 'node-name': 'libvirt-7-storage', 'filename': '/dev/fdset/77',
                              'locking': 'off'})

    def picture(self):
        """One line for each thing."""
        lines = []
        for what, things in self.vm.state().items():
            if isinstance(things, dict):
                lines += [f'{what} {name} {json.dumps(thing, sort_keys=True)}' for name, thing in things.items()]
            else:
                lines += [f'{what} {thing}' for thing in (things if isinstance(things, list) else [things])]
        for s in self.look('query-fdsets'):
            lines += [f'fdset {s["fdset-id"]}: {fd.get("opaque")}' for fd in s['fds']]
        lines += [f'object {o["name"]} {o["type"]}' for o in self.look('qom-list', {'path': '/objects'})]
        return sorted(lines)

    def settle(self, daemon):
        """The successor is ready, and what its predecessor may have kept is gone."""
        daemon.start()
        daemon.wait_idle()
        if any(name == 'new' for _, name in harness.bitmaps(self.look)):
            daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'new'})

    def start_server_of_theirs(self):
        """Somebody else uses QEMU's NBD server as soon as it is free; False: ours runs."""
        try:
            self.look('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': f'{self.folder}/theirs'}}})
        except harness.QmpError:
            return False
        self.look('block-export-add', {'type': 'nbd', 'id': 'libvirt-export', 'node-name': 'libvirt-2-format',
                                       'name': 'virtio-disk1'})
        return True

    def stop_server_of_theirs(self):
        self.look('block-export-del', {'id': 'libvirt-export'})
        self.look.wait_event('BLOCK_EXPORT_DELETED', where=lambda data: data['id'] == 'libvirt-export')
        self.look('nbd-server-stop')

    def count_commands(self, daemon):
        self.proxy.at(COMMANDS_MAX)
        rawnbd.pull_a_little(daemon.socket, 'vm/virtio-disk0@new', f'qemu:dirty-bitmap:{RECORD}')
        daemon.wait_idle()
        count = len(self.proxy.commands)
        self.proxy.off()
        return count

    def strike_at(self, daemon, number):
        """kill -9 at that command of a session; whether it struck, and at which."""
        struck = threading.Event()

        def strike():
            daemon.kill()
            struck.set()
            return False
        self.proxy.at(number, **{'before' if number % 2 else 'after': strike})
        rawnbd.pull_a_little(daemon.socket, 'vm/virtio-disk0@new', f'qemu:dirty-bitmap:{RECORD}')
        if not struck.is_set():
            try:
                daemon.wait_idle()
            except (ConnectionError, FileNotFoundError):  # the blow came meanwhile
                struck.wait(10)
        command = self.proxy.commands[-1]
        self.proxy.off()
        daemon.kill()
        return struck.is_set(), command

    def test_what_others_have_in_qemu_stays_line_by_line_wherever_the_daemon_is_killed(self):
        daemon = self.qpulld({'vm': self.proxy}, linger=0)
        daemon.wait_idle()
        self.assertEqual(self.picture(), self.before, 'a daemon that looks')
        count = self.count_commands(daemon)  # a new daemon tests QEMU in its first session, so this is the most
        daemon.kill()
        self.settle(daemon)
        self.assertEqual(self.picture(), self.before, 'a session that ended well')
        struck, theirs = [], 0
        for i in range(BLOWS):
            number = count * i // BLOWS + harness.rng.randrange(count // BLOWS)
            hit, command = self.strike_at(daemon, number)
            struck += [command] * hit
            is_theirs = self.start_server_of_theirs()
            theirs += is_theirs
            self.settle(daemon)
            if is_theirs:
                self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/virtio-disk0'), '(?i)nbd server')
                daemon.wait_idle()
                size = harness.run(['nbdinfo', '--size', nbdpull.unix_uri(f'{self.folder}/theirs', 'virtio-disk1')])
                self.assertEqual(int(size.stdout), 8 * MIB)
                self.stop_server_of_theirs()
            self.assertEqual(self.picture(), self.before, f'killed at command {number}, {command}')
            self.assertEqual(self.vm.deleted_fds(), [])
            self.assertEqual(daemon.files_left(), [])
        print(f'{len(struck)} blows of {BLOWS}, at {sorted(set(struck))}; {theirs} times a server of others was there '
              'before the successor', flush=True)
        self.assertGreater(len(struck), BLOWS // 2)
        self.assertGreater(theirs, 0)
        data = nbdpull.pull(daemon.uri('vm/virtio-disk0'))
        daemon.wait_idle()
        self.assertModel(self.vm.disks['virtio-disk0'].model, data, 'the last pull')
        self.assertEqual(self.picture(), self.before, 'in the end')
        daemon.stop()
        self.look('block-job-cancel', {'device': 'copy-vdz-libvirt-9-format', 'force': True})


if __name__ == '__main__':
    harness.main()
