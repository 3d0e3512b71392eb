#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 400
"""Block commits of a powered-off VM as people use them: wrong words, cancelling, a VM that starts meanwhile, images that others
read, images of all kinds."""
import json
import os
import re
import select
import signal
import stat
import subprocess

import harness
import nbdpull
import rawnbd
from commits import OfflineLayers
from harness import MIB
from offline import content, is_alive, records
from qmpclient import QmpError
from test_offline_commit_kill import PROGRAM

SLOW = 20000  # bytes a second


def info(path):
    return json.loads(harness.run(['qemu-img', 'info', '--output=json', path]).stdout)


class OfflineCommitUse(OfflineLayers):
    def setUp(self):
        self.plan = f'{self.folder}/plan'
        os.environ.update(QPULL_FAULT_PLAN=self.plan, QPULL_FAULT_SEEN=f'{self.folder}/seen')
        self.set_plan('none', 0)

    def set_plan(self, kind, number):
        with open(self.plan, 'w', encoding='utf-8') as f:
            f.write(f'{kind} {number}')
        with open(f'{self.folder}/seen', 'w', encoding='utf-8'):
            pass

    def serve(self, **options):
        super().serve(flags=[f'--storage-daemon={PROGRAM}'], **options)

    def three_layers(self, **options):
        self.begin(**options)
        self.work()
        self.checkpoint('old')
        self.snapshot(['old'])
        self.work()
        self.checkpoint('young')
        self.work()
        self.snapshot(['old', 'young'])
        self.work()
        self.power_off()
        self.serve()

    def refused(self, *args, status=1):
        done = self.daemon.qpull('commit', *args, check=False)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return done.stderr

    def slow_layers(self):
        """So much in each of the upper two layers that a slowed commit does not end by itself."""
        self.begin(size=16 * MIB)
        self.checkpoint('old')
        self.work(2)
        for _ in range(2):
            self.snapshot(['old'])
            self.vm.write('vda', 0, 8 * MIB, harness.rng.randrange(256))
        self.checkpoint('young')
        self.work()
        self.power_off()
        self.serve()
        self.set_plan('slow', SLOW)

    def begin_commit(self, *flags, stderr=-1):
        tool = harness.spawn([f'{harness.bin_dir()}/qpull', '--control', self.daemon.control, 'commit', 'vm/vda', *flags],
                             stdout=-1, stderr=stderr, text=True)
        harness.wait_until(lambda: (self.job() or {}).get('current-progress'), 20, 'progress')
        return tool

    def both_ways(self):
        """A commit of the top layer and one below it, each under way."""
        for flags in (['--active'], ['--top', '1']):
            self.slow_layers()
            before = {path: records(path) for path in self.files}
            yield self.begin_commit(*(self.files[1] if f == '1' else f for f in flags))
            self.set_plan('none', 0)
            self.wait_closed(self.daemon)
            self.assertEqual({path: records(path) for path in self.files}, before)
            self.assertEqual([f for f in os.listdir(self.folder) if f.endswith('.qpull-new')], [])
            self.check(self.names, 'afterwards')
            self.check_images()
            self.commit(*(self.files[1] if f == '1' else f for f in flags))  # and once more, to the end
            self.wait_closed(self.daemon)
            self.check(self.names, 'done')
            self.daemon.stop()

    def test_wrong_words_are_answered_in_words(self):
        self.three_layers()
        before = {path: self.digest(path) for path in self.files}
        base, middle, top = self.files
        self.assertRegex(self.refused('vm/vda'), f"'{top}' is the image that the VM is started with: say --active")
        self.assertIn(f"live image '{top}'", self.refused('vm/vda', '--active', '--top', middle))
        self.assertIn(f"base '{top}' lies above top '{middle}'", self.refused('vm/vda', '--top', middle, '--base', top))
        self.assertIn('into itself', self.refused('vm/vda', '--top', middle, '--base', middle))
        self.assertIn('into nothing', self.refused('vm/vda', '--top', base, '--shallow'))
        self.assertIn("no image 'nobody'", self.refused('vm/vda', '--top', 'nobody'))
        self.assertIn("no disk 'vdx'", self.refused('vm/vdx', '--active'))
        with self.assertRaisesRegex(QmpError, 'contradict'):
            self.daemon.ask('block-commit', {'vm': 'vm', 'disk': 'vda', 'shallow': True, 'base': base})
        with self.assertRaisesRegex(QmpError, 'no job'):
            self.daemon.ask('job-cancel', {'id': 'qpull-00000000-job0'})
        self.wait_closed(self.daemon)
        self.assertEqual({path: self.digest(path) for path in self.files}, before)
        self.assertEqual(os.listdir(self.folder).count('layer2.qcow2.qpull-new'), 0)
        self.check(self.names)
        self.daemon.stop()

    @staticmethod
    def digest(path):
        return harness.run(['sha256sum', path]).stdout

    def test_a_session_and_a_commit_do_not_meet(self):
        self.slow_layers()
        self.set_plan('none', 0)
        h = nbdpull.connect(self.daemon.uri('vm/vda'))
        self.assertIn('in use by a session', self.refused('vm/vda', '--active'))
        h.shutdown()
        self.wait_closed(self.daemon)
        self.set_plan('slow', SLOW)
        tool = self.begin_commit('--active')
        self.assertIn('being committed', rawnbd.refusal(self.daemon.socket, 'vm/vda'))
        self.assertIn('being committed already', self.refused('vm/vda', '--active'))
        for command in ('checkpoint-create', 'checkpoint-delete'):
            with self.assertRaisesRegex(QmpError, 'busy'):
                self.daemon.ask(command, {'vm': 'vm', 'name': 'old'})
        self.assertEqual({c['reason'] for c in self.daemon.ask('query-checkpoints', {'vm': 'vm'})}, {'NONE'})
        self.daemon.ask('job-cancel', {'id': self.job()['id']})
        self.assertEqual(tool.wait(20), 1)
        tool.communicate()
        self.set_plan('none', 0)
        self.check(self.names)
        self.daemon.stop()

    def test_right_after_a_pull_its_session_makes_way(self):
        self.three_layers()
        nbdpull.pull(self.daemon.uri('vm/vda'))
        self.commit('--active')
        self.check(self.names)
        self.daemon.stop()

    def test_interrupted_it_is_cancelled(self):
        for tool in self.both_ways():
            tool.send_signal(signal.SIGINT)
            _, said = tool.communicate(timeout=20)
            self.assertEqual(tool.returncode, 1)
            self.assertIn('cancelled; the disk is as it was', said)
            self.assertEqual(self.job()['status'], 'concluded')

    def test_the_daemon_is_told_to_stop(self):
        for tool in self.both_ways():
            self.daemon.stop()
            self.assertNotEqual(tool.wait(20), 0)
            tool.communicate()
            self.daemon.start()
            self.await_turn()

    def test_a_terminal_sees_how_far_it_is(self):
        self.slow_layers()
        ours, theirs = os.openpty()
        tool = self.begin_commit('--active', stderr=theirs)
        os.close(theirs)
        seen = b''
        while not re.search(rb'\r\[#*\.+\] .* of .*MiB', seen):
            self.assertTrue(select.select([ours], [], [], 10)[0], seen)
            seen += os.read(ours, 4096)
        self.daemon.ask('job-cancel', {'id': self.job()['id']})
        self.assertEqual(tool.wait(20), 1)
        os.close(ours)
        tool.communicate()
        self.daemon.stop()

    def test_a_vm_that_starts_meanwhile_is_refused_by_the_lock(self):
        for tool in self.both_ways():
            self.disk.path = self.files[-1]
            tried = subprocess.run(self.vm.arguments(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
                                   text=True, check=False)
            self.assertNotEqual(tried.returncode, 0)
            self.assertRegex(tried.stdout, 'Failed to get .*lock')
            self.daemon.ask('job-cancel', {'id': self.job()['id']})
            self.assertEqual(tool.wait(20), 1)
            tool.communicate()

    def test_a_qemu_that_comes_back_without_its_disks_has_the_commit_cancelled(self):
        self.slow_layers()
        tool = self.begin_commit('--active')
        self.disk.path, extra = self.files[-1], self.vm.extra
        self.vm.extra = extra + ['-incoming', 'defer']  # no lock is taken before the migration has come
        self.vm.start()
        _, said = tool.communicate(timeout=30)
        self.assertEqual(tool.returncode, 1)
        self.assertIn('cancelled', said)
        harness.wait_until(lambda: not self.daemon.vm()['powered-off'], 20, 'QEMU\'s turn')
        self.vm.quit()
        self.vm.extra = extra
        self.set_plan('none', 0)
        self.await_turn()
        self.check(self.names)
        self.daemon.stop()

    def test_images_that_a_qemu_has_open_are_not_committed(self):
        self.three_layers()
        self.disk.path = self.files[-1]
        self.vm.start()
        harness.wait_until(lambda: not self.daemon.vm()['powered-off'], 20, 'QEMU\'s turn')
        alone = self.qpulld({}, flags=[f'--image=vm/vda={self.files[-1]}'], name='alone')
        for flags in (['--active'], ['--top', self.files[1]]):
            done = alone.qpull('commit', 'vm/vda', *flags, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, f'in use by qemu-system.*PID {self.vm.process.pid}')
        alone.stop()
        self.is_off = False
        self.nodes = [self.disk.node]
        self.daemon.wait_idle()
        self.check(self.names)
        self.daemon.stop()

    def reader(self, path):
        """Has this image open, and nothing below it."""
        socket = f'{self.folder}/reader{self.life}.nbd'
        node = {'driver': 'qcow2', 'backing': None, 'file': {'driver': 'file', 'filename': path}}
        process = harness.spawn(['qemu-nbd', '-r', '-t', '-k', socket, f'json:{json.dumps(node)}'])
        # qemu-nbd listens before it opens the image, and answers when it has.
        words = ['nbdinfo', '--size', nbdpull.unix_uri(socket, '')]
        harness.wait_until(lambda: harness.run(words, check=False).returncode == 0, 20, 'the reader')
        return process

    def test_a_base_that_others_read_is_not_written_to(self):
        self.three_layers()
        reader = self.reader(self.files[0])
        for flags in (['--active'], ['--top', self.files[1]]):
            self.assertRegex(self.refused('vm/vda', *flags), f'{self.files[0]}.*in use by another process.*lock')
        reader.kill()
        reader.wait()
        self.wait_closed(self.daemon)
        self.check(self.names)
        self.commit('--active')
        self.check(self.names)
        self.daemon.stop()

    def test_an_image_that_others_read_is_not_deleted(self):
        self.three_layers()
        reader = self.reader(self.files[-1])
        done = self.commit('--active', '--delete', check=False)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, f'{self.files[-1]}.* is not deleted.*lock')
        reader.kill()
        reader.wait()
        self.wait_closed(self.daemon)
        self.assertEqual([os.path.exists(f) for f in self.files], [True, True, True])
        self.check(self.names)
        self.daemon.stop()

    @staticmethod
    def mark(path):
        """With an attribute of its own, where the file system has such."""
        try:
            os.setxattr(path, 'user.whose', b'mine')
            return True
        except OSError:
            return False

    def test_the_empty_image_is_like_the_one_before(self):
        kinds = ('cluster_size=4096', 'cluster_size=131072,extended_l2=on', 'compat=0.10', 'lazy_refcounts=on,refcount_bits=8',
                 'compression_type=zstd')
        for kind in kinds:
            self.begin()
            self.checkpoint('old')
            self.snapshot([])
            self.work()
            self.snapshot(['old'] if 'compat' not in kind else [], options=kind)
            self.work()
            self.power_off()
            top = self.files[-1]
            with open(self.files[1], 'r+b'):
                harness.run(['qemu-img', 'rebase', '-u', '-b', os.path.basename(self.files[0]), '-F', 'qcow2',
                             self.files[1]])
            os.chmod(top, 0o640)
            marked = self.mark(top)
            if os.getuid() == 0:
                os.chown(top, 1234, 5678)
            was, before = info(top), os.stat(top)
            os.rename(top, f'{self.folder}/elsewhere{self.life}')
            os.symlink(f'{self.folder}/elsewhere{self.life}', top)
            self.serve()
            self.check(self.names)
            with open(top, 'rb', buffering=0) as early:  # by a QEMU that waits for the lock, say
                self.commit('--active')
                self.assertEqual((early.read(4), os.fstat(early.fileno()).st_nlink), (bytes(4), 0))
            self.wait_closed(self.daemon)
            self.assertTrue(os.path.islink(top))
            now, after = info(top), os.stat(top)
            for one in (was, now):
                one['format-specific']['data'].pop('bitmaps', None)
            for key in ('virtual-size', 'cluster-size', 'format', 'format-specific', 'backing-filename-format'):
                self.assertEqual(now[key], was[key], key)
            self.assertEqual(now['backing-filename'], os.path.basename(self.files[0]))
            self.assertEqual([getattr(after, k) for k in ('st_mode', 'st_uid', 'st_gid')],
                             [getattr(before, k) for k in ('st_mode', 'st_uid', 'st_gid')])
            self.assertEqual(os.getxattr(top, 'user.whose') if marked else b'mine', b'mine')
            self.assertEqual(stat.S_IMODE(after.st_mode), 0o640)
            del self.files[1]
            self.check(self.names, kind)
            self.check_images()
            self.daemon.stop()

    def test_an_image_that_cannot_be_emptied_is_refused_before_anything_is_done(self):
        def snapshots(path):
            harness.run(['qemu-img', 'snapshot', '-c', 'inside', path])

        def links(path):
            os.link(path, f'{path}.again')

        rows = ((snapshots, '', 'internal snapshots'), (links, '', 'several names'),
                (lambda path: None, f'data_file={self.folder}/data', 'in another file'))
        for change, options, words in rows:
            self.begin()
            self.checkpoint('old')
            self.work()
            self.power_off()
            top = f'{self.folder}/top{self.life}.qcow2'
            harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', self.files[0], '-F', 'qcow2',
                         *(['-o', options] if options else []), top])
            harness.run(['qemu-io', '-f', 'qcow2', '-c', 'write -P 77 0 64k', top])
            self.disk.model.image[0:65536] = b'\x4d' * 65536
            self.files.append(top)
            change(top)
            self.serve()
            before = [self.digest(p) for p in self.files]
            self.assertRegex(self.refused('vm/vda', '--active'), f'cannot be made empty.*{words}.*say --delete')
            self.wait_closed(self.daemon)
            self.assertEqual([self.digest(p) for p in self.files], before)
            self.check(self.names)
            self.commit('--active', '--delete')
            self.assertFalse(os.path.exists(top))
            self.files.pop()
            self.assertSame(content(self.files[0]), self.disk.model.image)
            self.daemon.stop()

    def test_what_is_in_the_way_of_an_empty_image_stops_the_commit(self):
        self.three_layers()
        os.mkdir(f'{self.files[-1]}.qpull-new')
        self.assertIn('an empty image cannot be made', self.refused('vm/vda', '--active'))
        os.rmdir(f'{self.files[-1]}.qpull-new')
        with open(f'{self.files[-1]}.qpull-new', 'w', encoding='utf-8') as f:
            f.write('left by a commit that was killed')
        self.wait_closed(self.daemon)
        self.check(self.names)
        self.assertFalse(os.path.exists(f'{self.files[-1]}.qpull-new'))
        self.daemon.stop()

    def test_merged_images_are_deleted_and_the_daemon_says_what_is_missing(self):
        self.three_layers()
        told = self.daemon.json('commit', 'vm/vda', '--active', '--delete')
        self.assertEqual((set(told['deleted']), told['emptied'], told['base-file']),
                         (set(self.files[1:]), None, self.files[0]))
        self.assertIn(f'{self.files[-1]}', self.daemon.qpull('disks', 'vm', check=False).stderr)
        del self.files[1:]
        self.wait_closed(self.daemon)
        self.daemon.stop()
        self.serve()
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
            self.power_off()
            self.serve()
            self.check(['lost', 'kept'])
            self.assertIn('--force', self.refused('vm/vda', '--top', self.files[1]))
            self.commit('--top', self.files[1], '--force')
            self.assertEqual(self.states(), {'lost': 'broken', 'kept': 'kept'})
            del self.files[1]
            self.check(['kept'])
            self.assertIn('--force', self.refused('vm/vda', '--active'))
            self.commit('--active', '--force')
            self.check([])
            self.power_on()
            self.await_turn()
            self.work()
            self.check([])
            self.vm.quit()
            self.is_off = True
            self.check_images()
            self.daemon.stop()
            self.is_off = False

    def test_base_is_stored_before_the_image_above_names_it(self):
        """A kill -9 right after the overlay has been changed: too short a time to be met, so that is done by hand."""
        self.three_layers()
        self.set_plan('before', 'job-finalize')
        done = self.commit('--top', self.files[1], check=False)
        self.assertEqual(done.returncode, 1)
        self.wait_closed(self.daemon)
        self.set_plan('none', 0)
        harness.run(['qemu-img', 'rebase', '-u', '-b', self.files[0], '-F', 'qcow2', self.files[2]])
        self.assertSame(content(self.files[2]), self.disk.model.image)
        self.assertEqual(harness.run(['qemu-img', 'check', '-q', self.files[0]], check=False).returncode in (0, 3), True)
        self.daemon.stop()
        self.life += 1  # whose memory of the disk would help
        self.serve(name='fresh')
        self.check(when='graph without records')
        self.daemon.stop()


if __name__ == '__main__':
    harness.main()
