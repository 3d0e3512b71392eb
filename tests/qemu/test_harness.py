#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tests' own tools: does the guest write what the host believes it wrote?"""
import os
import subprocess
import sys

import harness
import model
import nbdpull
from harness import MIB, Disk


class Harness(harness.Case):
    def odd_disks(self):
        return (Disk('vda', 48 * MIB + 7 * 512), Disk('vdb', 32 * MIB + 512, fmt='raw'),
                Disk('sda', 32 * MIB + 3 * 512, bus='virtio-scsi'),
                Disk('nv', 16 * MIB, bus='nvme', options='cluster_size=4096'))

    def test_images_hold_what_the_guest_was_told_to_write(self):
        disks = self.odd_disks()
        guest = self.guest(*disks)
        for disk in disks:
            name, size = disk.name, disk.size
            self.assertEqual(int(guest.cmd(f'size {name}')), size)
            guest.write(name, 0, 512, 1)
            guest.write(name, size - 512, 512, 2)
            guest.write(name, 3 * MIB - 512, 2 * MIB + 1024, harness.rng.randrange(1 << 63))
            guest.zero(name, 4 * MIB, 65536 + 512)
            guest.discard(name, 3 * MIB, 4 * 65536)
            guest.write(name, 3 * MIB + 65536, 4096, 3)
            guest.flush(name)
            self.assertEqual(guest.read_sum(name, 0, 512), model.pattern_sum(harness.library(), disk.model.image[:512]))
            guest.cmd(f'verify {name} 0 512 1')
            with self.assertRaises(harness.GuestError):
                guest.cmd(f'verify {name} 0 512 4')
        self.assertEqual(guest.errors()[0], len(disks))  # just these, made on purpose
        guest.poweroff()
        for disk in disks:
            self.assertModel(disk.model, self.raw(disk), disk.name)
            self.assertGreater(sum(1 for k in disk.model.known if not k), 0)

    def test_a_load_is_known_from_the_number_of_its_operations(self):
        disks = self.odd_disks()[:3]
        guest = self.guest(*disks)
        before = [d.model.copy() for d in disks]
        loads = [guest.load(d.name, max=131072, unit=512 if d.fmt == 'raw' else 4096) for d in disks]
        harness.wait_until(lambda: all(load.status()['ops'] > 200 for load in loads), 60, '200 operations on each disk')
        results = [load.stop() for load in loads]
        for result in results:
            self.assertEqual((result['errors'], result['bad']), (0, 0), result)
        guest.check()
        guest.poweroff()
        for disk, model_before, load, result in zip(disks, before, loads, results):
            image = self.raw(disk)
            self.assertModel(disk.model, image, disk.name)
            n, least = model_before.find_cut(image, load.plan, 0, result['ops'] + 10)
            self.assertIsNotNone(n, f'{disk.name}: at least {least} sectors differ')
            self.assertLessEqual(n, result['ops'])

    def test_a_wrong_byte_is_found(self):
        disk = Disk('vda', 16 * MIB)
        guest = self.guest(disk)
        load = guest.load('vda', ('write', 'zero'), seed=5, limit=50)
        load.wait()
        guest.poweroff()
        image = self.raw(disk)
        self.assertModel(disk.model, image)
        image[9 * MIB + 77] ^= 1
        self.assertEqual(disk.model.compare(image), (1, 9 * MIB + 512 * (77 // 512)))
        fresh = model.Model(harness.library(), disk.size)
        self.assertEqual(fresh.find_cut(image, load.plan, 0, 60), (None, 1))

    def test_records_tell_one_instant_from_two(self):
        disks = (Disk('vda', 16 * MIB), Disk('vdb', 16 * MIB, fmt='raw'))
        guest = self.guest(*disks)
        guest.order_start(['vda', 'vdb'], seed=9, ring=16, at=MIB)
        harness.wait_until(lambda: guest.order_status()['records'] > 40, 60, '40 records')
        result = guest.order_stop()
        self.assertEqual(result['errors'], 0)
        guest.poweroff()
        a, b = (self.raw(d) for d in disks)
        self.assertEqual(harness.check_order([a, b], 9, at=MIB, ring=16), [result['records']] * 2)
        with self.assertRaises(ValueError):  # another disk's records
            harness.check_order([b, a], 9, at=MIB, ring=16)
        older = bytearray(a)
        guest = self.guest(*disks, name='again')
        guest.order_start(['vda', 'vdb'], seed=9, ring=16, at=MIB)
        harness.wait_until(lambda: guest.order_status()['records'] > result['records'] + 20, 60, 'more records')
        guest.order_stop()
        guest.poweroff()
        with self.assertRaises(AssertionError):
            harness.check_order([older, self.raw(disks[1])], 9, at=MIB, ring=16)
        torn = bytearray(a)
        torn[MIB + 5 * 4096 + 4000] ^= 1
        with self.assertRaises(ValueError):
            harness.check_order([torn, b], 9, at=MIB, ring=16)

    def test_the_state_is_stable_under_load_and_shows_a_leftover(self):
        guest = self.guest()
        before = guest.state()
        load = guest.load('vda')
        self.assertEqual(guest.state(), before)
        guest.look('blockdev-add', {'driver': 'null-co', 'node-name': 'left', 'read-zeroes': True})
        self.assertNotEqual(guest.state(), before)
        guest.look('blockdev-del', {'node-name': 'left'})
        guest.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': 'left'})
        self.assertNotEqual(guest.state(), before)
        guest.look('block-dirty-bitmap-remove', {'node': 'node-vda', 'name': 'left'})
        guest.look('stop')
        self.assertNotEqual(guest.state(), before)
        guest.look('cont')
        load.stop()
        self.assertEqual(guest.state(), before)
        self.assertEqual(guest.deleted_fds(), [])
        guest.check()

    def test_the_guest_comes_back_after_a_reset_and_a_kill(self):
        guest = self.guest()
        guest.write('vda', 0, MIB, 11)
        guest.flush('vda')
        guest.look('system_reset')
        guest.look.wait_event('RESET')
        guest.wait_ready()
        guest.cmd(f'verify vda 0 {MIB} 11')
        guest.kill()
        guest.start()
        guest.cmd(f'verify vda 0 {MIB} 11')
        guest.check()

    def test_a_full_and_an_incremental_over_nbd_with_the_helpers(self):
        """Against QEMU's own server: offline, so there is no freezing in it."""
        disk = Disk('vda', 32 * MIB + 512)
        guest = self.guest(disk)
        guest.write('vda', MIB, 3 * MIB, 21)
        guest.look('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': f'{self.folder}/nbd'}}})
        guest.look('block-dirty-bitmap-add', {'node': disk.node, 'name': 'since', 'granularity': 65536})
        guest.look('block-export-add', {'type': 'nbd', 'id': 'e', 'node-name': disk.node, 'name': 'vm/vda@x'})
        full = nbdpull.pull(nbdpull.unix_uri(f'{self.folder}/nbd', 'vm/vda@x'))
        self.assertModel(disk.model, full, 'full')
        guest.look('block-export-del', {'id': 'e'})
        guest.look.wait_event('BLOCK_EXPORT_DELETED')
        guest.write('vda', 9 * MIB + 512, 512, 22)
        guest.look('block-dirty-bitmap-disable', {'node': disk.node, 'name': 'since'})
        guest.look('block-export-add', {'type': 'nbd', 'id': 'e', 'node-name': disk.node, 'name': 'vm/vda@x',
                                        'bitmaps': ['since']})
        data, extents = nbdpull.pull_changes(nbdpull.unix_uri(f'{self.folder}/nbd', 'vm/vda@x'), 'since', full)
        self.assertEqual([e for e in extents if e[2]], [(9 * MIB, 65536, 1)])
        self.assertModel(disk.model, data, 'full + changes')
        h = nbdpull.connect(nbdpull.unix_uri(f'{self.folder}/nbd', 'vm/vda@x'), [nbdpull.ALLOCATION])
        allocated = nbdpull.read_map(h, nbdpull.ALLOCATION)
        self.assertEqual(sum(length for _, length, _ in allocated), disk.size)
        self.assertEqual(allocated[1], (MIB, 3 * MIB, 0))
        h.shutdown()


class Processes(harness.Case):
    def test_children_do_not_outlive_a_killed_test(self):
        code = ('import harness, os, signal; p = harness.spawn(["sleep", "300"]); print(p.pid, flush=True);'
                'os.kill(os.getpid(), signal.SIGKILL)')
        done = subprocess.run([sys.executable, '-c', code], cwd=os.path.dirname(os.path.abspath(__file__)),
                              stdout=subprocess.PIPE, text=True, check=False)
        pid = int(done.stdout)

        def gone():
            try:
                with open(f'/proc/{pid}/stat') as f:
                    return f.read().rsplit(')', 1)[1].split()[0] == 'Z'
            except FileNotFoundError:
                return True
        harness.wait_until(gone, 10, 'the end of the child')


if __name__ == '__main__':
    harness.main()
