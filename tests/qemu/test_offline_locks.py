#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
"""Who may touch an image: the running QEMU before all, a guest that starts soon after a pull, and nobody at once with
another."""
import itertools
import os
import subprocess
import threading
import time

import harness
import nbd
import nbdpull
import qmpclient
import rawnbd
from harness import MIB, Disk
from offline import OfflineCase, content, is_alive, records, storage_daemons

SOON = 3  # seconds: how long a guest's start may have to wait after the last reader has left


class Locks(OfflineCase):
    def image(self, name='a.qcow2', fmt='qcow2', size=8 * MIB):
        path = f'{self.folder}/{name}'
        harness.run(['qemu-img', 'create', '-q', '-f', fmt, path, str(size)])
        return path

    def test_images_of_a_running_guest_are_refused_and_the_guest_does_not_notice(self):
        guest = self.guest(Disk('vda', 8 * MIB), Disk('vdb', 8 * MIB, fmt='raw'))
        for name, disk in guest.disks.items():
            daemon = self.serve({name: disk.path}, name=f'q{name}')
            load = guest.load(name, unit=4096, max=65536)
            for _ in range(3):
                words = rawnbd.refusal(daemon.socket, f'vm/{name}@monday')
                self.assertRegex(words, f'{disk.path}.*in use by qemu-system.*PID {guest.process.pid}.*--vm vm=')
                told = daemon.qpull('checkpoint', 'create', 'vm', 'tuesday', check=False)
                self.assertRegex(told.stderr, disk.path)
            self.wait_closed(daemon)
            self.assertEqual(load.stop()['errors'], 0)
            self.assertEqual(harness.bitmaps(guest.look), {})
            daemon.stop()
        guest.check()
        guest.poweroff()
        self.check(guest.disks['vda'].path)
        self.assertModel(guest.disks['vda'].model, self.raw(guest.disks['vda']))

    def test_a_guest_cannot_start_under_a_pull_and_can_right_after_it(self):
        for fmt in ('qcow2', 'raw'):
            disk = Disk('vda', 8 * MIB, fmt=fmt)
            guest = self.bare(disk, name=f'vm{fmt}')
            guest.write('vda', 0, 4 * MIB, 7)
            guest.quit()
            daemon = self.serve({'vda': disk.path}, name=f'q{fmt}')
            h = nbdpull.connect(daemon.uri('vm/vda'))
            h.pread(512, 0)
            tried = subprocess.run(guest.arguments(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
                                   text=True, check=False)
            self.assertNotEqual(tried.returncode, 0)
            self.assertRegex(tried.stdout, 'Failed to get .*"write" lock')
            self.assertModel(disk.model, nbdpull.read_all(h), 'the pull beside it')
            h.shutdown()
            began = time.monotonic()
            while True:  # as a user would: again and again
                tried = subprocess.run(['qemu-io', '-f', fmt, '-c', 'read 0 512', disk.path], stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, timeout=60, check=False)
                if tried.returncode == 0 or time.monotonic() - began > 30:
                    break
            self.assertLess(time.monotonic() - began, SOON)
            guest.start()
            self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda'), 'in use by qemu-system')
            guest.write('vda', 0, MIB, 8)
            guest.quit()
            self.assertModel(disk.model, nbdpull.pull(daemon.uri('vm/vda')), 'after the guest')
            self.wait_closed(daemon)
            daemon.stop()

    def test_nobody_holds_an_image_that_nobody_asks_for(self):
        path = self.image()
        daemon = self.serve({'vda': path})
        daemon.qpull('vms')
        self.assertEqual(storage_daemons(daemon), [])
        daemon.qpull('disks', 'vm')
        began = time.monotonic()
        self.wait_closed(daemon)
        self.assertLess(time.monotonic() - began, SOON)
        daemon.stop()

    def test_the_running_qemu_wins_and_its_images_serve_when_it_is_gone(self):
        disk = Disk('vda', 8 * MIB)
        guest = self.bare(disk)
        guest.write('vda', 0, MIB, 1)
        daemon = self.qpulld(guest, linger=0, flags=[f'--image=vm/vda={disk.path}'])
        for turn in range(3):
            daemon.wait_idle()
            self.assertEqual([d['node'] for d in daemon.ask('query-disks', {'vm': 'vm'})], ['node-vda'])
            nbdpull.pull(daemon.uri(f'vm/vda@on{turn}'))
            self.assertEqual(storage_daemons(daemon), [])
            self.assertFalse(daemon.vm()['powered-off'])
            daemon.wait_idle()
            guest.write('vda', turn * MIB, MIB, 10 + turn)
            guest.quit()
            harness.wait_until(lambda: daemon.vm()['powered-off'], 10, 'the images\' turn')
            self.assertIn('powered off', daemon.qpull('vms').stdout)
            self.assertModel(disk.model, nbdpull.pull(daemon.uri(f'vm/vda@off{turn}')), f'turn {turn}')
            self.wait_closed(daemon)
            guest.start()
        self.assertEqual(set(harness.bitmaps(guest.look)),
                         {('node-vda', f'{w}{t}') for w in ('on', 'off') for t in range(3)})
        daemon.stop()

    def test_a_daemon_that_starts_beside_a_powered_off_vm_makes_its_first_client_wait_and_serves_it(self):
        disk = Disk('vda', 4 * MIB)
        guest = self.bare(disk)
        guest.write('vda', 0, MIB, 3)
        guest.quit()
        daemon = self.qpulld(guest, linger=0, flags=[f'--image=vm/vda={disk.path}'])
        self.assertModel(disk.model, nbdpull.pull(daemon.uri('vm/vda')), 'at once')
        self.wait_closed(daemon)
        daemon.stop()

    def test_while_somebody_listens_at_the_qmp_socket_the_images_are_not_touched(self):
        disk = Disk('vda', 4 * MIB)
        guest = self.bare(disk)
        other = harness.Qmp(guest.qmp_path)  # holds the monitor, so that it never speaks to the daemon
        daemon = self.qpulld(guest, linger=0, flags=[f'--image=vm/vda={disk.path}'])
        harness.wait_until(lambda: daemon.vm()['reason'] and 'greeting' in daemon.vm()['reason'], 60, 'the reason')
        self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda'), r'(another|other) client')
        self.assertNotIn('images', daemon.vm()['state'])
        self.assertEqual(storage_daemons(daemon), [])
        with open(daemon.log_path, encoding='utf-8') as f:
            self.assertNotIn('images: closed', f.read())
        other.close()
        daemon.wait_idle(30)
        daemon.stop()

    def test_a_qemu_that_comes_back_without_its_disks_makes_the_images_go_at_once(self):
        disk = Disk('vda', 8 * MIB)
        guest = self.bare(disk)
        guest.write('vda', 0, MIB, 3)
        guest.quit()
        daemon = self.qpulld(guest, linger=0, flags=[f'--image=vm/vda={disk.path}'])
        harness.wait_until(lambda: daemon.vm()['powered-off'], 10, 'the images\' turn')
        h = nbdpull.connect(daemon.uri('vm/vda@never'))
        h.pread(512, 0)
        pid = self.the_process(daemon)
        guest.extra += ['-incoming', 'defer']  # no lock is taken before the migration has come
        guest.start()
        self.wait_gone(pid)
        with self.assertRaises(nbd.Error):
            for _ in range(1000):
                h.pread(MIB, 0)
        self.assertFalse(daemon.vm()['powered-off'])
        with open(daemon.log_path, encoding='utf-8') as f:
            self.assertRegex(f.read(), 'was started: its images are let go')
        guest.quit()
        self.assertEqual(records(disk.path), {})
        daemon.stop()

    def test_a_second_reader_is_no_hindrance_but_a_checkpoint_needs_the_image_alone(self):
        path = self.image()
        daemon = self.serve({'vda': path})
        reader = harness.spawn(['qemu-storage-daemon', '--blockdev',
                                f'driver=qcow2,node-name=n,read-only=on,file.driver=file,file.filename={path}',
                                '--chardev', f'socket,id=m,path={self.folder}/reader,server=on,wait=off',
                                '--monitor', 'chardev=m'])
        harness.wait_until(lambda: self.can_talk(f'{self.folder}/reader'), 20, 'the reader')
        self.assertEqual(nbdpull.pull(daemon.uri('vm/vda@monday')), bytes(8 * MIB))
        self.wait_closed(daemon)
        self.assertRegex(daemon.vm()['last-session']['problems'], 'monday.*vda.*not kept.*lock')
        with self.assertRaisesRegex(qmpclient.QmpError, f'{path} is in use by another process.*vda.*lock'):
            daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'monday'})
        reader.kill()
        reader.wait()
        self.wait_closed(daemon)
        self.assertEqual(records(path), {})
        daemon.qpull('checkpoint', 'create', 'vm', 'monday')
        self.wait_closed(daemon)
        self.assertEqual(records(path), {'monday': {'auto'}})
        self.assertEqual(content(path), bytes(8 * MIB))
        daemon.stop()

    @staticmethod
    def can_talk(path):
        try:
            harness.Qmp(path).close()
            return True
        except OSError:
            return False


