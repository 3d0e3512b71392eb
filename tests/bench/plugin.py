#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""nbdkit's qpull plugin (b) against "nbdkit nbd" before the same frozen view, exported by QEMU itself, and against qpulld
(each an a): nbdcopy with its defaults, to null, one QEMU each with the same image in the page cache. CPU is seconds for each
GiB in all processes: QEMU, nbdkit or qpulld, nbdcopy.

    tests/bench/plugin.py [--rounds N] [--mib N] [--json FILE] [--quick]"""
import os
import shutil
import sys

import bench
import harness
from bench import MIB
from qmpclient import Qmp

sys.path.insert(0, f'{bench.HERE}/../plugin')
import nbdkitworld  # noqa: E402

NODE = 'node-vda'


def qemu(folder, name, image, device=True):
    look = f'{folder}/{name}.look'
    process = harness.spawn(['qemu-system-x86_64', '-accel', 'tcg', '-machine', 'pc', '-m', '64', '-nodefaults', '-no-user-config',
                             '-display', 'none', '-qmp', f'unix:{folder}/{name}.qmp,server=on,wait=off',
                             '-qmp', f'unix:{look},server=on,wait=off',
                             '-blockdev', f'driver=raw,node-name={NODE},discard=unmap,file.driver=file,file.locking=off,file.filename={image}',
                             *(['-device', f'virtio-blk-pci,id=vda,drive={NODE}'] if device else [])])
    harness.wait_until(lambda: os.path.exists(look), 20, 'QEMU')
    return look, process.pid


def frozen_by_hand(folder, look, size):
    """The same nodes as a session has, and QEMU's own export of them."""
    with open(f'{folder}/scratch.raw', 'wb') as f:
        f.truncate(size)
    qmp = Qmp(look)
    qmp('blockdev-add', {'driver': 'file', 'node-name': 'scratch', 'filename': f'{folder}/scratch.raw',
                         'discard': 'unmap'})
    qmp('blockdev-add', {'driver': 'copy-before-write', 'node-name': 'cbw', 'file': NODE, 'target': 'scratch'})
    qmp('blockdev-add', {'driver': 'snapshot-access', 'node-name': 'access', 'file': 'cbw'})
    qmp('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': f'{folder}/qemu.nbd'}}})
    qmp('block-export-add', {'type': 'nbd', 'id': 'x', 'name': 'x', 'node-name': 'access'})
    return qmp


def nbdkit(folder, name, *words):
    socket = f'{folder}/{name}.nbd'
    process = harness.spawn(['nbdkit', '-f', '-U', socket, '--pidfile', f'{folder}/{name}.pid', *words],
                            env=nbdkitworld.environment())
    harness.wait_until(lambda: os.path.exists(f'{folder}/{name}.pid'), 30, name)
    return f'nbd+unix:///vda?socket={socket}', process.pid


def copy(uri, pids, size):
    """GiB/s, and CPU seconds for each GiB."""
    before = sum(map(bench.cpu_clock, pids))
    client = bench.run_clients([['nbdcopy', uri, 'null:']], timeout=300)
    gib = size / bench.GIB
    return gib / client.seconds, (sum(map(bench.cpu_clock, pids)) - before + client.cpu) / gib


def worlds(folder, programs, size):
    image = f'{folder}/disk.raw'
    with open(image, 'wb') as f:
        for _ in range(size >> 20):
            f.write(os.urandom(1 << 20))
    for name in ('plugin', 'hand', 'daemon'):
        os.makedirs(f'{folder}/{name}.state')
    _, first = qemu(folder, 'plugin', image)
    plugin = nbdkit(folder, 'plugin', f'{programs}/nbdkit-qpull-plugin.so', f'{folder}/plugin.qmp', 'disk=vda',
                    f'scratch={folder}', f'state={folder}/plugin.state', 'linger=600', 'max-pause=30')
    look, second = qemu(folder, 'hand', image, device=False)
    by_hand = frozen_by_hand(folder, look, size)
    proxy = nbdkit(folder, 'proxy', 'nbd', f'socket={folder}/qemu.nbd', 'export=x')
    _, third = qemu(folder, 'daemon', image)
    daemon = harness.Qpulld(folder, {'vm': f'{folder}/daemon.qmp'}, linger=600, program=f'{programs}/qpulld')
    return {'plugin': (plugin[0], [first, plugin[1]]), 'nbdkit nbd': (proxy[0], [second, proxy[1]]),
            'qpulld': (daemon.uri('vm/vda'), [third, daemon.process.pid])}, by_hand


def main(argv):
    p = bench.parser(__doc__, rounds=15)
    p.add_argument('--mib', type=int, help='size of the disk (default 1024)')
    args = bench.parse(p, argv)
    size = (args.mib or (16 if args.quick else 1024)) * MIB
    programs = harness.bin_dir()
    if not shutil.which('nbdkit') or not os.path.exists(f'{programs}/nbdkit-qpull-plugin.so'):
        bench.finish(args, [bench.missing('plugin', 'no nbdkit, or no plugin was built')])
        return
    try:
        with bench.work_folder(memory=True) as folder:
            places, by_hand = worlds(folder, programs, size)
            # The first one freezes.
            found = bench.rounds({name: lambda w=where: copy(*w, size) for name, where in places.items()}, args.rounds)
            by_hand.close()
    finally:
        harness.kill_children()
    rows = []
    for other in ('nbdkit nbd', 'qpulld'):
        for i, (metric, unit, better) in enumerate((('throughput', 'GiB/s', 'more'), ('CPU of all', 's/GiB', 'less'))):
            rows.append(bench.row(f'against {other}: {metric}', unit, [x[i] for x in found[other]],
                                  [x[i] for x in found['plugin']], better))
    bench.finish(args, rows)


if __name__ == '__main__':
    main(sys.argv[1:])
