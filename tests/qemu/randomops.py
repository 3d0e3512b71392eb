# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may happen to the disks of randomworld.py: the table at the end has all operations and how often each is drawn.
An operation does its work, keeps the model true, and checks what it can."""
import re
import nbd
import nbdpull
from randomworld import CHECKPOINTS_MAX, CLUSTERS, GRANULARITIES, JOB_TIMEOUT, LAYERS_MAX, Checkpoint, Found, \
    QmpError, node_options


class Skip(Exception):
    """The operation has nothing to work on now."""


def qcow2_disk(w, r, least_layers=1, most_layers=99):
    disk = r.pick([d for d in w.disks if d.fmt == 'qcow2' and least_layers <= len(d.layers) <= most_layers],
                  lambda d: d.name)
    if not disk:
        raise Skip
    return disk


# -- the guest -------------------------------------------------------------------------------------------------------


def write(w, r):
    w.work(r, r.choice((1, 1, 2, 4)))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def make_room(w, r):
    """Each checkpoint costs the test a copy of the disk."""
    full = [d for d in w.disks if len(d.checkpoints) >= CHECKPOINTS_MAX]
    if full:
        drop(w, r.pick(sorted(full[0].checkpoints)), None)


def create(w, r):
    make_room(w, r)
    name, disk = w.new_name(r), r.pick([None, *(d for d in w.disks if d.fmt == 'qcow2')], lambda d: d.name if d else '')
    w.log(f'create {name} on {disk.name if disk else "all disks"}')
    if r.random() < 0.05:
        w.daemon.qpull('checkpoint', 'create', 'vm', name, *(['--disk', disk.name] if disk else []))
    else:
        w.ask('checkpoint-create', vm='vm', name=name, disk=disk and disk.name)
    for d in w.disks:
        if d.fmt == 'qcow2' and disk in (None, d):
            d.checkpoints[name] = Checkpoint(name, d.image)


def create_by_others(w, r):
    make_room(w, r)
    name, disk, granularity = w.new_name(r), qcow2_disk(w, r), r.choice(GRANULARITIES)
    w.log(f'somebody creates {name} on {disk.name}, granularity {granularity}')
    w.qmp('block-dirty-bitmap-add', {'node': disk.top.node, 'name': name, 'granularity': granularity,
                                     'persistent': True})
    checkpoint = disk.checkpoints[name] = Checkpoint(name, disk.image)
    if name in w.used:
        checkpoint.excuses.add('old name')  # nobody can tell that it is not the old one


def create_again_late(w, r):
    """A bitmap under an old name, later than the layer it stands in: nothing in QEMU tells its age."""
    disk = qcow2_disk(w, r, least_layers=2)
    name = r.pick([n for n in disk.checkpoints if n not in w.records(disk)[-1]])
    if not name:
        raise Skip
    w.log(f'somebody creates {name} again on {disk.name}\'s top')
    w.qmp('block-dirty-bitmap-add', {'node': disk.top.node, 'name': name, 'persistent': True})
    disk.checkpoints[name].excuses.add('late')
    disk.checkpoints[name].troubles.add('late')


def drop(w, name, disk):
    w.log(f'delete {name} on {disk.name if disk else "all disks"}')
    try:
        w.ask('checkpoint-delete', vm='vm', name=name, disk=disk and disk.name)
    except QmpError as e:
        if 'readonly' not in e.desc:
            raise
        w.stats['delete refused: a record in a read-only layer'] += 1
        return
    for d in w.disks:
        if disk in (None, d) and name in d.checkpoints:
            w.forget(d, name)
            if any(name in x for x in w.records(d)):
                w.stats['deleted, but a record stays in a read-only layer'] += 1
                d.husks.add(name)


def delete(w, r):
    disk = qcow2_disk(w, r)
    name = r.pick(disk.checkpoints)
    if not name:
        raise Skip
    drop(w, name, disk if r.random() < 0.5 else None)


# -- layers, by other tools ------------------------------------------------------------------------------------------


def snapshot(w, r, disk, names):
    """An external snapshot; the overlay gets bitmaps of these names in the same transaction."""
    below = disk.top
    layer = w.add_layer(disk, r)
    w.log(f'snapshot of {disk.name}: {layer.node}, cluster size {disk.cluster}, records {sorted(names)}')
    w.qmp('blockdev-add', {**node_options(disk, layer, None)})
    actions = [{'type': 'blockdev-snapshot', 'data': {'node': below.node, 'overlay': layer.node}}]
    for name in names:
        data = {'node': layer.node, 'name': name, 'persistent': True}
        if r.random() < 0.5:
            data['granularity'] = r.choice(GRANULARITIES)
        actions.append({'type': 'block-dirty-bitmap-add', 'data': data})
    w.qmp('transaction', {'actions': actions})


def snapshot_like_libvirt(w, r):
    """All records that it knows as good go on in the overlay."""
    disk = qcow2_disk(w, r, most_layers=LAYERS_MAX - 1)
    top = w.records(disk)[-1]
    snapshot(w, r, disk, [n for n in disk.checkpoints if not top.get(n, {}).get('inconsistent')])


def snapshot_plain(w, r):
    snapshot(w, r, qcow2_disk(w, r, most_layers=LAYERS_MAX - 1), [])


def snapshot_of_some(w, r):
    disk = qcow2_disk(w, r, most_layers=LAYERS_MAX - 1)
    snapshot(w, r, disk, r.some(sorted(disk.checkpoints)))


def finish_job(w, job, at_ready=None):
    if at_ready:
        status = w.qmp.wait_event('JOB_STATUS_CHANGE', JOB_TIMEOUT,
                                  lambda d: d['id'] == job and d['status'] in ('ready', 'aborting'))['data']['status']
        if status == 'ready':
            at_ready()
            w.qmp('block-job-complete', {'device': job})
    done = w.qmp.wait_event('BLOCK_JOB_COMPLETED', JOB_TIMEOUT, lambda d: d['device'] == job)['data']
    return done.get('error')


def close_layers(w, disk, first, end, still_open=None):
    """Layers first … end - 1 are no part of the disk any more: as other tools do, from the top."""
    gone = disk.layers[first:end]
    del disk.layers[first:end]
    for layer in reversed(gone if still_open is None else still_open):
        w.qmp('blockdev-del', {'node-name': layer.node})
    w.cleanup_files(gone)
    disk.cluster = w.nodes()[disk.top.node]['image']['cluster-size']


def layer_sizes(w, disk):
    nodes = w.nodes()
    return [nodes[layer.node]['image']['virtual-size'] for layer in disk.layers]


def merge_records(w, disk, base, sources):
    """A tool that is careful: where somebody else makes the same record at the same time, it looks again."""
    for _ in range(10):
        try:
            return merge_once(w, disk, base, sources)
        except QmpError as e:
            if 'already exists' not in e.desc:
                raise
            w.stats['the daemon made a record before the tool that commits'] += 1
    raise Found('merge', f'{disk.name}: the daemon is always faster')


def merge_once(w, disk, base, sources):
    """The records of layers `sources` into layer `base`'s, which gets what it has not. Like libvirt, it leaves out
    (and returns) what is not whole: each layer between the deepest one that has the record and the last source must."""
    records, target, sizes = w.records(disk), disk.layers[base].node, layer_sizes(w, disk)
    actions, broken = [], set()
    for name in disk.checkpoints:
        having = [i for i in sources if name in records[i]]
        if any(records[i].get(name, {}).get('inconsistent') or sizes[i] != sizes[base] for i in (*having, base)) or \
                having and not all(name in x for x in records[deepest(records, name):sources[-1] + 1]):
            broken.add(name)
            continue
        if having and name not in records[base]:
            actions.append({'type': 'block-dirty-bitmap-add',
                            'data': {'node': target, 'name': name, 'persistent': True}})
        if having:
            actions.append({'type': 'block-dirty-bitmap-merge', 'data': {
                'node': target, 'target': name,
                'bitmaps': [{'node': disk.layers[i].node, 'name': name} for i in having]}})
    if actions:
        w.qmp('transaction', {'actions': actions})
    return broken


def deepest(records, name):
    return next(i for i, x in enumerate(records) if name in x)


def commit_range(w, r, active):
    disk = qcow2_disk(w, r, least_layers=2 if active else 3)
    n = len(disk.layers)
    top = n - 1 if active else r.randrange(1, n - 1)
    base = r.randrange(top)
    sizes = layer_sizes(w, disk)[base:]
    if sizes != sorted(sizes):  # a base that is longer than what comes above would show through
        raise Skip
    return disk, base, top


def commit(w, r, active, merging):
    disk, base, top = commit_range(w, r, active)
    job, records = w.fresh('job'), w.records(disk)
    w.log(f'{"active " if active else ""}commit of {disk.name}: layers {base + 1} to {top} into {base}, '
          f'{"merging records" if merging else "records are lost"}')
    arguments = {'job-id': job, 'device': disk.top.node, 'base-node': disk.layers[base].node}
    broken = set()
    if not active:
        arguments['top-node'] = disk.layers[top].node
        if merging:
            reopen(w, disk, base, read_only=False)
            broken = merge_records(w, disk, base, range(base + 1, top + 1))
    elif merging:
        # What is written from now on to the base is marked in its records, too.
        def at_ready():
            broken.update(merge_records(w, disk, base, range(base + 1, top + 1)))
    w.qmp('block-commit', arguments)
    error = finish_job(w, job, (at_ready if merging else lambda: None) if active else None)
    if error:  # a base that is shorter, and cannot be made longer for the sake of a broken record
        w.stats[f'commit by others: {error}'] += 1
        if len(set(layer_sizes(w, disk))) == 1:
            raise Found('test', f'{job}: {error}')
        w.relearn(disk, excuse='commit')
        return
    for name, checkpoint in disk.checkpoints.items():
        checkpoint.excuses.add('commit')  # carried over or not: the daemon cannot always tell
        if merging and name not in broken:
            continue
        if not active and base < deepest(records, name) <= top:
            checkpoint.troubles.add('commit')
    close_layers(w, disk, base + 1, top + 1)
    w.relearn(disk)
    flush(w, disk.layers[base])
    if not active and merging and w.lower_read_only:
        reopen(w, disk, base, read_only=True)


def flush(w, layer):
    """QEMU flushes what a job wrote into a lower layer only when it is opened anew: else its tables are lost."""
    w.qmp('human-monitor-command', {'command-line': f'qemu-io {layer.node} flush'})


def reopen(w, disk, index, read_only):
    layer, below = disk.layers[index], disk.layers[index - 1].node if index else None
    options = node_options(disk, layer, below, read_only)
    options['file'] = options['file']['node-name']
    w.qmp('blockdev-reopen', {'options': [options]})


def commit_active(w, r):
    commit(w, r, active=True, merging=False)


def commit_active_merging(w, r):
    commit(w, r, active=True, merging=True)


def commit_intermediate(w, r):
    commit(w, r, active=False, merging=False)


def commit_intermediate_merging(w, r):
    commit(w, r, active=False, merging=True)


def stream(w, r):
    """QEMU does not mark what it copies up: a record that goes on in the target has lost the dropped layers' share."""
    disk = qcow2_disk(w, r, least_layers=2)
    target = r.randrange(1, len(disk.layers)) if r.random() < 0.3 else len(disk.layers) - 1
    base = r.choice((-1, r.randrange(-1, target - 1))) if target > 1 else -1
    w.log(f'stream of {disk.name}: layers {base + 1} to {target - 1} into {target}')
    job, records = w.fresh('job'), w.records(disk)
    arguments = {'job-id': job, 'device': disk.layers[target].node}
    if base >= 0:
        arguments['base-node'] = disk.layers[base].node
    w.qmp('block-stream', arguments)
    error = finish_job(w, job)
    if error:
        raise Found('test', f'{job}: {error}')
    flush(w, disk.layers[target])
    for name, checkpoint in disk.checkpoints.items():
        has = [name in x for x in records]
        below, kept = any(has[:target]), any(has[:base + 1])
        if has[target] and below or not has[target] and any(has[target + 1:]) and below and not kept:
            checkpoint.troubles.add('stream')
    close_layers(w, disk, base + 1, target)
    w.relearn(disk, excuse='stream')


