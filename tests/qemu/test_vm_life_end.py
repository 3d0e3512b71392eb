#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU ends while a session stands: everybody is told why in QEMU's own words, nothing is left behind, older checkpoints
survive whatever a QEMU survives, and the provisional one claims nothing."""
import signal

import harness
import nbdpull
from harness import MIB, Disk
from vmlife import ACPI_POWEROFF, PANIC, acpi, image_bitmaps

class End(harness.Case):
    def session(self, **options):
        """A VM with checkpoint 'old', and a client in the middle of a pull that would make 'new'."""
        self.disk = Disk('vda', 16 * MIB + 3 * 512)
        self.vm = self.bare(self.disk, Disk('vdb', 8 * MIB), **options)
        self.daemon = self.qpulld(self.vm, linger=0)
        self.vm.write('vda', 0, 4 * MIB, 17)
        h = nbdpull.connect(self.daemon.uri('vm/vda@old'))
        self.image = nbdpull.read_all(h)
        h.shutdown()
        self.daemon.wait_idle()
        self.vm.write('vda', MIB, MIB, 18)
        self.h = nbdpull.connect(self.daemon.uri('vm/vda@new'))
        self.h.pread(65536, 0)
        self.vm.write('vda', 2 * MIB, MIB, 20)

    def check_end(self, says, kept=True, ended_by=0):
        """The QEMU is gone. Its last session says why, and it is as if there never had been one."""
        status = self.vm.process.wait(30)
        self.vm.close()
        if ended_by is not None:
            self.assertEqual(status, ended_by)
        last = harness.wait_until(lambda: self.daemon.vm()['session'] is None and self.daemon.vm()['last-session'], 20)
        self.assertIn(says, last['failure'])
        self.assertIsNone(last['problems'])
        self.assertIn(f'session {last["id"]} is given up: ', self.daemon.log())
        with self.assertRaises(nbdpull.nbd.Error):
            self.h.pread(512, 0)
        # The NBD server's socket is a note until the next QEMU is met (docs/decisions/0005).
        self.assertLessEqual(set(self.daemon.files_left()), {'nbd-vm.sock'})
        self.assertEqual(image_bitmaps(self.disk), {'old': False} if kept else {})
        return last

    def check_again(self, usable=True):
        """QEMU starts anew, and backups go on where they were."""
        self.vm.start()
        harness.wait_until(lambda: self.daemon.vm()['state'] == 'ready', 20)
        self.vm.write('vda', 6 * MIB, 512, 19)
        context = nbdpull.dirty_context('old')
        h = nbdpull.connect(self.daemon.uri('vm/vda@next'), [context])
        self.assertEqual(h.can_meta_context(context), usable)
        if usable:
            dirty = nbdpull.ranges_with(nbdpull.read_map(h, context))
            data = nbdpull.read_ranges(h, dirty, bytearray(self.image))
            self.assertSame(data, self.disk.model.image[:len(data)], 'the increment')
        h.shutdown()
        self.daemon.wait_idle()
        self.assertEqual(self.daemon.files_left(), [])

    def test_quit_names_itself_and_keeps_older_checkpoints(self):
        self.session()
        self.vm.quit()
        self.check_end('QEMU ended: somebody sent it \'quit\' (host-qmp-quit)')
        self.check_again()
        self.daemon.stop()

    def test_a_signal_names_itself_and_keeps_older_checkpoints(self):
        self.session()
        self.vm.process.terminate()
        self.check_end('QEMU ended: it got a signal (host-signal)')
        self.daemon.stop()

    def test_a_guest_that_shuts_down_is_named_and_keeps_older_checkpoints(self):
        self.session()
        acpi(self.vm, ACPI_POWEROFF, lambda: self.vm.process.poll() is not None)
        self.check_end('QEMU ended: its guest has shut down (guest-shutdown)')
        self.check_again()
        self.daemon.stop()

    def test_a_guest_that_panics_is_named(self):
        self.session(extra=['-device', 'pvpanic'])
        self.vm.hmp(PANIC)
        self.check_end('QEMU ended: its guest has panicked (guest-panic)')
        self.daemon.stop()

    def test_a_qemu_that_is_killed_says_nothing_and_takes_the_checkpoints_of_its_run_along(self):
        self.session()
        self.vm.process.kill()
        self.check_end('without a word before (killed, or crashed?)', kept=False, ended_by=-signal.SIGKILL)
        self.check_again(usable=False)
        self.daemon.stop()

    def test_a_pull_that_had_ended_well_is_told_that_its_checkpoint_went_with_qemu(self):
        self.disk = Disk('vda', 4 * MIB)
        self.vm = self.bare(self.disk)
        self.daemon = self.qpulld(self.vm, linger=60)
        h = nbdpull.connect(self.daemon.uri('vm/vda@new'))
        nbdpull.read_all(h)
        h.shutdown()
        harness.wait_until(lambda: self.daemon.ask('query-sessions')[0]['lingering'], 10)
        self.vm.quit()
        last = harness.wait_until(lambda: self.daemon.vm()['session'] is None and self.daemon.vm()['last-session'], 20)
        self.assertIn('host-qmp-quit', last['failure'])
        self.assertIn('checkpoint \'new\' of disk \'vda\' is not kept: QEMU ended before the session did',
                      last['problems'])
        self.assertEqual(image_bitmaps(self.disk), {})
        self.daemon.stop()

    def test_a_qemu_that_stays_when_its_guest_is_off_lets_the_session_end_well(self):
        self.session(extra=['-no-shutdown', '-device', 'pvpanic'])
        expected = bytearray(self.disk.model.image)
        expected[2 * MIB:3 * MIB] = bytes([17]) * MIB
        acpi(self.vm, ACPI_POWEROFF, lambda: self.vm.look('query-status')['status'] == 'shutdown')
        self.assertSame(nbdpull.read_all(self.h), expected[:self.disk.size], 'the frozen disk')
        self.h.shutdown()
        self.daemon.wait_idle()
        self.assertIsNone(self.daemon.vm()['last-session']['failure'])
        self.assertEqual(set(harness.bitmaps(self.vm.look)), {('node-vda', 'old'), ('node-vda', 'new')})
        self.assertEqual(self.vm.look('query-status')['status'], 'shutdown')
        # Its next life: what it announced for the end of the last one is not taken for the next one's.
        self.vm.look('system_reset')
        self.vm.look('cont')
        self.h = nbdpull.connect(self.daemon.uri('vm/vda'))
        self.vm.process.kill()
        self.vm.process.wait()
        last = harness.wait_until(lambda: self.daemon.vm()['session'] is None and self.daemon.vm()['last-session'], 20)
        self.assertIn('without a word before', last['failure'])
        self.daemon.stop()


if __name__ == '__main__':
    harness.main()
