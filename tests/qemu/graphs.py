# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks as rows of a table: what a disk's layers look like, an oracle that remembers every write to each of them, and
the two QEMUs: one that makes the images, one that runs the disks."""
import json
import os
import random
import re
import struct

import harness
from harness import MIB

SECTOR = 512
CHECKPOINT = 'cp'
SIZE = 3 * MIB + 7 * SECTOR     # no multiple of any cluster
LENGTHS = (512, 512, 1024, 4096, 4608, 16384, 65536)
WRITES = 4                      # of one layer before its record begins, and after

# <docs/interop/qcow2.txt> of QEMU
QCOW2_HEADER_LENGTH = 100       # offset of the header's own length
QCOW2_BITMAPS = 0x23852875      # header extension
QCOW2_BITMAP_IN_USE = 1
QCOW2_SUBCLUSTERS = 32          # of one cluster with extended_l2


class Layer:
    """One image. record: "P" from the layer's beginning (in the deepest layer: from the checkpoint), "L" begun anew in
    the midst of the layer, "-" none, "X" inconsistent, "D" not recording."""

    def __init__(self, record='P', granularity=65536, cluster=65536, size=None, options='', extended=False,
                 compressed=False, above=None, fmt='qcow2', data_file=None):
        self.record, self.granularity, self.size, self.fmt = record, granularity, size, fmt
        self.cluster = SECTOR if fmt == 'raw' else cluster
        self.unit = cluster // QCOW2_SUBCLUSTERS if extended else self.cluster  # of allocation
        self.compressed = compressed
        self.above = above          # the driver of a filter of others that stands on it
        self.data_file = data_file  # None, "cooked" or "raw"
        self.options = options
        if fmt == 'qcow2':
            self.options += f',cluster_size={cluster}' + (',extended_l2=on' if extended else '')
        self.can_discard = 'compat=0.10' not in options  # version 2 has no zero clusters


def layers(records, **common):
    """One layer per letter, the bottom first."""
    return [Layer(r, **common) for r in records]


class Oracle:
    """What one disk holds, and what was written in each layer: .marks while its record was recording, .allocated in
    whole units of allocation; one byte per sector."""

    def __init__(self, row):
        self.row, self.image, self.at_checkpoint = row, bytearray(), None
        self.marks, self.allocated, self.recording = [], [], False

    def begin_layer(self, size):
        self.image = self.image[:size] + bytes(max(0, size - len(self.image)))
        self.marks.append(bytearray(size // SECTOR))
        self.allocated.append(bytearray(size // SECTOR))
        self.recording = False

    def wrote(self, at, length, byte):
        self.image[at:at + length] = bytes([byte]) * length
        self._mark(at, length)
        self._allocate(round_out(at, at + length, self.top.unit))

    def discarded(self, at, length):
        """Whole clusters, and what the disk's end cuts off."""
        end = at + length
        self._mark(at, length)
        if end < len(self.image):
            end -= end % self.top.cluster
        at += -at % self.top.cluster
        if at < end and self.top.can_discard:
            self.image[at:end] = bytes(end - at)
            self._allocate((at, end))

    @property
    def top(self):
        return self.row.layers[len(self.marks) - 1]

    def _mark(self, at, length):
        if self.recording:
            fill(self.marks[-1], at, at + length)

    def _allocate(self, area):
        fill(self.allocated[-1], *area)

    def resize(self, size):
        """Of the layer on top; what comes back is zeroes. A bitmap's last block stays marked by what was behind the end."""
        granularity, marks = self.row.layers[-1].granularity, self.marks[-1]
        if any(marks[size // SECTOR:size // granularity * granularity // SECTOR + granularity // SECTOR]):
            fill(marks, size // granularity * granularity, size)
        self.image = self.image[:size] + bytes(max(0, size - len(self.image)))
        for sectors in (self.marks, self.allocated):
            sectors[-1] = sectors[-1][:size // SECTOR] + bytes(max(0, size // SECTOR - len(sectors[-1])))

    def recorded(self):
        return [i for i, layer in enumerate(self.row.layers) if layer.record != '-']

    def dirty_bytes(self):
        """The bitmaps' own counts, added up."""
        return sum(len(blocks(self.marks[i], self.row.layers[i].granularity)) * self.row.layers[i].granularity
                   for i in self.recorded())

    def expected(self):
        """The sectors that the map of a usable checkpoint calls dirty: exactly these."""
        n, found = len(self.image) // SECTOR, bytearray(len(self.image) // SECTOR)
        recorded = self.recorded()
        coarsest = max(self.row.layers[i].granularity for i in recorded)
        for i in recorded:
            if self.row.layers[i].record in 'PL' and len(self.marks[i]) == n:
                for block in blocks(self.marks[i], coarsest):
                    fill(found, block * coarsest, (block + 1) * coarsest)
        for allocated in self.allocated[recorded[0] + 1:]:
            found = either(found, allocated[:n] + b'\1' * (n - len(allocated)))
        return found

    def client_image(self):
        """The disk at the checkpoint, as long as the disk is now."""
        size = len(self.image)
        return self.at_checkpoint[:size] + bytes(max(0, size - len(self.at_checkpoint)))


def round_out(begin, end, unit):
    return begin // unit * unit, (end + unit - 1) // unit * unit


def fill(sectors, begin, end):
    first, last = begin // SECTOR, min(end // SECTOR, len(sectors))
    sectors[first:last] = b'\1' * (last - first)


def either(a, b):
    return bytearray((int.from_bytes(a, 'little') | int.from_bytes(b, 'little')).to_bytes(len(a), 'little'))


def blocks(sectors, size):
    """{number of a block of that size, if any of its sectors is set}"""
    each = size // SECTOR
    return {i // each for i in range(0, len(sectors), each) if any(sectors[i:i + each])}


class Row:
    """One disk of the table. expect: the reason code of its checkpoint. live: done to the running disk between the
    daemon's first look at it and the question; between: to its images while no QEMU has them. reads_allocate: a read
    may allocate (copy-on-read)."""

    def __init__(self, words, its_layers, expect='NONE', live=None, between=None, reads_allocate=False):
        self.words, self.layers, self.expect = words, its_layers, expect
        self.live, self.between, self.reads_allocate = live, between, reads_allocate
        self.usable = expect == 'NONE'

    def prepare(self, folder, number):
        self.name = f'r{number}'
        self.rng = random.Random(f'{harness.seed}/{self.words}')
        self.paths = [f'{folder}/{self.name}-{i}' for i in range(len(self.layers))]
        self.nodes = [f'{self.name}-{i}' for i in range(len(self.layers))]
        self.lower_read_only = self.rng.random() < 0.5
        self.oracle = Oracle(self)

    def create(self, i):
        layer, path = self.layers[i], self.paths[i]
        words = layer.options.strip(',')
        if layer.data_file:
            words += f',data_file={path}.data,data_file_raw={"on" if layer.data_file == "raw" else "off"}'
        args = ['qemu-img', 'create', '-q', '-f', layer.fmt, *(['-o', words] if words else [])]
        if i:
            args += ['-u', '-b', self.paths[i - 1], '-F', self.layers[i - 1].fmt]
        harness.run([*args, path, str(layer.size or SIZE)])

    def node_options(self, i, read_only=False):
        """[options] of an image's node, and of the filter on it."""
        layer = self.layers[i]
        node = {'driver': layer.fmt, 'node-name': self.nodes[i], 'discard': 'unmap', 'read-only': read_only,
                'file': {'driver': 'file', 'filename': self.paths[i], 'discard': 'unmap'}}
        if i:
            node['backing'] = self.head(i - 1)
        found = [node]
        if layer.above:
            found.append({'driver': layer.above, 'node-name': self.head(i), 'discard': 'unmap', 'file': self.nodes[i]})
            if layer.above == 'throttle':
                found[1]['throttle-group'] = 'group'
        return found

    def head(self, i):
        return f'{self.nodes[i]}-filter' if self.layers[i].above else self.nodes[i]

    def work(self, io, pack=True):
        """Some random writes to the layer on top, through io(words of qemu-io). pack: the first of compressed ones; once
        for each layer and QEMU, which forgets (7.2) that the cluster it packs into may be somebody else's since."""
        oracle, size = self.oracle, len(self.oracle.image)
        if oracle.top.compressed and pack:
            cluster, taken = oracle.top.cluster, blocks(oracle.allocated[-1], oracle.top.cluster)
            at = self.rng.choice([i for i in range(size // cluster) if i not in taken])  # what is there stays
            self.one(io, 'write -c', at * cluster, cluster)
        for _ in range(WRITES):
            unit = self.rng.choice((512, 512, 4096, 65536))
            length = self.rng.choice(LENGTHS)
            at = self.rng.randrange((size - length) // unit + 1) * unit
            if self.rng.random() < 0.1:
                at = size - length
            kinds = ('write', 'write', 'write', 'write -z', 'write -z -u', 'discard')
            self.one(io, self.rng.choice(kinds if oracle.top.can_discard else kinds[:3]), at, length)

    def one(self, io, kind, at, length):
        byte = self.rng.randrange(1, 255)
        if kind == 'discard':
            io(f'discard -q {at} {length}')
            self.oracle.discarded(at, length)
        else:
            zero = '-z' in kind
            io(f'{kind} -q {"" if zero else f"-P {byte} "}{at} {length}')
            self.oracle.wrote(at, length, 0 if zero else byte)

    def build(self, look):
        """All layers, the bottom first, in a running QEMU."""
        deepest = next((i for i, layer in enumerate(self.layers) if layer.record != '-'), 0)
        for i, layer in enumerate(self.layers):
            size = layer.size or SIZE
            self.create(i)
            for options in self.node_options(i):
                if options['driver'] == layer.fmt:
                    look('blockdev-add', {**options, **({'backing': self.nodes[i - 1]} if i else {})})
            self.oracle.begin_layer(size)

            def io(words, node=self.nodes[i]):
                expect_nothing(look('human-monitor-command', {'command-line': f'qemu-io {node} "{words}"'}), words)

            if i == 0:
                self.one(io, 'write', size // 4 // SECTOR * SECTOR, size // 2 // SECTOR * SECTOR)
            early = layer.record == 'L' or i == deepest
            if early:
                self.work(io)
            if i == deepest:
                self.oracle.at_checkpoint = bytes(self.oracle.image)
            if layer.record != '-':
                look('block-dirty-bitmap-add', {'node': self.nodes[i], 'name': CHECKPOINT, 'persistent': True,
                                                'granularity': layer.granularity})
                self.oracle.recording = True
            self.work(io, pack=not early)
            if layer.record == 'D':
                look('block-dirty-bitmap-disable', {'node': self.nodes[i], 'name': CHECKPOINT})

    def spoil(self):
        """While no QEMU has the images."""
        for layer, path in zip(self.layers, self.paths):
            if layer.record == 'X':
                set_in_use(path, CHECKPOINT)
        if self.between:
            self.between(self)
        self.oracle.recording = self.layers[-1].record in 'PL'


def expect_nothing(said, words):
    if said.strip():
        raise harness.GuestError(f'{words}: {said.strip()}')


def check_writes(guest):
    """After its end: a qemu-io command that fails says so to QEMU's standard output alone."""
    with open(guest.log_path, encoding='utf-8') as f:
        failed = re.search(r'^(write|discard) failed.*', f.read(), re.M)
    if failed:
        raise harness.GuestError(f'{guest.name}: {failed.group()}')


def set_in_use(path, name):
    """What a QEMU that was killed leaves in the image: the bitmap's flag says that somebody holds it."""
    with open(path, 'r+b') as f:
        f.seek(QCOW2_HEADER_LENGTH)
        at = struct.unpack('>I', f.read(4))[0]
        while True:
            f.seek(at)
            kind, length = struct.unpack('>II', f.read(8))
            if kind == QCOW2_BITMAPS:
                break
            if kind == 0:
                raise AssertionError(f'{path}: no bitmaps')
            at += 8 + (length + 7) // 8 * 8
        count, _, _, at = struct.unpack('>IIQQ', f.read(24))
        for _ in range(count):
            f.seek(at)
            _, _, flags, _, _, name_size, extra = struct.unpack('>QIIBBHI', f.read(24))
            f.seek(extra, os.SEEK_CUR)
            if f.read(name_size).decode() == name:
                f.seek(at + 12)
                f.write(struct.pack('>I', flags | QCOW2_BITMAP_IN_USE))
                return
            at += (24 + extra + name_size + 7) // 8 * 8
    raise AssertionError(f'{path}: no bitmap {name}')


class Builder(harness.Bare):
    """A QEMU with no device at all: its nodes are written by name."""

    def __init__(self, folder):
        super().__init__(folder, [], name='builder', start=False)

    def arguments(self):
        args = [self.qemu, '-accel', 'tcg', '-machine', 'none', '-nodefaults', '-no-user-config', '-display', 'none',
                '-chardev', f'socket,id=cmd,path={self.folder}/{self.name}.cmd,server=on,wait=off']
        return args + monitors(self)


class Machine(harness.Bare):
    """The QEMU that runs the rows' disks, all on one bus."""

    def __init__(self, folder, rows):
        self.rows = rows
        super().__init__(folder, [], start=False)

    def arguments(self):
        args = [self.qemu, '-accel', 'tcg', '-machine', 'pc', '-m', '32', '-nodefaults', '-no-user-config', '-display',
                'none', '-name', self.name, '-device', 'virtio-scsi-pci', '-object',
                'throttle-group,id=group,x-iops-total=100000',
                '-chardev', f'socket,id=cmd,path={self.folder}/{self.name}.cmd,server=on,wait=off', *monitors(self)]
        for row in self.rows:
            last = len(row.layers) - 1
            for i in range(len(row.layers)):
                for options in row.node_options(i, read_only=i < last and row.lower_read_only):
                    args += ['-blockdev', json.dumps(options)]
            args += ['-device', f'scsi-hd,id={row.name},drive={row.head(last)}']
        return args

    def io(self, row, words):
        expect_nothing(self.hmp(f'qemu-io -d {row.name} "{words}"'), words)


def monitors(guest):
    args = []
    for i, path in enumerate((guest.qmp_path, f'{guest.folder}/{guest.name}.look', guest.spare_qmp_path)):
        args += ['-chardev', f'socket,id=qmp{i},path={path},server=on,wait=off', '-mon',
                 f'chardev=qmp{i},mode=control']
    return args