def resize(w, r):
    disk = r.pick(w.disks, lambda d: d.name)
    size = max(512, disk.size + r.choice((-3000, -700, -1, 1, 300, 5000)) * 512)
    if disk.fmt == 'qcow2' and size < disk.size:
        # QEMU leaves what a shrink cuts off in the last cluster and in lower layers. It is back when the image grows or
        # a job takes short layers away: the guest's zeroes turn into old bytes, which is beyond any record of changes.
        size = disk.size + 512 if len(disk.layers) > 1 else max(CLUSTERS[-1], size - size % CLUSTERS[-1])
    w.log(f'resize of {disk.name} from {disk.size} to {size}')
    try:
        w.qmp('block_resize', {'node-name': disk.top.node, 'size': size})
    except QmpError as e:
        husk = re.search("Bitmap '(.*)' is inconsistent", str(e))  # perhaps of a deleted one, in a layer that came back
        if not (husk and husk[1] not in disk.checkpoints) and not any(c.excuses for c in disk.checkpoints.values()):
            raise Found('resize', f'{disk.name}: {e}') from e
        w.stats['resize refused by QEMU'] += 1
        return
    for checkpoint in disk.checkpoints.values():
        checkpoint.excuses.add('resize')
        if size > disk.size and 'shrunk' in checkpoint.excuses:
            checkpoint.troubles.add('shrink')
        if size < disk.size:
            checkpoint.excuses.add('shrunk')
    old, disk.size = disk.size, size
    disk.image[size:] = bytes(max(0, size - old))


