#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""--hold-shutdown: a QEMU whose guest shuts down waits for the session's end, and only for that."""
import socket
import sys
import time

import harness
import nbdpull
from harness import MIB, Disk
from qmpproxy import QmpProxy
from vmlife import ACPI_POWEROFF, PANIC, acpi, image_bitmaps

LONG = '--hold-shutdown=60'


class Hold(harness.Case):
    def begin(self, hold=LONG, proxy=False, linger=0, **options):
        self.disk = Disk('vda', 16 * MIB + 3 * 512)
        self.vm = self.bare(self.disk, **options)
        self.vm.write('vda', 0, 4 * MIB, 17)
        self.before = self.vm.state()
        peer = self.vm
        if proxy:
            peer = self.proxy = QmpProxy(self.folder, self.vm, listener=self.listen_as_qemu(f'{self.folder}/proxy.qmp'))
            self.addCleanup(peer.close)
        self.daemon = self.qpulld({'vm': peer}, linger=linger, flags=[hold])
        self.daemon.wait_idle()

    @staticmethod
    def listen_as_qemu(path):
        """A listening socket that was made by a process with the command line of a QEMU."""
        here, there = socket.socketpair()
        code = 'import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(8); ' \
               'socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"x"], [s.fileno()]); time.sleep(600)'
        harness.spawn(['qemu-system-none', '-c', code, path, str(there.fileno())], executable=sys.executable,
                      pass_fds=[there.fileno()])
        with here, there:
            here.settimeout(10)
            _, fds, _, _ = socket.recv_fds(here, 1, 1)
        return socket.socket(fileno=fds[0])

    def open(self, export='vm/vda@new'):
        h = self.h = nbdpull.connect(self.daemon.uri(export))
        self.frozen = bytes(self.disk.model.image)[:self.disk.size]
        return h

    def status(self):
        return self.vm.look('query-status')['status']

    def shut_down(self):
        acpi(self.vm, ACPI_POWEROFF, lambda: self.status() == 'shutdown')

    def shut_down_and_end(self):
        acpi(self.vm, ACPI_POWEROFF, lambda: self.vm.process.poll() is not None)
        self.check_ended()

    def marks(self):
        return [n for n in self.vm.state()['nodes'] if '-hold' in n]

    def check_ended(self, status=0):
        self.assertEqual(self.vm.process.wait(20), status)

    def check_not_held_any_more(self):
        """A guest that shuts down ends its QEMU, at once."""
        self.assertEqual(self.vm.state(), self.before)
        self.shut_down_and_end()

    def last(self):
        return harness.wait_until(lambda: self.daemon.vm()['session'] is None and self.daemon.vm()['last-session'], 20)

    def test_the_pull_of_a_vm_that_shuts_down_ends_well_and_then_qemu_ends(self):
        self.begin(extra=['-device', 'pvpanic'])
        h = self.open()
        self.vm.write('vda', MIB, MIB, 18)
        self.shut_down()
        self.assertTrue(self.daemon.ask('query-sessions')[0]['held-shutdown'])
        self.assertSame(nbdpull.read_all(h), self.frozen, 'the frozen disk')
        h.shutdown()
        self.check_ended()
        last = self.last()
        self.assertEqual((last['failure'], last['problems']), (None, None))
        self.assertEqual(image_bitmaps(self.disk), {'new': False})
        self.assertIn('its guest has shut down; QEMU waits for the end of session', self.daemon.log())
        self.daemon.stop()

    def test_a_guest_that_panics_is_held_likewise(self):
        self.begin(extra=['-device', 'pvpanic'])
        h = self.open()
        self.vm.hmp(PANIC)
        harness.wait_until(lambda: self.status() == 'guest-panicked', 10, 'the panic')
        self.assertSame(nbdpull.read_all(h), self.frozen, 'the frozen disk')
        h.shutdown()
        self.check_ended()
        self.assertEqual(image_bitmaps(self.disk), {'new': False})

    def test_a_panicked_guest_that_somebody_wants_to_look_at_stays(self):
        self.begin(extra=['-device', 'pvpanic', '-action', 'panic=pause'])
        h = self.open()
        self.vm.hmp(PANIC)
        harness.wait_until(lambda: self.status() == 'guest-panicked', 10, 'the panic')
        h.shutdown()
        self.daemon.wait_idle()
        self.assertEqual(self.status(), 'guest-panicked')
        self.assertEqual(self.marks(), [])

    def test_it_waits_no_longer_than_it_was_told(self):
        self.begin(hold='--hold-shutdown=1')
        h = self.open()
        self.shut_down_and_end()  # which says it again and again
        self.assertIn('--hold-shutdown lets QEMU wait no longer for session', self.last()['failure'])
        with self.assertRaises(nbdpull.nbd.Error):
            h.pread(512, 0)
        self.assertEqual(image_bitmaps(self.disk), {})
        self.daemon.stop()

    def test_after_the_session_nothing_is_held(self):
        self.begin()
        h = self.open('vm/vda')
        self.assertEqual(len(self.marks()), 1)
        h.shutdown()
        self.daemon.wait_idle()
        self.check_not_held_any_more()

    def test_without_the_flag_nothing_is_held(self):
        self.begin(hold='--hold-shutdown=0')
        self.open('vm/vda')
        self.assertEqual(self.marks(), [])
        self.shut_down_and_end()

    def test_quit_is_not_held(self):
        self.begin()
        self.open()
        self.vm.quit()
        self.assertIn('host-qmp-quit', self.last()['failure'])

    def test_a_vm_that_somebody_lets_run_again_is_not_ended(self):
        self.begin()
        h = self.open('vm/vda')
        self.shut_down()
        self.vm.look('system_reset')
        self.vm.look('cont')
        self.assertFalse(self.daemon.ask('query-sessions')[0]['held-shutdown'])
        h.shutdown()
        self.daemon.wait_idle()
        self.assertEqual(self.status(), 'running')
        time.sleep(0.2)  # the firmware makes the port of ACPI_POWEROFF ready again
        self.assertEqual(self.vm.state(), self.before)

    def test_a_qemu_that_waits_by_itself_is_left_alone(self):
        for extra in (['-no-shutdown'], ['-action', 'shutdown=pause']):
            self.begin(extra=extra)
            h = self.open('vm/vda')
            self.assertEqual(self.marks(), [])
            self.shut_down()
            h.shutdown()
            self.daemon.wait_idle()
            self.assertEqual(self.status(), 'shutdown')
            self.assertIn(f'--hold-shutdown does not hold it: QEMU was started with \'{" ".join(extra)}\'',
                          self.daemon.log())
            self.daemon.kill()
            self.vm.kill()

    def test_a_successor_takes_back_what_a_killed_daemon_changed(self):
        self.begin()
        self.open()
        self.daemon.kill()
        self.assertEqual(len(self.marks()), 1)
        self.daemon.start()
        self.daemon.wait_idle()
        self.check_not_held_any_more()

    def test_a_successor_ends_a_qemu_that_a_killed_daemon_held(self):
        self.begin()
        self.open()
        self.daemon.kill()
        self.shut_down()
        time.sleep(0.2)
        self.assertIsNone(self.vm.process.poll())
        self.daemon.start()
        self.check_ended()
        self.assertEqual(image_bitmaps(self.disk), {})
        harness.wait_until(lambda: 'QEMU went away' in self.daemon.log() or 'earlier session' in self.daemon.log(), 10)
        self.daemon.stop()

    def strike(self, target, when):
        """One session, and a command of it at which the daemon is killed. How many there are before it is a matter of
        time, so it is found by name: the first of that name after so many set-actions, itself included."""
        seen = []

        def count(name):
            seen.append(name)
            if (name, seen.count('set-action')) == target and self.proxy.number is None:
                self.proxy.number = len(self.proxy.commands)
        self.proxy.at(None, **{when: lambda: self.daemon.kill() or False})
        self.proxy.at_each(count)
        try:
            self.open('vm/vda').shutdown()
        except nbdpull.nbd.Error:
            pass
        harness.wait_until(lambda: self.daemon.process.poll() is not None, 20, f'the blow {when} {target} of {seen}')
        self.proxy.at_each(None)
        self.proxy.off()
        self.daemon.start()
        self.daemon.wait_idle()
        self.assertEqual(self.vm.state(), self.before, f'killed {when} {target} of {seen}')
        self.open('vm/vda').shutdown()  # the self-test of the new one
        self.daemon.wait_idle()

    def test_a_daemon_killed_at_any_of_its_commands_leaves_nothing_held(self):
        """The rows of the hold are the first and the last that a session does."""
        self.begin(proxy=True)
        self.open('vm/vda').shutdown()  # the self-test
        self.daemon.wait_idle()
        blows = 0
        self.proxy.at(None)
        self.open('vm/vda').shutdown()
        self.daemon.wait_idle()
        names = self.proxy.commands
        actions = [i for i, name in enumerate(names) if name == 'set-action']
        self.assertEqual(len(actions), 2)
        # Making the mark, pausing; powering off, looking, removing the mark.
        self.assertEqual(names[actions[0] - 1], 'blockdev-add')
        self.assertEqual(names[actions[1]:actions[1] + 3], ['set-action', 'query-status', 'blockdev-del'])
        for target in (('blockdev-add', 0), ('set-action', 1), ('set-action', 2), ('query-status', 2),
                       ('blockdev-del', 2)):
            for when in ('before', 'after'):
                self.strike(target, when)
                blows += 1
        self.assertEqual(blows, 10)
        self.check_not_held_any_more()


if __name__ == '__main__':
    harness.main()
