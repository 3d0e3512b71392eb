# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
"""A snapshot that QEMU gives up: nobody gets a wrong byte, everybody hears of it, and the guest does not."""
import os
import shutil
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import prometheus
import rawnbd
from harness import MIB, Disk
from qmpclient import Qmp

SOON = 20  # seconds from the break until all know; generously: the view is looked at once a second
BLOCK = 65536


class Reader(threading.Thread):
    """Reads blocks of the frozen view, whatever happens, until it is told or hung up on; keeps what was wrong."""

    def __init__(self, address, export, frozen, seed, depth=8):
        super().__init__(daemon=True)
        self.raw, self.frozen, self.seed, self.depth = rawnbd.Raw(address), frozen, seed, depth
        self.nblocks = self.raw.go(export) // BLOCK
        self.ngood = self.nerrors = 0
        self.wrong, self.late = [], 0  # late: good answers after the first error

    def run(self):
        n, asked = self.seed, []
        try:
            while True:
                while len(asked) < self.depth:  # several in flight
                    n = (n * 2862933555777941757 + 3037000493) & (1 << 64) - 1
                    asked.append(n % self.nblocks)
                    self.raw.request(rawnbd.CMD_READ, asked[-1] * BLOCK, BLOCK, cookie=asked[-1])
                magic, error = (int.from_bytes(self.raw.take(4), 'big') for _ in range(2))
                block = int.from_bytes(self.raw.take(8), 'big')
                asked.remove(block)
                assert magic == rawnbd.SIMPLE_MAGIC
                if error:
                    self.nerrors += 1
                    continue
                if self.raw.take(BLOCK) != self.frozen[block * BLOCK:(block + 1) * BLOCK]:
                    self.wrong.append(block)
                self.ngood += 1
                self.late += self.nerrors > 0
        except (EOFError, ConnectionError):
            pass
        finally:
            self.raw.close()


