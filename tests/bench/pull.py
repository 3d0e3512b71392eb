#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A full pull of one disk: a = QEMU's own NBD export of the frozen node, b = qpulld; twin QEMUs (worlds.py). QEMU
needs 42 ms to negotiate each TCP connection, so the disk is large. For each
transport, with the page cache and with O_DIRECT, by four stock clients that throw away what they read. CPU is seconds
for each GiB, user and system, of each process.

    tests/bench/pull.py [--rounds N] [--mib N] [--transport T]… [--cache C]… [--client C]… [--json FILE] [--quick]"""
import os
import sys

import bench
import harness
import nbdpull
import worlds
from bench import GIB, MIB
from worlds import ONE_AT_A_TIME

TRANSPORTS = ('unix', 'tcp', 'tls x509', 'tls psk')
PULLERS = ('nbdcopy', 'nbdcopy tuned', 'qemu-img convert', ONE_AT_A_TIME)
CACHES = ('cached', 'O_DIRECT')
PATIENCE_S = 30  # QEMU 7.2 needs minutes where each of its sealed answers waits for an acknowledgement


def transfer(side, client, disk):
    """One pull by (place of each disk, QEMU, daemon or None): what it took, for each GiB."""
    places, vm, daemon = side
    qemu, own = vm.cpu(), daemon.cpu() if daemon else 0
    done = bench.run_clients([worlds.CLIENTS[client](places[disk])])
    gib = os.path.getsize(vm.disks[disk]) / GIB
    qemu, own = (vm.cpu() - qemu) / gib, ((daemon.cpu() - own) if daemon else 0) / gib
    return {'speed': gib / done.seconds, 'qemu': qemu, 'qpulld': own, 'client': done.cpu / gib,
            'all': qemu + own + done.cpu / gib}


def rows_of(case, found):
    a, b = found['direct'], found['qpulld']

    def pair(metric, unit, key, better):
        return bench.row(f'{case}: {metric}', unit, [x[key] for x in a], [x[key] for x in b], better)

    return [pair('throughput', 'GiB/s', 'speed', 'more'), pair('CPU of QEMU', 's/GiB', 'qemu', 'less'),
            bench.row(f'{case}: CPU of qpulld', 's/GiB', [], [x['qpulld'] for x in b], 'less'),
            pair('CPU of client', 's/GiB', 'client', 'less'), pair('CPU of all', 's/GiB', 'all', 'less')]


def measure(folder, disks, transport, cache, clients, count, quick):
    tls, how = None, 'unix' if transport == 'unix' else 'tcp'
    if transport.startswith('tls'):
        why = worlds.why_no_tls()
        if why:
            return [bench.missing(f'{transport} {cache} {c}', why) for c in clients]
        tls = worlds.Tls(folder, transport.split()[1])
    vms = [worlds.Vm(folder, name, disks, cache == 'O_DIRECT') for name in ('a', 'b')]
    direct, daemon = worlds.Direct(vms[0], how, tls), worlds.Daemon(folder, {'vm': vms[1]}, how, tls)
    places = {disk: daemon.place(f'vm/{disk}') for disk in disks}
    holder = worlds.connect(places['vda'])  # so all pulls belong to one session, as the other side has one export
    rows, sides = [], {'direct': (direct.places, vms[0], None), 'qpulld': (places, vms[1], daemon)}
    for client in clients:
        disk = 'vdb' if client == ONE_AT_A_TIME else 'vda'
        found = bench.rounds({n: (lambda s=s: transfer(s, client, disk)) for n, s in sides.items()}, count,
                             warm_up=not quick, patience=PATIENCE_S)
        rows += rows_of(f'{transport} {cache} {client}', found)
    nbdpull.drop(holder)
    daemon.check_log()
    daemon.kill()
    for vm in vms:
        vm.kill()
    return rows


def main(argv):
    p = bench.parser(__doc__, rounds=5)
    p.add_argument('--mib', type=int, help='size of the disk (default 4096; the reader of one thing at a time has a fourth)')
    p.add_argument('--transport', action='append', choices=TRANSPORTS)
    p.add_argument('--cache', action='append', choices=CACHES)
    p.add_argument('--client', action='append', choices=list(worlds.CLIENTS))
    args = bench.parse(p, argv)
    rows = []
    try:
        with bench.work_folder() as folder:
            size = (args.mib or (16 if args.quick else 4096)) * MIB
            disks = {name: worlds.make_image(f'{folder}/{name}.raw', n) for name, n in (('vda', size), ('vdb', size // 4))}
            for transport in args.transport or TRANSPORTS:
                for cache in args.cache or CACHES:
                    with bench.work_folder() as own:
                        rows += measure(own, disks, transport, cache, args.client or PULLERS, args.rounds,
                                        args.quick)
    finally:
        harness.kill_children()
    bench.finish(args, rows)


if __name__ == '__main__':
    main(sys.argv[1:])
