#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What others do to a disk while qpulld is connected, and while it is not: an incremental afterwards is right, or it is
refused with a reason. Never is a byte wrong."""
import os
import shutil

import harness
import nbd
import nbdpull
from harness import MIB, Disk, wait_until
from qmpclient import QmpError, bitmaps
from truth import SECTOR, own_copy, replay, settle

NEVER = 'NO_SUCH_CHECKPOINT'
SLOW = 65536  # bytes a second: a job that does not end by itself before the test goes on


class ByOthers(harness.Case):
    """A QEMU without a guest; writes go through its device. .images: what a client has of each checkpoint."""

    def setUp(self):
        self.disk = Disk('vda', 8 * MIB)
        self.vm = self.bare(self.disk)
        self.daemon = self.qpulld(self.vm, linger=0)
        self.images, self.nlayers = {}, 0
        self.write(0, MIB)

    def write(self, offset, length, byte=None):
        self.vm.write('vda', offset, length, byte or harness.rng.randrange(1, 255))

    def some(self, n=3):
        for _ in range(n):
            self.write(harness.rng.randrange(self.disk.size // SECTOR - 256) * SECTOR,
                       harness.rng.choice((512, 4096, 65536, 131072)))

    def checkpoint(self, name):
        """Made by the daemon at once; the client has the disk of that instant."""
        self.daemon.ask('checkpoint-create', {'vm': 'vm', 'name': name})
        self.images[name] = bytes(own_copy(self.vm, 'vda'))
        self.look()

    def look(self):
        """{checkpoint: reason}. The daemon has seen everything that was done before."""
        return {c['name']: c['reason'] for c in self.daemon.ask('query-checkpoints', {'vm': 'vm', 'disk': 'vda'})}

    def check(self, **expected):
        """Every checkpoint is right, or refused with the reason that is expected; without one: it must be right."""
        reasons = {name: r for name, r in self.look().items() if name in self.images}
        for name in self.images:
            self.assertEqual(reasons.get(name, NEVER), expected.get(name, 'NONE'), name)
        usable = [name for name, reason in reasons.items() if reason == 'NONE']
        offered = {c.split(':', 2)[2] for c in nbdpull.list_contexts(self.daemon.uri('vm/vda'), ['qemu:dirty-bitmap:'])}
        self.assertEqual(offered & set(self.images), set(usable))
        expected_disk = own_copy(self.vm, 'vda')
        h = nbdpull.connect(self.daemon.uri('vm/vda'), map(nbdpull.dirty_context, usable))
        truth, changed = nbdpull.read_all(h), {}
        self.assertSame(truth, expected_disk, 'the full')
        for name in usable:
            former = self.images[name]
            former = former[:len(truth)] + bytes(max(0, len(truth) - len(former)))
            restored, extents = replay(h, name, former)
            self.assertSame(restored, truth, f'since {name}')
            changed[name] = sum(length for _, length in nbdpull.ranges_with(extents))
        h.shutdown()
        settle(self.vm)
        self.daemon.wait_idle()
        return changed

    def snapshot(self, names=()):
        """An external snapshot by another tool; bitmaps of these names are made in the same transaction."""
        self.nlayers += 1
        path, node = f'{self.folder}/layer{self.nlayers}.qcow2', f'layer-{self.nlayers}'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, str(self.disk.size)])
        self.vm.look('blockdev-add', {'driver': 'qcow2', 'node-name': node, 'backing': None,
                                      'file': {'driver': 'file', 'filename': path}})
        actions = [{'type': 'blockdev-snapshot', 'data': {'node': self.disk.node, 'overlay': node}}]
        actions += [{'type': 'block-dirty-bitmap-add', 'data': {'node': node, 'name': name, 'persistent': True}}
                    for name in names]
        self.vm.look('transaction', {'actions': actions})
        below, self.disk.node = self.disk.node, node
        return below

    def away(self):
        """The daemon is stopped; back() starts it."""
        self.daemon.wait_idle()
        self.daemon.stop()

    def back(self):
        self.daemon.start()
        self.daemon.wait_idle()

    def restart_on(self, path, backing=None):
        """QEMU is ended cleanly and comes again on another image."""
        if backing:
            harness.run(['qemu-img', 'rebase', '-u', '-F', 'qcow2', '-b', backing, path])
        self.disk.path, self.disk.node = path, 'node-vda'
        self.vm.start()

    def carried(self, n=1):
        """Records have been carried over by the daemon."""
        wait_until(lambda: self.daemon.log().count('was carried over') >= n, 20, 'the carrying')
        self.daemon.wait_idle()

    def let_end(self):
        """The slow job."""
        self.vm.look('block-job-set-speed', {'device': 'j', 'speed': 0})
        self.vm.look.wait_event('BLOCK_JOB_COMPLETED', 60)


class Connected(ByOthers):
    def test_a_layer_that_is_streamed_away_leaves_its_record(self):
        self.checkpoint('c1')
        self.some()
        self.snapshot(['c1'])
        self.some()
        self.checkpoint('c2')
        self.vm.look('block-stream', {'device': self.disk.node, 'job-id': 'j', 'speed': SLOW})
        self.carried()
        self.some()
        self.let_end()
        self.some()
        self.check()
        self.away()
        self.back()
        self.check()
        self.daemon.stop()

    def test_a_layer_that_is_streamed_away_into_one_without_record_is_told(self):
        self.checkpoint('c1')
        self.some()
        self.snapshot([])
        self.some()
        self.checkpoint('c2')
        self.vm.look('block-stream', {'device': self.disk.node, 'job-id': 'j', 'speed': 2 * MIB})
        self.vm.look.wait_event('BLOCK_JOB_COMPLETED', 60)
        self.check(c1=NEVER)
        self.daemon.stop()

    def test_a_mirror_takes_the_records_along(self):
        self.checkpoint('c1')
        self.some()
        self.checkpoint('c2')
        target = f'{self.folder}/target.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', target, str(self.disk.size)])
        self.vm.look('blockdev-add', {'driver': 'qcow2', 'node-name': 'target',
                                      'file': {'driver': 'file', 'filename': target}})
        self.vm.look('blockdev-mirror', {'job-id': 'j', 'device': self.disk.node, 'target': 'target', 'sync': 'full'})
        self.carried(2)
        self.some()
        self.vm.look('job-complete', {'id': 'j'})
        self.vm.look.wait_event('BLOCK_JOB_COMPLETED', 60)
        self.disk.node = 'target'
        self.some()
        changed = self.check()
        self.assertLess(max(changed.values()), 3 * MIB)
        self.away()
        self.vm.quit()
        self.restart_on(target)
        self.back()
        self.check()
        self.daemon.stop()

    def test_a_mirror_that_was_faster_than_we_leaves_no_record_with_holes(self):
        self.checkpoint('c1')
        target = f'{self.folder}/target.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', target, str(self.disk.size)])
        self.vm.look('blockdev-add', {'driver': 'qcow2', 'node-name': 'target',
                                      'file': {'driver': 'file', 'filename': target}})
        self.away()
        self.vm.look('blockdev-mirror', {'job-id': 'j', 'device': self.disk.node, 'target': 'target', 'sync': 'full'})
        self.vm.look.wait_event('BLOCK_JOB_READY', 60)
        self.vm.look('job-complete', {'id': 'j'})
        self.vm.look.wait_event('BLOCK_JOB_COMPLETED', 60)
        # Another tool makes a record of that name, too late.
        self.disk.node = 'target'
        self.some()
        self.vm.look('block-dirty-bitmap-add', {'node': 'target', 'name': 'c1', 'persistent': True})
        self.back()
        self.check(c1='GAP')
        self.daemon.stop()

    def commit(self, top, base):
        self.vm.look('block-commit', {'job-id': 'j', 'device': self.disk.node, 'top-node': top, 'base-node': base,
                                      'speed': SLOW})

    def test_a_layer_that_is_committed_leaves_its_record_below(self):
        self.checkpoint('c0')
        self.some()
        base = self.snapshot(['c0'])
        self.some()
        self.checkpoint('c1')
        self.write(MIB, 3 * MIB)
        middle = self.snapshot(['c0', 'c1'])
        self.some()
        self.commit(middle, base)
        self.carried()
        self.some()
        self.let_end()
        self.some()
        self.check()
        self.daemon.stop()

    def three_layers(self):
        """The path of the lowest one's image, its node, and that of the one above, with checkpoint c1 made after writes."""
        base, below = self.disk.path, self.snapshot()
        self.write(0, 7 * MIB)
        self.checkpoint('c1')
        self.some()
        middle = self.snapshot()
        self.some()
        return base, below, middle

    def test_a_base_with_half_of_what_was_committed_has_no_record_to_go_back_to(self):
        """The job is cut short, and the VM comes again on the base alone, or under a new overlay."""
        for new_overlay in (False, True):
            base, below, middle = self.three_layers()
            self.look()
            carried = self.daemon.log().count('was carried over')
            self.vm.look('block-commit', {'job-id': 'j', 'device': self.disk.node, 'top-node': middle,
                                          'base-node': below, 'speed': 1})
            self.carried(carried + 1)
            self.vm.quit()
            overlay = f'{self.folder}/again.qcow2'
            harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', base, overlay])
            self.restart_on(overlay if new_overlay else base)
            self.daemon.wait_idle()
            self.assertIn('c1', [name for _, name in bitmaps(self.vm.look)])
            self.check(c1='GAP')
            if not new_overlay:
                self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'c1'})
        self.daemon.stop()

    def test_a_base_with_all_that_was_committed_can_be_gone_back_to(self):
        base, below, middle = self.three_layers()
        self.commit(middle, below)
        self.carried()
        self.let_end()
        self.some()
        self.check()
        self.vm.quit()
        self.restart_on(base)
        self.daemon.wait_idle()
        self.check()
        self.daemon.stop()

    def test_the_top_that_is_committed_leaves_its_record_below(self):
        self.checkpoint('c0')
        self.some()
        base = self.snapshot(['c0'])
        self.some()
        self.checkpoint('c1')
        self.write(MIB, 3 * MIB)
        self.vm.look('block-commit', {'job-id': 'j', 'device': self.disk.node})
        self.carried()
        self.some()
        self.vm.look('job-complete', {'id': 'j'})
        self.vm.look.wait_event('BLOCK_JOB_COMPLETED', 60)
        self.disk.node = base
        self.some()
        self.check()
        self.daemon.stop()

    def pull_beside(self, job):
        """A pull while a job of others is at work is right, or refused in words; the job goes on."""
        try:
            usable = [name for name, reason in self.look().items() if reason == 'NONE' and name in self.images]
            h = nbdpull.connect(self.daemon.uri('vm/vda'), map(nbdpull.dirty_context, usable))
        except (nbd.Error, QmpError) as e:
            self.assertIn('try again when it has ended', str(e))
            self.refused.append(job)
        else:
            truth = nbdpull.read_all(h)
            self.assertModel(self.disk.model, truth, job)
            for name in usable:
                self.assertSame(replay(h, name, self.images[name])[0], truth, f'{job}, since {name}')
            h.shutdown()
            self.pulled.append(job)
        settle(self.vm)
        self.daemon.wait_idle()

    def test_a_pull_beside_a_job_is_right_or_refused(self):
        self.pulled, self.refused = [], []
        target = f'{self.folder}/target.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', target, str(self.disk.size)])
        self.vm.look('blockdev-add', {'driver': 'qcow2', 'node-name': 'target',
                                      'file': {'driver': 'file', 'filename': target}})
        self.checkpoint('c1')
        base = self.snapshot(['c1'])
        self.write(0, 7 * MIB)
        middle = self.snapshot(['c1'])
        self.some()
        slow = {'job-id': 'j', 'device': self.disk.node, 'speed': SLOW}
        jobs = {'block-stream': {}, 'block-commit': {'top-node': middle, 'base-node': base},
                'blockdev-mirror': {'target': 'target', 'sync': 'full'},
                'blockdev-mirror with a name': {'target': 'target', 'sync': 'full', 'filter-node-name': 'filter'}}
        for job, arguments in jobs.items():
            self.vm.look(job.split()[0], {**slow, **arguments})
            self.pull_beside(job)
            self.assertEqual([j['device'] for j in self.vm.look('query-block-jobs')], ['j'])
            self.vm.look('block-job-cancel', {'device': 'j', 'force': True})
            self.vm.look.wait_event('JOB_STATUS_CHANGE', 60, lambda d: d['status'] == 'null')
            self.some()
        self.assertEqual(len(self.pulled) + len(self.refused), len(jobs))
        print(f'(pulled beside {self.pulled}, refused beside {self.refused})', end=' ')
        self.check()
        self.daemon.stop()

    def test_a_record_that_was_disabled_for_a_while_is_refused(self):
        self.checkpoint('c1')
        self.vm.look('block-dirty-bitmap-disable', {'node': self.disk.node, 'name': 'c1'})
        self.check(c1='BUSY')
        self.some()
        self.vm.look('block-dirty-bitmap-enable', {'node': self.disk.node, 'name': 'c1'})
        self.check(c1='GAP')
        self.some()
        self.check(c1='GAP')
        self.daemon.stop()

    def test_a_record_that_was_inconsistent_and_is_right_again_is_another_one(self):
        self.checkpoint('c1')
        self.some()
        self.vm.quit()
        self.vm.start()
        self.daemon.wait_idle()
        self.some()
        self.vm.kill()
        self.vm.start()
        self.daemon.wait_idle()
        self.check(c1='INCONSISTENT')
        for command, more in (('remove', {}), ('add', {'persistent': True})):
            self.vm.look(f'block-dirty-bitmap-{command}', {'node': self.disk.node, 'name': 'c1', **more})
        self.write(4 * MIB, 3 * MIB)
        self.check(c1='GAP')
        self.daemon.stop()

    def test_a_disk_of_another_size_is_refused_also_when_it_is_as_before(self):
        self.checkpoint('c1')
        self.some()
        for size in (4 * MIB, 8 * MIB):
            self.vm.look('block_resize', {'node-name': self.disk.node, 'size': size})
            self.disk.size = size
            self.check(c1='RESIZED')
        self.checkpoint('c2')
        self.away()
        self.back()
        self.check(c1='RESIZED')
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'c1'})
        del self.images['c1']
        self.checkpoint('c1')  # a new one of the old name is a new one
        self.some()
        self.check()
        self.daemon.stop()


