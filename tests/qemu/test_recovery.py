#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU goes away, comes back, is busy with somebody else, or belongs to others, too."""
import signal
import subprocess
import time

import harness
import nbd
import nbdpull
import rawnbd
from harness import MIB, Disk

SOON = 5  # seconds: "quickly" for a client that lost its disk


class Recovery(harness.Case):
    def expect_errors_soon(self, handle):
        """Reads fail instead of hanging, and the connection ends."""
        began = time.monotonic()
        with self.assertRaises(nbd.Error):
            while True:
                handle.pread(MIB, 0)
        self.assertLess(time.monotonic() - began, SOON)
        with self.assertRaises(nbd.Error):
            handle.pread(512, 0)

    def pull_and_compare(self, guest, daemon, what):
        self.assertModel(guest.disks['vda'].model, nbdpull.pull(daemon.uri('vm/vda')), what)
        daemon.wait_idle()

    def test_qemu_crashes_under_a_pull_and_comes_back(self):
        guest = self.bare(Disk('vda', 32 * MIB))
        guest.write('vda', 0, 8 * MIB, 1)
        daemon = self.qpulld(guest, linger=0)
        for how in (guest.kill, guest.quit):
            h = nbdpull.connect(daemon.uri('vm/vda@never'))
            h.pread(MIB, 0)
            how()
            self.expect_errors_soon(h)
            harness.wait_until(lambda: not daemon.vm()['connected'], SOON, 'the loss')
            self.assertRegex(daemon.vm()['reason'], r'vm\.qmp')
            self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda'), r'vm\.qmp')
            harness.wait_until(lambda: daemon.vm()['session'] is None, 20, 'the end of the session')
            guest.start()
            daemon.wait_idle(10)
            self.assertEqual(daemon.files_left(), [])
            self.assertEqual(harness.bitmaps(guest.look), {})
            self.pull_and_compare(guest, daemon, 'after QEMU came back')
        daemon.stop()

    def test_qemu_starts_after_the_daemon(self):
        guest = self.bare()
        guest.quit()
        daemon = self.qpulld(guest, linger=0)
        self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda'), r'vm\.qmp')
        self.assertEqual(harness.run(['nbdinfo', '--list', daemon.uri('')]).stdout.count('export='), 0)
        guest.start()
        daemon.wait_idle(10)
        self.pull_and_compare(guest, daemon, 'a late QEMU')

    def test_the_guest_shuts_down_and_resets_under_a_pull(self):
        guest = self.guest(Disk('vda', 32 * MIB))
        guest.write('vda', 0, 4 * MIB, 1)
        guest.flush('vda')
        before = guest.state()
        daemon = self.qpulld(guest, linger=0)
        frozen = bytes(guest.disks['vda'].model.image)
        h = nbdpull.connect(daemon.uri('vm/vda@monday'))
        guest.write('vda', MIB, MIB, 2)
        guest.flush('vda')
        guest.look('system_reset')
        guest.look.wait_event('RESET')
        guest.wait_ready()
        guest.write('vda', 2 * MIB, MIB, 3)
        self.assertSame(nbdpull.read_all(h), frozen, 'a session over a reset')
        h.shutdown()
        daemon.wait_idle()
        self.assertEqual(len(guest.look('query-named-block-nodes', {'flat': True})), len(before['nodes']))
        guest.check()
        h = nbdpull.connect(daemon.uri('vm/vda@never'))
        h.pread(MIB, 0)
        guest.write('vda', 3 * MIB, MIB, 4)
        guest.poweroff()  # QEMU must end by itself, with status 0
        self.expect_errors_soon(h)
        self.assertModel(guest.disks['vda'].model, self.raw(guest.disks['vda']), 'the image')
        info = harness.run(['qemu-img', 'info', guest.disks['vda'].path]).stdout
        self.assertIn('monday', info)
        self.assertNotIn('never', info)
        self.assertNotIn('in-use', info)
        self.assertNotIn('name: qpull-', info)
        harness.run(['qemu-img', 'check', '-q', guest.disks['vda'].path])

    def test_a_monitor_that_somebody_else_uses_is_named_and_used_when_it_is_free(self):
        guest = self.bare()
        other = harness.Qmp(guest.qmp_path)
        daemon = self.qpulld(guest, linger=0)
        words = harness.wait_until(lambda: daemon.vm()['reason'] and 'greeting' in daemon.vm()['reason'] and
                                   daemon.vm()['reason'], 60, 'words about the silent monitor')
        self.assertRegex(words, r'vm\.qmp.*(another|other) client')
        self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda'), r'(another|other) client')
        self.assertRegex(daemon.qpull('vms').stdout, r'(another|other) client')
        other.close()
        daemon.wait_idle(30)
        self.pull_and_compare(guest, daemon, 'the monitor is free')

    def test_an_nbd_server_of_somebody_else_stays_as_it_is(self):
        guest = self.bare(Disk('vda', 16 * MIB), Disk('vdb', 16 * MIB))
        path = f'{self.folder}/theirs'
        guest.look('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': path}}})
        guest.look('block-export-add', {'type': 'nbd', 'id': 'theirs', 'node-name': 'node-vdb', 'name': 'theirs'})
        before = guest.state()
        daemon = self.qpulld(guest, linger=0)
        self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda@monday'), '(?i)nbd server')
        daemon.wait_idle()
        daemon.kill()
        daemon.start()
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)
        size = harness.run(['nbdinfo', '--size', nbdpull.unix_uri(path, 'theirs')]).stdout
        self.assertEqual(int(size), 16 * MIB)
        guest.look('block-export-del', {'id': 'theirs'})
        guest.look('nbd-server-stop')
        self.pull_and_compare(guest, daemon, 'their server is gone')

    def test_objects_of_others_are_not_touched(self):
        guest = self.bare(Disk('vda', 16 * MIB))
        look = guest.look
        with open(f'{self.folder}/their.fd', 'w+b') as file:
            file.truncate(MIB)
            harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', f'{self.folder}/theirs.qcow2', '4M'])
            look('blockdev-add', {'driver': 'qcow2', 'node-name': 'theirs',
                                  'file': {'driver': 'file', 'filename': f'{self.folder}/theirs.qcow2'}})
            look('blockdev-add', {'driver': 'null-co', 'node-name': 'qpullish', 'size': 4 * MIB, 'read-zeroes': True})
            look('blockdev-add', {'driver': 'null-co', 'node-name': 'sink', 'size': 4 * MIB})
            for node, name in (('node-vda', 'theirs'), ('theirs', 'their bitmap'), ('node-vda', 'qpul-keep0')):
                look('block-dirty-bitmap-add', {'node': node, 'name': name})
            look('object-add', {'qom-type': 'throttle-group', 'id': 'group'})
            look('blockdev-add', {'driver': 'throttle', 'node-name': 'slow', 'throttle-group': 'group',
                                  'file': 'qpullish'})
            # A job that runs for ever: a mirror that is never completed.
            look('blockdev-mirror', {'job-id': 'their-job', 'device': 'slow', 'target': 'sink', 'sync': 'full'})
            look.wait_event('BLOCK_JOB_READY')
            before = guest.state()
            daemon = self.qpulld(guest, linger=0)
            daemon.wait_idle()
            for _ in range(3):
                h = nbdpull.connect(daemon.uri('vm/vda@never'))
                h.pread(MIB, 0)
                self.assertNotEqual(guest.state(), before)
                daemon.kill()
                daemon.start()
                daemon.wait_idle()
                self.assertNothingLeft(guest, daemon, before)
            self.pull_and_compare(guest, daemon, 'beside the things of others')
            self.assertNothingLeft(guest, daemon, before)
            look('block-job-cancel', {'device': 'their-job', 'force': True})

    def test_a_snapshot_that_somebody_takes_during_a_session_stays(self):
        guest = self.bare(Disk('vda', 16 * MIB))
        guest.write('vda', 0, MIB, 1)
        daemon = self.qpulld(guest, linger=0)
        frozen = bytes(guest.disks['vda'].model.image)
        h = nbdpull.connect(daemon.uri('vm/vda@monday'))
        guest.look('blockdev-snapshot-sync', {'node-name': 'node-vda', 'snapshot-file': f'{self.folder}/over.qcow2',
                                              'snapshot-node-name': 'over', 'format': 'qcow2'})
        guest.write('vda', 0, 2 * MIB, 2)
        self.assertSame(nbdpull.read_all(h), frozen, 'the frozen disk')
        h.shutdown()
        daemon.wait_idle()
        state = guest.state()
        self.assertEqual([d['root'] for d in state['devices'].values()], ['over'])
        self.assertEqual([n for n in state['nodes'] if n.startswith('qpull-')], [])
        self.assertEqual((state['exports'], state['fdsets'], guest.deleted_fds()), ([], [], []))
        self.pull_and_compare(guest, daemon, 'the disk with its overlay')
        self.assertEqual(daemon.vm()['last-session']['problems'], None)

    def test_a_client_of_a_stopped_qemu_waits_and_the_daemon_lives(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=0)
        nbdpull.pull(daemon.uri('vm/vda'))
        daemon.wait_idle()
        before = guest.state()
        guest.process.send_signal(signal.SIGSTOP)
        try:
            client = harness.spawn(['nbdinfo', '--size', daemon.uri('vm/vda@never')], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
            time.sleep(0.5)
            self.assertEqual(daemon.vm()['name'], 'vm')  # it answers
            client.kill()
            client.wait()
        finally:
            guest.process.send_signal(signal.SIGCONT)
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)


if __name__ == '__main__':
    harness.main()
