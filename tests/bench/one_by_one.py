#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client that waits for each answer before it asks for more: qpulld against QEMU's own export of the same disk, from
the page cache, in turns (A B A B …).

    tests/bench/one_by_one.py [--rounds N] [--mib N] [--sizes KIB,…] [--json FILE] [NAME=BIN_DIR …]

Every NAME is one more build that takes its turn; without any it is QPULL_BIN_DIR alone. All but one of them need a QEMU
of their own, since a QEMU has but one NBD server: so each, and the direct export, has one, over the same image."""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '../qemu'))
import harness  # noqa: E402
import nbd  # noqa: E402
import nbdpull  # noqa: E402
from harness import MIB, Disk  # noqa: E402


def read_all(uri, length, request):
    h = nbd.NBD()
    h.connect_uri(uri)
    buffer = nbd.Buffer(request)
    begin = time.perf_counter()
    for at in range(0, length, request):
        cookie = h.aio_pread(buffer, at)
        while not h.aio_command_completed(cookie):
            h.poll(-1)
    took = time.perf_counter() - begin
    h.shutdown()
    return length / took / MIB


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split('\n\n')[1].strip())
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--mib', type=int, default=256)
    parser.add_argument('--sizes', default='64,128,2048')
    parser.add_argument('--json')
    parser.add_argument('builds', nargs='*', metavar='NAME=BIN_DIR')
    o = parser.parse_args()
    builds = dict(b.split('=', 1) for b in o.builds) or {'qpulld': harness.bin_dir()}
    rows = []
    with tempfile.TemporaryDirectory(prefix='qpull-bench-') as folder:
        uris, daemons, guests = {}, [], []
        for name, path in [('direct', None), *builds.items()]:
            image = f'{folder}/{name}.raw'
            with open(image, 'wb') as f:
                for i in range(o.mib):
                    f.write(os.urandom(64) * (MIB // 64))
            guest = harness.Bare(folder, [Disk('vda', o.mib * MIB, fmt='raw', path=image)], name=name)
            guests.append(guest)
            if path is None:
                sock = f'{folder}/direct.nbd'
                guest.look('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': sock}}})
                guest.look('block-export-add', {'type': 'nbd', 'id': 'd', 'node-name': 'node-vda', 'name': 'd'})
                uris[name, 'unix'] = nbdpull.unix_uri(sock, 'd')
                other = harness.Bare(folder, [Disk('vda', o.mib * MIB, fmt='raw', path=image, device=',share-rw=on')],
                                     name='tcp', start=False)
                guests.append(other)
                # A second QEMU for TCP; it only reads, and shares the image's lock.
                other.arguments = lambda a=other.arguments: [x.replace('"driver": "file"', '"driver": "file", "locking": "off"')
                                                             for x in a()]
                other.start()
                other.look('nbd-server-start', {'addr': {'type': 'inet', 'data': {'host': '127.0.0.1', 'port': '0'}}})
                other.look('block-export-add', {'type': 'nbd', 'id': 'd', 'node-name': 'node-vda', 'name': 'd'})
                uris[name, 'tcp'] = f'nbd://127.0.0.1:{port_of(other.process.pid)}/d'
                continue
            daemon = harness.Qpulld(folder, {'vm': guest}, tcp=True, linger=2, name=f'q{name}', program=f'{path}/qpulld')
            daemons.append(daemon)
            uris[name, 'unix'], uris[name, 'tcp'] = daemon.uri('vm/vda'), daemon.tcp_uri('vm/vda')
        for transport in ('unix', 'tcp'):
            for kib in map(int, o.sizes.split(',')):
                found = {n: [] for n in ('direct', *builds)}
                for _ in range(o.rounds):
                    for name in harness.rng.sample(list(found), len(found)):
                        found[name].append(read_all(uris[name, transport], o.mib * MIB, kib << 10))
                medians = {n: statistics.median(v) for n, v in found.items()}
                for n in builds:
                    ratios = [a / b for a, b in zip(found[n], found['direct'])]
                    row = {'transport': transport, 'request-kib': kib, 'build': n, 'mib-s': medians[n],
                           'direct-mib-s': medians['direct'], 'ratio': statistics.median(ratios),
                           'least': min(ratios), 'most': max(ratios)}
                    rows.append(row)
                    print(f'{transport:4} {kib:5} KiB {n}: {medians[n]:6.0f} MiB/s, direct {medians["direct"]:6.0f}; ratio '
                          f'{row["ratio"]:.2f} ({row["least"]:.2f}-{row["most"]:.2f})', flush=True)
            for d in daemons:  # over TCP it is another client: it gets no session while the other's lingers
                d.wait_idle(timeout=60)
        for d in daemons:
            d.stop()
        for g in guests:
            g.kill()
    if o.json:
        with open(o.json, 'w', encoding='utf-8') as out:
            json.dump({'qemu': '.'.join(map(str, harness.qemu_version())), 'rounds': o.rounds, 'rows': rows}, out, indent=1)
            out.write('\n')


def port_of(pid):
    """Where that process listens on TCP."""
    inodes = set()
    for fd in os.listdir(f'/proc/{pid}/fd'):
        try:
            inodes.add(os.readlink(f'/proc/{pid}/fd/{fd}'))
        except FileNotFoundError:
            pass
    with open(f'/proc/{pid}/net/tcp', encoding='ascii') as f:
        for line in f.readlines()[1:]:
            words = line.split()
            if words[3] == '0A' and f'socket:[{words[9]}]' in inodes:
                return int(words[1].split(':')[1], 16)
    raise AssertionError('QEMU does not listen')


if __name__ == '__main__':
    main()