class Renamed(harness.Case):
    def reasons(self):
        found = self.daemon.ask('query-checkpoints', {'vm': 'vm'})
        return {(c['name'], c['disk']): c['reason'] for c in found if c['reason'] != NEVER}

    def test_a_disk_that_comes_back_under_another_id_brings_what_is_held_against_its_checkpoints(self):
        vm = self.bare(Disk('sda', 8 * MIB, bus='virtio-scsi'), extra=['-device', 'virtio-scsi-pci'])
        self.daemon = self.qpulld(vm, linger=0)
        for name in ('right', 'cleared'):
            self.daemon.ask('checkpoint-create', {'vm': 'vm', 'name': name})
        vm.write('sda', MIB, MIB, 1)
        self.assertEqual(self.reasons(), {('right', 'sda'): 'NONE', ('cleared', 'sda'): 'NONE'})
        vm.look('block-dirty-bitmap-clear', {'node': 'node-sda', 'name': 'cleared'})
        self.assertEqual(self.reasons(), {('right', 'sda'): 'NONE', ('cleared', 'sda'): 'GAP'})
        for name, reason in (('sdb', 'NONE'), ('sda', 'GAP')):
            vm.look('device_del', {'id': next(iter(self.reasons()))[1]})
            vm.look.wait_event('DEVICE_DELETED', timeout=60)
            vm.look('device_add', {'driver': 'scsi-hd', 'id': name, 'drive': 'node-sda'})
            self.assertEqual(self.reasons(), {('right', name): reason, ('cleared', name): 'GAP'})
        self.daemon.stop()


