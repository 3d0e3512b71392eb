#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 240
# ctest: every engine
"""Is a session one instant? The guest writes numbered records over its disks in strict order, each flushed before the
next; what is pulled must be a cut through that order, at any moment and however the pull is done."""
import os
import time

import harness
import nbdpull
from harness import MIB, Disk

FREEZES = 50
AT, BLOCK, RING = 512 * 1024, 4096, 16  # a small ring is overwritten often: a late read shows


class Order(harness.Case):
    def start_records(self, guest, names):
        self.order_seed = harness.rng.randrange(1 << 60)
        guest.order_start(names, seed=self.order_seed, at=AT, block=BLOCK, ring=RING)
        harness.wait_until(lambda: guest.order_status()['records'] > RING, 60, 'the first records')

    def check(self, images):
        try:
            return harness.check_order(images, self.order_seed, at=AT, block=BLOCK, ring=RING)
        except (AssertionError, ValueError) as e:
            if os.environ.get('QPULL_TEST_KEEP'):
                for i, image in enumerate(images):
                    with open(f'{self.folder}/pulled-{i}', 'wb') as f:
                        f.write(image)
            raise AssertionError(str(e)) from e

    def pull_both(self, daemon, names, checkpoint):
        """All disks of one session, in a random order, the slow way: the guest overwrites its records meanwhile."""
        shuffled = harness.rng.sample(names, len(names))
        ends = {n: nbdpull.connect(daemon.uri(f'vm/{n}{checkpoint}')) for n in shuffled}
        time.sleep(harness.rng.random() * 0.1)
        images = {n: nbdpull.read_all(ends[n]) for n in harness.rng.sample(names, len(names))}
        for end in ends.values():
            end.shutdown()
        return [images[n] for n in names]

    def freeze_often(self, guest, daemon, names, freezes, checkpoints=False):
        seen = []
        for i in range(freezes):
            time.sleep(harness.rng.random() * 0.15)
            images = self.pull_both(daemon, names, f'@ck{i}' if checkpoints else '')
            numbers = self.check(images)
            seen.append(numbers)
            harness.wait_until(lambda: guest.order_status()['records'] > numbers[0] + 1, 60, 'a guest that writes on')
        guest.order_stop()
        guest.check()
        # Freezes of a guest that stood still would prove nothing.
        self.assertEqual(sorted(n[0] for n in seen), [n[0] for n in seen])
        self.assertEqual(len({n[0] for n in seen}), freezes)
        between = sum(1 for n in seen if n[0] != n[-1])
        print(f'({freezes} freezes, records {seen[0][0]} to {seen[-1][0]}, {between} between two disks)', end=' ')

    def test_fifty_freezes_of_two_disks_are_each_one_instant(self):
        # The disks in between widen the gap that a freeze one after another would leave.
        between = [Disk(f'between{i}', MIB) for i in range(4)]
        guest = self.guest(Disk('vda', 2 * MIB), *between, Disk('vdb', 2 * MIB + 512), smp=2)
        daemon = self.qpulld(guest, linger=0)
        self.start_records(guest, ['vda', 'vdb'])
        self.freeze_often(guest, daemon, ['vda', 'vdb'], FREEZES)
        daemon.stop()

    def test_disks_of_several_kinds_and_formats_with_checkpoints_are_one_instant(self):
        names = ['vda', 'sda', 'raw', 'nv']
        guest = self.guest(Disk('vda', 2 * MIB, options='cluster_size=4096'),
                           Disk('sda', 2 * MIB + 512, bus='virtio-scsi'), Disk('raw', 2 * MIB, fmt='raw'),
                           Disk('nv', 2 * MIB, bus='nvme', cache={'direct': True}), smp=2)
        daemon = self.qpulld(guest, linger=0)
        self.start_records(guest, names)
        self.freeze_often(guest, daemon, names, 10)
        self.start_records(guest, names[:2])
        self.freeze_often(guest, daemon, names[:2], 10, checkpoints=True)
        daemon.stop()

    def test_two_sessions_are_two_instants(self):
        """What the other tests must be able to see: a disk of one session beside a disk of the next."""
        guest = self.guest(Disk('vda', 2 * MIB), Disk('vdb', 2 * MIB))
        daemon = self.qpulld(guest, linger=0)
        self.start_records(guest, ['vda', 'vdb'])
        older, _ = self.pull_both(daemon, ['vda', 'vdb'], '')
        harness.wait_until(lambda: guest.order_status()['records'] > 3 * RING, 60, 'more records')
        _, newer = self.pull_both(daemon, ['vda', 'vdb'], '@again')
        with self.assertRaises(AssertionError):
            self.check([older, newer])
        guest.order_stop()


if __name__ == '__main__':
    harness.main()
