#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole disk by nbdcopy over TLS: from qpulld, and straight from QEMU's own NBD server, in turns (A B A B …), from
the page cache. Throughput, and processor time of each process.

    tests/bench/tls.py [ROUNDS [MIB]]      (default: 7 rounds of 512 MiB)"""
import os
import random
import resource
import socket
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '../qemu'))
import harness  # noqa: E402
from harness import MIB, Disk  # noqa: E402

TICK = os.sysconf('SC_CLK_TCK')


def cpu(pid):
    """Seconds, all threads."""
    with open(f'/proc/{pid}/stat', encoding='utf-8') as f:
        words = f.read().rpartition(')')[2].split()
    return (int(words[11]) + int(words[12])) / TICK


def direct_server(image, creds):
    """(process, port): QEMU's NBD server on the same file."""
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = s.getsockname()[1]
    process = harness.spawn(['qemu-storage-daemon', '--object', creds,
                             '--blockdev', f'driver=file,node-name=n,filename={image},read-only=on,locking=off',
                             '--nbd-server', f'addr.type=inet,addr.host=127.0.0.1,addr.port={port},tls-creds=t',
                             '--export', 'nbd,id=e,node-name=n,name=x'])
    harness.wait_until(lambda: socket.socket().connect_ex(('127.0.0.1', port)) == 0, 20, 'QEMU\'s NBD server')
    return process, port


def copy(uri, pids):
    """(seconds, CPU seconds of each process and of the client)"""
    before = [cpu(p) for p in pids]
    client = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    harness.run(['nbdcopy', uri, 'null:'], timeout=600)
    took = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - client.ru_utime - client.ru_stime
    return took, [cpu(p) - b for p, b in zip(pids, before)] + [spent]


def compare(folder, guest, daemon, image, size, rounds, words, creds, uri):
    direct, port = direct_server(image, creds)
    pairs = {'direct': (uri(port, 'x'), [direct.pid]),
             'qpulld': (uri(daemon.tcp_port(), 'vm/vda'), [guest.process.pid, daemon.process.pid])}
    found = {name: [] for name in pairs}
    for name, (address, pids) in pairs.items():
        copy(address, pids)
    for _ in range(rounds):
        for name in random.sample(list(pairs), 2):
            address, pids = pairs[name]
            found[name].append(copy(address, pids))
            daemon.wait_idle()
    gib = size / 1024 / MIB
    for name, values in found.items():
        rates = [gib / took for took, _ in values]
        spent = [statistics.median(v[1][i] for v in values) / gib for i in range(len(values[0][1]))]
        names = ('QEMU', 'qpulld', 'client') if len(spent) == 3 else ('QEMU', 'client')
        print(f'{words:5} {name}: {statistics.median(rates):.2f} GiB/s ({min(rates):.2f} to {max(rates):.2f}); '
              'CPU s/GiB ' + ', '.join(f'{n} {s:.2f}' for n, s in zip(names, spent)), flush=True)
    ratios = [b[0] / a[0] for a, b in zip(found['qpulld'], found['direct'])]
    print(f'{words:5} qpulld to direct: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})',
          flush=True)
    direct.kill()
    direct.wait()


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    size = (int(sys.argv[2]) if len(sys.argv) > 2 else 512) * MIB
    with tempfile.TemporaryDirectory(prefix='qpull-bench-', dir='/var/tmp') as folder:
        image = f'{folder}/disk'
        with open(image, 'wb') as f:
            for _ in range(size // MIB):
                f.write(os.urandom(MIB))
        qpull = f'{harness.bin_dir()}/qpull'
        harness.run([qpull, 'certs', 'init', f'{folder}/pki', '--client=c'])
        harness.run([qpull, 'certs', 'init', f'{folder}/psk', '--psk=c'])
        guest = harness.Bare(folder, [Disk('vda', size, fmt='raw', path=image)])
        client, keys = f'{folder}/pki/clients/c', f'{folder}/psk/keys.psk'
        for words, creds, flag, uri in (
                ('x509', f'tls-creds-x509,id=t,endpoint=server,dir={folder}/pki,verify-peer=on',
                 f'--tls-certs={folder}/pki',
                 lambda port, export: f'nbds://localhost:{port}/{export}?tls-certificates={client}'),
                ('PSK', f'tls-creds-psk,id=t,endpoint=server,dir={folder}/psk', f'--tls-psk={keys}',
                 lambda port, export: f'nbds://c@127.0.0.1:{port}/{export}?tls-psk-file={keys}')):
            daemon = harness.Qpulld(folder, {'vm': guest}, tcp=True, linger=0,
                                    flags=['--tls=require', flag, '--allow=any=*'])
            compare(folder, guest, daemon, image, size, rounds, words, creds, uri)
            daemon.stop()
        guest.quit()


if __name__ == '__main__':
    main()
