#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 240
"""Frozen means frozen: thousands of reads of every size and alignment, in every form of reply, while the guest
overwrites, zeroes and discards the same areas. The truth is a full copy pulled at the session's begin, which must
itself be the disk between two operations of the guest."""
import time

import harness
import nbd
import nbdpull
from harness import MIB, Disk
from truth import find_cut, settle

LONGEST = 32 * MIB  # what a server must take without being asked (NBD protocol, "Maximum payload")
LONGEST_DF = MIB  # more may be answered with EOVERFLOW (from 64 KiB on, says the protocol)
IN_FLIGHT = 4


class Reader:
    """One connection in one form of reply: keeps a few random reads in flight and compares each with the truth."""

    def __init__(self, case, uri, form, truth):
        self.case, self.form, self.truth = case, form, truth
        self.h = nbd.NBD()
        self.h.set_request_structured_replies(form != 'simple')
        if form != 'simple':
            self.h.add_meta_context(nbdpull.ALLOCATION)
        self.h.connect_uri(uri)
        case.assertEqual(self.h.get_structured_replies_negotiated(), form != 'simple')
        case.assertEqual(self.h.can_df(), form != 'simple')
        self.pending, self.nreads, self.nbytes, self.wrong = [], 0, 0, []

    def random_range(self):
        """Half of it small; odd bytes, whole sectors and clusters' edges; now and then the very end, or the longest."""
        rng, size = harness.rng, len(self.truth)
        top = min(rng.choice((4096, 4096, 70000, 300000, MIB, 4 * MIB)) if rng.random() > 0.01 else LONGEST, size)
        if self.form == 'df':
            top = min(top, LONGEST_DF)
        length = rng.randrange(1, top + 1)
        if rng.random() < 0.5:
            length = min((length + 511) // 512 * 512, size)
        if rng.random() < 0.05:
            length = top
        offset = rng.randrange(size - length + 1)
        how = rng.randrange(6)
        if how == 0:
            offset = size - length
        elif how == 1:  # across a cluster's edge
            offset = max(0, min(offset // 65536 * 65536 - rng.randrange(length + 1), size - length))
        elif how == 2:
            offset = offset // 512 * 512
        elif how == 3:
            offset = offset // 65536 * 65536
        return offset, length

    def ask(self):
        while len(self.pending) < IN_FLIGHT:
            offset, length = self.random_range()
            buffer = nbd.Buffer(length)
            if self.form == 'df':  # libnbd takes the flag in this call only
                cookie = self.h.aio_pread_structured(buffer, offset, self.on_chunk, flags=nbd.CMD_FLAG_DF)
            else:
                cookie = self.h.aio_pread(buffer, offset)
            self.pending.append((cookie, offset, length, buffer))

    @staticmethod
    def on_chunk(data, offset, status, error):
        return 0

    def take(self):
        left = []
        for cookie, offset, length, buffer in self.pending:
            if not self.h.aio_command_completed(cookie):
                left.append((cookie, offset, length, buffer))
                continue
            self.nreads += 1
            self.nbytes += length
            if buffer.to_bytearray() != self.truth[offset:offset + length]:
                self.wrong.append((self.form, offset, length))
        self.pending = left

    def drain(self):
        while self.pending:
            self.h.poll(1000)
            self.take()


class Reads(harness.Case):
    def read_under_load(self, disk, seconds, kinds, **load_options):
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        uri = daemon.uri(f'vm/{disk.name}')
        size = disk.size
        for at in range(0, size - 1, 4 * MIB):  # data everywhere but in a gap of each 4 MiB
            length = min(3 * MIB + 512 * harness.rng.randrange(1000), size - at)
            guest.write(disk.name, at, length, harness.rng.randrange(1 << 60))
        load = guest.load(disk.name, kinds, **load_options)
        oracle, at = disk.model.copy(), 0
        nreads = nbytes = 0
        for _ in range(3):
            first = nbdpull.connect(uri, [nbdpull.ALLOCATION])
            truth = nbdpull.read_all(first)
            extents = nbdpull.read_map(first, nbdpull.ALLOCATION)
            began = load.status()['ops']
            readers = [Reader(self, uri, form, truth) for form in ('plain', 'simple', 'df')]
            deadline = time.monotonic() + seconds / 3
            while time.monotonic() < deadline:
                for reader in readers:
                    reader.ask()
                for reader in readers:
                    reader.h.poll(1)
                    reader.take()
            for reader in readers:
                reader.drain()
                nreads, nbytes = nreads + reader.nreads, nbytes + reader.nbytes
            wrong = [w for reader in readers for w in reader.wrong]
            if wrong:
                total = sum(reader.nreads for reader in readers)
                self.fail(f'{len(wrong)} of {total} reads were not frozen, the first: {wrong[:5]}')
            self.assertGreater(load.status()['ops'], began + 20, 'the guest stood still')
            at, _ = find_cut(self, oracle, load, at, truth)
            for reader in readers[0], readers[2]:
                self.assertEqual(nbdpull.read_map(reader.h, nbdpull.ALLOCATION), extents, 'extents, asked again')
            self.assertEqual(nbdpull.read_map(first, nbdpull.ALLOCATION), extents, 'extents, asked again')
            self.assertSame(nbdpull.read_all(readers[1].h), truth, 'everything, once more')
            for h in [first] + [reader.h for reader in readers]:
                h.shutdown()
            settle(guest)
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        guest.check()
        daemon.stop()
        print(f'({nreads} reads, {nbytes >> 20} MiB, {result["ops"]} operations of the guest)', end=' ')
        self.assertGreater(nreads, 600)

    def test_reads_stay_frozen_while_the_guest_overwrites_zeroes_and_discards(self):
        self.read_under_load(Disk('vda', 40 * MIB + 9 * 512), 12, ('write', 'zero', 'discard', 'read'), max=131072,
                             pause_us=3000)

    def test_reads_stay_frozen_on_a_raw_scsi_disk_under_small_writes(self):
        self.read_under_load(Disk('sda', 33 * MIB + 512, fmt='raw', bus='virtio-scsi'), 9, ('write', 'discard'),
                             unit=512, max=16384, pause_us=1000)

    def test_reads_stay_frozen_with_small_clusters_under_discards(self):
        self.read_under_load(Disk('nv', 24 * MIB, bus='nvme', options='cluster_size=4096'), 6,
                             ('write', 'discard', 'zero'), max=262144)

    def test_a_client_that_comes_back_finds_the_same_frozen_data(self):
        disk = Disk('vda', 16 * MIB)
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=30)
        guest.write('vda', MIB, 12 * MIB, 1)
        load = guest.load('vda', ('write', 'zero', 'discard'), max=262144)
        oracle = disk.model.copy()
        h = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.ALLOCATION])
        extents = nbdpull.read_map(h, nbdpull.ALLOCATION)
        half = nbdpull.read_ranges(h, [(0, 8 * MIB)], bytearray(disk.size))
        for _ in range(3):
            nbdpull.drop(h)  # without a word, as when the network is lost
            done = load.status()['ops']
            harness.wait_until(lambda: load.status()['ops'] > done + 80, 60, '80 operations')
            h = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.ALLOCATION])
            whole = nbdpull.read_all(h)
            self.assertSame(whole[:8 * MIB], half[:8 * MIB], 'what was read before')
            self.assertEqual(nbdpull.read_map(h, nbdpull.ALLOCATION), extents)
        find_cut(self, oracle, load, 0, whole)
        h.shutdown()
        self.assertEqual(load.stop()['errors'], 0)
        guest.check()
        daemon.stop()

    def test_the_longest_read_and_single_bytes_are_served(self):
        disk = Disk('vda', 34 * MIB + 512)
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        guest.write('vda', MIB, 32 * MIB, 5)
        image = bytes(disk.model.image)
        for structured in (True, False):
            h = nbd.NBD()
            h.set_request_structured_replies(structured)
            h.connect_uri(daemon.uri('vm/vda'))
            self.assertGreaterEqual(h.get_block_size(nbd.SIZE_MAXIMUM) or LONGEST, LONGEST)
            for offset, length in ((0, LONGEST), (disk.size - LONGEST, LONGEST), (MIB - 1, 2), (disk.size - 1, 1),
                                   (MIB, 1),
                                   (65535 + MIB, 2), (1, LONGEST - 1), (2 * MIB - 77, LONGEST_DF)):
                what = f'{length} bytes at {offset}'
                self.assertSame(h.pread(length, offset), image[offset:offset + length], what)
                if structured and length <= LONGEST_DF:
                    data = h.pread_structured(length, offset, Reader.on_chunk, nbd.CMD_FLAG_DF)
                    self.assertSame(data, image[offset:offset + length], f'{what}, in one piece')
            h.shutdown()
        daemon.stop()


if __name__ == '__main__':
    harness.main()