class Broken(harness.Case):
    def small_scratch(self, size='6m'):
        path = f'{self.folder}/qpulld.scratch'
        os.mkdir(path)
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', path], check=False).returncode:
            self.skipTest('root mounts a small file system for the scratch')
        self.addCleanup(subprocess.run, ['umount', '-l', path], check=True)

    def begin(self, *disks, flags=('--scratch-reserve=0',)):
        self.vm = self.guest(*disks)
        for name, disk in self.vm.disks.items():
            self.vm.write(name, 0, disk.size // 2 & ~4095, 1)
        self.before = self.vm.state()
        self.frozen = {name: bytes(disk.model.image) for name, disk in self.vm.disks.items()}
        self.daemon = self.qpulld(self.vm, linger=1, flags=flags)
        self.control = Qmp(self.daemon.control)
        self.addCleanup(self.control.close)

    def open(self, export, contexts=()):
        raw = rawnbd.Raw(self.daemon.socket)
        self.addCleanup(raw.close)
        raw.go(export, contexts=contexts)
        return raw

    def break_it(self, disk='vda', length=16 * MIB):
        """More than the scratch holds."""
        self.vm.write(disk, 0, length, 2)

    def assertTold(self, disk, dropped, kept, checkpoint, since):
        """In event, status, log and metrics, and complete."""
        lost = self.control.wait_event('SESSION_LOST', SOON)['data']
        self.assertEqual((lost['vm'], lost['disk'], lost['reason'], lost['step']), ('vm', disk, 'broken', 'up'))
        for word in ("VM 'vm'", f"disk '{disk}'", 'EINVAL', 'scratch', 'the guest goes on'):
            self.assertIn(word, lost['text'])
        print(f'told {time.monotonic() - since:.2f} s after the break: {lost["text"]}', flush=True)
        down = self.control.wait_event('SESSION_DOWN', SOON)['data']
        self.assertEqual((down['session'], down['reason'], down['problems']), (lost['session'], 'broken', None))
        self.assertEqual((down['checkpoint'], down['kept'], down['dropped']), (checkpoint, kept, dropped))
        self.daemon.wait_idle()
        last = self.daemon.vm()['last-session']
        self.assertEqual((last['id'], last['failure'], last['reason'], last['lost-disk'], last['failed-step']),
                         (lost['session'], lost['text'], 'broken', disk, 'up'))
        self.assertEqual((last['kept'], last['dropped']), (kept, dropped))
        self.assertIn(lost['text'], self.daemon.qpull('status').stdout)
        with open(self.daemon.log_path, encoding='utf-8') as f:
            self.assertEqual(sum(lost['text'] in line and 'Z error: ' in line for line in f), 1)
        numbers = prometheus.parse(self.daemon.qpull('metrics').stdout)
        self.assertEqual(numbers['qpull_sessions_ended_total', ('reason', 'broken'), ('vm', 'vm')], 1)
        self.assertEqual(numbers['qpull_checkpoints_dropped_total', ('vm', 'vm')], len(dropped))
        self.assertEqual(numbers['qpull_checkpoints_kept_total', ('vm', 'vm')], len(kept))

    def assertUndone(self, checkpoints=()):
        self.assertEqual(set(harness.bitmaps(self.vm.look)), set(checkpoints))
        for _, name in checkpoints:
            self.daemon.qpull('checkpoint', 'delete', 'vm', name)
        self.assertNothingLeft(self.vm, self.daemon, self.before)
        self.vm.check()

    def test_no_reader_gets_a_wrong_byte_and_all_are_hung_up_on(self):
        self.small_scratch()
        self.begin(Disk('vda', 48 * MIB))
        readers = [Reader(self.daemon.socket, 'vm/vda@never', self.frozen['vda'], i) for i in range(4)]
        for reader in readers:
            reader.start()
        harness.wait_until(lambda: all(r.ngood > 20 for r in readers), 30, 'readers that read')
        since = time.monotonic()
        self.break_it()
        for reader in readers:
            reader.join(SOON + 10)
            self.assertFalse(reader.is_alive(), 'a reader was not hung up on')
        self.assertTold('vda', dropped=['vda'], kept=[], checkpoint='never', since=since)
        print([(r.ngood, r.nerrors, r.late) for r in readers], flush=True)
        self.assertEqual([r.wrong for r in readers], [[]] * 4)
        self.assertTrue(any(r.nerrors for r in readers))
        self.assertUndone()
        # The next one is right.
        frozen = bytes(self.vm.disks['vda'].model.image)
        raw = self.open('vm/vda')
        self.assertSame(raw.read(0, 16 * MIB)[1], frozen[:16 * MIB])
        raw.disc()
        self.daemon.wait_idle()

    def test_clients_that_idle_and_those_that_ask_for_maps_find_out_too(self):
        self.small_scratch()
        self.begin(Disk('vda', 48 * MIB), Disk('vdb', 8 * MIB))
        done, idle = self.open('vm/vdb@part'), self.open('vm/vda@part')  # the latter keeps the session up, too
        self.assertEqual(done.read(0, BLOCK), (0, self.frozen['vdb'][:BLOCK]))
        done.disc()  # this disk's pull has ended well
        other = self.open('vm/vdb@part')
        maps = self.open('vm/vda@part', contexts=['base:allocation'])
        since = time.monotonic()
        self.break_it()
        answers = set()
        try:
            while time.monotonic() < since + SOON:
                maps.request(rawnbd.CMD_BLOCK_STATUS, 0, 48 * MIB)
                head = maps.take(20)
                payload = maps.take(int.from_bytes(head[16:], 'big'))
                kind = int.from_bytes(head[6:8], 'big')
                answers.add((kind, payload if not kind & rawnbd.CHUNK_ERROR else b''))
                time.sleep(0.02)
        except (EOFError, ConnectionError):
            pass
        # A map is kept from the freeze on and stays right: one answer until the session is known to be lost, then none.
        self.assertEqual(len([a for a in answers if not a[0] & rawnbd.CHUNK_ERROR]), 1)
        self.assertEqual(idle.wait_hangup(SOON), b'')
        self.assertEqual(other.wait_hangup(SOON), b'')
        self.assertLess(time.monotonic() - since, SOON)
        # The other disk has a reader that did not come to its end, so its part is not whole either.
        self.assertTold('vda', dropped=['vda', 'vdb'], kept=[], checkpoint='part', since=since)
        self.assertUndone()

    def test_what_ended_well_on_another_disk_is_kept(self):
        self.small_scratch()
        self.begin(Disk('vda', 48 * MIB), Disk('vdb', 8 * MIB))
        done, idle = self.open('vm/vdb@part'), self.open('vm/vda@part')
        self.assertEqual(done.read(0, BLOCK), (0, self.frozen['vdb'][:BLOCK]))
        done.disc()
        since = time.monotonic()
        self.break_it()
        self.assertEqual(idle.wait_hangup(SOON), b'')
        self.assertTold('vda', dropped=['vda'], kept=['vdb'], checkpoint='part', since=since)
        self.assertUndone({('node-vdb', 'part')})

    def test_a_client_that_stopped_reading_gets_frozen_bytes_or_none(self):
        """Reads that were answered by QEMU before the break, and wait in buffers for the client, are right."""
        self.small_scratch()
        self.begin(Disk('vda', 48 * MIB))
        raw = self.open('vm/vda@never')
        raw.request(rawnbd.CMD_READ, 0, 32 * MIB)
        time.sleep(2)  # as much as fits is on its way, and what was read ahead is given up
        since = time.monotonic()
        self.break_it()
        self.control.wait_event('SESSION_LOST', SOON)
        data = raw.wait_hangup(60)[16:]
        print(f'{len(data)} bytes came of {32 * MIB}', flush=True)
        self.assertLess(len(data), 32 * MIB)
        self.assertGreater(len(data), 0)
        self.assertSame(data, self.frozen['vda'][:len(data)])
        self.daemon.wait_idle()
        self.assertLess(time.monotonic() - since, 60)
        self.assertUndone()

    def frozen_file_system(self):
        """Scratch whose writes hang when it is told so; (freeze, thaw)."""
        if os.geteuid() != 0 or not shutil.which('mkfs.ext4') or not shutil.which('fsfreeze'):
            self.skipTest('root, mkfs.ext4 and fsfreeze make a file system that hangs')
        image, path = f'{self.folder}/scratch.img', f'{self.folder}/qpulld.scratch'
        os.mkdir(path)
        with open(image, 'wb') as f:
            f.truncate(256 * MIB)
        harness.run(['mkfs.ext4', '-q', '-F', image])
        if subprocess.run(['mount', '-o', 'loop', image, path], check=False).returncode:
            self.skipTest('no loop device can be mounted here')
        self.addCleanup(subprocess.run, ['umount', '-l', path], check=True)
        self.addCleanup(subprocess.run, ['fsfreeze', '-u', path], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(f'{path}/lost+found')
        return lambda: harness.run(['fsfreeze', '-f', path]), lambda: harness.run(['fsfreeze', '-u', path])

    def test_scratch_that_hangs_breaks_it_and_nobody_gets_a_wrong_byte(self):
        freeze, thaw = self.frozen_file_system()
        self.begin(Disk('vda', 48 * MIB))
        readers = [Reader(self.daemon.socket, 'vm/vda@never', self.frozen['vda'], i, depth=2) for i in range(2)]
        for reader in readers:
            reader.start()
        idle = self.open('vm/vda@never')
        harness.wait_until(lambda: all(r.ngood > 20 for r in readers), 30, 'readers that read')
        since = time.monotonic()
        freeze()
        writer = threading.Thread(target=self.vm.write, args=('vda', 0, MIB, 2))
        writer.start()  # waits for its copy, until QEMU gives the snapshot up
        try:
            lost = self.control.wait_event('SESSION_LOST', 60)['data']
        finally:
            thaw()
        writer.join(60)
        self.assertFalse(writer.is_alive())
        print(f'lost after {time.monotonic() - since:.1f} s: {lost["text"]}', flush=True)
        self.assertEqual((lost['reason'], lost['disk']), ('broken', 'vda'))
        for reader in readers:
            reader.join(SOON)
        self.assertEqual([r.wrong for r in readers], [[]] * 2)
        self.assertEqual(idle.wait_hangup(SOON), b'')
        self.daemon.wait_idle()
        self.assertUndone()


if __name__ == '__main__':
    harness.main()
