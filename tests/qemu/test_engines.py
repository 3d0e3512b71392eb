#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which engine freezes a QEMU's disks, what is said about it, and what is particular to backup jobs. (The tests that
say "every engine" run with both.)"""
import os
import re
import subprocess
import time

import harness
import nbd
import nbdpull
import rawnbd
from harness import MIB, Disk
from poorqemu import PoorQemu, without
from qmpproxy import QmpProxy

JOB = '--engine=backup-job'


def seven_zero(schema):
    """The schema of this QEMU, with copy-before-write and blockdev-backup as they were in 7.0."""
    entries = {e['name']: e for e in schema}
    without('copy-before-write', ('on-cbw-error', 'cbw-timeout', 'min-cluster-size'))(schema)
    backup = entries[entries['blockdev-backup']['arg-type']]
    backup['members'] = [m for m in backup['members'] if m['name'] not in ('on-cbw-error', 'discard-source')]


class Engines(harness.Case):
    def written(self, daemon):
        with open(daemon.log_path) as f:
            return f.read()

    def proxied(self, guest, edit, name='poor', **options):
        proxy = PoorQemu(self.folder, guest, edit, name)
        self.addCleanup(proxy.close)
        daemon = self.qpulld({'vm': proxy}, linger=0, name=f'd{name}', **options)
        daemon.wait_idle()
        return proxy, daemon

    def test_qemu_is_asked_once_for_each_connection_and_the_answer_is_shown(self):
        guest = self.bare()
        proxy, daemon = self.proxied(guest, lambda schema: None)
        for _ in range(2):
            nbdpull.pull(daemon.uri('vm/vda'))
            daemon.wait_idle()
        self.assertEqual(proxy.nasked, 1)
        found = re.findall(r'VM vm: QEMU [\d.]+ has (.*); sessions are frozen by copy-before-write',
                           self.written(daemon))
        self.assertEqual(len(found), 1)
        engine = daemon.vm()['engine']
        self.assertEqual((engine['wish'], engine['name'], engine['risk'], engine['failure']),
                         ('auto', 'copy-before-write', None, None))
        self.assertEqual(sorted(k for k, v in engine['capabilities'].items() if v), sorted(found[0].split(', ')))
        self.assertEqual(daemon.ask('query-status')['vms'][0]['engine'], engine)
        guest.quit()
        harness.wait_until(lambda: not daemon.vm()['connected'], 10, 'the loss')
        self.assertIsNone(daemon.vm()['engine']['capabilities'])
        guest.start()
        daemon.wait_idle(20)
        self.assertEqual(proxy.nasked, 2)
        self.assertEqual(daemon.vm()['engine'], engine)
        daemon.stop()

    def test_a_qemu_whose_copies_cannot_be_bounded_is_pulled_by_backup_jobs_and_the_risk_is_said(self):
        guest = self.bare()
        guest.write('vda', 0, MIB, 1)
        before = guest.state()
        _, daemon = self.proxied(guest, seven_zero)
        h = nbdpull.connect(daemon.uri('vm/vda'))
        self.assertEqual([j['type'] for j in guest.look('query-jobs')], ['backup'])
        self.assertEqual(daemon.ask('query-sessions')[0]['engine'], 'backup-job')
        self.assertModel(guest.disks['vda'].model, nbdpull.read_all(h), 'by a job')
        h.shutdown()
        daemon.wait_idle()
        self.assertRegex(self.written(daemon), r'warning: VM vm: session \w+: engine backup-job: scratch that is full '
                         'pauses the guest or hands it an error')
        self.assertRegex(self.written(daemon), 'frozen by backup-job: .*lacks on-cbw-error or cbw-timeout')
        self.assertNothingLeft(guest, daemon, before)
        daemon.stop()

    def test_a_qemu_that_lacks_what_every_engine_needs_is_refused_in_words(self):
        guest = self.bare()
        before = guest.state()
        for what, edit in (('snapshot-access', without('snapshot-access')),
                           ('block-export-add', without(commands=('block-export-add',)))):
            _, daemon = self.proxied(guest, edit, name=what)
            words = f'QEMU [\\d.]+ cannot freeze disks: it lacks {what} \\(QEMU [\\d.]+\\); update QEMU'
            self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda'), words)
            self.assertRegex(self.written(daemon), f'error: VM vm: no session is possible: {words}')
            self.assertRegex(daemon.vm()['engine']['failure'], words)
            # What needs no session goes on.
            self.assertEqual([d['name'] for d in daemon.ask('query-disks', {'vm': 'vm'})], ['vda'])
            daemon.stop()
        self.assertEqual(guest.state(), before)

    def test_an_engine_that_is_named_is_used_or_refused(self):
        guest = self.bare()
        _, daemon = self.proxied(guest, seven_zero, flags=['--engine=copy-before-write'])
        self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda'),
                         r'cannot do --engine=copy-before-write: it lacks copy-before-write:on-cbw-error \(QEMU 7.1\), '
                         r'copy-before-write:cbw-timeout \(QEMU 7.1\); say --engine=auto')
        daemon.stop()

    def test_each_vm_may_have_its_own_engine(self):
        guests = [self.bare(Disk(f'vd{n}', 4 * MIB), name=n) for n in ('one', 'two')]
        path = f'{self.folder}/conf'
        with open(path, 'w') as f:
            f.write('[server]\nengine = backup-job\n[vm "one"]\nqmp = %s\nengine = auto\n[vm "two"]\nqmp = %s\n' %
                    tuple(g.qmp_path for g in guests))
        daemon = self.qpulld({}, linger=0, flags=[f'--config={path}'])
        for name, engine in (('one', 'copy-before-write'), ('two', 'backup-job')):
            daemon.wait_idle(name=name)
            h = nbdpull.connect(daemon.uri(f'{name}/vd{name}'))
            self.assertEqual(daemon.ask('query-sessions')[0]['engine'], engine)
            h.shutdown()
            daemon.wait_idle(name=name)
        daemon.stop()


class Jobs(harness.Case):
    def test_incrementals_by_jobs_and_by_nodes_follow_each_other(self):
        """Checkpoints of one engine are those of the other."""
        guest = self.bare(Disk('vda', 16 * MIB), Disk('vdb', 8 * MIB))
        before = guest.state()
        image = None
        for i in range(4):
            guest.write('vda', i * MIB, MIB // 2, i + 1)
            daemon = self.qpulld(guest, linger=0, flags=[JOB] if i % 2 else [], name=f'd{i}')
            since = [nbdpull.dirty_context(f'ck{i - 1}')] if i else []
            h = nbdpull.connect(daemon.uri(f'vm/vda@ck{i}'), since)
            ranges = [(0, 16 * MIB)]
            if i:
                extents = nbdpull.read_map(h, since[0])
                ranges = nbdpull.ranges_with(extents)
                self.assertEqual(list(ranges), [(i * MIB, MIB // 2)], 'what changed, no more')
            image = nbdpull.read_ranges(h, ranges, image or bytearray(16 * MIB))
            self.assertModel(guest.disks['vda'].model, image, f'ck{i}')
            h.shutdown()
            daemon.wait_idle()
            self.assertIn(f'ck{i}', [c['name'] for c in daemon.ask('query-checkpoints', {'vm': 'vm', 'disk': 'vda'})])
            daemon.stop()
        for i in range(4):
            guest.look('block-dirty-bitmap-remove', {'node': 'node-vda', 'name': f'ck{i}'})
        self.assertNothingLeft(guest, daemon, before)

    def test_nobody_takes_our_jobs_for_jobs_of_others(self):
        guest = self.bare(Disk('vda', 16 * MIB), Disk('vdb', 8 * MIB))
        daemon = self.qpulld(guest, linger=0, flags=[JOB])
        h = nbdpull.connect(daemon.uri('vm/vda@first'))
        self.assertEqual(len(guest.look('query-jobs')), 2)
        self.assertEqual([d['node'] for d in daemon.ask('query-disks', {'vm': 'vm'})], ['node-vda', 'node-vdb'])
        self.assertEqual(daemon.ask('query-checkpoints', {'vm': 'vm'}), [])
        h.shutdown()
        daemon.wait_idle()
        found = daemon.ask('query-checkpoints', {'vm': 'vm'})
        self.assertEqual([(c['name'], c['disk'], c['usable']) for c in found], [('first', 'vda', True)])
        self.assertNotRegex(self.written(daemon), '(?i)job .*of others|carried over')
        daemon.stop()

    def written(self, daemon):
        with open(daemon.log_path) as f:
            return f.read()

    def test_a_job_that_somebody_cancels_loses_the_view_and_never_shows_live_bytes(self):
        guest = self.bare(Disk('vda', 16 * MIB))
        guest.write('vda', 0, 16 * MIB, 1)
        before = guest.state()
        daemon = self.qpulld(guest, linger=0, flags=[JOB])
        h = nbdpull.connect(daemon.uri('vm/vda@never'))
        self.assertEqual(bytes(h.pread(MIB, 0)), b'\1' * MIB)
        job = guest.look('query-jobs')[0]['id']
        guest.look('job-cancel', {'id': job})
        harness.wait_until(lambda: guest.look('query-jobs') == [], 20, 'the end of the job')
        guest.write('vda', 0, 16 * MIB, 2)
        with self.assertRaises(nbd.Error):
            for at in range(0, 16 * MIB, MIB):
                self.assertEqual(bytes(h.pread(MIB, at)), b'\1' * MIB, 'live bytes')
        daemon.wait_idle()
        self.assertRegex(daemon.vm()['last-session']['failure'], 'somebody else has ended the backup job')
        self.assertNothingLeft(guest, daemon, before)
        daemon.stop()

    def test_a_snapshot_by_others_under_the_job_stays_when_the_job_goes(self):
        guest = self.bare(Disk('vda', 16 * MIB))
        guest.write('vda', 0, MIB, 1)
        daemon = self.qpulld(guest, linger=0, flags=[JOB])
        h = nbdpull.connect(daemon.uri('vm/vda@kept'))
        frozen = bytes(guest.disks['vda'].model.image)
        path = f'{self.folder}/overlay.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-o', f'size={16 * MIB}', path])
        guest.look('blockdev-add', {'driver': 'qcow2', 'node-name': 'overlay',
                                    'file': {'driver': 'file', 'filename': path}, 'backing': None})
        guest.look('blockdev-snapshot', {'node': 'node-vda', 'overlay': 'overlay'})
        guest.write('vda', 2 * MIB, MIB, 2)
        self.assertSame(nbdpull.read_all(h), frozen, 'the frozen view')
        h.shutdown()
        daemon.wait_idle()
        self.assertEqual([d['inserted']['node-name'] for d in guest.look('query-block') if d.get('inserted')],
                         ['overlay'])
        h = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.dirty_context('kept')])
        extents = nbdpull.read_map(h, nbdpull.dirty_context('kept'))
        self.assertEqual(list(nbdpull.ranges_with(extents)), [(2 * MIB, MIB)])
        h.shutdown()
        daemon.wait_idle()
        daemon.stop()

    def test_a_killed_daemon_s_jobs_are_undone_by_the_next_one_whatever_its_engine(self):
        guest = self.bare(Disk('vda', 16 * MIB), Disk('vdb', 8 * MIB))
        guest.write('vda', 0, MIB, 1)
        before = guest.state()
        theirs = [{'driver': 'null-co', 'node-name': n, 'size': MIB, 'read-zeroes': True} for n in ('from', 'to')]
        for node in theirs:
            guest.look('blockdev-add', node)
        guest.look('blockdev-backup', {'job-id': 'theirs', 'device': 'from', 'target': 'to', 'sync': 'none'})
        for flags in ([JOB], [], [JOB]):
            daemon = self.qpulld(guest, linger=0, flags=[JOB], name='first', state=f'{self.folder}/state')
            h = nbdpull.connect(daemon.uri('vm/vda@never'))
            h.pread(MIB, 0)
            self.assertEqual(len(guest.look('query-jobs')), 3)
            daemon.kill()
            os.unlink(daemon.socket)
            os.unlink(daemon.control)
            guest.write('vda', 0, MIB, 2)  # a copy is made, with nobody there
            daemon = self.qpulld(guest, linger=0, flags=flags, name='second', state=f'{self.folder}/state')
            daemon.wait_idle()
            self.assertEqual([j['id'] for j in guest.look('query-jobs')], ['theirs'])
            self.assertModel(guest.disks['vda'].model, nbdpull.pull(daemon.uri('vm/vda')), 'after the sweep')
            daemon.wait_idle()
            daemon.stop()
        guest.look('job-cancel', {'id': 'theirs'})
        guest.look.wait_event('JOB_STATUS_CHANGE', where=lambda d: (d['id'], d['status']) == ('theirs', 'null'))
        for node in theirs:
            guest.look('blockdev-del', {'node-name': node['node-name']})
        self.assertNothingLeft(guest, daemon, before)

    def test_a_disk_that_grew_or_got_a_layer_while_the_session_went_up_is_told_to_try_again(self):
        """An external snapshot right before the freeze would put the job's filter on a backing image."""
        guest = self.bare(Disk('vda', 16 * MIB))
        path = f'{self.folder}/overlay.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-o', f'size={16 * MIB}', path])
        guest.look('blockdev-add', {'driver': 'qcow2', 'node-name': 'overlay',
                                    'file': {'driver': 'file', 'filename': path}, 'backing': None})
        proxy = QmpProxy(self.folder, guest)
        self.addCleanup(proxy.close)
        daemon = self.qpulld({'vm': proxy}, linger=0, flags=[JOB])
        daemon.wait_idle()
        nbdpull.pull(daemon.uri('vm/vda'))  # the self-test is over
        daemon.wait_idle()
        taken = []

        def on_command(name):
            if name == 'transaction' and not taken:
                taken.append(name)
                guest.look('blockdev-snapshot', {'node': 'node-vda', 'overlay': 'overlay'})

        proxy.at_each(on_command)
        self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda'), "got another layer just now.*try again")
        proxy.at_each(None)
        daemon.wait_idle()
        self.assertEqual(guest.look('query-jobs'), [])
        guest.write('vda', 0, MIB, 3)
        self.assertModel(guest.disks['vda'].model, nbdpull.pull(daemon.uri('vm/vda')), 'the second attempt')
        daemon.wait_idle()
        daemon.stop()

    def test_scratch_that_is_full_costs_the_session_where_qemu_can_give_it_up(self):
        if os.geteuid() != 0:
            self.skipTest('only root may mount a small file system')
        guest = self.bare(Disk('vda', 16 * MIB))
        guest.write('vda', 0, 16 * MIB, 1)
        before = guest.state()
        scratch = f'{self.folder}/small.scratch'
        os.mkdir(scratch)
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', scratch], check=False).returncode:
            self.skipTest('cannot mount a tmpfs')
        try:
            # Without a reserve nothing is given up in time: QEMU itself meets the end of the space.
            daemon = self.qpulld(guest, linger=0, flags=[JOB, '--scratch-reserve=0'], name='small')
            daemon.wait_idle()
            if not daemon.vm()['engine']['capabilities']['blockdev-backup:on-cbw-error']:
                self.skipTest('this QEMU\'s backup job has no on-cbw-error')
            h = nbdpull.connect(daemon.uri('vm/vda@never'))
            guest.write('vda', 0, 8 * MIB, 2)  # fails if the guest is told of it
            with self.assertRaises(nbd.Error):
                nbdpull.read_all(h)
            daemon.wait_idle()
            self.assertEqual(guest.look('query-status')['status'], 'running')
            self.assertEqual(harness.bitmaps(guest.look), {})
            self.assertNothingLeft(guest, daemon, before)
            daemon.stop()
        finally:
            harness.run(['umount', '-l', scratch])

    def test_questions_about_disks_wait_while_jobs_go(self):
        guest = self.bare(Disk('vda', 16 * MIB), Disk('vdb', 8 * MIB))
        daemon = self.qpulld(guest, linger=0, flags=[JOB])
        for i in range(5):
            h = nbdpull.connect(daemon.uri('vm/vda'))
            h.shutdown()
            end = time.monotonic() + 1
            while daemon.vm()['session'] and time.monotonic() < end:
                self.assertEqual(len(daemon.ask('query-disks', {'vm': 'vm'})), 2)
            daemon.wait_idle()
        daemon.stop()


if __name__ == '__main__':
    harness.main()