# -- qpull's own work on layers --------------------------------------------------------------------------------------


def commit_by_qpull(w, r):
    """Nothing is lost: what was usable before is usable after it."""
    if 'block-commit' not in {c['name'] for c in w.ask('query-commands')}:
        raise Skip
    active = r.random() < 0.5
    disk, base, top = commit_range(w, r, active)
    before = w.check_list()
    w.log(f'qpull commit of {disk.name}: layers {base + 1} to {top} into {base}')
    arguments = ['commit', f'vm/{disk.name}', '--base', disk.layers[base].node]
    arguments += ['--active'] if active else ['--top', disk.layers[top].node]
    done = w.daemon.qpull(*arguments, check=False)
    w.wait_ready()
    if done.returncode:
        w.log(done.stdout + done.stderr)
        w.stats['qpull commit refused'] += 1
        if not any(c.excuses for c in disk.checkpoints.values()):
            raise Found('commit', f'{disk.name}: {done.stdout}{done.stderr}')
        w.relearn(disk)
        return
    nodes = w.nodes()
    gone = disk.layers[base + 1:top + 1]
    close_layers(w, disk, base + 1, top + 1, [layer for layer in gone if layer.node in nodes])
    w.relearn(disk)
    after = w.check_list()
    worse = {key: reason for key, reason in after.items() if before.get(key) == 'NONE' != reason}
    if worse:
        raise Found('commit', f'{disk.name}: no longer usable: {worse}')


