# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of restored data share: random work of the guest, what QEMU itself says of a disk, and a backup chain
that is replayed and compared byte by byte."""
import contextlib

import harness
import model
import nbdpull

SECTOR = 512
SIZES = (512, 4096, 4096, 16384, 65536, 65536, 131072, 262144)


def random_range(size, sizes=SIZES):
    """A range of a disk that often begins, ends or overlaps at some unit's edge, and sometimes is the disk's end."""
    unit = harness.rng.choice((512, 512, 4096, 65536))
    length = harness.rng.choice(sizes) + harness.rng.choice((0, 0, 512, 65536))
    length = min(length, size)
    if harness.rng.random() < 0.06:
        return size - length, length
    return harness.rng.randrange((size - length) // unit + 1) * unit, length


def random_work(guest, disk, operations):
    """So many random writes, zeroes and discards, done when this returns; the disk's model follows."""
    size = guest.disks[disk].size
    for _ in range(operations):
        offset, length = random_range(size)
        kind = harness.rng.choice(('write', 'write', 'write', 'zero', 'discard'))
        if kind == 'write':
            guest.write(disk, offset, length, harness.rng.randrange(1 << 60))
        elif kind == 'zero':
            guest.zero(disk, offset, length)
        else:
            guest.discard(disk, offset, length)


def settle(guest, timeout=30):
    """Waits until no session's nodes are left in QEMU."""
    def is_gone():
        nodes = guest.look('query-named-block-nodes', {'flat': True})
        fds = [fd for fdset in guest.look('query-fdsets') for fd in fdset['fds']]  # they go last, after the NBD server
        return not any(n['node-name'].startswith('qpull-') for n in nodes) and \
            not any(fd.get('opaque', '').startswith('qpull-') for fd in fds)

    harness.wait_until(is_gone, timeout, 'the teardown')


@contextlib.contextmanager
def own_export(guest, node, bitmap=None):
    """QEMU's own NBD server on a node, with nothing of ours between; only while there is no session."""
    path = f'{guest.folder}/own.nbd'
    guest.look('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': path}}})
    try:
        arguments = {'type': 'nbd', 'id': 'own', 'node-name': node, 'name': 'own', 'writable': False}
        if bitmap:
            arguments['bitmaps'] = [bitmap]
        guest.look('block-export-add', arguments)
        h = nbdpull.connect(nbdpull.unix_uri(path, 'own'), [nbdpull.dirty_context(bitmap)] if bitmap else [])
        try:
            yield h
        finally:
            h.shutdown()
            guest.look('block-export-del', {'id': 'own'})
            guest.look.wait_event('BLOCK_EXPORT_DELETED', where=lambda data: data['id'] == 'own')
    finally:
        guest.look('nbd-server-stop')


def own_copy(guest, disk):
    """The disk as the guest sees it now, read past everything of ours; the guest must be idle."""
    with own_export(guest, guest.disks[disk].node) as h:
        return nbdpull.read_all(h)


def own_map(guest, node, bitmap):
    """QEMU's own bitmap, as extents; the guest must be idle. (Only a disabled bitmap is exported as it is.)"""
    guest.look('block-dirty-bitmap-disable', {'node': node, 'name': bitmap})
    try:
        with own_export(guest, node, bitmap) as h:
            return nbdpull.read_map(h, nbdpull.dirty_context(bitmap))
    finally:
        guest.look('block-dirty-bitmap-enable', {'node': node, 'name': bitmap})


