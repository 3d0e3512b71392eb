#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""qpull doctor: each thing that can be wrong is broken on purpose, and must be named with what to do."""
import json
import os
import re
import signal
import subprocess

import harness
import nbdpull
from harness import MIB, Disk
from poorqemu import PoorQemu, without


class Doctor(harness.Case):
    def consult(self, daemon, *vm):
        """(exit status, rows as {check: [row, …]})"""
        done = daemon.qpull('doctor', *vm, '--json', check=False)
        rows = {}
        for row in json.loads(done.stdout):
            rows.setdefault(row['check'], []).append(row)
        self.assertEqual(done.returncode, int(any(r['verdict'] == 'wrong' for c in rows.values() for r in c)))
        return done.returncode, rows

    def expect_wrong(self, daemon, check, words, advice, disk=None):
        status, rows = self.consult(daemon)
        self.assertEqual(status, 1, rows)
        found = [r for r in rows[check] if r['verdict'] == 'wrong']
        self.assertEqual(len(found), 1, rows)
        self.assertRegex(found[0]['text'], words)
        self.assertRegex(found[0]['advice'], advice)
        self.assertEqual(found[0]['disk'], disk)
        others = [r for c in rows.values() for r in c if r['verdict'] == 'wrong' and r is not found[0]]
        self.assertEqual(others, [], 'nothing else is wrong')
        return rows

    def expect_well(self, daemon):
        status, rows = self.consult(daemon)
        self.assertEqual(status, 0, rows)
        return rows

    def test_all_is_well_and_the_self_test_has_run(self):
        guest = self.bare(Disk('vda', 16 * MIB), Disk('vdb', 8 * MIB, fmt='raw'))
        daemon = self.qpulld(guest, linger=0)
        daemon.wait_idle()
        before = guest.state()
        self.assertIsNone(daemon.vm()['narrow-reads'])
        rows = self.expect_well(daemon)
        self.assertEqual(guest.state(), before)
        self.assertIsNotNone(daemon.vm()['narrow-reads'])
        for check in ('daemon', 'scratch', 'state', 'qmp', 'engine', 'disks', 'checkpoints', 'leftovers', 'nbd server',
                      'self-test', 'iothreads'):
            self.assertIn(check, rows)
        self.assertEqual([(r['disk'], r['verdict']) for r in rows['disks']], [('vda', 'ok'), ('vdb', 'note')])
        self.assertRegex(rows['disks'][1]['text'], 'raw: keeps no checkpoints')
        self.assertRegex(rows['engine'][0]['text'], '^copy-before-write: ')
        text = daemon.qpull('doctor', 'vm').stdout
        self.assertRegex(text, r'note +vm/vdb +disks +raw: keeps no')
        self.assertRegex(text, r'\n +-> convert it to qcow2')
        self.assertRegex(text, 'all is well')
        h = nbdpull.connect(daemon.uri('vm/vda'))  # in the middle of a session
        rows = self.expect_well(daemon)
        self.assertRegex(rows['nbd server'][0]['text'], 'ours')
        h.shutdown()
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)
        daemon.stop()

    def test_a_daemon_that_is_not_there_and_a_vm_that_is_not_known(self):
        guest = self.bare()
        daemon = self.qpulld(guest)
        done = daemon.qpull('doctor', 'nosuch', check=False)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, 'no VM "nosuch"')
        daemon.stop()
        done = daemon.qpull('doctor', check=False)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, 'cannot reach qpulld at .*: is it running')

    def test_a_qemu_that_is_not_there(self):
        guest = self.bare()
        daemon = self.qpulld(guest)
        daemon.wait_idle()
        guest.quit()
        harness.wait_until(lambda: re.search('No such file|refused', daemon.vm()['reason'] or ''), 20, 'a new attempt')
        self.expect_wrong(daemon, 'qmp', r'vm\.qmp', 'start the VM')
        daemon.stop()

    def test_a_monitor_that_somebody_else_uses(self):
        guest = self.bare()
        other = harness.Qmp(guest.qmp_path)
        daemon = self.qpulld(guest)
        harness.wait_until(lambda: daemon.vm()['reason'] and 'greeting' in daemon.vm()['reason'], 60, 'the reason')
        self.expect_wrong(daemon, 'qmp', '(another|other) client', 'a monitor of its own')
        other.close()
        daemon.stop()

    def test_a_qemu_that_does_not_answer(self):
        guest = self.bare()
        daemon = self.qpulld(guest)
        daemon.wait_idle()
        os.kill(guest.process.pid, signal.SIGSTOP)
        try:
            self.expect_wrong(daemon, 'answers', 'within 20 seconds', 'query-status')
        finally:
            os.kill(guest.process.pid, signal.SIGCONT)
        harness.wait_until(lambda: self.consult(daemon)[0] == 0, 60, 'an answer')
        daemon.stop()

    def test_a_qemu_that_lacks_what_every_engine_needs(self):
        guest = self.bare()
        proxy = PoorQemu(self.folder, guest, without('snapshot-access'))
        self.addCleanup(proxy.close)
        daemon = self.qpulld({'vm': proxy})
        daemon.wait_idle()
        rows = self.expect_wrong(daemon, 'engine', 'lacks snapshot-access', 'update QEMU')
        self.assertNotIn('self-test', rows)
        daemon.stop()

    def test_an_engine_with_a_risk_is_a_note(self):
        guest = self.bare()
        daemon = self.qpulld(guest, flags=['--engine=backup-job'])
        daemon.wait_idle()
        rows = self.expect_well(daemon)
        self.assertEqual(rows['engine'][0]['verdict'], 'note')
        self.assertRegex(rows['engine'][0]['text'], 'waits for scratch that hangs')
        daemon.stop()

    def test_an_nbd_server_of_somebody_else(self):
        guest = self.bare()
        guest.look('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': f'{self.folder}/theirs'}}})
        before = guest.state()
        daemon = self.qpulld(guest)
        daemon.wait_idle()
        self.expect_wrong(daemon, 'nbd server', 'in use by somebody else', 'nbd-server-stop')
        self.assertEqual(guest.state(), before)
        harness.run(['nbdinfo', '--list', nbdpull.unix_uri(f'{self.folder}/theirs', '')], check=False)
        guest.look('nbd-server-stop')  # fails if it does not run any more
        self.expect_well(daemon)
        daemon.stop()

    def test_iothreads_where_this_qemu_cannot_bear_them(self):
        guest = self.bare(extra=['-object', 'iothread,id=io0'])
        daemon = self.qpulld(guest)
        daemon.wait_idle()
        if harness.qemu_version() < (8, 0):
            self.expect_wrong(daemon, 'iothreads', 'aborts when a disk with an iothread', 'update QEMU')
        else:
            self.assertRegex(self.expect_well(daemon)['iothreads'][0]['text'], 'can bear it')
        daemon.stop()

    def test_a_disk_that_is_configured_and_not_there(self):
        guest = self.bare()
        path = f'{self.folder}/conf'
        with open(path, 'w') as f:
            f.write(f'[vm "vm"]\nqmp = {guest.qmp_path}\ndisks = vda, vdz\ndisk.root = vda\n')
        daemon = self.qpulld({}, flags=[f'--config={path}'])
        daemon.wait_idle()
        rows = self.expect_wrong(daemon, 'disks', "'vdz'", 'qpull disks')
        self.assertIn('root', [r['disk'] for r in rows['disks']])
        daemon.stop()

    def test_a_record_that_cannot_be_used(self):
        guest = self.bare()
        daemon = self.qpulld(guest)
        daemon.wait_idle()
        daemon.qpull('checkpoint', 'create', 'vm', 'monday')
        self.assertRegex(self.expect_well(daemon)['checkpoints'][0]['text'], '1 record on its disks')
        guest.quit()
        guest.start()  # it is loaded, so the next crash spoils it
        guest.kill()
        guest.start()
        harness.wait_until(lambda: daemon.vm()['connected'], 10, 'the connection')
        daemon.wait_idle()
        self.expect_wrong(daemon, 'checkpoints', r"'monday' cannot carry an incremental \(INCONSISTENT\)",
                          'next pull of this disk is a full one', 'vda')
        daemon.stop()

    def test_what_a_dead_session_left_behind(self):
        guest = self.bare()
        daemon = self.qpulld(guest)
        daemon.wait_idle()
        guest.look('blockdev-add', {'driver': 'null-co', 'node-name': 'qpull-0123abcd-scratch0'})
        guest.look('blockdev-add', {'driver': 'null-co', 'node-name': 'qpull-mine'})  # not ours to the letter
        self.expect_wrong(daemon, 'leftovers', 'of 1 session', 'start qpulld anew')
        daemon.stop()
        daemon.start()
        daemon.wait_idle()
        self.assertEqual(len(self.expect_well(daemon)['leftovers']), 1)
        daemon.stop()

    def test_scratch_that_no_session_can_use(self):
        guest = self.bare()
        daemon = self.qpulld(guest, flags=['--scratch-reserve=900T'])
        daemon.wait_idle()
        self.expect_wrong(daemon, 'scratch', 'no session can begin: .* free, and --scratch-reserve keeps', 'make room')
        daemon.stop()
        daemon = self.qpulld(guest)
        daemon.wait_idle()
        os.rmdir(daemon.scratch)
        self.expect_wrong(daemon, 'scratch', "no file can be made in .*: No such file", 'another --scratch')
        os.mkdir(daemon.scratch)
        self.expect_well(daemon)
        daemon.stop()

    def test_directories_that_cannot_be_written(self):
        if os.geteuid() != 0:
            self.skipTest('only root may mount')
        guest = self.bare()
        daemon = self.qpulld(guest)
        daemon.wait_idle()
        for check, path, kind, options, words, advice in (
                ('state', daemon.state, 'tmpfs', 'ro', 'Read-only file system', 'writable'),
                ('state', daemon.state, 'tmpfs', 'size=64k', 'only 65536 bytes free', 'make room'),
                ('scratch', daemon.scratch, 'tmpfs', 'ro', 'Read-only file system', 'writable'),
                ('scratch', daemon.scratch, 'tmpfs', 'size=1m', '1 MiB free, and --scratch-reserve', 'make room'),
                # Some kind of file system that knows no O_TMPFILE.
                ('scratch', daemon.scratch, 'mqueue', 'rw', 'cannot make files without a name', 'xfs')):
            with self.subTest(path=path, kind=kind, options=options):
                if subprocess.run(['mount', '-t', kind, '-o', options, 'none', path], check=False).returncode:
                    self.skipTest(f'cannot mount a {kind}')
                try:
                    self.expect_wrong(daemon, check, words, advice)
                finally:
                    harness.run(['umount', path])
        daemon.stop()

    def test_images_of_a_vm_that_is_off_are_looked_at(self):
        path = f'{self.folder}/off.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '8M'])
        daemon = self.qpulld({}, flags=[f'--image=off/vda={path}'])
        rows = self.expect_well(daemon)
        self.assertEqual([(r['vm'], r['disk'], r['verdict']) for r in rows['disks']], [('off', 'vda', 'ok')])
        os.unlink(path)
        harness.wait_until(lambda: daemon.ask('query-vms')[0]['state'] == 'closed', 20, 'the images to be let go')
        self.expect_wrong(daemon, 'disks', 'off.qcow2', '.')
        daemon.stop()


if __name__ == '__main__':
    harness.main()
