# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""What a client needs no more is given back: scratch stays small, bytes stay right, and a second read is refused in
words of ours, which is no broken snapshot."""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import nbd
import nbdpull
import rawnbd
from harness import MIB, Disk

CLUSTER = 65536
STEP = 2 * MIB  # what the slow client reads before the guest goes on
WORDS = 'given back'


class GiveBack(harness.Case):
    def ready(self, *flags, size=48 * MIB + 3 * 512, linger=1):
        """A guest with a full disk, a daemon, and what is on the disk."""
        guest = self.guest(Disk('vda', size))
        guest.write('vda', 0, size & ~511, 1)
        daemon = self.qpulld(guest, linger=linger, flags=flags)
        return guest, daemon, bytes(guest.disks['vda'].model.image)

    def connect(self, daemon, export, contexts=()):
        """libnbd asks no read-only export to trim unless it is told to."""
        h = nbd.NBD()
        h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_COMMANDS)
        for context in contexts:
            h.add_meta_context(context)
        h.connect_uri(nbdpull.unix_uri(daemon.socket, export))
        return h

    def scratch(self, guest):
        """Bytes that QEMU's scratch files hold, by /proc: what the daemon says comes later."""
        folder, held = f'/proc/{guest.process.pid}/fd', {}
        for fd in os.listdir(folder):
            try:
                target, st = os.readlink(f'{folder}/{fd}'), os.stat(f'{folder}/{fd}')
            except FileNotFoundError:  # of something else, which QEMU has closed meanwhile
                continue
            if target.endswith(' (deleted)') and 'scratch' in target:
                held[st.st_ino] = st.st_blocks * 512
        return sum(held.values())

    def slow_pull(self, guest, h, trim):
        """The guest rewrites its whole disk twice while it is read: behind the client, and before it, by turns. Returns
        (data, peak of the scratch)."""
        size = h.get_size()
        data, peak, writes = bytearray(), 0, 0
        pieces = [(at, min(STEP, size - at)) for at in range(0, size, STEP)]
        for i, (at, length) in enumerate(pieces):
            data += h.pread(length, at)
            if trim:
                h.trim(length, at)
            # What was read, and as much from the far end, which was not: twice over, when the client is through.
            for offset, n in (pieces[i], pieces[-1 - i]):
                guest.write('vda', offset, n, 100 + writes)
                writes += 1
            peak = max(peak, self.scratch(guest))
        return bytes(data), peak

    def test_a_slow_pull_of_a_disk_that_is_rewritten_twice_holds_less(self):
        peaks = {}
        for how in ('off', 'trim', 'read'):
            with self.subTest(how=how):
                guest, daemon, frozen = self.ready(f'--give-back={how}')
                before = guest.state()
                h = self.connect(daemon, 'vm/vda@kept')
                self.assertTrue(h.is_read_only())
                self.assertEqual(h.can_trim(), how != 'off')
                data, peaks[how] = self.slow_pull(guest, h, how == 'trim')
                h.shutdown()
                self.assertSame(data, frozen)
                daemon.wait_idle()
                self.assertIsNone(daemon.vm()['last-session']['failure'])
                self.assertIsNone(daemon.vm()['last-session']['problems'])
                self.assertEqual(list(harness.bitmaps(guest.look)), [('node-vda', 'kept')])  # it was pulled well
                daemon.qpull('checkpoint', 'delete', 'vm', 'kept')
                self.assertNothingLeft(guest, daemon, before)
                guest.check()
                guest.poweroff()
                self.assertModel(guest.disks['vda'].model, self.raw(guest.disks['vda']), 'the image')
                daemon.stop()
                guest.kill()
        print('peak of the scratch: ' + ', '.join(f'{how} {n / MIB:.1f} MiB' for how, n in peaks.items()), flush=True)
        self.assertGreater(peaks['off'], 45 * MIB)
        for how in ('trim', 'read'):
            self.assertLess(peaks[how], peaks['off'] * 3 // 4)

    def test_a_second_read_is_refused_in_words_and_the_session_stands(self):
        guest, daemon, frozen = self.ready('--give-back=trim')
        h = self.connect(daemon, 'vm/vda@never', ('base:allocation',))
        other = self.connect(daemon, 'vm/vda@never')
        guest.write('vda', 0, 8 * MIB, 2)
        h.pread(MIB, MIB)
        h.trim(MIB + 4096, MIB - 2048)  # whole clusters of it only
        for who in (h, other):
            for at, length in ((MIB, 512), (2 * MIB - 512, 512), (MIB - 512, 1024), (0, 4 * MIB)):
                with self.assertRaises(nbd.Error) as caught:
                    who.pread(length, at)
                self.assertEqual(caught.exception.errno, 'EIO')
            for at, length in ((0, MIB - 512), (MIB - 2048, 2048), (2 * MIB, 4096), (2 * MIB, 8 * MIB)):
                self.assertSame(who.pread(length, at), frozen[at:at + length], f'at {at}')
        found = []
        h.block_status(4 * MIB, 0, lambda context, offset, entries, error: found.append(sum(entries[::2])) or 0)
        self.assertTrue(found)
        # A write there is copied no more, and what is read elsewhere stays right.
        harness.wait_until(lambda: self.scratch(guest) <= 7 * MIB, 10, 'freed scratch')
        guest.write('vda', 0, 4 * MIB, 3)
        self.assertLessEqual(self.scratch(guest), 7 * MIB)
        self.assertSame(other.pread(8 * MIB, 2 * MIB), frozen[2 * MIB:10 * MIB])
        self.assertEqual(daemon.ask('query-sessions')[0]['status'], 'UP')
        h.shutdown()
        other.shutdown()
        daemon.wait_idle()
        self.assertIsNone(daemon.vm()['last-session']['failure'])
        # Somebody did not get all that they asked for: there is no checkpoint of it.
        self.assertEqual(harness.bitmaps(guest.look), {})
        guest.check()

    def test_the_words_reach_the_client(self):
        _, daemon, _ = self.ready('--give-back=trim', size=4 * MIB)
        raw = rawnbd.Raw(daemon.socket)
        self.addCleanup(raw.close)
        raw.option(rawnbd.OPT_STRUCTURED)
        raw.go('vm/vda')
        raw.request(4, MIB, MIB)  # NBD_CMD_TRIM
        raw.take(20)
        raw.request(rawnbd.CMD_READ, MIB, 512)
        *_, length = rawnbd.struct.unpack('>IHHQI', raw.take(20))
        self.assertIn(WORDS, raw.take(length).decode(errors='replace'))

    def test_trim_is_refused_unless_it_was_allowed(self):
        _, daemon, _ = self.ready(size=4 * MIB)
        h = self.connect(daemon, 'vm/vda')
        self.assertFalse(h.can_trim())
        with self.assertRaises(nbd.Error) as caught:
            h.trim(MIB, MIB)
        self.assertEqual(caught.exception.errno, 'EPERM')
        self.assertEqual(len(h.pread(MIB, MIB)), MIB)

    def test_random_trims_reads_and_writes_never_show_a_live_byte(self):
        self.check_random(CLUSTER)

    def test_nor_where_qemu_copies_in_larger_blocks(self):
        """QEMU 7.2 aborts where a discard is not aligned to its blocks."""
        image = f'{self.folder}/scratch.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'cluster_size=512k', image, str(17 * MIB)])
        place = {'driver': 'qcow2', 'file': {'driver': 'file', 'filename': image}}
        conf = f'{self.folder}/conf'
        with open(conf, 'w', encoding='utf-8') as f:
            f.write(f'[vm "vm"]\nscratch={json.dumps(place)}\n')
        self.check_random(512 << 10, f'--config={conf}')

    def check_random(self, cluster, *flags):
        """Under a writing guest: what can be read is frozen, what was given back is refused, nothing else happens."""
        guest, daemon, frozen = self.ready('--give-back=trim', *flags, size=16 * MIB + 3 * 512)
        clients = [self.connect(daemon, 'vm/vda') for _ in range(2)]
        load = guest.load('vda', ('write', 'zero', 'discard', 'read', 'flush'))
        size, given = len(frozen), set()
        for _ in range(400):
            h = harness.rng.choice(clients)
            at = harness.rng.randrange(size // 512) * 512
            length = min(harness.rng.choice((512, 4096, cluster, 3 * cluster, MIB)), size - at)
            if harness.rng.random() < 0.2:
                h.trim(length, at)
                given |= set(range(max(-(-at // cluster), 1), (at + length) // cluster))
                continue
            gone = given & set(range(at // cluster, (at + length - 1) // cluster + 1))
            try:
                data = h.pread(length, at)
            except nbd.Error as error:
                self.assertEqual(error.errno, 'EIO')
                self.assertTrue(gone, f'{length} bytes at {at} are refused')
            else:
                self.assertFalse(gone, f'{length} bytes at {at} were read')
                self.assertSame(data, frozen[at:at + length], f'{length} bytes at {at}')
        self.assertEqual(daemon.ask('query-sessions')[0]['status'], 'UP')
        for h in clients:
            h.shutdown()
        daemon.wait_idle()
        self.assertIsNone(daemon.vm()['last-session']['failure'])
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        guest.check()
        guest.poweroff()
        self.assertModel(guest.disks['vda'].model, self.raw(guest.disks['vda']), 'the image')

    def test_nbdcopy_reads_once_and_gives_back_as_it_goes(self):
        guest, daemon, _ = self.ready('--give-back=read', linger=0)
        before, model = guest.state(), guest.disks['vda'].model.copy()
        load = guest.load('vda', ('write', 'flush'))
        out = f'{self.folder}/copy'
        harness.run(['nbdcopy', nbdpull.unix_uri(daemon.socket, 'vm/vda'), out])
        daemon.wait_idle()
        result = load.stop()
        with open(out, 'rb') as f:
            cut, differ = model.find_cut(f.read(), load.plan, 0, result['ops'])
        self.assertIsNotNone(cut, f'no instant of the guest: {differ} sectors differ at best')
        self.assertIsNone(daemon.vm()['last-session']['failure'])
        self.assertNothingLeft(guest, daemon, before)
        guest.check()


if __name__ == '__main__':
    harness.main()
