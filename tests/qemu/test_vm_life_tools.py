#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Other programs that talk to the same QEMU in the middle of a session: their jobs, their monitors, their migrations."""
import harness
import nbdpull
import vmlife
from harness import MIB, Disk
from qmpclient import QmpError
from vmlife import ACPI_SUSPEND, LEGACY, acpi


class Tools(vmlife.Case):
    def test_a_job_of_others_that_holds_our_filter_only_delays_the_undoing(self):
        self.bare_legacy()
        self.image('copy', LEGACY)
        before = self.vm.state()
        h = nbdpull.connect(self.daemon.uri('vm/vdo@new'))
        self.tool('blockdev-backup', {'job-id': 'theirs', 'device': 'old', 'target': 'copy', 'sync': 'none'})
        h.shutdown()
        harness.wait_until(lambda: 'leftovers of an earlier session are still in QEMU' in self.daemon.log(), 30)
        self.daemon.wait_idle()
        self.vm.hmp('qemu-io -d /machine/peripheral/vdo/virtio-backend "write -q -P 3 0 1M"')
        self.assertEqual(nbdpull.pull(self.daemon.uri('vm/vdo'))[:MIB], bytes([3]) * MIB)  # it is in nobody's way
        self.daemon.wait_idle()
        self.assertEqual(self.tool('query-jobs')[0]['status'], 'running')
        self.tool('block-job-cancel', {'device': 'theirs', 'force': True})
        harness.wait_until(lambda: 'undid what 1 earlier session had left in QEMU' in self.daemon.log(), 30)
        self.daemon.wait_idle()
        self.assertEqual(self.new_checkpoints(), {'vdo': True})
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'new'})
        self.assertNothingLeft(self.vm, self.daemon, before)
        nbdpull.pull(self.daemon.uri('vm/vdo'))
        self.daemon.stop()

    def test_a_session_may_end_while_the_guest_is_suspended(self):
        self.bare_legacy()
        h = nbdpull.connect(self.daemon.uri('vm/vda'))
        acpi(self.vm, ACPI_SUSPEND, lambda: self.vm.look('query-status')['status'] == 'suspended')
        self.assertEqual(len(nbdpull.read_all(h)), 4 * MIB)
        h.shutdown()
        self.daemon.wait_idle()
        nbdpull.pull(self.daemon.uri('vm/vdo'))
        self.daemon.wait_idle()
        self.tool('system_wakeup')
        harness.wait_until(lambda: not self.vm.deleted_fds(), 10, 'the descriptors\' end')  # QEMU up to 9.x keeps them
        self.daemon.wait_idle()
        self.assertNothingLeft(self.vm, self.daemon, self.before)

    def test_an_export_that_others_remove_ends_the_session_in_words(self):
        self.bare_legacy()
        h = nbdpull.connect(self.daemon.uri('vm/vda@new'), [nbdpull.ALLOCATION])
        h.block_status(512, 0, lambda *args: 0)  # all maps are read by then
        self.tool('block-export-del', {'id': next(e['id'] for e in self.tool('query-block-exports')
                                                  if e['id'].endswith('-export0')),
                                       'mode': 'hard'})
        harness.wait_until(lambda: self.daemon.vm()['session'] is None, 20)
        with self.assertRaises(nbdpull.nbd.Error):
            h.pread(512, 0)
        last = self.daemon.vm()['last-session']
        self.assertRegex(last['failure'], "the frozen view of disk '.*' is lost: .*the server closed the connection")
        self.assertIsNone(last['problems'])
        self.assertNothingLeft(self.vm, self.daemon, self.before)

    def test_who_comes_second_to_a_monitor_says_so(self):
        self.bare_legacy()
        second = self.qpulld({'vm': self.vm}, name='second')
        vm = harness.wait_until(lambda: (v := second.vm())['reason'] and 'greeting' in v['reason'] and v, 30)
        self.assertIn('another client holds this socket, and QEMU talks to one at a time', vm['reason'])
        with self.assertRaises(nbdpull.nbd.Error):
            nbdpull.connect(second.uri('vm/vda'))
        self.assertRegex(second.log(), 'refused: .*another client holds this socket')
        nbdpull.pull(self.daemon.uri('vm/vda'))
        self.daemon.stop()  # and the other one takes over
        harness.wait_until(lambda: second.vm()['state'] == 'ready', 30)
        nbdpull.pull(second.uri('vm/vda'))
        second.wait_idle()
        self.assertNothingLeft(self.vm, second, self.before)

    def migrate_ends(self):
        """The status with which it does."""
        return harness.wait_until(lambda: (s := self.tool('query-migrate').get('status')) in ('failed', 'completed',
                                                                                              'cancelled') and s, 60)

    def destination(self):
        there = harness.Bare(self.folder, [Disk('vda', 4 * MIB, path=self.vm.disks['vda'].path)], name='there',
                             extra=self.vm.extra + ['-incoming', f'unix:{self.folder}/migration'], start=False)
        self.things.append(there)
        return there

    def test_a_vm_is_migrated_before_a_session_or_after_it(self):
        self.bare_legacy()
        there = self.destination()
        self.vm.write('vda', 0, MIB, 5)
        # During it: no.
        h = nbdpull.connect(self.daemon.uri('vm/vda@new'))
        there.start()
        with self.assertRaisesRegex(QmpError, 'does not support live migration'):
            self.tool('migrate', {'uri': f'unix:{self.folder}/migration'})
        self.vm.write('vda', 0, MIB, 6)
        self.assertEqual(set(nbdpull.read_all(h)[:MIB]), {5})
        h.shutdown()
        self.daemon.wait_idle()
        self.assertIsNone(self.daemon.vm()['last-session']['problems'])
        self.assertEqual(self.new_checkpoints(), {'vda': True})
        # A session during a migration: no.
        self.tool('migrate-set-parameters', {'max-bandwidth': 1 << 16})
        self.tool('migrate', {'uri': f'unix:{self.folder}/migration'})
        harness.wait_until(lambda: self.tool('query-migrate').get('status') == 'active', 20)
        before = self.vm.state()
        with self.assertRaises(nbdpull.nbd.Error):
            nbdpull.connect(self.daemon.uri('vm/vda'))
        self.daemon.wait_idle()
        self.assertIn('back it up where it goes', self.daemon.log())
        self.assertNothingLeft(self.vm, self.daemon, before)
        self.tool('migrate-set-parameters', {'max-bandwidth': 1 << 33})
        self.assertEqual(self.migrate_ends(), 'completed')
        # After it: where the VM runs now.
        for vm, daemon in ((self.vm, self.daemon), (there, None)):
            with self.subTest(vm.name):
                daemon = daemon or self.qpulld({'vm': there}, name='there', linger=0)
                harness.wait_until(lambda vm=vm: vm.look('query-status')['status'] in ('postmigrate', 'running'), 20)
                before = vm.state()
                if vm is there:
                    self.assertEqual(set(nbdpull.pull(daemon.uri('vm/vda'))[:MIB]), {6})
                else:
                    with self.assertRaises(nbdpull.nbd.Error):
                        nbdpull.connect(daemon.uri('vm/vda'))
                    self.assertIn('back it up where it runs', daemon.log())
                daemon.wait_idle()
                self.assertNothingLeft(vm, daemon, before)

    def test_a_session_of_a_qemu_that_must_always_migrate_goes_on_until_the_vm_is_gone(self):
        self.bare_legacy(extra=['-only-migratable'])
        there = self.destination()
        h = nbdpull.connect(self.daemon.uri('vm/vda@new'))
        there.start()
        self.tool('migrate', {'uri': f'unix:{self.folder}/migration'})
        how = self.migrate_ends()
        self.vm.look('query-status')
        try:
            data = nbdpull.read_all(h)
            h.shutdown()
        except nbdpull.nbd.Error:
            data = None
        self.daemon.wait_idle()
        if data is None:
            self.assertIn('is migrated away while session', self.daemon.vm()['last-session']['failure'])
            self.assertEqual(self.new_checkpoints(), {})
        else:  # QEMU 7.2 found at the switch-over that it cannot let go of the disks, and nobody saw it try
            self.assertEqual(how, 'failed')
            self.assertEqual(data, bytes(4 * MIB))
            self.assertEqual(self.new_checkpoints(), {'vda': True})


if __name__ == '__main__':
    harness.main()