# -- processes that end ----------------------------------------------------------------------------------------------


def restart_qemu(w, r):
    w.log('QEMU: quit and start')
    w.vm.quit()
    w.check_guest()
    w.wait_qemu_lost()
    come_back(w, r)


def come_back(w, r):
    for disk in w.disks:
        if r.random() < 0.5:
            w.check_content(disk)
    w.start_qemu()
    w.wait_ready()


def kill_qemu(w, r):
    """What was not flushed may be lost: then the images tell what is left. Records made in that run are gone."""
    flushed = r.random() < 0.5
    w.log(f'QEMU: kill -9{", flushed" if flushed else ""}')
    for disk in w.disks if flushed else ():
        w.io(disk, 'flush')
    w.vm.kill()
    w.wait_qemu_lost()
    after_kill(w, r, flushed)


def after_kill(w, r, flushed=False):
    for disk in w.disks:
        if not flushed:
            disk.image = w.content(disk)
    come_back(w, r)
    for disk in w.disks:
        w.relearn(disk, excuse='kill')


def restart_daemon(w, r):
    w.log('qpulld: stop and start')
    w.daemon_gone()
    w.daemon.stop()
    w.daemon.start()
    w.wait_ready()


def kill_daemon(w, r):
    w.log('qpulld: kill -9')
    w.daemon_gone()
    w.daemon.kill()
    w.daemon.start()
    w.wait_ready()