def differences(old, new, granularity):
    """{index} of the blocks of this size in which two images differ."""
    size = max(len(old), len(new))
    return {i for i in range((size + granularity - 1) // granularity)
            if old[i * granularity:(i + 1) * granularity] != new[i * granularity:(i + 1) * granularity]}


def covered(extents, flag=nbdpull.DIRTY):
    """A bytearray with one byte per sector: does an extent with that flag cover it (even in part)?"""
    size = sum(length for _, length, _ in extents)
    sectors = bytearray((size + SECTOR - 1) // SECTOR)
    for offset, length in nbdpull.ranges_with(extents, flag):
        first, last = offset // SECTOR, (offset + length + SECTOR - 1) // SECTOR
        sectors[first:last] = b'\1' * (last - first)
    return sectors


def replay(h, checkpoint, former):
    """(the former image with what changed since the checkpoint read over it, the dirty extents)."""
    context = nbdpull.dirty_context(checkpoint)
    if not h.can_meta_context(context):
        raise AssertionError(f'no record of changes since {checkpoint} is offered')
    extents = nbdpull.read_map(h, context)
    # Where nothing is dirty the former image stays: a byte missing in the map stays wrong.
    return nbdpull.read_ranges(h, nbdpull.ranges_with(extents), bytearray(former)), extents


def touched(plan, first, last, size, granularity):
    """One byte per sector: what operations first … last - 1 of a load may have marked dirty."""
    sectors = bytearray((size + SECTOR - 1) // SECTOR)
    for op in model.operations(harness.library(), plan, first, last):
        if model.KINDS[op.kind] in ('write', 'zero', 'discard'):
            begin = op.offset // granularity * granularity // SECTOR
            end = min((op.offset + op.length + granularity - 1) // granularity * granularity, size) // SECTOR
            sectors[begin:end] = b'\1' * (end - begin)
    return sectors


def find_cut(case, oracle, load, at, image):
    """Between which numbers of operations of a running load an image was frozen: (first, last) that fit; the oracle,
    which stands at `at`, moves to the first. They differ where the next operations change nothing that one could see:
    discards, mostly."""
    done = load.status()['ops']
    first, least = oracle.find_cut(image, load.plan, at, done + 1)
    case.assertIsNotNone(first, f'no instant between operations {at} and {done} fits: at least {least} sectors differ')
    trial, last = oracle.copy(), first
    while last <= done:
        trial.replay(load.plan, last, last + 1)
        if trial.compare(image)[0]:
            break
        last += 1
    return first, last


def beyond(sectors, allowed):
    """How many sectors are set that are not allowed to be."""
    return sum(1 for s, a in zip(sectors, allowed) if s and not a)


class Chain:
    """Backups of one disk that build on each other: .images holds what a client would have restored at each checkpoint,
    made of nothing but the former image and the dirty areas. The first of them is a full pull."""

    def __init__(self, case, guest, daemon, disk):
        self.case, self.guest, self.daemon, self.disk = case, guest, daemon, disk
        self.images, self.count = {}, 0
        self.changed = 0  # comparisons in which the former image alone would have been wrong
        self.skipped = 0  # bytes that did not have to be read

    def adopt(self, granularity):
        """A checkpoint by somebody else: a bitmap made over QMP, now, while the guest is idle."""
        name = f'{self.disk}-other-{self.count}-{granularity}'
        self.count += 1
        self.guest.look('block-dirty-bitmap-add', {'node': self.guest.disks[self.disk].node, 'name': name,
                                                   'granularity': granularity, 'persistent': True})
        self.images[name] = own_copy(self.guest, self.disk)
        return name

    def delete(self, name):
        self.guest.look('block-dirty-bitmap-remove', {'node': self.guest.disks[self.disk].node, 'name': name})
        del self.images[name]

    def back_up(self, since=None, checkpoint=True, expected=None, during=None):
        """One session: an incremental against each checkpoint of `since` (default: all there are), and a full of the
        same instant through a second connection that joins. expected: the disk's content, where it is known.
        during(truth): called in the middle of the session."""
        since = list(self.images) if since is None else since
        name = f'{self.disk}-{self.count}'  # a VM's checkpoints share one room for names
        self.count += 1
        export = f'vm/{self.disk}@{name}' if checkpoint else f'vm/{self.disk}'
        h = nbdpull.connect(self.daemon.uri(export), [nbdpull.dirty_context(s) for s in since])
        full = nbdpull.connect(self.daemon.uri(export))
        truth = nbdpull.read_all(full)
        if expected is not None:
            self.case.assertSame(truth, expected, f'the full at {name}')
        if during:
            during(truth)
        maps = {}
        for s in harness.rng.sample(since, len(since)):
            restored, maps[s] = replay(h, s, self.images[s])
            self.case.assertSame(restored, truth, f'{name} restored over {s}')
            self.changed += truth != self.images[s]
            self.skipped += sum(length for _, length, flags in maps[s] if not flags & nbdpull.DIRTY)
        h.shutdown()
        full.shutdown()
        settle(self.guest)
        if checkpoint:
            self.images[name] = restored if since else truth  # asserted to be the same; this is what a client has
        return truth, maps