class Away(ByOthers):
    def test_a_stream_while_we_were_away_is_found_out(self):
        self.checkpoint('c1')
        self.write(2 * MIB, MIB)
        self.snapshot(['c1'])
        self.some()
        self.checkpoint('c2')
        self.away()
        self.vm.look('block-stream', {'device': self.disk.node, 'job-id': 'j'})
        self.vm.look.wait_event('BLOCK_JOB_COMPLETED', 60)
        self.back()
        self.check(c1='GAP')
        self.daemon.stop()

    def test_commits_while_we_were_away_are_right_or_found_out(self):
        self.checkpoint('c0')
        self.some()
        base = self.snapshot(['c0'])
        self.some()
        self.checkpoint('c1')
        self.write(2 * MIB, MIB)
        middle = self.snapshot(['c0', 'c1'])
        self.some()
        self.checkpoint('c2')
        self.away()
        self.vm.look('block-commit', {'job-id': 'j', 'device': self.disk.node, 'top-node': middle, 'base-node': base})
        self.vm.look.wait_event('BLOCK_JOB_COMPLETED', 60)
        self.some()
        self.back()
        self.check(c1='GAP')
        self.daemon.stop()

    def test_a_record_that_was_cleared_is_found_out(self):
        self.checkpoint('c1')
        self.checkpoint('c2')
        self.some()
        self.look()
        self.away()
        self.vm.look('block-dirty-bitmap-clear', {'node': self.disk.node, 'name': 'c1'})
        self.back()
        self.check(c1='GAP')
        self.write(0, 7 * MIB)
        self.check(c1='GAP')
        self.daemon.stop()

    def test_an_overlay_thrown_away_leaves_the_base_and_its_record_right(self):
        """The external revert: back to the base under a new overlay."""
        self.checkpoint('c1')
        self.some()
        base = self.disk.path
        self.snapshot(['c1'])
        self.some()
        self.checkpoint('c2')
        self.some()
        self.away()
        self.vm.quit()
        overlay = f'{self.folder}/again.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', base, overlay])
        self.restart_on(overlay)
        self.back()
        self.check(c2=NEVER)
        self.some()
        self.check(c2=NEVER)
        self.daemon.stop()

    def test_an_old_copy_of_the_image_put_back_is_found_out(self):
        self.checkpoint('c1')
        self.some()
        self.look()
        self.away()
        for keep_inode in (False, True):
            self.vm.quit()
            copy = f'{self.folder}/copy.qcow2'
            shutil.copyfile(self.disk.path, copy)
            self.vm.start()
            self.daemon.start()
            self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'c1'})
            del self.images['c1']
            self.some()
            self.checkpoint('c1')  # of the same name, but another instant than that in the copy
            self.write(0, 7 * MIB)
            self.look()
            self.away()
            self.vm.quit()
            if not keep_inode:
                os.unlink(self.disk.path)
            shutil.copyfile(copy, self.disk.path)
            self.vm.start()
            self.back()
            self.check(c1='GAP')
            self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'c1'})
            self.checkpoint('c1')
            self.away()
        self.back()
        self.check()
        self.daemon.stop()

    def test_what_qemu_img_commits_and_writes_offline_is_in_the_record(self):
        self.checkpoint('c1')
        self.some()
        base = self.disk.path
        self.snapshot([])
        self.write(2 * MIB, MIB)
        self.checkpoint('c2')
        self.some()
        self.away()
        self.vm.quit()
        overlay = f'{self.folder}/layer1.qcow2'
        harness.run(['qemu-img', 'rebase', '-u', '-F', 'qcow2', '-b', base, overlay])
        harness.run(['qemu-img', 'commit', '-q', '-d', overlay])
        harness.run(['qemu-io', '-f', 'qcow2', '-c', 'write -q -P 99 5M 64k', base])
        self.restart_on(base)
        self.back()
        self.check(c2=NEVER)
        self.daemon.stop()

    def test_a_record_that_was_cleared_or_moved_offline_is_found_out(self):
        for name in ('c1', 'c2', 'c3'):
            self.checkpoint(name)
        self.some()
        self.look()
        self.away()
        self.vm.quit()
        harness.run(['qemu-img', 'bitmap', '--clear', self.disk.path, 'c1'])
        harness.run(['qemu-img', 'bitmap', '--remove', self.disk.path, 'c2'])
        harness.run(['qemu-img', 'bitmap', '--add', '-g', '32K', self.disk.path, 'c2'])
        self.vm.start()
        self.back()
        self.check(c1='GAP', c2='GAP')
        self.daemon.stop()

    def test_a_size_that_changed_while_we_were_away_is_found_out(self):
        self.checkpoint('c1')
        self.some()
        self.away()
        self.vm.quit()
        harness.run(['qemu-img', 'resize', '-q', '--shrink', self.disk.path, str(4 * MIB)])
        self.disk.size = 4 * MIB
        self.vm.start()
        self.back()
        self.check(c1='RESIZED')
        self.daemon.stop()

    def test_a_disk_shrunk_and_grown_back_above_the_record_is_right(self):
        """QEMU zeroes what comes back where a backing file would show through, and that is allocated."""
        self.write(0, 8 * MIB)
        self.checkpoint('c1')
        self.snapshot([])
        self.some()
        self.away()
        for size in (4 * MIB, 8 * MIB):
            self.vm.look('block_resize', {'node-name': self.disk.node, 'size': size})
        self.vm.disks['vda'].model.image[4 * MIB:] = bytes(4 * MIB)
        self.back()
        changed = self.check()
        self.assertGreaterEqual(changed['c1'], 4 * MIB)
        self.daemon.stop()

    def test_a_moved_image_is_the_same(self):
        self.checkpoint('c1')
        self.some()
        self.away()
        self.vm.quit()
        moved = f'{self.folder}/moved.qcow2'
        os.rename(self.disk.path, moved)
        self.restart_on(moved)
        self.back()
        self.check()
        self.daemon.stop()

    def test_a_backing_file_that_was_replaced_is_found_out(self):
        base = self.disk.path
        self.snapshot()
        self.checkpoint('c1')
        overlay = f'{self.folder}/layer1.qcow2'
        self.away()
        self.vm.quit()
        harness.run(['qemu-img', 'rebase', '-u', '-F', 'qcow2', '-b', base, overlay])
        other = f'{self.folder}/other.qcow2'
        shutil.copyfile(base, other)
        harness.run(['qemu-io', '-f', 'qcow2', '-c', 'write -q -P 77 3M 64k', other])
        os.rename(other, base)
        self.restart_on(overlay)
        self.back()
        self.check(c1='GAP')
        self.daemon.stop()

    def test_an_internal_snapshot_cannot_be_loaded_over_a_record(self):
        """QEMU itself refuses it, by every way; if a version does not, this fails."""
        self.away()
        self.vm.quit()
        harness.run(['qemu-img', 'snapshot', '-c', 'before', self.disk.path])
        self.vm.start()
        self.back()
        self.checkpoint('c1')
        self.some()
        self.assertIn('Error', self.vm.hmp('loadvm before'))
        self.away()
        self.vm.quit()
        done = harness.run(['qemu-img', 'snapshot', '-a', 'before', self.disk.path], check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn('dirty bitmaps', done.stderr)
        self.vm.start()
        self.back()
        self.check()
        self.away()
        self.vm.kill()  # an unusable record protects, too
        done = harness.run(['qemu-img', 'snapshot', '-a', 'before', self.disk.path], check=False)
        self.assertNotEqual(done.returncode, 0)
        self.vm.start()
        self.back()
        self.check(c1='INCONSISTENT')
        self.daemon.stop()

    def test_without_a_memory_the_bitmaps_alone_decide(self):
        self.checkpoint('c1')
        self.some()
        self.away()
        for spoil in (shutil.rmtree, self.damage):
            spoil(f'{self.daemon.state}/lineage')
            self.back()
            self.some()
            self.check()
            self.away()
        with open(self.daemon.log_path) as f:
            self.assertIn('cannot be read', f.read())

    def damage(self, folder):
        with open(f'{folder}/vm.json', 'wb') as f:
            f.write(b'{"format": 1, "disks": [{"na')


class Crashes(ByOthers):
    def test_after_a_kill_of_qemu_old_records_are_inconsistent_and_new_ones_gone(self):
        second = Disk('vdb', 4 * MIB)
        self.checkpoint('old')
        self.some()
        self.away()
        self.vm.quit()
        second.create(self.folder)
        second.model = self.disk.model.copy()
        self.vm.disks['vdb'] = second
        self.vm.start()
        self.back()
        self.checkpoint('new')
        self.look()
        self.vm.kill()
        self.vm.start()
        self.daemon.wait_idle()
        self.check(old='INCONSISTENT', new=NEVER)
        # The husk blocks a resize, and goes on request.
        with self.assertRaises(QmpError):
            self.vm.look('block_resize', {'node-name': self.disk.node, 'size': 9 * MIB})
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'old'})
        self.vm.look('block_resize', {'node-name': self.disk.node, 'size': 9 * MIB})
        self.disk.size = 9 * MIB
        del self.images['old'], self.images['new']
        self.checkpoint('new')
        self.some()
        self.check()
        self.daemon.stop()

    def test_a_record_in_a_layer_that_cannot_be_written_is_deleted_for_good(self):
        self.checkpoint('c1')
        self.some()
        self.snapshot(['c1'])
        self.some()
        self.checkpoint('c2')
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'c1'})
        self.check(c1=NEVER)
        self.assertEqual([node for node, name in bitmaps(self.vm.look) if name == 'c1'], ['node-vda'])
        with self.assertRaisesRegex(QmpError, 'cannot be used again'):
            self.daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'c1'})
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'c1'})  # again is success
        self.away()
        self.back()
        self.check(c1=NEVER)
        # When the layer can be written again what is left goes, too, and the name is free.
        self.vm.look('block-commit', {'job-id': 'j', 'device': self.disk.node})
        self.vm.look.wait_event('BLOCK_JOB_READY', 60)
        self.carried()
        self.vm.look('job-complete', {'id': 'j'})
        self.vm.look.wait_event('BLOCK_JOB_COMPLETED', 60)
        self.disk.node = 'node-vda'
        self.check(c1=NEVER)
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'c1'})
        del self.images['c1']
        self.checkpoint('c1')
        self.some()
        self.check()
        self.daemon.stop()


if __name__ == '__main__':
    harness.main()
