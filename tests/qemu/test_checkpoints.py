#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoints: when one is made, kept, dropped, refused, and what survives a restart of QEMU."""
import signal

import harness
import nbdpull
import rawnbd
from harness import MIB, Disk


class Checkpoints(harness.Case):
    def checkpoints(self, daemon, disk=None):
        """[(name, disk, reason)] of VM vm."""
        found = daemon.ask('query-checkpoints', {'vm': 'vm', **({'disk': disk} if disk else {})})
        return sorted((c['name'], c['disk'], c['reason']) for c in found)

    def offered(self, daemon, disk='vda'):
        """The checkpoints that an incremental may name."""
        raw = rawnbd.Raw(daemon.socket)
        raw.option(rawnbd.OPT_STRUCTURED)
        found = raw.option(rawnbd.OPT_LIST_META_CONTEXT, rawnbd.string(f'vm/{disk}') + b'\0\0\0\1' +
                           rawnbd.string('qemu:dirty-bitmap:'))
        raw.close()
        return sorted(payload[4:].decode().removeprefix('qemu:dirty-bitmap:') for _, payload in found)

    def two_disks(self, **options):
        return self.bare(Disk('vda', 16 * MIB), Disk('vdb', 16 * MIB), **options)

    def test_a_checkpoint_is_kept_on_the_disk_that_was_pulled_and_dropped_on_the_other(self):
        guest = self.two_disks()
        daemon = self.qpulld(guest, linger=0)
        nbdpull.pull(daemon.uri('vm/vda@monday'))
        daemon.wait_idle()
        self.assertEqual(self.checkpoints(daemon), [('monday', 'vda', 'NONE')])
        self.assertEqual((self.offered(daemon), self.offered(daemon, 'vdb')), (['monday'], []))
        bitmap = harness.bitmaps(guest.look)[('node-vda', 'monday')]
        self.assertEqual((bitmap['recording'], bitmap['persistent'], bitmap['busy']), (True, True, False))

    def test_before_the_pull_ends_there_is_no_checkpoint(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=600)
        h = nbdpull.connect(daemon.uri('vm/vda@monday'))
        nbdpull.read_all(h)
        self.assertEqual(self.checkpoints(daemon), [])
        h.shutdown()
        self.assertEqual(self.checkpoints(daemon), [])  # lingers: the client may come back and read on
        daemon.stop()
        self.assertEqual(list(harness.bitmaps(guest.look)), [('node-vda', 'monday')])

    def test_a_restored_disk_goes_on_with_a_full(self):
        """Said while the VM is off, and the daemon is killed right after its answer."""
        guest = self.two_disks()
        daemon = self.qpulld(guest, linger=0)
        daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'monday'})
        guest.quit()
        said = daemon.qpull('checkpoint', 'invalidate', 'vm', 'vda').stdout
        self.assertIn('disk "vda": 1 disk invalid', said)
        daemon.kill()
        guest.start()
        daemon.start()
        daemon.wait_idle()
        self.assertEqual(self.checkpoints(daemon), [('monday', 'vda', 'GAP'), ('monday', 'vdb', 'NONE')])
        told = daemon.qpull('checkpoint', 'can-increment', 'vm', 'monday', '--disk', 'vda', check=False)
        self.assertEqual(told.returncode, 1)
        self.assertIn('restored from a backup', told.stdout)
        self.assertEqual((self.offered(daemon), self.offered(daemon, 'vdb')), ([], ['monday']))
        nbdpull.pull(daemon.uri('vm/vda@tuesday'))
        daemon.wait_idle()
        self.assertEqual(self.offered(daemon), ['tuesday'])
        daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'monday'})
        daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'monday'})
        self.assertEqual(self.offered(daemon), ['monday', 'tuesday'])
        refused = daemon.qpull('checkpoint', 'invalidate', 'nobody', 'vda', check=False)
        self.assertEqual(refused.returncode, 1)
        self.assertIn('nobody', refused.stderr)
        daemon.stop()

    def test_a_client_that_vanishes_leaves_no_checkpoint(self):
        guest = self.two_disks()
        before = guest.state()
        daemon = self.qpulld(guest, linger=0)
        code = ('import nbd, sys, time; h = nbd.NBD(); h.connect_uri(sys.argv[1]); h.pread(h.get_size(), 0); '
                'print("read", flush=True); time.sleep(300)')
        client = harness.spawn(['/usr/bin/python3', '-c', code, daemon.uri('vm/vda@monday')], stdout=-1)
        self.assertEqual(client.stdout.readline(), b'read\n')
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.stdout.close()
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)
        # One of two connections that says goodbye, but not as the last one to leave, is no good end either.
        first, second = (nbdpull.connect(daemon.uri('vm/vda@monday')) for _ in range(2))
        first.shutdown()
        nbdpull.drop(second)
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)

    def test_a_pull_after_a_failed_read_leaves_no_checkpoint(self):
        guest = self.bare()
        before = guest.state()
        daemon = self.qpulld(guest, linger=0)
        raw = rawnbd.Raw(daemon.socket)
        size = raw.go('vm/vda@monday')
        self.assertEqual(raw.read(0, 65536)[0], 0)
        # QEMU loses the frozen view: as a full scratch would, here by tearing the export down from aside.
        export = next(e['id'] for e in guest.look('query-block-exports') if e['type'] == 'nbd')
        guest.look('block-export-del', {'id': export, 'mode': 'hard'})
        try:
            while raw.read(0, 65536)[0] == 0:
                pass
        except (EOFError, OSError):
            pass
        raw.close()
        self.assertEqual(size, guest.disks['vda'].size)
        daemon.wait_idle()
        self.assertEqual(self.checkpoints(daemon), [])
        self.assertNothingLeft(guest, daemon, before)

    def test_a_name_that_exists_is_refused_and_stays_as_it_is(self):
        guest = self.two_disks()
        daemon = self.qpulld(guest, linger=0)
        nbdpull.pull(daemon.uri('vm/vda@monday'))
        daemon.wait_idle()
        before = guest.state()
        # On the other disk, too: a session freezes all disks, and names one instant.
        for disk in ('vda', 'vdb'):
            words = rawnbd.refusal(daemon.socket, f'vm/{disk}@monday')
            self.assertRegex(words, "'monday' exists already on disk 'vda'")
        self.assertEqual(guest.state(), before)

    def test_a_raw_disk_is_pulled_but_keeps_no_checkpoint(self):
        guest = self.bare(Disk('vda', 16 * MIB), Disk('vdr', 16 * MIB, fmt='raw'),
                          Disk('vdo', 16 * MIB, options='compat=0.10'))
        guest.write('vdr', MIB, MIB, 5)
        guest.write('vdo', MIB, MIB, 6)
        daemon = self.qpulld(guest, linger=0)
        for disk in ('vdr', 'vdo'):
            data = nbdpull.pull(daemon.uri(f'vm/{disk}'))
            self.assertModel(guest.disks[disk].model, data, disk)
            daemon.wait_idle()
        nbdpull.pull(daemon.uri('vm/vda@monday'))  # beside them
        daemon.wait_idle()
        self.assertEqual(self.checkpoints(daemon), [('monday', 'vda', 'NONE')])

    def test_disks_that_are_new_raw_or_broken_go_full_beside_one_that_goes_incremental(self):
        disks = {name: Disk(name, 8 * MIB, fmt='raw' if name == 'raw' else 'qcow2')
                 for name in ('good', 'new', 'raw', 'broken')}
        guest = self.bare(*disks.values())
        daemon = self.qpulld(guest, linger=0)
        first = {}
        daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'mon', 'disk': ['good', 'broken']})
        for i, name in enumerate(disks):
            first[name] = bytes(disks[name].model.image)
            guest.write(name, MIB * (i + 1), 65536, i + 1)
        guest.look('block-dirty-bitmap-disable', {'node': 'node-broken', 'name': 'mon'})
        verdicts = {v['disk']: v['reason'] for v in daemon.ask('can-increment', {'vm': 'vm', 'name': 'mon'})}
        self.assertEqual(verdicts, {'good': 'NONE', 'new': 'NO_SUCH_CHECKPOINT', 'raw': 'NOT_TRACKED',
                                    'broken': 'BUSY'})
        context = nbdpull.dirty_context('mon')
        order = list(disks)
        harness.rng.shuffle(order)  # whoever comes first must not decide for the others
        handles = {name: nbdpull.connect(daemon.uri(f'vm/{name}@tue'), [context]) for name in order}
        self.assertEqual({n for n, h in handles.items() if h.can_meta_context(context)}, {'good'})
        self.assertEqual(len({s['id'] for s in daemon.ask('query-sessions')}), 1)
        for name, h in handles.items():
            self.assertModel(disks[name].model, nbdpull.read_all(h), name)
            h.shutdown()
        daemon.wait_idle()
        self.assertEqual({c[:2] for c in self.checkpoints(daemon) if c[0] == 'tue'},
                         {('tue', 'good'), ('tue', 'new'), ('tue', 'broken')})
        self.assertIn('will not be kept on disk raw (NOT_TRACKED)', daemon.log())
        data, extents = nbdpull.pull_changes(daemon.uri('vm/good'), 'mon', first['good'])
        self.assertEqual([e[:2] for e in extents if e[2]], [(MIB, 65536)])
        self.assertModel(disks['good'].model, data, 'full + incremental')

    def test_names_that_cannot_be_are_refused_in_words(self):
        guest = self.bare()
        before = guest.state()
        daemon = self.qpulld(guest, linger=0)
        for name, words in (('', 'needs a name'), ('qpull-x', 'temporary objects'), ('a/b', "no '/'"),
                            ('a\nb', 'control characters'), ('x' * 1024, 'at most')):
            self.assertRegex(rawnbd.refusal(daemon.socket, f'vm/vda@{name}'), words)
        self.assertEqual(guest.state(), before)
        for name in ('Ünïcode ☃', 'with space', "quote'\"\\", 'x' * 200, '100%'):
            nbdpull.pull(daemon.uri(f'vm/vda@{name}'))
            daemon.wait_idle()
            self.assertIn((name, 'vda', 'NONE'), self.checkpoints(daemon))
            self.assertIn(name, self.offered(daemon))
            daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': name})
        self.assertEqual(guest.state(), before)

    def test_deleting_one_checkpoint_leaves_the_others(self):
        guest = self.two_disks()
        daemon = self.qpulld(guest, linger=0)
        for name in ('one', 'two', 'three'):
            a, b = (nbdpull.connect(daemon.uri(f'vm/{disk}@{name}')) for disk in ('vda', 'vdb'))
            a.shutdown()
            b.shutdown()
            daemon.wait_idle()
        self.assertEqual(len(self.checkpoints(daemon)), 6)
        guest.write('vda', 3 * MIB, 65536, 1)
        self.assertEqual(daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'two'}), {'records': 2})
        self.assertEqual(daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'three', 'disk': 'vdb'}), {'records': 1})
        self.assertEqual(daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'never'}), {'records': 0})
        self.assertEqual(self.checkpoints(daemon),
                         [('one', 'vda', 'NONE'), ('one', 'vdb', 'NONE'), ('three', 'vda', 'NONE')])
        self.assertEqual(self.checkpoints(daemon, 'vdb'), [('one', 'vdb', 'NONE')])
        for name in ('one', 'three'):
            _, extents = nbdpull.pull_changes(daemon.uri('vm/vda'), name, bytes(16 * MIB))
            self.assertEqual([e[:2] for e in extents if e[2]], [(3 * MIB, 65536)])
        with self.assertRaisesRegex(harness.QmpError, 'no disk'):
            daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'one', 'disk': 'nowhere'})
        with self.assertRaisesRegex(harness.QmpError, 'no VM'):
            daemon.ask('query-checkpoints', {'vm': 'nowhere'})

    def test_a_name_deleted_in_a_session_is_not_given_again_before_its_end(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=0)
        daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'monday'})
        guest.write('vda', 2 * MIB, MIB, 3)
        h = nbdpull.connect(daemon.uri('vm/vda'))
        daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'monday'})
        with self.assertRaisesRegex(harness.QmpError, "'monday' of disk 'vda' was deleted in session .* choose another name"):
            daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'monday'})
        daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'tuesday'})
        late = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.dirty_context('monday')])
        self.assertFalse(late.can_meta_context(nbdpull.dirty_context('monday')))
        late.shutdown()
        h.shutdown()
        daemon.wait_idle()
        daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'monday'})
        self.assertEqual(self.offered(daemon), ['monday', 'tuesday'])
        daemon.stop()

    def test_a_checkpoint_that_somebody_else_made_counts(self):
        guest = self.bare()
        guest.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': 'theirs', 'persistent': True})
        guest.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': 'stopped', 'persistent': True,
                                              'disabled': True})
        daemon = self.qpulld(guest, linger=0)
        self.assertEqual(self.checkpoints(daemon), [('stopped', 'vda', 'BUSY'), ('theirs', 'vda', 'NONE')])
        self.assertEqual(self.offered(daemon), ['theirs'])
        raw = rawnbd.Raw(daemon.socket)
        raw.go('vm/vda', contexts=['qemu:dirty-bitmap:stopped', 'qemu:dirty-bitmap:never', 'qemu:dirty-bitmap:theirs'])
        self.assertEqual(list(raw.contexts), ['qemu:dirty-bitmap:theirs'])
        raw.disc()

    def test_a_checkpoint_survives_a_clean_restart_of_qemu_and_carries_an_incremental(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=0)
        guest.write('vda', 0, MIB, 1)
        full = nbdpull.pull(daemon.uri('vm/vda@monday'))
        daemon.wait_idle()
        guest.write('vda', 4 * MIB, 65536, 2)
        guest.quit()
        harness.wait_until(lambda: not daemon.vm()['connected'], 20, 'the loss of the connection')
        guest.start()
        daemon.wait_idle()
        guest.write('vda', 6 * MIB, 65536, 3)
        self.assertEqual(self.checkpoints(daemon), [('monday', 'vda', 'NONE')])
        data, extents = nbdpull.pull_changes(daemon.uri('vm/vda@tuesday'), 'monday', full)
        self.assertEqual([e[:2] for e in extents if e[2]], [(4 * MIB, 65536), (6 * MIB, 65536)])
        self.assertModel(guest.disks['vda'].model, data, 'full + incremental')

    def test_after_a_crash_of_qemu_a_checkpoint_is_inconsistent_and_can_be_deleted(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=0)
        nbdpull.pull(daemon.uri('vm/vda@old'))
        daemon.wait_idle()
        guest.quit()  # stores it
        guest.start()
        daemon.wait_idle()
        nbdpull.pull(daemon.uri('vm/vda@young'))
        daemon.wait_idle()
        self.assertEqual([c[0] for c in self.checkpoints(daemon)], ['old', 'young'])
        guest.kill()
        guest.start()
        daemon.wait_idle()
        # The one never stored is gone with QEMU; of the other nobody knows what happened since.
        self.assertEqual(self.checkpoints(daemon),
                         [('old', 'vda', 'INCONSISTENT'), ('young', 'vda', 'NO_SUCH_CHECKPOINT')])
        self.assertEqual(self.offered(daemon), [])
        self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda@old'), 'exists already')
        data = nbdpull.pull(daemon.uri('vm/vda@new'))
        self.assertModel(guest.disks['vda'].model, data, 'a full beside the husk')
        daemon.wait_idle()
        self.assertEqual(daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'old'}), {'records': 1})
        self.assertEqual(daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'young'}), {'records': 0})
        self.assertEqual(self.checkpoints(daemon), [('new', 'vda', 'NONE')])
        guest.quit()
        self.assertNotIn('old', harness.run(['qemu-img', 'info', guest.disks['vda'].path]).stdout)

    def test_the_tool_lists_and_deletes(self):
        guest = self.two_disks()
        daemon = self.qpulld(guest, linger=0)
        for name in ('one', 'two'):
            nbdpull.pull(daemon.uri(f'vm/vda@{name}'))
            daemon.wait_idle()
        self.assertRegex(daemon.qpull('checkpoint', 'list', 'vm').stdout, r'(?s)one.*vda.*two.*vda')
        self.assertEqual([c['name'] for c in daemon.json('checkpoint', 'list', 'vm')], ['one', 'two'])
        daemon.qpull('checkpoint', 'delete', 'vm', 'one')
        self.assertEqual(self.checkpoints(daemon), [('two', 'vda', 'NONE')])
        self.assertNotEqual(daemon.qpull('checkpoint', 'delete', 'nowhere', 'one', check=False).returncode, 0)


if __name__ == '__main__':
    harness.main()
