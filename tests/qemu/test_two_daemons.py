#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two daemons hold two monitors of one QEMU: the later one must neither sweep the other's living session away nor build
on it, and must make good what the other has left once that is dead."""
import os

import harness
import nbdpull
from harness import MIB


class TwoDaemons(harness.Case):
    def test_a_living_session_of_another_daemon_is_spared_and_a_dead_ones_is_swept(self):
        guest = self.guest()
        guest.write('vda', 0, 4 * MIB, 7)
        first = self.qpulld(guest, linger=60)
        h = nbdpull.connect(first.uri('vm/vda'))
        before = h.pread(4 * MIB, 0)
        guest.write('vda', 0, 4 * MIB, 8)
        second = self.qpulld({'vm': guest.spare_qmp_path}, linger=0, name='second')
        self.assertIn(f'another qpulld or nbdkit (process {first.process.pid}, user {os.geteuid()})', self.refusal(second))
        self.assertEqual(h.pread(4 * MIB, 0), before, 'the first one\'s frozen bytes')
        first.kill()
        h = nbdpull.connect(second.uri('vm/vda'))
        self.assertNotEqual(h.pread(4 * MIB, 0), before)
        h.shutdown()
        second.wait_idle()
        self.assertFalse([n for n in guest.look('query-named-block-nodes') if n['node-name'].startswith('qpull-')])
        guest.check()
        second.stop()

    def test_a_daemon_that_was_first_there_does_not_build_on_a_later_ones_session(self):
        guest = self.guest()
        first = self.qpulld(guest, linger=0)
        h = nbdpull.connect(first.uri('vm/vda'))  # its self-test is done
        h.shutdown()
        first.wait_idle()
        second = self.qpulld({'vm': guest.spare_qmp_path}, linger=60, name='second')
        h = nbdpull.connect(second.uri('vm/vda'))
        before = h.pread(MIB, 0)
        guest.write('vda', 0, MIB, 9)
        self.assertIn(f'another qpulld or nbdkit (process {second.process.pid}, user {os.geteuid()})', self.refusal(first))
        self.assertEqual(h.pread(MIB, 0), before)
        h.shutdown()
        second.stop()
        h = nbdpull.connect(first.uri('vm/vda'))
        h.shutdown()
        guest.check()
        first.stop()

    def test_notes_in_one_directory_have_one_keeper(self):
        guest = self.guest()
        first = self.qpulld(guest)
        second = harness.Qpulld(self.folder, {'vm': guest.spare_qmp_path}, name='second', state=first.state, start=False)
        self.things.append(second)
        self.refused_by(first, second)
        first.kill()  # what it leaves in the directory keeps nobody out
        second.start()
        self.refused_by(second, first)
        second.stop()
        first.start()
        first.stop()

    def refused_by(self, first, second):
        with self.assertRaises(AssertionError):
            second.start()
        self.assertIn(f'another qpulld or nbdkit (process {first.process.pid}) keeps the notes', second.log())

    def refusal(self, daemon):
        """What it says where a client wants a disk."""
        with self.assertRaises(nbdpull.nbd.Error):
            nbdpull.connect(daemon.uri('vm/vda'))
        return daemon.log()


if __name__ == '__main__':
    harness.main()
