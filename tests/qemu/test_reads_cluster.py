#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU 7.0-7.2 returns live bytes through a frozen view for reads that cross from a copied into an uncopied cluster.
Here is the graph alone, without a guest: a copy-before-write filter that is written through, and the frozen view above
it, read through source/nbd with and without its bound. And: does the daemon find out which QEMU it has?"""
import os
import subprocess
import threading
import time
import unittest

import harness
import model
import nbd
import nbdpull
from harness import MIB, Disk
from qmpclient import Qmp

SIZE, CLUSTER = 32 * MIB, 65536
ROUNDS, READS = 15, 60
PAUSE = 0.002  # seconds between writes: there must be uncopied clusters to the end


def reader():
    places = [os.environ.get('QPULL_TEST_TOOLS'), f'{harness.bin_dir()}/../tests/qemu', harness.bin_dir()]
    for place in filter(None, places):
        if os.path.exists(f'{place}/frozen_reader'):
            return f'{place}/frozen_reader'
    raise unittest.SkipTest('no frozen_reader: build the target first')


class Graph:
    """A QEMU without a machine: export "live" is the written disk, "frozen" what it was when the graph was made."""

    def __init__(self, folder, content, fmt):
        self.folder, self.log_path = folder, f'{folder}/graph.log'
        self.socket = f'{folder}/graph.nbd'
        with open(f'{folder}/base.raw', 'wb') as f:
            f.write(content)
        with open(f'{folder}/scratch', 'wb') as f:
            f.truncate(len(content))
        if fmt != 'raw':
            harness.run(['qemu-img', 'convert', '-f', 'raw', '-O', fmt, f'{folder}/base.raw', f'{folder}/base.{fmt}'])
        with open(self.log_path, 'wb') as log:
            self.process = harness.spawn(['qemu-system-x86_64', '-machine', 'none', '-nodefaults', '-display', 'none',
                                          '-qmp', f'unix:{folder}/graph.qmp,server=on,wait=off'],
                                         stdout=log, stderr=log)
        self.qmp = harness.wait_until(self.try_monitor, 20, 'QEMU\'s monitor')
        self.add(node_name='scratch', driver='file', filename=f'{folder}/scratch')
        self.add(node_name='base', driver=fmt, discard='unmap',
                 file={'driver': 'file', 'filename': f'{folder}/base.{fmt}', 'discard': 'unmap'})
        self.add(node_name='cbw', driver='copy-before-write', file='base', target='scratch', discard='unmap')
        self.add(node_name='frozen', driver='snapshot-access', file='cbw')
        self.qmp('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': self.socket}}})
        for name, node, writable in (('live', 'cbw', True), ('frozen', 'frozen', False)):
            self.qmp('block-export-add', {'type': 'nbd', 'id': name, 'node-name': node, 'name': name,
                                          'writable': writable})

    def try_monitor(self):
        try:
            return Qmp(f'{self.folder}/graph.qmp')
        except (FileNotFoundError, ConnectionRefusedError):
            return None

    def add(self, **options):
        self.qmp('blockdev-add', {k.replace('_', '-'): v for k, v in options.items()})

    def connect(self, name, contexts=(), structured=True):
        h = nbd.NBD()
        h.set_request_structured_replies(structured)
        for context in contexts:
            h.add_meta_context(context)
        h.connect_uri(nbdpull.unix_uri(self.socket, name))
        return h

    def kill(self):
        self.qmp.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Cluster(harness.Case):
    def graph(self, content, fmt):
        folder = f'{self.folder}/{fmt}{len(self.things)}'
        os.mkdir(folder)
        graph = Graph(folder, content, fmt)
        self.things.append(graph)
        return graph

    def has_bug(self):
        """What this QEMU does with one simple read over two clusters, the first of which was overwritten."""
        graph = self.graph(b'o' * (2 * CLUSTER), 'raw')
        live, frozen = graph.connect('live'), graph.connect('frozen', structured=False)
        live.pwrite(b'n' * CLUSTER, 0)
        live.flush()
        bug = bytes(frozen.pread(2 * CLUSTER, 0)) != b'o' * (2 * CLUSTER)
        live.shutdown()
        frozen.shutdown()
        return bug

    @staticmethod
    def scribble(h, rng):
        offset, length = rng.randrange(SIZE // 512) * 512, rng.choice((512, 4096, CLUSTER, 3 * CLUSTER))
        length = min(length, SIZE - offset)
        kind = rng.choice(('write', 'write', 'write', 'zero', 'trim'))
        if kind == 'write':
            h.pwrite(b'n' * length, offset)
        elif kind == 'zero':
            h.zero(length, offset)
        else:
            h.trim(length, offset)

    def read_wrong(self, graph, cluster, frozen):
        """How many of READS random reads through source/nbd are not what was frozen."""
        ranges, words, at, wrong = [], [], 0, 0
        for _ in range(READS):
            offset = harness.rng.randrange(SIZE // 512) * 512
            length = min(harness.rng.choice((4096, CLUSTER, 2 * CLUSTER, 5 * CLUSTER + 512)), SIZE - offset)
            ranges.append((offset, length))
            words += [str(offset), str(length)]
        path = f'{graph.folder}/read'
        with open(path, 'wb') as f:
            done = subprocess.run([reader(), graph.socket, 'frozen', str(cluster), *words], stdout=f, timeout=60,
                                  check=False)
        self.assertEqual(done.returncode, 0)
        with open(path, 'rb') as f:
            data = f.read()
        self.assertEqual(len(data), sum(length for _, length in ranges))
        for offset, length in ranges:
            wrong += data[at:at + length] != frozen[offset:offset + length]
            at += length
        return wrong

    def read_under_load(self, fmt, cluster):
        frozen = bytes(model.pattern(harness.library(), harness.rng.randrange(1 << 60), 0, SIZE))
        graph = self.graph(frozen, fmt)
        live = graph.connect('live')
        stop, seed = threading.Event(), harness.rng.randrange(1 << 60)

        def work():
            rng = harness.random.Random(seed)
            while not stop.is_set():
                self.scribble(live, rng)
                time.sleep(PAUSE)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            wrong = sum(self.read_wrong(graph, cluster, frozen) for _ in range(ROUNDS))
        finally:
            stop.set()
            thread.join()
        self.assertNotEqual(bytes(live.pread(SIZE // 2, 0)), frozen[:SIZE // 2], 'nobody wrote')
        live.shutdown()
        graph.kill()
        print(f'({fmt}, bound {cluster}: {wrong} of {ROUNDS * READS} reads wrong)', end=' ', flush=True)
        return wrong

    def test_unbounded_reads_show_live_bytes_where_the_bug_is(self):
        if not self.has_bug():
            self.skipTest(f'QEMU {harness.qemu_version()} does not have the bug')
        self.assertGreater(sum(self.read_under_load(fmt, 0) for fmt in ('raw', 'qcow2')), 0)

    def test_bounded_reads_show_frozen_bytes_on_every_qemu(self):
        print(f'(the bug is {"" if self.has_bug() else "not "}there)', end=' ')
        for fmt in ('raw', 'qcow2'):
            self.assertEqual(self.read_under_load(fmt, CLUSTER), 0)

    def test_unbounded_reads_are_right_where_the_bug_is_not(self):
        if self.has_bug():
            self.skipTest(f'QEMU {harness.qemu_version()} has the bug')
        for fmt in ('raw', 'qcow2'):
            self.assertEqual(self.read_under_load(fmt, 0), 0)

    def test_the_daemon_finds_out_which_qemu_it_has(self):
        guest = self.guest(Disk('vda', MIB))
        daemon = self.qpulld(guest, linger=0)
        nbdpull.pull(daemon.uri('vm/vda'))
        control = Qmp(daemon.control)
        found = control('query-vms')[0]['narrow-reads']
        control.close()
        self.assertEqual(found, self.has_bug(), 'the daemon\'s self-test and a read by hand say different things')
        daemon.stop()


if __name__ == '__main__':
    harness.main()
