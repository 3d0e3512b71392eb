#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 240
"""Does a chain of incrementals restore what a full of the same instant holds, byte by byte? Here the guest is idle
while the chain looks, so that everything is also compared with the disk itself and with QEMU's own bitmaps."""
import harness
import nbdpull
from harness import MIB, Disk
from truth import (SECTOR, Chain, beyond, covered, differences, own_copy, own_map, random_range, random_work, settle)

OFFERED = 'qemu:dirty-bitmap:'


def odd(size):
    """Not a multiple of 64 KiB, in most cases not of 4 KiB either."""
    return size + harness.rng.randrange(1, 128) * SECTOR


class Incremental(harness.Case):
    def back_up_and_compare_with_qemu(self, chain, **how):
        """One session; the maps must be exactly QEMU's bitmaps, because the guest does nothing."""
        guest, disk = chain.guest, chain.guest.disks[chain.disk]
        own = {name: own_map(guest, disk.node, name) for name in chain.images}
        expected = own_copy(guest, chain.disk)
        self.assertModel(disk.model, expected, 'QEMU\'s own view of the disk')
        truth, maps = chain.back_up(expected=expected, **how)
        for name, extents in maps.items():
            self.assertEqual(sum(length for _, length, _ in extents), disk.size)
            self.assertEqual(extents, own[name], f'the map since {name} is not QEMU\'s own')
        return truth, maps

    def test_a_chain_replayed_in_order_is_the_full_on_disks_of_odd_sizes(self):
        disks = (Disk('vda', odd(32 * MIB)), Disk('vdb', odd(16 * MIB), options='cluster_size=4096'),
                 Disk('sda', odd(12 * MIB), options='cluster_size=2M', bus='virtio-scsi'))
        guest = self.guest(*disks, smp=2)
        daemon = self.qpulld(guest, linger=0)
        for disk in disks:
            chain = Chain(self, guest, daemon, disk.name)
            random_work(guest, disk.name, 60)
            for i in range(5):
                self.back_up_and_compare_with_qemu(chain)
                if i == 3:  # what nobody finished does not disturb what is there, and leaves no checkpoint
                    h = nbdpull.connect(daemon.uri(f'vm/{disk.name}@aborted'))
                    random_work(guest, disk.name, 5)
                    nbdpull.read_ranges(h, [(0, MIB)], bytearray(disk.size))
                    nbdpull.drop(h)
                    settle(guest)
                random_work(guest, disk.name, harness.rng.choice((1, 10, 40)))
                if i == 1:  # all the others may, by chance, change nothing
                    guest.write(disk.name, MIB, SECTOR, 78)
            self.assertGreater(chain.changed, 4)
            self.assertGreater(chain.skipped, disk.size)
            for name in list(chain.images):
                chain.delete(name)
        guest.check()
        daemon.stop()

    def test_every_granularity_is_right_with_several_records_alive_at_once(self):
        disk = Disk('vda', odd(24 * MIB))
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        chain = Chain(self, guest, daemon, 'vda')
        random_work(guest, 'vda', 60)
        for granularity in harness.rng.sample((4096, 8192, 65536, 262144, 1 << 20), 5):
            chain.adopt(granularity)
            random_work(guest, 'vda', 15)
            self.back_up_and_compare_with_qemu(chain, checkpoint=harness.rng.random() < 0.5)
            random_work(guest, 'vda', 5)
        guest.write('vda', disk.size - SECTOR, SECTOR, 77)  # the last sector of a last, short granule
        _, maps = self.back_up_and_compare_with_qemu(chain, checkpoint=False)
        for name, extents in maps.items():
            self.assertTrue(extents[-1][2] & nbdpull.DIRTY, f'{name}: the last sector is dirty')
        sizes = {name: sum(length for _, length in nbdpull.ranges_with(e)) for name, e in maps.items()}
        self.assertGreater(len(set(sizes.values())), 3, sizes)
        # One that goes takes no other with it.
        chain.delete(harness.rng.choice(list(chain.images)))
        self.back_up_and_compare_with_qemu(chain)
        guest.check()
        daemon.stop()

    def test_records_survive_a_clean_stop_and_are_refused_after_a_crash(self):
        disk = Disk('vda', odd(16 * MIB))
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        chain = Chain(self, guest, daemon, 'vda')
        random_work(guest, 'vda', 30)
        chain.back_up()
        chain.adopt(16384)
        random_work(guest, 'vda', 10)
        for stop in (guest.poweroff, guest.quit):
            stop()
            guest.start()
            harness.wait_until(lambda: self.offered(daemon), 30, 'the daemon\'s new connection')
            random_work(guest, 'vda', 10)
            self.back_up_and_compare_with_qemu(chain)
        guest.flush('vda')
        self.assertEqual(self.offered(daemon), {OFFERED + name for name in chain.images})
        guest.kill()
        guest.start()
        harness.wait_until(lambda: self.listed(daemon), 30, 'the daemon\'s new connection')
        self.assertEqual(self.offered(daemon), set())
        h = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.dirty_context(name) for name in chain.images])
        self.assertFalse(any(h.can_meta_context(nbdpull.dirty_context(name)) for name in chain.images))
        h.shutdown()
        daemon.stop()

    @staticmethod
    def listed(daemon):
        try:
            return nbdpull.list_contexts(daemon.uri('vm/vda'), [])
        except nbdpull.nbd.Error:
            return []

    @staticmethod
    def offered(daemon):
        try:
            return set(nbdpull.list_contexts(daemon.uri('vm/vda'), [OFFERED]))
        except nbdpull.nbd.Error:
            return set()

    def test_what_the_guest_does_during_a_session_belongs_to_the_next_increment(self):
        disk = Disk('vda', odd(16 * MIB))
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        chain = Chain(self, guest, daemon, 'vda')
        random_work(guest, 'vda', 30)
        for _ in range(6):
            frozen = own_copy(guest, 'vda')
            truth, maps = chain.back_up(expected=frozen, during=lambda _: random_work(guest, 'vda', 12))
            for name, extents in maps.items():
                different = differences(chain.images[name], truth, SECTOR)
                self.assertEqual(beyond(self.sectors(different, disk.size), covered(extents)), 0)
            name = list(chain.images)[-1]
            now = own_copy(guest, 'vda')
            moved = self.sectors(differences(truth, now, SECTOR), disk.size)
            self.assertGreater(sum(moved), 0)
            self.assertEqual(beyond(moved, covered(own_map(guest, disk.node, name))), 0,
                             'the new checkpoint misses what was written during its session')
        guest.check()
        daemon.stop()

    @staticmethod
    def sectors(indices, size):
        flags = bytearray(size // SECTOR)
        for i in indices:
            flags[i] = 1
        return flags

    def test_a_byte_missing_in_a_map_is_seen(self):
        """The judge itself: one granule less, or one byte of an older image more, and the chain is not equal."""
        disk = Disk('vda', odd(8 * MIB))
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        chain = Chain(self, guest, daemon, 'vda')
        random_work(guest, 'vda', 20)
        chain.back_up()
        offset, _ = random_range(disk.size - 4096, (4096,))
        guest.write('vda', offset, SECTOR, 4)
        name = list(chain.images)[0]
        chain.images[name][(offset + 3 * MIB) % disk.size] ^= 1
        with self.assertRaises(AssertionError):
            chain.back_up(checkpoint=False)
        settle(guest)
        chain.images[name][(offset + 3 * MIB) % disk.size] ^= 1
        guest.look('block-dirty-bitmap-clear', {'node': disk.node, 'name': name})
        with self.assertRaises(AssertionError):
            chain.back_up(checkpoint=False)


if __name__ == '__main__':
    harness.main()
