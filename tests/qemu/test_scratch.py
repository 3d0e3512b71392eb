# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Scratch limits: a guest that writes too much costs the session, in time and in words, and never itself anything."""
import os
import re
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import rawnbd
from harness import MIB, Disk

SLOWEST_US = 3_000_000  # a guest's write, on a machine that runs other things, too
BETWEEN_LOOKS = 64 * MIB  # past a limit: what this guest can write until it is noticed, generously
IN_TIME = 10  # seconds from the limit to the end, likewise


class Scratch(harness.Case):
    def own_file_system(self, size):
        """A small tmpfs for the scratch, mounted where the daemon will look for it."""
        if os.geteuid() != 0:
            self.skipTest('root mounts a small file system for the scratch')
        path = f'{self.folder}/qpulld.scratch'
        os.mkdir(path)
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', path], check=False).returncode:
            self.skipTest('cannot mount a tmpfs')
        self.addCleanup(subprocess.run, ['umount', '-l', path], check=True)
        return path

    def free(self, path):
        st = os.statvfs(path)
        return st.f_bavail * st.f_frsize

    def session(self, daemon):
        return daemon.ask('query-sessions')[0]

    def checkpoints(self, guest):
        """{(node, name)} of what stands on the guest's disks."""
        return set(harness.bitmaps(guest.look))

    def pull(self, daemon, export):
        """A client that has opened it, and reads a little."""
        raw = rawnbd.Raw(daemon.socket)
        self.addCleanup(raw.close)
        raw.go(export)
        self.assertEqual(raw.read(0, 65536)[0], 0)
        return raw

    def wait_given_up(self, daemon, raw, name='vm'):
        """The client is hung up on; what the daemon says of the session that was."""
        try:
            raw.wait_hangup(60)
        finally:
            raw.close()
        daemon.wait_idle(name=name)
        return daemon.vm(name)['last-session']

    def assertWords(self, daemon, last, session, option, vm='vm', disk='vda'):
        """The reason is everywhere, and complete."""
        for word in (session, f"VM '{vm}'", f"disk '{disk}'", option, 'bytes', 'so that the guest is not'):
            self.assertIn(word, last['failure'])
        self.assertEqual(last['id'], session)
        self.assertIn(last['failure'], daemon.qpull('status').stdout)
        with open(daemon.log_path, encoding='utf-8') as f:
            self.assertEqual(sum(last['failure'] in line and 'error' in line for line in f), 1)

    def assertUnhurt(self, guest, load):
        """The guest went on, saw no error and waited for nothing."""
        ops = load.status()['ops']
        harness.wait_until(lambda: load.status()['ops'] > ops + 10, 30, 'a guest that goes on')
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertLess(result['slowest-us'], SLOWEST_US)
        guest.check()
        return result

    def test_a_session_past_its_limit_is_given_up_and_the_guest_is_not(self):
        limit = 16 * MIB
        guest = self.guest(Disk('vda', 256 * MIB), Disk('vdb', 64 * MIB))
        guest.write('vda', 0, 4 * MIB, 1)
        before = guest.state()
        daemon = self.qpulld(guest, linger=1, flags=[f'--scratch-limit={limit}'])
        self.assertEqual(daemon.ask('query-status')['scratch']['limit'], limit)
        done = self.pull(daemon, 'vm/vdb@never')
        raw = self.pull(daemon, 'vm/vda@never')
        session = daemon.vm()['session']
        done.disc()  # this disk's pull has ended well
        load = guest.load('vda', ('write', 'read', 'flush'))
        last = self.wait_given_up(daemon, raw)
        self.assertWords(daemon, last, session, '--scratch-limit')
        used = int(re.search(r'holds (\d+) bytes', last['failure']).group(1))
        result = self.assertUnhurt(guest, load)
        print(f'{last["failure"]}\n{used - limit} bytes too many; {result["ops"]} operations, the slowest '
              f'{result["slowest-us"] / 1000:.0f} ms', flush=True)
        self.assertTrue(limit < used < limit + BETWEEN_LOOKS, used)
        # The checkpoint is where somebody has the data, and only there.
        self.assertEqual(self.checkpoints(guest), {('node-vdb', 'never')})
        daemon.qpull('checkpoint', 'delete', 'vm', 'never')
        self.assertNothingLeft(guest, daemon, before)
        # The next one works, and is right.
        guest.check()
        raw = self.pull(daemon, 'vm/vda@kept')
        raw.disc()
        daemon.wait_idle()
        self.assertIsNone(daemon.vm()['last-session']['failure'])
        self.assertEqual(self.checkpoints(guest), {('node-vda', 'kept')})
        guest.poweroff()
        self.assertModel(guest.disks['vda'].model, self.raw(guest.disks['vda']), 'the image')
        daemon.stop()

    def test_a_session_below_its_limit_is_left_alone(self):
        guest = self.guest(Disk('vda', 64 * MIB))
        daemon = self.qpulld(guest, linger=0, flags=['--scratch-limit=32M', '--scratch-total-limit=32M'])
        before = guest.state()
        raw = self.pull(daemon, 'vm/vda@good')
        guest.write('vda', 0, 24 * MIB, 1)
        guest.write('vda', 0, 24 * MIB, 2)  # is copied once only
        harness.wait_until(lambda: self.session(daemon)['scratch-bytes'] >= 24 * MIB, 10, 'the bytes in the status')
        time.sleep(1)
        self.assertEqual(raw.read(0, 65536), (0, bytes(65536)))
        raw.disc()
        daemon.wait_idle()
        self.assertIsNone(daemon.vm()['last-session']['failure'])
        self.assertEqual(self.checkpoints(guest), {('node-vda', 'good')})
        daemon.qpull('checkpoint', 'delete', 'vm', 'good')
        self.assertNothingLeft(guest, daemon, before)

    def test_of_two_sessions_that_hold_too_much_the_larger_goes(self):
        one, two = self.guest(Disk('vda', 256 * MIB), name='one'), self.guest(Disk('vdb', 256 * MIB), name='two')
        before = [g.state() for g in (one, two)]
        daemon = self.qpulld({'one': one, 'two': two}, linger=1, flags=['--scratch-total-limit=32M'])
        small, large = self.pull(daemon, 'one/vda@a'), self.pull(daemon, 'two/vdb@a')
        session = daemon.vm('two')['session']
        one.write('vda', 0, 8 * MIB, 1)
        load = two.load('vdb', ('write',))
        last = self.wait_given_up(daemon, large, 'two')
        self.assertWords(daemon, last, session, '--scratch-total-limit', vm='two', disk='vdb')
        self.assertUnhurt(two, load)
        self.assertEqual(two.state(), before[1])
        self.assertEqual(two.deleted_fds(), [])
        self.assertEqual(small.read(0, 65536), (0, bytes(65536)))  # the other's view stands
        small.disc()
        daemon.wait_idle(name='one')
        self.assertIsNone(daemon.vm('one')['last-session']['failure'])
        raw = self.pull(daemon, 'two/vdb')
        raw.disc()
        daemon.wait_idle(name='two')
        one.check()

    def test_a_session_that_would_cost_another_its_life_is_refused_in_words(self):
        one, two = self.guest(Disk('vda', 64 * MIB), name='one'), self.guest(Disk('vdb', 64 * MIB), name='two')
        before = two.state()
        daemon = self.qpulld({'one': one, 'two': two}, linger=1, flags=['--scratch-total-limit=9M'])
        raw = self.pull(daemon, 'one/vda')
        one.write('vda', 0, 8 * MIB, 1)
        harness.wait_until(lambda: daemon.ask('query-status')['scratch']['used'] >= 8 * MIB, 10, 'the bytes')
        words = rawnbd.refusal(daemon.socket, 'two/vdb')
        self.assertIn('--scratch-total-limit', words)
        self.assertIn('two', words)
        self.assertEqual(raw.read(0, 65536)[0], 0)
        self.assertEqual(two.state(), before)
        raw.disc()
        daemon.wait_idle(name='one')
        self.pull(daemon, 'two/vdb').disc()
        daemon.wait_idle(name='two')

    def test_the_reserve_is_left_free_and_whoever_would_begin_below_it_is_refused(self):
        path = self.own_file_system('128m')
        reserve = 64 * MIB
        guest = self.guest(Disk('vda', 256 * MIB))
        before = guest.state()
        daemon = self.qpulld(guest, linger=1, flags=['--scratch-reserve=64M'])
        raw = self.pull(daemon, 'vm/vda@never')
        session = daemon.vm()['session']
        least, stop = [self.free(path)], threading.Event()

        def watch():
            while not stop.wait(0.005):
                least.append(self.free(path))
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            load = guest.load('vda', ('write', 'flush'))
            last = self.wait_given_up(daemon, raw)
        finally:
            stop.set()
            watcher.join()
        self.assertWords(daemon, last, session, '--scratch-reserve')
        result = self.assertUnhurt(guest, load)
        print(f'{last["failure"]}\nof 64 MiB in reserve {min(least)} bytes were left at worst, the slowest of '
              f'{result["ops"]} operations took {result["slowest-us"] / 1000:.0f} ms', flush=True)
        self.assertGreater(min(least), 0, 'the file system was full')
        self.assertLess(min(least), reserve)
        self.assertNothingLeft(guest, daemon, before)
        self.assertEqual(self.free(path), least[0], 'scratch is not free again')
        # What others take counts, too.
        with open(f'{path}/others', 'wb') as f:
            os.posix_fallocate(f.fileno(), 0, least[0] - reserve)
        words = rawnbd.refusal(daemon.socket, 'vm/vda')
        self.assertIn('--scratch-reserve', words)
        self.assertIn(path, words)
        daemon.wait_idle()
        os.unlink(f'{path}/others')
        self.assertNothingLeft(guest, daemon, before)
        self.pull(daemon, 'vm/vda').disc()
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)
        guest.poweroff()
        self.assertModel(guest.disks['vda'].model, self.raw(guest.disks['vda']), 'the image')

    def test_a_session_that_only_lingers_is_given_up_without_harm_to_what_was_pulled(self):
        guest = self.guest(Disk('vda', 64 * MIB))
        daemon = self.qpulld(guest, linger=600, flags=['--scratch-limit=4M'])
        raw = self.pull(daemon, 'vm/vda@whole')
        raw.disc()
        harness.wait_until(lambda: self.session(daemon)['lingering'], 10, 'the linger')
        began = time.monotonic()
        guest.write('vda', 0, 16 * MIB, 1)
        daemon.wait_idle()
        self.assertLess(time.monotonic() - began, IN_TIME)
        self.assertIn('--scratch-limit', daemon.vm()['last-session']['failure'])
        self.assertEqual(self.checkpoints(guest), {('node-vda', 'whole')})
        guest.check()


if __name__ == '__main__':
    harness.main()
