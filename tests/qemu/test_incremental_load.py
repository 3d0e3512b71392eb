#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 240
# ctest: every engine
"""Incrementals of a disk that the guest never stops working on: each must restore the frozen full, which must be the
disk after a whole number of the guest's operations; and a map must hold what changed up to the freeze, no more."""
import harness
import nbdpull
from harness import MIB, Disk
from truth import SECTOR, Chain, beyond, covered, find_cut, replay, settle, touched

KINDS = ('write', 'zero', 'discard', 'flush')
DEFAULT_GRANULARITY = 65536  # of a bitmap on an image with clusters of 64 KiB


class IncrementalUnderLoad(harness.Case):
    def start_load(self, guest, disk, **options):
        load = guest.load(disk, KINDS, seed=harness.rng.randrange(1 << 60), **options)
        return load, guest.disks[disk].model.copy()

    @staticmethod
    def wait_for(operations, load):
        """However long one of them takes. Of a few dozen some change what one can see."""
        done = load.status()['ops']
        harness.wait_until(lambda: load.status()['ops'] > done + operations, 60, f'{operations} operations')

    def test_every_increment_under_load_is_the_frozen_truth_and_nothing_newer(self):
        for disk, max_length in ((Disk('vda', 24 * MIB + 5 * SECTOR), 32768),
                                 (Disk('sda', 8 * MIB, bus='virtio-scsi'), 4096)):
            with self.subTest(disk=disk.name):
                guest = self.guest(disk, name=f'vm{disk.name}')
                daemon = self.qpulld({'vm': guest}, linger=0, name=f'd{disk.name}')
                chain = Chain(self, guest, daemon, disk.name)
                load, oracle = self.start_load(guest, disk.name, max=max_length, pause_us=2000)
                cuts, at = {}, 0
                for _ in range(10):
                    self.wait_for(24, load)
                    names = harness.rng.sample(list(cuts), min(len(cuts), 3))
                    truth, maps = chain.back_up(since=names)
                    at, latest = find_cut(self, oracle, load, at, truth)
                    for name, extents in maps.items():
                        may_be = touched(load.plan, cuts[name], latest, disk.size, DEFAULT_GRANULARITY)
                        self.assertEqual(beyond(covered(extents), may_be), 0,
                                         f'{name}: the map holds changes from after the freeze, or older ones')
                        self.assertGreater(sum(covered(extents)), 0)
                    cuts[list(chain.images)[-1]] = at
                self.assertEqual(len(set(cuts.values())), 10, 'the guest stood still')
                result = load.stop()
                self.assertEqual((result['errors'], result['bad']), (0, 0))
                truth, _ = chain.back_up()
                self.assertModel(disk.model, truth, 'the last one, idle')
                guest.check()
                daemon.stop()
                guest.kill()

    def test_a_session_in_which_the_guest_rewrites_everything_stays_right(self):
        """The last clusters are read long after the guest began to overwrite and discard them."""
        disk = Disk('vda', 8 * MIB + 3 * SECTOR)
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        guest.write('vda', 0, 8 * MIB, 1)
        chain = Chain(self, guest, daemon, 'vda')
        load, oracle = self.start_load(guest, 'vda', max=262144)
        at, done = 0, 0
        self.wait_for(24, load)
        for _ in range(4):
            truth, _ = chain.back_up(during=lambda _: self.wait_for(150, load))
            at, _ = find_cut(self, oracle, load, at, truth)
            self.assertGreater(at, done)
            done = at
        self.assertEqual(load.stop()['errors'], 0)
        guest.check()
        daemon.stop()

    def test_two_disks_of_one_session_are_restored_as_of_one_instant(self):
        """Incrementals of two disks that join one session; each has its own load and its own record."""
        disks = (Disk('vda', 8 * MIB + SECTOR), Disk('vdb', 6 * MIB, options='cluster_size=4096'))
        guest = self.guest(*disks, smp=2)
        daemon = self.qpulld(guest, linger=0)
        # The last MiB is left alone, so that there is something that no map may have, however long a session takes.
        loads = {d.name: self.start_load(guest, d.name, max=65536, pause_us=1000, size=d.size - MIB & ~4095)
                 for d in disks}
        images, at = {}, {d.name: 0 for d in disks}
        for i in range(6):
            since = [f'ck{i - 1}'] if i else []
            ends = {}
            for d in harness.rng.sample(disks, 2):
                ends[d.name] = (nbdpull.connect(daemon.uri(f'vm/{d.name}@ck{i}'), map(nbdpull.dirty_context, since)),
                                nbdpull.connect(daemon.uri(f'vm/{d.name}@ck{i}')))
            for d in harness.rng.sample(disks, 2):
                changes, full = ends[d.name]
                truth = nbdpull.read_all(full)
                if since:
                    images[d.name], extents = replay(changes, since[0], images[d.name])
                    self.assertSame(images[d.name], truth, f'{d.name} at ck{i}')
                    self.assertLessEqual(sum(covered(extents)), (d.size - MIB) // SECTOR)
                images[d.name] = truth
                load, oracle = loads[d.name]
                at[d.name], _ = find_cut(self, oracle, load, at[d.name], truth)
            for changes, full in ends.values():
                changes.shutdown()
                full.shutdown()
            settle(guest)
        for load, _ in loads.values():
            self.assertEqual(load.stop()['errors'], 0)
        guest.check()
        daemon.stop()


if __name__ == '__main__':
    harness.main()
