# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU without a guest, its disks as layers of images, a qpulld, and everything that may happen to them in a year.
The test knows every byte of every disk, at each checkpoint's instant and now. What can happen stands in randomops.py.

An operation of a sequence draws all its choices from a generator of its own, seeded with the sequence's seed and the
operation's number, and picks among things by a hash of each. So an operation means (nearly) the same when others before
it are left out, and a failing sequence can be made short.
"""
import collections
import json
import os
import random
import re
import zlib

import harness
import nbdpull
from harness import MIB
from qmpclient import Qmp, QmpError

SECTOR = 512
CLUSTERS = (512, 4096, 16384, 65536, 65536, 262144)
GRANULARITIES = (512, 4096, 32768, 65536, 1 << 20)
LAYERS_MAX = 5
CHECKPOINTS_MAX = 10  # of one disk; past that the next one to be made drops one first
JOB_TIMEOUT = 60      # seconds


class Found(AssertionError):
    """What a sequence exists to find. kind tells failures apart while a sequence is made shorter."""

    def __init__(self, kind, words):
        super().__init__(f'{kind}: {words}')
        self.kind = kind


class Choices(random.Random):
    """The generator of one operation."""

    def __init__(self, seed, number):
        super().__init__(f'{seed}/{number}')
        self.salt = f'{seed}/{number}/'

    def pick(self, things, name=str):
        """One of them (None of none); the same one when others are missing."""
        return min(things, key=lambda t: zlib.crc32((self.salt + name(t)).encode()), default=None)

    def some(self, things, name=str, chance=0.5):
        return [t for t in things if zlib.crc32((self.salt + 'some/' + name(t)).encode()) / 2**32 < chance]


class Checkpoint:
    """What a backup client has of one disk at one checkpoint's instant, and what happened since that may excuse its
    being refused (excuses) or, in a product that is known not to see it, its being wrong (troubles)."""

    def __init__(self, name, image):
        self.name, self.image = name, bytes(image)
        self.excuses, self.troubles = set(), set()


class Layer:
    def __init__(self, node, path, size):
        self.node, self.path, self.size = node, path, size


class Disk:
    """.layers: the bottom first. .image: what a guest would read now. .checkpoints: {name: Checkpoint}."""

    def __init__(self, name, fmt, size):
        self.name, self.fmt, self.size = name, fmt, size
        self.layers, self.checkpoints = [], {}
        self.husks = set()  # deleted ones, of which a layer that QEMU does not write still holds a record
        self.image = bytearray(size)
        self.cluster = 0  # of the top layer: a discard clears whole ones
        self.shrunk = False

    @property
    def top(self):
        return self.layers[-1]


class Machine(harness.Bare):
    """A QEMU with no more than a monitor for each of us and the disks; up in some 50 ms."""

    def __init__(self, folder, world):
        self.world = world
        super().__init__(folder, [], start=False)

    def arguments(self):
        args = [self.qemu, '-accel', 'tcg', '-machine', 'pc', '-m', '32', '-nodefaults', '-no-user-config', '-display',
                'none', '-name', self.name, '-device', 'virtio-scsi-pci',
                '-chardev', f'socket,id=cmd,path={self.folder}/{self.name}.cmd,server=on,wait=off']
        for i, path in enumerate((self.qmp_path, f'{self.folder}/{self.name}.look', self.spare_qmp_path)):
            args += ['-chardev', f'socket,id=qmp{i},path={path},server=on,wait=off',
                     '-mon', f'chardev=qmp{i},mode=control']
        for disk in self.world.disks:
            for i, layer in enumerate(disk.layers):
                below = disk.layers[i - 1].node if i else None
                lower = layer is not disk.top
                node = node_options(disk, layer, below, read_only=lower and self.world.lower_read_only)
                args += ['-blockdev', json.dumps(node)]
            args += ['-device', f'{self.world.buses[disk.name]},id={disk.name},drive={disk.top.node}']
        return args


def node_options(disk, layer, below, read_only=False):
    """As other tools describe an image to QEMU: every layer by name, none found through a header."""
    node = {'driver': disk.fmt, 'node-name': layer.node, 'discard': 'unmap', 'read-only': read_only,
            'file': {'driver': 'file', 'node-name': f'file-{layer.node}', 'filename': layer.path, 'discard': 'unmap'}}
    return {**node, 'backing': below} if disk.fmt == 'qcow2' else node


class World:
    def __init__(self, folder, seed, known_trouble=(), log=None):
        self.folder, self.seed, self.known_trouble = folder, seed, set(known_trouble)
        self.log = log or (lambda words: None)
        self.stats = collections.Counter()
        self.numbers = collections.Counter()  # of nodes, jobs, names
        self.used = set()                     # names of checkpoints that were
        self.dropped = []                     # names of checkpoints that are gone from all disks
        self.control = None
        r = Choices(seed, 'world')
        self.lower_read_only = r.random() < 0.7
        self.disks = [self._disk(r, 'vda', 'qcow2'), self._disk(r, 'vdb', 'qcow2'), self._disk(r, 'vdr', 'raw')]
        if r.random() < 0.3:
            del self.disks[1]
        self.buses = {d.name: r.choice(('virtio-blk-pci', 'virtio-blk-pci', 'scsi-hd')) for d in self.disks}
        self.vm = Machine(folder, self)
        self.daemon = harness.Qpulld(folder, {'vm': self.vm.qmp_path}, linger=0, start=False)
        self.step = 0  # number of the operation under way: its data

    # -- images -------------------------------------------------------------------------------------------------------

    def _disk(self, r, name, fmt):
        size = r.randrange(3 * MIB // SECTOR, 8 * MIB // SECTOR) * SECTOR
        disk = Disk(name, fmt, size if fmt == 'qcow2' else size // 2 // SECTOR * SECTOR)
        for _ in range(r.choice((1, 1, 2, 3)) if fmt == 'qcow2' else 1):
            self.add_layer(disk, r)
        if len(disk.layers) > 1:  # a template below, with something in it
            at = r.randrange(disk.size // 2 // SECTOR) * SECTOR
            harness.run(['qemu-io', '-f', 'qcow2', '-c', f'write -q -P 255 {at} {disk.size // 4 // SECTOR * SECTOR}',
                         disk.layers[0].path])
            disk.image[at:at + disk.size // 4 // SECTOR * SECTOR] = b'\xff' * (disk.size // 4 // SECTOR * SECTOR)
        return disk

    def fresh(self, kind):
        self.numbers[kind] += 1
        return f'{kind}{self.numbers[kind]}'

    def add_layer(self, disk, r):
        """A new image on top of the chain, made with qemu-img; QEMU does not know it yet."""
        node = self.fresh(f'{disk.name}-l')
        layer = Layer(node, f'{self.folder}/{node}', disk.size)
        args = ['qemu-img', 'create', '-q', '-f', disk.fmt]
        if disk.fmt == 'qcow2':
            disk.cluster = r.choice(CLUSTERS)
            args += ['-o', f'cluster_size={disk.cluster}']
        if disk.layers:
            args += ['-u', '-b', disk.top.path, '-F', disk.fmt]
        harness.run(args + [layer.path, str(disk.size)])
        disk.layers.append(layer)
        return layer

    def content(self, disk):
        """What the image files hold; while no QEMU has them open."""
        path = f'{self.folder}/converted'
        harness.run(['qemu-img', 'convert', '-f', disk.fmt, '-O', 'raw', disk.top.path, path])
        with open(path, 'rb') as f:
            return bytearray(f.read())

    # -- QEMU and the daemon ------------------------------------------------------------------------------------------

    def start(self):
        self.start_qemu()
        self.daemon.start()
        self.wait_ready()

    def start_qemu(self):
        self.vm.start()
        self.qmp = self.vm.look
        devices = self.qmp('query-block')
        self.paths = {d.name: next(x['qdev'] for x in devices if f'/{d.name}/' in f'/{x.get("qdev")}/')
                      for d in self.disks}

    def kill(self):
        if self.control:
            self.control.close()
        self.control = None
        self.daemon.kill()
        self.vm.kill()

    def ask(self, command, **arguments):
        """A command on the control socket."""
        if not self.control:
            self.control = Qmp(self.daemon.control, 60)
        return self.control(command, {k: v for k, v in arguments.items() if v is not None})

    def daemon_gone(self):
        if self.control:
            self.control.close()
        self.control = None

    def daemon_vm(self):
        return self.ask('query-vms')[0]

    def wait_ready(self):
        """No session is left, nothing of a session either."""
        harness.wait_until(lambda: self._is_idle(), 60, 'a daemon that is ready', every=0.004)
        nodes = self.nodes()
        left = [n for n in nodes if n.startswith('qpull-')]
        left += [b['name'] for n in nodes.values() for b in n.get('dirty-bitmaps', ())
                 if b.get('name', '').startswith('qpull-')]
        if left:
            raise Found('left', f'{left} in QEMU, without a session')

    def _is_idle(self):
        vm = self.daemon_vm()
        return vm['session'] is None and vm['state'] == 'ready'

    def wait_qemu_lost(self):
        harness.wait_until(lambda: self.daemon_vm()['state'] != 'ready', 30, 'the daemon to notice', every=0.004)

    def nodes(self):
        return {n['node-name']: n for n in self.qmp('query-named-block-nodes', {'flat': True})}

    # -- bitmaps, as QEMU has them ------------------------------------------------------------------------------------

    def records(self, disk):
        """[{name: bitmap}] of each layer, the bottom first."""
        nodes = self.nodes()
        return [{b['name']: b for b in nodes[layer.node].get('dirty-bitmaps', ())
                 if b.get('name') and b['persistent']} for layer in disk.layers]

    def relearn(self, disk, excuse=None):
        """After something that may take records away: the checkpoints are those that QEMU still has."""
        names = set().union(*self.records(disk))
        disk.husks &= names
        names -= disk.husks
        for name in set(disk.checkpoints) - names:
            self.forget(disk, name)
        self.excuse(disk, excuse)
        stray = names - set(disk.checkpoints)
        if stray:
            raise Found('test', f'{disk.name}: bitmaps {stray} out of nowhere')

    def excuse(self, disk, excuse):
        for checkpoint in disk.checkpoints.values() if excuse else ():
            checkpoint.excuses.add(excuse)

    def forget(self, disk, name):
        self.used.add(name)
        del disk.checkpoints[name]
        if not any(name in d.checkpoints for d in self.disks) and name not in self.dropped:
            self.dropped.append(name)

    def new_name(self, r):
        """Mostly one that never was."""
        if self.dropped and r.random() < 0.15:
            name = r.pick(self.dropped)
            if any(c['name'] == name for c in self.ask('query-checkpoints', vm='vm')):
                return self.fresh('c')
            self.dropped.remove(name)
            return name
        return self.fresh('c')

    # -- what a guest does --------------------------------------------------------------------------------------------

    def io(self, disk, words):
        """Failures are seen in check_guest()."""
        said = self.vm.hmp(f'qemu-io -d {self.paths[disk.name]} "{words}"')
        if said.strip():
            raise Found('guest', f'{disk.name}: {words}: {said.strip()}')

    def place(self, disk, r):
        """A range that often begins or ends at some unit's edge, sometimes at the disk's end."""
        unit = r.choice((512, 512, 4096, 65536))
        length = min(r.choice((512, 512, 4096, 4096, 16384, 65536, 131072, 524288)) + r.choice((0, 0, 512)), disk.size)
        if r.random() < 0.1:
            return disk.size - length, length
        return r.randrange((disk.size - length) // unit + 1) * unit, length

    def write(self, disk, r):
        at, length = self.place(disk, r)
        byte = (self.step * 7 + r.randrange(7)) % 254 + 1
        self.io(disk, f'write -q -P {byte} {at} {length}')
        disk.image[at:at + length] = bytes([byte]) * length

    def zero(self, disk, r):
        at, length = self.place(disk, r)
        self.io(disk, f'write -q -z {r.choice(("-u ", ""))}{at} {length}')
        disk.image[at:at + length] = bytes(length)

    def discard(self, disk, r):
        at, length = self.place(disk, r)
        self.io(disk, f'discard -q {at} {length}')
        end = at + length
        if disk.fmt == 'qcow2':  # whole clusters, and what the disk's end cuts off
            if end < disk.size:
                end -= end % disk.cluster
            at += -at % disk.cluster
        if at < end:
            disk.image[at:end] = bytes(end - at)

    def work(self, r, times=1):
        for _ in range(times):
            disk = r.pick(self.disks, lambda d: f'{d.name}{r.random()}')
            r.choice((self.write, self.write, self.write, self.zero, self.discard))(disk, r)

    # -- what is checked ----------------------------------------------------------------------------------------------

    def check_list(self):
        """The daemon's list of checkpoints against ours: {(disk, name): reason}."""
        listed = {(c['disk'], c['name']): c['reason'] for c in self.ask('query-checkpoints', vm='vm')}
        expected = {(d.name, name) for d in self.disks for name in d.checkpoints}
        # What is gone may be told as gone: a note about it is left, or a record in a layer that QEMU does not write.
        for key in [k for k, reason in listed.items() if k not in expected and reason == 'NO_SUCH_CHECKPOINT']:
            del listed[key]
        if set(listed) != expected:
            more = {key: reason for key, reason in listed.items() if key not in expected}
            raise Found('list', f'listed but not there: {more}, '
                                f'there but not listed: {sorted(expected - set(listed))}')
        for disk in self.disks:
            for name, checkpoint in disk.checkpoints.items():
                self.check_reason(disk, checkpoint, listed[disk.name, name])
        return listed

    def check_reason(self, disk, checkpoint, reason):
        alone = ' after commits of others alone' if checkpoint.excuses == {'commit'} else ''
        self.stats[f'listed as {reason}{alone}'] += 1
        if reason != 'NONE':
            for excuse in checkpoint.excuses:
                self.stats[f'{reason} after {excuse}'] += 1
            if not checkpoint.excuses:
                raise Found('refused', f'{disk.name}@{checkpoint.name} is {reason} though nothing spoiled it')

    def check_bytes(self, disk, checkpoint, now, extents, data):
        """The copy of the checkpoint's instant with the dirty areas of data over it, against the disk at the freeze."""
        size = len(now)
        restored = bytearray(checkpoint.image[:size]) + bytes(max(0, size - len(checkpoint.image)))
        for offset, length in nbdpull.ranges_with(extents):
            restored[offset:offset + length] = data[offset:offset + length]
        self.stats['incrementals compared'] += 1
        self.stats['bytes not read'] += sum(e[1] for e in extents if not e[2] & nbdpull.DIRTY)
        self.stats['incrementals that mattered'] += now != checkpoint.image
        if restored == now:
            return
        known = checkpoint.troubles & self.known_trouble
        if known:
            self.stats[f'wrong, as is known of {"+".join(sorted(known))}'] += 1
            return
        bad = [o for o in range(0, size, SECTOR) if restored[o:o + SECTOR] != now[o:o + SECTOR]]
        missed = [o for o in bad if not any(a <= o < a + n for a, n in nbdpull.ranges_with(extents))]
        raise Found('bytes', f'{disk.name} since {checkpoint.name} (after {sorted(checkpoint.excuses)}, troubles '
                             f'{sorted(checkpoint.troubles)}): {len(bad)} sectors are wrong, {bad[0]} to {bad[-1]}; '
                             f'{len(missed)} of them are not in the map; layers '
                             f'{[{n: b["count"] for n, b in x.items()} for x in self.records(disk)]}')

    def check_guest(self):
        """After QEMU's end: what its qemu-io commands complained of, which it says to its standard output alone."""
        said = re.search(r'^(write|discard|flush) failed.*', self.vm.log(), re.M)
        if said:
            raise Found('guest', said.group())

    def check_content(self, disk):
        """While QEMU is down: are the images what the model says?"""
        content = self.content(disk)
        if content != disk.image:
            bad = [o for o in range(0, disk.size, SECTOR)
                   if content[o:o + SECTOR] != disk.image[o:o + SECTOR]]
            raise Found('test', f'{disk.name}: the image ({len(content)} bytes) is not the model ({disk.size}): '
                                f'{len(bad)} sectors, the first at {bad[:1]}')

    def cleanup_files(self, layers):
        for layer in layers:
            os.unlink(layer.path)


__all__ = ['Choices', 'Checkpoint', 'Found', 'World', 'QmpError', 'node_options']
