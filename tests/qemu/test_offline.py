#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 400
"""A VM that is powered off: its images are pulled, in full and what changed; checkpoints are made and deleted there; and
the guest goes on with all of them."""
import hashlib
import os
import stat
import subprocess

import harness
import nbdpull
import qmpclient
from harness import MIB, Disk
from offline import OfflineCase, content, io, records, storage_daemons
from truth import SECTOR, own_copy, random_work, replay, settle


class Offline(OfflineCase):
    def test_a_chain_goes_on_while_the_guest_is_off_and_when_it_is_on_again(self):
        disk = Disk('vda', 24 * MIB + 5 * SECTOR)
        guest = self.guest(disk, Disk('vdb', 8 * MIB + SECTOR, fmt='raw'))
        flags = [f'--image=vm/vda={disk.path}', f'--image=vm/vdb={guest.disks["vdb"].path}']
        daemon = self.qpulld(guest, linger=0, flags=flags)
        images = {}

        def back_up(name, expected, online):
            h = nbdpull.connect(daemon.uri(f'vm/vda@{name}'), [nbdpull.dirty_context(n) for n in images])
            full = nbdpull.connect(daemon.uri(f'vm/vda@{name}'))
            self.assertSame(nbdpull.read_all(full), expected, f'the full at {name}')
            skipped = 0
            for n in images:
                restored, extents = replay(h, n, images[n])
                self.assertSame(restored, expected, f'{name} over {n}')
                skipped += sum(length for _, length, flag in extents if not flag & nbdpull.DIRTY)
            if images:
                self.assertGreater(skipped, 0)
            images[name] = bytes(expected)
            h.shutdown()
            full.shutdown()
            if online:
                settle(guest)
            else:
                self.wait_closed(daemon)

        random_work(guest, 'vda', 40)
        for turn in range(3):
            back_up(f'on{turn}', own_copy(guest, 'vda'), online=True)
            random_work(guest, 'vda', 12)
            guest.write('vdb', turn * MIB, 3 * MIB, turn + 1)
            guest.poweroff()
            off = self.raw(disk)
            self.assertModel(disk.model, off, 'the image')
            harness.wait_until(lambda: daemon.vm()['powered-off'], 10, 'the images\' turn')
            back_up(f'off{turn}', off, online=False)
            self.assertModel(guest.disks['vdb'].model, nbdpull.pull(daemon.uri('vm/vdb')), 'the raw disk')
            self.wait_closed(daemon)
            back_up(f'off{turn}b', off, online=False)  # nothing has changed since the one before
            self.assertEqual(records(disk.path), {n: {'auto'} for n in images})
            self.check(disk.path)
            guest.start()
            daemon.wait_idle()
            random_work(guest, 'vda', 10)
            self.assertEqual(self.offered(daemon), set(images))
        back_up('last', own_copy(guest, 'vda'), online=True)
        guest.check()
        daemon.stop()

    def test_an_image_that_the_vm_has_left_behind_is_not_served(self):
        """It still names its old backing file, which has gone on without it: a disk that never was."""
        disk = Disk('vda', 24 * MIB)
        guest = self.guest(disk)
        top = f'{self.folder}/top.qcow2'
        daemon = self.qpulld(guest, linger=0, flags=[f'--image=vm/vda={top}'])
        guest.write('vda', 0, 2 * MIB, 1)
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', disk.path, '-F', 'qcow2', top])
        guest.look('blockdev-add', {'driver': 'qcow2', 'node-name': 'top', 'backing': None,
                                    'file': {'driver': 'file', 'filename': top}})
        guest.look('blockdev-snapshot', {'node': disk.node, 'overlay': 'top'})
        guest.write('vda', MIB, 2 * MIB, 2)
        daemon.qpull('commit', 'vm/vda', '--active')
        guest.write('vda', 3 * MIB // 2, 2 * MIB, 3)
        guest.poweroff()
        for _ in range(2):
            harness.wait_until(lambda: daemon.vm()['powered-off'], 10, 'the images\' turn')
            with self.assertRaisesRegex(qmpclient.QmpError, f"'{top}' is not disk 'vda' any more.*into '{disk.path}'"):
                daemon.ask('query-checkpoints', {'vm': 'vm'})
            with self.assertRaises(nbdpull.nbd.Error):
                nbdpull.connect(daemon.uri('vm/vda'))
            daemon.kill()  # the memory is on disk
            daemon.start()
        daemon.stop()
        named = self.qpulld(guest, linger=0, flags=[f'--image=vm/vda={disk.path}'], name='named')
        harness.wait_until(lambda: named.vm()['powered-off'], 10, 'the images\' turn')
        self.assertModel(disk.model, nbdpull.pull(named.uri('vm/vda')), 'the image that the VM ran on')
        named.stop()

    def test_what_changed_since_a_checkpoint_made_offline_is_exactly_what_is_written(self):
        path = f'{self.folder}/a.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, str(8 * MIB + SECTOR)])
        io(path, 'write -P 1 0 2M')
        daemon = self.serve({'vda': path})
        former = nbdpull.pull(daemon.uri('vm/vda@monday'))
        self.wait_closed(daemon)
        io(path, 'write -P 2 1M 64k', 'write -P 3 8M 512', 'discard 0 64k')
        h = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.dirty_context('monday')])
        restored, extents = replay(h, 'monday', former)
        self.assertEqual(nbdpull.ranges_with(extents), [(0, 65536), (MIB, 65536), (8 * MIB, SECTOR)])
        self.assertSame(restored, content(path, share=True))
        # One more map, asked while the session is up.
        late = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.dirty_context('monday')])
        self.assertEqual(nbdpull.read_map(late, nbdpull.dirty_context('monday')), extents)
        late.shutdown()
        h.shutdown()
        self.wait_closed(daemon)
        daemon.stop()

    def test_a_map_that_nobody_asked_for_at_first_is_read_later(self):
        path = f'{self.folder}/a.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '4M'])
        harness.run(['qemu-img', 'bitmap', '--add', path, 'monday'])
        io(path, 'write -P 2 1M 64k')
        daemon = self.serve({'vda': path})
        first = nbdpull.connect(daemon.uri('vm/vda'))
        h = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.dirty_context('monday')])
        extents = nbdpull.read_map(h, nbdpull.dirty_context('monday'))
        self.assertEqual(nbdpull.ranges_with(extents), [(MIB, 65536)])
        h.shutdown()
        first.shutdown()
        self.wait_closed(daemon)
        daemon.stop()

    def test_a_pull_changes_no_byte_of_any_file(self):
        base, top = f'{self.folder}/base.qcow2', f'{self.folder}/top.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', base, '8M'])
        io(base, 'write -P 1 0 3M')
        harness.run(['qemu-img', 'bitmap', '--add', base, 'monday'])
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', top])
        io(top, 'write -P 2 1M 1M')
        before = [self.digest(p) for p in (base, top)]
        daemon = self.serve({'vda': top})
        h = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.dirty_context('monday'), nbdpull.DEPTH])
        self.assertSame(nbdpull.read_all(h), content(top, share=True))
        depths = {flags for _, _, flags in nbdpull.read_map(h, nbdpull.DEPTH)}
        self.assertEqual(depths, {0, 1, 2})
        # The overlay has no record: what it has allocated is what changed.
        self.assertEqual(nbdpull.ranges_with(nbdpull.read_map(h, nbdpull.dirty_context('monday'))), [(MIB, MIB)])
        nbdpull.drop(h)
        self.wait_closed(daemon)
        self.assertEqual([self.digest(p) for p in (base, top)], before)
        daemon.stop()

    @staticmethod
    def digest(path):
        with open(path, 'rb') as f:
            return hashlib.sha256(f.read()).hexdigest()

    def test_images_of_all_kinds_are_read_right(self):
        kinds = {
            'odd': ('qcow2', [], 5 * MIB + 3 * SECTOR),
            'small': ('qcow2', ['-o', 'cluster_size=512'], MIB + SECTOR),
            'big': ('qcow2', ['-o', 'cluster_size=2M'], 5 * MIB + SECTOR),
            'old': ('qcow2', ['-o', 'compat=0.10'], 2 * MIB),
            'extended': ('qcow2', ['-o', 'extended_l2=on'], 3 * MIB),
            'data': ('qcow2', ['-o', f'data_file={self.folder}/data.file'], 4 * MIB),
            'rawdata': ('qcow2', ['-o', f'data_file={self.folder}/raw.file,data_file_raw=on'], 4 * MIB),
            'raw': ('raw', [], 3 * MIB + SECTOR),
            'vmdk': ('vmdk', [], 2 * MIB),
            'vdi': ('vdi', [], 2 * MIB),
        }
        images = {}
        for name, (fmt, options, size) in kinds.items():
            images[name] = f'{self.folder}/{name}.{fmt}'
            harness.run(['qemu-img', 'create', '-q', '-f', fmt, *options, images[name], str(size)])
            io(images[name], 'write -P 5 64k 512k', 'write -z 128k 64k', f'write -P 6 {size - SECTOR} 512', fmt=fmt)
        self.assertTrue(os.path.getsize(f'{self.folder}/data.file') > 0)
        with open(f'{self.folder}/ragged.raw', 'wb') as f:  # QEMU fills the last sector up
            f.write(b'\7' * 100001)
        daemon = self.serve({**images, 'ragged': f'{self.folder}/ragged.raw'})
        self.assertEqual(len(harness.run(['nbdinfo', '--list', daemon.uri('')]).stdout.split('export=')) - 1, 11)
        for name, path in images.items():
            expected = content(path, kinds[name][0], share=True)
            self.assertSame(nbdpull.pull(daemon.uri(f'vm/{name}')), expected, name)
            out = f'{self.folder}/copied'
            harness.run(['nbdcopy', daemon.uri(f'vm/{name}'), out])
            with open(out, 'rb') as f:
                self.assertSame(f.read(), expected, f'{name} by nbdcopy')
        self.assertEqual(nbdpull.pull(daemon.uri('vm/ragged')), b'\7' * 100001 + bytes(100352 - 100001))
        tracked = {d['name'] for d in daemon.ask('query-disks', {'vm': 'vm'}) if d['tracked']}
        self.assertEqual(tracked, {'odd', 'small', 'big', 'extended', 'data', 'rawdata'})
        self.wait_closed(daemon)
        # All disks that can keep a checkpoint get it; none of them loses another's.
        self.assertEqual(daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'all'}), {'records': 6})
        with self.assertRaisesRegex(qmpclient.QmpError, 'raw'):
            daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'x', 'disk': 'raw'})
        self.wait_closed(daemon)
        for name in images:
            self.assertEqual(records(images[name]), {'all': {'auto'}} if name in tracked else {}, name)
            if kinds[name][0] == 'qcow2':
                self.check(images[name])
        daemon.stop()

    def test_checkpoints_are_made_told_and_deleted_by_the_usual_tool(self):
        one, two = (f'{self.folder}/{n}.qcow2' for n in 'ab')
        for path in (one, two):
            harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '4M'])
        daemon = self.serve({'vda': one, 'vdb': two})
        self.assertIn('powered off', daemon.qpull('vms').stdout)
        daemon.qpull('checkpoint', 'create', 'vm', 'monday')
        daemon.qpull('checkpoint', 'create', 'vm', 'tuesday', '--disk', 'vda')
        self.assertEqual(daemon.qpull('checkpoint', 'create', 'vm', 'monday', check=False).returncode, 1)
        self.wait_closed(daemon)
        self.assertEqual([set(records(p)) for p in (one, two)], [{'monday', 'tuesday'}, {'monday'}])
        self.assertEqual(self.reasons(daemon),
                         {('vda', 'monday'): 'NONE', ('vda', 'tuesday'): 'NONE', ('vdb', 'monday'): 'NONE'})
        # Right after a pull: its session makes way.
        nbdpull.pull(daemon.uri('vm/vda'))
        daemon.qpull('checkpoint', 'delete', 'vm', 'monday')
        self.wait_closed(daemon)
        self.assertEqual([set(records(p)) for p in (one, two)], [{'tuesday'}, set()])
        # While somebody reads: not now, and in words.
        h = nbdpull.connect(daemon.uri('vm/vda'))
        refused = daemon.qpull('checkpoint', 'delete', 'vm', 'tuesday', check=False)
        self.assertEqual(refused.returncode, 1)
        self.assertRegex(refused.stderr, 'in use by a session')
        h.shutdown()
        daemon.qpull('checkpoint', 'delete', 'vm', 'tuesday')
        self.wait_closed(daemon)
        self.assertEqual(records(one), {})
        daemon.stop()

    def test_only_a_pull_that_ended_well_leaves_its_checkpoint(self):
        path = f'{self.folder}/a.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '4M'])
        daemon = self.serve({'vda': path})
        h = nbdpull.connect(daemon.uri('vm/vda@never'))
        h.pread(MIB, 0)
        nbdpull.drop(h)
        self.wait_closed(daemon)
        self.assertEqual(records(path), {})
        nbdpull.pull(daemon.uri('vm/vda@monday'))
        self.wait_closed(daemon)
        self.assertEqual(records(path), {'monday': {'auto'}})
        self.assertIsNone(daemon.vm()['last-session']['problems'])
        daemon.stop()

    def test_the_sockets_are_for_their_owner_only_and_go_with_the_process(self):
        path = f'{self.folder}/a.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '4M'])
        daemon = self.serve({'vda': path})
        h = nbdpull.connect(daemon.uri('vm/vda'))
        sockets = [f'{daemon.state}/{name}' for name in os.listdir(daemon.state) if name != 'locks']
        self.assertEqual(len(sockets), 2)
        for name in sockets:
            self.assertTrue(stat.S_ISSOCK(os.stat(name).st_mode))
            self.assertEqual(stat.S_IMODE(os.stat(name).st_mode), 0o600)
        self.assertEqual(len(storage_daemons(daemon)), 1)
        h.shutdown()
        self.wait_closed(daemon)
        daemon.stop()

    def test_what_cannot_be_served_is_said_in_words_and_hurts_nobody(self):
        good = f'{self.folder}/good.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', good, '4M'])
        overlay = f'{self.folder}/overlay.img'  # what a guest could have written into its raw disk
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', good, '-F', 'qcow2', overlay])
        secret, extents = f'{self.folder}/secret', f'{self.folder}/extents.img'
        with open(secret, 'wb') as f:
            f.write(bytes([7]) * MIB)
        with open(extents, 'wb') as f:  # likewise
            f.write(b'# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
                    + f'RW 2048 FLAT "{secret}" 0\n'.encode())
            f.truncate(MIB)
        with open(f'{self.folder}/raw.qcow2', 'wb') as f:
            f.truncate(MIB)
        with open(f'{self.folder}/broken.qcow2', 'wb') as f:
            f.write(b'QFI\xfb' + b'\xff' * 1020)
        with open(f'{self.folder}/luks', 'wb') as f:
            f.write(b'LUKS\xba\xbe' + bytes(1018))
        os.mkfifo(f'{self.folder}/fifo')
        rows = {
            f'{self.folder}/missing.qcow2': 'missing.qcow2.*No such file',
            self.folder: 'neither a file nor a block device',
            f'{self.folder}/fifo': 'neither a file nor a block device',
            f'{self.folder}/raw.qcow2': 'not in qcow2 format.*raw:',
            f'{self.folder}/broken.qcow2': 'broken.qcow2.*vda',
            f'{self.folder}/luks': 'LUKS.*raw:',
            f'qcow2:{self.folder}/luks': 'luks.*not in qcow2 format',
            overlay: 'over another file.*qcow2:',
            extents: 'looks like VMDK over another file.*vmdk:',
        }
        for n, (path, words) in enumerate(rows.items()):
            daemon = self.serve({'vda': path, 'vdb': good}, name=f'q{n}')
            told = daemon.qpull('disks', 'vm', check=False)
            self.assertEqual(told.returncode, 1, path)
            self.assertRegex(told.stderr, words)
            self.assertRegex(daemon.qpull('vms').stdout, words)
            self.wait_closed(daemon)
            daemon.stop()
        for path in (overlay, f'{self.folder}/raw.qcow2'):  # said so, they are served
            daemon = self.serve({'vda': f'{"raw" if "raw" in path[-9:] else "qcow2"}:{path}'}, name=f'ok{path[-6:]}')
            nbdpull.pull(daemon.uri('vm/vda'))
            daemon.stop()
        daemon = self.serve({'vda': f'raw:{extents}'}, name='extents')
        with open(extents, 'rb') as f:
            self.assertEqual(bytes(nbdpull.pull(daemon.uri('vm/vda'))), f.read())
        daemon.stop()

    def test_a_storage_daemon_that_is_missing_or_of_no_use_is_told(self):
        path = f'{self.folder}/a.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '4M'])
        crying = f'{self.folder}/crying'
        with open(crying, 'w', encoding='utf-8') as f:
            f.write('#!/bin/sh\necho "I cannot\tgo on" >&2\nexit 3\n')
        os.chmod(crying, 0o755)
        rows = {
            '/nowhere/qsd': "no program '/nowhere/qsd'.*qemu-system-common",
            'no-such-program': "'no-such-program' is not in PATH.*--storage-daemon",
            '/bin/true': 'ended with status 0',
            crying: r'ended with status 3; its last words: I cannot\?go on',
        }
        for n, (program, words) in enumerate(rows.items()):
            daemon = self.serve({'vda': path}, flags=[f'--storage-daemon={program}'], name=f'q{n}')
            told = daemon.qpull('disks', 'vm', check=False)
            self.assertEqual(told.returncode, 1, program)
            self.assertRegex(told.stderr, words)
            self.wait_closed(daemon)
            daemon.stop()
        with open(f'{self.folder}/q3.log', encoding='utf-8') as f:
            self.assertEqual(f.read().count('qemu-storage-daemon says: I cannot'), 1)

    def test_many_clients_at_once_and_none_after_all(self):
        paths = {f'd{i}': f'{self.folder}/{i}.qcow2' for i in range(6)}
        for path in paths.values():
            harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '4M'])
            io(path, f'write -P {len(path) % 200} 0 4M')
        daemon = self.serve(paths)
        copies = [subprocess.Popen(['nbdcopy', daemon.uri(f'vm/{d}@eve'), f'{self.folder}/{d}.out']) for d in paths]
        self.assertEqual([c.wait(60) for c in copies], [0] * 6)
        self.wait_closed(daemon)
        for d, path in paths.items():
            with open(f'{self.folder}/{d}.out', 'rb') as f:
                self.assertSame(f.read(), content(path))
            self.assertEqual(records(path), {'eve': {'auto'}})
        daemon.stop()


if __name__ == '__main__':
    harness.main()
