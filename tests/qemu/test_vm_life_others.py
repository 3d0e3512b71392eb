#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What others do to a VM in the middle of a session: each either works as if there were no session, or is refused by QEMU; the
frozen view stays what it was, the guest sees no error, and QEMU is left as the others made it."""
import os

import harness
import nbdpull
import vmlife
from harness import MIB, Disk
from vmlife import DISCARDED, LEGACY


class Others(vmlife.Case):
    def guest_discards(self):
        used = os.stat(self.disks[0].path).st_blocks * 512
        self.vm.discard('vda', *DISCARDED)
        self.vm.flush('vda')
        freed = used - os.stat(self.disks[0].path).st_blocks * 512
        self.assertGreater(freed, DISCARDED[1] * 3 // 4, 'what the image gave back')

    def resize(self):
        for arguments in ({'device': 'old'}, {'node-name': 'node-vda'}, {'node-name': self.filter_of('vda')}):
            for size in (4 * MIB, 64 * MIB):
                self.refused('in use|is busy|Permission conflict', 'block_resize', {**arguments, 'size': size})
        self.assertEqual(int(self.vm.cmd('size vdo')), LEGACY)

    def filter_of(self, name):
        return next(e[2] for e in harness.graph_edges(self.vm.look) if e[0].startswith(f'/machine/peripheral/{name}/'))

    def snapshot_by_device_name(self):
        path = f'{self.folder}/wrong.qcow2'
        self.refused('backing hd of .qpull-', 'blockdev-snapshot-sync',
                     {'device': 'old', 'snapshot-file': path, 'format': 'qcow2'})
        self.refused('root block node|backing hd', 'blockdev-snapshot-internal-sync', {'device': 'old', 'name': 'x'})
        self.assertRegex(self.hmp('savevm x'), 'does not support (snapshots|live migration)')

    def snapshot_by_node_name(self):
        self.image('over', self.disks[0].size)
        self.tool('blockdev-snapshot', {'node': 'node-vda', 'overlay': 'over'})
        self.vm.write('vda', 5 * MIB, MIB, 9)
        self.refused('root block node', 'block-commit', {'job-id': 'back', 'device': 'over'})

    def jobs(self):
        self.image('copy', LEGACY)
        self.refused('root block node', 'blockdev-mirror',
                     {'job-id': 'job', 'device': 'old', 'target': 'copy', 'sync': 'full'})
        self.tool('blockdev-backup', {'job-id': 'job', 'device': 'old', 'target': 'copy', 'sync': 'full'})
        self.tool.wait_event('BLOCK_JOB_COMPLETED')
        self.tool('blockdev-del', {'node-name': 'copy'})

    def other_devices(self):
        path = self.image('cd', 4 * MIB, fmt='raw', add=False)
        self.tool('blockdev-change-medium', {'id': 'cd0', 'filename': path, 'format': 'raw'})
        self.tool('eject', {'id': 'cd0', 'force': True})
        self.image('node-vdn', 8 * MIB)
        self.tool('device_add', {'driver': 'virtio-blk-pci', 'id': 'vdn', 'drive': 'node-vdn', 'serial': 'vdn'})
        self.vm.disks['vdn'] = new = Disk('vdn', 8 * MIB)
        new.model = harness.model.Model(harness.library(), new.size)
        self.vm.write('vdn', 0, MIB, 11)
        with self.assertRaises(nbdpull.nbd.Error):
            nbdpull.connect(self.daemon.uri('vm/vdn@new'))
        self.assertIn("VM 'vm' had no disk 'vdn' when session", self.daemon.log())

    def stop_and_go(self):
        self.tool('stop')
        self.pulls['vdb'].pread(4096, 0)
        self.tool('cont')
        self.refused('not in suspended state', 'system_wakeup', None)

    def migrate(self):
        self.refused('qcow.*does not support live migration', 'migrate', {'uri': 'exec:cat > /dev/null'})

    def reset(self):
        self.tool('system_reset')
        self.vm.wait_ready(180)

    def test_what_others_do_in_a_session_works_or_is_refused(self):
        self.begin()
        load = self.vm.load('vdo', pause_us=2000, **{'from': LEGACY // 2, 'size': LEGACY // 4})
        for deed in (self.guest_discards, self.resize, self.snapshot_by_device_name, self.snapshot_by_node_name, self.jobs,
                     self.other_devices, self.stop_and_go, self.migrate):
            with self.subTest(deed.__name__):
                deed()
                self.check_alive()
                self.vm.write('vdb', 6 * MIB, MIB, 12)
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertGreater(result['ops'], 10)
        self.reset()
        self.check_alive()
        self.check_frozen()
        self.end()
        self.assertEqual(self.new_checkpoints(), {'vda': True, 'vdb': True, 'vdo': True})
        roots = {d.get('qdev'): d['inserted']['node-name'] for d in self.vm.look('query-block') if 'inserted' in d}
        self.assertEqual([roots[f'/machine/peripheral/{name}/virtio-backend'] for name in ('vda', 'vdb')],
                         ['over', 'node-vdb'])
        self.assertFalse([n for n in self.vm.state()['nodes'] if n.startswith('qpull-')])
        self.increments()
        # What was refused works now.
        self.tool('block_resize', {'device': 'old', 'size': 2 * LEGACY})
        self.tool('block-commit', {'job-id': 'back', 'device': 'over'})
        self.tool.wait_event('BLOCK_JOB_READY')
        self.tool('block-job-complete', {'device': 'back'})
        self.tool.wait_event('BLOCK_JOB_COMPLETED')
        self.vm.check()
        self.daemon.stop()

    def increments(self):
        context = nbdpull.dirty_context('new')
        for name in ('vda', 'vdb', 'vdo'):
            h = nbdpull.connect(self.daemon.uri(f'vm/{name}'), [context])
            truth = nbdpull.read_all(h)
            self.assertModel(self.vm.disks[name].model, truth, name)
            data = nbdpull.read_ranges(h, nbdpull.ranges_with(nbdpull.read_map(h, context)), bytearray(self.frozen[name]))
            self.assertSame(data, truth, f'the increment of {name}')
            h.shutdown()
        self.daemon.wait_idle()

    def test_a_disk_that_is_unplugged_is_pulled_to_its_end(self):
        self.begin()
        for name in ('vdb', 'vdo'):
            self.tool('device_del', {'id': name})
            self.tool.wait_event('DEVICE_DELETED', timeout=120,
                                 where=lambda data, name=name: data.get('device') == name)
        self.refused('in use|busy', 'blockdev-del', {'node-name': 'node-vdb'})
        self.check_alive()
        self.vm.write('vda', 6 * MIB, MIB, 12)
        self.check_frozen()
        for h in self.pulls.values():
            h.shutdown()
        self.daemon.wait_idle()
        last = self.daemon.vm()['last-session']
        self.assertIsNone(last['failure'])
        self.assertRegex(last['problems'], "checkpoint 'new' of disk 'vd[bo]' is not kept: the device is gone")
        for name in ('vdb', 'vdo'):
            self.assertIn(f'disk {name} was unplugged; session {last["id"]} goes on with what was frozen of it, '
                          'checkpoint new is not kept on it', self.daemon.log())
        self.assertEqual(self.new_checkpoints(), {'vda': True})
        self.assertEqual(set(harness.bitmaps(self.vm.look)), {('node-vda', 'new')})
        self.assertFalse([n for n in self.vm.state()['nodes'] if n.startswith('qpull-')])
        self.assertEqual(self.vm.deleted_fds(), [])
        self.tool('blockdev-del', {'node-name': 'node-vdb'})
        self.vm.check()
        self.daemon.stop()

    def test_another_disk_under_the_id_of_an_unplugged_one_gets_no_checkpoint(self):
        self.vm = self.bare(Disk('sda', 8 * MIB, bus='virtio-scsi'), extra=['-device', 'virtio-scsi-pci'])
        self.tool = self.vm.look
        self.vm.write('sda', 0, 4 * MIB, 7)
        self.daemon = self.qpulld(self.vm, linger=0)
        pull = nbdpull.connect(self.daemon.uri('vm/sda@new'))
        frozen = nbdpull.read_all(pull)
        self.tool('device_del', {'id': 'sda'})
        self.tool.wait_event('DEVICE_DELETED', timeout=60)
        self.image('other', 8 * MIB)
        self.tool('device_add', {'driver': 'scsi-hd', 'id': 'sda', 'drive': 'other'})
        self.vm.write('sda', 5 * MIB, MIB, 9)
        self.assertSame(nbdpull.read_all(pull), frozen, 'the frozen disk')
        pull.shutdown()
        self.daemon.wait_idle()
        self.assertEqual(self.daemon.vm()['last-session']['problems'],
                         "checkpoint 'new' of disk 'sda' is not kept: the device has another image by now")
        self.assertEqual(self.new_checkpoints(), {})
        self.assertEqual(set(harness.bitmaps(self.vm.look)), set())
        self.assertFalse([n for n in self.vm.state()['nodes'] if n.startswith('qpull-')])
        self.daemon.stop()


if __name__ == '__main__':
    harness.main()
