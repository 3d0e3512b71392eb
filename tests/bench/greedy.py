#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What bad clients cost a good one, and what they cost the daemon: nbdcopy of one disk in memory, alone and beside each
kind of bad client (tests/qemu/badclients.py), interleaved, in one session. "share" is the throughput beside them as a
part of that alone (medians); clients that read as fast as they can share the machine with it, so there the part of the
connection among all connections counts, not the half. "CPU" is what the bad clients themselves took of the machine's
processors while the good one ran: where they, QEMU, the daemon and nbdcopy want more processors than there are, none of
them gets all it wants. Memory is the daemon's highest RSS and PSS while they were there.

    tests/bench/greedy.py [ROUNDS] [--count N] [--mib N] [--kind KIND]… [--bin DIR] [--json FILE]"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '../qemu'))
import badclients  # noqa: E402
import harness  # noqa: E402
import rawnbd  # noqa: E402
from harness import MIB  # noqa: E402

SETTLE = 1.5  # seconds until what was begun by a kind of client stands: the daemon looks at them every half second


def memory(pid):
    """(RSS, PSS) in bytes."""
    found = {}
    with open(f'/proc/{pid}/smaps_rollup', encoding='ascii') as f:
        for line in f:
            words = line.split()
            if words[0] in ('Rss:', 'Pss:'):
                found[words[0]] = int(words[1]) * 1024
    return found['Rss:'], found['Pss:']


class Watch:
    """The highest of memory() until stop()."""

    def __init__(self, pid):
        self.pid, self.most, self.end = pid, (0, 0), threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while not self.end.wait(0.05):
            self.most = tuple(map(max, self.most, memory(self.pid)))

    def stop(self):
        self.end.set()
        self.thread.join()
        return self.most


def cpu_seconds(pid):
    with open(f'/proc/{pid}/stat', encoding='ascii') as f:
        fields = f.read().rsplit(')', 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def start_vm(folder, size=512 * MIB):
    disk, monitor = f'{folder}/disk.raw', f'{folder}/vm.qmp'
    with open('/dev/urandom', 'rb') as random, open(disk, 'wb') as f:
        for _ in range(size // MIB):
            f.write(random.read(MIB))
    harness.spawn(['qemu-system-x86_64', '-machine', 'pc,accel=tcg', '-m', '64', '-S', '-nodefaults', '-display', 'none',
                   '-blockdev', f'raw,node-name=disk,file.driver=file,file.filename={disk}',
                   '-device', 'virtio-blk-pci,drive=disk,id=vda', '-qmp', f'unix:{monitor},server=on,wait=off'])
    harness.wait_until(lambda: os.path.exists(monitor), 20, 'the monitor')
    return monitor


def copy(daemon):
    """Seconds of one nbdcopy over one connection."""
    began = time.monotonic()
    harness.run(['nbdcopy', '--connections=1', daemon.uri('vm/vda'), 'null:'], timeout=900)
    return time.monotonic() - began


class Bad:
    def __init__(self, daemon, name, count):
        self.process = harness.spawn(['/usr/bin/python3', badclients.__file__, name, daemon.socket, 'vm/vda',
                                      str(count)], stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != 'ready\n':
            raise AssertionError(f'{name}: the clients ended with {self.process.wait()}')

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('rounds', nargs='?', type=int, default=5)
    parser.add_argument('--count', type=int, default=100)
    parser.add_argument('--kind', action='append', choices=sorted(badclients.KINDS))
    parser.add_argument('--mib', type=int, default=512, help='how large the disk is')
    parser.add_argument('--bin', help='where qpulld is')
    parser.add_argument('--json')
    args = parser.parse_args()
    if args.bin:
        os.environ['QPULL_BIN_DIR'] = args.bin
    kinds = args.kind or list(badclients.KINDS)
    alone, beside, most = {k: [] for k in kinds}, {k: [] for k in kinds}, {k: (0, 0) for k in kinds}
    cpu = {k: [] for k in kinds}
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None) as folder:
        try:
            daemon = harness.Qpulld(folder, {'vm': start_vm(folder, args.mib * MIB)}, linger=60)
            holder = rawnbd.Raw(daemon.socket)  # so that all is one session
            holder.go('vm/vda')
            copy(daemon)  # warms up
            idle = memory(daemon.process.pid)
            for _ in range(args.rounds):
                for name in kinds:
                    alone[name].append(copy(daemon))
                    watch = Watch(daemon.process.pid)
                    bad = Bad(daemon, name, args.count)
                    time.sleep(SETTLE)
                    before = cpu_seconds(bad.process.pid)
                    beside[name].append(copy(daemon))
                    cpu[name].append((cpu_seconds(bad.process.pid) - before) / beside[name][-1])
                    bad.stop()
                    most[name] = tuple(map(max, most[name], watch.stop()))
                    harness.wait_until(lambda: len(daemon.ask('query-status')['connections']) == 1, 120, 'the end')
            daemon.check_log()
        finally:
            harness.kill_children()
    print(f'{args.count} bad clients, {args.rounds} rounds; one nbdcopy of {args.mib} MiB; the daemon alone: '
          f'RSS {idle[0] / MIB:.1f} MiB, PSS {idle[1] / MIB:.1f} MiB')
    result = []
    for name in kinds:
        a, b = statistics.median(alone[name]), statistics.median(beside[name])
        row = {'kind': name, 'alone-mib-s': args.mib / a, 'beside-mib-s': args.mib / b, 'share': a / b,
               'cpu': statistics.median(cpu[name]),
               'rss-mib': most[name][0] / MIB, 'pss-mib': most[name][1] / MIB}
        result.append(row)
        print(f'{name:24} alone {row["alone-mib-s"]:6.0f} MiB/s  beside {row["beside-mib-s"]:6.0f} MiB/s  '
              f'share {row["share"]:4.2f}  CPU {row["cpu"]:4.2f}  RSS {row["rss-mib"]:5.1f}  PSS {row["pss-mib"]:5.1f} MiB', flush=True)
    if args.json:
        with open(args.json, 'w', encoding='ascii') as f:
            json.dump(result, f, indent=1)


if __name__ == '__main__':
    main()
