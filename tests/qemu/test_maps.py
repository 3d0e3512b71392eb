#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 240
"""What the metadata contexts of a session say must hold for its frozen data, whatever the guest does: base:allocation
never calls zero or a hole what is not, a dirty map never leaves out what changed, and asking again changes nothing."""
import struct

import harness
import nbd
import nbdpull
import rawnbd
from harness import MIB, Disk
from truth import (SECTOR, Chain, covered, differences, find_cut, own_copy, own_map, random_range, random_work,
                   replay, settle)

ALLOCATION, DEPTH = nbdpull.ALLOCATION, nbdpull.DEPTH


class Maps(harness.Case):
    def assertTrueOfData(self, extents, data, what):
        """No extent of base:allocation claims zeroes where there are none. The bytes that are said to be zero."""
        self.assertEqual(sum(length for _, length, _ in extents), len(data), what)
        zeroes = 0
        for offset, length, flags in extents:
            if flags & (nbdpull.STATE_ZERO | nbdpull.STATE_HOLE):
                zeroes += length
                piece = data[offset:offset + length]
                if piece.count(0) != length:
                    bad = next(i for i, byte in enumerate(piece) if byte)
                    self.fail(f'{what}: {length} bytes at {offset} are said to be {flags}, but {offset + bad} is data')
        return zeroes

    def test_allocation_is_true_of_idle_disks_of_odd_sizes(self):
        disks = (Disk('vda', 24 * MIB + 77 * SECTOR), Disk('vdb', 12 * MIB + SECTOR, options='cluster_size=4096'),
                 Disk('sda', 8 * MIB + 3 * SECTOR, fmt='raw', bus='virtio-scsi'))
        guest = self.guest(*disks)
        daemon = self.qpulld(guest, linger=0)
        for disk in disks:
            for _ in range(4):
                random_work(guest, disk.name, 12)
                expected = own_copy(guest, disk.name)
                h = nbdpull.connect(daemon.uri(f'vm/{disk.name}'), [ALLOCATION, DEPTH])
                allocation, depth = nbdpull.read_map(h, ALLOCATION), nbdpull.read_map(h, DEPTH)
                data = nbdpull.read_all(h)
                self.assertSame(data, expected, disk.name)
                zeroes = self.assertTrueOfData(allocation, data, disk.name)
                self.assertGreater(zeroes, disk.size // 10, 'a map that calls everything data is of no use')
                self.assertEqual(sum(length for _, length, _ in depth), disk.size)
                for offset, length in nbdpull.ranges_with([(o, n, flags == 0) for o, n, flags in depth]):
                    self.assertEqual(data[offset:offset + length].count(0), length, 'allocated nowhere, but not zero')
                h.shutdown()
                settle(guest)
        daemon.stop()

    def test_long_maps_are_whole_where_the_socket_takes_them_in_parts(self):
        cluster, size, asked = 4096, 32 * MIB, 150
        disk = Disk('vda', size, options=f'cluster_size={cluster}')
        disk.create(self.folder)
        words = [w for at in range(0, size, 2 * cluster) for w in ('-c', f'write -q -P 1 {at} {cluster}')]
        harness.run(['qemu-io', *words, disk.path])
        guest = self.bare(Disk('vda', size, path=disk.path))
        daemon = self.qpulld(guest, linger=0, tcp=True)
        raw = rawnbd.Raw(('127.0.0.1', daemon.tcp_port()), receive_buffer=4096)
        raw.go('vm/vda', contexts=[ALLOCATION])
        want = [(cluster, 0 if i % 2 == 0 else nbdpull.STATE_HOLE | nbdpull.STATE_ZERO) for i in range(size // cluster)]
        for cookie in range(asked):
            raw.request(rawnbd.CMD_BLOCK_STATUS, 0, size, cookie)
        whole = 0
        for cookie in range(asked):
            magic, flags, kind, got, length = struct.unpack('>IHHQI', raw.take(20))
            self.assertEqual((magic, flags, kind, got), (rawnbd.CHUNK_MAGIC, rawnbd.CHUNK_DONE, 5, cookie))
            found = list(struct.iter_unpack('>II', raw.take(length)[4:]))
            # Where much waits to be sent to all clients together answers are shorter; here it does not.
            self.assertEqual(found, want[:len(found)], f'answer {cookie}')
            whole += len(found) == len(want)
        self.assertEqual(whole, asked)
        raw.disc()
        daemon.stop()

    def test_allocation_is_true_while_the_guest_discards_and_zeroes(self):
        """The map is read while the guest works: on QEMU 7.0-7.2 it is wrong then, and must be corrected."""
        disk = Disk('vda', 16 * MIB + 5 * SECTOR)
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        guest.write('vda', 0, 12 * MIB, 3)
        load = guest.load('vda', ('write', 'discard', 'zero'), max=262144)
        oracle, at, zeroes = disk.model.copy(), 0, 0
        for i in range(40):
            h = nbdpull.connect(daemon.uri('vm/vda'), [ALLOCATION, DEPTH])
            allocation, depth = nbdpull.read_map(h, ALLOCATION), nbdpull.read_map(h, DEPTH)
            data = nbdpull.read_all(h)
            h.shutdown()
            zeroes += self.assertTrueOfData(allocation, data, f'session {i}')
            nowhere = [(o, n, nbdpull.STATE_ZERO if flags == 0 else 0) for o, n, flags in depth]
            self.assertTrueOfData(nowhere, data, f'allocation depth of session {i}')
            if i % 10 == 9:
                at, _ = find_cut(self, oracle, load, at, data)
        self.assertGreater(zeroes, 40 * MIB)
        self.assertEqual(load.stop()['errors'], 0)
        guest.check()
        daemon.stop()

    def test_allocation_and_depth_of_an_image_with_a_backing_file(self):
        base = f'{self.folder}/base.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', base, str(6 * MIB)])
        harness.run(['qemu-io', '-f', 'qcow2', '-c', 'write -P 7 1M 2M', base])
        disk = Disk('vda', 8 * MIB + SECTOR, backing=base)
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        guest.write('vda', 2 * MIB, MIB // 2, 5)
        guest.write('vda', 7 * MIB, MIB // 2, 6)
        expected = own_copy(guest, 'vda')
        h = nbdpull.connect(daemon.uri('vm/vda'), [ALLOCATION, DEPTH])
        data = nbdpull.read_all(h)
        self.assertSame(data, expected, 'the frozen disk')
        self.assertEqual(bytes(data[MIB:2 * MIB]), b'\7' * MIB)
        self.assertTrueOfData(nbdpull.read_map(h, ALLOCATION), data, 'base:allocation')
        depth = nbdpull.read_map(h, DEPTH)
        nowhere = [(o, n, nbdpull.STATE_ZERO if flags == 0 else 0) for o, n, flags in depth]
        self.assertTrueOfData(nowhere, data, 'depth 0, allocated nowhere')
        at = {offset: flags for o, n, flags in depth for offset in (MIB, 2 * MIB, 7 * MIB) if o <= offset < o + n}
        self.assertEqual((at[2 * MIB], at[7 * MIB]), (1, 1), depth)
        self.assertGreater(at[MIB], 1, 'what is in the backing file is deeper')
        h.shutdown()
        daemon.stop()

    def test_maps_asked_in_parts_are_the_whole(self):
        disk = Disk('vda', 16 * MIB + 9 * SECTOR)
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        chain = Chain(self, guest, daemon, 'vda')
        random_work(guest, 'vda', 40)
        name = chain.adopt(4096)
        random_work(guest, 'vda', 20)
        dirty = nbdpull.dirty_context(name)
        contexts = [ALLOCATION, DEPTH, dirty]
        h = nbdpull.connect(daemon.uri('vm/vda'), contexts)
        whole = {c: nbdpull.read_map(h, c) for c in contexts}
        flags_of = {c: expand(whole[c], disk.size) for c in contexts}
        self.assertGreater(len(whole[dirty]), 5)
        for i in range(600):
            offset, length = random_range(disk.size)
            got = {}

            def extent(context, at, entries, error):
                got[context] = (at, entries)
                return 0

            one = i % 3 == 0
            h.block_status(length, offset, extent, nbd.CMD_FLAG_REQ_ONE if one else 0)
            self.assertEqual(set(got), set(contexts))
            for context, (at, entries) in got.items():
                self.assertEqual(at, offset)
                if one:
                    self.assertEqual(len(entries), 2)
                for extent_length, flags in zip(entries[::2], entries[1::2]):
                    last = min(at + extent_length, disk.size)
                    seen = set(flags_of[context][at // SECTOR:(last + SECTOR - 1) // SECTOR])
                    self.assertEqual(seen, {flags}, f'{context}: {extent_length} bytes at {at}')
                    at = last
        h.shutdown()
        daemon.stop()

    def test_a_record_asked_for_late_is_a_superset_and_does_not_change(self):
        disk = Disk('vda', 16 * MIB + 3 * SECTOR)
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        chain = Chain(self, guest, daemon, 'vda')
        random_work(guest, 'vda', 40)
        for granularity in (4096, 65536, 1 << 20):
            chain.adopt(granularity)
            random_work(guest, 'vda', 6)
        names, wider = list(chain.images), 0
        exact = {n: own_map(guest, disk.node, n) for n in names}
        load = guest.load('vda', ('write', 'discard', 'zero'), max=65536, pause_us=500)
        oracle, at = disk.model.copy(), 0
        for i in range(4):
            first = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.dirty_context(names[0])])
            truth = nbdpull.read_all(first)
            done = load.status()['ops']
            harness.wait_until(lambda: load.status()['ops'] > done + 60, 60, '60 operations')
            late = nbdpull.connect(daemon.uri('vm/vda'), map(nbdpull.dirty_context, names))
            maps = {}
            for name in names:
                restored, maps[name] = replay(late, name, chain.images[name])
                self.assertSame(restored, truth, f'session {i}, {name}')
            frozen = covered(nbdpull.read_map(first, nbdpull.dirty_context(names[0])))
            self.assertEqual(covered(maps[names[0]]), frozen, 'what the first one got is what the second one gets')
            again = nbdpull.connect(daemon.uri('vm/vda'), map(nbdpull.dirty_context, reversed(names)))
            for name in names:
                self.assertEqual(nbdpull.read_map(again, nbdpull.dirty_context(name)), maps[name])
                needed = differences(chain.images[name], truth, SECTOR)
                there = covered(maps[name])
                self.assertFalse([s for s in needed if not there[s]][:1])
            wider += sum(covered(maps[names[1]])) > sum(covered(exact[names[1]]))
            at, _ = find_cut(self, oracle, load, at, truth)
            for h in (first, late, again):
                h.shutdown()
            settle(guest)
        self.assertGreater(wider, 0)
        load.stop()
        guest.check()
        daemon.stop()

    def test_a_map_that_lies_is_seen(self):
        with self.assertRaises(AssertionError):
            self.assertTrueOfData([(0, 4096, 0), (4096, 4096, 3)], bytes(8000) + b'\1' + bytes(191), 'planted')
        good = b'\1' * 4096 + bytes(4096)
        self.assertEqual(self.assertTrueOfData([(0, 4096, 0), (4096, 4096, 3)], good, 'good'), 4096)


def expand(extents, size):
    """Flags by sector."""
    flags = [0] * ((size + SECTOR - 1) // SECTOR)
    for offset, length, value in extents:
        first, last = offset // SECTOR, (offset + length + SECTOR - 1) // SECTOR
        flags[first:last] = [value] * (last - first)
    return flags


if __name__ == '__main__':
    harness.main()
