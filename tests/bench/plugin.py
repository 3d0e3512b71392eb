#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""nbdkit's qpull plugin against "nbdkit nbd" before the same frozen view, exported by QEMU itself, and against qpulld:
nbdcopy with its defaults, to null, one QEMU each with the same image in the page cache, interleaved. a: the plugin, b: the
other one, both GiB/s (medians); ratio: the median of a round's own ratios, low and high their quartiles. The rows "CPU" are
the CPU seconds that a GiB costs in all processes (QEMU, nbdkit or qpulld, nbdcopy): less is better, and a busy
machine distorts them less.

    tests/bench/plugin.py [--rounds N] [--mib N] [--bin DIR] [--json FILE]"""
import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.join(os.path.dirname(os.path.abspath(__file__)), '../qemu')]
import bench  # noqa: E402
import harness  # noqa: E402
from qmpclient import Qmp  # noqa: E402

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
    process = harness.spawn(['nbdkit', '-f', '-U', socket, '--pidfile', f'{folder}/{name}.pid', *words])
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


def row(name, unit, a, b):
    ratios = [x / y for x, y in zip(a, b)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {'name': name, 'unit': unit, 'a': round(statistics.median(a), 3), 'b': round(statistics.median(b), 3),
            'ratio': round(statistics.median(ratios), 3), 'low': round(quartiles[0], 3), 'high': round(quartiles[2], 3)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--mib', type=int, default=1024)
    parser.add_argument('--bin', default=None)
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    programs = os.path.abspath(args.bin or harness.bin_dir())
    folder = tempfile.mkdtemp(prefix='qpull-bench-', dir='/dev/shm')
    try:
        places, _by_hand = worlds(folder, programs, args.mib << 20)
        for uri, pids in places.values():
            copy(uri, pids, args.mib << 20)  # the first one freezes
        found = {name: [] for name in places}
        for i in range(args.rounds):
            names = list(places)
            for name in names[i % 3:] + names[:i % 3]:
                found[name].append(copy(*places[name], args.mib << 20))
    finally:
        harness.kill_children()
        shutil.rmtree(folder, ignore_errors=True)
    rows = [row(f'plugin / {other}{what}', unit, [x[i] for x in found['plugin']], [x[i] for x in found[other]])
            for i, (what, unit) in enumerate((('', 'GiB/s'), (', CPU', 's/GiB'))) for other in ('nbdkit nbd', 'qpulld')]
    for r in rows:
        print(f'{r["name"]:26} {r["a"]:6.2f} {r["b"]:6.2f} {r["unit"]}  ratio {r["ratio"]:.2f} '
              f'({r["low"]:.2f}-{r["high"]:.2f})')
    if args.json:
        with open(args.json, 'w', encoding='ascii') as f:
            json.dump(rows, f, indent=1)
    return 0


if __name__ == '__main__':
    sys.exit(main())
