#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A checkpoint's record may lie in several layers of an image. A layer without it is filled in from what it has
allocated."""
import json

import harness
import nbdpull
from harness import MIB, Disk
from qmpclient import Qmp
from truth import SECTOR, Chain, find_cut, own_copy, own_export, random_work, replay, settle


class Layers(harness.Case):
    def setUp(self):
        self.disk = Disk('vda', 16 * MIB + 7 * SECTOR)
        self.vm = self.guest(self.disk)
        self.daemon = self.qpulld(self.vm, linger=0)
        self.chain = Chain(self, self.vm, self.daemon, 'vda')
        self.nlayers = 0
        random_work(self.vm, 'vda', 30)

    def snapshot(self, names, options=''):
        """An external snapshot, as other tools take it: the overlay gets new bitmaps of these names in one go."""
        self.nlayers += 1
        path, node = f'{self.folder}/layer{self.nlayers}.qcow2', f'layer-{self.nlayers}'
        size = str(self.disk.size)
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', *(['-o', options] if options else []), path, size])
        self.vm.look('blockdev-add', {'driver': 'qcow2', 'node-name': node, 'backing': None, 'discard': 'unmap',
                                      'file': {'driver': 'file', 'filename': path, 'discard': 'unmap'}})
        actions = [{'type': 'blockdev-snapshot', 'data': {'node': self.disk.node, 'overlay': node}}]
        actions += [{'type': 'block-dirty-bitmap-add', 'data': {'node': node, 'name': name, 'persistent': True}}
                    for name in names]
        self.vm.look('transaction', {'actions': actions})
        self.disk.node = node

    def reasons(self):
        control = Qmp(self.daemon.control)
        try:
            return {c['name']: c['reason'] for c in control('query-checkpoints', {'vm': 'vm', 'disk': 'vda'})}
        finally:
            control.close()

    def offered(self):
        found = nbdpull.list_contexts(self.daemon.uri('vm/vda'), ['qemu:dirty-bitmap:'])
        return {name.split(':', 2)[2] for name in found}

    def back_up(self, **how):
        expected = own_copy(self.vm, 'vda')
        self.assertModel(self.disk.model, expected, 'QEMU\'s own view')
        return self.chain.back_up(expected=expected, **how)

    def test_a_record_in_two_and_three_layers_stays_right(self):
        self.back_up()
        random_work(self.vm, 'vda', 10)
        self.chain.adopt(4096)
        for options in ('', 'cluster_size=4096'):
            random_work(self.vm, 'vda', 10)
            self.snapshot(list(self.chain.images), options)
            random_work(self.vm, 'vda', 10)
            self.back_up()
            self.assertEqual(self.offered(), set(self.chain.images))
            random_work(self.vm, 'vda', 5)
        _, maps = self.back_up(checkpoint=False)
        self.assertEqual(len(maps), 4)
        self.vm.check()
        self.daemon.stop()

    def test_a_layer_without_the_record_is_filled_in_from_its_allocation(self):
        self.back_up()
        kept = self.chain.adopt(65536)
        lost = next(n for n in self.chain.images if n != kept)
        random_work(self.vm, 'vda', 10)
        self.snapshot([kept])
        random_work(self.vm, 'vda', 10)
        self.assertEqual(self.reasons(), {kept: 'NONE', lost: 'NONE'})
        self.assertEqual(self.offered(), {kept, lost})
        self.back_up(since=[kept, lost])
        # One that comes again above: the layer in the middle stays one without.
        self.snapshot([lost, kept])
        random_work(self.vm, 'vda', 10)
        self.assertEqual(self.reasons()[lost], 'NONE')
        self.back_up(since=[lost, kept])
        self.vm.check()
        self.daemon.stop()

    def test_a_record_that_begins_anew_later_than_its_layer_misses_nothing(self):
        """Other tools may take the snapshot first and add the bitmaps of the old names after it, not in one go."""
        self.back_up()
        names = list(self.chain.images)
        self.snapshot([])
        random_work(self.vm, 'vda', 10)
        for name in names:
            self.vm.look('block-dirty-bitmap-add', {'node': self.disk.node, 'name': name, 'persistent': True})
        random_work(self.vm, 'vda', 5)
        self.back_up(since=names)
        self.back_up()
        self.vm.check()
        self.daemon.stop()

    def test_filled_in_records_are_right_under_load(self):
        """The allocation is asked of a disk on which the guest works on, and discards what it had allocated."""
        self.back_up()
        names = list(self.chain.images)
        for _ in range(2):
            self.snapshot([])
            load = self.vm.load('vda', ('write', 'discard', 'zero'), max=65536, pause_us=1000)
            oracle, at = self.disk.model.copy(), 0
            for _ in range(5):
                done = load.status()['ops']
                harness.wait_until(lambda: load.status()['ops'] > done + 10, 30, '10 operations')
                truth, maps = self.chain.back_up(since=names, checkpoint=False)
                self.assertEqual(len(maps), 1)
                self.assertTrue(nbdpull.ranges_with(maps[names[0]]))
                at, _ = find_cut(self, oracle, load, at, truth)
            late = nbdpull.connect(self.daemon.uri('vm/vda'))
            truth = nbdpull.read_all(late)
            h = nbdpull.connect(self.daemon.uri('vm/vda'), map(nbdpull.dirty_context, names))
            self.assertSame(replay(h, names[0], self.chain.images[names[0]])[0], truth, 'asked for late')
            for end in (late, h):
                end.shutdown()
            settle(self.vm)
            self.assertEqual(load.stop()['errors'], 0)
        self.vm.check()
        self.daemon.stop()

    def test_a_snapshot_taken_by_others_during_a_session_spoils_nothing(self):
        self.back_up()
        random_work(self.vm, 'vda', 10)
        names = list(self.chain.images)

        def during(_):
            random_work(self.vm, 'vda', 8)
            self.snapshot(names)
            random_work(self.vm, 'vda', 8)

        self.back_up(during=during)
        self.assertEqual(self.offered(), set(self.chain.images), 'the session\'s checkpoint is on the new layer')
        self.back_up()  # the increment that covers writes before and after the snapshot
        random_work(self.vm, 'vda', 8)
        self.back_up()
        self.vm.check()
        self.daemon.stop()

    def test_an_image_with_a_backing_file_from_the_start_is_whole(self):
        base = f'{self.folder}/base.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', base, str(8 * MIB)])
        harness.run(['qemu-io', '-f', 'qcow2', '-c', 'write -P 7 1M 3M', '-c', 'write -P 9 7M 1M', base])
        disk = Disk('vdb', 12 * MIB + SECTOR, backing=base)  # longer than its backing file
        vm = self.guest(disk, name='second')
        disk.model.image[MIB:4 * MIB] = b'\7' * (3 * MIB)
        disk.model.image[7 * MIB:8 * MIB] = b'\x09' * MIB
        daemon = self.qpulld({'vm': vm}, linger=0, name='second-daemon')
        chain = Chain(self, vm, daemon, 'vdb')
        for _ in range(3):
            expected = own_copy(vm, 'vdb')
            self.assertModel(disk.model, expected, 'QEMU\'s own view')
            chain.back_up(expected=expected)
            random_work(vm, 'vdb', 10)
        vm.zero('vdb', 6 * MIB, 5 * MIB)  # over what only the backing file holds
        chain.back_up(expected=own_copy(vm, 'vdb'))
        vm.check()
        daemon.stop()

    def test_a_filter_of_others_above_the_image_is_seen_through(self):
        disk = Throttled('vdb', 8 * MIB + SECTOR)
        vm = self.guest(disk, name='second')
        daemon = self.qpulld({'vm': vm}, linger=0, name='second-daemon')
        chain = Chain(self, vm, daemon, 'vdb')
        for i in range(4):
            random_work(vm, 'vdb', 12)
            expected = own_copy(vm, 'vdb')
            _, maps = chain.back_up(expected=expected, during=lambda _: random_work(vm, 'vdb', 4))
            self.assertEqual(len(maps), i)
        vm.check()
        daemon.stop()

    def test_a_disk_that_grew_or_shrank_is_refused_or_right(self):
        self.back_up()
        for size in (20 * MIB, 12 * MIB):
            self.vm.look('block_resize', {'node-name': self.disk.node, 'size': size})
            harness.wait_until(lambda: int(self.vm.cmd('size vda')) == size, 10, 'the guest\'s notice')
            self.vm.cmd(f'write vda {size - MIB} 65536 9')
            usable = [name for name, reason in self.reasons().items() if reason == 'NONE']
            self.assertEqual(self.offered(), set(usable))
            self.assertLessEqual(set(self.reasons().values()), {'NONE', 'RESIZED'})
            for name, image in self.chain.images.items():  # a client cuts its image, or lengthens it with zeroes
                self.chain.images[name] = image[:size] + bytes(max(0, size - len(image)))
            truth, _ = self.chain.back_up(since=usable, expected=own_copy(self.vm, 'vda'))
            self.assertEqual(len(truth), size)
        self.daemon.stop()


    def test_after_a_resize_above_it_a_record_is_refused_and_the_session_is_up_all_the_same(self):
        self.back_up()
        names = list(self.chain.images)
        self.snapshot(names)
        size = 20 * MIB
        self.vm.look('block_resize', {'node-name': self.disk.node, 'size': size})
        self.assertEqual(self.reasons(), {names[0]: 'RESIZED'})
        self.assertEqual(self.offered(), set())
        truth, _ = self.chain.back_up(since=[], checkpoint=False)
        self.assertEqual(len(truth), size)
        h = nbdpull.connect(self.daemon.uri('vm/vda'), [nbdpull.dirty_context(names[0]), nbdpull.ALLOCATION])
        self.assertFalse(h.can_meta_context(nbdpull.dirty_context(names[0])))
        h.shutdown()
        self.daemon.stop()

    def test_a_checkpoint_in_two_layers_is_deleted_as_a_whole_or_not_at_all(self):
        self.back_up()
        name, lower = list(self.chain.images)[0], self.disk.node
        self.snapshot([name])
        graph = self.vm.look('x-debug-query-block-graph')  # QEMU closed it for writing; some tools leave it open
        ids = {n['name']: n['id'] for n in graph['nodes']}
        file = next(n['name'] for e in graph['edges'] for n in graph['nodes']
                    if (e['parent'], e['name'], e['child']) == (ids[lower], 'file', n['id']))
        self.vm.look('blockdev-reopen', {'options': [{'driver': 'qcow2', 'node-name': lower, 'file': file,
                                                      'discard': 'unmap', 'read-only': False}]})
        self.vm.look('block-dirty-bitmap-disable', {'node': lower, 'name': name})
        with own_export(self.vm, lower, name):
            with self.assertRaisesRegex(harness.QmpError, 'in use|busy'):
                self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': name})
            self.assertEqual({node for node, n in harness.bitmaps(self.vm.look) if n == name}, {lower, self.disk.node})
        self.vm.look('block-dirty-bitmap-enable', {'node': lower, 'name': name})
        self.assertEqual(self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': name})['records'], 2)
        self.assertEqual(self.reasons(), {})
        self.daemon.stop()


class Throttled(Disk):
    """With a throttle filter between the device and the image, as others put it there."""

    def arguments(self):
        words = super().arguments()
        image = {**json.loads(words[1]), 'node-name': f'image-{self.name}'}
        node = {'driver': 'throttle', 'node-name': self.node, 'throttle-group': 'group', 'file': image}
        return ['-object', 'throttle-group,id=group,x-iops-total=100000', '-blockdev', json.dumps(node), *words[2:]]


if __name__ == '__main__':
    harness.main()