# -- pulls -----------------------------------------------------------------------------------------------------------


class Part:
    """One disk's part in a session."""

    def __init__(self, disk, since):
        self.disk, self.since = disk, {name: disk.checkpoints[name] for name in since}
        self.names = [nbdpull.dirty_context(n) for n in since]


class Pull:
    def __init__(self, w, r, since, named):
        self.w, self.r = w, r
        self.listed = w.check_list()
        if named:
            make_room(w, r)
        disks = [d for d in w.disks if d.fmt == 'qcow2' or not named]
        self.disks = r.some(disks, lambda d: d.name) or [r.pick(disks, lambda d: d.name)]
        self.name = w.new_name(r) if named else None
        chosen = r.choice((0.3, 1)) if since else 0
        self.parts = [Part(d, r.some(sorted(d.checkpoints), chance=chosen)) for d in self.disks]
        w.log(f'pull {", ".join(self.export(d) for d in self.disks)} since '
              f'{", ".join("+".join(p.since) or "-" for p in self.parts)}')

    def export(self, disk):
        return f'vm/{disk.name}' + (f'@{self.name}' if self.name else '')

    def connect(self, part):
        try:
            h = nbdpull.connect(self.w.daemon.uri(self.export(part.disk)), part.names)
        except nbd.Error as e:
            raise Found('session', f'{self.export(part.disk)}: {e}') from e
        for name in part.since:
            offered, reason = h.can_meta_context(nbdpull.dirty_context(name)), self.listed[part.disk.name, name]
            if offered != (reason == 'NONE'):
                raise Found('offered', f'{part.disk.name}@{name} is {"" if offered else "not "}offered, but {reason}')
        return h

    def start(self):
        first = self.connect(self.parts[0])
        # The instant is that of the first; all disks are frozen then.
        self.frozen = {p.disk.name: bytes(p.disk.image) for p in self.parts}
        if self.r.random() < 0.5:
            self.w.work(self.r, 2)
        self.handles = [first, *(self.connect(p) for p in self.parts[1:])]

    def read(self):
        for part, h in zip(self.parts, self.handles):
            now = self.frozen[part.disk.name]
            if h.get_size() != len(now):
                raise Found('session', f'{part.disk.name}: {h.get_size()} bytes, not {len(now)}')
            maps = {n: nbdpull.read_map(h, nbdpull.dirty_context(n)) for n in part.since
                    if self.listed[part.disk.name, n] == 'NONE'}
            data = bytearray(b'\xaa' * len(now))  # what is not read is wrong
            nbdpull.read_ranges(h, joined(maps.values()) if maps else [(0, len(now))], data)
            if not maps and data != now:
                raise Found('full', f'{self.export(part.disk)} is not the disk')
            for name, extents in maps.items():
                self.w.check_bytes(part.disk, part.since[name], now, extents, data)

    def late(self):
        """A second connection joins the session and asks for maps that nobody has asked for yet."""
        part = self.r.pick(self.parts, lambda p: p.disk.name)
        usable = [n for n in part.disk.checkpoints if self.listed.get((part.disk.name, n)) == 'NONE'
                  and n not in part.since]
        if usable:
            self.w.log(f'… and late since {usable}')
            late = Part(part.disk, usable)
            self.parts.append(late)
            self.handles.append(self.connect(late))

    def end_well(self):
        for h in self.handles:
            h.shutdown()
        self.w.wait_ready()
        for part in self.parts if self.name else ():
            part.disk.checkpoints[self.name] = Checkpoint(self.name, self.frozen[part.disk.name])
        self.w.check_list()


