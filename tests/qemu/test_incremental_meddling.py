#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 240
"""Somebody else takes an external snapshot of a disk just before any one QMP command of a session's set-up or teardown.
The session may fail, with a word, and then it is done again; but what it delivers is right, and so is every increment
after it. A proxy between qpulld and QEMU holds one command back while the other tool works."""
import threading

import harness
import nbd
import nbdpull
from harness import MIB, Disk
from qmpclient import Qmp
from qmpproxy import QmpProxy
from truth import SECTOR, own_copy, random_work, replay, settle

COMMANDS_AT_MOST = 120  # of one session; more would mean that the proxy does not see its end


class Meddling(harness.Case):
    def snapshot(self, disk, names):
        """As other tools do it: a record goes on in the new layer, or not: then it is filled in from the allocation."""
        self.nlayers += 1
        path, node = f'{self.folder}/layer{self.nlayers}.qcow2', f'layer-{self.nlayers}'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, str(disk.size)])
        self.tool('blockdev-add', {'driver': 'qcow2', 'node-name': node, 'backing': None, 'discard': 'unmap',
                                      'file': {'driver': 'file', 'filename': path, 'discard': 'unmap'}})
        actions = [{'type': 'blockdev-snapshot', 'data': {'node': disk.node, 'overlay': node}}]
        actions += [{'type': 'block-dirty-bitmap-add', 'data': {'node': node, 'name': name, 'persistent': True}}
                    for name in names]
        self.tool('transaction', {'actions': actions})
        disk.node = node

    def session(self, daemon, name, since, former):
        """An incremental and the full of its instant, compared: (the full, None); (None, why) where it was refused."""
        try:
            h = nbdpull.connect(daemon.uri(f'vm/vda@{name}'), [nbdpull.dirty_context(s) for s in since])
            truth = nbdpull.read_all(h)
            for s in since:
                if h.can_meta_context(nbdpull.dirty_context(s)):
                    restored, _ = replay(h, s, former[s])
                    self.assertSame(restored, truth, f'{name} over {s}')
            h.shutdown()
        except nbd.Error as e:
            return None, str(e)
        return truth, None

    def test_a_snapshot_by_others_at_any_command_leaves_the_chain_right(self):
        disk = Disk('vda', 3 * MIB + 7 * SECTOR)
        self.vm, self.nlayers = self.guest(disk), 0
        self.tool, busy = Qmp(self.vm.spare_qmp_path), threading.Lock()  # used by the proxy's thread
        self.addCleanup(self.tool.close)
        proxy = QmpProxy(self.folder, self.vm)
        self.addCleanup(proxy.close)
        daemon = self.qpulld(proxy, linger=0)
        images, refused, kept, commands = {}, [], [], []
        random_work(self.vm, 'vda', 10)
        number = harness.rng.randrange(1, 6)
        while number < COMMANDS_AT_MOST:
            # Each round's session is disturbed before its command `number`; the next one checks the chain.
            expected = own_copy(self.vm, 'vda')
            meddled = []

            def before():
                with busy:
                    meddled.append(True)
                    self.snapshot(disk, harness.rng.choice((list(images), [])))
                    self.vm.cmd(f'write vda {harness.rng.randrange(3 * MIB // SECTOR) * SECTOR} {SECTOR} {number}')

            proxy.at(number, before=before)
            try:
                truth, why = self.session(daemon, f'a{number}', list(images), images)
            except AssertionError as e:
                raise AssertionError(f'disturbed before command {number} of {proxy.commands}') from e
            settle(self.vm)
            proxy.off()
            with busy:
                if not meddled:
                    break
            commands.append(number)
            existing = self.records(disk)
            if truth is None:
                refused.append((number, why))
                self.assertNotIn(f'a{number}', existing)
            else:
                # The write of the meddler is in or out, as a whole; everything else is as it was.
                different = [o for o in range(0, disk.size, SECTOR) if truth[o:o + SECTOR] != expected[o:o + SECTOR]]
                self.assertLessEqual(len(different), 1, f'disturbed before command {number}')
                if f'a{number}' in existing:
                    images[f'a{number}'] = truth
                    kept.append(number)
            random_work(self.vm, 'vda', 3)
            expected = own_copy(self.vm, 'vda')
            truth, why = self.session(daemon, f'b{number}', list(images), images)
            self.assertIsNotNone(truth, f'after one disturbed before command {number}: {why}')
            self.assertSame(truth, expected, f'the session after the one disturbed before command {number}')
            settle(self.vm)
            images[f'b{number}'] = truth
            for name in list(images)[:-3]:  # a few are enough; the other tool does not carry the rest on
                del images[name]
            random_work(self.vm, 'vda', 3)
            number += harness.rng.randrange(2, 6)
        print(f'({len(commands)} sessions disturbed, {len(refused)} refused, {len(kept)} kept a checkpoint)', end=' ')
        self.assertGreater(len(commands), 6)
        self.vm.check()
        daemon.stop()

    def test_layers_without_records_are_counted_from_the_layer_that_was_frozen(self):
        """Where a record ends below the top, what changed is told by the depths of the layers above, as they were: one
        more on top, taken while they are read, moves all of them."""
        disk = Disk('vda', 3 * MIB + 7 * SECTOR)
        self.vm, self.nlayers = self.guest(disk), 0
        self.tool = Qmp(self.vm.spare_qmp_path)
        self.addCleanup(self.tool.close)
        proxy = QmpProxy(self.folder, self.vm)
        self.addCleanup(proxy.close)
        daemon = self.qpulld(proxy, linger=0)
        random_work(self.vm, 'vda', 10)
        base, _ = self.session(daemon, 'base', [], {})
        settle(self.vm)
        self.snapshot(disk, [])
        random_work(self.vm, 'vda', 5)
        proxy.at(COMMANDS_AT_MOST)
        truth, why = self.session(daemon, 'probe', ['base'], {'base': base})
        self.assertIsNotNone(truth, why)
        settle(self.vm)
        exporting = [i for i, name in enumerate(proxy.commands) if name == 'block-export-add']
        refused = 0

        def aim(name):
            """How many commands there are before it is a matter of time: the question after the reading, by its name."""
            if name == 'query-block-exports' and 'block-export-add' in proxy.commands and proxy.number is None:
                proxy.number = len(proxy.commands)
        for number in (*range(exporting[1], exporting[-1] + 2), None):
            self.vm.cmd(f'write vda {(number or 1) * 65536 % (3 * MIB)} {SECTOR} {number or 1}')
            proxy.at(number, before=lambda: self.snapshot(disk, []))
            proxy.at_each(None if number else aim)
            truth, why = self.session(daemon, f'a{number}', ['base'], {'base': base})
            settle(self.vm)
            proxy.at_each(None)
            proxy.off()
            if truth is None:
                refused += 1
                self.assertIn('try again', daemon.log())
        print(f'({refused} refused)', end=' ')
        self.assertGreater(refused, 0)
        self.vm.check()
        daemon.stop()

    def test_layers_without_records_are_counted_past_the_filter_of_a_stream(self):
        """A stream that begins while a session goes up puts a filter between the layers: those below it lie deeper."""
        disk = Disk('vda', 48 * MIB)
        self.vm, self.nlayers = self.bare(disk), 0
        self.tool = Qmp(self.vm.spare_qmp_path)
        self.addCleanup(self.tool.close)
        proxy = QmpProxy(self.folder, self.vm)
        self.addCleanup(proxy.close)
        daemon = self.qpulld(proxy, linger=0)
        base, node = self.session(daemon, 'base', [], {})[0], disk.node
        settle(self.vm)
        for offset, length in ((4 * MIB, 32 * MIB), (38 * MIB, 2 * MIB), (42 * MIB, 2 * MIB)):
            self.snapshot(disk, [])
            self.vm.write('vda', offset, length, offset // MIB)
        expected = own_copy(self.vm, 'vda')

        def aim(name):
            if name == 'blockdev-reopen' and not self.tool('query-block-jobs'):
                self.tool('block-stream', {'device': 'layer-2', 'base-node': node, 'job-id': 'j', 'speed': 1})
        proxy.at_each(aim)
        truth, _ = self.session(daemon, 'a', ['base'], {'base': base})
        proxy.at_each(None)
        self.assertTrue(self.tool('query-block-jobs'), 'the stream is at work')
        if truth is None:
            self.assertIn('try again', daemon.log())
        else:
            self.assertSame(truth, expected, 'beside the stream')
        self.tool('block-job-cancel', {'device': 'j', 'force': True})
        self.tool.wait_event('JOB_STATUS_CHANGE', 60, lambda d: d['status'] == 'null')
        settle(self.vm)
        self.assertSame(self.session(daemon, 'b', ['base'], {'base': base})[0], expected, 'after the stream')
        settle(self.vm)
        daemon.stop()

    def records(self, disk):
        return {name for node, name in harness.bitmaps(self.vm.look) if node == disk.node}


if __name__ == '__main__':
    harness.main()
