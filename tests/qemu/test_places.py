# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Scratch in other places than files of ours, said as QEMU's blockdev JSON: they work, are refused in words, and their
end costs the session alone."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import rawnbd
from harness import MIB, Disk
from qmpproxy import QmpProxy

TIMEOUT = 2  # seconds: --cbw-timeout of these tests
PATIENT = 20  # likewise, where scratch must not be given up
BUSY = 10  # seconds that a machine with other work takes; where the guest is held for good, it is for longer than both
SLOWEST_US = (TIMEOUT + BUSY) * 1_000_000  # the guest's slowest write
OPEN_S = 2  # PLACE_OPEN_TIMEOUT_S


class Places(harness.Case):
    def nbdkit(self, name, *words):
        """A server; its socket."""
        if not shutil.which('nbdkit'):
            self.skipTest('missing: nbdkit')
        path = f'{self.folder}/{name}'
        with open(f'{path}.log', 'ab') as log:
            process = harness.spawn(['nbdkit', '-f', '-U', path, *words], stdout=log, stderr=log)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        harness.wait_until(lambda: os.path.exists(path), 10, 'nbdkit')
        return process

    def nbd(self, name='%v-%d', **more):
        """JSON of a server for each disk."""
        return json.dumps({'driver': 'nbd', 'server': {'type': 'unix', 'path': f'{self.folder}/{name}'}, **more})

    def daemon(self, guest, place, *flags, linger=1, timeout=TIMEOUT):
        """--scratch=JSON comes in a file, which flags of the harness would win over: so it is a VM's own."""
        path = f'{self.folder}/conf'
        with open(path, 'w', encoding='utf-8') as f:
            f.write(f'[vm "vm"]\nscratch={place}\n')
        return self.qpulld(guest, linger=linger, flags=[f'--config={path}', f'--cbw-timeout={timeout}', *flags])

    def pull(self, daemon, export):
        raw = rawnbd.Raw(daemon.socket)
        self.addCleanup(raw.close)
        raw.go(export)
        return raw

    def whole(self, raw, size):
        data = bytearray()
        while len(data) < size:
            error, part = raw.read(len(data), min(MIB, size - len(data)))
            self.assertEqual(error, 0, f'at {len(data)}')
            data += part
        return data

    def assertWorks(self, guest, daemon, before, copied=None):
        """Two disks are overwritten during a pull, which is right; and the next one, too."""
        frozen = {n: bytes(d.model.image) for n, d in guest.disks.items()}
        raws = {n: self.pull(daemon, f'vm/{n}') for n in guest.disks}
        for n, d in guest.disks.items():
            guest.write(n, 0, d.size // 2 & ~511, 7)
        if copied:
            copied()
        for n, d in guest.disks.items():
            self.assertSame(self.whole(raws[n], d.size), frozen[n], n)
            raws[n].disc()
        daemon.wait_idle()
        self.assertIsNone(daemon.vm()['last-session']['failure'])
        self.assertNothingLeft(guest, daemon, before)
        guest.check()

    def disks(self):
        return Disk('vda', 16 * MIB + 3 * 512), Disk('vdb', 8 * MIB)

    def ready(self, *disks):
        guest = self.guest(*(disks or self.disks()))
        for n, d in guest.disks.items():
            guest.write(n, 0, d.size & ~511, 1)
        return guest, guest.state()

    def test_an_nbd_server_holds_scratch_and_gets_discards(self):
        for name, size in (('vm-vda', 17 * MIB), ('vm-vdb', 8 * MIB)):
            path = f'{self.folder}/{name}.raw'
            with open(path, 'wb') as f:
                f.truncate(size)
            process = harness.spawn(['qemu-nbd', '-f', 'raw', '-k', f'{self.folder}/{name}', '-x', name, '-t',
                                     '--discard=unmap', '-e', '8', path])
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            harness.wait_until(lambda name=name: os.path.exists(f'{self.folder}/{name}'), 10, 'qemu-nbd')
        guest, before = self.ready()
        daemon = self.daemon(guest, self.nbd(export='%v-%d'), timeout=PATIENT)
        self.assertWorks(guest, daemon, before, copied=lambda: self.assertGreater(
            os.stat(f'{self.folder}/vm-vda.raw').st_blocks * 512, 7 * MIB, 'nothing was copied there'))
        self.assertWorks(guest, daemon, before)
        self.assertEqual(os.listdir(daemon.scratch), [])
        daemon.stop()

    def test_a_luks_file_holds_scratch_that_nobody_can_read(self):
        secret = ['--object', 'secret,id=scratch-key,data=correct-horse']
        for name, size in (('vm-vda', 17 * MIB), ('vm-vdb', 8 * MIB)):
            words = ['qemu-img', 'create', '-q', *secret, '-f', 'luks', '-o', 'key-secret=scratch-key,iter-time=10',
                     f'{self.folder}/{name}.luks', str(size)]
            # On a busy machine it may fail to measure how fast it is, and says so.
            harness.wait_until(lambda words=words: harness.run(words, check=False).returncode == 0, 30, 'a LUKS image')
        guest = self.guest(*self.disks(), extra=['-object', 'secret,id=scratch-key,data=correct-horse'])
        for n, d in guest.disks.items():
            guest.write(n, 0, d.size & ~511, 1)
        before = guest.state()
        frozen_sector = bytes(guest.disks['vda'].model.image[:512])
        place = {'driver': 'luks', 'key-secret': 'scratch-key',
                 'file': {'driver': 'file', 'filename': f'{self.folder}/%v-%d.luks'}}

        def unreadable():
            with open(f'{self.folder}/vm-vda.luks', 'rb') as f:
                held = f.read()
            self.assertGreater(os.stat(f'{self.folder}/vm-vda.luks').st_blocks * 512, 7 * MIB, 'nothing was copied')
            self.assertNotIn(frozen_sector, held)
        self.assertWorks(guest, self.daemon(guest, json.dumps(place), timeout=PATIENT), before, copied=unreadable)

    def test_what_cannot_be_opened_or_is_too_small_is_refused_in_words(self):
        guest, before = self.ready()
        self.nbdkit('vm-vda', 'memory', f'{17 * MIB}')
        daemon = self.daemon(guest, self.nbd())
        words = rawnbd.refusal(daemon.socket, 'vm/vda')
        self.assertIn("scratch place of disk 'vdb'", words)
        self.nbdkit('vm-vdb', 'memory', f'{8 * MIB - 512}')
        words = rawnbd.refusal(daemon.socket, 'vm/vda')
        self.assertRegex(words, "scratch place of disk 'vdb' has 8388096 bytes and the disk 8388608")
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)
        guest.check()

    def test_two_disks_never_share_a_place(self):
        guest, before = self.ready()
        daemon = self.daemon(guest, self.nbd('one'))
        self.assertIn('%d', rawnbd.refusal(daemon.socket, 'vm/vda'))
        self.assertNothingLeft(guest, daemon, before)

    def test_a_server_that_dies_costs_the_session_and_the_guest_nothing(self):
        guest, before = self.ready(Disk('vda', 16 * MIB))
        server = self.nbdkit('vm-vda', 'memory', f'{16 * MIB}')
        daemon = self.daemon(guest, self.nbd())
        raw = self.pull(daemon, 'vm/vda@never')
        guest.write('vda', 0, MIB, 2)
        server.kill()
        server.wait()
        self.assertGoesOnWithout(guest, daemon, raw, before)

    def assertGuestWentOn(self, guest, load):
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertLess(result['slowest-us'], SLOWEST_US)
        print(f'the slowest of {result["ops"]} operations took {result["slowest-us"] / 1e6:.2f} s', flush=True)
        guest.check()

    def assertGoesOnWithout(self, guest, daemon, raw, before, bound=SLOWEST_US):
        load = guest.load('vda', ('write', 'read', 'flush'))
        harness.wait_until(lambda: load.status()['ops'] > 20, 30, 'a guest that writes')
        time.sleep(0.5)
        began = time.monotonic()
        with contextlib.suppress(EOFError, ConnectionError):  # it was found out before
            self.assertNotEqual(raw.read(0, 65536)[0], 0)
            raw.wait_hangup(60)
        raw.close()
        daemon.wait_idle(timeout=60)
        last = daemon.vm()['last-session']
        took = time.monotonic() - began
        self.assertIn("disk 'vda' of VM 'vm' is lost", last['failure'])
        ops = load.status()['ops']
        harness.wait_until(lambda: load.status()['ops'] > ops + 10, 30, 'a guest that goes on')
        result = load.stop()
        print(f'{last["failure"]}\n{result["ops"]} operations, the slowest {result["slowest-us"] / 1e6:.2f} s; the way '
              f'down took {took:.2f} s', flush=True)
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertLess(result['slowest-us'], bound)
        guest.check()
        self.assertEqual(harness.bitmaps(guest.look), {})
        self.assertNothingLeft(guest, daemon, before)
        guest.poweroff()
        self.assertModel(guest.disks['vda'].model, self.raw(guest.disks['vda']), 'the image')

    def test_a_server_that_stalls_holds_the_guest_for_the_timeout_once(self):
        """Without the cut on the way down it would stand still for as long as the server stalls: here, for ever."""
        guest, before = self.ready(Disk('vda', 16 * MIB))
        server = self.nbdkit('vm-vda', 'memory', f'{16 * MIB}')
        daemon = self.daemon(guest, self.nbd())
        raw = self.pull(daemon, 'vm/vda@never')
        guest.write('vda', 0, MIB, 2)
        server.send_signal(signal.SIGSTOP)
        self.assertGoesOnWithout(guest, daemon, raw, before)

    def test_a_server_that_stalls_while_the_maps_are_read_holds_the_guest_for_the_timeout_once(self):
        """A command that drains would wait for the copies under way: none comes once the exports stand. Where one does, the
        server stalls just before it; else a moment later."""
        guest, before = self.ready(Disk('vda', 64 * MIB))
        server = self.nbdkit('vm-vda', 'memory', f'{64 * MIB}')
        proxy = QmpProxy(self.folder, guest)
        self.addCleanup(proxy.close)
        daemon = self.daemon(proxy, self.nbd(), linger=0)
        self.pull(daemon, 'vm/vda').disc()  # the self-test, and what comes once
        daemon.wait_idle()
        load, seen = guest.load('vda', ('write', 'read', 'flush'), pause_us=20000), []
        harness.wait_until(lambda: load.status()['ops'] > 20, 30, 'a guest that writes')

        def strike(name):
            seen.append(name)
            after = seen[seen.index('blockdev-reopen'):] if 'blockdev-reopen' in seen else []
            if 'block-export-add' in after and name in ('blockdev-del', 'transaction'):
                server.send_signal(signal.SIGSTOP)
                time.sleep(0.2)  # until a copy is under way
        proxy.at_each(strike)
        raw = self.pull(daemon, 'vm/vda@never')
        time.sleep(1)
        server.send_signal(signal.SIGSTOP)
        slowest, began = 0, time.monotonic()
        while time.monotonic() < began + 3 * TIMEOUT:
            asked = time.monotonic()
            load.status()
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.01)
        self.assertLess(slowest, SLOWEST_US / 1e6, "QEMU's main loop stood still, and the guest with it")
        proxy.at_each(None)
        daemon.wait_idle(timeout=60)  # lost: its client is still there
        raw.close()
        self.assertIn("disk 'vda' of VM 'vm' is lost", daemon.vm()['last-session']['failure'])
        self.assertGuestWentOn(guest, load)
        self.assertNothingLeft(guest, daemon, before)

    def test_a_server_that_stalls_for_less_than_the_timeout_costs_the_session_nothing(self):
        """Less than QEMU can count, more than what 10 seconds become in the 32 bits of QEMU before 9.1 (1.4)."""
        guest, before = self.ready(Disk('vda', 16 * MIB))
        server = self.nbdkit('vm-vda', 'memory', f'{16 * MIB}')
        daemon = self.daemon(guest, self.nbd(), timeout=10)
        frozen = bytes(guest.disks['vda'].model.image)
        raw = self.pull(daemon, 'vm/vda')
        server.send_signal(signal.SIGSTOP)
        go_on = threading.Timer(2.2, server.send_signal, [signal.SIGCONT])
        go_on.start()
        guest.write('vda', 0, MIB, 2)  # waits for its copy
        go_on.join()
        self.assertSame(self.whole(raw, 16 * MIB), frozen, 'vda')
        raw.disc()
        daemon.wait_idle()
        self.assertIsNone(daemon.vm()['last-session']['failure'])
        self.assertNothingLeft(guest, daemon, before)
        guest.check()

    def test_a_client_that_leaves_while_scratch_stalls_does_not_stop_the_guest(self):
        guest, before = self.ready(Disk('vda', 16 * MIB))
        server = self.nbdkit('vm-vda', 'memory', f'{16 * MIB}')
        daemon = self.daemon(guest, json.dumps({'driver': 'raw', 'file': json.loads(self.nbd())}), linger=0)
        raw = self.pull(daemon, 'vm/vda')
        load = guest.load('vda', ('write', 'read', 'flush'))
        harness.wait_until(lambda: load.status()['ops'] > 20, 30, 'a guest that writes')
        server.send_signal(signal.SIGSTOP)
        raw.disc()
        daemon.wait_idle(timeout=60)
        self.assertGuestWentOn(guest, load)
        self.assertNothingLeft(guest, daemon, before)

    def test_a_killed_daemons_stalled_scratch_is_swept_without_stopping_the_guest(self):
        guest, before = self.ready(Disk('vda', 16 * MIB))
        server = self.nbdkit('vm-vda', 'memory', f'{16 * MIB}')
        daemon = self.daemon(guest, self.nbd())
        self.pull(daemon, 'vm/vda')
        load = guest.load('vda', ('write', 'read', 'flush'))
        harness.wait_until(lambda: load.status()['ops'] > 20, 30, 'a guest that writes')
        server.send_signal(signal.SIGSTOP)
        daemon.kill()
        time.sleep(TIMEOUT)
        daemon.start()
        daemon.wait_idle(timeout=60)
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertLess(result['slowest-us'], SLOWEST_US)
        self.assertNothingLeft(guest, daemon, before)
        guest.check()

    def test_a_server_that_does_not_answer_holds_the_guest_no_longer_than_the_open_timeout(self):
        guest, before = self.ready()
        for name in ('vm-vda', 'vm-vdb'):
            self.nbdkit(name, 'memory', f'{17 * MIB}').send_signal(signal.SIGSTOP)
        daemon = self.daemon(guest, self.nbd())
        load = guest.load('vda', ('write', 'read', 'flush'))
        self.assertIn("scratch place of disk 'vda'", rawnbd.refusal(daemon.socket, 'vm/vda'))
        daemon.wait_idle()
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertLess(result['slowest-us'], (OPEN_S + BUSY) * 1_000_000)
        print(f'the slowest of {result["ops"]} operations took {result["slowest-us"] / 1e6:.2f} s', flush=True)
        self.assertNothingLeft(guest, daemon, before)

    def test_a_file_system_that_hangs_is_waited_for_while_the_guest_goes_on(self):
        """Files cannot be cut off: the way down waits for them, before anything that would stop the guest."""
        guest, before = self.ready(Disk('vda', 64 * MIB))
        mounted = f'{self.folder}/qpulld.scratch'
        image = f'{self.folder}/fs'
        os.mkdir(mounted)
        with open(image, 'wb') as f:
            f.truncate(256 * MIB)
        if os.geteuid() or not shutil.which('mkfs.ext4') or not shutil.which('fsfreeze') or \
                subprocess.run(['mkfs.ext4', '-q', '-F', image], check=False).returncode or \
                subprocess.run(['mount', '-o', 'loop', image, mounted], check=False).returncode:
            self.skipTest('root mounts a file system that can be frozen (mkfs.ext4, loop devices, fsfreeze)')
        self.addCleanup(subprocess.run, ['umount', '-l', mounted], check=True)
        os.rmdir(f'{mounted}/lost+found')

        def thaw():
            subprocess.run(['fsfreeze', '-u', mounted], check=False, stderr=subprocess.DEVNULL)
        self.addCleanup(thaw)
        daemon = self.qpulld(guest, linger=0, flags=[f'--cbw-timeout={TIMEOUT}', '--scratch-reserve=0'])
        raw = self.pull(daemon, 'vm/vda')
        load = guest.load('vda', ('write', 'read', 'flush'))
        harness.wait_until(lambda: load.status()['ops'] > 20, 30, 'a guest that writes')
        subprocess.run(['fsfreeze', '-f', mounted], check=True)
        time.sleep(TIMEOUT + 1)
        raw.close()
        time.sleep(2 * TIMEOUT)
        self.assertIn('let go of scratch', daemon.ask('query-sessions')[0]['step'])
        ops = load.status()['ops']
        harness.wait_until(lambda: load.status()['ops'] > ops + 10, 30, 'a guest that goes on')
        thaw()
        daemon.wait_idle(timeout=60)
        self.assertGuestWentOn(guest, load)
        self.assertNothingLeft(guest, daemon, before)


if __name__ == '__main__':
    harness.main()