def pull(w, r, since, named):
    p = Pull(w, r, since, named)
    p.start()
    if r.random() < 0.3:
        w.work(r, 2)
    if since and r.random() < 0.3:
        p.late()
    meddling = r.random()
    if meddling < 0.2:
        perform(w, r, r.choice((create, delete, create_by_others, snapshot_plain, snapshot_like_libvirt)))
        w.work(r, 2)
    p.read()
    p.end_well()


def full(w, r):
    pull(w, r, since=False, named=False)


def full_with_checkpoint(w, r):
    pull(w, r, since=False, named=True)


def incremental(w, r):
    pull(w, r, since=True, named=False)


def incremental_with_checkpoint(w, r):
    pull(w, r, since=True, named=True)


def pull_that_breaks(w, r):
    """Whatever ends it, there is no checkpoint of it."""
    p = Pull(w, r, since=r.random() < 0.5, named=True)
    p.start()
    how = r.choice(('client', 'client', 'daemon', 'daemon stops', 'qemu', 'qemu quits'))
    w.log(f'… but the {how} goes away')
    if how == 'client':
        for h in p.handles:
            nbdpull.drop(h)
        w.wait_ready()
    elif how == 'daemon':
        kill_daemon(w, r)
    elif how == 'daemon stops':
        restart_daemon(w, r)
    elif how == 'qemu':
        kill_qemu(w, r)
    else:
        restart_qemu(w, r)
    w.check_list()


def joined(maps):
    """The ranges that any of the maps calls dirty."""
    found = []
    for at, length in sorted(x for extents in maps for x in nbdpull.ranges_with(extents)):
        if found and at <= found[-1][0] + found[-1][1]:
            found[-1][1] = max(found[-1][1], at + length - found[-1][0])
        else:
            found.append([at, length])
    return [tuple(x) for x in found]


def perform(w, r, operation):
    """One operation, and the list of checkpoints after it."""
    try:
        operation(w, r)
    except Skip:
        w.stats[f'{operation.__name__} (nothing to do)'] += 1
        return
    w.stats[operation.__name__] += 1
    if operation is not write:
        w.check_list()


# (operation, how often it is drawn)
OPERATIONS = (
    (write, 60),
    (full, 4),
    (full_with_checkpoint, 6),
    (incremental, 16),
    (incremental_with_checkpoint, 12),
    (pull_that_breaks, 4),
    (create, 8),
    (create_by_others, 4),
    (create_again_late, 1),
    (delete, 6),
    (snapshot_like_libvirt, 7),
    (snapshot_plain, 4),
    (snapshot_of_some, 4),
    (commit_active, 2),
    (commit_active_merging, 4),
    (commit_intermediate, 2),
    (commit_intermediate_merging, 4),
    (commit_by_qpull, 6),
    (stream, 3),
    (resize, 3),
    (restart_qemu, 5),
    (kill_qemu, 2),
    (restart_daemon, 2),
    (kill_daemon, 2),
)