class Deaths(OfflineCase):
    """kill -9 of either process, at moments that hurt."""

    def setUp(self):
        self.path = f'{self.folder}/a.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', self.path, '32M'])
        harness.run(['qemu-io', '-c', 'write -P 3 0 32M', self.path])
        harness.run(['qemu-img', 'bitmap', '--add', self.path, 'old'])

    def still_right(self, names=('old',)):
        self.assertEqual(records(self.path), {n: {'auto'} for n in names})
        self.check(self.path)
        self.assertEqual(content(self.path), b'\3' * (32 * MIB))

    def test_a_storage_daemon_that_is_killed_under_a_pull_is_told_and_hurts_no_record(self):
        daemon = self.serve({'vda': self.path})
        for sent in ('KILL', 'SEGV', 'TERM'):
            h = nbdpull.connect(daemon.uri('vm/vda@never'), [nbdpull.dirty_context('old')])
            h.pread(MIB, 0)
            pid = self.the_process(daemon)
            harness.run(['kill', f'-{sent}', str(pid)])
            began = time.monotonic()
            with self.assertRaises(nbd.Error):
                for _ in range(10000):
                    h.pread(MIB, 0)
            self.assertLess(time.monotonic() - began, 10)
            self.wait_closed(daemon)
            self.still_right()
        with open(daemon.log_path, encoding='utf-8') as f:
            self.assertRegex(f.read(), r'qemu-storage-daemon that holds the images of VM .vm. was ended by signal 9')
        nbdpull.pull(daemon.uri('vm/vda@monday'))
        self.wait_closed(daemon)
        self.still_right(('old', 'monday'))
        daemon.stop()

    def test_a_qpulld_that_is_killed_takes_its_storage_daemon_with_it(self):
        daemon = self.serve({'vda': self.path})
        for _ in range(3):
            h = nbdpull.connect(daemon.uri('vm/vda@never'))
            h.pread(MIB, 0)
            pid = self.the_process(daemon)
            daemon.kill()
            self.wait_gone(pid)
            self.still_right()
            daemon.start()
            nbdpull.pull(daemon.uri('vm/vda'))
            self.wait_closed(daemon)
        daemon.stop()

    def test_a_qpulld_that_is_killed_at_any_moment_of_the_storage_daemon_s_start_leaves_none(self):
        os.environ['QPULL_TEST_MARK'] = self.folder  # inherited by all that the daemon starts
        daemon = self.serve({'vda': self.path})
        began, started = time.monotonic(), 0
        daemon.qpull('disks', 'vm')
        whole = time.monotonic() - began  # of a start, on this machine
        self.wait_closed(daemon)
        for _ in range(30):
            client = harness.spawn([f'{harness.bin_dir()}/qpull', '--control', daemon.control, 'disks', 'vm'],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(harness.rng.random() * whole)
            started += len(self.marked())
            daemon.kill()
            client.wait()
            harness.wait_until(lambda: not self.marked(), 10, 'the end of what it started')
            daemon.start()
        self.assertGreater(started, 0)
        daemon.stop()
        self.still_right()

    def marked(self):
        """Living storage daemons, or what was to become one, that a daemon of this test has started."""
        found = []
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                with open(f'/proc/{pid}/environ', 'rb') as f:
                    ours = f'QPULL_TEST_MARK={self.folder}'.encode() in f.read()
                with open(f'/proc/{pid}/cmdline', 'rb') as f:
                    ours = ours and b'storage-daemon\0' in f.read()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if ours and is_alive(pid):
                found.append(int(pid))
        return found

    def test_the_end_in_order_during_a_pull_leaves_nothing(self):
        daemon = self.serve({'vda': self.path})
        h = nbdpull.connect(daemon.uri('vm/vda@never'))
        h.pread(MIB, 0)
        pid = self.the_process(daemon)
        daemon.stop()
        self.assertFalse(is_alive(pid))
        self.still_right()

    @staticmethod
    def change_until(daemon, stop, turn):
        """Makes and deletes checkpoints; what fails has failed because somebody was killed."""
        for i in itertools.count():
            for verb in ('create', 'delete'):
                if stop.is_set():
                    return
                daemon.qpull('checkpoint', verb, 'vm', f't{turn}-{i}', check=False)

    def kill_while_changing(self, kill, turns=12):
        """Checkpoints come and go; kill(daemon) strikes within that."""
        outcomes = set()
        daemon = self.serve({'vda': self.path})
        for turn in range(turns):
            stop = threading.Event()
            worker = threading.Thread(target=self.change_until, args=(daemon, stop, turn))
            worker.start()
            harness.wait_until(lambda: storage_daemons(daemon), 20, 'the first change')
            pids = storage_daemons(daemon)
            time.sleep(harness.rng.random() * 0.25)
            kill(daemon, pids)
            stop.set()
            worker.join()
            for pid in pids:
                self.wait_gone(pid)
            if daemon.process.poll() is not None:
                daemon.start()
            harness.wait_until(lambda: daemon.vm()['state'] == 'closed', 20, 'the images\' end')
            told = self.reasons(daemon)
            self.wait_closed(daemon)
            found = records(self.path)
            self.assertEqual({n for (_, n), reason in told.items() if reason != 'NO_SUCH_CHECKPOINT'}, set(found))
            for (_, name), reason in told.items():
                if reason != 'NO_SUCH_CHECKPOINT':  # the note of a record that is deleted already
                    self.assertIn(reason, ('NONE', 'INCONSISTENT'))
                    self.assertEqual('in-use' in found[name], reason == 'INCONSISTENT', name)
                    outcomes.add(reason)
                daemon.qpull('checkpoint', 'delete', 'vm', name)
            self.wait_closed(daemon)
            self.assertEqual(records(self.path), {})
            # Clusters may be leaked, as by every kill of a qcow2 image's writer (exit status 3); no more than that.
            status = harness.run(['qemu-img', 'check', '-q', self.path], check=False).returncode
            self.assertIn(status, (0, 3))
            if status:
                harness.run(['qemu-img', 'check', '-q', '-r', 'leaks', self.path])
            daemon.qpull('checkpoint', 'create', 'vm', 'old')
            self.wait_closed(daemon)
            self.still_right()
        daemon.stop()
        return outcomes

    def test_a_storage_daemon_killed_in_mid_change_leaves_records_that_are_right_or_known_not_to_be(self):
        self.kill_while_changing(lambda daemon, pids: [harness.run(['kill', '-9', str(p)], check=False) for p in pids])

    def test_a_qpulld_killed_in_mid_change_leaves_records_that_are_right(self):
        outcomes = self.kill_while_changing(lambda daemon, pids: daemon.kill())
        self.assertEqual(outcomes, {'NONE'})  # the storage daemon ends in order


if __name__ == '__main__':
    harness.main()
