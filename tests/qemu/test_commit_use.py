#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
"""Block commits as people use them: wrong words, a guest that writes, cancelling, deleting, images that keep no records."""
import json
import os
import re
import select
import signal
import struct

import harness
import nbdpull
from commits import Layers
from harness import MIB, Disk
from qmpclient import QmpError
from qmpproxy import QmpProxy
from test_incremental_layers import Throttled
from truth import Chain, find_cut, own_copy, settle

SLOW = 20000  # bytes a second


class CommitUse(Layers):
    def refused(self, *args, status=1):
        done = self.daemon.qpull('commit', *args, check=False)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return done.stderr

    def three_layers(self, **options):
        self.begin(**options)
        self.work()
        self.checkpoint('old')
        self.snapshot(['old'])
        self.work()
        self.checkpoint('young')
        self.snapshot(['old', 'young'])
        self.work()
        self.serve()

    def test_wrong_words_are_answered_in_words(self):
        self.three_layers()
        before = self.vm.state()
        self.assertIn('say --active', self.refused('vm/vda'))
        self.assertIn('live image \'layer-2\'', self.refused('vm/vda', '--active', '--top', 'layer-1'))
        self.assertIn('above top', self.refused('vm/vda', '--top', 'layer-1', '--base', 'layer-2'))
        self.assertIn('into itself', self.refused('vm/vda', '--top', 'layer-1', '--base', 'layer-1'))
        self.assertIn('into nothing', self.refused('vm/vda', '--top', 'node-vda', '--shallow'))
        self.assertIn('no image \'nobody\'', self.refused('vm/vda', '--top', 'nobody'))
        self.assertIn('no disk \'vdx\'', self.refused('vm/vdx', '--active'))
        self.assertIn('no VM "vx"', self.refused('vx/vda', '--active'))
        self.assertIn('VM/DISK', self.refused('vda', status=2))
        self.assertIn('contradict', self.refused('vm/vda', '--shallow', '--base', 'node-vda', status=2))
        self.assertIn('--top wants a value', self.refused('vm/vda', '--top', status=2))
        with self.assertRaisesRegex(QmpError, "'active', expected: boolean"):
            self.daemon.ask('block-commit', {'vm': 'vm', 'disk': 'vda', 'active': 'yes'})
        with self.assertRaisesRegex(QmpError, 'no job'):
            self.daemon.ask('job-cancel', {'id': 'qpull-00000000-job0'})
        self.assertEqual(self.vm.state(), before)
        self.commit('--active', '--base', self.files[1])
        self.commit('--active', '--shallow')
        self.assertIn('nothing to commit', self.refused('vm/vda', '--active'))
        self.check(self.names)
        self.daemon.stop()

    def test_a_session_and_a_commit_do_not_meet(self):
        self.slow_start(snapshots=2)
        h = nbdpull.connect(self.daemon.uri('vm/vda'))
        self.assertIn('is in a session', self.refused('vm/vda', '--active'))
        h.shutdown()
        settle(self.vm)
        self.daemon.wait_idle()
        tool = self.begin_commit('--top', 'layer-1')
        with self.assertRaisesRegex(Exception, 'being committed|policy'):
            nbdpull.connect(self.daemon.uri('vm/vda'))
        self.assertIn('being committed already', self.refused('vm/vda', '--active'))
        for command in ('checkpoint-create', 'checkpoint-delete'):
            with self.assertRaisesRegex(QmpError, 'busy'):
                self.daemon.ask(command, {'vm': 'vm', 'name': 'old'})
        self.assertEqual(set(self.reasons().values()), {'NONE'})
        self.vm.look('block-job-set-speed', {'device': self.job()['id'], 'speed': 0})
        self.assertEqual(tool.wait(30), 0)
        tool.communicate()
        self.check(self.names)
        self.daemon.stop()

    def test_a_job_of_others_is_respected(self):
        self.three_layers()
        self.vm.look('blockdev-add', {'driver': 'null-co', 'node-name': 'target', 'size': self.disk.size})
        self.vm.look('blockdev-mirror', {'job-id': 'theirs', 'device': 'layer-2', 'target': 'target', 'sync': 'full',
                                         'speed': 1})
        self.assertIn('\'theirs\' works on this disk', self.refused('vm/vda', '--top', 'layer-1'))
        self.vm.look('job-cancel', {'id': 'theirs'})
        self.vm.look.wait_event('BLOCK_JOB_CANCELLED')
        self.commit('--top', 'layer-1')
        self.check(self.names)
        self.daemon.stop()

    def slow_layers(self):
        """So much in the live layer that a commit takes a while."""
        self.begin(QmpProxy, size=64 * MIB)
        self.checkpoint('old')
        self.work(2)
        self.snapshot(['old'])
        self.vm.write('vda', 0, 48 * MIB, 5)
        self.checkpoint('young')
        self.work()
        self.flush()

    def begin_commit(self, *flags, stderr=-1):
        """`qpull commit` under way, slow from its beginning: it is never over before the test goes on."""
        def slow(message):
            if message['execute'] == 'block-commit' and message['arguments']['speed'] == 0:  # else it only opens base
                message['arguments']['speed'] = SLOW
                self.proxy.asked = None
            return message
        self.proxy.asked = slow
        tool = harness.spawn([f'{harness.bin_dir()}/qpull', '--control', self.daemon.control, 'commit', 'vm/vda', *flags],
                             stdout=-1, stderr=stderr, text=True)
        harness.wait_until(lambda: self.proxy.asked is None, 20, 'the job')
        harness.wait_until(lambda: (self.job() or {}).get('current-progress'), 20, 'progress')
        return tool

    def slow_start(self, snapshots=1):
        self.slow_layers()
        for _ in range(snapshots - 1):
            self.snapshot(['old', 'young'])
        self.serve()

    def test_interrupted_it_is_cancelled(self):
        for snapshots, flags in ((1, ['--active']), (2, ['--top', 'layer-1'])):
            self.slow_start(snapshots)
            before = self.vm.look('query-named-block-nodes', {'flat': True})
            tool = self.begin_commit(*flags)
            self.work(2)
            tool.send_signal(signal.SIGINT)
            _, said = tool.communicate(timeout=20)
            self.assertEqual(tool.returncode, 1)
            self.assertIn('cancelled', said)
            self.assertEqual(self.job()['status'], 'concluded')
            self.assertNoJobs()
            names = {(n['node-name'], b['name']) for n in before for b in n.get('dirty-bitmaps', [])}
            now = self.vm.look('query-named-block-nodes', {'flat': True})
            self.assertEqual({(n['node-name'], b['name']) for n in now for b in n.get('dirty-bitmaps', [])}, names)
            self.check(self.names, 'cancelled')
            self.commit(*flags)  # again, to the end
            self.check(self.names, 'done')
            self.daemon.stop()
            self.vm.quit()

    def test_a_terminal_sees_how_far_it_is(self):
        self.slow_start()
        ours, theirs = os.openpty()
        tool = self.begin_commit('--active', stderr=theirs)
        os.close(theirs)
        seen = b''
        while not re.search(rb'\r\[#*\.+\] .* of .*MiB', seen):  # the first one comes after a second
            self.assertTrue(select.select([ours], [], [], 10)[0], seen)
            seen += os.read(ours, 4096)
        self.daemon.ask('job-cancel', {'id': self.job()['id']})
        self.assertEqual(tool.wait(20), 1)
        while b'cancelled' not in seen:  # a terminal passes on piece by piece; its end is an OSError
            seen += os.read(ours, 4096)
        os.close(ours)
        tool.communicate()
        self.check(self.names)
        self.daemon.stop()

    def test_the_daemon_is_told_to_stop(self):
        self.slow_start()
        tool = self.begin_commit('--active')
        self.daemon.stop()
        self.assertNotEqual(tool.wait(20), 0)
        self.assertNoJobs()
        self.daemon.start()
        self.daemon.wait_idle()
        self.check(self.names)
        self.daemon.stop()

    def test_qemu_ends_in_the_middle(self):
        """In an orderly way: it stores all records, and they are right in the layers as they were."""
        for snapshots, flags in ((1, ['--active']), (2, ['--top', 'layer-1'])):
            self.slow_start(snapshots)
            tool = self.begin_commit(*flags)
            self.work(2)
            self.restart()
            self.assertEqual(tool.wait(20), 1)
            tool.communicate()
            self.daemon.wait_idle()
            self.work(2)
            self.check(self.names)
            self.daemon.stop()
            self.vm.quit()

    def test_a_filter_of_others_stays_where_it_is(self):
        self.begin(kind=Throttled)
        self.nodes = ['image-vda']
        self.checkpoint('old')
        self.snapshot(['old'])
        self.work()
        self.checkpoint('young')
        self.snapshot()
        self.work()
        self.serve()
        self.commit('--active', '--shallow')
        self.work()
        self.check(self.names)
        self.commit('--active')
        self.assertEqual(self.vm.look('query-block')[-1]['inserted']['node-name'], 'node-vda')
        self.work()
        self.check(self.names)
        self.daemon.stop()

    def test_the_job_is_ended_by_somebody_else(self):
        self.slow_start()
        tool = self.begin_commit('--active')
        self.vm.look('job-cancel', {'id': self.job()['id']})
        _, said = tool.communicate(timeout=20)
        self.assertIn('canceled', said)
        self.assertNoJobs()
        self.check(self.names)
        self.daemon.stop()

    def test_merged_images_are_deleted_and_nothing_else(self):
        self.three_layers()
        self.assertIn('cannot be deleted', self.refused_for_a_link())
        self.vm.look('blockdev-add', {'driver': 'file', 'node-name': 'reader', 'read-only': True,
                                      'filename': self.files[1]})
        done = self.commit('--top', 'layer-1', '--delete', check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn('QEMU still has it open', done.stderr)
        self.assertIn('is not deleted', self.job()['problem'])
        self.assertEqual([os.path.exists(f) for f in self.files], [True, True, True])
        done = self.commit('--active', '--delete')
        self.assertIn(f'deleted {self.files[2]}', done.stdout)
        self.assertEqual([os.path.exists(f) for f in self.files], [True, True, False])
        self.check(self.names)
        self.daemon.stop()

    def test_a_layer_whose_head_has_options_for_a_name_is_deleted(self):
        """As QEMU writes them after a commit, where names in heads are relative."""
        self.three_layers()
        name = ('json:' + json.dumps({'driver': 'qcow2', 'file': {'driver': 'file', 'filename': self.files[0]}})).encode()
        with open(self.files[1], 'r+b') as f:
            offset = struct.unpack('>Q', os.pread(f.fileno(), 8, 8))[0]
            os.pwrite(f.fileno(), name, offset)
            os.pwrite(f.fileno(), struct.pack('>I', len(name)), 16)
        self.assertIn(f'deleted {self.files[1]}', self.commit('--top', 'layer-1', '--delete').stdout)
        self.assertEqual([os.path.exists(f) for f in self.files], [True, False, True])
        self.check(self.names)
        self.daemon.stop()

    def test_an_image_that_another_process_has_open_is_not_deleted(self):
        self.three_layers(proxy=QmpProxy)

        def open_it(command):
            if command == 'blockdev-del':
                harness.spawn(['qemu-nbd', '-r', '-k', f'{self.folder}/other.nbd', '-f', 'raw', '-t', self.files[1]])
                # It listens before it opens the image, and answers when it has.
                words = ['nbdinfo', '--size', nbdpull.unix_uri(f'{self.folder}/other.nbd', '')]
                harness.wait_until(lambda: harness.run(words, check=False).returncode == 0, 20, 'the other process')
                self.proxy.each = None
        self.proxy.each = open_it
        done = self.commit('--top', 'layer-1', '--delete', check=False)
        self.assertIn('another process has it open', done.stderr)
        self.assertTrue(os.path.exists(self.files[1]))
        self.check(self.names)
        self.daemon.stop()

    def test_a_qemu_that_lies_has_no_file_deleted_but_the_disks_own(self):
        def plain(path):
            with open(path, 'w', encoding='ascii') as f:
                f.write('root:*:1:0:99999:7:::\n')

        def image(base):
            def create(path):
                harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', base(), '-F', 'qcow2', path])
            return create

        def others():
            path = f'{self.folder}/others.qcow2'
            harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, str(self.disk.size)])
            return path

        self.three_layers(proxy=QmpProxy)
        rows = ((plain, 'it is not a qcow2 image'),
                (image(others), 'its own head does not say that it lies over'),
                (image(lambda: self.files[0]), 'no process holds it as an image'))
        for number, (make, words) in enumerate(rows):
            foreign = f'{self.folder}/alien{number}.qcow2'
            make(foreign)
            merged, top = self.files[-2], self.nodes[-2]
            self.assertEqual(len(foreign), len(merged))
            self.proxy.told = lambda data, old=merged, new=foreign: data.replace(old.encode(), new.encode())
            done = self.commit('--top', top, '--delete', check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(f"image '{foreign}' is not deleted: {words}", done.stderr)
            self.assertEqual(self.job()['deleted'], [])
            self.assertEqual([os.path.exists(p) for p in (foreign, *self.files)], [True] * 4)
            self.assertNotIn(top, [n['node-name'] for n in self.vm.look('query-named-block-nodes')], 'it was merged')
            self.proxy.told = None
            del self.files[1], self.nodes[1]
            self.snapshot()
            self.work()
        self.daemon.stop()

    def refused_for_a_link(self):
        """An image that is reached through a symbolic link is none that may be unlinked."""
        path = f'{self.folder}/link.qcow2'
        os.symlink(f'{self.folder}/real.qcow2', path)
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', self.files[-1], '-F', 'qcow2',
                     f'{self.folder}/real.qcow2', str(self.disk.size)])
        self.vm.look('blockdev-add', {'driver': 'qcow2', 'node-name': 'linked', 'backing': None,
                                      'file': {'driver': 'file', 'filename': path}})
        self.vm.look('blockdev-snapshot', {'node': self.nodes[-1], 'overlay': 'linked'})
        said = self.refused('vm/vda', '--active', '--delete', '--shallow')
        self.commit('--active', '--shallow')
        return said

    def test_deleting_images_that_qemu_opened_itself(self):
        self.three_layers()
        self.restart()
        self.daemon.wait_idle()
        done = self.daemon.json('commit', 'vm/vda', '--top', self.files[1], '--delete')
        self.assertEqual(done['deleted'], [self.files[1]])
        self.assertEqual([os.path.exists(f) for f in self.files], [True, False, True])
        self.check(self.names)
        done = self.commit('--active', '--delete', '--quiet')
        self.assertEqual(done.stdout + done.stderr, '')
        self.assertEqual([os.path.exists(f) for f in self.files], [True, False, False])
        self.check(self.names)
        self.daemon.stop()

    def test_a_base_that_keeps_no_bitmaps(self):
        for fmt, options in (('raw', ''), ('qcow2', 'compat=0.10')):
            self.begin(fmt=fmt, options=options)
            self.work()
            self.snapshot()
            self.work()
            self.checkpoint('lost')
            self.work()
            self.snapshot(['lost'])
            self.checkpoint('kept')
            self.work()
            self.serve()
            self.check(['lost', 'kept'])
            self.assertIn('--force', self.refused('vm/vda', '--top', 'layer-1'))
            self.commit('--top', 'layer-1', '--force')
            self.assertEqual(self.states(), {'lost': 'broken', 'kept': 'kept'})
            self.check(['kept'])
            self.assertIn('--force', self.refused('vm/vda', '--active'))
            self.commit('--active', '--force')
            self.check([])
            self.daemon.stop()
            self.vm.quit()

    def test_a_layer_far_above_cannot_be_kept_from_lying_by_a_raw_base(self):
        self.begin(fmt='raw')
        self.snapshot()
        self.checkpoint('name')
        for _ in range(2):
            self.snapshot(['name'])
        self.serve()
        self.assertIn('would pass for the whole', self.refused('vm/vda', '--top', 'layer-1', '--force'))
        self.check(self.names)
        self.daemon.stop()

    def spoil(self):
        """QEMU dies, and what the live layer has recorded is worth nothing."""
        self.vm.quit()
        self.boot(self.files[-1])  # once more in an orderly way: only stored bitmaps can become inconsistent
        self.vm.kill()
        self.boot(self.files[-1])

    def test_an_unusable_record_does_not_become_usable(self):
        """Above it somebody has begun a new one of the same name: alone, that would pass for the whole."""
        for layers in (1, 2):
            self.begin()
            self.snapshot()
            self.work()
            self.checkpoint('name')
            self.work()
            self.spoil()
            self.work()
            for _ in range(layers):
                self.snapshot(['name'])
                self.work()
            self.serve()
            self.assertEqual(self.reasons(), {'name': 'INCONSISTENT'})
            self.commit('--top', 'node-vda')
            self.assertEqual(self.states(), {'name': 'unusable'})
            self.assertNotEqual(self.reasons()['name'], 'NONE')
            self.check([])
            self.restart()
            self.daemon.wait_idle()
            self.check([], 'restarted')
            self.commit('--active')
            self.check([], 'live layer, too')
            self.daemon.stop()
            self.vm.quit()

    def test_a_record_that_cannot_be_merged_is_given_up_alone(self):
        """Somebody takes a record away while data are committed."""
        self.begin(QmpProxy)
        self.snapshot()
        self.checkpoint('first')
        self.checkpoint('second')
        self.work()
        self.snapshot(['first', 'second'])
        self.work()
        self.serve()

        def meddle(command):
            if command == 'transaction':
                self.vm.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': 'first', 'persistent': True})
                self.proxy.each = None
        self.proxy.each = meddle
        done = self.commit('--top', 'layer-1', check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn('spoiled', done.stderr)
        self.assertEqual(self.states(), {'first': 'broken', 'second': 'kept'})
        self.check(['second'])
        self.daemon.stop()

    def test_a_guest_that_writes_all_the_time(self):
        disk = Disk('vda', 32 * MIB + 512)
        vm = self.guest(disk)
        self.vm, self.disk, self.nodes, self.files, self.count = vm, disk, [disk.node], [disk.path], 0
        self.names = {}
        daemon = self.qpulld(vm, linger=0)
        self.daemon = daemon
        chain = Chain(self, vm, daemon, 'vda')
        chain.back_up(expected=own_copy(vm, 'vda'))
        load = vm.load('vda', ('write', 'zero', 'discard', 'flush'), max=65536, pause_us=300)
        oracle, at = disk.model.copy(), 0
        for flags in (['--active'], ['--top', 'layer'], ['--active']):
            for careful in (True, False):
                names = list(chain.images)
                self.snapshot(names if careful else [])
                done = load.status()['ops']
                harness.wait_until(lambda: load.status()['ops'] > done + 100, 30, '100 operations')
            flags = ['--top', self.nodes[-2]] if flags[0] == '--top' else flags
            daemon.qpull('commit', 'vm/vda', *flags)
            self.assertNotIn('broken', self.states().values())
            root = vm.look('query-block')[-1]['inserted']['node-name']
            self.nodes = self.nodes[:self.nodes.index(root) + 1]
            self.files = self.files[:len(self.nodes)]
            disk.node = root
            truth, _ = chain.back_up()
            at, _ = find_cut(self, oracle, load, at, truth)
        self.assertEqual(load.stop()['errors'], 0)
        vm.check()
        daemon.stop()


if __name__ == '__main__':
    harness.main()
